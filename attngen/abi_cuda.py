"""Field lists of the CUDA kernels' parameter structs (see abi.py), and the records that the planner writes.

A kernel's whole struct is ``Layout(FIELDS + parameter_fields(...))``: attention and decode kernels take all of the
variant's parameters, the planner those that its mask reads.
"""

from __future__ import annotations

CUDA_ABI = "attngen-cuda-3"

_SHAPE: tuple[tuple[str, str], ...] = tuple(
    ("int32_t", name) for name in ("num_heads", "num_kv_heads", "head_offset", "total_heads", "page_size")
)

# Decode and attention. Strides count elements. Paged caches: *_stride_b is a page, *_stride_s a slot in it; contiguous
# ones: *_stride_b is a request (0 when ragged), *_stride_s a key. Rows of q, out and lse are at token * *_stride_t +
# request * *_stride_b: 0 when packed; dense, a request's stride less those of the q_len tokens that it counts. q_rows: tokens
# of q; num_pages: of the cache, without pages the rows of k and v (dense: those of a request). partial: out is float32 and
# lse base 2, before the sink and the output hook. partial_out, partial_state: of pieces of units (work.cuh). ran: a
# launch since the plan has waited for it, so the work list is there whatever the kernel before this one does.
ATTENTION_FIELDS: tuple[tuple[str, str], ...] = (
    ("const void*", "q"), ("const void*", "k"), ("const void*", "v"), ("void*", "out"), ("float*", "lse"),
    *(("int64_t", f"q_stride_{d}") for d in "bth"),
    *(("int64_t", f"{x}_stride_{d}") for x in "kv" for d in "bsh"),
    *(("int64_t", f"{x}_stride_{d}") for x in ("out", "lse") for d in "bth"),
    ("const WorkTile*", "tiles"), ("const Worker*", "workers"), ("int32_t*", "counters"),
    ("float*", "partial_out"), ("float2*", "partial_state"), ("int32_t*", "status"),
    ("const int32_t*", "page_table"), ("const float*", "rope_inv_freq"), ("const int32_t*", "rope_table"),
    *_SHAPE, ("int32_t", "q_rows"), ("int32_t", "num_pages"), ("int32_t", "partial"), ("int32_t", "ran"), ("float", "scale"), ("float", "rope_mscale"),
)  # fmt: skip

# The same for the Hopper kernel, whose class is of kind "queue". k_map, v_map: keys and values as the copy engine sees them, in
# boxes of box_rows slots of a page, without pages of a block. q_map, if q_boxes: queries, in boxes of 64 packed rows.
_QUEUED = {
    "tiles": (("const QueuedRequest*", "requests"), ("const int32_t*", "unit_starts")),
    "workers": (("Queue*", "queue"),),
}
QUEUE_ATTENTION_FIELDS: tuple[tuple[str, str], ...] = tuple(
    field for found in ATTENTION_FIELDS for field in _QUEUED.get(found[1], (found,))
) + (("int32_t", "q_boxes"), ("int32_t", "box_rows"), ("TensorMap", "q_map"), ("TensorMap", "k_map"), ("TensorMap", "v_map"))

# Beside those of the Hopper kernel, where its rows are of several requests: of each row of a node (shared.py) the query token and its
# position. All results are partial: first node_rows rows, [node row, head], of nodes that are one piece, then pieces of tiles.
MIXED_FIELDS: tuple[tuple[str, str], ...] = (("const int2*", "members"), ("int64_t", "node_rows"))

# Beside those of a decode kernel that joins what shared prefixes give: of each request and round its node, or -1, the node's first row,
# and among its rows that of the request's first query token; of each node its pieces and their first slot; their results.
# Null shared_rows: there are none.
JOIN_FIELDS: tuple[tuple[str, str], ...] = (
    ("const int4*", "shared_rows"), ("const int2*", "node_parts"), ("const float*", "node_out"), ("const float2*", "node_state"),
    ("int64_t", "node_rows"),
)  # fmt: skip

# At most this many row-tile classes share a plan.
MAX_CLASSES = 4

# The planner. Exactly one way to give lengths of queries (q_indptr; or q_len each, with q_lens where they are shorter)
# and of keys: kv_indptr + kv_last_page_len (pages), kv_lens + block_table_stride (pages), kv_indptr (ragged), kv_lens or
# kv_len (dense). Unused pointers are null. Per class: its lists, tiles and workers or, of kind "queue", requests, unit_starts
# and queue; how many workers it has, 0 where it is not launched, and how many tiles or partial results there is room for.
PLAN_FIELDS: tuple[tuple[str, str], ...] = (
    ("const int32_t*", "q_indptr"), ("const int32_t*", "q_lens"), ("const int32_t*", "q_positions"),
    ("const int32_t*", "kv_indptr"), ("const int32_t*", "kv_last_page_len"), ("const int32_t*", "kv_lens"),
    ("const int32_t*", "kv_starts"),
    *((ctype, f"{name}{i}") for i in range(MAX_CLASSES)
      for ctype, name in (("WorkTile*", "tiles"), ("Worker*", "workers"), ("QueuedRequest*", "requests"),
                          ("int32_t*", "unit_starts"), ("Queue*", "queue"), ("int32_t*", "counters"))),
    ("int32_t*", "status"), ("int64_t", "block_table_stride"), ("int64_t", "kv_capacity"),
    *((("int32_t"), f"{name}{i}") for i in range(MAX_CLASSES) for name in ("num_workers", "max_tiles", "max_slots")),
    *_SHAPE, ("int32_t", "num_requests"), ("int32_t", "q_len"), ("int32_t", "kv_len"), ("int32_t", "max_q_tokens"),
    ("int32_t", "max_q_len"), ("int32_t", "max_kv_len"),
)  # fmt: skip

# Beside those of a planner that has a mixed class, its last: the lists of that class; what share.cu found, shared_tokens null where
# requests keep all of their keys.
MIXED_PLAN_FIELDS: tuple[tuple[str, str], ...] = (
    ("QueuedRequest*", "requests_nodes"), ("int32_t*", "unit_starts_nodes"), ("Queue*", "queue_nodes"), ("int32_t*", "counters_nodes"),
    ("const int32_t*", "shared_tokens"), ("const Node*", "nodes"), ("const int32_t*", "num_nodes"), ("int2*", "node_parts"),
    ("int32_t", "num_workers_nodes"), ("int32_t", "max_slots_nodes"),
)  # fmt: skip

# share: finds what requests share, from their lengths as the planner takes them and their page table. groups, where they are
# given: the number of each request's group, negative for none. window: keys that a row reaches at most, INT32_MAX for all.
SHARE_FIELDS: tuple[tuple[str, str], ...] = (
    ("const int32_t*", "q_indptr"), ("const int32_t*", "q_lens"), ("const int32_t*", "q_positions"),
    ("const int32_t*", "kv_indptr"), ("const int32_t*", "kv_last_page_len"), ("const int32_t*", "kv_lens"),
    ("const int32_t*", "kv_starts"), ("const int32_t*", "page_table"), ("const int32_t*", "groups"),
    ("Node*", "nodes"), ("int32_t*", "num_nodes"), ("int32_t*", "shared_tokens"), ("int4*", "shared_rows"), ("int2*", "members"),
    ("int32_t*", "status"), ("int64_t", "block_table_stride"), ("int64_t", "kv_capacity"), ("int64_t", "least_gain"),
    ("int32_t", "page_size"), ("int32_t", "num_requests"), ("int32_t", "q_len"), ("int32_t", "kv_len"), ("int32_t", "max_q_tokens"),
    ("int32_t", "max_q_len"), ("int32_t", "max_kv_len"), ("int32_t", "group"), ("int32_t", "most_rows"), ("int32_t", "window"),
)  # fmt: skip

# append_kv: new keys and values, packed [tokens, kv_heads, head_dim | head_dim_v], into the pages of a cache. A token goes
# to slot_mapping[token] = page * page_size + slot, or, where that is null, to positions[token] of request_of[token], whose
# pages start at page_indptr[request] or at request * block_table_stride of page_table. page_table_size counts the entries
# that page_indptr may reach, or those of a block table's row. Where a slot, position, request or page is negative the token
# is skipped. With RoPE, keys are rotated to positions[token], by row rope_table[request_of[token]] of inv_freq.
# A call fills the pointers alone.
APPEND_FIELDS: tuple[tuple[str, str], ...] = (
    ("const void*", "k"), ("const void*", "v"), ("void*", "k_cache"), ("void*", "v_cache"),
    ("const int64_t*", "slot_mapping"), ("const int32_t*", "positions"), ("const int32_t*", "request_of"),
    ("const int32_t*", "page_table"), ("const int32_t*", "page_indptr"), ("const float*", "rope_inv_freq"),
    ("const int32_t*", "rope_table"), ("int32_t*", "status"), ("int64_t", "block_table_stride"),
    ("int64_t", "page_table_size"), ("int32_t", "num_tokens"), ("int32_t", "num_requests"),
    *(("int64_t", f"{x}_stride_{d}") for x in "kv" for d in "th"),
    *(("int64_t", f"{x}_cache_stride_{d}") for x in "kv" for d in "bsh"),
    ("int32_t", "num_kv_heads"), ("int32_t", "page_size"), ("int32_t", "num_pages"), ("float", "rope_mscale"),
)  # fmt: skip

# custom_mask: rows of packed bits, one a query token. A row of request r has kv_lens[r] bits; the request's first is bit 0 of byte
# mask_indptr[r] of num_bytes. Null q_indptr: a token a request. Writes what CustomMask says of begin, run and end.
MASK_FIELDS: tuple[tuple[str, str], ...] = (
    ("const uint8_t*", "mask"), ("const int32_t*", "mask_indptr"), ("const int32_t*", "q_indptr"), ("const int32_t*", "kv_lens"),
    ("int32_t*", "mask_begin"), ("int32_t*", "mask_run"), ("int32_t*", "mask_end"), ("int32_t*", "status"),
    ("int64_t", "num_bytes"), ("int32_t", "num_tokens"), ("int32_t", "num_requests"),
)  # fmt: skip

# merge_states: state i is out and lse number i % MERGE_POINTERS, i // MERGE_POINTERS times the *_stride_states further.
# Strides count elements; states share theirs, the result is contiguous. log2_base is the logarithm of
# the base to 2, log_2 its inverse. Null lse0: plain sums.
MERGE_POINTERS = 8
MERGE_FIELDS: tuple[tuple[str, str], ...] = (
    *(("const void*", f"out{i}") for i in range(MERGE_POINTERS)),
    *(("const float*", f"lse{i}") for i in range(MERGE_POINTERS)),
    ("void*", "merged_out"), ("float*", "merged_lse"),
    *(("int64_t", f"{x}_stride_{d}") for x in ("out", "lse") for d in ("states", "t", "h")),
    ("int64_t", "num_rows"), ("int32_t", "num_states"), ("int32_t", "num_heads"), ("float", "log2_base"),
    ("float", "log_2"),
)  # fmt: skip


def zone_fields(names: tuple[str, ...], writes: bool) -> tuple[tuple[str, str], ...]:
    """Zone maps of these tensors: where they are, and how many zones of 32 entries a row has; the planner ``writes`` them."""
    return tuple((("int2*" if writes else "const int2*"), f"zones_{n}") for n in names) + tuple(("int32_t", f"zone_count_{n}") for n in names)
