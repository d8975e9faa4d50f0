// Attention with INT8 Q K^T and FP8 or INT8 P V, forward, for Hopper (compute capability 9.0).
//
// One producer warp brings K and V by bulk tensor copies; each of GROUPS warpgroups owns 64 query rows and waits for its own products while
// the others' run (see README.md). Q is quantised here, one scale a row. Numerics: lowbit/README.md. A block of the persistent grid takes work
// items (query tile, head, batch) until none are left.
//
// Defined by the host: HEAD_DIM (64 or 128), CAUSAL, PV_INT8, IN_FP16, SAVE_Q.

#include "common.cuh"
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
#if PV_INT8
typedef int acc_t;
#define P_SHIFT 6.98868468677217f  /* log2 127 */
#else
typedef float acc_t;
#define P_SHIFT 8.80735492205760f  /* log2 448 */
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
  int* counter;         // zero at launch
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

#if !ONES
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
#endif

// S (integers) of one tile to P in 8 bits. ``m``: running maxima. FP8: P is relative to them, and ``keep`` the factor of what came before. INT8: P
// is relative to the tile's own maximum ``at`` (not below m - 20, so that o, which is kept in units of the last tile's P, stays finite).
template <bool MASKED>
DEVICE void softmax(int (&s)[64], Row2 c, Row2& m, Row2& at, Row2& l, Row2& keep, int limit_a, int limit_b, int column0) {
  const int hidden = -(1 << 30);  // |S| is at most 127^2 D
  int top_a = hidden, top_b = hidden;
#pragma unroll
  for (int j = 0; j < 16; j++) {
    if (MASKED) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j + column0 + (e & 1) >= (e < 2 ? limit_a : limit_b)) s[4 * j + e] = hidden;
    }
    top_a = max(max(top_a, s[4 * j]), s[4 * j + 1]);
    top_b = max(max(top_b, s[4 * j + 2]), s[4 * j + 3]);
  }
  top_a = quad_max(top_a);
  top_b = quad_max(top_b);
  Row2 top = {(float)top_a * c.a, (float)top_b * c.b};
  if (MASKED && top_a == hidden) top.a = -INFINITY_F;
  if (MASKED && top_b == hidden) top.b = -INFINITY_F;
  m.a = fmaxf(m.a, top.a);
  m.b = fmaxf(m.b, top.b);
#if PV_INT8
  float na = fmaxf(top.a, m.a - 20.0f), nb = fmaxf(top.b, m.b - 20.0f);
#else
  float na = m.a, nb = m.b;
#endif
  float ua = MASKED && na == -INFINITY_F ? 0.0f : na, ub = MASKED && nb == -INFINITY_F ? 0.0f : nb;  // no key seen yet
  keep.a = exp2_fast(at.a - ua);
  keep.b = exp2_fast(at.b - ub);
  at.a = na;
  at.b = nb;
  float oa = ua - P_SHIFT, ob = ub - P_SHIFT;
#if !ONES
  Row2 sum = {0.0f, 0.0f};
#endif
#pragma unroll
  for (int j = 0; j < 16; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float x = (float)s[4 * j + e];
      if (MASKED && s[4 * j + e] == hidden) x = -INFINITY_F;
      x = e < 2 ? fmaf(x, c.a, -oa) : fmaf(x, c.b, -ob);
      s[4 * j + e] = __float_as_int(exp2_fast(x));
    }
#if !ONES
    sum.a += __int_as_float(s[4 * j]) + __int_as_float(s[4 * j + 1]);
    sum.b += __int_as_float(s[4 * j + 2]) + __int_as_float(s[4 * j + 3]);
#endif
  }
#if !ONES
  l.a = fmaf(l.a, keep.a, sum.a);
  l.b = fmaf(l.b, keep.b, sum.b);
#endif
}

DEVICE void pack_p(const int (&s)[64], u32 (&pa)[16]) {
#define F(i) __int_as_float(s[i])
#pragma unroll
  for (int kb = 0; kb < 4; kb++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        int at = 16 * kb + 8 * half + 2 * row;
#if PV_INT8
        pa[4 * kb + 2 * half + row] = pack_bytes(F(at) + MAGIC, F(at + 1) + MAGIC, F(at + 4) + MAGIC, F(at + 5) + MAGIC);
#else
        pa[4 * kb + 2 * half + row] = pack_e4m3(F(at), F(at + 1), F(at + 4), F(at + 5));
#endif
      }
    }
  }
#undef F
}

DEVICE void issue_s(int (&s)[64], u64 a, u64 b) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 32; k++) mma_s8(s, a + 2 * k, b + 2 * k, k > 0);
}

DEVICE void issue_pv(acc_t (&o)[PREGS], const u32 (&pa)[16], u64 b) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
#if PV_INT8
    mma_s8_reg(o, pa[4 * k], pa[4 * k + 1], pa[4 * k + 2], pa[4 * k + 3], b + 2 * k, k > 0);
#else
    mma_e4m3_reg(o, pa[4 * k], pa[4 * k + 1], pa[4 * k + 2], pa[4 * k + 3], b + 2 * k, k > 0);
#endif
  }
}

DEVICE void accumulate(float (&o)[OREGS], const acc_t (&t)[PREGS], Row2 keep) {
#pragma unroll
  for (int i = 0; i < OREGS; i++) o[i] = fmaf(o[i], (i & 2) ? keep.b : keep.a, (float)t[i]);
}

// 64 rows of Q to INT8 in shared memory, one scale a row. Two threads share a row.
DEVICE void quantise_q(const Params& p, const Item& it, int group, int t, u8* q_bytes, float* row_scale, float* row_bias) {
  int r = t >> 1, half = t & 1, row = it.tile * Q_ROWS + group * 64 + r;
  bool inside = row < it.rows;
  const u32* src = (const u32*)p.q;
  long long offset = (long long)it.b * p.q_batch + (long long)row * p.q_row + (long long)it.h * p.q_head + half * (HEAD_DIM / 2);
  uint4 raw[HEAD_DIM / 16];
  float top = 0.0f, bias = 0.0f;
  bool bad = false;
  const float* mean = p.k_mean && p.lse ? p.k_mean + ((long long)it.b * p.groups + it.g) * HEAD_DIM + half * (HEAD_DIM / 2) : nullptr;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; i++) {
    raw[i] = inside ? __ldg((const uint4*)((const u16*)src + offset) + i) : make_uint4(0, 0, 0, 0);
    u32 w[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float lo, hi;
      unpack16(w[k], lo, hi);
      top = fmaxf(top, fmaxf(fabsf(lo), fabsf(hi)));
      bad |= (lo != lo) | (hi != hi);
      if (mean) bias += lo * __ldg(mean + 8 * i + 2 * k) + hi * __ldg(mean + 8 * i + 2 * k + 1);
    }
  }
  top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
  bias += __shfl_xor_sync(0xffffffffu, bias, 1);
  bad |= __shfl_xor_sync(0xffffffffu, (int)bad, 1);
  float scale = bad ? __int_as_float(0x7fc00000) : top / 127.0f;
  float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 32; i++) {  // 16 bytes = 16 elements
    u32 bytes[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint4 v = raw[2 * i + k / 2];
      u32 w0 = k & 1 ? v.z : v.x, w1 = k & 1 ? v.w : v.y;
      float a, b, c, d;
      unpack16(w0, a, b);
      unpack16(w1, c, d);
      bytes[k] = pack_bytes(fmaf(a, inverse, MAGIC), fmaf(b, inverse, MAGIC), fmaf(c, inverse, MAGIC), fmaf(d, inverse, MAGIC));
    }
    u32 chunk = half * (HEAD_DIM / 32) + i;
    uint4 packed = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    *(uint4*)(q_bytes + chunk_offset<HEAD_DIM>(r, chunk)) = packed;
#if SAVE_Q
    if (inside) {
      long long at = ((long long)(it.b * p.heads + it.h) * p.rows + row) * HEAD_DIM + chunk * 16;
      *(uint4*)(p.q8 + at) = packed;
    }
#endif
  }
  if (half == 0) {
    row_scale[r] = scale;
    row_bias[r] = bias * p.scale * LN2;
#if SAVE_Q
    if (inside) {
      p.q_scale[(long long)(it.b * p.heads + it.h) * p.rows + row] = scale;
    }
#endif
  }
}

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
      if (index >= count) return;
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
    quantise_q(p, it, group, t, q_bytes, row_scales + 64 * group, row_biases + 64 * group);
    fence_async_shared();
    group_sync(1 + group);
    int row_a = it.tile * Q_ROWS + group * 64 + r_a;
    Row2 sq = {row_scales[64 * group + r_a] * p.scale, row_scales[64 * group + r_a + 8] * p.scale};
    Row2 m = {-INFINITY_F, -INFINITY_F}, at = m, l = {0.0f, 0.0f}, keep;
    const float2* scales = p.scales + (long long)it.z * p.blocks;
    float unit = 1.0f;  // the scale of V in which o is kept
#pragma unroll
    for (int i = 0; i < OREGS; i++) o[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < PREGS; i++) part[i] = 0;

    if (it.tiles > 0) {
      int j = it.tiles - 1;
      float2 now = __ldg(scales + j);
      barrier_wait(k_full + 8 * stage, phase);
      mma_fence();
      issue_s(s, q_operand, k_operand + stage * (K_BYTES >> 4));
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
        mma_wait<0>();
        if (leader) barrier_arrive(v_empty + 8 * stage);
        accumulate(o, part, keep_o);
        SUM_UP(keep)
        if (!last) {
          barrier_wait(k_full + 8 * next_stage, next_phase);
          mma_fence();
          issue_s(s, q_operand, k_operand + next_stage * (K_BYTES >> 4));
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
    finish(p, it, o, at, l, unit, row_a, column0, row_biases + 64 * group + r_a);
    group_sync(1 + group);  // the next item's Q goes where this one's was
  }
}
