"""CUDA of backward_gradients.py: fragments, tiles and products.

Two warpgroups run the same code, which TileLang's products cannot say: theirs in a branch of two
warpgroups are shared between them. Tiles lie in shared memory as panels of 64 columns, 128 swizzled
bytes a row. A thread's accumulators of a [64, 64] product are rows l/4 and l/4 + 8 of its warp's 16,
and of every 16 columns 2 (l % 4) + {0, 1, 8, 9}: m[8 t + 4 (column >= 8) + 2 (row >= 8) + {0, 1}].

uniform             a value that all lanes share, known to the compiler as such
load_matrices, ...  16 x 16 values of a panel as accumulators lie, and back
product             [64, 64] accumulators (+)= A B of 16 STEPS, both in shared memory, asynchronous
multiply_rows       a 16 x 8 product of one warp
prefetch_rows       into the L2
"""

SOURCE = r"""
#ifndef GDN_GRADIENT_PRODUCTS
#define GDN_GRADIENT_PRODUCTS
namespace gdn {
__device__ __forceinline__ unsigned address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}
// Of a warp's index, in a way that the compiler knows to be the same in all lanes: descriptors and
// branches that depend on it stay in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(~0u, x); }
__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <bool HALF>
__device__ __forceinline__ float2 unpack(unsigned x) {
  float2 y;
  if (HALF) {
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(y.x), "=f"(y.y) : "r"(x));
  } else {
    y.x = __uint_as_float(x << 16);
    y.y = __uint_as_float(x & 0xffff0000u);
  }
  return y;
}
template <bool HALF>
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned y;
  if (HALF)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ void load_matrices(unsigned at, unsigned* r) {
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
__device__ __forceinline__ void store_matrices(unsigned at, const unsigned* r) {
  asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void store_transposed_matrices(unsigned at, const unsigned* r) {
  asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ unsigned turn(unsigned x) {
  unsigned y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Rows 16 `row`.. and columns 16 t.. of a panel, as load_matrices and store_matrices take them.
__device__ __forceinline__ unsigned matrices_at(unsigned panel, int row, int t) {
  const int lane = threadIdx.x & 31;
  return panel + (row * 16 + (lane & 15)) * 128 + (((2 * t + (lane >> 4)) ^ (lane & 7)) << 4);
}

#define GDN_ADD_PRODUCT(TYPE)                                                                     \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %34, 1, "   \
      "%35, %36;\n}\n"                                                                            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),       \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),                \
        "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),             \
        "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),             \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),             \
        "+f"(d[31])                                                                               \
      : "l"(a), "l"(b), "n"(SIGN), "n"(TA), "n"(TB))
#define GDN_PRODUCT(TYPE)                                                                         \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %34, 1, "   \
      "%35, %36;\n}\n"                                                                            \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),       \
        "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]),                \
        "=f"(d[13]), "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), "=f"(d[17]), "=f"(d[18]),             \
        "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]),             \
        "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]),             \
        "=f"(d[31])                                                                               \
      : "l"(a), "l"(b), "n"(SIGN), "n"(TA), "n"(TB))
template <bool HALF, int TA, int TB, int SIGN, bool CLEAR>
__device__ __forceinline__ void multiply(float* d, unsigned long long a, unsigned long long b) {
  if constexpr (CLEAR) {
    if constexpr (HALF)
      GDN_PRODUCT("f16");
    else
      GDN_PRODUCT("bf16");
  } else {
    if constexpr (HALF)
      GDN_ADD_PRODUCT("f16");
    else
      GDN_ADD_PRODUCT("bf16");
  }
}
#undef GDN_PRODUCT
#undef GDN_ADD_PRODUCT
// The compiler moves nothing that touches d past this.
__device__ __forceinline__ void settle(float* d) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ unsigned long long describe(const void* tile) {
  return (unsigned long long)(address(tile) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// TA, TB: the operand lies with the 16 STEPS down its rows (transposed), not along its columns.
template <bool HALF, int TA, int TB, int STEPS, int SIGN, bool CLEAR>
__device__ __forceinline__ void product(float* d, const void* a, const void* b) {
  const unsigned long long x = describe(a), y = describe(b);
  if (!CLEAR) settle(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply<HALF, TA, TB, SIGN, CLEAR>(d, x, y);
#pragma unroll
  for (int i = 1; i < STEPS; ++i) {
    const int along = i / 4 * 512 + i % 4 * 2, down = i * 128;
    multiply<HALF, TA, TB, SIGN, false>(d, x + (TA ? down : along), y + (TB ? down : along));
  }
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most `PENDING` groups of products are left.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void clear(float* d) {
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0;
}
template <bool HALF>
__device__ __forceinline__ void multiply_rows(float* c, const unsigned* a, unsigned b0,
                                              unsigned b1) {
  if (HALF)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// One warp asks the L2 for rows of 256 B that it will load later.
__device__ __forceinline__ void prefetch_rows(const void* p, long stride, int rows) {
#pragma unroll
  for (int row = threadIdx.x & 31; row < 64; row += 32)
    if (row < rows)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(
            __cvta_generic_to_global((const char*)p + row * stride + i * 128)));
}
}  // namespace gdn
#endif
"""
