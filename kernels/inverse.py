"""CUDA for the part of prepare.py that works below tiles: one 64x64 triangular inverse a value head.

For one chunk and the `R` value heads of one key head it turns K K^T (fp32, wgmma accumulators)
into a_ij = exp(G_i - G_j) Ainv_ij beta_j with Ainv = (I + tril(diag(beta) K K^T, -1))^-1. Sums are
fp32, and so is the substitution; what enters a product is two bf16 numbers. Inverses in 16-bit
precision, or by doubling, are known to overflow on trained models.

    scatter   K K^T leaves the accumulators lane by lane. Because it is symmetric the registers of
              an accumulator block are the B operand of the block product that needs it; they are
              split once into bf16 high and low parts.
    diagonal  warp w inverts the 16x16 diagonal blocks w of all heads by forward substitution, a
              lane a column, and multiplies column j by beta_j.
    rows      the off-diagonal blocks of a block row, right to left,
              A_ij = -(sum_{j < m <= i} A_im KK_mj) A_jj, products of high and low parts good to
              2^-16: the left operands are accumulators of the same warp, so that only B is read.
              The gate is applied to the registers that are stored.
"""

SOURCE = r"""
#ifndef GDN_INVERSE
#define GDN_INVERSE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace gdn {
// A 16x16 block in accumulator layout: v[n*4 + e*2 + f] is row g + 8e, column 8n + 2t + f, where
// g = lane / 4 and t = lane % 4.
// x and y as two pairs of bf16, x + y = high + low to 2^-17.
__device__ __forceinline__ void split(float x, float y, unsigned& high, unsigned& low) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(y), "f"(x));
  x -= __uint_as_float(high << 16);
  y -= __uint_as_float(high & 0xffff0000u);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(y), "f"(x));
}
// An accumulator block as A operand: [n * 2 + e] holds columns 8n + 2t + {0, 1} of row g + 8e.
struct Left {
  unsigned high[4], low[4];
  __device__ __forceinline__ void set(const float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(x[i * 2], x[i * 2 + 1], high[i], low[i]);
  }
};
__device__ __forceinline__ void mma(float* c, const unsigned* a, const unsigned* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_half(float* c, const unsigned* a, unsigned b) {  // k 8 to 15
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b));
}
// c += left * B with B's n = 8e + g, k = 8s + 2t + {0, 1} in [e * 2 + s]. If `lower`, B is lower
// triangular, so that its upper right tile is skipped.
template <bool lower>
__device__ __forceinline__ void product(float* c, const Left& a, const unsigned* bh,
                                        const unsigned* bl) {
#pragma unroll
  for (int x = 0; x < 3; ++x)  // low high, high low, high high
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned *b = (x == 1 ? bl : bh) + e * 2, *l = x == 0 ? a.low : a.high;
      if (lower && e == 1) mma_half(c + e * 4, l, b[1]);
      else mma(c + e * 4, l, b);
    }
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <bool half> __device__ __forceinline__ unsigned pack2(float low, float high) {
  unsigned r;
  if (half) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

constexpr int STRIDE = 20;            // of a column of a diagonal block, in floats
constexpr int DIAGONALS = 6 * 256;    // where the diagonal blocks begin in the 16 KB of scratch

// Cumulative log2 gate and beta of the chunk. Tokens from `valid` on get gate 0 and beta 0, which
// makes their rows and columns of a vanish. Read token by token, summed a warp a head.
template <int R, typename Gate, typename Beta>
__device__ __forceinline__ void gates(const void* g_, const void* beta_, float* G, float* B,
                                      float* out, int Hv, int valid) {
  // Two warps for each input, a thread a token: all its loads are in flight at once.
  const int token = threadIdx.x & 63, side = threadIdx.x >> 6;
  const long first = (long)min(token, valid - 1) * Hv;
  const bool real = token < valid;
  float x[R];
  if (side) {
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = as_float(((const Beta*)beta_)[first + r]);
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] = as_float(((const Gate*)g_)[first + r]);
  }
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
    const float2 c = make_float2(before + x.x, sum);
    *(float2*)(G + r * 64 + i) = c;
    *(float2*)(out + r * 64 + i) = c;
  }
}

// kk: accumulators of K K^T (m64n64, v[j8*4 + e*2 + f]), already scaled. scratch: the 6 blocks below
// the diagonal as B operands, high and low, then the 4 diagonal blocks, row major.
__device__ __forceinline__ void scatter(const float* kk, void* scratch) {
  float *blocks = (float*)scratch, *diagonals = blocks + DIAGONALS;
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j > w) {  // block (w, j) is block (j, w) transposed
      float* b = blocks + (j * (j - 1) / 2 + w) * 256 + lane * 4;
      unsigned h[4], l[4];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* x = kk + j * 8 + n * 4 + e * 2;
          split(x[0], x[1], h[e * 2 + n], l[e * 2 + n]);
        }
      *(uint4*)b = *(uint4*)h;
      *(uint4*)(b + 128) = *(uint4*)l;
    } else if (j == w) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          *(float2*)(diagonals + w * 256 + (g + 8 * e) * 16 + 8 * n + 2 * t) =
              make_float2(kk[j * 8 + n * 4 + e * 2], kk[j * 8 + n * 4 + e * 2 + 1]);
    }
  }
}

// norms[i] = 1 / sqrt(KK_ii + 1e-6), and KK <- diag(norms) KK diag(norms).
__device__ __forceinline__ void normalize(float* kk, float* norms, float* out) {
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

// Column c of (I + diag(b) tril(KK, -1))^-1, times b_c, of diagonal block w: a lane a column, two
// heads at a time on the two half warps. D: [head][block][column] columns of STRIDE floats.
template <int R>
__device__ __forceinline__ void diagonal(const void* scratch, const float* B, float* D) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, c = lane & 15, side = lane >> 4;
  const float* K = (const float*)scratch + DIAGONALS + w * 256;
  constexpr int N = (R + 1) / 2, NH = N < 2 ? N : 2;
#pragma unroll 1
  for (int n0 = 0; n0 < N; n0 += NH) {
    float x[NH][16];
#pragma unroll
    for (int n = 0; n < NH; ++n)
#pragma unroll
      for (int i = 0; i < 16; ++i) x[n][i] = 0.f;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      float row[16];
#pragma unroll
      for (int p = (m + 1) / 4; p < 4; ++p)
        *(float4*)(row + p * 4) = *(const float4*)(K + m * 16 + p * 4);
#pragma unroll
      for (int n = 0; n < NH; ++n) {
        const int r = min((n0 + n) * 2 + side, R - 1);
        const float v = (m == c ? 1.f : 0.f) - B[r * 64 + w * 16 + m] * x[n][m];
        x[n][m] = v;
#pragma unroll
        for (int i = m + 1; i < 16; ++i) x[n][i] += row[i] * v;
      }
    }
#pragma unroll
    for (int n = 0; n < NH; ++n) {
      const int r = (n0 + n) * 2 + side;
      if (r < R) {
        const float b = B[r * 64 + w * 16 + c];
        float* d = D + ((r * 4 + w) * 16 + c) * STRIDE;
#pragma unroll
        for (int p = 0; p < 4; ++p)
          *(float4*)(d + p * 4) = make_float4(x[n][p * 4] * b, x[n][p * 4 + 1] * b,
                                              x[n][p * 4 + 2] * b, x[n][p * 4 + 3] * b);
      }
    }
  }
}

// 16 rows of 64 columns, eight at a time through 1 KB of shared memory; 128-byte rows out.
__device__ __forceinline__ void put(unsigned* strip, const unsigned (*u)[4], unsigned short* out) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) strip[g * 32 + (((2 * j + n) ^ g) << 2) + t] = u[j][n * 2 + e];
    __syncwarp();
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int r = p * 4 + (lane >> 3), ch = lane & 7;
      *(uint4*)(out + (8 * e + r) * 64 + ch * 8) =
          *(const uint4*)(strip + r * 32 + ((ch ^ r) << 2));
    }
    __syncwarp();
  }
}

template <int I, bool half>
__device__ __forceinline__ void block_row(const float* blocks, const float* D, const float* G,
                                          unsigned* strip, unsigned short* out) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  unsigned u[4][4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) u[j][i] = 0;
  const float gi[2] = {G[I * 16 + g], G[I * 16 + g + 8]};
  Left left[I + 1];
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    x[i] = D[(I * 16 + 8 * (i >> 2) + 2 * t + (i & 1)) * STRIDE + g + 8 * ((i >> 1) & 1)];
#pragma unroll
  for (int jj = 0; jj <= I; ++jj) {
    const int j = I - jj;
    if (jj > 0) {
      float s[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = 0.f;
#pragma unroll
      for (int m = I; m > j; --m) {
        const float* b = blocks + (m * (m - 1) / 2 + j) * 256 + lane * 4;
        unsigned bh[4], bl[4];
        *(uint4*)bh = *(const uint4*)b;
        *(uint4*)bl = *(const uint4*)(b + 128);
        product<false>(s, left[m], bh, bl);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[i] = -s[i];
        x[i] = 0.f;
      }
      Left sum;
      sum.set(s);
      unsigned bh[4], bl[4];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float2 d = *(const float2*)(D + (j * 16 + 8 * e + g) * STRIDE + 8 * k + 2 * t);
          split(d.x, d.y, bh[e * 2 + k], bl[e * 2 + k]);
        }
      product<true>(x, sum, bh, bl);
    }
    if (j > 0) left[j].set(x);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 gj = *(const float2*)(G + j * 16 + 8 * n + 2 * t);
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = x[n * 4 + i] * exp2_fast(gi[i >> 1] - (i & 1 ? gj.y : gj.x));
        if (j == I && 8 * n + 2 * t + (i & 1) > g + 8 * (i >> 1)) y[i] = 0.f;
      }
      u[j][n * 2] = pack2<half>(y[0], y[1]);
      u[j][n * 2 + 1] = pack2<half>(y[2], y[3]);
    }
  }
  put(strip, u, out + I * 16 * 64);
}

// a (head, part) unit a warp: block row 3, or block rows 0 to 2 (9 against 7 block products).
template <int R, bool half>
__device__ __forceinline__ void rows(const void* scratch, const float* D, const float* G,
                                     float* strips, void* a) {
  const int w = threadIdx.x >> 5;
  const float* blocks = (const float*)scratch;
  unsigned* strip = (unsigned*)strips + w * 256;
#pragma unroll 1
  for (int u = w; u < 2 * R; u += 4) {
    const int r = u >> 1;
    const float* d = D + r * 64 * STRIDE;
    unsigned short* out = (unsigned short*)a + r * 4096;
    if (u & 1) {
      block_row<3, half>(blocks, d, G + r * 64, strip, out);
    } else {
      block_row<0, half>(blocks, d, G + r * 64, strip, out);
      block_row<1, half>(blocks, d, G + r * 64, strip, out);
      block_row<2, half>(blocks, d, G + r * 64, strip, out);
    }
  }
}
}  // namespace gdn
#endif
"""
