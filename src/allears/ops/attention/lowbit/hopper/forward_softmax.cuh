// Softmax of forward.cu, whose macros it uses: a tile of S to P in 8 bits, and the sums of its rows.

#if !ONES
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
#endif

#define HIDDEN (-(1 << 30))  // in place of an integer of S, which is at most 127^2 D

// Hides what MASKED asks for, and returns the maxima of this thread's columns in base 2.
template <bool MASKED>
DEVICE void highest(int (&s)[64], int& top_a, int& top_b, int limit_a, int limit_b, int column0) {
#pragma unroll
  for (int j = 0; j < 16; j++) {
    if (MASKED) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (8 * j + column0 + (e & 1) >= (e < 2 ? limit_a : limit_b)) s[4 * j + e] = HIDDEN;
    }
    top_a = max(max(top_a, s[4 * j]), s[4 * j + 1]);
    top_b = max(max(top_b, s[4 * j + 2]), s[4 * j + 3]);
  }
}

template <bool MASKED>
DEVICE Row2 in_base_2(int top_a, int top_b, Row2 c) {
  Row2 top = {(float)top_a * c.a, (float)top_b * c.b};
  if (MASKED && top_a == HIDDEN) top.a = -INFINITY_F;
  if (MASKED && top_b == HIDDEN) top.b = -INFINITY_F;
  return top;
}

// S to P, relative to ``oa`` and ``ob``.
template <bool MASKED>
DEVICE void exponentials(int (&s)[64], Row2 c, float oa, float ob) {
#pragma unroll
  for (int j = 0; j < 16; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float x = (float)s[4 * j + e];
      if (MASKED && s[4 * j + e] == HIDDEN) x = -INFINITY_F;
      x = e < 2 ? fmaf(x, c.a, -oa) : fmaf(x, c.b, -ob);
      s[4 * j + e] = __float_as_int(exp2_fast(x));
    }
  }
}

// S (integers) of one tile to P, which pack_p brings to 8 bits. ``m``: running maxima. FP8: P is relative to them, and ``keep`` the factor of what came before. INT8: P
// is relative to the tile's own maximum ``at`` (not below m - 20, so that o, which is kept in units of the last tile's P, stays finite).
template <bool MASKED>
DEVICE void softmax(int (&s)[64], Row2 c, Row2& m, Row2& at, Row2& l, Row2& keep, int limit_a, int limit_b, int column0) {
  int top_a = HIDDEN, top_b = HIDDEN;
  highest<MASKED>(s, top_a, top_b, limit_a, limit_b, column0);
  Row2 top = in_base_2<MASKED>(quad_max(top_a), quad_max(top_b), c);
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
  exponentials<MASKED>(s, c, ua - P_OFFSET, ub - P_OFFSET);
}

#if PV_INT8
DEVICE u32 pack_half(float lo, float hi) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
#endif

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
        pa[4 * kb + 2 * half + row] = __byte_perm(pack_half(F(at), F(at + 1)), pack_half(F(at + 4), F(at + 5)), 0x6420);
#else
        pa[4 * kb + 2 * half + row] = pack_e4m3(F(at), F(at + 1), F(at + 4), F(at + 5));
#endif
      }
    }
  }
#undef F
}

#if PV_INT8
DEVICE void sum_up(const u32 (&pa)[16], Row2 c, Row2& l, Row2 keep) {
  u32 a = 0, b = 0;
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(a) : "r"(pa[i]), "r"(0x01010101u));
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(b) : "r"(pa[i + 1]), "r"(0x01010101u));
  }
  l.a = fmaf(l.a, keep.a, fmaf(c.a, 0.0f, (float)a));  // bytes hide a NaN of the scales
  l.b = fmaf(l.b, keep.b, fmaf(c.b, 0.0f, (float)b));
}
#endif
