// Attention with INT8 Q K^T and FP8 or INT8 P V, forward, for Hopper (compute capability 9.0).
//
// One producer warp brings K and V by bulk tensor copies; each of GROUPS warpgroups owns 64 query rows and waits for its own products while
// the others' run (see README.md). Q is quantised here, one scale a row. Numerics: lowbit/README.md. A block of the persistent grid takes work
// items (query tile, head, batch) until none are left.
//
// Defined by the host: HEAD_DIM (64 or 128), CAUSAL, PV_INT8, IN_FP16, SAVE_Q, and what launches.py chooses:
//   SKIP        a warpgroup passes over tiles that all of its rows are hidden from, and over all of them if it has no rows

#include "common.cuh"
#include "early.cuh"
#include "mma.cuh"

#define S_HOLDS_PV (PV_INT8 && HEAD_DIM == 128)  // P V into the registers of S, which is packed by then: without it they spill
#define ONES (!PV_INT8)  // row sums of P by the matrix unit: V carries a column of ones
#define GROUPS 3  // warpgroups that compute
#define Q_ROWS (64 * GROUPS)
#define THREADS (128 * (GROUPS + 1))
#define KEYS 128
#define STAGES 4
#define LN2 0.69314718055994531f
#define K_BYTES (KEYS * HEAD_DIM)
#define V_BYTES (HEAD_DIM * KEYS)
#define Q_BYTES (64 * HEAD_DIM)
#define OREGS (HEAD_DIM / 2)
#define PREGS (OREGS + 4 * (ONES))
#define V_STAGE (V_BYTES + 1024 * (ONES))
#if PV_INT8  // P in 0 to 255; the row sum is that of its bytes, four an instruction
typedef int acc_t;
#define P_SHIFT 7.99435343685886f   /* log2 255 */
#define P_OFFSET (P_SHIFT - 24.0f)  /* float16 has no step below 2^-24: its conversion rounds P 2^-24 to an integer, in its lowest bits */
#else
typedef float acc_t;
#define P_SHIFT 8.80735492205760f  /* log2 448 */
#define P_OFFSET P_SHIFT
#endif

struct Params {
  const void* q;        // (B, L_q, H, D), 16 bit, last stride 1
  void* out;            // (B, L_q, H, D) contiguous
  float* lse;           // (B, H, L_q), natural, of the given K; may be null
  const float2* scales; // (B, G, blocks): of K, of V
  const float* k_mean;  // (B, G, D), or null where K was not smoothed
  signed char* q8;      // (B, H, L_q, D), SAVE_Q
  float* q_scale;       // (B, H, L_q), SAVE_Q
  float* lse2;          // (B, H, L_q), SAVE_Q: base 2, without the part of the mean of K
  int* counter;         // two, zero at launch and at the end: items taken beyond the first of each block, blocks that have ended
  long long q_batch, q_row, q_head;  // strides in elements
  int batches, heads, groups, rows, keys, blocks, row_tiles, head_chunk;
  float scale;          // softmax scale * log2 e
};

struct Item {
  int b, h, g, tile, rows, keys, tiles, z;
};

DEVICE bool take(const Params& p, int index, Item& it) {
  // Heads in chunks that share the cache; within a chunk long tiles first when causal.
  int per_head = p.row_tiles, heads_all = p.heads * p.batches;
  int chunk = index / (per_head * p.head_chunk), inside = index % (per_head * p.head_chunk);
  int first = chunk * p.head_chunk, count = min(p.head_chunk, heads_all - first);
  if (count <= 0) return false;
#if CAUSAL
  if (inside >= per_head * count) return false;
  it.tile = per_head - 1 - inside / count;
  int z = first + inside % count;
#else
  if (inside >= per_head * count) return false;
  it.tile = inside % per_head;
  int z = first + inside / per_head;
#endif
  it.b = z / p.heads;
  it.h = z % p.heads;
  it.g = it.h / (p.heads / p.groups);
  it.rows = p.rows;
  it.keys = p.keys;
  it.z = it.b * p.groups + it.g;
  int last_key = it.keys;
#if CAUSAL
  last_key = min(it.keys, it.tile * Q_ROWS + Q_ROWS + it.keys - it.rows);
#endif
  it.tiles = last_key <= 0 ? 0 : (last_key + KEYS - 1) / KEYS;
  return true;
}

#include "forward_softmax.cuh"

DEVICE void issue_s(int (&s)[64], u64 a, u64 b) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 32; k++) mma_s8(s, a + 2 * k, b + 2 * k, k > 0);
}

DEVICE void issue_pv(acc_t (&o)[PREGS], const u32 (&pa)[16], u64 b) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
#if PV_INT8
    mma_u8_reg(o, pa[4 * k], pa[4 * k + 1], pa[4 * k + 2], pa[4 * k + 3], b + 2 * k, k > 0);
#else
    mma_e4m3_reg(o, pa[4 * k], pa[4 * k + 1], pa[4 * k + 2], pa[4 * k + 3], b + 2 * k, k > 0);
#endif
  }
}

DEVICE void accumulate(float (&o)[OREGS], const acc_t (&t)[PREGS], Row2 keep) {
#pragma unroll
  for (int i = 0; i < OREGS; i++) o[i] = fmaf(o[i], (i & 2) ? keep.b : keep.a, (float)t[i]);
}

#include "forward_queries.cuh"

DEVICE void finish(const Params& p, const Item& it, const float (&o)[OREGS], Row2 at, Row2 l, float unit, int row_a, int column0, const float* bias) {
#if ONES
  l.a = __shfl_sync(0xffffffffu, l.a, threadIdx.x & 28);
  l.b = __shfl_sync(0xffffffffu, l.b, threadIdx.x & 28);
#else
  l.a = quad_sum(l.a);
  l.b = quad_sum(l.b);
#endif
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = row_a + 8 * half;
    float total = half ? l.b : l.a, top = half ? at.b : at.a;
    if (row >= it.rows) continue;
    float factor = total == 0.0f ? 0.0f : unit / total;
    long long out_at = ((long long)it.b * p.rows + row) * p.heads + it.h;
    long long lse_at = (long long)(it.b * p.heads + it.h) * p.rows + row;
    u32* to = (u32*)((u16*)p.out + out_at * HEAD_DIM + column0);
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) to[4 * j] = pack16(o[4 * j + 2 * half] * factor, o[4 * j + 2 * half + 1] * factor);
    if (column0 == 0) {
      float lse2 = total == 0.0f ? -INFINITY_F : top + (log2f(total) - P_SHIFT);
      if (p.lse) p.lse[lse_at] = lse2 * LN2 + bias[8 * half];
#if SAVE_Q
      p.lse2[lse_at] = lse2;
#endif
    }
  }
}

#if ONES  // column 0 of the extra ones: the first thread of each quad holds it
#define SUM_UP(keep)                           \
  l.a = fmaf(l.a, keep.a, (float)part[OREGS]); \
  l.b = fmaf(l.b, keep.b, (float)part[OREGS + 2]);
#else
#define SUM_UP(keep)
#endif

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

DEVICE float nonzero(float x) { return x == 0.0f ? 1e-30f : x; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_forward(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ Params p) {
  extern __shared__ u8 raw_shared[];
  u8* base = aligned_shared(raw_shared);
  u8* q_shared = base;
  u32 k_shared = shared_address(base + GROUPS * Q_BYTES);
  u32 v_shared = k_shared + STAGES * K_BYTES;
  __shared__ alignas(8) u64 bars[4 * STAGES + 4];
  __shared__ int next_item[2];
  __shared__ float row_scales[Q_ROWS], row_biases[Q_ROWS];
  u32 k_full = shared_address(bars), k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
  u32 item_full = v_empty + 8 * STAGES, item_empty = item_full + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(k_empty + 8 * i, GROUPS);
      barrier_init(v_empty + 8 * i, GROUPS);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(item_full + 8 * i, 1);
      barrier_init(item_empty + 8 * i, 128 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if ONES
  for (int i = threadIdx.x; i < STAGES * 256; i += THREADS)
    ((u32*)(base + GROUPS * Q_BYTES + STAGES * K_BYTES + (i / 256) * V_STAGE + V_BYTES))[i % 256] = i % 256 < 32 ? 0x38383838u : 0u;
  fence_async_shared();
#endif
  __syncthreads();
  after_the_kernel_before();
  int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1, t = threadIdx.x % 128;
  int count = p.row_tiles * p.head_chunk * ((p.heads * p.batches + p.head_chunk - 1) / p.head_chunk);

  if (group < 0) {  // ---- producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x != 0) return;
    int stage = 0, phase = 0;
    for (int n = 0;; n++) {
      int index = n == 0 ? (int)blockIdx.x : atomicAdd(p.counter, 1) + (int)gridDim.x;
      barrier_wait(item_empty + 8 * (n & 1), ((n >> 1) & 1) ^ 1);
      next_item[n & 1] = index;
      barrier_arrive(item_full + 8 * (n & 1));
      if (index >= count) {
        if (atomicAdd(p.counter + 1, 1) == (int)gridDim.x - 1) p.counter[0] = p.counter[1] = 0;  // for the next launch
        return;
      }
      Item it;
      if (!take(p, index, it) || it.tile * Q_ROWS >= it.rows) continue;
      for (int j = it.tiles - 1; j >= 0; j--) {
        barrier_wait(k_empty + 8 * stage, phase ^ 1);
        barrier_expect(k_full + 8 * stage, K_BYTES);
        copy_3d(k_shared + stage * K_BYTES, &k_map, k_full + 8 * stage, 0, j * KEYS, it.z);
        barrier_wait(v_empty + 8 * stage, phase ^ 1);
        barrier_expect(v_full + 8 * stage, V_BYTES);
        copy_3d(v_shared + stage * V_STAGE, &v_map, v_full + 8 * stage, j * KEYS, 0, it.z);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  }

  // ---- consumers
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  int warp = t / 32, lane = t % 32, r_a = warp * 16 + lane / 4, column0 = 2 * (lane % 4);
  u8* q_bytes = q_shared + group * Q_BYTES;
  float *scale_at = row_scales + 64 * group, *bias_at = row_biases + 64 * group;
  u64 q_operand = operand<HEAD_DIM>(shared_address(q_bytes)), k_operand = operand<HEAD_DIM>(k_shared), v_operand = operand<128>(v_shared);
  bool leader = t == 0;
  int stage = 0, phase = 0;
  int s[64];
  u32 pa[16];
  float o[OREGS];
#if S_HOLDS_PV
  int (&part)[64] = s;
#else
  acc_t part[PREGS];
#endif

  for (int n = 0;; n++) {
    barrier_wait(item_full + 8 * (n & 1), (n >> 1) & 1);
    int index = next_item[n & 1];
    barrier_arrive(item_empty + 8 * (n & 1));
    if (index >= count) return;
    Item it;
    if (!take(p, index, it) || it.tile * Q_ROWS >= it.rows) continue;
    quantise_q(p, it, group, t, q_bytes, scale_at, bias_at);
    fence_async_shared();
    group_sync(1 + group);
    u64 q_at = q_operand;
    int r_at = r_a;
    int row_a = it.tile * Q_ROWS + group * 64 + r_a;
    Row2 sq = {scale_at[r_at] * p.scale, scale_at[r_at + 8] * p.scale};
    Row2 m = {-INFINITY_F, -INFINITY_F}, at = m, l = {0.0f, 0.0f}, keep;
    const float2* scales = p.scales + (long long)it.z * p.blocks;
    float unit = 1.0f;  // the scale of V in which o is kept
#pragma unroll
    for (int i = 0; i < OREGS; i++) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < PREGS; i++) part[i] = 0;

    int own = it.tiles;  // tiles that this warpgroup's rows see
#if SKIP
    int last_key = it.keys, first_row = it.tile * Q_ROWS + group * 64;
#if CAUSAL
    last_key = min(last_key, first_row + 64 + it.keys - it.rows);
#endif
    own = first_row >= it.rows || last_key <= 0 ? 0 : min(own, (last_key + KEYS - 1) / KEYS);
    for (int passed = own; passed < it.tiles; passed++) {
      barrier_wait(k_full + 8 * stage, phase);
      barrier_wait(v_full + 8 * stage, phase);
      group_sync(1 + group);
      if (leader) {
        barrier_arrive(k_empty + 8 * stage);
        barrier_arrive(v_empty + 8 * stage);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
#endif
    if (own > 0) {
      int j = own - 1;
      float2 now = __ldg(scales + j);
      barrier_wait(k_full + 8 * stage, phase);
      mma_fence();
      issue_s(s, q_at, k_operand + stage * (K_BYTES >> 4));
      mma_commit();
      mma_wait<0>();
      if (leader) barrier_arrive(k_empty + 8 * stage);

      auto step = [&](auto masked_, auto last_) __attribute__((always_inline)) {
        constexpr bool masked = decltype(masked_)::value, last = decltype(last_)::value;
        float2 next = now;
        if (!last) next = __ldg(scales + j - 1);
        Row2 c = {nonzero(sq.a * now.x), nonzero(sq.b * now.x)};
        int limit = it.keys - j * KEYS, limit_a = limit, limit_b = limit;
#if CAUSAL
        limit_a = min(limit, row_a + 1 + it.keys - it.rows - j * KEYS);
        limit_b = min(limit, row_a + 9 + it.keys - it.rows - j * KEYS);
#endif
        softmax<masked>(s, c, m, at, l, keep, limit_a, limit_b, column0);
        int next_stage = stage + 1 == STAGES ? 0 : stage + 1, next_phase = stage + 1 == STAGES ? phase ^ 1 : phase;
        float v_scale = now.y == 0.0f ? unit : now.y, ratio = unit * reciprocal(v_scale);
        Row2 keep_o = {keep.a * ratio, keep.b * ratio};
        unit = v_scale;
        pack_p(s, pa);
        barrier_wait(v_full + 8 * stage, phase);
        mma_fence();
        issue_pv(part, pa, v_operand + stage * (V_STAGE >> 4));
        mma_commit();
#if PV_INT8
        sum_up(pa, c, l, keep);
#endif
        mma_wait<0>();
        if (leader) barrier_arrive(v_empty + 8 * stage);
        accumulate(o, part, keep_o);
        SUM_UP(keep)
        if (!last) {
          barrier_wait(k_full + 8 * next_stage, next_phase);
          mma_fence();
          issue_s(s, q_at, k_operand + next_stage * (K_BYTES >> 4));
          mma_commit();
          mma_wait<0>();
          if (leader) barrier_arrive(k_empty + 8 * next_stage);
        }
        now = next;
        stage = next_stage;
        phase = next_phase;
        j--;
      };

      int clear = it.keys;  // tiles that end at or before this key need no mask
#if CAUSAL
      clear = min(clear, it.tile * Q_ROWS + group * 64 + 1 + it.keys - it.rows);
#endif
      while (j > 0 && (j + 1) * KEYS > clear) step(Yes(), No());
      while (j > 0) step(No(), No());
      if (KEYS > clear)
        step(Yes(), Yes());
      else
        step(No(), Yes());
    }
    finish(p, it, o, at, l, unit, row_a, column0, bias_at + r_at);
    group_sync(1 + group);  // the next item's Q goes where this one's was
  }
}
