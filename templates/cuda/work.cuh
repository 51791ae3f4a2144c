// Files of the shelf: ptx.cuh, rope.cuh, work.cuh (this), math.cuh, and variant.cuh.jinja, which decode and attention templates
// include by jinja for Params, Call, Tile, Row, Col, hooks, score(), kept(), finish_row(), store_final().
//
// The work list: what plan.cu writes and every attention kernel walks.
//
// A row-tile class has BM packed rows (token * group + head in group) a tile. A unit is one tile and one KV head; its cost
// is its KV blocks, at least 1, plus unit_cost where there are more units than workers: else every worker has a piece or
// two. The units of a class lie on a line: tile by tile, the KV heads of a tile side by side, so that workers share keys in
// L2; or, HEAD_MAJOR, all tiles of head 0, then of head 1 ..., so that workers a head apart walk the same tokens in step and
// read neighbouring rows of a page together.
//
// Worker w of n owns the cost interval [w * total / n, (w + 1) * total / n). So a unit may be cut into pieces, but only the
// first and the last piece of a worker can be partial: partial results have fixed slots, 2w for a unit that began in an
// earlier worker and 2w + 1 for one that goes on in the next. The last worker to finish a piece merges them, in the
// workers' order. A partial row is its state (largest score in base 2, sum of the weights relative to it) and its output
// relative to the same score, not divided by the sum: exact for scores of any size, and the bits of a row alone are those
// beside empty pieces.
//
// With a fixed split (batch_invariant) a tile is cut beforehand into pieces that are units of their own, never cut again.
#pragma once
#include <stdint.h>

struct alignas(16) Request {
  int32_t q_start;   // first packed query token
  int32_t q_len;
  int32_t kv_len;    // length of the sequence: the last key is at position kv_len - 1
  int32_t kv_start;  // position of the first cached key: older ones were dropped
  int32_t q_offset;  // position of the first query
  int32_t kv_token;  // packed row of the key at position 0
  int64_t kv_base;   // paged: index of its first page in the page table; else the row of its first cached key
};

constexpr int ROUNDS = 3;  // shared prefixes of a request, at most

// Keys that several requests share (shared.py). Its rows are numbers in a list of query tokens.
struct alignas(16) Node {
  Request request;  // the keys, and as query tokens the rows; q_offset is their least position
  int32_t q_last;   // and the largest
  int32_t leader;   // the request whose page table is read
  int32_t reserved[2];
};
static_assert(sizeof(Node) == 48, "attngen/shared.py has the same layout");

// The keys of a node for all that asks what its rows can reach: q_len spans their positions instead of counting them.
__device__ __forceinline__ Request reach_of(Request keys, int32_t q_last) {
  const int64_t span = (int64_t)q_last - keys.q_offset + 1;
  keys.q_len = span < INT32_MAX ? (int32_t)span : INT32_MAX;
  return keys;
}

struct alignas(16) WorkTile {
  Request request;
  int32_t request_index;  // negative: the request is bad, its rows become NaN
  int32_t row0, rows;     // packed rows [row0, row0 + rows) of the request
  int32_t block0, blocks; // blocks of BN cache slots (slot j holds the key at position kv_start + j)
  int32_t piece, pieces;  // with a fixed split: which piece of its tile this is; else 0 of 1
  int32_t gap, gap_blocks;  // blocks from the gap-th on lie gap_blocks further: no row reaches those between
  int32_t spare;            // for the kernel's own use
  int64_t prefix;         // blocks, at least 1 a tile, of all earlier tiles

  __device__ __forceinline__ int32_t block(int32_t i) const { return block0 + i + (i >= gap ? gap_blocks : 0); }
};
static_assert(sizeof(Request) == 32 && sizeof(WorkTile) == 80, "attngen/space.py has the same layout");

struct alignas(16) Worker {
  int64_t begin, end, total;  // its interval, and the length of the line
  int32_t unit_cost, workers;
  int32_t tile, kv_head;      // the unit that holds `begin`; tile < 0: nothing to do
  int32_t tiles, offset;      // in the class; how far into that unit `begin` lies
  WorkTile first;             // a copy of that tile: one trip to memory less before the first load
};
static_assert(sizeof(Worker) == 128, "attngen/space.py has the same layout");

// A record in 16-byte words.
template <typename T> __device__ __forceinline__ T load_record(const T* source) {
  static_assert(sizeof(T) % 16 == 0, "records are read as 16-byte words");
  T record;
#pragma unroll
  for (int i = 0; i < (int)(sizeof(T) / 16); ++i) ((int4*)&record)[i] = ((const int4*)source)[i];
  return record;
}

// Where cp.async reads the keys and values of a page that is not there. All-ones is NaN in bf16 and in f16. Values of a negative
// page are zeros: such keys are masked, and a weight of 0 would not make up for a NaN.
#define AG_NAN4 {~0u, ~0u, ~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}
static __device__ const uint4 NAN_ROW[32] = {AG_NAN4, AG_NAN4, AG_NAN4, AG_NAN4, AG_NAN4, AG_NAN4, AG_NAN4, AG_NAN4};
static __device__ const uint4 ZERO_ROW[32] = {};

// One after another the units of a worker.
template <bool FIXED_SPLIT, bool HEAD_MAJOR = false> struct Cursor {
  WorkTile tile;
  int32_t index, kv_head;  // of the tile; of the unit
  int32_t begin, end;      // this worker's blocks of the unit, counted from tile.block0
  int64_t start;           // of the unit on the cost line

  __device__ __forceinline__ int32_t length(const Worker& w) const { return (tile.blocks > 1 ? tile.blocks : 1) + w.unit_cost; }
  __device__ __forceinline__ void enter(const Worker& w) {
    if (FIXED_SPLIT) {  // units are never cut: the worker that holds a unit's start has it whole
      begin = 0, end = start >= w.begin ? tile.blocks : 0;
      return;
    }
    const int64_t from = w.begin - start - w.unit_cost, to = w.end - start - w.unit_cost;
    begin = from > 0 ? (int32_t)from : 0;
    end = to < 0 ? 0 : to < tile.blocks ? (int32_t)to : tile.blocks;
  }
  __device__ __forceinline__ void open(const Worker& w) {
    tile = w.first, index = w.tile, kv_head = w.kv_head;
    start = w.begin - w.offset;
    enter(w);
  }
  // False at the end of the worker's interval.
  __device__ __forceinline__ bool advance(const Worker& w, const WorkTile* tiles, int num_kv_heads) {
    start += length(w);
    if (start >= w.end) return false;
    if (HEAD_MAJOR) {
      if (++index == w.tiles) index = 0, ++kv_head;
      if (w.tiles > 1) tile = load_record(tiles + index);
    } else if (++kv_head == num_kv_heads) {
      kv_head = 0, ++index;
      tile = load_record(tiles + index);
    }
    enter(w);
    return true;
  }
  // A unit without blocks belongs to the worker that holds its start; its rows are written all the same.
  __device__ __forceinline__ bool owns_empty(const Worker& w) const { return tile.blocks == 0 && start >= w.begin; }
};

// Where the pieces of a unit are, in the order in which they are merged.
struct Pieces {
  int32_t count;    // 1: the unit is whole and its result final
  int32_t mine;     // slot of the calling worker's piece
  int32_t counter;  // counts the pieces that have arrived
  int32_t first, base, stride;  // slot of piece 0; slot of piece i > 0 is base + i * stride

  __device__ __forceinline__ int32_t slot(int i) const { return i ? base + i * stride : first; }
};

template <bool FIXED_SPLIT, bool HEAD_MAJOR>
__device__ __forceinline__ Pieces find_pieces(const Cursor<FIXED_SPLIT, HEAD_MAJOR>& u, const Worker& w, int num_kv_heads) {
  if (FIXED_SPLIT) {  // each piece is a unit of its own, with a slot of its own
    const int32_t first = (u.index - u.tile.piece) * num_kv_heads + u.kv_head;
    return {u.tile.pieces, u.index * num_kv_heads + u.kv_head, first, first, first, num_kv_heads};
  }
  if (u.begin == 0 && u.end == u.tile.blocks) return {1, 0, 0, 0, 0, 0};
  // The worker that owns a place on the line: the last w with w * total / n <= place, ((place + 1) * n - 1) / total. Half a
  // 1 / total keeps the quotient, below 2^11, clear of integers; the product of doubles is exact enough for that.
  const double scale = 1.0 / (double)w.total;
  const auto owner = [&](int64_t place) { return (int32_t)(((double)((place + 1) * w.workers) - 0.5) * scale); };
  const int64_t first = u.start + w.unit_cost;
  const int32_t w0 = owner(first), w1 = owner(first + u.tile.blocks - 1), mine = 2 * (int32_t)blockIdx.x;
  return {w1 - w0 + 1, u.begin > 0 ? mine : mine + 1, w0, 2 * w0 + 1, 2 * w0, 2};
}

// Announces a piece whose results all threads of the block have written. True, in all threads, for the last piece of the
// unit: every other piece is then visible in L2, and the counter is 0 again for the next launch or graph replay. One thread releases
// what all have written and acquires for them, between barriers.
__device__ __forceinline__ bool arrive_last(int32_t* counter, int32_t pieces, int32_t* shared_flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomic_add_acq_rel(counter, 1) == pieces - 1;
    if (last) *counter = 0;
    *shared_flag = last;
  }
  __syncthreads();
  return *shared_flag;
}

// The device's verdict on its input, two words: what and in which request (append_kv: at which token), and the number that was
// found. The first error wins. attngen/status.py has the texts.
enum Wrong : int32_t {
  NEGATIVE_Q = 1, DECREASING_Q = 2, LONG_BATCH = 3, LONG_QUERY = 4, NEGATIVE_KV = 5, DECREASING_KV = 6, NEGATIVE_KV_LEN = 7, BAD_PAGE = 8,
  LAST_PAGE_LEN = 9, KV_START = 10, PAST_TABLE = 11, LONG_KEYS = 12, OVERLAPPING_Q = 13, BAD_PAGES = 14, LONG_POSITION = 15, BAD_REQUEST = 16,
  SHORT_Q = 32, SHORT_KV = 64, SHORT_MASK = 128,
};
__device__ __forceinline__ void report(int32_t* status, int32_t what, int32_t request, int32_t found) {
  if (atomicCAS(status, 0, what | request << 8) == 0) status[1] = found;
}
