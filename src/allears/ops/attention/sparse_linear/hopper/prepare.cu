#include "common.cuh"
#include "early.cuh"
#include "keys.cuh"

// What sparse-linear attention needs of Q, K and V before its main kernel, for a head size of 128.
//
// statistics: means of Q over blocks of 128 tokens and of K over blocks of 64 (for the router), the mean of K over all tokens, the largest |V| of
// each channel. quantise: K and V to 8 bits, see keys.cuh. Everything is deterministic.
//
// Defined by the host: HEAD_DIM (128), IN_FP16, and V_AHEAD: quantise asks for V before it works on K.

#define PART 512               // tokens of a block of threads in statistics
#define LANES 16               // rows at once there

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
  auto load_v = [&] {
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      int r = first + r0 + n * AT_ONCE;
      raw_v[n] = r < p.keys ? __ldg((const uint4*)(v + r * p.v_row + chunk * 8)) : make_uint4(0, 0, 0, 0);
    }
  };
#if V_AHEAD
  load_v();
#endif
  phi_rows(phi_tile, tops, mean, first, p.keys, [&](int n) { return raw[n]; });
#if !V_AHEAD
  load_v();
#endif
  float inverse_v[8];
  inverse_tops(inverse_v, p.v_max + all * HEAD_DIM);
#pragma unroll
  for (int n = 0; n < EACH; n++) v_row(v_tile, n, raw_v[n], inverse_v);
  __syncthreads();
  long long block = (long long)row * p.k_blocks + 2 * blockIdx.x;
  u8* to = p.records + block * RECORD;
  int blocks = min(2, p.k_blocks - 2 * (int)blockIdx.x), which, at = piece(which);
  k_rows(to, blocks, tops, mean, p.k_scale + block, first, p.keys, [&](int n) { return raw[n]; });
  if (at % (TOKENS / 16) / 4 >= blocks) return;
  store_across<TOKENS, HEAD_DIM>(which ? v_tile : phi_tile, at, [=](int d, int c) {
    return to + c / 4 * RECORD + (1 + which) * (64 * HEAD_DIM) + chunk_offset<64>(d, c % 4);
  });
}
