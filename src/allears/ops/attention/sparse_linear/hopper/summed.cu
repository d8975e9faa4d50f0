#include "common.cuh"
#include "early.cuh"
#include "mma_wide.cuh"
#include "keys.cuh"

// quantise of prepare.cu and linear_totals of forward.cu in one pass: what is quantised is multiplied while it is still in shared memory. A block of
// threads goes through a share of the keys of a head, 128 tokens at a time, and leaves the share's sum of h = phi(K)^T [V 1].
//
// Each thread fetches what it will itself read, into its own places of two stages, so that copies need no barrier. The four warpgroups then take 64 of the
// 128 channels of phi and 72 of the 136 columns each; columns 64 to 71 are made twice and written once.
//
// Defined by the host: HEAD_DIM (128), IN_FP16.

#define PHI_BYTES (128 * 64)
#define OPERANDS (PHI_BYTES + 136 * 64)  // of a block, as V_STAGE of forward.cu
#define STAGE (2 * THREADS * EACH * 16)  // 128 tokens of K, then of V
#define ACCUMULATORS 36

DEVICE void fetch(u32 to, const void* from, bool inside) {  // 16 bytes, or zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

DEVICE void pin(float (&x)[ACCUMULATORS]) {  // see forward.cu
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; i++) asm volatile("" : "+f"(x[i])::"memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) quantise_and_sum(const __grid_constant__ Params p) {
  extern __shared__ u8 raw_shared[];
  u8 *operands = aligned_shared(raw_shared), *stages = operands + 2 * OPERANDS, *phi_tile = stages + 2 * STAGE, *v_tile = phi_tile + TOKENS * PITCH;
  __shared__ float tops[2][THREADS / 32];
  __shared__ alignas(16) float inverses[HEAD_DIM];  // of V: registers are few
  int t = threadIdx.x, group = __shfl_sync(0xffffffffu, t / 128, 0);
  if (t < 256) ((u32*)(operands + t / 128 * OPERANDS + 2 * PHI_BYTES))[t % 128] = t % 128 < 16 ? 0x38383838u : 0u;  // a row of ones, seven of zeros
  after_the_kernel_before();
  int split = blockIdx.x, g = blockIdx.y, b = blockIdx.z, row = b * p.groups + g, all = b * p.all_groups + p.first_group + g;
  if (split + g + b + t == 0) *p.counter = 0;
  int tiles = (p.keys + TOKENS - 1) / TOKENS, each = (tiles + p.splits - 1) / p.splits, start = split * each, end = min(tiles, start + each);
  int chunk = t % CHUNKS, r0 = t / CHUNKS;
  const u16* k = (const u16*)p.k + b * p.k_batch + (p.first_group + g) * p.k_head + chunk * 8;
  const u16* v = (const u16*)p.v + b * p.v_batch + (p.first_group + g) * p.v_head + chunk * 8;
  const float* mean = p.k_mean + all * HEAD_DIM;
  auto fetch_tile = [&](int tile, int stage) {
    u32 to = shared_address(stages) + stage * STAGE + t * 16;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      int r = tile * TOKENS + r0 + n * AT_ONCE, at = min(r, p.keys - 1);
      fetch(to + n * (THREADS * 16), k + at * p.k_row, r < p.keys);
      fetch(to + (EACH + n) * (THREADS * 16), v + at * p.v_row, r < p.keys);
    }
  };
  float h[ACCUMULATORS], part[ACCUMULATORS];  // sums of a block apart: the matrix unit's own keep some 14 bits
#pragma unroll
  for (int i = 0; i < ACCUMULATORS; i++) h[i] = 0.0f;
  u64 phi_operand = operand<64>(shared_address(operands) + group % 2 * (64 * 64));
  u64 v_operand = operand<64>(shared_address(operands) + PHI_BYTES + group / 2 * (64 * 64));
  if (t < CHUNKS) {
    float inverse[8];
    inverse_tops(inverse, p.v_max + all * HEAD_DIM);
#pragma unroll
    for (int i = 0; i < 8; i++) inverses[t * 8 + i] = inverse[i];
  }
  __syncthreads();
  if (start < end) fetch_tile(start, 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
  for (int tile = start; tile < end; tile++) {
    int stage = (tile - start) & 1, first = tile * TOKENS, blocks = min(2, p.k_blocks - 2 * tile);
    if (tile + 1 < end) fetch_tile(tile + 1, stage ^ 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    const u8* mine = stages + stage * STAGE + t * 16;
    auto k_of = [&](int n) { return *(const uint4*)(mine + n * (THREADS * 16)); };
    phi_rows(phi_tile, tops, mean, first, p.keys, k_of);
    float inverse_v[8];
#pragma unroll
    for (int i = 0; i < 2; i++) *(float4*)(inverse_v + 4 * i) = *(const float4*)(inverses + chunk * 8 + 4 * i);
#pragma unroll
    for (int n = 0; n < EACH; n++) v_row(v_tile, n, *(const uint4*)(mine + (EACH + n) * (THREADS * 16)), inverse_v);
    if (t == 0) added();  // the records of the tile before have left the operands' places
    __syncthreads();      // all have; and all products of the tile before are done
    long long block = (long long)row * p.k_blocks + 2 * tile;
    u8* to = p.records + block * RECORD;
    k_rows(to, blocks, tops, mean, p.k_scale + block, first, p.keys, k_of);
    int which, at = piece(which);
    store_across<TOKENS, HEAD_DIM>(which ? v_tile : phi_tile, at,
                                   [=](int d, int c) { return operands + c / 4 * OPERANDS + which * PHI_BYTES + chunk_offset<64>(d, c % 4); });
    fence_async_shared();
    __syncthreads();
    if (t == 0) {
      for (int i = 0; i < blocks; i++)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + i * RECORD + 64 * HEAD_DIM),
                     "r"(shared_address(operands) + i * OPERANDS), "r"(2 * PHI_BYTES)
                     : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {  // past the last key phi is zero
#pragma unroll
      for (int r = 0; r < ACCUMULATORS; r++) part[r] = 0.0f;
      pin(part);
      mma_fence();
      mma_e4m3(part, phi_operand + i * (OPERANDS >> 4), v_operand + i * (OPERANDS >> 4), 1);
      mma_e4m3(part, phi_operand + i * (OPERANDS >> 4) + 2, v_operand + i * (OPERANDS >> 4) + 2, 1);
      mma_commit();
      mma_wait<0>();
      pin(part);
#pragma unroll
      for (int r = 0; r < ACCUMULATORS; r++) h[r] += part[r];
    }
  }
  t %= 128;
  long long at = ((long long)split * gridDim.y * gridDim.z + row) * HEAD_DIM + group % 2 * 64 + t / 32 * 16 + t % 32 / 4;
  float* to = p.shares + at * p.share_row + group / 2 * 64 + 2 * (t % 4);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    *(float2*)(to + 8 * j) = make_float2(h[4 * j], h[4 * j + 1]);
    *(float2*)(to + 8 * p.share_row + 8 * j) = make_float2(h[4 * j + 2], h[4 * j + 3]);
  }
  if (group / 2 == 1 && t % 4 == 0) p.share_ones[at] = h[32], p.share_ones[at + 8] = h[34];
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
