// The pass over the keys of linear attention on Hopper: a block's share of the sums of phi(k)^T v and of phi(k), with focused features whose
// norm runs over all heads.
//
// A block walks over tiles of 32 * PARTS rows, brought by one warp as in output.cu; WARPS = PARTS * GROUPS warps have 32 rows of 64 channels each,
// and a 64 x 64 sum in registers. A thread (g = lane / 4, c = lane % 4) has channels 8 g to 8 g + 7 of k and v, and the rows that
// it has as a term of the product: 2 c, 2 c + 1 and these + 8, + 16, + 24. So features go from registers into the product.
//
// Macros: see features.cuh; STAGES.

#include "features.cuh"

#define TILE_BYTES (ROWS * 128 * GROUPS)
#define STAGE_BYTES (2 * PARTS * TILE_BYTES)
#define OWN 8  // rows of a thread

struct Params {
  float* parts;         // (E, P, C * HEAD_DIM + C)
  const float* scale;   // (C) or none
  const void* cu;       // (E + 1) or none
  const void* lengths;  // (E) or none
  int wide;             // cu and lengths have 64 bit
  int keys;
};

DEVICE float over_groups(const float (&x)[OWN], int g) {  // sums over the eight threads of rows: that of row g of a thread's eight
  float a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = (g & 4 ? x[i + 4] : x[i]) + __shfl_xor_sync(0xffffffffu, g & 4 ? x[i] : x[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) b[i] = (g & 2 ? a[i + 2] : a[i]) + __shfl_xor_sync(0xffffffffu, g & 2 ? a[i] : a[i + 2], 8);
  return (g & 1 ? b[1] : b[0]) + __shfl_xor_sync(0xffffffffu, g & 1 ? b[0] : b[1], 4);
}

// A thread's row i of a tile, of which ``at`` is where its first one lies: 2 c + i % 2 + 8 (i / 2), its 16-byte pieces permuted by the row's
// number modulo 8, so that 8 lanes of four rows meet all banks once.
DEVICE u32 row_at(u32 at, int i) { return (at ^ (i % 2 * 16)) + i % 2 * 128 + i / 2 * 1024; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_states(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  u8* shared = aligned_shared(raw);
  float* inverse = (float*)(shared + STAGES * STAGE_BYTES);
  float* totals = inverse + CHANNELS;                  // (WARPS, 64)
  float2* norms = (float2*)(totals + WARPS * 64);      // (2, WARPS, ROWS)
  u64* barriers = (u64*)(norms + 2 * WARPS * ROWS);    // full and empty of each stage, norms of each part
  u32 full = shared_address(barriers), empty = full + 8 * STAGES, summed = empty + 8 * STAGES;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
    for (int part = 0; part < PARTS; part++) barrier_init(summed + 8 * part, GROUPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async_shared();
  }
  for (int i = threadIdx.x; i < CHANNELS; i += THREADS) inverse[i] = p.scale ? 1.0f / p.scale[i] * UNIT : UNIT;
  __syncthreads();
  int entry = blockIdx.y, before = 0, keys = p.keys;
  if (p.cu) {
    before = (int)integer(p.cu, entry, p.wide);
    keys = (int)integer(p.cu, entry + 1, p.wide) - before;
  } else if (p.lengths) {
    keys = (int)max(0ll, min(integer(p.lengths, entry, p.wide), (long long)keys));
  }
  int tiles = (keys + ROWS * PARTS - 1) / (ROWS * PARTS), each = tiles / (int)gridDim.x, more = tiles % (int)gridDim.x, block = blockIdx.x;
  int start = each * block + min(block, more), stop = start + each + (block < more);
  u32 stages = shared_address(shared);
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 8 && elected()) {
      int stage = 0, turn = 0;
      for (int n = start; n < stop; n++) {
        barrier_wait(empty + 8 * stage, (turn & 1) ^ 1);
        barrier_expect(full + 8 * stage, STAGE_BYTES);
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) {
          u32 to = stages + stage * STAGE_BYTES + 2 * part * TILE_BYTES;
          int row = before + (n * PARTS + part) * ROWS;
          copy_4d(to, &k_map, full + 8 * stage, 0, row, 0, p.cu ? 0 : entry);
          copy_4d(to + TILE_BYTES, &v_map, full + 8 * stage, 0, row, 0, p.cu ? 0 : entry);
        }
        if (++stage == STAGES) stage = 0, turn++;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  if (warp >= WARPS) return;
  int part = warp / GROUPS, group = warp % GROUPS, g = lane / 4, c = lane % 4;
  float sum[4][8][4], total[8];  // of channels 8 g + 2 m and one more with channels 16 c + j and 8 more; of phi alone
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[m][j][e] = 0.0f;
#pragma unroll
  for (int e = 0; e < 8; e++) total[e] = 0.0f;
  int stage = 0, turn = 0;
  for (int n = start; n < stop; n++) {
    u32 tile = stages + stage * STAGE_BYTES + 2 * part * TILE_BYTES + group * (ROWS * 128);
    int first = (n * PARTS + part) * ROWS, at_once = (n - start) & 1;
    barrier_wait(full + 8 * stage, turn & 1);
    if (first + ROWS > keys) {  // what is beyond the sequence's keys counts as 0
      for (int r = lane / 8; r < ROWS; r += 4) {
        if (first + r >= keys) {
          store_zeros(tile + r * 128 + lane % 8 * 16);
          store_zeros(tile + TILE_BYTES + r * 128 + lane % 8 * 16);
        }
      }
      fence_async_shared();
      __syncwarp();
    }
    u32 k_at = tile + 2 * c * 128 + ((g ^ (2 * c)) << 4), v_at = k_at + TILE_BYTES;
    Base base(inverse + group * 64 + 8 * g);
    float squares[OWN] = {}, tops[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      float x[8];
      base.read(row_at(k_at, i), 0, x);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        float square = x[e] * x[e], top = POWER == 3 ? square * x[e] : square;
        squares[i] += square;
        tops[i] += top * top;
      }
    }
    float2 norm = make_float2(over_groups(squares, g), over_groups(tops, g));  // of row 2 c + g % 2 + 8 (g / 2)
    float2* to = norms + at_once * WARPS * ROWS + part * GROUPS * ROWS + lane;
    if (GROUPS > 1) {
      to[group * ROWS] = norm;
      __syncwarp();
      if (lane == 0) barrier_arrive(summed + 8 * part);
    }
    float ratio = 0.0f;
#pragma unroll
    for (int s = 0; s < 2; s++) {
      u32 b[8][2], a[4][4];
      float phi[4][8];
#pragma unroll
      for (int high = 0; high < 2; high++) {
        uint4 x = load16(row_at(v_at, 4 * s + 2 * high)), y = load16(row_at(v_at, 4 * s + 2 * high + 1));
        u32 even[4] = {x.x, x.y, x.z, x.w}, odd[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 8; j++) b[j][high] = __byte_perm(even[j / 2], odd[j / 2], j % 2 ? 0x7632 : 0x5410);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        base.read(row_at(k_at, 4 * s + i), 0, phi[i]);
#pragma unroll
        for (int k = 0; k < 8; k++) phi[i][k] = power(phi[i][k]);
      }
      if (s == 0) {  // late, while the other warps add up theirs
        if (GROUPS > 1) {
          barrier_wait(summed + 8 * part, at_once);
          norm = to[0];
#pragma unroll
          for (int other = 1; other < GROUPS; other++) norm.x += to[other * ROWS].x, norm.y += to[other * ROWS].y;
        }
        ratio = first + 2 * c + g % 2 + g / 2 * 8 < keys ? norm_factor(norm) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float by = __shfl_sync(0xffffffffu, ratio, 4 * (4 * s + i) + c);
#pragma unroll
        for (int k = 0; k < 8; k++) {
          phi[i][k] *= by;
          total[k] += phi[i][k];
        }
      }
#pragma unroll
      for (int k = 0; k < 8; k++)
#pragma unroll
        for (int high = 0; high < 2; high++) a[k / 2][k % 2 + 2 * high] = pack16(phi[2 * high][k], phi[2 * high + 1][k]);
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int j = 0; j < 8; j++) multiply(sum[m][j], a[m], b[j][0], b[j][1]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (++stage == STAGES) stage = 0, turn++;
  }
  // The parts of a group are added in one order, in the stages' memory, which nothing is copied to any more.
  consumers_sync();
  float* matrix = (float*)shared;  // (WARPS, 64, 64)
#pragma unroll
  for (int k = 0; k < 8; k++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float4* here = (float4*)(matrix + warp * 4096 + (8 * g + k) * 64 + 16 * c + 8 * e);
      int of = k % 2 * 2 + e;
      here[0] = make_float4(sum[k / 2][0][of], sum[k / 2][1][of], sum[k / 2][2][of], sum[k / 2][3][of]);
      here[1] = make_float4(sum[k / 2][4][of], sum[k / 2][5][of], sum[k / 2][6][of], sum[k / 2][7][of]);
    }
    total[k] += __shfl_xor_sync(0xffffffffu, total[k], 1);
    total[k] += __shfl_xor_sync(0xffffffffu, total[k], 2);
    if (c == 0) totals[warp * 64 + 8 * g + k] = total[k];
  }
  consumers_sync();
  float* out = p.parts + ((long long)entry * gridDim.x + block) * (CHANNELS * HEAD_DIM + CHANNELS);
  for (int i = threadIdx.x; i < CHANNELS * HEAD_DIM / 4; i += 32 * WARPS) {
    int channel = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4 + channel % 64 / HEAD_DIM * HEAD_DIM;
    const float4* from = (const float4*)(matrix + channel * 64 + column);
    float4 x = from[0];
    for (int other = 1; other < PARTS; other++) {
      float4 y = from[other * GROUPS * 1024];
      x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
    ((float4*)out)[i] = x;
  }
  for (int i = threadIdx.x; i < CHANNELS; i += 32 * WARPS) {
    float x = totals[i];
    for (int other = 1; other < PARTS; other++) x += totals[other * CHANNELS + i];
    out[CHANNELS * HEAD_DIM + i] = x;
  }
}
