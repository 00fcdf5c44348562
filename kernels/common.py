"""What the kernels share: target, chunk geometry, fragment layouts, and the way a packed batch is cut.

Documents are packed along one token axis; document i holds tokens cu[i] to cu[i + 1] - 1 and its
grid of chunks starts at its first token. Blocks of B tokens (chunks of 64, segments of a multiple
of 64) are numbered without a prefix sum over documents: block j of document i lives in slot

    cu[i] // B + i + j.

Slots of different documents never meet, because a document of n tokens needs at most
floor(cu[i + 1] / B) - floor(cu[i] / B) + 1 of them, and there are total // B + N slots in all, a
number known on the host from shapes alone. Slots that no document uses stay empty.

Blocks that are not the last of their document are full: each holds one token whose number is B - 1
modulo B, and there are at most (total - 1) // B of them, however many documents. Block j of document
i, without the last, is numbered by these tokens: cu[i] // B + j. That is where the state that leaves
it lies, and its M. Work on such blocks alone needs fewer CTAs than there are slots.
"""

import tilelang
import tilelang.language as T
from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import TensorCoreIntrinEmitter

CHUNK = 64
TARGET = {"kind": "cuda", "arch": "sm_90a"}
FLAGS = {
    tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True,
    # Every barrier is written out: TileLang would guard each copy of a warpgroup with its own.
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    tilelang.PassConfigKey.TL_DISABLE_BUFFER_INIT_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
}


def _accumulators(emitter) -> int:
    """32-bit accumulators of a thread. TileLang 0.1.15 counts those of every warpgroup along M and
    fences registers past the end of the fragment, which serialises the products around it."""
    return emitter.wgmma_num_inst_m * emitter.warp_cols * emitter.local_size_out


TensorCoreIntrinEmitter.wgmma_accum_regs = property(_accumulators)

# The last of `documents` ones whose first slot cu[i] // block + i is not past `slot`; or, if not
# `numbered`, whose cu[i] // block is not. The lanes of a warp look at 32 at once.
SEARCH = r"""
#ifndef GDN_SEARCH
#define GDN_SEARCH
namespace gdn {
__device__ __forceinline__ int find_document(const int* cu, int slot, int block, int documents,
                                             int numbered) {
  const int lane = threadIdx.x & 31;
  int first = 0, count = documents;
  while (count > 1) {
    const int step = (count + 31) >> 5, i = lane * step;
    const bool begins = i < count && cu[first + i] / block + (first + i) * numbered <= slot;
    const int last = max(__popc(__ballot_sync(~0u, begins)) - 1, 0) * step;
    first += last;
    count = min(step, count - last);
  }
  return first;
}
// Numbered, by halving: as every lane does the same, the compiler knows that the result is the same, too,
// and keeps what follows from it in uniform registers.
__device__ __forceinline__ int halve_documents(const int* cu, int slot, int block, int documents) {
  int first = 0;
  for (int step = documents > 1 ? 1 << (31 - __clz(documents - 1)) : 0; step > 0; step >>= 1) {
    const int guess = first + step;
    if (guess < documents && cu[guess] / block + guess <= slot) first = guess;
  }
  return first;
}
}  // namespace gdn
#endif
"""

# Data movement between accumulators and shared memory that TileLang has no word for.
MATRIX_COPIES = (
    SEARCH
    + r"""
#ifndef GDN_MATRIX_COPIES
#define GDN_MATRIX_COPIES
namespace gdn {
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void store_matrix_trans(void* tile, const void* registers) {
  const unsigned* r = (const unsigned*)registers;
  asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(tile)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// The last chunks of a segment over which the log2 gates sum to less than `limit`: out[0] chunks.
// out[1] is 0 if there are such, 1 if the decay over all `count` stays above the limit. `last` is
// the final chunk's gate; a warp takes 32 chunks at a time.
__device__ __forceinline__ void near_chunks(const float* last, long stride, int count, float limit,
                                            int* out) {
  const int lane = threadIdx.x & 31;
  float sum = 0;
  out[0] = count;
  out[1] = 1;
  for (int base = 0; base < count; base += 32) {
    float d = base + lane < count ? last[-(base + lane) * stride] : 0.f;
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
      const float x = __shfl_up_sync(~0u, d, i);
      if (lane >= i) d += x;
    }
    const unsigned past = __ballot_sync(~0u, sum + d < limit);
    if (past) {
      out[0] = min(count, base + __ffs(past));
      out[1] = 0;
      return;
    }
    sum += __shfl_sync(~0u, d, 31);
  }
}
__device__ __forceinline__ void wait_named(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}
// Two warpgroups issue products in turn: the other one computes on registers meanwhile. The second
// one passes before its first wait, and does not pass after its last one.
__device__ __forceinline__ void wait_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(5 + group) : "memory");
}
__device__ __forceinline__ void pass_turn(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(6 - group) : "memory");
}
}  // namespace gdn
#endif
"""
)


def slots(tokens: int, documents: int, block: int) -> int:
    """Number of slots that hold every block of `block` tokens of a packed batch."""
    return tokens // block + documents


def cuts(tokens: int, block: int) -> int:
    """How many blocks of `block` tokens are not the last of their document, at most."""
    return max(0, (tokens - 1) // block)


def accumulator_layout(buffer):
    """Rows over warps of 16, as the result of a wgmma lies in registers."""
    return T.Fragment(
        buffer.shape,
        forward_thread_fn=lambda i, j: (i // 16) * 32 + (i % 8) * 4 + (j % 8) // 2,
        forward_index_fn=lambda i, j: (j // 8) * 4 + ((i % 16) // 8) * 2 + j % 2,
    )


def transposed_layout(buffer):
    """The same registers, with the buffer's indices the other way round."""
    return T.Fragment(
        buffer.shape,
        forward_thread_fn=lambda j, i: (i // 16) * 32 + (i % 8) * 4 + (j % 8) // 2,
        forward_index_fn=lambda j, i: (j // 8) * 4 + ((i % 16) // 8) * 2 + j % 2,
    )


# What find_segment leaves behind.
DOC, PART, COUNT, ROW, CHUNK_SLOT, END, LAST = range(7)


@T.macro
def find_document(cu, slot, block, documents, doc):
    """doc[0] <- the last document whose first slot is not past `slot`. For whole warps."""
    doc[0] = T.call_extern(
        "int32", "gdn::find_document", T.access_ptr(cu[0], "r"), slot, block, documents, 1
    )


@T.macro
def find_token(cu, token, documents, doc):
    """doc[0] <- the document that holds `token`. For whole warps."""
    doc[0] = T.call_extern(
        "int32", "gdn::find_document", T.access_ptr(cu[0], "r"), token, 1, documents, 0
    )


@T.macro
def find_segment(cu, slot, segment, documents, at, halving=False):
    """Where a segment of `segment` chunks lies: see the names above. COUNT is 0 in an empty slot.
    `halving`: slower for many documents, and the same for all lanes, as the compiler sees it."""
    block = segment * CHUNK
    if halving:
        at[DOC] = T.call_extern(
            "int32", "gdn::halve_documents", T.access_ptr(cu[0], "r"), slot, block, documents
        )
    else:
        find_document(cu, slot, block, documents, at)
    begin, end = cu[at[DOC]], cu[at[DOC] + 1]
    at[PART] = slot - T.truncdiv(begin, block) - at[DOC]
    place_segment(begin, end, segment, at)


@T.macro
def find_sequence(cu, order, ordered, slot, segment, documents, at, halving=False):
    """The same; if `ordered`, segments are whole documents, in that order."""
    if ordered != 0:
        at[DOC] = order[slot]
        at[PART] = 0
        place_segment(cu[at[DOC]], cu[at[DOC] + 1], segment, at)
    else:
        find_segment(cu, slot, segment, documents, at, halving)


@T.macro
def place_segment(begin, end, segment, at):
    """The rest of `at` for segment PART of document DOC, tokens `begin` to `end` - 1."""
    chunks = T.truncdiv(end - begin + CHUNK - 1, CHUNK)
    at[COUNT] = T.max(T.min(segment, chunks - at[PART] * segment), 0)
    at[ROW] = begin + at[PART] * (segment * CHUNK)
    at[CHUNK_SLOT] = T.truncdiv(begin, CHUNK) + at[DOC] + at[PART] * segment
    at[END] = end
    at[LAST] = T.max(T.truncdiv(chunks + segment - 1, segment), 1) - 1


@T.macro
def find_boundary(at, segment, place):
    """place[0] <- where the state lies that leaves segment `at`, unless it is its document's last; that which enters
    it is one before. In a variable: a division in an index is made for every element."""
    place[0] = T.truncdiv(at[ROW], segment * CHUNK)


@T.macro
def load_transposed(tile, first, fragment, tx):
    """Rows `first` to first + 63 of a swizzled [_, 64] buffer into a transposed_layout fragment."""
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "tl::ptx_ldmatrix_x4_trans",
            T.access_ptr(
                tile[
                    first + x * 16 + tx % 32 // 16 * 8 + tx % 8,
                    tx // 32 % 4 * 16 + tx % 16 // 8 * 8,
                ],
                "r",
            ),
            T.access_ptr(fragment[x * 16 + tx % 4 * 2, tx // 32 * 16 + tx % 32 // 4], "w"),
        )


@T.macro
def store_transposed(fragment, tile, first, tx):
    """The other way; rows `first` to first + 63 must be free, and need a proxy fence before TMA."""
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "gdn::store_matrix_trans",
            T.access_ptr(
                tile[
                    first + x * 16 + tx % 32 // 16 * 8 + tx % 8,
                    tx // 32 % 4 * 16 + tx % 16 // 8 * 8,
                ],
                "w",
            ),
            T.access_ptr(fragment[x * 16 + tx % 4 * 2, tx // 32 * 16 + tx % 32 // 4], "r"),
        )
