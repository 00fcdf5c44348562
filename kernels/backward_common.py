"""What the backward's chains share: moving tiles between registers and shared memory.

Tiles that leave lie in shared memory as panels of 64 rows by 64 columns (128 swizzled bytes a row),
one panel after the other, so that a warpgroup writes and sends its own without the others.
"""

import tilelang.language as T

from .common import CHUNK, MATRIX_COPIES

SOURCE = (
    MATRIX_COPIES
    + r"""
#ifndef GDN_BACKWARD_COPIES
#define GDN_BACKWARD_COPIES
namespace gdn {
__device__ __forceinline__ void store_matrix(void* tile, const void* registers) {
  const unsigned* r = (const unsigned*)registers;
  asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(tile)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Shared memory written so far, seen by products and bulk copies. Unlike TileLang's fence it does not
// wait for global memory.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
}  // namespace gdn
#endif
"""
)


# TileLang is told that the tiles are read: for a write it puts fences of its own, which wait for all memory,
# before each product and each copy. The kernels call fence_shared.


@T.macro
def stage_state(Sf, ss, tx):
    """Sf [value columns, K] -> two panels a warpgroup in `ss`, which holds them by (warpgroup, half of K)."""
    for x in T.unroll(8):
        T.call_extern(
            "handle",
            "gdn::store_matrix",
            T.access_ptr(
                ss[
                    (tx // 128 * 2 + x // 4) * 64 + tx // 32 % 4 * 16 + tx % 16,
                    x % 4 * 16 + tx % 32 // 16 * 8,
                ],
                "r",
            ),
            T.access_ptr(Sf[tx // 32 * 16 + tx % 32 // 4, x * 16 + tx % 4 * 2], "r"),
        )


@T.macro
def stage_rows(Of, os_, tx):
    """Of [tokens, value columns] in a transposed_layout -> a panel a warpgroup in `os_`."""
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "gdn::store_matrix_trans",
            T.access_ptr(
                os_[
                    tx // 128 * 64 + x * 16 + tx % 32 // 16 * 8 + tx % 8,
                    tx // 32 % 4 * 16 + tx % 16 // 8 * 8,
                ],
                "r",
            ),
            T.access_ptr(Of[x * 16 + tx % 4 * 2, tx // 32 * 16 + tx % 32 // 4], "r"),
        )


@T.macro
def send_state(ss, states, slot, h, column, w):
    """The panels of warpgroup `w` -> states[slot, h], [V, K], rows from `column` on."""
    T.tma_copy(ss[w * 128 : w * 128 + 64, :], states[slot, h, column : column + 64, 0:64])
    T.tma_copy(ss[w * 128 + 64 : w * 128 + 128, :], states[slot, h, column : column + 64, 64:128])


@T.macro
def send_rows(os_, rows, at, end, h, column, w, tx, threads):
    """The panel of warpgroup `w` -> rows[at : end, h], by so many threads if a document ends in it."""
    if at + CHUNK <= end:
        T.tma_copy(
            os_[w * CHUNK : w * CHUNK + CHUNK, :], rows[at : at + CHUNK, h, column : column + 64]
        )
    else:
        for x in T.serial(CHUNK * 8 // threads):
            r = x * (threads // 8) + tx % threads // 8
            if at + r < end:
                for y in T.vectorized(8):
                    rows[at + r, h, column + tx % 8 * 8 + y] = os_[w * CHUNK + r, tx % 8 * 8 + y]
