"""CUDA for products of 16x16 blocks of fp32 numbers on the tensor cores, good to 2^-16.

An fp32 number enters a product as two bf16 numbers, high and low; of the four products of parts the
smallest is left out, and sums are fp32. Used by inverse.py for one 64x64 matrix a warp: its blocks
lie in registers, as accumulators, which are the left operand of the next product as they are, or in
shared memory, from where ldmatrix brings them as left (transposed) or right operand.
"""

# Words that a whole block and a lower triangular one take in shared memory, as below.
BLOCK, TRIANGLE = 256, 192

BLOCKS = r"""
#ifndef GDN_BLOCKS
#define GDN_BLOCKS
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
// Two numbers as the dtype of `a`.
template <bool half> __device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned r;
  if (half) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned shared(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
// Four or two 8x8 tiles; eight lanes hold the addresses of a tile's rows of 16 bytes.
template <bool trans>
__device__ __forceinline__ void load4(unsigned p, unsigned& a, unsigned& b, unsigned& c,
                                      unsigned& d) {
  if (trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(p) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(p) : "memory");
}
__device__ __forceinline__ void load2(unsigned p, unsigned& a, unsigned& b) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(a), "=r"(b) : "r"(p) : "memory");
}
template <bool trans>
__device__ __forceinline__ void store4(unsigned p, unsigned a, unsigned b, unsigned c,
                                       unsigned d) {
  if (trans)
    asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(p),
                 "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
  else
    asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(p), "r"(a),
                 "r"(b), "r"(c), "r"(d) : "memory");
}

// c += a b; if `zero`, c = a b.
template <bool zero>
__device__ __forceinline__ void mma16(float* c, const unsigned* a, const unsigned* b) {
  if (zero) c[0] = c[1] = c[2] = c[3] = 0.f;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <bool zero>
__device__ __forceinline__ void mma8(float* c, unsigned a0, unsigned a1, unsigned b) {
  if (zero) c[0] = c[1] = c[2] = c[3] = 0.f;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Words of a whole block in shared memory: high parts as right operand, then low parts.
constexpr int BLOCK = 256;
// Words of a lower triangular one: its 8x8 quadrants upper left and lower left, high, then low, then
// lower right, high and low; eight columns of 16 bytes each.
constexpr int TRIANGLE = 192, LOW = 64, RIGHT = 128;
// 16 bytes of zeros: the rows of an upper right quadrant.
__device__ __forceinline__ uint4* zeros() {
  __shared__ uint4 x;
  return &x;
}

// Left operand: [n * 2 + e] holds columns 8n + 2t + {0, 1} of row g + 8e.
struct Left {
  unsigned high[4], low[4];
  __device__ __forceinline__ void set(const float* x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split(x[i * 2], x[i * 2 + 1], high[i], low[i]);
  }
  __device__ __forceinline__ void load_triangle(unsigned from, int lane) {
    const int m = lane >> 3, c = (lane & 7) * 16;
    const unsigned h = m == 2 ? shared(zeros()) : from + (m == 3 ? RIGHT * 4 : m * 128) + c;
    const unsigned l = m == 2 ? h : h + (m == 3 ? 128 : LOW * 4);
    load4<true>(h, high[0], high[1], high[2], high[3]);
    load4<true>(l, low[0], low[1], low[2], low[3]);
  }
};
// Right operand: [e * 2 + s] holds rows 8s + 2t + {0, 1} of column 8e + g.
struct Right {
  unsigned high[4], low[4];
  __device__ __forceinline__ void load_triangle(unsigned from, int lane) {  // [2]: zero, not read
    load4<false>(from + lane * 16, high[0], high[1], low[0], low[1]);
    load2(from + RIGHT * 4 + (lane & 15) * 16, high[3], low[3]);
  }
  __device__ __forceinline__ void load(const float* block, int lane) {
    *(uint4*)high = *(const uint4*)(block + lane * 4);
    *(uint4*)low = *(const uint4*)(block + 128 + lane * 4);
  }
};
// c += a b; if `zero`, c = a b. If `lower`, b is lower triangular.
template <bool lower, bool zero>
__device__ __forceinline__ void product(float* c, const Left& a, const Right& b) {
#pragma unroll
  for (int x = 0; x < 3; ++x)  // low high, high low, high high
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned *r = (x == 1 ? b.low : b.high) + e * 2, *l = x == 0 ? a.low : a.high;
      if (lower && e == 1) {
        if (zero && x == 0) mma8<true>(c + 4, l[2], l[3], r[1]);
        else mma8<false>(c + 4, l[2], l[3], r[1]);
      } else {
        if (zero && x == 0) mma16<true>(c + e * 4, l, r);
        else mma16<false>(c + e * 4, l, r);
      }
    }
}
}  // namespace gdn
#endif
"""
