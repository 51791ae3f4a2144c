// Intervals: what an int32 or a bool may be over a tile of queries and keys. attngen/intervals.py has the same rules, and says why
// they are sound; docs/bounds.md says what they are for. Both dialects include this file.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define AG_INTERVAL __device__ __forceinline__
#else
#define AG_INTERVAL inline
#endif

// ---- int32: from lo to hi -----------------------------------------------------------------------------------------------------------

struct Interval {
  int32_t lo, hi;

  AG_INTERVAL Interval() {}
  AG_INTERVAL Interval(int32_t value) : lo(value), hi(value) {}
  // Anything where int32 arithmetic may have wrapped.
  AG_INTERVAL Interval(int64_t least, int64_t most) {
    const bool wraps = least < INT32_MIN || most > INT32_MAX;
    lo = wraps ? INT32_MIN : (int32_t)least, hi = wraps ? INT32_MAX : (int32_t)most;
  }
  AG_INTERVAL bool known() const { return lo == hi; }
};
AG_INTERVAL Interval ag_any_int() { return Interval((int64_t)INT32_MIN, (int64_t)INT32_MAX); }

// ---- bools --------------------------------------------------------------------------------------------------------------------------

struct Truth {
  bool must, may;  // be true

  AG_INTERVAL Truth() {}
  AG_INTERVAL Truth(bool value) : must(value), may(value) {}
  AG_INTERVAL Truth(bool all, bool some) : must(all), may(some) {}
  AG_INTERVAL bool known() const { return must == may; }
};
AG_INTERVAL Truth ag_any_bool() { return Truth(false, true); }
AG_INTERVAL Truth operator&(Truth a, Truth b) { return Truth(a.must & b.must, a.may & b.may); }
AG_INTERVAL Truth operator|(Truth a, Truth b) { return Truth(a.must | b.must, a.may | b.may); }
AG_INTERVAL Truth operator!(Truth a) { return Truth(!a.may, !a.must); }
AG_INTERVAL Truth operator^(Truth a, Truth b) { return a.known() & b.known() ? Truth(a.may ^ b.may) : ag_any_bool(); }
AG_INTERVAL Truth operator==(Truth a, Truth b) { return !(a ^ b); }

AG_INTERVAL Truth operator<(Interval a, Interval b) { return Truth(a.hi < b.lo, a.lo < b.hi); }
AG_INTERVAL Truth operator<=(Interval a, Interval b) { return Truth(a.hi <= b.lo, a.lo <= b.hi); }
AG_INTERVAL Truth operator==(Interval a, Interval b) {
  return Truth(a.known() & b.known() & (a.lo == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi));
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------------------------

AG_INTERVAL Interval operator+(Interval a, Interval b) { return Interval((int64_t)a.lo + b.lo, (int64_t)a.hi + b.hi); }
AG_INTERVAL Interval operator-(Interval a, Interval b) { return Interval((int64_t)a.lo - b.hi, (int64_t)a.hi - b.lo); }
AG_INTERVAL Interval operator-(Interval a) { return Interval(-(int64_t)a.hi, -(int64_t)a.lo); }
AG_INTERVAL Interval operator*(Interval a, Interval b) {
  const int64_t w = (int64_t)a.lo * b.lo, x = (int64_t)a.lo * b.hi, y = (int64_t)a.hi * b.lo, z = (int64_t)a.hi * b.hi;
  return Interval(ag_min64(ag_min64(w, x), ag_min64(y, z)), ag_max64(ag_max64(w, x), ag_max64(y, z)));
}
AG_INTERVAL Interval ag_abs(Interval a) {
  const int64_t lo = ag_abs64(a.lo), hi = ag_abs64(a.hi);
  return Interval((a.lo <= 0) & (a.hi >= 0) ? 0 : ag_min64(lo, hi), ag_max64(lo, hi));
}
AG_INTERVAL Interval ag_min(Interval a, Interval b) { return Interval((int64_t)ag_min(a.lo, b.lo), (int64_t)ag_min(a.hi, b.hi)); }
AG_INTERVAL Interval ag_max(Interval a, Interval b) { return Interval((int64_t)ag_max(a.lo, b.lo), (int64_t)ag_max(a.hi, b.hi)); }

// By divisors of one sign the corners decide; by 0 it is 0; else no quotient is larger than its dividend.
AG_INTERVAL Interval ag_floordiv(Interval a, Interval b) {
  if ((b.lo > 0) | (b.hi < 0)) {
    if ((a.lo == INT32_MIN) & (b.lo <= -1) & (b.hi >= -1)) return ag_any_int();
    const int32_t w = ag_floordiv(a.lo, b.lo), x = ag_floordiv(a.lo, b.hi), y = ag_floordiv(a.hi, b.lo), z = ag_floordiv(a.hi, b.hi);
    return Interval((int64_t)ag_min(ag_min(w, x), ag_min(y, z)), (int64_t)ag_max(ag_max(w, x), ag_max(y, z)));
  }
  const int64_t most = ag_max64(ag_abs64(a.lo), ag_abs64(a.hi));
  return Interval(-most, most);
}
// Within one period of a known divisor it is a difference; else it is between 0 and the divisor.
AG_INTERVAL Interval ag_mod(Interval a, Interval b) {
  if (b.known() & (b.lo != 0)) {
    const int32_t period = ag_floordiv(a.lo, b.lo);
    if ((b.lo != -1) & (period == ag_floordiv(a.hi, b.lo))) return Interval((int64_t)a.lo - (int64_t)period * b.lo, (int64_t)a.hi - (int64_t)period * b.lo);
  }
  return Interval(b.lo < 0 ? (int64_t)b.lo + 1 : 0, b.hi > 0 ? (int64_t)b.hi - 1 : 0);
}

// ---- bits ---------------------------------------------------------------------------------------------------------------------------

// Bits below 2^k, of which `ones` is 2^k - 1.
AG_INTERVAL Interval ag_low_bits(Interval a, int32_t ones) {
  if ((a.lo & ~ones) == (a.hi & ~ones)) return Interval((int64_t)(a.lo & ones), (int64_t)(a.hi & ones));
  return Interval((int64_t)0, (int64_t)ones);
}
AG_INTERVAL bool ag_is_ones(Interval a) { return a.known() & (a.lo >= 0) & ((a.lo & ((uint32_t)a.lo + 1)) == 0); }
AG_INTERVAL Interval operator&(Interval a, Interval b) {
  if (ag_is_ones(b)) return ag_low_bits(a, b.lo);
  if (ag_is_ones(a)) return ag_low_bits(b, a.lo);
  if (a.known() & b.known()) return Interval(a.lo & b.lo);
  const int32_t hi_a = a.lo >= 0 ? a.hi : INT32_MAX, hi_b = b.lo >= 0 ? b.hi : INT32_MAX;  // a factor that is not negative bounds the result
  return Interval((a.lo >= 0) | (b.lo >= 0) ? 0 : (int64_t)INT32_MIN, (int64_t)ag_min(hi_a, hi_b));
}
// The least 2^k - 1 that is not below x >= 0.
AG_INTERVAL int32_t ag_ones_above(int32_t x) {
  x |= x >> 1, x |= x >> 2, x |= x >> 4, x |= x >> 8;
  return x | x >> 16;
}
// Of numbers that are not negative no bit is set above theirs.
AG_INTERVAL Interval operator|(Interval a, Interval b) {
  if (a.known() & b.known()) return Interval(a.lo | b.lo);
  if ((a.lo < 0) | (b.lo < 0)) return ag_any_int();
  return Interval((int64_t)ag_max(a.lo, b.lo), (int64_t)ag_ones_above(a.hi | b.hi));
}
AG_INTERVAL Interval operator^(Interval a, Interval b) {
  if (a.known() & b.known()) return Interval(a.lo ^ b.lo);
  if ((a.lo < 0) | (b.lo < 0)) return ag_any_int();
  return Interval((int64_t)0, (int64_t)ag_ones_above(a.hi | b.hi));
}
AG_INTERVAL Interval operator~(Interval a) { return Interval((int64_t)~a.hi, (int64_t)~a.lo); }
AG_INTERVAL Interval ag_shl(Interval a, Interval n) {
  if (!n.known()) return ag_any_int();
  if ((n.lo < 0) | (n.lo > 31)) return Interval(0);
  return Interval((int64_t)a.lo * (1ll << n.lo), (int64_t)a.hi * (1ll << n.lo));
}
AG_INTERVAL Interval ag_shr(Interval a, Interval n) {
  if (n.known()) return Interval((int64_t)ag_shr(a.lo, n.lo), (int64_t)ag_shr(a.hi, n.lo));
  return Interval((int64_t)(a.lo < 0 ? a.lo : 0), (int64_t)(a.hi < 0 ? -1 : a.hi));
}

// ---- choices and casts --------------------------------------------------------------------------------------------------------------

AG_INTERVAL Interval ag_where(Truth c, Interval a, Interval b) {
  if (c.known()) return c.may ? a : b;
  return Interval((int64_t)ag_min(a.lo, b.lo), (int64_t)ag_max(a.hi, b.hi));
}
AG_INTERVAL Truth ag_where(Truth c, Truth a, Truth b) {
  if (c.known()) return c.may ? a : b;
  return Truth(a.must & b.must, a.may | b.may);
}
AG_INTERVAL Truth ag_nonzero(Interval a) { return Truth((a.lo > 0) | (a.hi < 0), (a.lo != 0) | (a.hi != 0)); }
AG_INTERVAL Interval ag_number(Truth a) { return Interval((int64_t)a.must, (int64_t)a.may); }

// ---- tiles --------------------------------------------------------------------------------------------------------------------------

enum TileClass { EMPTY, PARTIAL, FULL };  // the mask keeps none, some or all of a tile
AG_INTERVAL TileClass ag_tile_class(Truth kept) { return kept.must ? FULL : kept.may ? PARTIAL : EMPTY; }

// Least and largest of `count` values that are at hand.
template <typename T> AG_INTERVAL Interval ag_range_of(const T* values, int count) {
  int32_t lo = values[0], hi = values[0];
  for (int i = 1; i < count; ++i) lo = ag_min(lo, (int32_t)values[i]), hi = ag_max(hi, (int32_t)values[i]);
  return Interval((int64_t)lo, (int64_t)hi);
}
