"""Preparation: what the serial kernels need of a chunk, one CTA a (chunk, key head).

    gate   G_i, the cumulative log gate of the chunk, inclusive, in log2       [NC, Hv, 64] fp32
    a      exp(G_i - G_j) (I + tril(diag(beta) K K^T, -1))^-1_ij beta_j       [NC, Hv, 64, 64]
    rnorm  1 / sqrt(|k_i|^2 + 1e-6), if the kernels normalise                 [NC, Hk, 64] fp32

NC counts chunk slots (common.py). K K^T is one wgmma, reused by the value heads of the key head;
its diagonal gives the norms, so that normalised keys need no pass of their own. Tokens past the
end of a document get beta = 0, g = 0: their rows and columns of `a` are zero.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, FLAGS, TARGET, accumulator_layout, find_document
from .inverse import SOURCE

CUDA_NAMES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def prepare(
    *, ratio, dtype="bfloat16", gate_dtype="float32", beta_dtype="float32", normalize=False
):
    C, K, R = CHUNK, 128, ratio
    f32, i32 = "float32", "int32"
    half = "true" if dtype == "float16" else "false"
    types = f"{R}, {CUDA_NAMES[gate_dtype]}, {CUDA_NAMES[beta_dtype]}"
    L, NC, Hk, Hv = T.dynamic("L"), T.dynamic("NC"), T.dynamic("Hk"), T.dynamic("Hv")
    N1, NR = T.dynamic("N1"), T.dynamic("NR")

    @T.prim_func
    def main(
        k: T.Tensor((L, Hk, K), dtype),
        g: T.Tensor((L, Hv), gate_dtype),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        bits: T.int32,
    ):
        with T.Kernel(Hk, NC, threads=128) as (hk, slot):
            T.import_source(SOURCE)
            T.annotate_min_blocks_per_sm(5)
            ks = T.alloc_shared((C, K), dtype)
            D = T.alloc_shared((R * 4 * 16 * 20,), f32)
            strips = T.alloc_shared((4 * 256,), f32)
            G = T.alloc_shared((R * C,), f32)
            B = T.alloc_shared((R * C,), f32)
            norms = T.alloc_shared((C,), f32)
            KK = T.alloc_fragment((C, C), f32)
            T.annotate_layout({KK: accumulator_layout(KK)})
            full = T.alloc_barrier(128)
            tx = T.get_thread_binding()

            doc = T.alloc_local((1,), i32)
            find_document(cu, slot, C, N1 - 1, bits, doc)
            begin, end = cu[doc[0]], cu[doc[0] + 1]
            row = begin + (slot - T.truncdiv(begin, C) - doc[0]) * C
            if row < end:
                T.tma_copy(k[row : row + C, hk, :], ks, barrier=full)
                T.mbarrier_arrive(full)
                T.call_extern(
                    "handle",
                    f"gdn::gates<{types}>",
                    T.access_ptr(g[row, hk * R], "r"),
                    T.access_ptr(beta[row, hk * R], "r"),
                    T.access_ptr(G[0], "w"),
                    T.access_ptr(B[0], "w"),
                    T.access_ptr(gate[slot, hk * R, 0], "w"),
                    Hv,
                    end - row,
                )
                T.mbarrier_wait_parity(full, 0)
                T.wgmma_gemm(ks, ks, KK, transpose_B=True, clear_accum=True)
                T.wait_wgmma(0)
                if normalize:
                    T.call_extern(
                        "handle",
                        "gdn::normalize",
                        T.access_ptr(KK[tx // 32 * 16 + tx % 32 // 4, tx % 4 * 2], "rw"),
                        T.access_ptr(norms[0], "rw"),
                        T.access_ptr(rnorm[slot, hk, 0], "w"),
                    )
                T.sync_threads()  # K is read for the last time: K K^T takes its place
                T.call_extern(
                    "handle",
                    "gdn::scatter",
                    T.access_ptr(KK[tx // 32 * 16 + tx % 32 // 4, tx % 4 * 2], "r"),
                    T.access_ptr(ks[0, 0], "rw"),
                )
                T.sync_threads()
                T.call_extern(
                    "handle",
                    f"gdn::diagonal<{R}>",
                    T.access_ptr(ks[0, 0], "r"),
                    T.access_ptr(B[0], "r"),
                    T.access_ptr(D[0], "w"),
                )
                T.sync_threads()
                T.call_extern(
                    "handle",
                    f"gdn::rows<{R}, {half}>",
                    T.access_ptr(ks[0, 0], "r"),
                    T.access_ptr(D[0], "r"),
                    T.access_ptr(G[0], "r"),
                    T.access_ptr(strips[0], "rw"),
                    T.access_ptr(a[slot, hk * R, 0, 0], "w"),
                )

    return main
