"""1 / sqrt(|q_i|^2 + 1e-6) of the queries, [NC, Hk, 64] fp32 by chunk slots (common.py).

prepare.py has it of the keys, from the diagonal of K K^T. Here q is read once, for all value heads of
a key head in all kernels of forward and backward. One CTA a (chunk, key head), eight threads a row,
all of a thread's loads under way at once. Rows past the end of a document get zero.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, FLAGS, SEARCH, TARGET, find_document

LANES = 8  # threads of a row, and numbers of a load
THREADS = 128
ROWS = CHUNK * LANES // THREADS  # of a thread


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def query_norms(*, dtype="bfloat16"):
    C, K = CHUNK, 128
    LOADS = K // LANES // LANES  # of a row
    f32, i32 = "float32", "int32"
    L, NC = T.dynamic("L", "int64"), T.dynamic("NC")
    Hk, N1 = T.dynamic("Hk"), T.dynamic("N1")

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        cu: T.Tensor((N1,), i32),
        qnorm: T.Tensor((NC, Hk, C), f32),
    ):
        with T.Kernel(Hk, NC, threads=THREADS) as (hk, slot):
            T.import_source(SEARCH)
            rows = T.alloc_local((ROWS * LOADS * LANES,), dtype)
            square = T.alloc_local((1,), f32)
            mine = T.alloc_local((1,), f32)
            doc = T.alloc_local((1,), i32)
            tx = T.get_thread_binding()
            lane = tx % LANES
            first = tx // LANES * ROWS
            find_document(cu, slot, C, N1 - 1, doc)
            begin, end = cu[doc[0]], cu[doc[0] + 1]
            row = begin + (slot - T.truncdiv(begin, C) - doc[0]) * C + first
            for u in T.unroll(ROWS):
                for i in T.unroll(LOADS):
                    for c in T.vectorized(LANES):
                        rows[(u * LOADS + i) * LANES + c] = 0
                    if row + u < end:
                        for c in T.vectorized(LANES):
                            rows[(u * LOADS + i) * LANES + c] = q[
                                row + u, hk, (i * LANES + lane) * LANES + c
                            ]
            mine[0] = 0.0
            for u in T.unroll(ROWS):
                square[0] = 0.0
                for c in T.unroll(LOADS * LANES):
                    x = T.cast(rows[u * LOADS * LANES + c], f32)
                    square[0] += x * x
                for step in T.unroll(LANES.bit_length() - 1):
                    square[0] += T.shfl_xor(square[0], 1 << step)
                if lane == u:
                    if row + u < end:
                        mine[0] = T.rsqrt(square[0] + 1e-6)
            if lane < ROWS:
                if row - first < end:
                    qnorm[slot, hk, first + lane] = mine[0]

    return main
