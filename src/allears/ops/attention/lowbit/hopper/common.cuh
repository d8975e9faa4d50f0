// Hopper building blocks: barriers, bulk tensor copies, warpgroup matrix products. No headers are needed: NVRTC compiles this
// file at first use.
//
// Accumulator fragment of a 64 x N product (thread t of a warpgroup, warp w = t / 32, g = t % 32 / 4, q = t % 4):
// register 4 j + e holds row 16 w + g + 8 (e / 2), column 8 j + 2 q + e % 2.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

struct alignas(64) TensorMap {
  u64 words[16];
};

#define DEVICE static __device__ __forceinline__
#define INFINITY_F __int_as_float(0x7f800000)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE u8* aligned_shared(u8* p) { return p + ((0u - shared_address(p)) & 1023u); }  // to 1024 bytes, still known as shared memory

DEVICE bool elected() {  // one lane of the warp
  u32 yes;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
  return yes;
}

// ---- barriers in shared memory

DEVICE void barrier_init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }

DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

DEVICE void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

DEVICE void group_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk tensor copies

DEVICE void copy_3d(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

DEVICE void copy_4d(u32 dst, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

DEVICE void copy_bytes(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
               "r"(bytes), "r"(bar)
               : "memory");
}

DEVICE void add_bytes(float* dst, u32 src, u32 bytes) {  // float32 sums in global memory, by the copy engine
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
DEVICE void added() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }  // the sources may be overwritten

// ---- numbers

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float max_nan(float a, float b) {  // NaN if either is
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE u32 pack_e4m3(float a, float b, float c, float d) {  // a in the lowest byte
  u32 r;
  asm("{\n.reg .b16 lo, hi;\ncvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\nmov.b32 %0, {lo, hi};\n}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

#define MAGIC 12582912.0f  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

DEVICE u32 pack_bytes(float a, float b, float c, float d) {  // integers + MAGIC, a in the lowest byte
  u32 lo = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  u32 hi = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(lo, hi, 0x5410);
}

// Bytes (tokens, D) in shared memory, rows of HEAD_DIM + 4, out as (D, tokens), the tokens of each 16 in the order in which a product's accumulator
// fragment serves as the next one's 8-bit operand: 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. Item n of HEAD_DIM / 4 * TOKENS / 16.
// ``at(channel, c)``: where the 16 bytes of tokens 16 c and on go.
template <int TOKENS, int SIZE, class At>
DEVICE void store_across(const u8* tile, int n, At at_of) {
  int c = n % (TOKENS / 16), d = n / (TOKENS / 16) * 4;
  const u8* at = tile + 16 * c * (SIZE + 4) + d;
  u32 w[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 a = *(const u32*)(at + 2 * i * (SIZE + 4)), b = *(const u32*)(at + (2 * i + 1) * (SIZE + 4));
    u32 x = *(const u32*)(at + (2 * i + 8) * (SIZE + 4)), y = *(const u32*)(at + (2 * i + 9) * (SIZE + 4));
    u32 ab_low = __byte_perm(a, b, 0x5140), ab_high = __byte_perm(a, b, 0x7362), xy_low = __byte_perm(x, y, 0x5140), xy_high = __byte_perm(x, y, 0x7362);
    w[0][i] = __byte_perm(ab_low, xy_low, 0x5410);
    w[1][i] = __byte_perm(ab_low, xy_low, 0x7632);
    w[2][i] = __byte_perm(ab_high, xy_high, 0x5410);
    w[3][i] = __byte_perm(ab_high, xy_high, 0x7632);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) *(uint4*)at_of(d + i, c) = make_uint4(w[i][0], w[i][1], w[i][2], w[i][3]);
}
template <int TOKENS, int SIZE>
DEVICE void store_across(const u8* tile, int n, u8* to, long long row_bytes) {
  store_across<TOKENS, SIZE>(tile, n, [=](int d, int c) { return to + d * row_bytes + 16 * c; });
}

// The 16-bit type of inputs and outputs: bfloat16, or float16 where IN_FP16 is set.
DEVICE void unpack16(u32 x, float& lo, float& hi) {
#if IN_FP16
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(lo), "=f"(hi) : "r"(x));
#else
  lo = __uint_as_float(x << 16);
  hi = __uint_as_float(x & 0xffff0000u);
#endif
}

DEVICE u32 pack16(float lo, float hi) {
  u32 r;
#if IN_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#endif
  return r;
}

struct Row2 {  // the two rows that a thread holds: g and g + 8 of its warp
  float a, b;
};

DEVICE int quad_max(int x) {  // over the four threads of a row
  x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// ---- warpgroup matrix products

DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Descriptor of an operand in shared memory whose contraction axis is contiguous: rows of ROW_BYTES (64 or 128), swizzled.
template <int ROW_BYTES>
DEVICE u64 operand(u32 address) {
  u64 swizzle = ROW_BYTES == 128 ? 1ull : 2ull;
  return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | ((u64)(ROW_BYTES * 8 >> 4) << 32) | (swizzle << 62);
}

// Byte offset of 16-byte chunk c of row r in such an operand.
template <int ROW_BYTES>
DEVICE u32 chunk_offset(u32 r, u32 c) {
  return ROW_BYTES == 128 ? r * 128 + ((c ^ (r & 7)) << 4) : r * 64 + ((c ^ ((r >> 1) & 3)) << 4);
}
