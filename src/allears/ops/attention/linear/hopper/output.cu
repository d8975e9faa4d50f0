// The pass over the queries of linear attention on Hopper: out = phi(q) matrix / (phi(q) . sums + eps) + convolution of v, with
// focused features whose norm runs over all heads.
//
// A block walks over tiles of 32 * PARTS rows. One warp brings q and v into STAGES buffers by bulk tensor copies; WARPS = PARTS * GROUPS
// warps have 32 rows of 64 channels each, and their matrix in registers. Rows of a product may have any order, and so may the terms of
// its sums and its columns: a thread (g = lane / 4, c = lane % 4) has rows 4 g to 4 g + 3 and channels 8 c to 8 c + 7 and 32 more,
// of q, of v and of the output. So nothing is exchanged but sums of rows, every access has 16 bytes, and rows that
// adjoin share what the convolution reads.
//
// Macros: see features.cuh; TAPS of the convolution (0: none), STAGES.

#include "features.cuh"

#define LEFT (TAPS > 0 ? (TAPS - 1) / 2 : 0)
#define V_ROWS (TAPS > 0 ? ROWS + (TAPS + 2) / 4 * 4 : 0)  // a multiple of 4, at least ROWS + TAPS - 1
#define SEEN (ROWS / 8 + TAPS - 1)                         // rows of v that a thread reads
#define Q_BYTES (ROWS * 128 * GROUPS)
#define V_BYTES (V_ROWS * 128 * GROUPS)
#define V_PLACE ((V_BYTES + 1023) / 1024 * 1024)
#define PART_BYTES (Q_BYTES + V_PLACE)
#define STAGE_BYTES (PARTS * PART_BYTES)
#define CHUNK 64  // what the address of a thread's second 8 channels differs in
#define PAIRS (HEAD_DIM == 64 ? 1 : 2)  // heads that a thread has channels of

struct Params {
  const u16* matrix;   // (E, C, HEAD_DIM), 16 bit
  const float* sums;   // (E, C)
  const float* scale;  // (C) or none
  const void *conv, *bias;  // (H, HEAD_DIM, TAPS) and (H, HEAD_DIM) with any strides, or none
  const void* cu;           // (E + 1) or none
  const void* lengths;      // (E) or none
  u16* out;                 // (B, L_q, C)
  long long conv_head, conv_channel, conv_tap, bias_head, bias_channel;
  int conv_kind, bias_kind;  // 0 float32, 1 bfloat16, 2 float16
  int wide;                  // cu and lengths have 64 bit
  int entries, queries, keys;
  float eps;
};

DEVICE float over_quad(const float (&x)[4], int c) {  // sums over the four threads of rows: that of row 4 g + c
  bool upper = c & 2, odd = c & 1;
  float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], 2);
  float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], 2);
  return (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
}

// A sequence, and which of its rows a tile has.
struct Tile {
  int entry, batch, before, rows, first;  // rows before the sequence in memory, its rows, the tile's first
};

struct Tiles {  // those of this block
  int entry, before, rows, in_entry, start, stop;

  __device__ __forceinline__ Tiles(const Params& p) {
    entry = 0, before = 0, rows = p.queries;
    int all = p.entries;
    if (p.cu) {
      entry = blockIdx.y;
      before = (int)integer(p.cu, entry, p.wide);
      rows = (int)integer(p.cu, entry + 1, p.wide) - before;
      all = 1;
    }
    in_entry = (rows + ROWS * PARTS - 1) / (ROWS * PARTS);
    all *= in_entry;
    int each = all / (int)gridDim.x, more = all % (int)gridDim.x, block = blockIdx.x;
    start = each * block + min(block, more);
    stop = start + each + (block < more);
  }

  __device__ __forceinline__ Tile at(const Params& p, int n) const {
    int e = p.cu ? 0 : n / in_entry;
    return {entry + e, e, before, rows, (n - e * in_entry) * (ROWS * PARTS)};
  }
};

DEVICE int keys_of(const Params& p, const Tile& tile) {
  if (p.cu) return tile.rows;
  if (!p.lengths) return p.keys;
  long long n = integer(p.lengths, tile.entry, p.wide);
  return n < 0 ? 0 : n > p.keys ? p.keys : (int)n;
}

// The matrix of 64 channels as operands of the products: of step s and columns j in b[s][j]. Thread (g, c) has of step s the channels
// 8 (c + 4 (s / 2)) + 4 (s % 2) and three more as terms, and in columns j the channel 8 (g / 2 + 4 (j / 4)) + 2 (j % 4) + g % 2.
DEVICE void load_matrix(const u16* matrix, int g, int c, u32 (&b)[4][8][2]) {
  u32 pick = g & 1 ? 0x7632 : 0x5410;
#pragma unroll
  for (int s = 0; s < 4; s++)
#pragma unroll
    for (int high = 0; high < 2; high++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int term = 8 * (c + 4 * (s >> 1)) + 4 * (s & 1) + 2 * high, column = 8 * ((g >> 1) + 4 * half);
        uint4 x = make_uint4(0, 0, 0, 0), y = x;
        if (term / HEAD_DIM == column / HEAD_DIM) {
          const u16* at = matrix + term * HEAD_DIM + column % HEAD_DIM;
          x = *(const uint4*)at;
          y = *(const uint4*)(at + HEAD_DIM);
        }
        b[s][4 * half][high] = __byte_perm(x.x, y.x, pick);
        b[s][4 * half + 1][high] = __byte_perm(x.y, y.y, pick);
        b[s][4 * half + 2][high] = __byte_perm(x.z, y.z, pick);
        b[s][4 * half + 3][high] = __byte_perm(x.w, y.w, pick);
      }
}

// Eight channels of a thread's row i to the operands of the products.
DEVICE void pack_row(const float (&x)[8], int half, int i, u32 (&a)[2][4][4]) {
#pragma unroll
  for (int e = 0; e < 8; e += 2) a[i / 2][2 * half + e / 4][i % 2 + e % 4 / 2 * 2] = pack16(x[e], x[e + 1]);
}

// 32 rows times a half of the columns, 4 blocks of columns of each 16 rows. Smaller heads lie within a half of the channels.
DEVICE void attend(float (&product)[8][4], const u32 (&a)[2][4][4], const u32 (&matrix)[4][8][2], int half) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) product[j][e] = 0.0f;
#pragma unroll
    for (int s = 0; s < 4; s++)
      if (HEAD_DIM == 64 || s / 2 == half) multiply(product[j], a[j / 4][s], matrix[s][4 * half + j % 4][0], matrix[s][4 * half + j % 4][1]);
  }
}

// bias + convolution of v for four rows and eight channels. ``at``: where the first row's channels lie, see swizzled().
DEVICE void convolve(u32 at, const float* conv, const float* bias, float (&sum)[4][8]) {
  floats8(bias, sum[0]);
#pragma unroll
  for (int i = 1; i < 4; i++)
#pragma unroll
    for (int e = 0; e < 8; e++) sum[i][e] = sum[0][e];
#if TAPS > 0
  float weight[TAPS][8];
#pragma unroll
  for (int t = 0; t < TAPS; t++) floats8(conv + t * CHANNELS, weight[t]);
#pragma unroll
  for (int r = 0; r < SEEN; r++) {
    float x[8];
    unpack8(load16((at ^ (r % 8 * 16)) + r * 128), x);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (r - i >= 0 && r - i < TAPS)
#pragma unroll
        for (int e = 0; e < 8; e++) sum[i][e] += weight[r - i < 0 ? 0 : r - i >= TAPS ? 0 : r - i][e] * x[e];
  }
#endif
}

// Where a thread's first 8 channels of row ``row`` (a multiple of 4) of a buffer lie: the 16-byte pieces of a row of 128 bytes are permuted by
// the row's number modulo 8. Those of row + r are at (this ^ r % 8 * 16) + r * 128, and 8 lanes of two rows meet all banks once.
DEVICE u32 swizzled(u32 buffer, int row, int c) { return buffer + row * 128 + ((c ^ (row & 4)) << 4); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_output(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
  extern __shared__ u8 raw[];
  u8* shared = aligned_shared(raw);
  float* conv = (float*)(shared + STAGES * STAGE_BYTES);
  float* inverse = conv + TAPS * CHANNELS;
  float* bias = inverse + CHANNELS;
  float* means = bias + CHANNELS;                  // (WARPS, 64)
  float2* norms = (float2*)(means + WARPS * 64);   // (2, WARPS, ROWS)
  u64* barriers = (u64*)(norms + 2 * WARPS * ROWS);  // full and empty of each stage, norms of each part
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
  for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
    inverse[i] = p.scale ? 1.0f / p.scale[i] * UNIT : UNIT;
    bias[i] = p.bias ? number(p.bias, i / HEAD_DIM * p.bias_head + i % HEAD_DIM * p.bias_channel, p.bias_kind) : 0.0f;
    for (int t = 0; t < TAPS; t++)
      conv[t * CHANNELS + i] = number(p.conv, i / HEAD_DIM * p.conv_head + i % HEAD_DIM * p.conv_channel + t * p.conv_tap, p.conv_kind);
  }
  __syncthreads();
  Tiles tiles(p);
  u32 stages = shared_address(shared);
  if (warp >= 8) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 8 && elected()) {
      int stage = 0, turn = 0;
      for (int n = tiles.start; n < tiles.stop; n++) {
        Tile tile = tiles.at(p, n);
        barrier_wait(empty + 8 * stage, (turn & 1) ^ 1);
        barrier_expect(full + 8 * stage, PARTS * (Q_BYTES + V_BYTES));
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) {
          u32 to = stages + stage * STAGE_BYTES + part * PART_BYTES;
          int row = tile.before + tile.first + part * ROWS;
          copy_4d(to, &q_map, full + 8 * stage, 0, row, 0, tile.batch);
#if TAPS > 0
          copy_4d(to + Q_BYTES, &v_map, full + 8 * stage, 0, row - LEFT, 0, tile.batch);
#endif
        }
        if (++stage == STAGES) stage = 0, turn++;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  if (warp >= WARPS) return;
  int part = warp / GROUPS, group = warp % GROUPS, g = lane / 4, c = lane % 4;
  u32 matrix[4][8][2];
  const float* inverse_here = inverse + group * 64 + 8 * c;
  const float* mean_here = means + warp * 64 + 8 * c;
  const float* bias_here = bias + group * 64 + 8 * c;
  const float* conv_here = conv + group * 64 + 8 * c;
  int stage = 0, turn = 0, entry = -1, keys = 0, count = 0;
  for (int n = tiles.start; n < tiles.stop; n++, count++) {
    Tile tile = tiles.at(p, n);
    if (tile.entry != entry) {
      entry = tile.entry;
      keys = keys_of(p, tile);
      long long from = (long long)entry * CHANNELS + group * 64;
      load_matrix(p.matrix + from * HEAD_DIM, g, c, matrix);
      __syncwarp();  // the last means have been read
      means[warp * 64 + lane] = p.sums[from + lane];
      means[warp * 64 + 32 + lane] = p.sums[from + 32 + lane];
      __syncwarp();
    }
    u32 q_tile = stages + stage * STAGE_BYTES + part * PART_BYTES + group * (ROWS * 128);
    u32 v_tile = stages + stage * STAGE_BYTES + part * PART_BYTES + Q_BYTES + group * (V_ROWS * 128);
    int first = tile.first + part * ROWS;
    barrier_wait(full + 8 * stage, turn & 1);
#if TAPS > 0
    if (first < LEFT || first - LEFT + V_ROWS > keys) {  // what is beyond the sequence's keys counts as 0
      for (int r = lane / 8; r < V_ROWS; r += 4) {
        int row = first - LEFT + r;
        if (row < 0 || row >= keys) store_zeros(v_tile + r * 128 + lane % 8 * 16);
      }
      fence_async_shared();
      __syncwarp();
    }
#endif
    // Powers of the rows, and their sums.
    float squares[4] = {}, tops[4] = {}, below[4][PAIRS] = {};
    u32 a[2][4][4];  // powers as operands, of each 16 rows and step
    u32 q_at = swizzled(q_tile, 4 * g, c);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float mean[8];
      Base base(inverse_here + 32 * half);
      floats8(mean_here + 32 * half, mean);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x[8];
        base.read(q_at ^ (i * 16 + half * CHUNK), i, x);
#pragma unroll
        for (int e = 0; e < 8; e++) {
          float square = x[e] * x[e];
          float top = POWER == 3 ? square * x[e] : square;
          squares[i] += square;
          tops[i] += top * top;
          below[i][PAIRS == 2 ? half : 0] += top * mean[e];
          x[e] = top;
        }
        if (!IN_FP16) pack_row(x, half, i, a);
      }
    }
    float2 norm = make_float2(over_quad(squares, c), over_quad(tops, c));  // of row ``lane``
    float2* to = norms + (count & 1) * WARPS * ROWS + part * GROUPS * ROWS + lane;
    if (GROUPS > 1) {
      to[group * ROWS] = norm;
      __syncwarp();
      if (lane == 0) barrier_arrive(summed + 8 * part);
    }
    float result[4][8], product[8][4];
    u32 v_at = swizzled(v_tile, 4 * g, c ^ (group * V_ROWS & 4));
    convolve(v_at, conv_here, bias_here, result);  // while the other warps add up theirs
#if !IN_FP16  // in bfloat16 the factor of a row may come behind its products
    attend(product, a, matrix, 0);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        below[i][pair] += __shfl_xor_sync(0xffffffffu, below[i][pair], 1);
        if (HEAD_DIM > 16) below[i][pair] += __shfl_xor_sync(0xffffffffu, below[i][pair], 2);
      }
    if (GROUPS > 1) {
      barrier_wait(summed + 8 * part, count & 1);
      norm = to[0];
#pragma unroll
      for (int other = 1; other < GROUPS; other++) norm.x += to[other * ROWS].x, norm.y += to[other * ROWS].y;
    }
    float ratio = norm_factor(norm);
    float by[4], share[4][PAIRS];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      by[i] = __shfl_sync(0xffffffffu, ratio, 4 * g + i);
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        share[i][pair] = keys > 0 ? reciprocal(below[i][pair] * by[i] + p.eps) : 0.0f;
        if (!IN_FP16) share[i][pair] *= by[i];
      }
    }
#if IN_FP16  // which does not hold the powers themselves
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Base base(inverse_here + 32 * half);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x[8];
        base.read(q_at ^ (i * 16 + half * CHUNK), i, x);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = power(x[e]) * by[i];
        pack_row(x, half, i, a);
      }
    }
#endif
    u16* out = p.out + ((long long)tile.batch * p.queries + tile.before + first + 4 * g) * CHANNELS + group * 64 + 8 * c;
    int left = tile.rows - first - 4 * g;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half == 1) convolve(v_at ^ CHUNK, conv_here + 32, bias_here + 32, result);
      if (half == 1 || IN_FP16) attend(product, a, matrix, half);
      if (half == 1) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * stage);  // q and v have been read
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float by_head = share[i][PAIRS == 2 ? half : 0];
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float(&here)[4] = product[i / 2 * 4 + j];
          w[j] = pack16(here[i % 2 * 2] * by_head + result[i][2 * j], here[i % 2 * 2 + 1] * by_head + result[i][2 * j + 1]);
        }
        if (i < left) store16(out + i * CHANNELS + 32 * half, w);
      }
    }
    if (++stage == STAGES) stage = 0, turn++;
  }
}
