"""New keys and values into the pages of a KV cache, RoPE fused: one small kernel on a GPU, torch operations on the CPU.

    request_of, positions = append_positions(q_indptr, kv_lens, num_tokens=len(k))
    append_kv(k, v, (k_cache, v_cache), positions=positions, request_of=request_of, block_table=block_table, rope=rope)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from . import cuda
from .abi_cuda import APPEND_FIELDS
from .cache import Entry
from .choose_cuda import AppendConfig, arch_named
from .devices import as_device, cuda_index
from .errors import ParameterError, UnsupportedError
from .library import NO_GRAD, define
from .params import DTYPE_NAMES, MAX_LENGTH, check_dtype
from .rope import RoPE, alive, rotate
from .status import STATUS_WORDS, Status, Wrong

_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_DTYPES = (*_CUDA_DTYPES, torch.float32)
_INT32_MAX = 2**31 - 1
_POINTERS = struct.Struct("=12Q")  # the first of APPEND_FIELDS
_MAX_SITES = 1024
_KERNELS = ("cuda",)  # devices that a kernel serves; tests add the CPU, where they run the kernel's text


@dataclass(frozen=True)
class _Loaded:
    """The kernel on a device."""

    kernel: Any  # host extension's CudaKernel
    config: AppendConfig
    special: cuda.Specialised
    inv_freq: torch.Tensor | None
    status: torch.Tensor  # the device's


@dataclass(frozen=True)
class _Site:
    """The checked shapes, strides and dtypes of a call, and what serves them."""

    num_tokens: int
    requests: int
    pages: int
    page_size: int
    head_dim: int
    loaded: _Loaded | None = None  # None on the CPU
    template: bytes = b""  # the kernel's struct, but for its pointers
    second: int = 0  # bytes from k_cache to v_cache, where they are one tensor


_sites: dict[Any, _Site] = {}
_loaded: dict[Any, _Loaded] = {}
_status: dict[int, torch.Tensor] = {}


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    slot_mapping: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    request_of: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    kv_lens: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    rope: RoPE | None = None,
) -> None:
    """Write new keys and values into the pages of a cache, in place.

    Where token i goes: to ``slot_mapping[i]``, or to ``positions[i]`` of request ``request_of[i]``, whose pages
    ``kv_indices`` and ``kv_indptr``, or ``block_table``, give. A token whose slot, position, request or page is negative is
    skipped, and so are rows of k and v past the index tensors' end. No two tokens may share a slot.

    Args:
        k, v: ``[tokens, num_kv_heads, head_dim]`` and ``[tokens, num_kv_heads, head_dim_v]``; bfloat16 or float16, on the
            CPU float32 too. Head sizes and strides are multiples of 8, the last dimension is contiguous.
        kv_cache: (k_cache, v_cache), each ``[pages, page_size, num_kv_heads, head_dim]`` ("NHD") or ``[pages,
            num_kv_heads, page_size, head_dim]`` ("HND"), or both in one tensor with a dimension of 2 after pages.
        slot_mapping: ``[tokens]`` int64 or int32, page * page_size + slot in the page.
        positions: ``[tokens]`` int32 or int64; needed for pages and for rope.
        request_of: ``[tokens]`` int32 or int64; needed for pages, and where rope goes by kv_lens.
        kv_indices, kv_indptr: the pages, int32 ``[entries]`` and ``[requests + 1]``, as BatchAttention.plan takes them.
        block_table: the pages, int32 ``[requests, pages]``.
        kv_lens: ``[requests]`` int32, the lengths with the new tokens: for DynamicNTK and LongRoPE.
        rope: rotates k (not in place) by positions on its way; what is cached serves attention with ``keys="cached"``.

    The kernel is built and loaded at the first call (``compile`` in this module does it ahead), then a call may be captured
    in a CUDA graph. On a GPU nothing synchronises: a position past its request's pages, or a page past the cache, is
    skipped, and ``check_append`` raises for it. On the CPU it raises at once, before anything is written.

    Raises:
        ParameterError, UnsupportedError: what is required, what was found, what to do.
    """
    one = isinstance(kv_cache, torch.Tensor)
    k_cache, v_cache = (kv_cache, None) if one else kv_cache if _is_pair(kv_cache) else (kv_cache, kv_cache)
    tensors = (k, v, k_cache, v_cache, slot_mapping, positions, request_of, kv_indices, kv_indptr, block_table, kv_lens)
    if is_compiling():
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors[:4]]):
            raise UnsupportedError(NO_GRAD)
        _operator(*tensors, kv_layout, None if rope is None else rope.handle)
        return
    _append(*tensors, kv_layout, rope)


def _append(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, slot_mapping: torch.Tensor | None,
    positions: torch.Tensor | None, request_of: torch.Tensor | None, kv_indices: torch.Tensor | None,
    kv_indptr: torch.Tensor | None, block_table: torch.Tensor | None, kv_lens: torch.Tensor | None, kv_layout: str,
    rope: RoPE | None,
) -> None:  # fmt: skip
    """append_kv of what it is given, v_cache None where k_cache holds both."""
    tensors = (k, v, k_cache, v_cache, slot_mapping, positions, request_of, kv_indices, kv_indptr, block_table, kv_lens)
    one = v_cache is None
    try:
        facts = None if rope is None else (rope.theta, rope.scaling, rope.interleaved, rope.rotary_dim, rope.keys)
        ident = (kv_layout, facts, *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        site = _sites.get(ident)
    except (AttributeError, TypeError):  # no tensor, or an unhashable layout: _check says what is wrong
        site = ident = None
    if site is None:
        site = _check(*tensors, kv_layout, rope)
        if len(_sites) >= _MAX_SITES:
            _sites.clear()
        if ident is not None:
            _sites[ident] = site
    k_at, v_at, k_cache_at = k.data_ptr(), v.data_ptr(), k_cache.data_ptr()
    v_cache_at = k_cache_at + site.second if one else v_cache.data_ptr()
    if (k_at | v_at | k_cache_at | v_cache_at) % 16:
        raise ParameterError("k, v or the cache starts at an address that is no multiple of 16 bytes: give an aligned tensor")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4]):
        raise UnsupportedError(NO_GRAD)
    if not site.num_tokens:
        return
    loaded = site.loaded
    if loaded is None:
        k_cache, v_cache = (k_cache[:, 0], k_cache[:, 1]) if one else (k_cache, v_cache)
        page, slot = _find_slots(site, slot_mapping, positions, request_of, kv_indices, kv_indptr, block_table)
        keep = page >= 0
        page, slot, k, v = page[keep], slot[keep], k[: site.num_tokens][keep], v[: site.num_tokens][keep]
        if rope is not None:
            inv_freq, table = rope.tables(site.head_dim, kv_lens if rope.needs_kv_lens else ())
            inv_freq = inv_freq[0] if table is None else inv_freq[table[request_of[keep].long()].long()][:, None]
            k = rotate(k, positions[keep][:, None], inv_freq, rope.mscale, rope.interleaved)
        at = (page, slot) if kv_layout == "NHD" else (page, slice(None), slot)
        k_cache[at], v_cache[at] = k, v
        return
    inv_freq, table = loaded.inv_freq, None
    if rope is not None and rope.needs_kv_lens:
        inv_freq, table = rope.tables(site.head_dim, kv_lens)
    if slot_mapping is not None and slot_mapping.dtype != torch.int64:
        slot_mapping = slot_mapping.long()
    positions, request_of = _narrow(positions), _narrow(request_of)
    others = (slot_mapping, positions, request_of, kv_indices if block_table is None else block_table, kv_indptr, inv_freq, table,
              loaded.status)  # fmt: skip
    buffer = bytearray(site.template)
    _POINTERS.pack_into(buffer, 0, k_at, v_at, k_cache_at, v_cache_at, *[0 if t is None else t.data_ptr() for t in others])
    loaded.kernel.launch(buffer, loaded.config.blocks(site.num_tokens), 1, cuda.current_stream(k.device.index))


# Under torch.compile a call is an operator; a graph names a RoPE by what it declares, and keeps it.
_ropes: dict[str, RoPE] = {}


def _run_operator(*arguments: Any) -> None:
    *tensors, kv_layout, handle = arguments
    if handle is not None and (found := _ropes.get(handle) or alive.get(handle)) is None:
        raise ParameterError(f"a graph appends with the RoPE {handle}, which this process has not made: make it, then call the graph")
    if handle is not None:
        _ropes[handle] = found
    _append(*tensors, kv_layout, None if handle is None else found)


def _fake_operator(*arguments: Any) -> None:
    handle = arguments[-1]
    if handle is not None and handle not in _ropes and handle in alive:
        _ropes[handle] = alive[handle]


_operator = define(
    "append_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor? slot_mapping, Tensor? positions, "
    "Tensor? request_of, Tensor? kv_indices, Tensor? kv_indptr, Tensor? block_table, Tensor? kv_lens, str kv_layout, "
    "str? rope) -> ()",
    _run_operator,
    _fake_operator,
)


def append_positions(
    q_indptr: torch.Tensor, kv_lens: torch.Tensor, num_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(request_of, positions)`` of a batch's new tokens, int32 ``[num_tokens]`` each, as ``append_kv`` takes them.

    The last new token of a request lies at kv_len - 1, as in attention: ``kv_lens`` count the new tokens already.

    Args:
        q_indptr: int32 ``[requests + 1]``, where each request's new tokens begin.
        kv_lens: int32 ``[requests]``, on the same device.
        num_tokens: rows of k and v; those past the last request's get -1 in both. Nothing synchronises where it is given;
            None reads it from q_indptr.

    Raises ParameterError.
    """
    if not isinstance(q_indptr, torch.Tensor) or not isinstance(kv_lens, torch.Tensor):
        raise ParameterError(f"q_indptr is {_found(q_indptr)}, kv_lens {_found(kv_lens)}: required int32 tensors")
    requests = _ints("q_indptr", q_indptr, q_indptr.device) - 1
    if _ints("kv_lens", kv_lens, q_indptr.device) != requests:
        raise ParameterError(f"q_indptr has {requests + 1} entries and kv_lens {kv_lens.shape[0]}: required one more than kv_lens")
    if num_tokens is None:
        num_tokens = int(q_indptr[-1])
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 0:
        raise ParameterError(f"num_tokens is {num_tokens!r}: required an int of at least 0")
    token = torch.arange(num_tokens, dtype=torch.int32, device=q_indptr.device)
    if not requests:
        return torch.full_like(token, -1), torch.full_like(token, -1)
    request = torch.searchsorted(q_indptr, token, right=True) - 1  # empty requests share their end with the next one's start
    inside = (request >= 0) & (request < requests)
    request = request.clamp(0, requests - 1)
    position = kv_lens[request] - (q_indptr[request + 1] - token)
    return torch.where(inside, request, -1).int(), torch.where(inside, position, -1).int()


def check_append(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device (by default the current one) and raise ParameterError, naming one token that ``append_kv``
    could not place there since the last check. Such tokens were skipped. On the CPU append_kv itself raises."""
    found = as_device("cuda" if device is None else device)
    if found.type != "cuda" or not _status:
        return
    status = _status.get(torch.cuda.current_device() if found.index is None else found.index)
    if status is not None and (wrong := Status.of(status.tolist())):
        status.zero_()
        wrong.raise_for_token()


def compile(  # noqa: A001
    *,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int | None = None,
    rope: RoPE | None = None,
    arch: str | None = None,
    device: torch.device | str | int | None = None,
) -> Entry:
    """Build append_kv's kernel ahead: for a named architecture ("9.0a"), without a GPU, or for a CUDA device (by default
    the current one), where it is loaded too, so that the first call may be captured. Returns its cache entry."""
    if arch is None:
        return cuda.build(_load(cuda_index(device, 'give arch=, such as "9.0a"'), dtype, head_dim, head_dim_v or head_dim, rope).special)[0]
    return cuda.build(specialise(config_of(arch, dtype, head_dim, head_dim_v or head_dim, rope)))[0]


# ---------------------------------------------------------------- CUDA


def _narrow(index: torch.Tensor | None) -> torch.Tensor | None:
    """As int32: what does not fit stays out of range."""
    return index if index is None or index.dtype == torch.int32 else index.clamp(-1, _INT32_MAX).int()


def config_of(arch_name: str, dtype: torch.dtype, d: int, dv: int, rope: RoPE | None) -> AppendConfig:
    """What a kernel of ``append_kv`` is specialised to, or UnsupportedError."""
    check_dtype(dtype)
    if dtype not in _CUDA_DTYPES:
        raise UnsupportedError(f"append_kv of {dtype} on CUDA: the kernel takes torch.bfloat16 or torch.float16")
    rotary, interleaved = 0, False
    if rope is not None:
        rotary, interleaved = rope.structure(d)["rotary_dim"], rope.interleaved
    for name, size in (("head_dim", d), ("head_dim_v", dv), ("rotary_dim", rotary)):
        if size % 8:
            raise UnsupportedError(f"append_kv with {name} {size} on CUDA: required a multiple of 8; pad, or rotate beforehand")
    return AppendConfig(arch_named(arch_name).name, DTYPE_NAMES[dtype], d, dv, rotary, interleaved)


def specialise(config: AppendConfig) -> cuda.Specialised:
    """The kernel before it is rendered, with its key."""
    return cuda.specialise_plain("append", "append_kv", config, APPEND_FIELDS)


def _load(index: int, dtype: torch.dtype, d: int, dv: int, rope: RoPE | None) -> _Loaded:
    ident = (index, dtype, d, dv, rope and (rope.theta, rope.scaling, rope.interleaved, rope.rotary_dim))
    found = _loaded.get(ident)
    if found is None:
        gpu = cuda.device_arch(index)
        config = config_of(gpu.name, dtype, d, dv, rope)
        cuda.refuse_capture(index, f"append_kv's kernel for {config}",
                            "call append_kv or attngen.append.compile, with this dtype, head sizes and rope, before the capture")
        special = specialise(config)
        kernel = cuda.load(special, index, config.threads, 0, gpu.dependent_launch)
        device = torch.device("cuda", index)
        if index not in _status:  # a copy from the host waits, so that other streams may use it at once
            with torch.inference_mode(False):
                _status.setdefault(index, torch.tensor([0] * STATUS_WORDS, dtype=torch.int32, device=device))
        inv_freq = None if rope is None else rope.inv_freq(d, device)
        found = _loaded.setdefault(ident, _Loaded(kernel, config, special, inv_freq, _status[index]))
    return found


# ---------------------------------------------------------------- CPU


def _find_slots(
    site: _Site, slot_mapping: torch.Tensor | None, positions: torch.Tensor | None, request_of: torch.Tensor | None,
    kv_indices: torch.Tensor | None, kv_indptr: torch.Tensor | None, block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Each token's page, negative where it is skipped, and slot: find_slot of append.cu, for all tokens."""
    zero = torch.zeros(site.num_tokens, dtype=torch.int64, device="cpu")
    position, request, mapped = (zero if t is None else t.long() for t in (positions, request_of, slot_mapping))
    skip = (position < 0) | (request < 0) | (mapped < 0)
    wrong = torch.where(position >= MAX_LENGTH, Wrong.LONG_POSITION, torch.where(request >= site.requests, Wrong.BAD_REQUEST, 0))
    found = torch.where(wrong == Wrong.BAD_REQUEST, request, position)

    def mark(bad: torch.Tensor, what: Wrong, number: torch.Tensor) -> None:
        bad = (wrong == 0) & ~skip & bad
        wrong[bad], found[bad] = what, number[bad]

    wrong[skip] = 0
    if slot_mapping is not None:
        mark(mapped >= site.pages * site.page_size, Wrong.BAD_PAGE, mapped)
        page, slot = mapped // site.page_size, mapped % site.page_size
    else:
        index, slot = position // site.page_size, position % site.page_size
        safe = torch.where(skip | (wrong != 0), 0, request)
        if block_table is None:
            begin, end = (kv_indptr[safe + i].long() if site.requests else zero for i in (0, 1))
            mark((begin < 0) | (end < begin) | (end > kv_indices.shape[0]), Wrong.BAD_PAGES, request)
            mark(index >= end - begin, Wrong.LONG_POSITION, position)
            place, table = begin + index, kv_indices
        else:
            mark(index >= block_table.shape[1], Wrong.LONG_POSITION, position)
            place, table = safe * block_table.shape[1] + index, block_table.reshape(-1)
        usable = ~skip & (wrong == 0)
        page = torch.full_like(zero, -1)
        page[usable] = table[place[usable]].long()
        mark(page >= site.pages, Wrong.BAD_PAGE, page)
    bad = wrong.nonzero()
    if len(bad):
        at = int(bad[0])
        Status(int(wrong[at]), at, int(found[at])).raise_for_token()
    return torch.where(skip, -1, page), slot


# ---------------------------------------------------------------- checks


def _is_pair(kv_cache: Any) -> bool:
    return isinstance(kv_cache, (tuple, list)) and len(kv_cache) == 2


def _check(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, slot_mapping: torch.Tensor | None,
    positions: torch.Tensor | None, request_of: torch.Tensor | None, kv_indices: torch.Tensor | None,
    kv_indptr: torch.Tensor | None, block_table: torch.Tensor | None, kv_lens: torch.Tensor | None, kv_layout: str,
    rope: RoPE | None,
) -> _Site:  # fmt: skip
    """Everything that shapes, strides, dtypes and devices decide."""
    for name, t in (("k", k), ("v", v), ("kv_cache", k_cache), ("kv_cache", v_cache)):
        if not isinstance(t, torch.Tensor) and (name != "kv_cache" or t is not None):
            raise ParameterError(f"{name} is or holds {type(t).__name__}: required tensors, for kv_cache a pair or one tensor")
    second = 0
    if v_cache is None:
        if k_cache.dim() != 5 or k_cache.shape[1] != 2:
            raise ParameterError(
                f"kv_cache is {tuple(k_cache.shape)}: required a pair of tensors, or one of five dimensions [pages, 2, ...]"
            )
        second = k_cache.stride(1) * k_cache.element_size()
        k_cache, v_cache = k_cache[:, 0], k_cache[:, 1]
    _check_shapes(k, v, k_cache, v_cache, kv_layout, rope)
    device = k.device
    if slot_mapping is not None:
        if not (kv_indices is kv_indptr is block_table is None):
            raise ParameterError("slot_mapping beside kv_indices, kv_indptr or block_table: give one way to find a slot")
        num_tokens = _ints("slot_mapping", slot_mapping, device, None, (torch.int64, torch.int32))
    else:
        if (block_table is None) == (kv_indices is None) or (kv_indices is None) != (kv_indptr is None):
            tables = {"kv_indices": kv_indices, "kv_indptr": kv_indptr, "block_table": block_table}
            raise ParameterError(
                "append_kv: required slot_mapping, or positions and request_of with kv_indices and kv_indptr, or with "
                f"block_table; found {', '.join(n for n, t in tables.items() if t is not None) or 'none of them'}"
            )
        for name, tensor in (("positions", positions), ("request_of", request_of)):
            if tensor is None:
                raise ParameterError(f"append_kv into pages: required {name}= (append_positions makes positions and request_of)")
        num_tokens = _ints("positions", positions, device, None, (torch.int32, torch.int64))
    if rope is not None:
        needed = (("positions", positions), *((("kv_lens", kv_lens), ("request_of", request_of)) if rope.needs_kv_lens else ()))
        for name, tensor in needed:
            if tensor is None:
                raise ParameterError(f"append_kv with rope={rope!r}: required {name}=")
    if num_tokens > k.shape[0]:
        raise ParameterError(f"the index tensors have {num_tokens} entries and k {k.shape[0]} rows: required no more than rows")
    for name, tensor in (("positions", positions), ("request_of", request_of)):
        _ints(name, tensor, device, num_tokens, (torch.int32, torch.int64))
    if block_table is not None and (
        not isinstance(block_table, torch.Tensor) or block_table.dtype != torch.int32 or block_table.dim() != 2
        or block_table.device != device or (block_table.shape[1] > 1 and block_table.stride(1) != 1)
    ):  # fmt: skip
        wanted = f"int32 [requests, pages] with contiguous rows on {device}"
        raise ParameterError(f"block_table is {_found(block_table)}: required {wanted}")
    entries, indptr, lens = (
        _ints(name, t, device) for name, t in (("kv_indices", kv_indices), ("kv_indptr", kv_indptr), ("kv_lens", kv_lens))
    )
    counts = [None if indptr is None else indptr - 1, None if block_table is None else block_table.shape[0], lens]
    counts = [n for n in counts if n is not None]
    if len(set(counts)) > 1 or counts and counts[0] < 0:
        raise ParameterError(f"kv_indptr, block_table and kv_lens are of {', '.join(map(str, counts))} requests: required as many")
    requests = counts[0] if counts else _INT32_MAX
    s, h = (1, 2) if kv_layout == "NHD" else (2, 1)
    loaded, template = None, b""
    if device.type in _KERNELS:
        loaded = _load(device.index, k.dtype, k.shape[2], v.shape[2], rope)
        values = {f"{x}_stride_{n}": t.stride(i) for x, t in (("k", k), ("v", v)) for n, i in (("t", 0), ("h", 1))}
        for x, t in (("k", k_cache), ("v", v_cache)):
            values |= {f"{x}_cache_stride_{n}": t.stride(i) for n, i in (("b", 0), ("s", s), ("h", h))}
        values |= {
            "block_table_stride": 0 if block_table is None else block_table.stride(0),
            "page_table_size": (entries or 0) if block_table is None else block_table.shape[1],
            "num_tokens": num_tokens, "num_requests": requests, "num_kv_heads": k.shape[1], "page_size": k_cache.shape[s],
            "num_pages": k_cache.shape[0], "rope_mscale": 1.0 if rope is None else rope.mscale,
        }  # fmt: skip
        layout = loaded.special.layout
        template = bytearray(layout.size)
        layout.pack_into(template, 0, *(values.get(f.name, 0) for f in layout.fields))
    return _Site(num_tokens, requests, k_cache.shape[0], k_cache.shape[s], k.shape[2], loaded, bytes(template), second)


def _check_shapes(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kv_layout: str, rope: RoPE | None
) -> None:
    if kv_layout not in ("NHD", "HND"):
        raise ParameterError(f'kv_layout {kv_layout!r}: required "NHD" or "HND"')
    if rope is not None and not isinstance(rope, RoPE):
        raise ParameterError(f"rope is {type(rope).__name__}: required an attngen.RoPE, as a variant declares it, or None")
    if rope is not None and rope.keys == "rotate":
        raise ParameterError('rope has keys="rotate": attention rotates cached keys; append without rope, or use keys="cached"')
    if k.dtype not in _DTYPES:
        raise UnsupportedError(f"append_kv of {k.dtype}: it takes {', '.join(map(str, _DTYPES))}")
    if k.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"append_kv on {k.device}: it runs on CUDA devices and on the CPU")
    for name, t in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != k.dtype or t.device != k.device:
            raise ParameterError(f"{name} is {t.dtype} on {t.device}: required k's {k.dtype} on {k.device}")
        rank = 4 if "cache" in name else 3
        if t.dim() != rank:
            raise ParameterError(f"{name} has shape {tuple(t.shape)}: required {rank} dimensions")
        if t.shape[-1] % 8 or t.stride(-1) != 1 or any(s % 8 for s, n in zip(t.stride()[:-1], t.shape) if n > 1):
            raise ParameterError(
                f"{name} has shape {tuple(t.shape)}, strides {t.stride()}: required a contiguous last dimension, its size and the "
                f"other strides multiples of 8"
            )
        if rank == 4 and any(s == 0 for s, n in zip(t.stride(), t.shape) if n > 1):
            raise ParameterError(f"{name} is expanded, strides {t.stride()}: required a place for each page, key and head")
    tokens, heads, d = k.shape
    if v.shape[:2] != (tokens, heads):
        raise ParameterError(f"v has shape {tuple(v.shape)}: required [{tokens}, {heads}, head_dim_v], k's tokens and heads")
    pages, page_size = k_cache.shape[0], k_cache.shape[1 if kv_layout == "NHD" else 2]
    for name, t, size in (("k_cache", k_cache, d), ("v_cache", v_cache, v.shape[2])):
        wanted = (pages, page_size, heads, size) if kv_layout == "NHD" else (pages, heads, page_size, size)
        if tuple(t.shape) != wanted or 0 in wanted[1:]:
            raise ParameterError(f"{name} has shape {tuple(t.shape)}: required {wanted}, {kv_layout}, as many pages for k and v")
    if rope is not None:
        rope.structure(d)  # raises where rotary_dim does not fit


def _found(given: Any) -> str:
    if not isinstance(given, torch.Tensor):
        return type(given).__name__
    return f"{given.dtype} {tuple(given.shape)}, strides {given.stride()}, on {given.device}"


def _ints(
    name: str, tensor: Any, device: torch.device, length: int | None = None, dtypes: tuple[torch.dtype, ...] = (torch.int32,)
) -> int | None:
    """The length of an index vector, where it is given."""
    if tensor is None:
        return None
    if (
        not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes or tensor.device != device or tensor.dim() != 1
        or not tensor.is_contiguous()
    ):  # fmt: skip
        wanted = f"a contiguous vector of {' or '.join(map(str, dtypes))} on {device}"
        raise ParameterError(f"{name} is {_found(tensor)}: required {wanted}")
    if length is not None and tensor.shape[0] != length:
        raise ParameterError(f"{name} has {tensor.shape[0]} entries: required {length}, one a token")
    return tensor.shape[0]
