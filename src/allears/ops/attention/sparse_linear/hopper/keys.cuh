#pragma once

// What the kernels share that quantise keys: K - mean to INT8, one scale per block of 64 tokens; softmax over the channels of K - mean, and V, to E4M3,
// across (channels, tokens), with the tokens of each 16 in operand order (store_across in common.cuh). 128 tokens at a time by 512 threads: thread t has
// 8 channels (16 bytes, ``chunk``) of the four rows t / 16 + 32 n.

#define CHUNKS (HEAD_DIM / 8)  // 16-byte chunks of a row
#define LOG2E 1.44269504088896f

struct Params {
  const void* q;     // (B, L_q, H, D), last stride 1
  const void* k;     // (B, L_k, G, D)
  const void* v;
  float* q_pool;     // (B, H, N_q, D)
  float* k_pool;     // (B, G, N_k, D)
  float* k_mean;     // (B, G, D)
  int* v_max;        // (B, G, D), bits of a float >= 0, zero at launch
  float* partial;    // (B, G, parts, D)
  int* done;         // (B, G), zero at launch
  u8* records;       // (B, G, N_k, 3, 64 * D): K8 (tokens, channels), phi(K)8 and V8 (channels, tokens), swizzled as the products read them
  float* k_scale;    // (B, G, N_k)
  int* counter;      // quantise sets it to zero, for the kernel after it
  float* shares;     // (splits, B * G, D, D), rows share_row apart: shares of the sum of h over all blocks, of quantise_and_sum
  float* share_ones; // (splits, B * G, D): their column of ones
  // quantise takes ``groups`` key heads from ``first_group`` of ``all_groups`` on, of which records and k_scale know no others
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  int heads, groups, queries, keys, q_blocks, k_blocks, q_parts, k_parts, smooth, first_group, all_groups, splits, share_row;
};

#define TOKENS 128
#define RECORD (3 * 64 * HEAD_DIM)
#define THREADS 512
#define AT_ONCE (THREADS / CHUNKS)   // 32 rows
#define EACH (TOKENS / AT_ONCE)      // 4 rows of a thread: two of each block of 64
#define PITCH (HEAD_DIM + 4)         // bytes of a row of a tile of 8-bit tokens

DEVICE float half_warp_max(float x) {
#pragma unroll
  for (int d = 8; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}
DEVICE float half_warp_sum(float x) {
#pragma unroll
  for (int d = 8; d; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

DEVICE void load_mean(float (&m)[8], const float* from) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float4 y;  // volatile: read again rather than kept, as registers are few
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w) : "l"(from + 4 * i));
    m[4 * i] = y.x, m[4 * i + 1] = y.y, m[4 * i + 2] = y.z, m[4 * i + 3] = y.w;
  }
}

// 8 channels of a key less their mean; zeros past the last key.
DEVICE void centred(float (&x)[8], uint4 raw, const float (&m)[8], bool inside) {
  u32 w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unpack16(w[i], x[2 * i], x[2 * i + 1]);
#pragma unroll
    for (int e = 0; e < 2; e++) x[2 * i + e] = inside ? x[2 * i + e] - m[2 * i + e] : 0.0f;
  }
}

// phi of four rows of K to ``tile``, and the largest magnitudes of its two blocks to ``tops``, by warp.
template <class RawOf>
DEVICE void phi_rows(u8* tile, float (&tops)[2][THREADS / 32], const float* mean, int first, int length, RawOf raw_of) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  float m[8], top[2] = {0.0f, 0.0f};
  load_mean(m, mean + chunk * 8);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    bool inside = first + r0 + n * AT_ONCE < length;
    float e[8], most = -INFINITY_F, sum = 0.0f;
    centred(e, raw_of(n), m, inside);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      top[n / 2] = max_nan(top[n / 2], fabsf(e[i]));
      most = fmaxf(most, e[i]);
    }
    most = half_warp_max(most) * LOG2E;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      e[i] = exp2_fast(fmaf(e[i], LOG2E, -most));
      sum += e[i];
    }
    sum = half_warp_sum(sum);
    float inverse = inside ? 448.0f / sum : 0.0f;
    u32* to = (u32*)(tile + (r0 + n * AT_ONCE) * PITCH + chunk * 8);
    to[0] = pack_e4m3(e[0] * inverse, e[1] * inverse, e[2] * inverse, e[3] * inverse);
    to[1] = pack_e4m3(e[4] * inverse, e[5] * inverse, e[6] * inverse, e[7] * inverse);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int d = 16; d; d >>= 1) top[half] = max_nan(top[half], __shfl_xor_sync(0xffffffffu, top[half], d));
    if (threadIdx.x % 32 == 0) tops[half][threadIdx.x / 32] = top[half];
  }
}

DEVICE void inverse_tops(float (&inverse)[8], const int* v_max) {  // of the thread's channels of V
  int chunk = threadIdx.x % CHUNKS;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float most = __int_as_float(__ldg(v_max + chunk * 8 + i));
    inverse[i] = most == 0.0f ? 0.0f : 448.0f / most;
  }
}

DEVICE void v_row(u8* tile, int n, uint4 raw, const float (&inverse)[8]) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  u32 w[4] = {raw.x, raw.y, raw.z, raw.w};
  float y[8];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    unpack16(w[i], y[2 * i], y[2 * i + 1]);
    y[2 * i] *= inverse[2 * i];
    y[2 * i + 1] *= inverse[2 * i + 1];
  }
  u32* to = (u32*)(tile + (r0 + n * AT_ONCE) * PITCH + chunk * 8);
  to[0] = pack_e4m3(y[0], y[1], y[2], y[3]);
  to[1] = pack_e4m3(y[4], y[5], y[6], y[7]);
}

// Scales of the two blocks, and K in 8 bits to the records from ``to`` on, ``blocks`` of them.
template <class RawOf>
DEVICE void k_rows(u8* to, int blocks, const float (&tops)[2][THREADS / 32], const float* mean, float* scales, int first, int length, RawOf raw_of) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  float scale[2], inverse[2], m[8];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = tops[half][0];
    for (int i = 1; i < THREADS / 32; i++) most = max_nan(most, tops[half][i]);
    scale[half] = most / 127.0f;
    inverse[half] = scale[half] == 0.0f ? 0.0f : 1.0f / scale[half];
  }
  if (threadIdx.x < blocks) scales[threadIdx.x] = threadIdx.x ? scale[1] : scale[0];
  load_mean(m, mean + chunk * 8);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    if (n / 2 >= blocks) break;
    float y[8];
    centred(y, raw_of(n), m, first + r0 + n * AT_ONCE < length);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = fmaf(y[i], inverse[n / 2], MAGIC);
    *(uint2*)(to + n / 2 * RECORD + chunk_offset<128>(r0 + n % 2 * AT_ONCE, chunk / 2) + chunk % 2 * 8) =
        make_uint2(pack_bytes(y[0], y[1], y[2], y[3]), pack_bytes(y[4], y[5], y[6], y[7]));
  }
}

// Of the 512 pieces of both tiles (store_across), that of this thread: a warp reads 8 places of 4 rows and writes 4 of 8, which are two turns of the banks each.
DEVICE int piece(int& which) {
  int t = threadIdx.x;
  which = t >> 8;
  return ((t >> 2 & 7) | (t >> 6 & 3) << 3) * (TOKENS / 16) + ((t & 3) | (t >> 5 & 1) << 2);
}
