"""Shared memory by addresses that a warpgroup keeps in registers, for the chain of recurrence_alone.py.

The compiler would find an address again in every chunk, ahead of the products; it cannot make one
again that an empty instruction hands it.

    HELD              the functions in CUDA: addresses, and copies and barriers at them
    arrive, wait      a barrier of several, by the address of the first
    put               a bf16 tile of the chain's into panels of 64 columns
    read_values       what scales a chunk's U, and its v
"""

import tilelang.language as T

from .common import CHUNK

C, BV = CHUNK, 64

HELD = r"""
#ifndef GDN_HELD
#define GDN_HELD
namespace gdn {
// Addresses in registers, which the compiler cannot make again from the number of the thread.
__device__ __forceinline__ unsigned held(unsigned a) {
  asm volatile("" : "+r"(a));
  return a;
}
__device__ __forceinline__ unsigned held_address(const void* p) { return held(shared_address(p)); }
// Where this lane's row of columns 16x to 16x + 15 lies in a swizzled [64, 64] tile, for stmatrix.
__device__ __forceinline__ unsigned row_address(const void* tile, int x) {
  const unsigned t = threadIdx.x, l = t & 31;
  return held(shared_address(tile) + ((t >> 5) * 16 + (l & 15)) * 128 +
              ((((l >> 4) + 2 * x) ^ (l & 7)) << 4));
}
// The same for ldmatrix of the transposed tile, rows 0 to 15.
__device__ __forceinline__ unsigned column_address(const void* tile) {
  const unsigned t = threadIdx.x, l = t & 31;
  return held(shared_address(tile) + ((l >> 4) * 8 + (l & 7)) * 128 +
              (((t >> 5) * 2 + (l >> 3 & 1)) ^ (l & 7)) * 16);
}
__device__ __forceinline__ void store_at(unsigned at, const void* registers) {
  const unsigned* r = (const unsigned*)registers;
  asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void load_trans_at(unsigned at, void* registers) {
  unsigned* r = (unsigned*)registers;
  asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void arrive_at(unsigned at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void wait_at(unsigned at, unsigned parity) {
  asm volatile("{\n.reg .pred P1;\nWAIT:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n"
               "@P1 bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(at), "r"(parity) : "memory");
}
}  // namespace gdn
#endif
"""


@T.macro
def arrive(barriers, i, tx):
    T.call_extern("handle", "__syncwarp")
    if tx % 32 == 0:
        T.call_extern("handle", "gdn::arrive_at", barriers[0] + T.Cast("uint32", i * 8))


@T.macro
def wait(barriers, i, parity):
    at = barriers[0] + T.Cast("uint32", i * 8)
    T.call_extern("handle", "gdn::wait_at", at, T.Cast("uint32", parity))


@T.macro
def put(fragment, rows, offset, columns, tx):
    """A bf16 tile of the chain's -> panels of 64 columns, `offset` bytes after the state's place."""
    for x in T.unroll(columns // 16):
        T.call_extern(
            "handle",
            "gdn::store_at",
            rows[x % 4] + (offset + T.uint32(x // 4 * 8192)),
            T.access_ptr(fragment[tx // 32 * 16 + tx % 32 // 4, x * 16 + tx % 4 * 2], "r"),
        )


@T.macro
def read_values(column, ein, es, Vb, E, decay, s, tx):
    """v of slot s, what scales U, and the decay of the chunk."""
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "gdn::load_trans_at",
            column[0] + T.Cast("uint32", s * 8192 + x * 2048),
            T.access_ptr(Vb[x * 16 + tx % 4 * 2, tx // 32 * 16 + tx % 32 // 4], "w"),
        )
    for x, y in T.Parallel(BV, C):
        E[x, y] = ein[s, y]
    decay[0] = es[s]
