#include "common.cuh"
#include "early.cuh"

// What sparse-linear attention needs of Q, K and V before its main kernel, for a head size of 128.
//
// statistics: means of Q over blocks of 128 tokens and of K over blocks of 64 (for the router), the mean of K over all tokens, the largest |V| of
// each channel. quantise: K - mean to INT8, one scale per block of 64 tokens; softmax over the channels of K - mean, and V, to E4M3,
// across (channels, tokens), with the tokens of each 16 in operand order (store_across in common.cuh). Everything is deterministic.
//
// Defined by the host: HEAD_DIM (128), IN_FP16.

#define PART 512               // tokens of a block of threads in statistics
#define LANES 16               // rows at once there
#define CHUNKS (HEAD_DIM / 8)  // 16-byte chunks of a row
#define LOG2E 1.44269504088896f
#define TOKENS 128             // of a block of threads in quantise
#define RECORD (3 * 64 * HEAD_DIM)
#define THREADS 512
#define AT_ONCE (THREADS / CHUNKS)   // 32 rows
#define EACH (TOKENS / AT_ONCE)      // 4 rows of a thread: two of each block of 64
#define PITCH (HEAD_DIM + 4)         // bytes of a row of a tile of 8-bit tokens

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
  // quantise takes ``groups`` key heads from ``first_group`` of ``all_groups`` on, of which records and k_scale know no others
  long long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  int heads, groups, queries, keys, q_blocks, k_blocks, q_parts, k_parts, smooth, first_group, all_groups;
};

DEVICE void add_row(float (&sum)[8], uint4 x) {
  u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float lo, hi;
    unpack16(w[i], lo, hi);
    sum[2 * i] += lo;
    sum[2 * i + 1] += hi;
  }
}

DEVICE void max_row(float (&top)[8], uint4 x) {
  u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float lo, hi;
    unpack16(w[i], lo, hi);
    top[2 * i] = max_nan(top[2 * i], fabsf(lo));
    top[2 * i + 1] = max_nan(top[2 * i + 1], fabsf(hi));
  }
}

// Sums of ``rows`` rows from ``first`` on in each of the PART / ROWS blocks of a part, to means; the part's own sum into total.
template <int ROWS>
DEVICE void pool(const u16* x, long long stride, int first, int length, float* to, float (&sums)[LANES][HEAD_DIM + 4], float& total) {
  int chunk = threadIdx.x % CHUNKS, lane = threadIdx.x / CHUNKS;
  for (int block = 0; block < PART / ROWS; block++) {
    int start = first + block * ROWS;
    if (start >= length) return;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    uint4 raw[ROWS / LANES];
#pragma unroll
    for (int n = 0; n < ROWS / LANES; n++) {
      int r = start + lane + n * LANES;
      raw[n] = r < length ? __ldg((const uint4*)(x + r * stride + chunk * 8)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int n = 0; n < ROWS / LANES; n++) add_row(sum, raw[n]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) *(float4*)&sums[lane][chunk * 8 + 4 * i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
    __syncthreads();
    if (threadIdx.x < HEAD_DIM) {
      float all = 0.0f;
#pragma unroll
      for (int r = 0; r < LANES; r++) all += sums[r][threadIdx.x];
      to[(long long)(start / ROWS) * HEAD_DIM + threadIdx.x] = all / (float)min(ROWS, length - start);
      total += all;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) statistics(const __grid_constant__ Params p) {
  __shared__ float sums[LANES][HEAD_DIM + 4];
  __shared__ int last;
  int part = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
  float total = 0.0f;
  if (head < p.heads) {
    if (part >= p.q_parts) return;
    const u16* q = (const u16*)p.q + b * p.q_batch + head * p.q_head;
    pool<128>(q, p.q_row, part * PART, p.queries, p.q_pool + (long long)(b * p.heads + head) * p.q_blocks * HEAD_DIM, sums, total);
    return;
  }
  int g = head - p.heads, row = b * p.groups + g;
  if (part >= p.k_parts) return;
  int chunk = threadIdx.x % CHUNKS, lane = threadIdx.x / CHUNKS;
  const u16* v = (const u16*)p.v + b * p.v_batch + g * p.v_head;
  float top[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 8
  for (int n = 0; n < PART / LANES; n++) {
    int r = part * PART + lane + n * LANES;
    if (r < p.keys) max_row(top, __ldg((const uint4*)(v + r * p.v_row + chunk * 8)));
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sums[lane][chunk * 8 + i] = top[i];
  __syncthreads();
  if (threadIdx.x < HEAD_DIM) {
    float all = 0.0f;
    for (int r = 0; r < LANES; r++) all = max_nan(all, sums[r][threadIdx.x]);
    atomicMax(p.v_max + row * HEAD_DIM + threadIdx.x, __float_as_int(all) & 0x7fffffff);  // NaN is above everything
  }
  const u16* k = (const u16*)p.k + b * p.k_batch + g * p.k_head;
  pool<64>(k, p.k_row, part * PART, p.keys, p.k_pool + (long long)row * p.k_blocks * HEAD_DIM, sums, total);
  if (threadIdx.x < HEAD_DIM) {
    p.partial[((long long)row * p.k_parts + part) * HEAD_DIM + threadIdx.x] = total;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.done + row, 1) == p.k_parts - 1;
  __syncthreads();
  if (last && threadIdx.x < HEAD_DIM) {
    __threadfence();
    float all = 0.0f;
#pragma unroll 8
    for (int i = 0; i < p.k_parts; i++) all += __ldcg(p.partial + ((long long)row * p.k_parts + i) * HEAD_DIM + threadIdx.x);
    p.k_mean[row * HEAD_DIM + threadIdx.x] = p.smooth ? all / (float)p.keys : 0.0f;
  }
}

// quantise takes 128 tokens at a time by 512 threads: thread t has 8 channels (16 bytes, ``chunk``) of the four rows t / 16 + 32 n.

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
DEVICE void phi_rows(u8* tile, float (&tops)[2][THREADS / 32], const float* mean, int first, int length, const uint4 (&raw)[EACH]) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  float m[8], top[2] = {0.0f, 0.0f};
  load_mean(m, mean + chunk * 8);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    bool inside = first + r0 + n * AT_ONCE < length;
    float e[8], most = -INFINITY_F, sum = 0.0f;
    centred(e, raw[n], m, inside);
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
DEVICE void k_rows(u8* to, int blocks, const float (&tops)[2][THREADS / 32], const float* mean, float* scales, int first, int length, const uint4 (&raw)[EACH]) {
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
    centred(y, raw[n], m, first + r0 + n * AT_ONCE < length);
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

extern "C" __global__ void __launch_bounds__(THREADS, 2) quantise(const __grid_constant__ Params p) {
  __shared__ float tops[2][THREADS / 32];
  __shared__ alignas(16) u8 phi_tile[TOKENS * PITCH];
  __shared__ alignas(16) u8 v_tile[TOKENS * PITCH];
  after_the_kernel_before();
  if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) *p.counter = 0;
  int first = blockIdx.x * TOKENS, g = blockIdx.y, b = blockIdx.z, row = b * p.groups + g, all = b * p.all_groups + p.first_group + g;
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  const u16* k = (const u16*)p.k + b * p.k_batch + (p.first_group + g) * p.k_head;
  const u16* v = (const u16*)p.v + b * p.v_batch + (p.first_group + g) * p.v_head;
  const float* mean = p.k_mean + all * HEAD_DIM;
  uint4 raw[EACH], raw_v[EACH];  // K stays as it came and is centred twice: its differences in float32 would take twice the registers, too many
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    int r = first + r0 + n * AT_ONCE;
    raw[n] = r < p.keys ? __ldg((const uint4*)(k + r * p.k_row + chunk * 8)) : make_uint4(0, 0, 0, 0);
  }
  phi_rows(phi_tile, tops, mean, first, p.keys, raw);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    int r = first + r0 + n * AT_ONCE;
    raw_v[n] = r < p.keys ? __ldg((const uint4*)(v + r * p.v_row + chunk * 8)) : make_uint4(0, 0, 0, 0);
  }
  float inverse_v[8];
  inverse_tops(inverse_v, p.v_max + all * HEAD_DIM);
#pragma unroll
  for (int n = 0; n < EACH; n++) v_row(v_tile, n, raw_v[n], inverse_v);
  __syncthreads();
  long long block = (long long)row * p.k_blocks + 2 * blockIdx.x;
  u8* to = p.records + block * RECORD;
  int blocks = min(2, p.k_blocks - 2 * (int)blockIdx.x), which, at = piece(which);
  k_rows(to, blocks, tops, mean, p.k_scale + block, first, p.keys, raw);
  if (at % (TOKENS / 16) / 4 >= blocks) return;
  store_across<TOKENS, HEAD_DIM>(which ? v_tile : phi_tile, at, [=](int d, int c) {
    return to + c / 4 * RECORD + (1 + which) * (64 * HEAD_DIM) + chunk_offset<64>(d, c % 4);
  });
}
