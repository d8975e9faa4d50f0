#include "common.cuh"
#include "early.cuh"

// Smoothing and quantisation of K and V, in one pass over V and two over K.
//
// key_mean: mean of K over the tokens of each (batch, group), deterministic.
// quantise_kv: K - mean to INT8, V to E4M3 or INT8, one scale per block of 128 tokens; V comes out transposed, (D, tokens), with the tokens of
// each 16 in operand order (store_across in common.cuh).
//
// Defined by the host: HEAD_DIM (64 or 128), V_INT8, IN_FP16.

#define KEYS 128
#define CHUNKS (HEAD_DIM / 8)          // 16-byte chunks of a row
#define THREADS (4 * HEAD_DIM)           // of quantise_kv
#define ROWS_AT_ONCE (THREADS / CHUNKS)  // 32
#define MEAN_ROWS (256 / CHUNKS)
#define PER_THREAD (KEYS / ROWS_AT_ONCE)

struct Params {
  const void* k;  // (B, L, G, D), last stride 1
  const void* v;
  signed char* k8;   // (B, G, blocks * 128, D)
  u8* v8;            // (B, G, D, blocks * 128)
  float2* scales;    // (B, G, blocks): of K, of V
  float* partial;    // (B, G, parts, D)
  float* mean;       // (B, G, D), or null
  int* done;         // (B, G), zero at launch
  long long k_batch, k_row, k_head, v_batch, v_row, v_head;
  int groups, rows, blocks, parts;
};

extern "C" __global__ void __launch_bounds__(256) key_mean(const __grid_constant__ Params p) {
  __shared__ float sums[MEAN_ROWS][HEAD_DIM];
  __shared__ int last;
  let_the_next_begin();
  int part = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
  int rows = p.rows;
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  int each = (rows + p.parts - 1) / p.parts, end = min(rows, (part + 1) * each);
  long long base = (long long)g * p.k_head;
  base += (long long)b * p.k_batch;
  float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
  for (int r = part * each + r0; r < end; r += MEAN_ROWS) {
    uint4 x = __ldg((const uint4*)((const u16*)p.k + base + (long long)r * p.k_row + chunk * 8));
    u32 w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float lo, hi;
      unpack16(w[i], lo, hi);
      sum[2 * i] += lo;
      sum[2 * i + 1] += hi;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sums[r0][chunk * 8 + i] = sum[i];
  __syncthreads();
  long long row = (long long)b * p.groups + g;
  if (threadIdx.x < HEAD_DIM) {
    float total = 0.0f;
    for (int r = 0; r < MEAN_ROWS; r++) total += sums[r][threadIdx.x];
    p.partial[(row * p.parts + part) * HEAD_DIM + threadIdx.x] = total;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.done + row, 1) == p.parts - 1;
  __syncthreads();
  if (last && threadIdx.x < HEAD_DIM) {
    __threadfence();
    float total = 0.0f;
    for (int i = 0; i < p.parts; i++) total += __ldcg(p.partial + (row * p.parts + i) * HEAD_DIM + threadIdx.x);
    p.mean[row * HEAD_DIM + threadIdx.x] = rows > 0 ? total / (float)rows : 0.0f;
  }
}

DEVICE float block_max(float x, bool& bad, float* shared) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  bad = __syncthreads_or(bad);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float top = shared[0];
  for (int i = 1; i < THREADS / 32; i++) top = fmaxf(top, shared[i]);
  __syncthreads();
  return top;
}

DEVICE void load_block(const void* source, long long base, long long stride, int first, int rows, uint4 (&raw)[PER_THREAD]) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
#pragma unroll
  for (int n = 0; n < PER_THREAD; n++) {
    int r = first + r0 + n * ROWS_AT_ONCE;
    raw[n] = r < rows ? __ldg((const uint4*)((const u16*)source + base + (long long)r * stride + chunk * 8)) : make_uint4(0, 0, 0, 0);
  }
}

// What was loaded in float32, less the mean, and its largest magnitude; rows past the end are 0.
DEVICE float unpack_block(const uint4 (&raw)[PER_THREAD], int first, int rows, float (&x)[PER_THREAD][8], const float* mean, bool& bad) {
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  float top = 0.0f, m[8];
#pragma unroll
  for (int i = 0; i < 8; i++) m[i] = mean ? mean[chunk * 8 + i] : 0.0f;
#pragma unroll
  for (int n = 0; n < PER_THREAD; n++) {
    bool inside = first + r0 + n * ROWS_AT_ONCE < rows;
    u32 w[4] = {raw[n].x, raw[n].y, raw[n].z, raw[n].w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      unpack16(w[i], x[n][2 * i], x[n][2 * i + 1]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float y = inside ? x[n][2 * i + e] - m[2 * i + e] : 0.0f;
        x[n][2 * i + e] = y;
        top = fmaxf(top, fabsf(y));
        bad |= y != y;
      }
    }
  }
  return top;
}

extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM == 128 ? 2 : 3) quantise_kv(const __grid_constant__ Params p) {
  __shared__ float shared[THREADS / 32];
  __shared__ alignas(16) u8 tile[KEYS * (HEAD_DIM + 4)];
  // Backwards: what key_mean read last may still be in the cache.
  int block = gridDim.x - 1 - blockIdx.x, g = gridDim.y - 1 - blockIdx.y, b = gridDim.z - 1 - blockIdx.z;
  int rows = p.rows;
  if (block * KEYS >= rows) return;
  int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  float x[PER_THREAD][8];
  long long storage = (long long)b * p.groups + g;
  long long k_base = (long long)g * p.k_head, v_base = (long long)g * p.v_head;
  k_base += (long long)b * p.k_batch;
  v_base += (long long)b * p.v_batch;
  const float* mean = p.mean ? p.mean + ((long long)b * p.groups + g) * HEAD_DIM : nullptr;
  uint4 k_raw[PER_THREAD], v_raw[PER_THREAD];
  load_block(p.k, k_base, p.k_row, block * KEYS, rows, k_raw);
  load_block(p.v, v_base, p.v_row, block * KEYS, rows, v_raw);  // on its way while K is made
  after_the_kernel_before();  // for its mean
  bool bad = false;
  float top = block_max(unpack_block(k_raw, block * KEYS, rows, x, mean, bad), bad, shared);
  float scale = bad ? __int_as_float(0x7fc00000) : top / 127.0f, inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  if (threadIdx.x == 0) p.scales[storage * p.blocks + block].x = scale;
  signed char* k_to = p.k8 + (storage * p.blocks + block) * KEYS * HEAD_DIM;
#pragma unroll
  for (int n = 0; n < PER_THREAD; n++) {
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = fmaf(x[n][i], inverse, MAGIC);
    *(uint2*)(k_to + (r0 + n * ROWS_AT_ONCE) * HEAD_DIM + chunk * 8) =
        make_uint2(pack_bytes(y[0], y[1], y[2], y[3]), pack_bytes(y[4], y[5], y[6], y[7]));
  }
  bad = false;
  top = block_max(unpack_block(v_raw, block * KEYS, rows, x, nullptr, bad), bad, shared);
#if V_INT8
  scale = bad ? __int_as_float(0x7fc00000) : top / 127.0f;
#else
  scale = bad ? __int_as_float(0x7fc00000) : top / 448.0f;
#endif
  inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  if (threadIdx.x == 0) p.scales[storage * p.blocks + block].y = scale;
#pragma unroll
  for (int n = 0; n < PER_THREAD; n++) {
    u32 lo, hi;
#if V_INT8
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = fmaf(x[n][i], inverse, MAGIC);
    lo = pack_bytes(y[0], y[1], y[2], y[3]);
    hi = pack_bytes(y[4], y[5], y[6], y[7]);
#else
    lo = pack_e4m3(x[n][0] * inverse, x[n][1] * inverse, x[n][2] * inverse, x[n][3] * inverse);
    hi = pack_e4m3(x[n][4] * inverse, x[n][5] * inverse, x[n][6] * inverse, x[n][7] * inverse);
#endif
    u32* to = (u32*)(tile + (r0 + n * ROWS_AT_ONCE) * (HEAD_DIM + 4) + chunk * 8);
    to[0] = lo;
    to[1] = hi;
  }
  __syncthreads();
  u8* v_to = p.v8 + storage * HEAD_DIM * p.blocks * KEYS + (long long)block * KEYS;
  for (int n = threadIdx.x; n < HEAD_DIM / 4 * (KEYS / 16); n += THREADS) store_across<KEYS, HEAD_DIM>(tile, n, v_to, (long long)p.blocks * KEYS);
}
