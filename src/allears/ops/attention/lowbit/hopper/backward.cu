#include "common.cuh"
#include "mma.cuh"

// SageBwd's backward pass for Hopper (compute capability 9.0).
//
// A block owns 64 keys of a head for each of its GROUPS warpgroups, and goes over the queries in tiles of 64, on the transposed tile
// (keys x queries), so that P and dS are register operands of dV += P dO and dK += dS Q. INT8: Q K^T, P dO, dS Q. 16 bit: dO V^T, and dS K for
// dQ, whose contraction runs over the keys: a scale a key, which P and dS have here, does not factor out of it.
//
// Column (query) numbers, from backward_prepare.cu, with s the scale of the token's dO in INT8:
//   x: scale of Q, times softmax scale * log2 e;  y: log-sum-exp in base 2, minus log2 s;  z: 1 / s;  w: D / s
// so that P s = 2^(x S - y) is what dV needs, dS = P s (z dP - w), and dS x is what dK needs; both are quantised a key at a time.
//
// Defined by the host: HEAD_DIM (64 or 128), CAUSAL, IN_FP16, and what launches.py chooses:
//   GROUPS      2, or 3 with TURNS
//   LATE        dQ of a tile, which needs the dS of all warpgroups, is made one tile late, so that none waits; dS has two buffers for that
//   TURNS       each tile's dQ is made by one warpgroup, in turn, and not half of its columns by each of two; with LATE and HEAD_DIM 64
//   STAGES      buffers of what belongs to a tile of queries

#if (GROUPS == 3 && !TURNS) || (TURNS && !(LATE && HEAD_DIM == 64))
#error launches.py: GROUPS 3 needs TURNS, TURNS needs LATE and HEAD_DIM 64
#endif
#define KEYS (64 * GROUPS)
#define QUERIES 64
#define THREADS (128 * (GROUPS + 1))
#define LN2 0.69314718055994531f
#define ATOMS (HEAD_DIM / 64)           // 128-byte columns of a 16-bit tile
#define K8_BYTES (KEYS * HEAD_DIM)
#define K16_BYTES (2 * KEYS * HEAD_DIM)
#define Q8_BYTES (QUERIES * HEAD_DIM)
#define DO_BYTES (2 * QUERIES * HEAD_DIM)
#define COLUMN_BYTES (QUERIES * 16)
#define STAGE_BYTES (3 * Q8_BYTES + DO_BYTES + COLUMN_BYTES)
#define DS_BYTES (KEYS * QUERIES * 2)
#define DS_BUFFERS (1 + LATE)
#define DQ_BYTES (4 * QUERIES * HEAD_DIM / (TURNS ? 1 : 2))  // that a warpgroup makes
#define REGS (HEAD_DIM / 2)             // of a 64 x D accumulator
#define DQ_REGS (DQ_BYTES / 512)
#if GROUPS == 3
#define REGISTERS_PRODUCER "32"
#define REGISTERS "160"
#else
#define REGISTERS_PRODUCER "24"
#define REGISTERS "240"
#endif
#define P_TOP 255.0f  // P is never negative

struct Params {
  const float4* columns;  // (B, H, padded)
  const float2* scales;   // (B, G, blocks of 128 keys): of K, of V
  float* dq;              // (B, H, tiles, 2, D / 8, 128, 4): accumulators as the threads hold them; zero at launch
  void* dk;               // (B, L_k, G, D) contiguous, 16 bit
  void* dv;
  int heads, groups, rows, keys, blocks, padded;
  float scale;            // softmax scale * log2 e
};

DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

DEVICE float quad_max_nan(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// 32 numbers of two rows to INT8 operands (up to ``top``), one scale a row; returns the scales. POSITIVE: none has a sign, so their bits order
// as integers, a NaN above all.
template <bool POSITIVE = false>
DEVICE float2 quantise_rows(const float (&x)[32], u32 (&out)[8], const float top) {
  float a = 0.0f, b = 0.0f;
  if (POSITIVE) {
    int top_a = 0, top_b = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      top_a = max(max(top_a, __float_as_int(x[4 * j])), __float_as_int(x[4 * j + 1]));
      top_b = max(max(top_b, __float_as_int(x[4 * j + 2])), __float_as_int(x[4 * j + 3]));
    }
    a = __int_as_float(top_a);
    b = __int_as_float(top_b);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      a = max_nan(a, max_nan(fabsf(x[4 * j]), fabsf(x[4 * j + 1])));
      b = max_nan(b, max_nan(fabsf(x[4 * j + 2]), fabsf(x[4 * j + 3])));
    }
  }
  a = quad_max_nan(a);
  b = quad_max_nan(b);
  float ia = a == 0.0f ? 0.0f : top * reciprocal(a), ib = b == 0.0f ? 0.0f : top * reciprocal(b);
#pragma unroll
  for (int kb = 0; kb < 2; kb++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at = 16 * kb + 8 * half;
      out[4 * kb + 2 * half] = pack_bytes(fmaf(x[at], ia, MAGIC), fmaf(x[at + 1], ia, MAGIC), fmaf(x[at + 4], ia, MAGIC), fmaf(x[at + 5], ia, MAGIC));
      out[4 * kb + 2 * half + 1] =
          pack_bytes(fmaf(x[at + 2], ib, MAGIC), fmaf(x[at + 3], ib, MAGIC), fmaf(x[at + 6], ib, MAGIC), fmaf(x[at + 7], ib, MAGIC));
    }
  }
  return make_float2(a * (1.0f / top), b * (1.0f / top));
}

// Half of the columns of an accumulator, 64 of 128, or all 64.
template <int HALF>
DEVICE void add_up(float (&total)[REGS], const int (&part)[32], float2 scale) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    total[32 * HALF + i] = fmaf((float)part[i], (i & 2) ? scale.y : scale.x, total[32 * HALF + i]);
    asm volatile("" : "+f"(total[32 * HALF + i])::"memory");  // now, not behind the next product
  }
}

template <bool UNSIGNED = false>
DEVICE void product8(int (&part)[32], const u32 (&a)[8], u64 b) {
  mma_fence();
  if (UNSIGNED) {
    mma_u8_reg(part, a[0], a[1], a[2], a[3], b, 0);
    mma_u8_reg(part, a[4], a[5], a[6], a[7], b + 2, 1);
  } else {
    mma_s8_reg(part, a[0], a[1], a[2], a[3], b, 0);
    mma_s8_reg(part, a[4], a[5], a[6], a[7], b + 2, 1);
  }
  mma_commit();
}

DEVICE void issue_dq(float (&dq)[DQ_REGS], u64 ds, u64 k16) {
  mma_fence();
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) mma_bf16_across(dq, ds + k * (2048 >> 4), k16 + k * (2048 >> 4), k > 0);
  mma_commit();
}

// A warpgroup's part of dQ of a tile to global memory, by way of ``stage``.
DEVICE void add_dq(const float (&dq)[DQ_REGS], float scale, float* to, u8* stage, int group, int t, bool leader) {
  if (leader) added();
  group_sync(1 + group);
#pragma unroll
  for (int j = 0; j < DQ_REGS / 4; j++)
    ((float4*)stage)[t + 128 * j] = make_float4(dq[4 * j] * scale, dq[4 * j + 1] * scale, dq[4 * j + 2] * scale, dq[4 * j + 3] * scale);
  fence_async_shared();
  group_sync(1 + group);
  if (leader) add_bytes(to, shared_address(stage), DQ_BYTES);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_backward(const __grid_constant__ TensorMap k8_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap do_map,
                   const __grid_constant__ TensorMap q8_map, const __grid_constant__ TensorMap q8_across_map,
                   const __grid_constant__ TensorMap do8_across_map, const __grid_constant__ Params p) {
  extern __shared__ u8 raw_shared[];
  u8* base = aligned_shared(raw_shared);
  u8* k8 = base;
  u8* k16 = k8 + K8_BYTES;
  u8* v16 = k16 + K16_BYTES;
  u8* ds = v16 + K16_BYTES;
  u8* dq_stages = ds + DS_BUFFERS * DS_BYTES;
  u8* stages = dq_stages + GROUPS * DQ_BYTES;
  __shared__ alignas(8) u64 bars[2 * STAGES + 1 + 2 * DS_BUFFERS];
  u32 full = shared_address(bars), empty = full + 8 * STAGES, ready = empty + 8 * STAGES, ds_full = ready + 8, ds_empty = ds_full + 8 * DS_BUFFERS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, GROUPS);
    }
    barrier_init(ready, 1);
    for (int i = 0; i < DS_BUFFERS; i++) {
      barrier_init(ds_full + 8 * i, 128 * GROUPS);
      barrier_init(ds_empty + 8 * i, TURNS ? 1 : GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int block = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
  int per_group = p.heads / p.groups, offset = p.keys - p.rows;
  int tiles = (p.rows + QUERIES - 1) / QUERIES, first = 0;
#if CAUSAL
  first = max(0, block * KEYS - offset) / QUERIES;
#endif
  int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1, t = threadIdx.x % 128;

  if (group < 0) {  // ---- producer
    asm volatile("setmaxnreg.dec.sync.aligned.u32 " REGISTERS_PRODUCER ";");
    if (threadIdx.x != 0) return;
    barrier_expect(ready, K8_BYTES + K16_BYTES);
    copy_3d(shared_address(k8), &k8_map, ready, 0, block * KEYS, b * p.groups + g);
    for (int a = 0; a < ATOMS; a++) copy_4d(shared_address(v16) + a * KEYS * 128, &v_map, ready, 64 * a, g, block * KEYS, b);
    int stage = 0, phase = 0;
    for (int n = 0; n < per_group; n++) {
      int h = g * per_group + n, z = b * p.heads + h;
      for (int i = first; i < tiles; i++) {
        u32 to = shared_address(stages) + stage * STAGE_BYTES, bar = full + 8 * stage;
        barrier_wait(empty + 8 * stage, phase ^ 1);
        barrier_expect(bar, STAGE_BYTES);
        copy_3d(to, &q8_map, bar, 0, i * QUERIES, z);
        for (int a = 0; a < ATOMS; a++) copy_4d(to + Q8_BYTES + a * QUERIES * 128, &do_map, bar, 64 * a, h, i * QUERIES, b);
        copy_bytes(to + 3 * Q8_BYTES + DO_BYTES, p.columns + (long long)z * p.padded + i * QUERIES, COLUMN_BYTES, bar);
        copy_3d(to + Q8_BYTES + DO_BYTES, &do8_across_map, bar, i * QUERIES, 0, z);
        copy_3d(to + 2 * Q8_BYTES + DO_BYTES, &q8_across_map, bar, i * QUERIES, 0, z);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  // ---- consumers
  asm volatile("setmaxnreg.inc.sync.aligned.u32 " REGISTERS ";");
  int warp = t / 32, lane = t % 32, r_a = group * 64 + warp * 16 + lane / 4, column0 = 2 * (lane % 4);
  bool first_warp = __shfl_sync(0xffffffffu, warp, 0) == 0;
#define LEADER (first_warp && elected())
  const float2* scales = p.scales + (long long)(b * p.groups + g) * p.blocks;
  auto scale_of = [&](int key) { return key < 128 * p.blocks ? __ldg(scales + key / 128).x : 0.0f; };
  float k_scale = scale_of(block * KEYS + group * 64);
  barrier_wait(ready, 0);
  // K as bfloat16, rows of 64 columns, swizzled: for dQ. Integers, unless the block may have two scales.
  for (int n = threadIdx.x - 128; n < KEYS * HEAD_DIM / 8; n += 128 * GROUPS) {
    int r = n / (HEAD_DIM / 8), c = n % (HEAD_DIM / 8);
    uint2 x = *(const uint2*)(k8 + chunk_offset<HEAD_DIM>(r, c / 2) + (c & 1) * 8);
    u32 w[4];
#if GROUPS == 3
    float unit = scale_of(block * KEYS + r);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 word = i < 2 ? x.x : x.y;
      float lo = (float)(signed char)(word >> (16 * (i & 1))), hi = (float)(signed char)(word >> (16 * (i & 1) + 8));
#if GROUPS == 3
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(hi * unit), "f"(lo * unit));
#else
      w[i] = (__float_as_uint(lo) >> 16) | (__float_as_uint(hi) & 0xffff0000u);
#endif
    }
    *(uint4*)(k16 + (c / 8) * KEYS * 128 + chunk_offset<128>(r, c % 8)) = make_uint4(w[0], w[1], w[2], w[3]);
  }
  fence_async_shared();
  asm volatile("bar.sync 4, %0;" ::"n"(128 * GROUPS) : "memory");

  u64 k8_operand = operand<HEAD_DIM>(shared_address(k8) + group * 64 * HEAD_DIM), v_operand = operand<128>(shared_address(v16) + group * 64 * 128);
#if TURNS
  u64 k16_operand = operand<128>(shared_address(k16));
#elif HEAD_DIM == 128
  u64 k16_operand = operand<128>(shared_address(k16) + group * KEYS * 128);
#else
  u64 k16_operand = operand<128>(shared_address(k16) + group * 64);
#endif
  u64 ds_operand = operand<128>(shared_address(ds));
  u64 q8_operand = operand<HEAD_DIM>(shared_address(stages)), do_operand = operand<128>(shared_address(stages) + Q8_BYTES);
  u64 do8_operand = operand<64>(shared_address(stages) + Q8_BYTES + DO_BYTES), qa_operand = operand<64>(shared_address(stages) + 2 * Q8_BYTES + DO_BYTES);
  int matrix = lane / 8, ds_row = group * 64 + warp * 16 + (matrix & 1) * 8 + lane % 8;  // the row whose address this lane gives

  float dk[REGS], dv[REGS];
#pragma unroll
  for (int i = 0; i < REGS; i++) dk[i] = dv[i] = 0.0f;
  float dq_scale = p.scale * LN2 * (GROUPS == 3 ? 1.0f : k_scale);
  int key_a = block * KEYS + r_a;
  bool tail = (block + 1) * KEYS > p.keys;
  int stage = 0, phase = 0;
  int count = 0;  // tiles so far
  u8* dq_stage = dq_stages + group * DQ_BYTES;
  auto dq_at = [&](int tile) { return p.dq + (TURNS ? (long long)tile * DQ_BYTES : (2ll * tile + group) * DQ_BYTES) / 4; };
#if LATE
  int before = 0;  // number of the tile before in dq
  auto dq_before = [&]() __attribute__((always_inline)) {
    int tile = count - 1, buffer = tile & 1;
    if (tile < 0 || (TURNS && tile % GROUPS != group)) return;
    float dq[DQ_REGS];
    barrier_wait(ds_full + 8 * buffer, (tile >> 1) & 1);
    issue_dq(dq, ds_operand + buffer * (DS_BYTES >> 4), k16_operand);
    mma_wait<0>();
    if (LEADER) barrier_arrive(ds_empty + 8 * buffer);
    add_dq(dq, dq_scale, dq_at(before), dq_stage, group, t, LEADER);
  };
#endif

  for (int n = 0; n < per_group; n++) {
    int h = g * per_group + n;
    int dq_tile = (b * p.heads + h) * tiles + first;
    for (int i = first; i < tiles; i++, count++) {
#if LATE
      int buffer = count & 1, ds_phase = (count >> 1) & 1;
#else
      const int buffer = 0;
      int ds_phase = count & 1;
#endif
      u64 at = stage * (STAGE_BYTES >> 4);
      const float4* columns = (const float4*)(stages + stage * STAGE_BYTES + 3 * Q8_BYTES + DO_BYTES) + column0;
      int s[32];
      float dp[32], x[32];
      barrier_wait(full + 8 * stage, phase);
      mma_fence();
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 32; k++) mma_s8(s, k8_operand + 2 * k, q8_operand + at + 2 * k, k > 0);
      mma_commit();
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; k++)
        mma_16(dp, v_operand + (k / 4) * (KEYS * 128 >> 4) + 2 * (k % 4), do_operand + at + (k / 4) * (QUERIES * 128 >> 4) + 2 * (k % 4), k > 0);
      mma_commit();
      mma_wait<1>();
      bool masked = tail;
#if CAUSAL
      masked |= i * QUERIES + offset < block * KEYS + group * 64 + 63;
#endif
#pragma unroll
      for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float2 c = *(const float2*)(columns + 8 * j + e);
          float scale = c.x * k_scale;
          x[4 * j + e] = exp2_fast(fmaf((float)s[4 * j + e], scale, -c.y));
          x[4 * j + 2 + e] = exp2_fast(fmaf((float)s[4 * j + 2 + e], scale, -c.y));
        }
      }
      if (masked) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            int key = key_a + 8 * (e / 2), query = i * QUERIES + 8 * j + column0 + (e & 1);
            bool seen = key < p.keys;
#if CAUSAL
            seen &= key <= query + offset;
#endif
            if (!seen) x[4 * j + e] = 0.0f;
          }
        }
      }
      u32 p8[8], ds8[8];
      float2 p_scale = quantise_rows<true>(x, p8, P_TOP);
      mma_wait<0>();  // dP
      barrier_wait(ds_empty + 8 * buffer, ds_phase ^ 1);
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        u32 packed[4];
#pragma unroll
        for (int jj = 0; jj < 2; jj++) {
          float4 c0 = columns[8 * (j + jj)], c1 = columns[8 * (j + jj) + 1];
          int q = 4 * (j + jj);
          float a0 = x[q] * fmaf(dp[q], c0.z, -c0.w), a1 = x[q + 1] * fmaf(dp[q + 1], c1.z, -c1.w);
          float b0 = x[q + 2] * fmaf(dp[q + 2], c0.z, -c0.w), b1 = x[q + 3] * fmaf(dp[q + 3], c1.z, -c1.w);
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed[2 * jj]) : "f"(a1), "f"(a0));
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed[2 * jj + 1]) : "f"(b1), "f"(b0));
          x[q] = a0 * c0.x;
          x[q + 1] = a1 * c1.x;
          x[q + 2] = b0 * c0.x;
          x[q + 3] = b1 * c1.x;
        }
        store_matrices(shared_address(ds) + buffer * DS_BYTES + chunk_offset<128>(ds_row, j + matrix / 2), packed[0], packed[1], packed[2], packed[3]);
      }
      fence_async_shared();
      barrier_arrive(ds_full + 8 * buffer);
      float2 ds_scale = quantise_rows(x, ds8, 127.0f);
      u64 do8 = do8_operand + at, qa = qa_operand + at;
      int part[32];
#if GROUPS == 3  // few registers: one product at a time, the other warpgroups run meanwhile
      product8<true>(part, p8, do8);
      mma_wait<0>();
      add_up<0>(dv, part, p_scale);
      product8(part, ds8, qa);
      mma_wait<0>();
      if (LEADER) barrier_arrive(empty + 8 * stage);
      add_up<0>(dk, part, ds_scale);
#else
      int part2[32];
#if HEAD_DIM == 128
      const int upper = 64 * 64 >> 4;  // rows 64 to 127 of D
      product8<true>(part, p8, do8);
      product8<true>(part2, p8, do8 + upper);
      mma_wait<1>();
      add_up<0>(dv, part, p_scale);
      product8(part, ds8, qa);
      mma_wait<1>();
      add_up<1>(dv, part2, p_scale);
      product8(part2, ds8, qa + upper);
      mma_wait<1>();
      add_up<0>(dk, part, ds_scale);
#else
      product8<true>(part, p8, do8);
      product8(part2, ds8, qa);
      mma_wait<1>();
      add_up<0>(dv, part, p_scale);
#endif
#if TURNS
      mma_wait<0>();
      if (LEADER) barrier_arrive(empty + 8 * stage);
      add_up<0>(dk, part2, ds_scale);
#else
      float dq[DQ_REGS];
#if LATE  // before the first tile there is nothing: what is made of the buffer then is not added
      int other = buffer ^ 1, to = before;
      if (count > 0) barrier_wait(ds_full + 8 * other, ((count - 1) >> 1) & 1);
#else
      int other = 0, to = dq_tile;
      barrier_wait(ds_full, ds_phase);
#endif
      issue_dq(dq, ds_operand + other * (DS_BYTES >> 4), k16_operand);
      mma_wait<1>();
      if (LEADER) barrier_arrive(empty + 8 * stage);
      add_up<HEAD_DIM / 64 - 1>(dk, part2, ds_scale);
      mma_wait<0>();
      if (!LATE || count > 0) {
        if (LEADER) barrier_arrive(ds_empty + 8 * other);
        add_dq(dq, dq_scale, dq_at(to), dq_stage, group, t, LEADER);
      }
#endif
#endif
#if TURNS
      dq_before();
#endif
#if LATE
      before = dq_tile;
#endif
      dq_tile++;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
#if LATE
  dq_before();
#endif
  if (LEADER) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int key = key_a + 8 * half;
    if (key >= p.keys) continue;
    long long to = (((long long)b * p.keys + key) * p.groups + g) * HEAD_DIM + column0;
    u32 *k_to = (u32*)((u16*)p.dk + to), *v_to = (u32*)((u16*)p.dv + to);
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j++) {
      k_to[4 * j] = pack16(dk[4 * j + 2 * half] * LN2, dk[4 * j + 2 * half + 1] * LN2);
      v_to[4 * j] = pack16(dv[4 * j + 2 * half], dv[4 * j + 2 * half + 1]);
    }
  }
}
