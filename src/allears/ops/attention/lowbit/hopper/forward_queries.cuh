// Q of forward.cu, whose macros and Params it uses, to INT8.

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

