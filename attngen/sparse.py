"""Block-sparse attention: rows of blocks in CSR form, over the kernels and the planner of batches.

    attn = BlockSparseAttention(Causal(), num_heads=32, num_kv_heads=8, head_dim=128, R=64, C=64, max_q_tokens=4096, max_kv_tokens=4096)
    attn.plan(indptr, indices)                        # which blocks of C keys each block of R queries attends to
    out = attn.run(q, k, v)

A row of blocks is a request of a batch, and its key blocks are its pages: k and v are read where they lie. Where heads differ in what
they attend to, a head's row of blocks is a request of its own. Hooks see true positions: of a page, that of the block that it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from .batch import BatchAttention
from .errors import ParameterError, UnsupportedError
from .expr import Node, apply, const, load, param, symbol, walk
from .fields import AXES, Field
from .masks import custom_mask, segment_packbits
from .ops import I32
from .spec import RopeTrace, Trace, Variant, as_variant, check_trace, compose, outside_dynamo
from .status import Wrong

_BAD_KEYS = (Wrong.NEGATIVE_KV, Wrong.DECREASING_KV, Wrong.NEGATIVE_KV_LEN, Wrong.LAST_PAGE_LEN, Wrong.KV_START)
_TOO_MANY = (Wrong.PAST_TABLE, Wrong.LONG_KEYS, Wrong.LONG_BATCH, Wrong.LONG_QUERY, Wrong.OVERLAPPING_Q)
_INT32_MAX = 2**31 - 1
_OF_HEADS = frozenset(("heads", "kv_heads"))
_SCALARS = ("q_len", "kv_len", "q_offset", "num_heads", "num_kv_heads", "row_blocks", "group")


# ---------------------------------------------------------------- hooks over blocks


def over_blocks(variant: Variant | type[Variant] | None, C: int, *, per_head: bool = False, masked: bool = False) -> Variant:  # noqa: N803
    """The variant whose kernels a BlockSparseAttention of ``variant`` loads (a VariableBlockSparseAttention: C=multiple, per_head=True), for
    sets that are built ahead: name it in a file, ``blocks = over_blocks(Causal(), 64)``, and list ``FILE.py:blocks``."""
    over: Variant = _OverBlocks(Full() if variant is None else as_variant(variant), C, per_head)
    if masked:
        from .variants import CustomMask

        over = compose(over, CustomMask())
    return over


def over_pages(variant: Variant | type[Variant], page_size: int) -> Variant:
    """``variant`` for batches whose page tables hold some of a sequence's pages, as a selection by top-k does: hooks see true positions.

    For ``BatchAttention(over_pages(variant, page_size), page_size=page_size, ...)``, whose page tables and lengths say what is
    selected, each request's newest page last. What hooks read more are parameters, of plan where the mask reads them, else of run:
    ``page_starts`` int32, for each entry of the page table the position of its page's first key (a block table's flattened),
    ``page_indptr`` int32 ``[requests + 1]``, where each request's entries begin, and
    ``seq_lens`` int32 ``[requests]``, keys of the whole sequence; the last query stands at the last of them.

    Raises UnsupportedError for a variant that reads at.kv_token, or whose RoPE depends on kv_len.
    """
    return _OverPages(as_variant(variant), page_size)


class _Placed(Variant):
    """``variant`` with other nodes in place of symbols: what its hooks read of ``at`` is that of the whole sequence."""

    renamed = frozenset()  # axes whose sizes are not those of the batch

    def __init__(self, variant: Variant, block: int) -> None:
        outside_dynamo("a variant over blocks")
        self._of, self._block = variant, block
        for name in variant.trace.used():
            self.__dict__[name] = variant.__dict__.get(name)

    def _places(self) -> dict[Node, Node]:
        """What stands for each symbol."""
        raise NotImplementedError

    def _placing(self) -> dict[str, Field]:
        """The parameters that it reads."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return f"{self._of.name} over blocks"

    def __repr__(self) -> str:
        return f"{self._of!r} over blocks"

    def _trace(self) -> Trace:
        old = self._of.trace
        if old.rope and old.rope.rope.needs_kv_lens:
            raise UnsupportedError(f"{self._of.name} over blocks: its RoPE's table depends on kv_len; give one that does not")
        done = dict(self._places())

        def placed(root: Node | None) -> Node | None:
            for node in () if root is None else walk(root):
                if node in done:
                    continue
                args = tuple(done[a] for a in node.args)
                if node.op == "load":
                    done[node] = load(node.attr[0], node.dtype, self._axes(node.attr[1]), args)
                else:
                    done[node] = apply(node.op, *args) if args else node
            return None if root is None else done[root]

        hooks = {name: placed(node) for name, node in old.hooks().items()}
        rope = old.rope and RopeTrace(
            old.rope.rope, tuple(map(placed, old.rope.q_positions)), placed(old.rope.kv_position), placed(old.rope.kind)
        )
        fields = {n: Field(f.kind, f.dtype, self._axes(f.axes), f.stored) for n, f in old.fields.items()} | self._placing()
        where = {done[node]: place for node, place in old.where.items() if node in done}
        trace = Trace(**hooks, rope=rope, scale=old.scale, fields=fields, where=where)
        check_trace(self.name, trace)
        return trace

    def _axes(self, names: Sequence[str | int]) -> tuple[str | int, ...]:
        """Axes of free names in place of those whose sizes are not the batch's."""
        return tuple(f"all {name}" if name in self.renamed else name for name in names)

    def _position(self, starts: str, entries: str, indptr: str) -> Node:
        """Of the key at ``kv`` of the table's keys."""
        kv = symbol("kv")
        first = load(indptr, I32, ("requests + 1",), (symbol("request"),))
        return load(starts, I32, (entries,), (first + kv // self._block,)) + kv % self._block


class _OverBlocks(_Placed):
    """For a batch whose requests are rows of blocks."""

    def __init__(self, variant: Variant, block: int, per_head: bool) -> None:
        self._per_head = per_head
        self.renamed = frozenset(AXES) - (frozenset() if per_head else _OF_HEADS)
        super().__init__(variant, block)

    def _placing(self) -> dict[str, Field]:
        return {
            "bsr_starts": Field("tensor", I32, ("bsr_entries",)), "bsr_indptr": Field("tensor", I32, ("requests + 1",)),
            **{f"bsr_{name}": Field("scalar", I32) for name in _SCALARS},
        }  # fmt: skip

    def _places(self) -> dict[Node, Node]:
        scalar = {name: param(f"bsr_{name}", I32) for name in _SCALARS}
        request, position = symbol("request"), self._position("bsr_starts", "bsr_entries", "bsr_indptr")
        places = {
            symbol("kv"): position, symbol("kv_token"): position, symbol("q_token"): symbol("q") - scalar["q_offset"], request: const(0),
            **{symbol(name): scalar[name] for name in ("q_len", "kv_len", "q_offset")},
        }  # fmt: skip
        if self._per_head:
            head = request // scalar["row_blocks"]
            places |= {symbol("head"): head, symbol("kv_head"): head // scalar["group"]}
            places |= {symbol(name): scalar[name] for name in ("num_heads", "num_kv_heads")}
        return places


class _OverPages(_Placed):
    """For a batch whose page tables hold a selection."""

    @property
    def name(self) -> str:
        return f"{self._of.name} over pages"

    def __repr__(self) -> str:
        return f"{self._of!r} over pages"

    def _placing(self) -> dict[str, Field]:
        return {
            "page_starts": Field("tensor", I32, ("page_entries",)), "page_indptr": Field("tensor", I32, ("requests + 1",)),
            "seq_lens": Field("tensor", I32, ("requests",)),
        }  # fmt: skip

    def _places(self) -> dict[Node, Node]:
        if any("kv_token" in node.symbols for node in self._of.trace.roots().values()):
            raise UnsupportedError(f"{self._of.name} over pages: it reads at.kv_token, and keys that are not selected have no row; read at.kv")
        length = load("seq_lens", I32, ("requests",), (symbol("request"),))
        first = length - symbol("q_len")
        return {
            symbol("kv"): self._position("page_starts", "page_entries", "page_indptr"), symbol("kv_len"): length, symbol("q_offset"): first,
            symbol("q"): symbol("q") - symbol("q_offset") + first,
        }  # fmt: skip


# ---------------------------------------------------------------- what both forms share


class _Sparse:
    """A BatchAttention whose requests are rows of blocks."""

    def __init__(
        self, variant: Variant | type[Variant] | None, *, num_heads: int, num_kv_heads: int, head_dim: int, max_q_tokens: int,
        max_kv_tokens: int, block: int, max_blocks: int, row_blocks: int, max_rows: int, per_head: bool, masked: bool, kv_layout: str,
        **more: Any,
    ) -> None:  # fmt: skip
        if kv_layout not in ("NHD", "HND"):
            raise ParameterError(f'kv_layout {kv_layout!r}: required "NHD" [tokens, heads, head_dim] or "HND" [heads, tokens, head_dim]')
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ParameterError(f"num_heads {num_heads}, num_kv_heads {num_kv_heads}: num_kv_heads must divide num_heads")
        if stray := [name for name in ("head_offset", "total_heads", "max_pages", "page_size") if name in more]:
            raise UnsupportedError(f"{stray[0]}=: required heads and blocks of one rank, by num_heads and max_blocks")
        self.variant = Full() if variant is None else as_variant(variant)
        if self.variant._made_for is not None:
            raise UnsupportedError(f"{self.variant.name} has a block mask of its own: give from_flex its mask_mod alone")
        if isinstance(self.variant.q_offset, torch.Tensor):
            raise UnsupportedError(f"{self.variant.name} counts queries from a tensor: give plan q_offset=, an int")
        self.num_heads, self.num_kv_heads, self.group = num_heads, num_kv_heads, num_heads // num_kv_heads
        self.kv_layout, self.max_q_tokens, self.max_kv_tokens = kv_layout, max_q_tokens, max_kv_tokens
        self._block, self._per_head, self._max_blocks = block, per_head, max_blocks
        heads = num_heads if per_head else 1
        if heads * max_q_tokens > _INT32_MAX or num_kv_heads * max_kv_tokens > _INT32_MAX:
            raise UnsupportedError(f"{heads} x {max_q_tokens} rows and {num_kv_heads} x {max_kv_tokens} keys: required below 2**31")
        over = over_blocks(self.variant, block, per_head=per_head, masked=masked)
        of_request = (1, 1) if per_head else (num_heads, num_kv_heads)
        self._attn = BatchAttention(
            over, num_heads=of_request[0], num_kv_heads=of_request[1], head_dim=head_dim, page_size=block, max_requests=heads * row_blocks, max_q_tokens=heads * max_q_tokens, max_q_len=max_rows, max_pages=max_blocks,
            max_kv_len=max_kv_tokens, kv_layout="NHD" if per_head else kv_layout, **more,
        )  # fmt: skip
        self.device, self.dtype = self._attn.device, self._attn.dtype
        self._placed: dict[str, Any] = {}  # parameters that place blocks, of run
        self._sizes = (0, 0)  # M, N of the plan
        self._fixed: dict[Any, tuple[torch.Tensor, ...]] = {}

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace that this object uses."""
        return self._attn.workspace_bytes

    # ---- plan
    def _lengths(self, M: int | None, N: int | None) -> tuple[int, int]:
        m, n = self.max_q_tokens if M is None else M, self.max_kv_tokens if N is None else N
        for name, value, most in (("M", m, self.max_q_tokens), ("N", n, self.max_kv_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ParameterError(f"{name} is {value!r}: required an int from 1 to the capacity {most}")
        return m, n

    def _pages(self, head: torch.Tensor | None, first_key: torch.Tensor, n: int) -> torch.Tensor:
        """Page numbers of blocks by the position of their first key, int64: blocks of all heads, or rows of k flattened."""
        if head is None:
            return first_key // self._block
        kv_head = head // self.group
        return first_key * self.num_kv_heads + kv_head if self.kv_layout == "NHD" else kv_head * n + first_key

    def _plan(
        self, q_indptr: torch.Tensor, q_positions: torch.Tensor, kv_indptr: torch.Tensor, pages: torch.Tensor, starts: torch.Tensor,
        sizes: tuple[int, int], q_offset: int, row_blocks: int, params: Mapping[str, Any], mask: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        values = {
            "starts": starts, "indptr": kv_indptr, "q_len": sizes[0], "kv_len": sizes[1], "q_offset": q_offset,
            "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "row_blocks": row_blocks, "group": self.group,
        }  # fmt: skip
        attn = self._attn
        placed = {f"bsr_{name}": value for name, value in values.items()}
        self._check_params(params, attn.plan_fields, sizes)
        last = self._kept("last", (len(kv_indptr) - 1, self._block), lambda: torch.full((len(kv_indptr) - 1,), self._block))[0]
        attn.plan(
            q_indptr, kv_indptr, pages, last, q_positions=q_positions,
            **{n: x for n, x in placed.items() if n in attn.plan_fields}, **mask, **params,
        )  # fmt: skip
        self._placed = {n: x for n, x in placed.items() if n in attn.run_fields}
        self._sizes, self._row_blocks = sizes, row_blocks

    def _kept(self, what: str, sizes: Any, make: Any) -> tuple[torch.Tensor, ...]:
        """Tensors that depend on sizes alone, made once: int32 on the device."""
        found = self._fixed.get((what, sizes))
        if found is None:
            made = make()
            if len(self._fixed) >= 64:
                self._fixed.clear()
            found = self._fixed[what, sizes] = tuple(
                t.to(torch.int32).to(self.device) for t in (made if isinstance(made, tuple) else (made,))
            )
        return found

    def _check_params(self, params: Mapping[str, Any], fields: Mapping[str, Any], sizes: tuple[int, int]) -> None:
        """Names, and axes that the batch of blocks does not know."""
        for name in params:
            if name not in self.variant.trace.fields:
                raise ParameterError(f"{self.variant.name} has no parameter `{name}`: it has {', '.join(self.variant.trace.fields) or 'none'}")
        known = {"heads": self.num_heads, "kv_heads": self.num_kv_heads, "requests": 1, "requests + 1": 2}
        least = {"positions": sizes[1], "q_tokens": sizes[0], "kv_tokens": sizes[1]}
        for name in fields:
            declared = self.variant.trace.fields.get(name)
            value = params.get(name)
            value = self.variant.__dict__.get(name) if value is None else value
            if declared is None or declared.kind != "tensor" or not isinstance(value, torch.Tensor) or value.dim() != len(declared.axes):
                continue
            for axis, size in zip(declared.axes, value.shape):
                if axis in known and size != known[axis]:
                    raise ParameterError(f"{self.variant.name}.{name} has {size} entries on axis {axis!r}: required {known[axis]}")
                if axis in least and size < least[axis]:
                    raise ParameterError(f"{self.variant.name}.{name} has {size} entries on axis {axis!r}: required {least[axis]} or more")

    def _offset(self, q_offset: int | None, sizes: tuple[int, int]) -> int:
        given = self.variant.q_offset if q_offset is None else q_offset
        return sizes[1] - sizes[0] if given is None else int(given)

    # ---- run
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None, return_lse: bool = False, **params: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention over the planned blocks.

        Args:
            q: ``[M, num_heads, head_dim]`` (NHD) or ``[num_heads, M, head_dim]`` (HND).
            k, v: ``[N, num_kv_heads, head_dim]`` or ``[num_kv_heads, N, head_dim]``.
            out: of q's layout, written and returned.
            return_lse: also return the natural-log LSE, float32 ``[M, num_heads]`` or ``[num_heads, M]``.
            **params: values of the fields that the mask does not read.

        A row without blocks has output 0 and LSE -inf. May be captured in a CUDA graph, with plan or without.
        """
        if not self._sizes[0]:
            raise ParameterError("run before plan: call plan(...) first")
        (m, n), hnd, attn = self._sizes, self.kv_layout == "HND", self._attn
        self._check_params(params, attn.run_fields, self._sizes)
        for name, t, tokens, heads in (("q", q, m, self.num_heads), ("k", k, n, self.num_kv_heads), ("v", v, n, self.num_kv_heads)):
            lead = (heads, tokens) if hnd else (tokens, heads)
            if not isinstance(t, torch.Tensor) or t.dim() != 3 or tuple(t.shape[:2]) != lead:
                found = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
                raise ParameterError(f"{name} is {found}: required [{lead[0]}, {lead[1]}, head_dim], {self.kv_layout}, as planned")
        if out is not None and out.shape != (*q.shape[:2], attn.head_dim_v):
            raise ParameterError(f"out is {tuple(out.shape)}: required {(*q.shape[:2], attn.head_dim_v)}, of q's layout")
        direct = None if out is None or hnd != self._per_head or not out.is_contiguous() else out
        if self._per_head:
            rows = (q if hnd else q.transpose(0, 1)).reshape(self.num_heads * m, 1, attn.head_dim)
            keys = self._as_pages("k", k), self._as_pages("v", v)
            direct = None if direct is None else direct.view(self.num_heads * m, 1, attn.head_dim_v)
        else:
            rows = q.transpose(0, 1) if hnd else q
            keys = tuple(t.unflatten(1, (-1, self._block)).transpose(0, 1) if hnd else t.unflatten(0, (-1, self._block)) for t in (k, v))
        found = attn.run(rows, keys, out=direct, return_lse=return_lse, **self._placed, **params)
        result, lse = found if return_lse else (found, None)
        if self._per_head:
            result = result.view(self.num_heads, m, attn.head_dim_v)
            lse = None if lse is None else lse.view(self.num_heads, m)
        if hnd != self._per_head:
            result, lse = result.transpose(0, 1), None if lse is None else lse.transpose(0, 1)
        if out is not None:
            result = out if direct is not None else out.copy_(result)
        return (result, lse) if return_lse else result

    def _as_pages(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """Each row of k or v as the first of a page, whatever its head: pages that overlap."""
        if t.stride(2) != 1 or t.stride(0) != t.shape[1] * t.stride(1):
            raise ParameterError(f"{name} has strides {t.stride()}: required contiguous, {self.kv_layout}, where heads have blocks of their own")
        slot = 1 if self.kv_layout == "HND" else self.num_kv_heads  # rows from a key to the next
        rows = t.shape[0] * t.shape[1] - (self._block - 1) * slot
        return t.as_strided((rows, self._block, 1, t.shape[2]), (t.stride(1), slot * t.stride(1), t.shape[2], 1))

    def check(self) -> None:
        """Wait for the device and raise ParameterError for what only the device could see: an indptr that decreases, a block's index out
        of range or not above the one before it, more blocks than there are, sizes that do not add up. The rows concerned are NaN."""
        if status := self._attn.engine.status():
            head, row = divmod(status.index, self._row_blocks) if self._per_head else (None, status.index)
            place = f"row block {row}" + ("" if head is None else f" of head {head}")
            text = next((text for causes, text in self._status_texts if status.what in causes), f"status {status.what}")
            raise ParameterError(f"{place}: {text}, found {status.found}")

    _status_texts: ClassVar[Sequence[tuple[Sequence[Wrong], str]]]

    def _vector(self, name: str, given: Any, dims: Sequence[int] = (1,)) -> torch.Tensor:
        """Ints on the device, int32."""
        tensor = torch.as_tensor(given)
        if tensor.dim() not in dims or (tensor.numel() and tensor.dtype not in (torch.int32, torch.int64)):
            wanted = " or ".join({1: "a vector", 2: "[heads, blocks]"}[d] for d in dims)
            raise ParameterError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: required int32, {wanted}")
        if tensor.device != self.device and tensor.device.type != "cpu":
            raise ParameterError(f"{name} is on {tensor.device}: required on {self.device}")
        if tensor.device.type == "cpu" and tensor.numel() and int(tensor.abs().max()) > _INT32_MAX:
            raise ParameterError(f"{name} has {int(tensor.abs().max())}: required ints of 32 bits")
        return tensor.to(torch.int32).to(self.device, non_blocking=True)


class Full(Variant):
    """Every query attends to every key of its blocks."""


# ---------------------------------------------------------------- blocks of one size


class BlockSparseAttention(_Sparse):
    """Attention where each block of ``R`` queries attends to a list of blocks of ``C`` keys, and within them as ``variant`` says.

    Args:
        variant: hooks and mask within the blocks, in true positions; None attends to all of a block.
        num_heads, num_kv_heads, head_dim, head_dim_v, dtype, device, workspace, storage, scale, batch_invariant: as BatchAttention's.
        R, C: rows and columns of a block. On Hopper, a C that is a multiple of 8, better of 64, is fastest.
        max_q_tokens, max_kv_tokens: the most queries M and keys N, multiples of nothing and of C.
        per_head: heads have lists of their own. k and v must then be contiguous, and NHD copies q.
        masked: plan takes ``mask`` or ``packed_mask`` too.
        kv_layout: "NHD" [tokens, heads, head_dim] or "HND" [heads, tokens, head_dim], of q, k, v and the output.

    Raises:
        UnsupportedError, ParameterError: what is required, what was found, what to do.
    """

    def __init__(
        self, variant: Variant | type[Variant] | None = None, *, num_heads: int, num_kv_heads: int, head_dim: int, R: int, C: int,
        max_q_tokens: int, max_kv_tokens: int, per_head: bool = False, masked: bool = False, kv_layout: str = "NHD", **more: Any,
    ) -> None:  # fmt: skip
        _check_positive(R=R, C=C, max_q_tokens=max_q_tokens, max_kv_tokens=max_kv_tokens)
        if max_kv_tokens % C:
            raise ParameterError(f"max_kv_tokens {max_kv_tokens}: required a multiple of C={C}; pad k and v, or use VariableBlockSparseAttention")
        if masked and per_head:
            raise UnsupportedError("masked with per_head: masks within blocks are shared by all heads; declare a mask that reads at.head")
        self.R, self.C, self._masked = R, C, masked
        super().__init__(
            variant, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, max_q_tokens=max_q_tokens,
            max_kv_tokens=max_kv_tokens, block=C, max_blocks=max_kv_tokens // C, row_blocks=-(-max_q_tokens // R),
            max_rows=min(R, max_q_tokens), per_head=per_head, masked=masked, kv_layout=kv_layout, **more,
        )  # fmt: skip

    def plan(
        self, indptr: Any, indices: Any, *, M: int | None = None, N: int | None = None, mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None, q_offset: int | None = None, **params: Any,
    ) -> None:  # fmt: skip
        """Lay out the blocks, on the current stream and without a sync.

        Args:
            indptr: int32 ``[row blocks + 1]``, where each row's blocks begin in indices; with per_head ``[heads, row blocks + 1]``, of
                num_heads or num_kv_heads, which begin where the head before them ends.
            indices: int32 ``[blocks]``, each row's column blocks, ascending.
            M, N: queries and keys; default the capacities. N is a multiple of C, and there are ceil(M / R) row blocks.
            mask: bool ``[blocks, R, C]``, True attends.
            packed_mask: uint8, the same packed as FlashInfer does: of each row of blocks the bits ``[R, blocks of the row * C]``, from a
                byte of their own on (``segment_packbits``).
            q_offset: the position of the first query; default the variant's, else N - M.
            **params: values of the fields that the variant's mask reads.
        """
        sizes = m, n = self._lengths(M, N)
        R, C = self.R, self.C
        if n % C:
            raise ParameterError(f"N is {n}: required a multiple of C={C}; pad k and v, or use VariableBlockSparseAttention")
        row_blocks, column_blocks = -(-m // R), n // C
        host = _host(indptr, indices)
        starts = self._vector("indptr", indptr, (2,) if self._per_head else (1,))
        columns = self._vector("indices", indices)
        if starts.shape[-1] != row_blocks + 1 or (self._per_head and starts.shape[0] not in (self.num_heads, self.num_kv_heads)):
            heads = f"[{self.num_heads} or {self.num_kv_heads}, {row_blocks + 1}]" if self._per_head else f"[{row_blocks + 1}]"
            raise ParameterError(f"indptr has shape {tuple(starts.shape)}: required {heads}, ceil(M / R) row blocks and one more")
        if host is not None:
            _check_csr(*host, column_blocks)
        if (mask is not None or packed_mask is not None) != self._masked:
            what = "plan got no mask, and the object is made with masked=True" if self._masked else "plan got a mask"
            raise ParameterError(f"{what}: required masked=True at construction where plans have masks, and a mask in each")
        lists = 1
        if self._per_head:
            lists = starts.shape[0]
            flat = torch.cat([starts[:, :-1].reshape(-1), starts[-1, -1:]])
            # Each head begins where the one before ends.
            joined = (starts[1:, 0] == starts[:-1, -1]).all() if lists > 1 else torch.ones((), dtype=torch.bool, device=self.device)
            flat = torch.where(joined, flat, -1)
        else:
            flat = starts
        heads = self.num_heads if self._per_head else 1
        first, bad = _rows_of(flat, columns, column_blocks)
        row = first
        if heads != lists:  # a KV head's lists serve each of its query heads
            flat, source, row = _repeated(flat, columns.shape[0], heads // lists, row_blocks)
            columns, bad = columns[source], bad[source]
        starts_at = columns * C
        pages = self._pages(row // row_blocks if self._per_head else None, starts_at.long(), n)
        pages = torch.where(bad, _INT32_MAX, pages).to(torch.int32)
        q_indptr, q_positions = self._rows(sizes, row_blocks, heads, self._offset(q_offset, sizes))
        extra: Mapping[str, torch.Tensor] = {}
        if self._masked:
            extra = self._mask(mask, packed_mask, flat, columns.shape[0], q_indptr, m, n)
        self._plan(q_indptr, q_positions, flat, pages, starts_at, sizes, self._offset(q_offset, sizes), row_blocks, params, extra)

    def _rows(self, sizes: tuple[int, int], row_blocks: int, heads: int, offset: int) -> tuple[torch.Tensor, ...]:
        """q_indptr and q_positions of the row blocks of all heads."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            first = torch.arange(row_blocks) * self.R
            begins = (torch.arange(heads)[:, None] * sizes[0] + first).flatten()
            return torch.cat([begins, torch.tensor([heads * sizes[0]])]), (first + offset).repeat(heads)

        return self._kept("rows", (sizes, heads, offset), make)

    def _mask(
        self, mask: torch.Tensor | None, packed: torch.Tensor | None, indptr: torch.Tensor, blocks: int, q_indptr: torch.Tensor, m: int, n: int
    ) -> dict[str, torch.Tensor]:
        if mask is not None and packed is not None:
            raise ParameterError("plan got mask and packed_mask: give one")
        size = self.R * self.C
        if indptr.shape[0] * self.R * n > 8 * _INT32_MAX:
            raise UnsupportedError(f"masks of {m} x {n} queries and keys: required below 2**34 bits")
        ends = indptr.long() * size
        if mask is not None:
            if mask.dtype != torch.bool or tuple(mask.shape) != (blocks, self.R, self.C) or mask.device != self.device:
                raise ParameterError(
                    f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}: required torch.bool ({blocks}, {self.R}, {self.C}), one "
                    f"matrix a block, on {self.device}"
                )
            packed, mask_indptr = segment_packbits(self._by_rows(mask, indptr), ends)
        else:
            if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device != self.device:
                raise ParameterError(f"packed_mask is {packed.dtype} {tuple(packed.shape)} on {packed.device}: required torch.uint8 [bytes] on {self.device}")
            if packed.shape[0] * 8 < blocks * size:
                raise ParameterError(f"packed_mask has {packed.shape[0]} bytes: required {-(-blocks * size // 8)} or more, R x C bits a block")
            mask_indptr = torch.zeros_like(indptr)
            mask_indptr[1:] = torch.cumsum((ends.diff() + 7) // 8, 0)
        return custom_mask(packed, q_indptr=q_indptr, kv_lens=indptr.diff() * self.C, mask_indptr=mask_indptr, num_tokens=m)

    def _by_rows(self, mask: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
        """Of each row of blocks [blocks, R, C] as [R, blocks * C]: the bools of its queries one after another."""
        if not mask.numel():
            return mask.flatten()
        place, size = torch.arange(mask.numel(), device=self.device), self.R * self.C
        row = (torch.searchsorted(indptr, place // size, right=True) - 1).clamp(0, indptr.shape[0] - 2)
        first, width = indptr[row].long(), (indptr[row + 1] - indptr[row]).long().clamp(min=1) * self.C
        inside = place - first * size
        i, column = inside // width, inside % width
        source = ((first + column // self.C) * self.R + i) * self.C + column % self.C
        return mask.flatten()[source.clamp(0, mask.numel() - 1)]

    _status_texts = (
        ((Wrong.BAD_PAGE,), "an index in indices is out of range, 0 ... N / C - 1, or not above the one before it"),
        (_BAD_KEYS, "indptr is negative or decreases, or a head's does not begin where the one before ends"),
        (_TOO_MANY, "indptr ends past the entries of indices"),
    )


def _check_positive(**sizes: Any) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name} is {value!r}: required an int of at least 1")


def _host(*given: Any) -> list[torch.Tensor] | None:
    """The vectors, where the host knows them."""
    if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in given):
        return None
    return [torch.as_tensor(x) for x in given]


def _check_csr(indptr: torch.Tensor, indices: torch.Tensor, column_blocks: int) -> None:
    starts = indptr.reshape(-1, indptr.shape[-1]).long()
    if starts.numel() and int(starts[0, 0]) != 0 or (starts.diff(dim=1) < 0).any() or (starts[1:, 0] != starts[:-1, -1]).any():
        raise ParameterError("indptr: required to begin with 0 and not to decrease, each head where the one before ends")
    count = int(starts[-1, -1])
    if count > indices.shape[0]:
        raise ParameterError(f"indptr ends with {count} and indices has {indices.shape[0]} entries: required that many")
    wrong = ((indices < 0) | (indices >= column_blocks))[:count].nonzero().flatten().tolist()
    if wrong:
        raise ParameterError(f"indices[{wrong[0]}] is {int(indices[wrong[0]])}: required a column block, 0 to {column_blocks - 1}")
    first = torch.zeros(count + 1, dtype=torch.bool)
    first[starts.flatten()] = True
    wrong = ((indices[1:count] <= indices[: max(count - 1, 0)]) & ~first[1:count]).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0] + 1
        raise ParameterError(
            f"indices[{i}] is {int(indices[i])} after {int(indices[i - 1])} in one row: required ascending column blocks, each once.\n"
            "  do: sort each row, torch.sort or scipy's sort_indices"
        )


def _rows_of(indptr: torch.Tensor, columns: torch.Tensor, column_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each entry its row, and whether it is out of range or not above the one before it in its row."""
    entry = torch.arange(columns.shape[0], dtype=torch.int32, device=columns.device)
    row = (torch.searchsorted(indptr, entry, right=True) - 1).clamp(0, max(indptr.shape[0] - 2, 0))
    before = columns.roll(1)
    bad = (columns < 0) | (columns >= column_blocks) | ((entry != indptr[row]) & (columns <= before))
    return row, bad


def _repeated(
    indptr: torch.Tensor, entries: int, times: int, row_blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of rows, ``times`` for each run of ``row_blocks``: indptr, of each new entry the old one, and its row."""
    device, rows = indptr.device, indptr.shape[0] - 1
    old = torch.arange(rows, device=device).view(-1, 1, row_blocks).expand(-1, times, row_blocks).reshape(-1)
    found = torch.zeros(rows * times + 1, dtype=torch.int32, device=device)
    found[1:] = torch.cumsum(indptr.diff()[old], 0)
    entry = torch.arange(entries * times, dtype=torch.int32, device=device)
    row = (torch.searchsorted(found, entry, right=True) - 1).clamp(0, rows * times - 1)
    source = (indptr[old[row]] + entry - found[row]).clamp(0, max(entries - 1, 0))
    return found, source.long(), row


# ---------------------------------------------------------------- blocks of any sizes


class VariableBlockSparseAttention(_Sparse):
    """Attention over a block mask whose blocks have sizes of their own, which may differ by head.

    Args:
        max_q_tokens, max_kv_tokens: the most queries M and keys N.
        max_row_blocks, max_row_size: the most row blocks, and the most queries of one.
        multiple: sizes of column blocks are multiples of it (pages of so many keys). On Hopper, one that is a multiple of 8, better of 64, is
            fastest; 1 serves all.
        max_blocks: the most pages of ``multiple`` keys that all rows of all heads attend to, together; default all.
        kv_layout: "HND" (FlashInfer's) [heads, tokens, head_dim] or "NHD", where q is copied; of q, k, v and the output.
        others: as BlockSparseAttention's.
    """

    def __init__(
        self, variant: Variant | type[Variant] | None = None, *, num_heads: int, num_kv_heads: int, head_dim: int, max_q_tokens: int,
        max_kv_tokens: int, max_row_blocks: int, max_row_size: int | None = None, multiple: int = 1, max_blocks: int | None = None,
        kv_layout: str = "HND", **more: Any,
    ) -> None:  # fmt: skip
        _check_positive(max_q_tokens=max_q_tokens, max_kv_tokens=max_kv_tokens, max_row_blocks=max_row_blocks, multiple=multiple)
        if max_kv_tokens % multiple:
            raise ParameterError(f"max_kv_tokens {max_kv_tokens}: required a multiple of multiple={multiple}")
        self.multiple, self.max_row_blocks = multiple, max_row_blocks
        pages = num_heads * max_row_blocks * (max_kv_tokens // multiple)
        if max_blocks is None and pages > _INT32_MAX:
            raise UnsupportedError(f"{pages} pages, if all rows attend to all keys: required below 2**31; give max_blocks=")
        super().__init__(
            variant, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, max_q_tokens=max_q_tokens,
            max_kv_tokens=max_kv_tokens, block=multiple, max_blocks=pages if max_blocks is None else max_blocks, row_blocks=max_row_blocks,
            max_rows=max_row_size or max_q_tokens, per_head=True, masked=False, kv_layout=kv_layout, **more,
        )  # fmt: skip

    def plan(
        self, block_mask_map: torch.Tensor, block_row_sz: Any, block_col_sz: Any, *, M: int | None = None, N: int | None = None,
        q_offset: int | None = None, **params: Any,
    ) -> None:  # fmt: skip
        """Lay out the blocks, on the current stream and without a sync. Arguments as FlashInfer's.

        Args:
            block_mask_map: bool ``[heads, row blocks, column blocks]``, of num_kv_heads or num_heads: True attends.
            block_row_sz: int32 ``[heads, row blocks]``, queries of each, M together.
            block_col_sz: int32 ``[heads, column blocks]``, keys of each, N together, multiples of ``multiple``.
            M, N, q_offset, **params: as BlockSparseAttention's.
        """
        sizes = m, n = self._lengths(M, N)
        page = self.multiple
        if n % page:
            raise ParameterError(f"N is {n}: required a multiple of multiple={page}")
        if not isinstance(block_mask_map, torch.Tensor) or block_mask_map.dtype != torch.bool or block_mask_map.dim() != 3:
            found = f"{block_mask_map.dtype} {tuple(block_mask_map.shape)}" if isinstance(block_mask_map, torch.Tensor) else type(block_mask_map).__name__
            raise ParameterError(f"block_mask_map is {found}: required torch.bool [heads, row blocks, column blocks]")
        lists, row_blocks, column_blocks = block_mask_map.shape
        if lists not in (self.num_heads, self.num_kv_heads) or not 1 <= row_blocks <= self.max_row_blocks or not column_blocks:
            raise ParameterError(
                f"block_mask_map is of {lists} heads, {row_blocks} row blocks and {column_blocks} column blocks: required {self.num_heads} or "
                f"{self.num_kv_heads} heads, 1 to max_row_blocks={self.max_row_blocks}, and 1 or more"
            )
        host = _host(block_row_sz, block_col_sz)
        rows, columns = self._vector("block_row_sz", block_row_sz, (2,)), self._vector("block_col_sz", block_col_sz, (2,))
        for name, t, count in (("block_row_sz", rows, row_blocks), ("block_col_sz", columns, column_blocks)):
            if tuple(t.shape) != (lists, count):
                raise ParameterError(f"{name} has shape {tuple(t.shape)}: required {(lists, count)}, as block_mask_map's")
        if host is not None:
            _check_sizes(*host, sizes, page, self._attn.max_q_len)
        keep = block_mask_map.to(self.device, non_blocking=True)
        times = self.num_heads // lists
        if times > 1:
            keep, rows, columns = (t.repeat_interleave(times, 0) for t in (keep, rows, columns))
        # ---- of each page of each head its column block, and whether each row attends to it
        ends = columns.cumsum(1)
        first_key = torch.arange(0, n, page, device=self.device)
        block = torch.searchsorted(ends, first_key.expand(self.num_heads, -1).contiguous(), right=True).clamp(max=column_blocks - 1)
        keep = keep.gather(2, block[:, None].expand(-1, row_blocks, -1)).view(self.num_heads * row_blocks, -1)
        counts = keep.sum(1)
        indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=indptr[1:])
        # ---- the pages one after another; what has no room goes to one place past the end, and indptr says so
        capacity = self._max_blocks
        place = (keep.flatten().cumsum(0) - 1).clamp(max=capacity)
        place = torch.where(keep.flatten(), place, capacity)
        heads = torch.arange(self.num_heads, device=self.device)[:, None]
        number = self._pages(heads, first_key, n).to(torch.int32)  # [heads, pages]
        number = number[:, None].expand(-1, row_blocks, -1).reshape(-1)
        starts = first_key.to(torch.int32).repeat(self.num_heads * row_blocks)
        pages, starts_at = (torch.zeros(capacity + 1, dtype=torch.int32, device=self.device) for _ in range(2))
        pages.scatter_(0, place, number)
        starts_at.scatter_(0, place, starts)
        good = (rows >= 0).all() & (columns >= 0).all() & (columns % page == 0).all() & (rows.sum(1) == m).all() & (ends[:, -1] == n).all()
        kv_indptr = torch.where(good, indptr.clamp(max=_INT32_MAX), -1).to(torch.int32)
        # ---- rows
        offset = self._offset(q_offset, sizes)
        begins = rows.cumsum(1) - rows
        q_positions = (begins + offset).to(torch.int32).flatten()
        q_indptr = torch.full((self.num_heads * row_blocks + 1,), self.num_heads * m, dtype=torch.int32, device=self.device)
        q_indptr[:-1] = torch.where(good, begins + heads * m, heads * m).to(torch.int32).flatten()
        self._plan(q_indptr, q_positions, kv_indptr, pages[:capacity], starts_at[:capacity], sizes, offset, row_blocks, params, {})

    _status_texts = (
        (_BAD_KEYS, "sizes are negative, do not add up to M and N, or are no multiples of multiple="),
        (_TOO_MANY, "more pages than max_blocks, or more queries than max_row_size"),
    )


def _check_sizes(rows: torch.Tensor, columns: torch.Tensor, sizes: tuple[int, int], page: int, most: int) -> None:
    for name, t, total in (("block_row_sz", rows, sizes[0]), ("block_col_sz", columns, sizes[1])):
        if (t < 0).any():
            raise ParameterError(f"{name} has {int(t.min())}: required sizes of at least 0")
        for head, found in enumerate(t.sum(1).tolist()):
            if found != total:
                raise ParameterError(f"{name} of head {head} adds up to {found}: required {'M' if name == 'block_row_sz' else 'N'}, {total}")
    if rows.numel() and int(rows.max()) > most:
        raise ParameterError(f"block_row_sz has {int(rows.max())}: required at most max_row_size={most}")
    if (columns % page).any():
        raise ParameterError(f"block_col_sz has {int(columns[columns % page != 0][0])}: required multiples of multiple={page}")
