"""CUDA for what prepare.py reads beside the keys: gates and strengths of a chunk, and 1/|k|.

gates       loads of a thread's token for all heads of the key head at once, in shared memory
            head by head, and cumulative sums, a warp a head
prefetch    what another CTA will read, into L2: a CTA waits for its gates, small pieces of many
            tokens, longer than for its keys
normalize   K K^T of normalised keys, from its diagonal
"""

INPUTS = r"""
#ifndef GDN_INPUTS
#define GDN_INPUTS
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace gdn {
__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

// R numbers of a token in as few loads as their size and place allow: 32 lanes read 32 lines, and
// each load costs the cache a cycle a line.
template <int R, typename X> __device__ __forceinline__ void load_token(const X* p, float* x) {
  constexpr int size = R * (int)sizeof(X), V = size % 16 == 0 ? 16 : size % 8 == 0 ? 8 : 4;
  alignas(16) X y[R];
  if (size % 4 == 0 && (size_t)p % V == 0) {
#pragma unroll
    for (int i = 0; i < size / V; ++i) {
      if (V == 16) ((uint4*)y)[i] = ((const uint4*)p)[i];
      else if (V == 8) ((uint2*)y)[i] = ((const uint2*)p)[i];
      else ((unsigned*)y)[i] = ((const unsigned*)p)[i];
    }
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) y[r] = p[r];
  }
#pragma unroll
  for (int r = 0; r < R; ++r) x[r] = as_float(y[r]);
}

// Cumulative log2 gate and beta of the chunk. Tokens from `valid` on get gate 0 and beta 0, which
// makes their rows and columns of a vanish.
template <int R, typename Gate, typename Beta>
__device__ __forceinline__ void gates(const void* g, const void* beta, float* G, float* B, int Hv,
                                      int valid) {
  // Two warps for each input, a thread a token.
  const int token = threadIdx.x & 63, side = threadIdx.x >> 6;
  const long first = (long)min(token, valid - 1) * Hv;
  const bool real = token < valid;
  float x[R];
  if (side) load_token<R>((const Beta*)beta + first, x);
  else load_token<R>((const Gate*)g + first, x);
  float* to = side ? B : G;
#pragma unroll
  for (int r = 0; r < R; ++r)
    to[r * 64 + token] = real ? x[r] * (side ? 1.f : 1.4426950408889634f) : 0.f;
  __syncthreads();
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, i = 2 * lane;
  for (int r = w; r < R; r += 4) {
    const float2 x = *(const float2*)(G + r * 64 + i);
    float sum = x.x + x.y;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const float y = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += y;
    }
    float before = __shfl_up_sync(~0u, sum, 1);
    if (lane == 0) before = 0;
    *(float2*)(G + r * 64 + i) = make_float2(before + x.x, sum);
  }
}
template <int R> __device__ __forceinline__ void store_gates(const float* G, float* out) {
  const int x = threadIdx.x;
#pragma unroll
  for (int i = 0; i < R * 16; i += 128)
    if (i + x < R * 16) ((float4*)out)[i + x] = ((const float4*)G)[i + x];
}

// Keys (k, of 256 bytes) and gates of the CTA that is `ahead` CTAs on, if its chunk is of the same
// document. left: tokens of the document from this chunk on.
template <int R, typename Gate, typename Beta, int ahead>
__device__ __forceinline__ void prefetch(const void* k, const void* g, const void* beta, int Hk,
                                         int Hv, int left) {
  const int x = threadIdx.x, first = (int)__fdividef(ahead, Hk) * 64;
  if (first + 64 > left) return;
  const char* p = (const char*)k + (long)(first + (x >> 1)) * (Hk * 256) + (x & 1) * 128;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  const long at = (long)(first + (x & 63)) * Hv;
  p = x < 64 ? (const char*)((const Gate*)g + at) : (const char*)((const Beta*)beta + at);
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// norms[i] = 1 / sqrt(KK_ii + 1e-6), and KK <- diag(norms) KK diag(norms).
__device__ __forceinline__ void normalize(float* kk, float* out) {
  __shared__ float norms[64];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (w * 16 + g + 8 * (i >> 1) == j * 8 + 2 * t + (i & 1)) {
        const float x = rsqrtf(kk[j * 4 + i] + 1e-6f);
        norms[j * 8 + 2 * t + (i & 1)] = x;
        out[j * 8 + 2 * t + (i & 1)] = x;
      }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      kk[j * 4 + i] *= norms[w * 16 + g + 8 * (i >> 1)] * norms[j * 8 + 2 * t + (i & 1)];
}
}  // namespace gdn
#endif
"""
