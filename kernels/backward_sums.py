"""CUDA for the parts of backward_gradients.py that work below tiles.

sum_pairs       row and column sums of a [64, 64] accumulator in fp32: rows in the quads that
                share one, columns by halving over the eight lanes that share them
gate_gradient   dG of a chunk from the partial sums of both warpgroups, and its reverse
                cumulative sum dg, by one warp
beta_gradient   dbeta = <Vd, dV> / beta^2, and the list of pairs where that must not be done
"""

SOURCE = r"""
#ifndef GDN_GATE_GRADIENT
#define GDN_GATE_GRADIENT
namespace gdn {
// A thread's sums over rows l / 4 and l / 4 + 8 of its warp's 16, and over both of columns 8 j + 2 (l % 4) + f
// (x[2 j + f]), of a [64, 64] matrix: rows[64] and columns[4 warps][64] get the sums over its quad and warp.
__device__ __forceinline__ void sum_pairs(const float* x, float* rows, float* columns) {
  const int lane = threadIdx.x & 31, w = (threadIdx.x >> 5) & 3;
  float r0 = x[16], r1 = x[17];
  r0 += __shfl_xor_sync(~0u, r0, 1);
  r1 += __shfl_xor_sync(~0u, r1, 1);
  r0 += __shfl_xor_sync(~0u, r0, 2);
  r1 += __shfl_xor_sync(~0u, r1, 2);
  if ((lane & 3) == 0) {
    rows[w * 16 + (lane >> 2)] = r0;
    rows[w * 16 + (lane >> 2) + 8] = r1;
  }
  // of the 8 lanes that share columns, each keeps half at a step: at last one pair of columns
  const bool a = lane & 16, b = lane & 8, c = lane & 4;
  float y[8], z[4], u[2];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    y[i] = (a ? x[i + 8] : x[i]) + __shfl_xor_sync(~0u, a ? x[i] : x[i + 8], 16);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    z[i] = (b ? y[i + 4] : y[i]) + __shfl_xor_sync(~0u, b ? y[i] : y[i + 4], 8);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    u[i] = (c ? z[i + 2] : z[i]) + __shfl_xor_sync(~0u, c ? z[i] : z[i + 2], 4);
  const int j = (a ? 4 : 0) + (b ? 2 : 0) + (c ? 1 : 0);
  *(float2*)(columns + w * 64 + j * 8 + (lane & 3) * 2) = make_float2(u[0], u[1]);
}
__device__ __forceinline__ void meet(int barrier) {
  asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory");
}
// One warp. sums: for both warpgroups rows[64], columns[4][64], dots[64], ends[64]; traces: <dS, S> of
// 64 parts, and gamma_C. Writes the reverse cumulative sum of dG for the first `valid` tokens.
__device__ __forceinline__ void gate_gradient(const float* sums, const float* traces, float* dg,
                                              long stride, int valid) {
  const int lane = threadIdx.x & 31;
  float x[2], tail = (traces[lane] + traces[lane + 32]) * traces[64];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane * 2 + i;
    float y = 0;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float* s = sums + w * 448;
      float column = 0;
#pragma unroll
      for (int p = 0; p < 4; ++p) column += s[64 + p * 64 + t];
      y += s[t] - column + s[320 + t];
      if (t < valid) tail += s[384 + t];
    }
    x[i] = t < valid ? y : 0.f;
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) tail += __shfl_xor_sync(~0u, tail, d);
  float sum = x[0] + x[1];
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const float y = __shfl_down_sync(~0u, sum, d);
    if (lane + d < 32) sum += y;
  }
  if (lane * 2 < valid) dg[(long)lane * 2 * stride] = sum + tail;
  if (lane * 2 + 1 < valid) dg[(long)(lane * 2 + 1) * stride] = sum - x[0] + tail;
}
// One warp. dbeta_t = <Vd_t, dV_t> / beta_t^2; a (chunk, head) pair that holds a smaller beta is
// appended to the list (pairs[0] is its length), in no particular order. b0 and b1 are the betas of
// tokens lane and lane + 32.
__device__ __forceinline__ void beta_gradient(float b0, float b1, const float* products,
                                              float* dbeta, int* pairs, int pair, long stride,
                                              int valid, float smallest) {
  const int lane = threadIdx.x & 31;
  const float b[2] = {b0, b1};
  bool small = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    if (t < valid) {
      const bool tiny = fabsf(b[i]) < smallest;
      dbeta[t * stride] = tiny ? 0.f : products[t] / (b[i] * b[i]);
      small |= tiny;
    }
  }
  if (__any_sync(~0u, small) && lane == 0) pairs[1 + atomicAdd(pairs, 1)] = pair;
}
// Shared memory written so far, seen by products and bulk copies; global memory is not waited for.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
}  // namespace gdn
#endif
"""
