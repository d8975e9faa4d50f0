// Sparse-linear attention (SLA2), forward, for Hopper: INT8 Q K^T and FP8 P V over the key blocks that a query block selects, and the linear branch
// over exactly the others, in one loop. Head size 128, 128 queries and 64 keys a block, feature map softmax.
//
// Linear branch: with h_j = phi(K_j)^T [V_j 1] the sum over the unselected blocks is that over all blocks (kernel linear_totals) minus that over
// the selected ones, which the loop accumulates beside the softmax from the same bytes, so that nothing is left of a selected block. Each warpgroup
// owns 64 query rows of S, P and O, and 64 of the 128 channels (rows) of h. The products of h run while a warpgroup takes its
// exponentials; those of the next S follow at once.
//
// Defined by the host: HEAD_DIM (128), IN_FP16.

#include "common.cuh"
#include "early.cuh"
#include "mma.cuh"
#include "mma_wide.cuh"

#define GROUPS 2
#define Q_ROWS 128
#define THREADS (128 * (GROUPS + 1))
#define KEYS 64
#define K_STAGES 3
#define V_STAGES 4
#define TOTALS_STAGES 8  // of linear_totals
#define PREPARERS 3  // warps beside the one that copies
#define K_BYTES (KEYS * 128)
#define PHI_BYTES (128 * KEYS)
#define V_STAGE (PHI_BYTES + 136 * KEYS)  // phi(K), then 64 keys of V: 128 channels and 8 rows more, of which the first is ones
#define RECORD (K_BYTES + 2 * PHI_BYTES)
#define Q_PANEL (128 * 128)   // 64 channels of a query block, 16 bit
#define Q_TILE (2 * Q_PANEL)  // two of them, for this item and the next
#define H_PANEL (136 * 128)   // 64 rows of h, transposed, bfloat16
#define SHORT_SUM 16          // blocks whose P V the matrix unit adds: its sums keep some 14 bits
#define TOTAL_PARTS 4         // of the totals of a head, as large as phi(K) and V of a block
#define REGS 68
#define P_SHIFT 8.80735492205760f  // log2 448
#define LOG2E 1.44269504088896f
#define LN2 0.69314718055994531f
#define ALL 0xffffffffu

// A launch takes ``heads`` query heads from ``first_head`` of ``all_heads`` on, with their ``groups`` key heads, of which records, k_scale, partial and totals
// know no others.
struct Params {
  float* lse;            // (B, H, L_q), natural, of the given K; may be null
  const int* rows;       // (B, H, N_q, width): selected key blocks, ascending
  const int* counts;     // (B, H, N_q)
  const float* ratio;    // (B, H, N_q), by strides
  const u8* records;     // (B, G, N_k, 3, 64 * D), see prepare.cu
  const float* k_scale;  // (B, G, N_k)
  const float* k_mean;   // (B, all G, D)
  const float* v_max;    // (B, all G, D)
  float* partial;        // (splits, B * G, D, D), rows share_row apart: shares of the sums over all blocks
  float* share_ones;     // (splits, B * G, D): their column of ones
  float* totals;         // (B * G, 2, 16, 128, 4): sums over all blocks, in the order in which threads hold them, and
  float* total_ones;     // (B * G, D): their column of ones
  int* counter;          // of items; zero at launch
  int batches, heads, groups, queries, keys, q_blocks, k_blocks, width, splits, first_head, all_heads;
  int ratio_batch, ratio_head, ratio_block, share_row;  // strides
  float scale;           // softmax scale * log2 e
};

struct Meta {  // of a key block: the scale of K, and how many keys there are from its first on
  float scale;
  int limit;
};

struct Item {
  int tile, b, h, kv, at;  // query block; batch; head of all; key head of this launch's; place in rows / width, counts and ratio
};

DEVICE Item item(const Params& p, int index) {
  Item it;
  int z = index / p.q_blocks, h = z % p.heads;
  it.tile = index % p.q_blocks;
  it.b = z / p.heads;
  it.kv = it.b * p.groups + h / (p.heads / p.groups);
  it.h = h + p.first_head;
  it.at = (it.b * p.all_heads + it.h) * p.q_blocks + it.tile;
  return it;
}

DEVICE long long key_head(const Params& p, const Item& it) {  // of all, in k_mean and v_max
  return (long long)(it.b * p.all_heads + it.h) / (p.heads / p.groups);
}

// Keeps what the compiler does with registers on its side of this point: products in flight own theirs.
template <int N>
DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
DEVICE void pin(int (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N>
DEVICE void pin(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

DEVICE void store_4d(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
DEVICE void pair_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// S (integers) of a block to P * 448.
DEVICE void softmax(int (&s)[32], Row2 sq, Meta meta, Row2& m, Row2& keep, int column0) {
  Row2 c = {sq.a * meta.scale, sq.b * meta.scale};
  bool ragged = meta.limit < KEYS;
  if (ragged) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j + column0 + (e & 1) >= meta.limit) s[4 * j + e] = -(1 << 30);  // |S| is at most 127^2 D
    }
  }
  int top_a = s[0], top_b = s[2];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    top_a = max(max(top_a, s[4 * j]), s[4 * j + 1]);
    top_b = max(max(top_b, s[4 * j + 2]), s[4 * j + 3]);
  }
  Row2 top = {fmaxf(m.a, (float)quad_max(top_a) * c.a), fmaxf(m.b, (float)quad_max(top_b) * c.b)};
  keep.a = exp2_fast(m.a - top.a);
  keep.b = exp2_fast(m.b - top.b);
  m = top;
  float oa = top.a - P_SHIFT, ob = top.b - P_SHIFT;
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) s[4 * j + e] = __float_as_int(exp2_fast(fmaf((float)s[4 * j + e], e < 2 ? c.a : c.b, e < 2 ? -oa : -ob)));
  }
  if (ragged) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j + column0 + (e & 1) >= meta.limit) s[4 * j + e] = 0;
    }
  }
}

DEVICE void pack_p(const int (&s)[32], u32 (&pa)[8]) {
#define F(i) __int_as_float(s[i])
#pragma unroll
  for (int kb = 0; kb < 2; kb++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        int at = 16 * kb + 8 * half + 2 * row;
        pa[4 * kb + 2 * half + row] = pack_e4m3(F(at), F(at + 1), F(at + 4), F(at + 5));
      }
    }
  }
#undef F
}

DEVICE void issue_s(int (&s)[32], u64 a, u64 b) {
#pragma unroll
  for (int k = 0; k < 4; k++) mma_s8(s, a + 2 * k, b + 2 * k, k > 0);
}

DEVICE void issue_pv(float (&o)[REGS], const u32 (&pa)[8], u64 v) {
  mma_e4m3_reg(o, pa[0], pa[1], pa[2], pa[3], v, 1);
  mma_e4m3_reg(o, pa[4], pa[5], pa[6], pa[7], v + 2, 1);
}

DEVICE void issue_h(float (&h)[REGS], u64 phi, u64 v) {
  mma_e4m3(h, phi, v, 1);
  mma_e4m3(h, phi + 2, v + 2, 1);
}

// Rows of Q by a warp, 16 lanes each, two at once (``row`` and ``row + step``, if there): to INT8 with a scale, and in place to phi(Q) = softmax
// over the channels, bfloat16, less the division by the sum: the linear branch has phi(Q) above and below.
DEVICE void prepare_q(u8* q, u8* q_bytes, int row, int step, int lane, float* scales, float* biases, const float* mean) {
  int c = lane % 16;
  u32 w[2][4];
  float x[2][8], size[2], top[2], bias[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    uint4 raw = row + r * step < Q_ROWS ? *(const uint4*)(q + c / 8 * Q_PANEL + chunk_offset<128>(row + r * step, c % 8)) : make_uint4(0, 0, 0, 0);
    w[r][0] = raw.x, w[r][1] = raw.y, w[r][2] = raw.z, w[r][3] = raw.w;
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    size[r] = 0.0f, top[r] = -INFINITY_F;
#pragma unroll
    for (int i = 0; i < 4; i++) unpack16(w[r][i], x[r][2 * i], x[r][2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      size[r] = max_nan(size[r], fabsf(x[r][i]));
      top[r] = fmaxf(top[r], x[r][i]);
    }
    if (mean) {
#pragma unroll 1
      for (int i = 0; i < 4; i++) {  // again from shared memory: registers are few here
        float lo, hi;
        unpack16(((const u32*)(q + c / 8 * Q_PANEL + chunk_offset<128>(min(row + r * step, Q_ROWS - 1), c % 8)))[i], lo, hi);
        bias[r] += lo * __ldg(mean + 8 * c + 2 * i) + hi * __ldg(mean + 8 * c + 2 * i + 1);
      }
    }
  }
#pragma unroll
  for (int d = 8; d; d >>= 1) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      size[r] = max_nan(size[r], __shfl_xor_sync(ALL, size[r], d));
      top[r] = fmaxf(top[r], __shfl_xor_sync(ALL, top[r], d));
      if (mean) bias[r] += __shfl_xor_sync(ALL, bias[r], d);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float inverse = size[r] == 0.0f ? 0.0f : 127.0f / size[r], y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = fmaf(x[r][i], inverse, MAGIC);
    if (row + r * step < Q_ROWS)
      *(uint2*)(q_bytes + chunk_offset<128>(row + r * step, c / 2) + c % 2 * 8) =
          make_uint2(pack_bytes(y[0], y[1], y[2], y[3]), pack_bytes(y[4], y[5], y[6], y[7]));
    top[r] *= LOG2E;
#pragma unroll
    for (int i = 0; i < 8; i++) x[r][i] = exp2_fast(fmaf(x[r][i], LOG2E, -top[r]));
#pragma unroll
    for (int i = 0; i < 4; i++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[r][i]) : "f"(x[r][2 * i + 1]), "f"(x[r][2 * i]));
    if (row + r * step < Q_ROWS) {
      *(uint4*)(q + c / 8 * Q_PANEL + chunk_offset<128>(row + r * step, c % 8)) = make_uint4(w[r][0], w[r][1], w[r][2], w[r][3]);
      if (c == 0) scales[row + r * step] = size[r] / 127.0f, biases[row + r * step] = bias[r];
    }
  }
}

// Long sums of P V, in bfloat16 where h goes later: ``sums`` relative to maxima ``at`` (of the thread's rows, 8 apart), o to ``m``. A thread's
// words lie 512 bytes apart.
DEVICE void add_sums(float (&o)[REGS], const u8* sums, Row2 m, const volatile float* at) {
  Row2 f = {exp2_fast(at[0] - m.a), exp2_fast(at[8] - m.b)};
#pragma unroll
  for (int i = 0; i < REGS / 2; i++) {
    u32 w = *(const u32*)(sums + 512 * i);
    o[2 * i] = fmaf(__uint_as_float(w << 16), i & 1 ? f.b : f.a, o[2 * i]);
    o[2 * i + 1] = fmaf(__uint_as_float(w & 0xffff0000u), i & 1 ? f.b : f.a, o[2 * i + 1]);
  }
}

DEVICE void move_sums(float (&o)[REGS], u8* sums, Row2 m, volatile float* at, bool first) {
  if (!first) add_sums(o, sums, m, at);
#pragma unroll
  for (int i = 0; i < REGS / 2; i++) {
    u32 w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(o[2 * i + 1]), "f"(o[2 * i]));
    *(u32*)(sums + 512 * i) = w;
  }
  __syncwarp();  // the four threads of a row have read it
  at[0] = m.a;
  at[8] = m.b;
  __syncwarp();
}

DEVICE void ones(u8* v_shared, int stages, int stage_bytes) {  // rows 128 to 135 of each stage: the first is ones
  for (int i = threadIdx.x; i < stages * 128; i += blockDim.x)
    ((u32*)(v_shared + i / 128 * stage_bytes + 2 * PHI_BYTES))[i % 128] = i % 128 < KEYS / 4 ? 0x38383838u : 0u;
  fence_async_shared();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap out_map, const __grid_constant__ Params p) {
  extern __shared__ u8 raw_shared[];
  u8* base = aligned_shared(raw_shared);
  u8 *q_tiles = base, *q_bytes = q_tiles + 2 * Q_TILE, *k_tiles = q_bytes + 2 * Q_ROWS * 128, *v_tiles = k_tiles + K_STAGES * K_BYTES;
  u8* h_shared = v_tiles + V_STAGES * V_STAGE;
  __shared__ alignas(8) u64 bars[2 * K_STAGES + 2 * V_STAGES + 10];
  __shared__ alignas(16) Meta metas[K_STAGES];
  __shared__ int2 next_item[2];  // index, selected blocks
  __shared__ float row_scales[2][Q_ROWS], row_biases[2][Q_ROWS], row_tops[Q_ROWS];
  u32 k_full = shared_address(bars), k_empty = k_full + 8 * K_STAGES, v_full = k_empty + 8 * K_STAGES, v_empty = v_full + 8 * V_STAGES;
  u32 item_full = v_empty + 8 * V_STAGES, item_empty = item_full + 16, q_full = item_empty + 16, q_ready = q_full + 16, q_empty = q_ready + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < K_STAGES; i++) barrier_init(k_full + 8 * i, 1), barrier_init(k_empty + 8 * i, GROUPS);
    for (int i = 0; i < V_STAGES; i++) barrier_init(v_full + 8 * i, 1), barrier_init(v_empty + 8 * i, GROUPS);
    for (int i = 0; i < 2; i++) {
      barrier_init(item_full + 8 * i, 1), barrier_init(item_empty + 8 * i, 128 * GROUPS + 32 * PREPARERS);
      barrier_init(q_ready + 8 * i, 32 * PREPARERS);
      barrier_init(q_full + 8 * i, 1), barrier_init(q_empty + 8 * i, GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  ones(v_tiles, V_STAGES, V_STAGE);
  __syncthreads();
  after_the_kernel_before();
  int group = __shfl_sync(ALL, threadIdx.x / 128, 0) - 1, t = threadIdx.x % 128;
  int count = p.batches * p.heads * p.q_blocks;

  if (group < 0) {  // ---- producer: one warp; lanes fetch the list, lane 0 copies
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x >= 32) {  // three warps prepare the next item's Q
      for (int n = 0;; n++) {
        int slot = n & 1, parity = (n >> 1) & 1;
        barrier_wait(item_full + 8 * slot, parity);
        int index = next_item[slot].x;
        barrier_arrive(item_empty + 8 * slot);
        if (index >= count) return;
        Item it = item(p, index);
        const float* mean = p.lse ? p.k_mean + key_head(p, it) * HEAD_DIM : nullptr;
        barrier_wait(q_full + 8 * slot, parity);
#pragma unroll 1
        for (int row = 2 * (threadIdx.x / 32 - 1) + threadIdx.x % 32 / 16; row < Q_ROWS; row += 4 * PREPARERS)
          prepare_q(q_tiles + slot * Q_TILE, q_bytes + slot * Q_ROWS * 128, row, 2 * PREPARERS, threadIdx.x % 32, row_scales[slot], row_biases[slot], mean);
        fence_async_shared();
        barrier_arrive(q_ready + 8 * slot);
      }
    }
    int lane = threadIdx.x, ks = 0, kp = 0, vs = 0, vp = 0;
    // Item n to the others, and its Q into its place; returns (index, selected blocks).
    auto publish = [&](int n, int index, int chosen) {
      int slot = n & 1, parity = (n >> 1) & 1;
      index = __shfl_sync(ALL, index, 0);
      chosen = __shfl_sync(ALL, chosen, 0);
      if (lane == 0) {
        Item it = item(p, min(index, count - 1));
        barrier_wait(item_empty + 8 * slot, parity ^ 1);
        next_item[slot] = make_int2(index, chosen);
        barrier_arrive(item_full + 8 * slot);
        if (index < count) {
          u32 to = shared_address(q_tiles) + slot * Q_TILE, full = q_full + 8 * slot;
          barrier_wait(q_empty + 8 * slot, parity ^ 1);
          barrier_expect(full, Q_TILE);
#pragma unroll 1
          for (int i = 0; i < 4; i++)  // panels of 64 channels, halves of 64 rows
            copy_4d(to + i * (Q_TILE / 4), &q_map, full, 64 * (i / 2), it.h, it.tile * Q_ROWS + 64 * (i % 2), it.b);
        }
      }
      __syncwarp();
      return make_int2(index, chosen);
    };
    auto selected = [&](int index) { return max(1, __ldg(p.counts + item(p, min(index, count - 1)).at)); };
    int2 next = publish(0, blockIdx.x, selected(blockIdx.x));
    for (int n = 0;; n++) {
      int index = next.x, chosen = next.y, ahead = 0, ahead_chosen = 0;
      if (index >= count) return;
      if (lane == 0) ahead = atomicAdd(p.counter, 1) + (int)gridDim.x;  // waited for only when it is used
      Item it = item(p, index);
      const int* list = p.rows + (long long)it.at * p.width;
      const u8* records = p.records + (long long)it.kv * p.k_blocks * RECORD;
      const float* scales = p.k_scale + (long long)it.kv * p.k_blocks;
      for (int i = 0; i < chosen; i += 32) {
        int block = i + lane < chosen ? min(max(0, __ldg(list + i + lane)), p.k_blocks - 1) : 0;
        float scale = __ldg(scales + block);
        for (int c = 0; c < min(32, chosen - i); c++) {
          int j = __shfl_sync(ALL, block, c);
          float k_scale = __shfl_sync(ALL, scale, c);
          if (lane == 0) {
            u32 v_to = shared_address(v_tiles) + vs * V_STAGE;
            barrier_wait(k_empty + 8 * ks, kp ^ 1);
            metas[ks] = {k_scale, p.keys - KEYS * j};
            barrier_expect(k_full + 8 * ks, K_BYTES);
            copy_bytes(shared_address(k_tiles) + ks * K_BYTES, records + (long long)j * RECORD, K_BYTES, k_full + 8 * ks);
            barrier_wait(v_empty + 8 * vs, vp ^ 1);
            barrier_expect(v_full + 8 * vs, 2 * PHI_BYTES);
            copy_bytes(v_to, records + (long long)j * RECORD + K_BYTES, 2 * PHI_BYTES, v_full + 8 * vs);
          }
          if (++ks == K_STAGES) ks = 0, kp ^= 1;
          if (++vs == V_STAGES) vs = 0, vp ^= 1;
          if (i + c == 0 && lane == 0) ahead_chosen = selected(ahead);
          if (i + c == min(1, chosen - 1)) next = publish(n + 1, ahead, ahead_chosen);  // early, so that its Q is prepared in time; not before this item can begin
        }
      }
      for (int i = 0; i < TOTAL_PARTS; i++) {
        if (lane == 0) {
          barrier_wait(v_empty + 8 * vs, vp ^ 1);
          barrier_expect(v_full + 8 * vs, 2 * PHI_BYTES);
          copy_bytes(shared_address(v_tiles) + vs * V_STAGE, (const u8*)p.totals + ((long long)it.kv * TOTAL_PARTS + i) * (2 * PHI_BYTES), 2 * PHI_BYTES,
                     v_full + 8 * vs);
        }
        if (++vs == V_STAGES) vs = 0, vp ^= 1;
      }
    }
  }

  // ---- consumers
  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  int warp = t / 32, lane = t % 32, r_a = warp * 16 + lane / 4, column0 = 2 * (lane % 4);
  u64 q_first = operand<128>(shared_address(q_bytes) + group * 64 * 128), k_operand = operand<128>(shared_address(k_tiles));
  u64 v_operand = operand<64>(shared_address(v_tiles) + PHI_BYTES), phi_operand = operand<64>(shared_address(v_tiles) + group * 64 * KEYS);
  u64 h_operand = operand<128>(shared_address(h_shared));
  bool leader = t == 0;
  int ks = 0, kp = 0, vs = 0, vp = 0;
  int s[32];
  u32 pa[8];
  float o[REGS], hs[REGS];

  for (int n = 0;; n++) {
    barrier_wait(item_full + 8 * (n & 1), (n >> 1) & 1);
    int2 next = next_item[n & 1];
    int index = next.x, chosen = next.y;
    barrier_arrive(item_empty + 8 * (n & 1));
    if (index >= count) {
      if (leader) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      return;
    }
    Item it = item(p, index);
    u8* q_tile = q_tiles + (n & 1) * Q_TILE;
    barrier_wait(q_ready + 8 * (n & 1), (n >> 1) & 1);
    const float* scale_of = row_scales[n & 1] + 64 * group + r_a;
    Row2 sq = {scale_of[0] * p.scale, scale_of[8] * p.scale}, m = {-INFINITY_F, -INFINITY_F}, keep;
    u64 q_operand = q_first + (n & 1) * (Q_ROWS * 128 >> 4);
#pragma unroll
    for (int r = 0; r < REGS; r++) o[r] = hs[r] = 0.0f;
    Meta meta;
    auto start_s = [&] {
      barrier_wait(k_full + 8 * ks, kp);
      meta = metas[ks];
      mma_fence();
      issue_s(s, q_operand, k_operand + ks * (K_BYTES >> 4));
      mma_commit();
    };
    auto end_s = [&] {
      pin(s);
      if (leader) barrier_arrive(k_empty + 8 * ks);
      if (++ks == K_STAGES) ks = 0, kp ^= 1;
    };
    auto start_products = [&] {  // P V and h of a block
      barrier_wait(v_full + 8 * vs, vp);
      mma_fence();
      issue_pv(o, pa, v_operand + vs * (V_STAGE >> 4));
      issue_h(hs, phi_operand + vs * (V_STAGE >> 4), v_operand + vs * (V_STAGE >> 4));
      mma_commit();
    };
    auto end_products = [&] {
      mma_wait<0>();
      pin(o), pin(hs);
      if (leader) barrier_arrive(v_empty + 8 * vs);
      if (++vs == V_STAGES) vs = 0, vp ^= 1;
    };
    pin(o), pin(hs);
    start_s();
    mma_wait<0>();
    end_s();
    if (leader && n > 0) {  // the output of the item before has left its place to the next Q
      added();
      barrier_arrive(q_empty + 8 * ((n - 1) & 1));
    }
    softmax(s, sq, meta, m, keep, column0);
    pack_p(s, pa);
    for (int i = 1; i < chosen; i++) {
      pin(o), pin(s), pin(pa);
      start_s();
      start_products();
      mma_wait<1>();  // S is there; the products of the block before still run
      end_s();
      softmax(s, sq, meta, m, keep, column0);
      pin(s);
      end_products();
      if (__any_sync(ALL, keep.a != 1.0f || keep.b != 1.0f)) {
#pragma unroll
        for (int r = 0; r < REGS; r++) o[r] *= (r & 2) ? keep.b : keep.a;
      }
      pack_p(s, pa);
      if (i % SHORT_SUM == 0) {  // P V of the blocks before to a place apart
        move_sums(o, h_shared + t * 4 + group * (34 * 512), m, row_tops + 64 * group + r_a, i == SHORT_SUM);
#pragma unroll
        for (int r = 0; r < REGS; r++) o[r] = 0.0f;
        pin(o);
      }
    }
    pin(o), pin(pa);
    start_products();
    end_products();

    // ---- the linear branch: what all blocks give, minus the selected ones
    int row_a = group * 64 + r_a, first = vs;
    if (chosen > SHORT_SUM) add_sums(o, h_shared + t * 4 + group * (34 * 512), m, row_tops + 64 * group + r_a);
    bool nothing = chosen >= p.k_blocks;
    float ratio = __ldg(p.ratio + it.b * p.ratio_batch + it.h * p.ratio_head + it.tile * p.ratio_block);
    const float* ones_of = p.total_ones + (long long)it.kv * HEAD_DIM + row_a;
    Row2 total_ones = {__ldg(ones_of), __ldg(ones_of + 8)};
    for (int part = 0; part < TOTAL_PARTS; part++) {
      barrier_wait(v_full + 8 * vs, vp);
      if (++vs == V_STAGES) vs = 0, vp ^= 1;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
      int stage = first + 2 * group + i / 8;
      float4 x = ((const float4*)(v_tiles + (stage < V_STAGES ? stage : stage - V_STAGES) * V_STAGE))[i % 8 * 128 + t];
      hs[4 * i] = x.x - hs[4 * i];
      hs[4 * i + 1] = x.y - hs[4 * i + 1];
      hs[4 * i + 2] = x.z - hs[4 * i + 2];
      hs[4 * i + 3] = x.w - hs[4 * i + 3];
    }
    hs[64] = total_ones.a - hs[64];  // of the first thread of a quad; the other columns are zero
    hs[66] = total_ones.b - hs[66];
    pair_sync();  // both groups have read the totals, and are done with the h of the item before
    if (leader) {
      for (int part = 0; part < TOTAL_PARTS; part++) barrier_arrive(v_empty + 8 * (first + part < V_STAGES ? first + part : first + part - V_STAGES));
    }
    u32 h_to = shared_address(h_shared) + group * H_PANEL;
#pragma unroll
    for (int j = 0; j < 18; j += 2) {
      u32 w[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = 4 * (j + i / 2) + 2 * (i & 1);
        if (at < REGS) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(hs[at + 1]), "f"(hs[at]));
      }
      int e = min(8 * (j + lane / 16) + lane % 8, 135), c = 2 * warp + lane / 8 % 2;
      if (j < 16)
        store_transposed(h_to + chunk_offset<128>(e, c), w[0], w[1], w[2], w[3]);
      else
        store_transposed(h_to + chunk_offset<128>(128 + lane % 8, c), w[0], w[1], w[0], w[1]);
    }
    fence_async_shared();
    pair_sync();
#pragma unroll
    for (int r = 0; r < REGS; r++) hs[r] = 0.0f;  // without these zeros the compiler serialises the products of the loop
    pin(hs);
    u64 phi_q = operand<128>(shared_address(q_tile) + group * 64 * 128);
    mma_fence();
#pragma unroll
    for (int k = 0; k < 8; k++) mma_bf16(hs, phi_q + k / 4 * (Q_PANEL >> 4) + 2 * (k % 4), h_operand + k / 4 * (H_PANEL >> 4) + 2 * (k % 4), 1);
    mma_commit();
    mma_wait<0>();
    pin(hs);
    group_sync(2 + group);  // phi(Q) has been read

    Row2 l = {__shfl_sync(ALL, o[64], lane & 28), __shfl_sync(ALL, o[66], lane & 28)};
    Row2 den = {__shfl_sync(ALL, hs[64], lane & 28), __shfl_sync(ALL, hs[66], lane & 28)};
    const float* v_max = p.v_max + key_head(p, it) * HEAD_DIM + column0;
    Row2 fs = {(nothing ? 1.0f : ratio) / (448.0f * l.a), (nothing ? 1.0f : ratio) / (448.0f * l.b)};
    Row2 fl = {nothing ? 0.0f : (1.0f - ratio) / (448.0f * den.a), nothing ? 0.0f : (1.0f - ratio) / (448.0f * den.b)};
    u8* to = q_tile + group * 64 * 128 + 2 * column0;  // the output goes out from where Q came in
#pragma unroll
    for (int j = 0; j < 16; j++) {
      float2 vm = __ldg((const float2*)(v_max + 8 * j));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float f = half ? fs.b : fs.a, g = half ? fl.b : fl.a;
        float lo = fmaf(o[4 * j + 2 * half], f, hs[4 * j + 2 * half] * g), hi = fmaf(o[4 * j + 2 * half + 1], f, hs[4 * j + 2 * half + 1] * g);
        *(u32*)(to + j / 8 * Q_PANEL + chunk_offset<128>(r_a + 8 * half, j % 8)) = pack16(lo * vm.x, hi * vm.y);
      }
    }
    if (p.lse && column0 == 0) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = it.tile * Q_ROWS + row_a + 8 * half;
        if (row < p.queries)
          p.lse[(long long)(it.b * p.all_heads + it.h) * p.queries + row] =
              ((half ? m.b : m.a) + (log2f(half ? l.b : l.a) - P_SHIFT)) * LN2 + row_biases[n & 1][row_a + 8 * half] * p.scale * LN2;
      }
    }
    fence_async_shared();
    group_sync(2 + group);
    if (leader) {
      int row = it.tile * Q_ROWS + group * 64;
      if (row < p.queries) {
        u32 from = shared_address(q_tile) + group * 64 * 128;
        store_4d(&out_map, from, 0, it.h, row, it.b);
        store_4d(&out_map, from + Q_PANEL, 64, it.h, row, it.b);
      }
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

// Sum of h over all key blocks: a block of threads takes a share of the keys of a head.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_totals(const __grid_constant__ Params p) {
  extern __shared__ u8 raw_shared[];
  u8* tiles = aligned_shared(raw_shared);
  __shared__ alignas(8) u64 bars[2 * TOTALS_STAGES];
  u32 full = shared_address(bars), empty = full + 8 * TOTALS_STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < TOTALS_STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, GROUPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  ones(tiles, TOTALS_STAGES, V_STAGE);
  __syncthreads();
  after_the_kernel_before();
  int group = __shfl_sync(ALL, threadIdx.x / 128, 0) - 1, t = threadIdx.x % 128, kv = blockIdx.y, split = blockIdx.x;
  int all = p.k_blocks, each = (all + p.splits - 1) / p.splits, start = split * each, end = min(all, start + each);
  int stage = 0, phase = 0;
  if (group < 0 && threadIdx.x == 0) {
    for (int j = start; j < end; j++) {
      barrier_wait(empty + 8 * stage, phase ^ 1);
      barrier_expect(full + 8 * stage, 2 * PHI_BYTES);
      copy_bytes(shared_address(tiles) + stage * V_STAGE, p.records + ((long long)kv * p.k_blocks + j) * RECORD + K_BYTES, 2 * PHI_BYTES, full + 8 * stage);
      if (++stage == TOTALS_STAGES) stage = 0, phase ^= 1;
    }
  }
  if (group >= 0) {
    u64 v_operand = operand<64>(shared_address(tiles) + PHI_BYTES), phi_operand = operand<64>(shared_address(tiles) + group * 64 * KEYS);
    float h[REGS], part[REGS];  // sums of a block apart: the matrix unit's own keep some 14 bits
#pragma unroll
    for (int r = 0; r < REGS; r++) h[r] = 0.0f;
    for (int j = start; j < end; j++) {
      barrier_wait(full + 8 * stage, phase);
#pragma unroll
      for (int r = 0; r < REGS; r++) part[r] = 0.0f;
      pin(part);
      mma_fence();
      issue_h(part, phi_operand + stage * (V_STAGE >> 4), v_operand + stage * (V_STAGE >> 4));
      mma_commit();
      mma_wait<0>();
      pin(part);
      if (t == 0) barrier_arrive(empty + 8 * stage);
#pragma unroll
      for (int r = 0; r < REGS; r++) h[r] += part[r];
      if (++stage == TOTALS_STAGES) stage = 0, phase ^= 1;
    }
    long long at = ((long long)split * gridDim.y + kv) * HEAD_DIM + group * 64 + t / 32 * 16 + t % 32 / 4;
    float* to = p.partial + at * p.share_row + 2 * (t % 4);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      *(float2*)(to + 8 * j) = make_float2(h[4 * j], h[4 * j + 1]);
      *(float2*)(to + 8 * p.share_row + 8 * j) = make_float2(h[4 * j + 2], h[4 * j + 3]);
    }
    if (t % 4 == 0) p.share_ones[at] = h[64], p.share_ones[at + 8] = h[66];
  }
}

// The shares of linear_totals to sums, in the order of Params::totals: one block of threads for four columns of a warpgroup's rows, or their ones.
extern "C" __global__ void __launch_bounds__(128) add_totals(const __grid_constant__ Params p) {
  int i = blockIdx.x % 17, group = blockIdx.x / 17, t = threadIdx.x, kv = blockIdx.y;
  int row = group * 64 + t / 32 * 16 + t % 32 / 4;
  long long at = (long long)kv * HEAD_DIM + row, step = (long long)gridDim.y * HEAD_DIM;  // rows
  float4 sum = make_float4(0, 0, 0, 0);
  after_the_kernel_before();
  if (i < 16) {
    const float* from = p.partial + at * p.share_row + 8 * i + 2 * (t % 4);
#pragma unroll 8
    for (int n = 0; n < p.splits; n++) {
      const float* share = from + n * step * p.share_row;
      float2 x = __ldcg((const float2*)share), y = __ldcg((const float2*)(share + 8 * p.share_row));
      sum.x += x.x, sum.y += x.y, sum.z += y.x, sum.w += y.y;
    }
    ((float4*)p.totals)[((kv * 2 + group) * 16 + i) * 128 + t] = sum;
  } else if (t % 4 == 0) {
#pragma unroll 8
    for (int n = 0; n < p.splits; n++) {
      sum.x += __ldcg(p.share_ones + at + n * step);
      sum.z += __ldcg(p.share_ones + at + n * step + 8);
    }
    p.total_ones[at] = sum.x;
    p.total_ones[at + 8] = sum.z;
  }
}
