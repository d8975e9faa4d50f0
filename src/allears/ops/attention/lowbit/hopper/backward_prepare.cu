#include "common.cuh"

// What the backward pass needs of each query token: D = sum(dO * O), dO in INT8 with one scale a token, dO and Q transposed to (D, tokens) with
// the tokens of each 16 in operand order (store_across), and the four numbers of a column (see backward.cu).
//
// Defined by the host: HEAD_DIM (64 or 128), IN_FP16.

#define ROWS 64
#define CHUNKS (HEAD_DIM / 8)
#define THREADS 256
#define ROWS_AT_ONCE (THREADS / CHUNKS)
#define PER_THREAD (ROWS / ROWS_AT_ONCE)
#define PITCH (HEAD_DIM + 4)

struct Params {
  const void* d_out;         // (B, L_q, H, D), last stride 1
  const void* out;           // (B, L_q, H, D) contiguous
  const signed char* q8;     // (B, H, L_q, D)
  const float* q_scale;      // (B, H, L_q)
  const float* lse2;         // (B, H, L_q), base 2, without the part of the mean of K
  signed char* q8_across;    // (B, H, D, padded)
  signed char* do8_across;   // (B, H, D, padded)
  float4* columns;           // (B, H, padded)
  long long do_batch, do_row, do_head;
  int heads, rows, padded;
  float scale;               // softmax scale * log2 e
};

extern "C" __global__ void __launch_bounds__(THREADS) backward_prepare(const __grid_constant__ Params p) {
  __shared__ alignas(16) u8 tile[ROWS * PITCH], q_tile[ROWS * PITCH];
  int first = blockIdx.x * ROWS, h = blockIdx.y, b = blockIdx.z;
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  long long z = (long long)b * p.heads + h;
#pragma unroll
  for (int n = 0; n < PER_THREAD; n++) {
    int local = r0 + n * ROWS_AT_ONCE, row = first + local;
    bool inside = row < p.rows;
    uint4 g = make_uint4(0, 0, 0, 0), o = g;
    uint2 q8 = make_uint2(0, 0);
    if (inside) {
      g = __ldg((const uint4*)((const u16*)p.d_out + b * p.do_batch + (long long)row * p.do_row + (long long)h * p.do_head + chunk * 8));
      q8 = __ldg((const uint2*)(p.q8 + (z * p.rows + row) * HEAD_DIM + chunk * 8));
      o = __ldg((const uint4*)((const u16*)p.out + (((long long)b * p.rows + row) * p.heads + h) * HEAD_DIM + chunk * 8));
    }
    u32 gw[4] = {g.x, g.y, g.z, g.w}, ow[4] = {o.x, o.y, o.z, o.w};
    float x[8], dot = 0.0f, top = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float a, c;
      unpack16(gw[i], x[2 * i], x[2 * i + 1]);
      unpack16(ow[i], a, c);
      dot += x[2 * i] * a + x[2 * i + 1] * c;
      top = max_nan(top, max_nan(fabsf(x[2 * i]), fabsf(x[2 * i + 1])));
    }
#pragma unroll
    for (int d = CHUNKS / 2; d; d >>= 1) {
      dot += __shfl_xor_sync(0xffffffffu, dot, d);
      top = max_nan(top, __shfl_xor_sync(0xffffffffu, top, d));
    }
    float scale = top / 127.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = fmaf(x[i], inverse, MAGIC);
    u32* to = (u32*)(tile + local * PITCH + chunk * 8);
    to[0] = pack_bytes(x[0], x[1], x[2], x[3]);
    to[1] = pack_bytes(x[4], x[5], x[6], x[7]);
    u32* q_to = (u32*)(q_tile + local * PITCH + chunk * 8);
    q_to[0] = q8.x;
    q_to[1] = q8.y;
    if (chunk == 0) {
      float4 column = make_float4(0.0f, INFINITY_F, 0.0f, 0.0f);
      float lse = inside ? p.lse2[z * p.rows + row] : -INFINITY_F;
      if (inside && lse != -INFINITY_F && scale != 0.0f)
        column = make_float4(p.q_scale[z * p.rows + row] * p.scale, lse - log2f(scale), inverse, dot * inverse);
      p.columns[z * p.padded + row] = column;
    }
  }
  __syncthreads();
  const int items = HEAD_DIM / 4 * (ROWS / 16);
  for (int n = threadIdx.x; n < 2 * items; n += THREADS) {
    u8* to = (u8*)(n < items ? p.do8_across : p.q8_across) + z * HEAD_DIM * p.padded + first;
    store_across<ROWS, HEAD_DIM>(n < items ? tile : q_tile, n % items, to, p.padded);
  }
}

struct FinishParams {
  const float* dq;  // as backward.cu leaves it
  void* out;        // (B, L_q, H, D) contiguous, 16 bit
  int heads, rows;
};

// Four words of each of the four threads of a quad, transposed: thread q gets word q of each.
DEVICE void quad_transpose(u32 (&w)[4], int q) {
#pragma unroll
  for (int d = 1; d < 4; d <<= 1) {
    bool high = q & d;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & d) continue;
      u32 got = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i | d], d);
      if (high)
        w[i] = got;
      else
        w[i | d] = got;
    }
  }
}

// dQ from the order of the accumulators to rows, in 16 bit.
extern "C" __global__ void __launch_bounds__(256) backward_finish(const __grid_constant__ FinishParams p) {
  int tile = blockIdx.x, h = blockIdx.y, b = blockIdx.z, half = threadIdx.x / 128, t = threadIdx.x % 128;
  const float4* from = (const float4*)p.dq + ((((long long)b * p.heads + h) * gridDim.x + tile) * 2 + half) * (HEAD_DIM / 16) * 128 + t;
  int q = t % 4, row = tile * ROWS + t / 32 * 16 + t % 32 / 4, column = half * (HEAD_DIM / 2) + 8 * q;
  u16* to = (u16*)p.out + (((long long)b * p.rows + row) * p.heads + h) * HEAD_DIM + column;
  float4 x[HEAD_DIM / 16];
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 16; j++) x[j] = __ldg(from + 128 * j);
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 16; j += 4) {
    u32 upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      upper[i] = pack16(x[j + i].x, x[j + i].y);
      lower[i] = pack16(x[j + i].z, x[j + i].w);
    }
    quad_transpose(upper, q);
    quad_transpose(lower, q);
    if (row < p.rows) *(uint4*)(to + 8 * j) = make_uint4(upper[0], upper[1], upper[2], upper[3]);
    if (row + 8 < p.rows) *(uint4*)(to + 8 * j + (long long)8 * p.heads * HEAD_DIM) = make_uint4(lower[0], lower[1], lower[2], lower[3]);
  }
}
