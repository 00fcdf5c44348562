"""1 / |q| of every token and key head, once for the chains that would all find it again.

    qnorm = rsqrt(|q|^2 + 1e-6)

One CTA a (chunk, key head), 16 threads a row. prepare.py has the keys' from K K^T.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, COUNT, END, FLAGS, ROW, TARGET, find_segment


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def query_norms(*, dtype="bfloat16"):
    C, K = CHUNK, 128
    f32, i32 = "float32", "int32"
    L, NC, Hk, N1 = T.dynamic("L"), T.dynamic("NC"), T.dynamic("Hk"), T.dynamic("N1")

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        cu: T.Tensor((N1,), i32),
        qnorm: T.Tensor((NC, Hk, C), f32),
        bits: T.int32,
    ):
        with T.Kernel(Hk, NC, threads=128) as (h, slot):
            tx = T.get_thread_binding()
            at = T.alloc_local((7,), i32)
            find_segment(cu, slot, 1, N1 - 1, bits, at)
            x = T.alloc_local((8,), dtype)
            total = T.alloc_local((1,), f32)
            if at[COUNT] > 0:
                for i in T.unroll(C // 8):
                    r = i * 8 + tx // 16
                    total[0] = 0.0
                    if at[ROW] + r < at[END]:
                        for y in T.vectorized(8):
                            x[y] = q[at[ROW] + r, h, tx % 16 * 8 + y]
                        for y in T.unroll(8):
                            total[0] += T.cast(x[y], f32) * T.cast(x[y], f32)
                    for step in T.unroll(4):
                        total[0] += T.shfl_xor(total[0], 8 >> step)
                    if tx % 16 == 0:
                        qnorm[slot, h, r] = T.rsqrt(total[0] + 1e-6)

    return main
