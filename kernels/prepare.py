"""Preparation: what the serial kernels need of a chunk, one CTA a (chunk, key head).

    gate   G_i, the cumulative log gate of the chunk, inclusive, in log2       [NC, Hv, 64] fp32
    a      exp(G_i - G_j) (I + tril(diag(beta) K K^T, -1))^-1_ij beta_j       [NC, Hv, 64, 64]
    rnorm  1 / sqrt(|k_i|^2 + 1e-6), if the kernels normalise                 [NC, Hk, 64] fp32

NC counts chunk slots (common.py). K K^T is one wgmma, reused by the value heads of the key head;
its diagonal gives the norms, so that normalised keys need no pass of their own. Tokens past the
end of a document get beta = 0, g = 0: their rows and columns of `a` are zero. `a` goes out by bulk
copies from where K lay, block rows of a head by the warp that made them.
"""

import tilelang
import tilelang.language as T

from .blocks import BLOCK, BLOCKS, TRIANGLE
from .common import CHUNK, FLAGS, SEARCH, TARGET, accumulator_layout, find_document
from .inverse import INVERSE
from .prepare_inputs import INPUTS

CUDA_NAMES = {"float32": "float", "bfloat16": "__nv_bfloat16", "float16": "__half"}
PROCESSORS = 132  # of an H100 or H200; elsewhere what is prefetched is only less apt
SHARED = 228 << 10  # bytes of shared memory of a multiprocessor


def ctas(ratio: int) -> int:
    """CTAs that a multiprocessor holds: as many as shared memory allows, with 72 registers or more."""
    blocks = 6 * BLOCK + ratio * 4 * TRIANGLE
    used = (2 << 10) + 2 * CHUNK * CHUNK * 2 + 4 * (blocks + ratio * 2 * CHUNK)
    return min(7, SHARED // used)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def prepare(
    *, ratio, dtype="bfloat16", gate_dtype="float32", beta_dtype="float32", normalize=False
):
    C, K, R = CHUNK, 128, ratio
    f32, i32 = "float32", "int32"
    half = "true" if dtype == "float16" else "false"
    types = f"{R}, {CUDA_NAMES[gate_dtype]}, {CUDA_NAMES[beta_dtype]}"
    held = ctas(ratio)
    ahead = PROCESSORS * (held if ratio <= 2 else 4)  # CTAs; 6 were 5 % slower at a ratio of 4
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
        tickets: T.Tensor((1,), i32),
    ):
        with T.Kernel(Hk, NC, threads=128) as (hk, slot):
            T.import_source(SEARCH + BLOCKS + INVERSE + INPUTS)
            T.annotate_min_blocks_per_sm(held)
            ks = T.alloc_shared((2 * C, C), dtype)  # halves of K's columns; then heads of a
            triangles = T.alloc_shared((R * 4 * TRIANGLE,), f32)
            blocks = T.alloc_shared((6 * BLOCK,), f32)
            G = T.alloc_shared((R * C,), f32)
            B = T.alloc_shared((R * C,), f32)
            KK = T.alloc_fragment((C, C), f32)
            T.annotate_layout({KK: accumulator_layout(KK)})
            full = T.alloc_barrier(128)
            tx = T.get_thread_binding()

            if slot == 0 and hk == 0 and tx == 0:
                tickets[0] = 0  # of the main pass
            doc = T.alloc_local((1,), i32)
            find_document(cu, slot, C, N1 - 1, doc)
            begin, end = cu[doc[0]], cu[doc[0] + 1]
            row = begin + (slot - T.truncdiv(begin, C) - doc[0]) * C
            if row < end:
                T.tma_copy(k[row : row + C, hk, 0:C], ks[0:C, :], barrier=full)
                T.tma_copy(k[row : row + C, hk, C:K], ks[C : 2 * C, :], barrier=full)
                T.mbarrier_arrive(full)
                T.call_extern(
                    "handle",
                    f"gdn::gates<{types}>",
                    T.access_ptr(g[row, hk * R], "r"),
                    T.access_ptr(beta[row, hk * R], "r"),
                    T.access_ptr(G[0], "w"),
                    T.access_ptr(B[0], "w"),
                    Hv,
                    end - row,
                )
                T.call_extern(
                    "handle",
                    f"gdn::prefetch<{types}, {ahead}>",
                    T.access_ptr(k[row, hk, 0], "r"),
                    T.access_ptr(g[row, hk * R], "r"),
                    T.access_ptr(beta[row, hk * R], "r"),
                    Hk,
                    Hv,
                    end - row,
                )
                T.mbarrier_wait_parity(full, 0)
                T.wgmma_gemm(ks[0:C, :], ks[0:C, :], KK, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(ks[C : 2 * C, :], ks[C : 2 * C, :], KK, transpose_B=True)
                T.wait_wgmma(0)
                if normalize:
                    T.call_extern(
                        "handle",
                        "gdn::normalize",
                        T.access_ptr(KK[tx // 32 * 16 + tx % 32 // 4, tx % 4 * 2], "rw"),
                        T.access_ptr(rnorm[slot, hk, 0], "w"),
                    )
                T.call_extern(
                    "handle",
                    f"gdn::diagonal<{R}>",
                    T.access_ptr(KK[tx // 32 * 16 + tx % 32 // 4, tx % 4 * 2], "r"),
                    T.access_ptr(B[0], "r"),
                    T.access_ptr(blocks[0], "w"),
                    T.access_ptr(triangles[0], "w"),
                )
                T.sync_threads()  # all have read K: its place is free
                T.call_extern(
                    "handle",
                    f"gdn::store_gates<{R}>",
                    T.access_ptr(G[0], "r"),
                    T.access_ptr(gate[slot, hk * R, 0], "w"),
                )
                pair = tx // 64
                for n in T.serial((R + 1) // 2):
                    head = n * 2 + pair
                    if head < R:
                        T.call_extern(
                            "handle",
                            f"gdn::half_head<{half}>",
                            T.access_ptr(blocks[0], "r"),
                            T.access_ptr(triangles[0], "r"),
                            T.access_ptr(G[0], "r"),
                            T.access_ptr(ks[pair * C, 0], "rw"),
                            head,
                        )
                        if tx // 32 % 2 == 1:
                            T.tma_copy(
                                ks[pair * C + 48 : pair * C + 64, :],
                                a[slot, hk * R + head, 48:64, :],
                                leader_scope_threads=32,
                            )
                        else:
                            T.tma_copy(
                                ks[pair * C : pair * C + 48, :],
                                a[slot, hk * R + head, 0:48, :],
                                leader_scope_threads=32,
                            )
                T.tma_store_wait()

    return main
