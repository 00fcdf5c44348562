"""CUDA of backward_gradients.py: what its consumers do with accumulators (layouts: backward_products.py).

pair_matrix, store_pairs   dP or N^T from dO Vd^T or Vd dV^T, and as a tile of 16 bits
sum_products               fp32 sums of E
row_factors, take_logs     gates of a thread's two rows; norms of q and k, for exponents
add_query, add_key         gated products onto dq and dk, and their rows' dots with q and k
store_dots, trace          the dots of a row, over its quad; <S, dS>
project_rows, subtract_rows  the gradient of a normalisation
stage_rows, copy_rows      dq and dk, on their way out
"""

SOURCE = r"""
#ifndef GDN_GRADIENT_ACCUMULATORS
#define GDN_GRADIENT_ACCUMULATORS
namespace gdn {
// Elements i, i of a [64, 64] accumulator become zero.
__device__ __forceinline__ void drop_diagonal(float* m) {
  const int lane = threadIdx.x & 31, warp = (int)(threadIdx.x >> 5 & 3);
  const bool here = lane >> 3 == (lane & 3), odd = lane >> 2 & 1;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    if (t == warp) {
      if (here && !odd) m[8 * t] = m[8 * t + 6] = 0;
      if (here && odd) m[8 * t + 1] = m[8 * t + 7] = 0;
    }
}
// Blocks of 16 columns of a warp's 16 rows that are not zero.
__device__ __forceinline__ unsigned blocks_of(int w, int warp) {
  return w ? 15u << warp & 15u : (2u << warp) - 1;
}
// w = 0: m = dO Vd^T -> dP. w = 1: m = Vd dV^T -> N^T, written as N + N^T; p: the same in 16 bits.
// logs: log2 of |scale| / |q| and 1 / |k| by token. Rows past `valid` of dO and dV are not of this
// document.
template <bool HALF, bool NORM>
__device__ __forceinline__ void pair_matrix(float* m, const float* g, const float* logs,
                                            float* diagonal, unsigned* p, int w, int warp,
                                            int valid, float scale) {
  const int lane = threadIdx.x & 31, first = lane >> 2;
  const int r = warp * 16 + first, c = (lane & 3) * 2;
  const float sign = w ? 1.f : -1.f;
  float a0 = -sign * g[r], a1 = -sign * g[r + 8];
  if (NORM) {
    a0 += logs[w * 64 + r];
    a1 += logs[w * 64 + r + 8];
  } else {
    const float s = w ? 0.f : __log2f(fabsf(scale));
    a0 += s;
    a1 += s;
  }
  const bool rare = valid < 64 || scale < 0;
  const float factor = !w && scale < 0 ? -1.f : 1.f;
  const unsigned blocks = blocks_of(w, warp);  // and what stays of the one on the diagonal
  const unsigned even = (w ? c > first : c <= first) ? ~0u : 0;
  const unsigned odd = (w ? c + 1 > first : c + 1 <= first) ? ~0u : 0;
  const unsigned above = w ? ~0u : 0, kept[8] = {even, odd, ~above, ~above, above, above, even, odd};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float* v = m + 8 * t;
    if (blocks >> t & 1) {
      const float2 l = *(const float2*)(g + t * 16 + c), h = *(const float2*)(g + t * 16 + c + 8);
      float b[4] = {l.x, l.y, h.x, h.y};
      if (NORM) {
        const float* k = logs + 64 + t * 16 + c;
        const float2 u = *(const float2*)k, o = *(const float2*)(k + 8);
        b[0] = fmaf(sign, b[0], u.x);
        b[1] = fmaf(sign, b[1], u.y);
        b[2] = fmaf(sign, b[2], o.x);
        b[3] = fmaf(sign, b[3], o.y);
      }
      if (w && t == warp && lane >> 3 == (lane & 3)) {
        diagonal[r] = first & 1 ? v[1] : v[0];
        diagonal[r + 8] = first & 1 ? v[7] : v[6];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float a = i & 2 ? a1 : a0, y = b[i / 4 * 2 + i % 2];
        v[i] *= power(NORM ? a + y : fmaf(sign, y, a));
      }
      if (t == warp) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(__float_as_uint(v[i]) & kept[i]);
      }
      if (rare) {
        const int left = valid - (w ? t * 16 + c : r);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          v[i] = (w ? i / 4 * 8 + i % 2 : (i & 2) * 4) < left ? v[i] * factor : 0.f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) p[4 * t + i] = pack<HALF>(v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[4 * t + i] = 0;
    }
  }
}
// E = m (Q K^T without its diagonal) or m (K K^T): sums of its rows and columns, to shared memory.
__device__ __forceinline__ void sum_products(const float* m, const float* qk, float* rows,
                                             float* columns, int w, int warp) {
  const unsigned blocks = blocks_of(w, warp);
  float x[18];
  x[16] = x[17] = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t)
    if (blocks >> t & 1) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = m[8 * t + i] * qk[8 * t + i];
      x[16] += (v[0] + v[1]) + (v[4] + v[5]);
      x[17] += (v[2] + v[3]) + (v[6] + v[7]);
      x[4 * t] = v[0] + v[2];
      x[4 * t + 1] = v[1] + v[3];
      x[4 * t + 2] = v[4] + v[6];
      x[4 * t + 3] = v[5] + v[7];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * t + i] = 0;
    }
  sum_pairs(x, rows, columns);
}
// The bf16 tile, to shared memory.
__device__ __forceinline__ void store_pairs(unsigned* p, void* tile, int w, int warp) {
  const int lane = threadIdx.x & 31;
  const unsigned panel = address(tile) + w * 8192;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if (w && t == warp) {
      p[4 * t] |= turn(p[4 * t]);
      p[4 * t + 1] = turn(p[4 * t + 2]);
      p[4 * t + 3] |= turn(p[4 * t + 3]);
    }
    if (!w || t >= warp) store_matrices(matrices_at(panel, warp, t), p + 4 * t);
    if (w && t > warp) {
      const int row = 16 * t + (lane >> 4) * 8 + (lane & 7);
      const int chunk = (2 * warp + (lane >> 3 & 1)) ^ (lane & 7);
      store_transposed_matrices(panel + row * 128 + chunk * 16, p + 4 * t);
    }
  }
  fence_shared();
  __syncwarp();
}
// f: what dO S^T, dV S^T and Vd dS^T are multiplied by in a thread's two rows; then room for their dots.
template <bool NORM>
__device__ __forceinline__ void row_factors(float* f, const float* g, const float* logs, float* last,
                                            float scale) {
  const int r = (int)(threadIdx.x >> 5 & 3) * 16 + (threadIdx.x >> 2 & 7);
  const float end = g[63];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = g[r + i * 8];
    if (NORM) {
      const float q = logs[r + i * 8], k = logs[64 + r + i * 8];
      f[i] = copysignf(power(x + q), scale);
      f[2 + i] = -power(x + k);
      f[4 + i] = power(end - x + k);
    } else {
      f[2 + i] = -power(x);
      f[i] = -f[2 + i] * scale;
      f[4 + i] = power(end - x);
    }
  }
  if (threadIdx.x == 0) *last = power(end);
#pragma unroll
  for (int i = 6; i < 12; ++i) f[i] = 0;
}
// The first 32 columns of a warp's rows of q or k, for add_query and add_key: asked for early.
__device__ __forceinline__ void load_rows(const void* tile, unsigned* words) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
    load_matrices(matrices_at(address(tile), threadIdx.x >> 5 & 3, t), words + 4 * t);
}
// a += f x by rows, and the dots <x, q> of a row.
template <bool HALF>
__device__ __forceinline__ void add_query(float* a, const float* x, const void* q, unsigned* words,
                                          float* f) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    unsigned* w = words + t % 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 y = unpack<HALF>(w[i]);
      const int j = 8 * t + 2 * i, row = i & 1;
      a[j] = fmaf(f[row], x[j], a[j]);
      a[j + 1] = fmaf(f[row], x[j + 1], a[j + 1]);
      f[6 + row] = fmaf(x[j], y.x, f[6 + row]);
      f[6 + row] = fmaf(x[j + 1], y.y, f[6 + row]);
    }
    if (t < 2) load_matrices(matrices_at(address(q), threadIdx.x >> 5 & 3, t + 2), w);
  }
}
// The same of two products, with k.
template <bool HALF>
__device__ __forceinline__ void add_key(float* a, const float* in, const float* out, const void* k,
                                        unsigned* words, float* f) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    unsigned* w = words + t % 2 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 y = unpack<HALF>(w[i]);
      const int j = 8 * t + 2 * i, row = i & 1;
      a[j] = fmaf(f[4 + row], out[j], fmaf(f[2 + row], in[j], a[j]));
      a[j + 1] = fmaf(f[4 + row], out[j + 1], fmaf(f[2 + row], in[j + 1], a[j + 1]));
      f[8 + row] = fmaf(in[j], y.x, f[8 + row]);
      f[8 + row] = fmaf(in[j + 1], y.y, f[8 + row]);
      f[10 + row] = fmaf(out[j], y.x, f[10 + row]);
      f[10 + row] = fmaf(out[j + 1], y.y, f[10 + row]);
    }
    if (t < 2) load_matrices(matrices_at(address(k), threadIdx.x >> 5 & 3, t + 2), w);
  }
}
// Of the four values of a quad's threads, lane l % 4 gets the sum of one: x0, x1, y0, y1.
__device__ __forceinline__ float quad_sums(float x0, float x1, float y0, float y1) {
  const bool a = threadIdx.x & 2, b = threadIdx.x & 1;
  const float u = (a ? y0 : x0) + __shfl_xor_sync(~0u, a ? x0 : y0, 2);
  const float v = (a ? y1 : x1) + __shfl_xor_sync(~0u, a ? x1 : y1, 2);
  return (b ? v : u) + __shfl_xor_sync(~0u, b ? u : v, 1);
}
// dots[64] and, behind, ends[64].
__device__ __forceinline__ void store_dots(const float* f, float* dots) {
  const float e0 = f[4] * f[10], e1 = f[5] * f[11];
  const float d0 = f[0] * f[6] + f[2] * f[8] - e0, d1 = f[1] * f[7] + f[3] * f[9] - e1;
  const float sum = quad_sums(d0, d1, e0, e1);
  const int r = (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x >> 2 & 7);
  dots[(threadIdx.x & 2) * 32 + (threadIdx.x & 1) * 8 + r] = sum;
}
// project[64], project[128..]: <dq, q> and <dk, k> over this warpgroup's columns.
template <bool HALF>
__device__ __forceinline__ void project_rows(const float* q, const float* k, const void* queries,
                                             const void* keys, unsigned* words, float* project) {
  const int warp = (int)(threadIdx.x >> 5 & 3);
  float d[4] = {0, 0, 0, 0};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    load_matrices(matrices_at(address(queries), warp, t), words + 8 * t);
    load_matrices(matrices_at(address(keys), warp, t), words + 8 * t + 4);
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = unpack<HALF>(words[8 * t + i]), v = unpack<HALF>(words[8 * t + 4 + i]);
      const int j = 8 * t + 2 * i;
      d[i & 1] += q[j] * u.x + q[j + 1] * u.y;
      d[2 + (i & 1)] += k[j] * v.x + k[j + 1] * v.y;
    }
  }
  const float sum = quad_sums(d[0], d[1], d[2], d[3]);
  const int r = (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x >> 2 & 7);
  project[(threadIdx.x & 2) * 32 + (threadIdx.x & 1) * 8 + r] = sum;
}
// dq -= q <q, dq> / |q|^2 and the same for k, from both warpgroups' dots.
template <bool HALF>
__device__ __forceinline__ void subtract_rows(float* q, float* k, const unsigned* words,
                                              const float* project,
                                              const float* logs, float scale) {
  const int warp = (int)(threadIdx.x >> 5 & 3), r = warp * 16 + (threadIdx.x >> 2 & 7);
  float f[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* d = project + r + i * 8;
    f[i] = (d[0] + d[128]) * power(2 * logs[r + i * 8]) / (scale * scale);
    f[2 + i] = (d[64] + d[192]) * power(2 * logs[64 + r + i * 8]);
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = unpack<HALF>(words[8 * t + i]), v = unpack<HALF>(words[8 * t + 4 + i]);
      const int j = 8 * t + 2 * i;
      q[j] -= f[i & 1] * u.x;
      q[j + 1] -= f[i & 1] * u.y;
      k[j] -= f[2 + (i & 1)] * v.x;
      k[j + 1] -= f[2 + (i & 1)] * v.y;
    }
  }
}
// norms: of a chunk's q, then k. logs: log2 of |scale| / |q|, then 1 / |k|; each warpgroup's own.
__device__ __forceinline__ void take_logs(const float* norms, float* logs, int w, float scale) {
  const int t = threadIdx.x & 127;
  logs[t] = __log2f(norms[t]) + (t < 64 ? __log2f(fabsf(scale)) : 0.f);
  asm volatile("bar.sync %0, 128;" ::"r"(2 + w) : "memory");
}
// A warpgroup's accumulators into a panel.
template <bool HALF>
__device__ __forceinline__ void stage_rows(const float* a, void* tile) {
  const unsigned panel = address(tile);
  const int warp = (int)(threadIdx.x >> 5 & 3);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    unsigned p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = pack<HALF>(a[8 * t + 2 * i], a[8 * t + 2 * i + 1]);
    store_matrices(matrices_at(panel, warp, t), p);
  }
  fence_shared();
}
// One warp: the first `valid` rows of a panel to 64 columns of memory.
__device__ __forceinline__ void copy_rows(const void* tile, void* out, long stride, int valid) {
  const int lane = threadIdx.x & 31, chunk = lane & 7;
#pragma unroll 1
  for (int row = lane >> 3; row < valid; row += 4)
    *(uint4*)((char*)out + row * stride + chunk * 16) =
        *(const uint4*)((const char*)tile + row * 128 + (chunk ^ row & 7) * 16);
}
// <x, y> of two panels' rows 32 warp.., in 8 parts: the diagonals of products of 16 rows.
template <bool HALF>
__device__ __forceinline__ void trace(const void* x, const void* y, float* out, int warp) {
  float c[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    unsigned a[4][4], b[4][4], all = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      load_matrices(matrices_at(address(x), warp * 2 + row, t), a[t]);
      load_matrices(matrices_at(address(y), warp * 2 + row, t), b[t]);
    }
    // all eight under way before the first is used: the assembler would put each where it is needed
#pragma unroll
    for (int t = 0; t < 4; ++t) all |= a[t][0] | b[t][0];
    a[0][0] |= all & blockIdx.z;  // which is zero
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      multiply_rows<HALF>(c, a[t], b[t][0], b[t][2]);
      multiply_rows<HALF>(c + 4, a[t], b[t][1], b[t][3]);
    }
  }
  const int lane = threadIdx.x & 31;
  if (lane >> 3 == (lane & 3)) out[warp * 8 + (lane >> 2)] = lane >> 2 & 1 ? c[1] + c[7] : c[0] + c[6];
}
}  // namespace gdn
#endif
"""
