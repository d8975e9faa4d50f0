// What both passes of linear attention on Hopper share: numbers in and out of memory, features, products.
//
// Macros: GROUPS of 64 channels, HEAD_DIM (16, 32, 64), POWER (2, 3), PARTS (times that the warps go into the groups), IN_FP16.

#include "common.cuh"

#define ROWS 32
#define CHANNELS (GROUPS * 64)
#define WARPS (PARTS * GROUPS)
#define THREADS 384  // two warpgroups that compute, and one of which a thread copies
#define FLOOR_F 1e-6f
#define UNIT 64.0f  // keeps the squares of a power within float32, see triton_features.py

DEVICE float number(const void* x, long long at, int kind) {
  if (kind == 0) return ((const float*)x)[at];
  u32 bits = ((const u16*)x)[at];
  if (kind == 1) return __uint_as_float(bits << 16);
  float y;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;\n}" : "=f"(y) : "r"(bits));
  return y;
}

DEVICE long long integer(const void* x, int at, int wide) { return wide ? ((const long long*)x)[at] : ((const int*)x)[at]; }

DEVICE uint4 load16(u32 at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}

DEVICE void store_zeros(u32 at) { asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory"); }  // 16 bytes

DEVICE void store16(void* at, const u32 (&x)[4]) {  // to global memory
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

DEVICE u32 relu16(u32 x) {  // of two numbers; NaN stays
  u32 y;
#if IN_FP16
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
#else
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0));
#endif
  return y;
}

DEVICE void unpack8(const uint4& x, float (&y)[8]) {
  unpack16(x.x, y[0], y[1]);
  unpack16(x.y, y[2], y[3]);
  unpack16(x.z, y[4], y[5]);
  unpack16(x.w, y[6], y[7]);
}

DEVICE void floats8(const float* x, float (&y)[8]) {  // of shared memory
  float4 a = ((const float4*)x)[0], b = ((const float4*)x)[1];
  y[0] = a.x, y[1] = a.y, y[2] = a.z, y[3] = a.w, y[4] = b.x, y[5] = b.y, y[6] = b.z, y[7] = b.w;
}

DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if IN_FP16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Base {  // UNIT * (relu(x) + floor) / scale of eight channels
  float factor[8], shift[8];

  __device__ __forceinline__ Base(const float* inverse) {
    floats8(inverse, factor);
#pragma unroll
    for (int e = 0; e < 8; e++) shift[e] = factor[e] * FLOOR_F;
  }

  __device__ __forceinline__ void read(u32 at, int row, float (&y)[8]) const {
    uint4 x = load16(at + row * 128);
    unpack8(make_uint4(relu16(x.x), relu16(x.y), relu16(x.z), relu16(x.w)), y);
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] = y[e] * factor[e] + shift[e];
  }
};

// All warps that compute.
DEVICE void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

DEVICE float power(float base) { return POWER == 3 ? base * base * base : base * base; }

// What takes base^p to the features, from the squares of base and base^p of a row.
DEVICE float norm_factor(float2 norm) { return sqrtf(norm.y == 0.0f ? 0.0f : norm.x / norm.y) * (1.0f / UNIT); }
