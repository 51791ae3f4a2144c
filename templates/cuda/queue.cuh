// The queue: the work list of a class whose blocks draw units from a counter, one after another, until none is left.
//
// A unit is a row tile of BM packed rows, a KV head and, where a request is cut, a piece: piece_slots cache slots of a grid
// that starts at slot 0 and is the same for all tiles of the request. A block computes a unit whole. There is no record a
// tile: the plan writes one a request, in the order of the queue, and a block finds its unit by arithmetic on its number.
//
// Order: requests with the longest tile first, so that the last units to be drawn are short. Of a request, sections of
// section_heads KV heads, whose keys and values stay in the L2 cache; of a section, pieces and in them tiles from last to
// first (under a causal mask the last are the longest); of a tile, the section's heads.
//
// The kernel computes which cache slots [begin, end) a tile reaches. A piece that they do not meet is void: its unit is
// skipped. A tile that meets one piece or none has its final result in one unit. One that meets more leaves partial results
// in slots of its own, and the last unit to arrive merges them in the order of their pieces.
//
// Kernels include work.cuh too.
#pragma once
#include <stdint.h>

#include "work.cuh"

struct alignas(16) QueuedRequest {
  Request request;
  int32_t request_index;  // negative: the request is bad, its rows become NaN
  int32_t rows, tiles;    // packed rows, and tiles of BM of them
  int32_t pieces;         // of each tile; 1: not cut
  int32_t piece0;         // first piece of the grid that any row reaches; 0 when not cut
  int32_t piece_slots;    // cache slots of a piece, a multiple of BN; not cut: the largest one
  int32_t section_heads;  // KV heads of a section; the request's last section may have fewer
  int32_t slot0;          // cut: its first partial result
  int32_t counter0;       // cut: its first arrival counter
  int32_t unit0;          // units before its first one in the queue
  int32_t q_last;         // of a node: the largest position of its rows
  int32_t reserved;
};
static_assert(sizeof(QueuedRequest) == 80, "the planner in attngen/queued.py writes the same layout");

struct alignas(16) Queue {
  int32_t units, requests;
  int32_t next, done;  // the next unit to draw, the blocks that found none; 0 when planned, and again after the kernel
};
static_assert(sizeof(Queue) == 16, "the planner in attngen/queued.py writes the same layout");

// The request of a unit, for a whole warp: the last one that does not start after it. 32 starts at a time; one round up to 32
// requests, two up to 1024.
__device__ __forceinline__ int32_t find_request(const int32_t* unit_starts, int32_t requests, int32_t unit) {
  const int32_t lane = threadIdx.x % 32;
  int32_t first = 0, count = requests;
  while (count > 1) {
    const int32_t step = (count + 31) / 32, at = lane * step;
    const uint32_t before = __ballot_sync(~0u, at < count && unit_starts[first + at] <= unit);
    const int32_t taken = (__popc(before) - 1) * step;
    first += taken;
    count = count - taken < step ? count - taken : step;
  }
  return first;
}

struct QueuedUnit { int32_t tile, piece, kv_head; };

__device__ __forceinline__ QueuedUnit unit_of(const QueuedRequest& r, int32_t unit, int32_t num_kv_heads) {
  const int32_t in_request = unit - r.unit0, in_section = r.section_heads * r.pieces * r.tiles;
  const int32_t section = in_request / in_section, head0 = section * r.section_heads, rest = num_kv_heads - head0;
  const int32_t heads = rest < r.section_heads ? rest : r.section_heads, i = in_request - section * in_section;
  const int32_t row = i / heads, piece = row / r.tiles;  // row: of the section's units, a tile's heads
  return {r.tiles - 1 - (row - piece * r.tiles), r.piece0 + r.pieces - 1 - piece, head0 + i - row * heads};
}

// The pieces that cache slots [begin, end) meet, of those that were planned: a mask that reads a scalar on the device may reach
// further by now. The first and the last piece of a tile take what lies outside.
struct PieceSpan { int32_t first, count; };
__device__ __forceinline__ PieceSpan pieces_met(const QueuedRequest& r, int32_t begin, int32_t end) {
  if (begin >= end) return {r.piece0, 0};
  const int32_t most = r.piece0 + r.pieces - 1;
  int32_t first = begin / r.piece_slots, last = (end - 1) / r.piece_slots;
  first = first < r.piece0 ? r.piece0 : first > most ? most : first;
  last = last < r.piece0 ? r.piece0 : last > most ? most : last;
  return {first, last + 1 - first};
}

// Where a cut tile's piece leaves its result, and the first of the counters of its arrivals, one for each of GROUPS warpgroups.
__device__ __forceinline__ int32_t partial_slot(const QueuedRequest& r, const QueuedUnit& u, int32_t num_kv_heads) {
  return r.slot0 + (u.tile * r.pieces + (u.piece - r.piece0)) * num_kv_heads + u.kv_head;
}
template <int GROUPS>
__device__ __forceinline__ int32_t arrival_counter(const QueuedRequest& r, const QueuedUnit& u, int32_t num_kv_heads) {
  return r.counter0 + (u.tile * num_kv_heads + u.kv_head) * GROUPS;
}
