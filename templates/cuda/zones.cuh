// Zone maps: least and largest of 32, and of 1024, neighbouring entries of a tensor that a mask reads, for tile classes. A row of the map
// has `count` zones of 32 and then those of 1024. The planner builds them; docs/bounds.md says what for.
#pragma once
#include <stdint.h>

#include "intervals.h"

constexpr int ZONE = 32, WIDE_ZONE = 32 * ZONE;
AG_DEVICE int32_t wide_zones(int32_t count) { return (count + 31) / 32; }

// What a tile reads of a row of `size` entries at `index`: few entries as they are. A read beyond the row yields 0.
template <typename Read> AG_DEVICE Interval ag_zone_range(const int2* zones, int32_t count, int64_t row, int32_t size, Interval index, const Read& read) {
  const int32_t lo = index.lo > 0 ? index.lo : 0, hi = index.hi < size ? index.hi : size - 1;
  if (lo > hi) return Interval(0);
  int32_t least = INT32_MAX, most = INT32_MIN;
  if (hi - lo < 16) {
    for (int32_t at = lo; at <= hi; ++at) {
      const int32_t x = read(at);
      least = ag_min(least, x), most = ag_max(most, x);
    }
  } else {
    if (hi / ZONE >= count) return ag_any_int();
    const bool wide = hi - lo >= WIDE_ZONE;
    const int32_t shift = wide ? 10 : 5;
    const int2* const from = zones + row * (count + wide_zones(count)) + (wide ? count : 0);
    const int32_t last = hi >> shift;
#pragma unroll 1
    for (int32_t i = lo >> shift; i <= last; i += 4) {  // four loads in flight
      int2 zone[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) zone[j] = __ldg(from + (i + j < last ? i + j : last));
#pragma unroll
      for (int j = 0; j < 4; ++j) least = ag_min(least, zone[j].x), most = ag_max(most, zone[j].y);
    }
  }
  const bool beyond = index.lo < 0 || index.hi >= size;
  return Interval((int64_t)(beyond ? ag_min(least, 0) : least), (int64_t)(beyond ? ag_max(most, 0) : most));
}

// The same without zones: of up to 64 entries, such as those of a group's heads.
template <typename Read> AG_DEVICE Interval ag_entry_range(int32_t size, Interval index, const Read& read) {
  if ((int64_t)index.hi - index.lo >= 64) return ag_any_int();
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t at = index.lo; at <= index.hi; ++at) {
    const int32_t x = read((int32_t)at);
    least = ag_min(least, x), most = ag_max(most, x);
  }
  return Interval((int64_t)least, (int64_t)most);
}

// A block: 1024 entries of a row, of which read(i) is the i-th. A warp takes 32 at a time.
template <int WARPS, typename Read>
AG_DEVICE void build_zones(int2* zones, int32_t count, int32_t wide, int32_t size, const Read& read, int2 (&found)[WARPS]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int2 of_warp = make_int2(INT32_MAX, INT32_MIN);
  for (int32_t zone = 32 * wide + warp; zone < 32 * wide + 32 && zone < count; zone += WARPS) {
    const int32_t at = zone * ZONE + lane, last = size - 1, x = read(at < last ? at : last);
    const int2 range = make_int2(__reduce_min_sync(~0u, x), __reduce_max_sync(~0u, x));
    if (lane == 0) zones[zone] = range;
    of_warp.x = ag_min(of_warp.x, range.x), of_warp.y = ag_max(of_warp.y, range.y);
  }
  if (lane == 0) found[warp] = of_warp;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < WARPS; ++i) of_warp.x = ag_min(of_warp.x, found[i].x), of_warp.y = ag_max(of_warp.y, found[i].y);
    zones[count + wide] = of_warp;
  }
}
