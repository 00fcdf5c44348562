"""CUDA for the part of prepare.py that works below tiles: one 64x64 triangular inverse a value head.

For one chunk and the `R` value heads of one key head it turns K K^T (fp32, wgmma accumulators)
into a_ij = exp(G_i - G_j) A_ij with A = (I + tril(diag(beta) K K^T, -1))^-1 diag(beta). Sums are
fp32, and so is the substitution; what enters a product is two bf16 numbers (blocks.py). Inverses in
16-bit precision, or by doubling, are known to overflow on trained models.

    diagonal     K K^T leaves the accumulators: because it is symmetric, the registers of a block are
                 the right operand of the product that needs it. Warp w then makes the 16x16 diagonal
                 blocks w of all heads: two 8x8 blocks by forward substitution, a lane a column, and
                 A21 = -A22 KK21 A11 between them.
    block_rows   the blocks below the diagonal, right to left,
                 A_ij = -(sum_{j < m <= i} A_im KK_mj) A_jj,
                 the left operands being accumulators of the same warp.

What is kept is -A: the same products then make -A_ij, and no sign has to be changed.
exp(G_i - G_j) is exp(G_i - G_l) exp(G_l - G_j) below the diagonal blocks, l the last token of block
column j: both are at most 1, and most exponentials serve a whole row or column of a block.
"""

INVERSE = r"""
#ifndef GDN_INVERSE
#define GDN_INVERSE
namespace gdn {
// kk: accumulators of K K^T (m64n64, v[j8*4 + e*2 + f]). blocks: the 6 blocks below the diagonal of
// K K^T. triangles: [head][4] diagonal blocks of -A.
template <int R>
__device__ __forceinline__ void diagonal(const float* kk, const float* B, float* blocks,
                                         float* triangles) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int c = lane & 7, q = lane >> 3 & 1, side = lane >> 4;
  float* own = triangles + ((R - 1) * 4 + w) * TRIANGLE;  // free until the last head is written
  unsigned high21, low21;
  if (threadIdx.x == 0) *zeros() = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j > w) {  // block (w, j) is block (j, w) transposed
      Right b;
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float* x = kk + j * 8 + n * 4 + e * 2;
          split(x[0], x[1], b.high[e * 2 + n], b.low[e * 2 + n]);
        }
      float* to = blocks + (j * (j - 1) / 2 + w) * BLOCK + lane * 4;
      *(uint4*)to = *(uint4*)b.high;
      *(uint4*)(to + 128) = *(uint4*)b.low;
    } else if (j == w) {
      *(float2*)(own + g * 8 + 2 * t) = make_float2(kk[j * 8], kk[j * 8 + 1]);
      *(float2*)(own + 72 + g * 8 + 2 * t) = make_float2(kk[j * 8 + 6], kk[j * 8 + 7]);
      split(kk[j * 8 + 4], kk[j * 8 + 5], high21, low21);
    }
  }
  __syncwarp();
  // A lane has column c of 8x8 block q, of two heads at a time on the two half warps.
  const float* K = own + q * 72;
  constexpr int N = (R + 1) / 2, NH = N < 2 ? N : 2;
#pragma unroll 1
  for (int n0 = 0; n0 < N; n0 += NH) {
    float x[NH][8], b[NH][8];
#pragma unroll
    for (int n = 0; n < NH; ++n) {
      const int r = min((n0 + n) * 2 + side, R - 1);
#pragma unroll
      for (int p = 0; p < 2; ++p)
        *(float4*)(b[n] + p * 4) = *(const float4*)(B + r * 64 + w * 16 + q * 8 + p * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[n][i] = 0.f;
    }
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      float row[8];
#pragma unroll
      for (int p = (m + 1) / 4; p < 2; ++p)
        *(float4*)(row + p * 4) = *(const float4*)(K + m * 8 + p * 4);
#pragma unroll
      for (int n = 0; n < NH; ++n) {
        const float v = (m == c ? 1.f : 0.f) - b[n][m] * x[n][m];
        x[n][m] = v;
#pragma unroll
        for (int i = m + 1; i < 8; ++i) x[n][i] += row[i] * v;
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < NH; ++n) {
      const int r = min((n0 + n) * 2 + side, R - 1);
      const float s = -B[r * 64 + w * 16 + q * 8 + c];
      unsigned h[4], l[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) split(x[n][p * 2] * s, x[n][p * 2 + 1] * s, h[p], l[p]);
      float* d = triangles + (r * 4 + w) * TRIANGLE + c * 4;
      *(uint4*)(d + q * RIGHT) = *(uint4*)h;
      *(uint4*)(d + (q ? RIGHT + 32 : LOW)) = *(uint4*)l;
    }
    __syncwarp();
    // The lower left quadrants: two heads are the two halves of 16 rows.
#pragma unroll
    for (int n = 0; n < NH; ++n) {
      const int r = min((n0 + n) * 2 + q, R - 1);  // lanes 8 to 15 and 24 to 31 address the second
      const unsigned at = shared(triangles + (r * 4 + w) * TRIANGLE + c * 4);
      unsigned ah[2], al[2], bh[2], bl[2];
      load4<true>(at + (RIGHT + side * 32) * 4, ah[0], ah[1], al[0], al[1]);
      load4<false>(at + side * LOW * 4, bh[0], bh[1], bl[0], bl[1]);
      float y[4], z[2][4];
      mma8<true>(y, al[0], al[1], high21);
      mma8<false>(y, ah[0], ah[1], low21);
      mma8<false>(y, ah[0], ah[1], high21);
#pragma unroll
      for (int i = 0; i < 2; ++i) split(y[2 * i], y[2 * i + 1], ah[i], al[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma8<true>(z[i], al[0], al[1], bh[i]);
        mma8<false>(z[i], ah[0], ah[1], bl[i]);
        mma8<false>(z[i], ah[0], ah[1], bh[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) split(z[i][2 * i], z[i][2 * i + 1], ah[i], al[i]);
      store4<true>(at + (32 + side * LOW) * 4, ah[0], ah[1], al[0], al[1]);
    }
    __syncwarp();
  }
}

// Block rows LO to HI of a head's `a` into rows of 128 bytes of shared memory, swizzled by 16 bytes
// as a bulk copy reads them. G: the head's cumulative log2 gates.
template <int LO, int HI, bool half>
__device__ __forceinline__ void block_rows(const float* blocks, const float* triangles,
                                           const float* G, unsigned rows) {
  constexpr int N = HI - LO + 1;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const unsigned from = shared(triangles);
  const unsigned to = rows + (lane & 15) * 128, chunk = (lane >> 4) ^ (lane & 7);
  Left left[N][HI + 1];
  float gi[N][2];
#pragma unroll
  for (int i = LO; i <= HI; ++i) {
    Left& d = left[i - LO][i];
    d.load_triangle(from + i * TRIANGLE * 4, lane);
    const float* Gi = G + i * 16;
    gi[i - LO][0] = Gi[g];
    gi[i - LO][1] = Gi[g + 8];
    unsigned u[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 gj = *(const float2*)(Gi + 8 * n + 2 * t);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = n * 2 + e;
        u[k] = 0;
        if (n > e) continue;
        float x = __uint_as_float(d.high[k] << 16) + __uint_as_float(d.low[k] << 16);
        float y = __uint_as_float(d.high[k] & 0xffff0000u) + __uint_as_float(d.low[k] & 0xffff0000u);
        x *= -exp2_fast(gi[i - LO][e] - gj.x);
        y *= -exp2_fast(gi[i - LO][e] - gj.y);
        if (n == e && 2 * t > g) x = 0.f;
        if (n == e && 2 * t + 1 > g) y = 0.f;
        u[k] = pack<half>(x, y);
      }
    }
    if (i == LO) {  // a bulk copy of the warp's last head may still be reading here
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      __syncwarp();
    }
    store4<false>(to + (i - LO) * 2048 + ((chunk ^ (2 * i)) << 4), u[0], u[1], u[2], u[3]);
  }
#pragma unroll
  for (int j = HI - 1; j >= 0; --j) {
    float s[N][8];
    Right b;
#pragma unroll
    for (int m = HI; m > j; --m) {
      b.load(blocks + (m * (m - 1) / 2 + j) * BLOCK, lane);
#pragma unroll
      for (int i = HI; i >= LO; --i)
        if (i == m) product<false, true>(s[i - LO], left[i - LO][m], b);
        else if (i > m) product<false, false>(s[i - LO], left[i - LO][m], b);
    }
    b.load_triangle(from + j * TRIANGLE * 4, lane);
    const float last = G[j * 16 + 15];
    float f[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 gj = *(const float2*)(G + j * 16 + 8 * n + 2 * t);
      f[n * 2] = exp2_fast(last - gj.x);
      f[n * 2 + 1] = exp2_fast(last - gj.y);
    }
#pragma unroll
    for (int i = HI; i >= LO; --i)
      if (i > j) {
        Left sum;
        sum.set(s[i - LO]);
        float x[8];
        product<true, true>(x, sum, b);
        if (j > 0) left[i - LO][j].set(x);
        unsigned u[4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float r = -exp2_fast(gi[i - LO][e] - last);
#pragma unroll
          for (int n = 0; n < 2; ++n)
            u[n * 2 + e] = pack<half>(x[n * 4 + e * 2] * (r * f[n * 2]),
                                      x[n * 4 + e * 2 + 1] * (r * f[n * 2 + 1]));
        }
        store4<false>(to + (i - LO) * 2048 + ((chunk ^ (2 * j)) << 4), u[0], u[1], u[2], u[3]);
      }
  }
}

// Half of head r a warp: block row 3, or block rows 0 to 2 (9 against 7 block products), to a place
// of 64 rows for the heads that two warps take in turn: what is zero there stays so.
template <bool half>
__device__ __forceinline__ void half_head(const float* blocks, const float* triangles,
                                          const float* G, void* place, int r) {
  const int lane = threadIdx.x & 31;
  const unsigned rows = shared(place);
  triangles += r * 4 * TRIANGLE;
  G += r * 64;
  if (threadIdx.x >> 5 & 1) {
    block_rows<3, 3, half>(blocks, triangles, G, rows + 48 * 128);
  } else {
    block_rows<0, 2, half>(blocks, triangles, G, rows);
    if (r < 2) {
      const unsigned to = rows + (lane & 15) * 128, chunk = (lane >> 4) ^ (lane & 7);
#pragma unroll
      for (int i = 0; i < 3; ++i)
#pragma unroll
        for (int j = i + 1; j < 4; ++j)
          store4<false>(to + i * 2048 + ((chunk ^ (2 * j)) << 4), 0, 0, 0, 0);
    }
  }
  __syncwarp();
}
}  // namespace gdn
#endif
"""
