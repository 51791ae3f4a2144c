"""Masks of packed bits, as FlashInfer packs them, and what is known of their rows.

    bits, mask_indptr = segment_packbits(keep, indptr)                            # bools to bits, a request after another
    attn = BatchAttention(CustomMask(), ...)
    attn.plan(q_indptr, ..., **custom_mask(bits, mask_indptr=mask_indptr, q_indptr=q_indptr, kv_lens=kv_lens, num_tokens=len(q)))
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from . import cuda
from .abi_cuda import MASK_FIELDS
from .cache import Entry
from .choose_cuda import MaskConfig, arch_named
from .errors import ParameterError, UnsupportedError
from .status import STATUS_WORDS, Status

_INT32_MAX = 2**31 - 1
_loaded: dict[int, tuple[cuda.Specialised, Any]] = {}
_status: dict[int, torch.Tensor] = {}
_KERNELS = ("cuda",)  # devices that a kernel serves; tests add the CPU, where they run the kernel's text


def packbits(x: torch.Tensor, bitorder: str = "little") -> torch.Tensor:
    """The bools of ``x``, in order, as bits: uint8 ``[ceil(numel / 8)]``, the last byte filled with zeros.

    ``bitorder``: "little", the first bool in a byte's least bit, which masks are; or "big". As FlashInfer's ``packbits``.
    """
    _check_bools(x, bitorder)
    flat = x.reshape(-1)
    rest = -flat.numel() % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    return _bytes(flat.view(-1, 8), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "little") -> tuple[torch.Tensor, torch.Tensor]:
    """Segments of bools as bits, each from a byte of its own on. As FlashInfer's ``segment_packbits``.

    Args:
        x: bools; ``indptr``: int32 or int64 ``[segments + 1]`` on the same device, where each segment begins.

    Returns:
        The bytes, uint8, and where each segment begins among them, int32 ``[segments + 1]``. On a GPU nothing synchronises: there are
        then as many bytes as so many segments can need, and those past the last segment's are 0.
    """
    _check_bools(x, bitorder)
    indptr = _ints("indptr", indptr, x.device)
    segments = indptr.shape[0] - 1
    lengths = indptr.diff().long()
    out_indptr = torch.zeros(segments + 1, dtype=torch.int64, device=x.device)
    torch.cumsum((lengths + 7) // 8, 0, out=out_indptr[1:])
    count = int(out_indptr[-1]) if x.device.type == "cpu" else (x.numel() + 7 * segments) // 8
    if count > _INT32_MAX:
        raise UnsupportedError(f"a mask of {count} bytes: offsets are int32, required below 2**31")
    if not segments or not x.numel():
        return torch.zeros(count, dtype=torch.uint8, device=x.device), out_indptr.int()
    byte = torch.arange(count, device=x.device)
    segment = (torch.searchsorted(out_indptr, byte, right=True) - 1).clamp(0, segments - 1)
    first = (byte - out_indptr[segment]) * 8
    place = first[:, None] + torch.arange(8, device=x.device)
    source = indptr.long()[segment][:, None] + place
    inside = (place < lengths[segment][:, None]) & (source >= 0) & (source < x.numel())
    bits = x.reshape(-1)[torch.where(inside, source, 0)] & inside
    return _bytes(bits, bitorder), out_indptr.int()


def _bytes(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if bitorder == "big":
        shifts = shifts.flip(0)
    return (bits.to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)


def custom_mask(
    mask: torch.Tensor,
    *,
    q_indptr: Any = None,
    kv_lens: Any = None,
    mask_indptr: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """The parameters of ``attngen.variants.CustomMask`` from a mask: ``attn.plan(..., **custom_mask(...))``.

    Args:
        mask: on the device of the batch, one of
            bool ``[sum of q_len * kv_len]``, the requests' matrices one after another (FlashInfer's ``custom_mask``);
            uint8 ``[bytes]``, packed (FlashInfer's ``packed_custom_mask``): each request begins a byte;
            bool ``[batch, q_len, kv_len]``, for dense tensors: then nothing else is given.
        q_indptr: int32 ``[requests + 1]``, where each request's query tokens begin; None: one each (decode).
        kv_lens: int32 ``[requests]``, keys of each request.
        mask_indptr: int32 ``[requests + 1]``, the byte at which each request's packed bits begin; None: right after the one before.
        num_tokens: rows of q; None: as q_indptr says, which must then be a list or on the CPU.

    Nothing synchronises on a GPU, and the call may be captured: lengths and bits are then read at each replay. Its kernel is built and
    loaded at the first call (``attngen.masks.compile`` does it ahead). What only the device sees, ``check_masks`` reports.

    Raises:
        ParameterError: what is required, what was found, what to do; on the CPU, and with lengths on the CPU, for a mask of fewer bits
            than q_len * kv_len too.
    """
    if not isinstance(mask, torch.Tensor):
        raise ParameterError(f"mask is {type(mask).__name__}: required a tensor of bools or of packed bytes")
    device = mask.device
    if mask.dtype == torch.bool and mask.dim() == 3:
        if not (q_indptr is kv_lens is mask_indptr is num_tokens is None):
            raise ParameterError("mask is [batch, q_len, kv_len]: required no lengths beside it; flatten it for a batch that has some")
        batch, q_len, kv_len = mask.shape
        q_indptr, kv_lens = [i * q_len for i in range(batch + 1)], [kv_len] * batch
    elif mask.dtype not in (torch.bool, torch.uint8) or mask.dim() != 1:
        raise ParameterError(
            f"mask is {mask.dtype} {tuple(mask.shape)}: required bool [sum of q_len * kv_len], uint8 [bytes] packed by packbits, or bool "
            "[batch, q_len, kv_len]"
        )
    if kv_lens is None:
        raise ParameterError("custom_mask without kv_lens: required the keys of each request; a row of the mask has as many bits")
    host = _on_host(q_indptr, kv_lens)
    if num_tokens is None:
        if q_indptr is not None and (isinstance(q_indptr, torch.Tensor) and q_indptr.device.type != "cpu"):
            raise ParameterError("q_indptr is on the device, and num_tokens is not given: required the rows of q, num_tokens=len(q)")
        num_tokens = len(kv_lens) if q_indptr is None else int(q_indptr[-1])
    kv_lens = _ints("kv_lens", kv_lens, device)
    requests = kv_lens.shape[0]
    if q_indptr is not None:
        q_indptr = _ints("q_indptr", q_indptr, device)
        if q_indptr.shape[0] != requests + 1:
            raise ParameterError(f"q_indptr has {q_indptr.shape[0]} entries and kv_lens {requests}: required one more than kv_lens")

    def bits() -> torch.Tensor:
        return kv_lens.long() if q_indptr is None else q_indptr.diff().long() * kv_lens

    if mask.dtype == torch.bool:
        if mask_indptr is not None:
            raise ParameterError("mask_indptr with a mask of bools: it says where packed bytes begin; give one of the two")
        if host is not None and mask.numel() < sum(host):
            raise ParameterError(f"mask has {mask.numel()} bools: required the sum of q_len * kv_len, {sum(host)}")
        starts = torch.zeros(requests + 1, dtype=torch.int64, device=device)
        torch.cumsum(bits(), 0, out=starts[1:])
        mask, mask_indptr = segment_packbits(mask, starts)
    elif mask_indptr is None:
        mask_indptr = torch.zeros(requests + 1, dtype=torch.int32, device=device)
        mask_indptr[1:] = torch.cumsum((bits() + 7) // 8, 0)
    else:
        mask_indptr = _ints("mask_indptr", mask_indptr, device)
        if mask_indptr.shape[0] != requests + 1:
            raise ParameterError(f"mask_indptr has {mask_indptr.shape[0]} entries for {requests} requests: required {requests + 1}")
    if device.type == "cpu":
        _check_bytes(mask, mask_indptr, bits())
    elif host is not None and (needed := sum(-(-n // 8) for n in host)) > mask.numel():
        raise ParameterError(f"the packed mask has {mask.numel()} bytes: required {needed}, q_len * kv_len bits a request, each from a byte on")
    found = torch.empty(3, num_tokens, dtype=torch.int32, device=device)
    mask = mask.contiguous()
    (_rows_cuda if device.type in _KERNELS else _rows_cpu)(mask, mask_indptr, q_indptr, kv_lens, found)
    begin, run, end = found
    return {"packed_custom_mask": mask, "mask_indptr": mask_indptr, "mask_begin": begin, "mask_run": run, "mask_end": end}


def check_masks(device: torch.device | str | int | None = None) -> None:
    """Wait for a CUDA device (by default the current one) and raise ParameterError, naming a request whose mask, given to ``custom_mask``
    there since the last check, had fewer bits than q_len * kv_len. Such a request attends to nothing. On the CPU custom_mask raises."""
    found = torch.device("cuda" if device is None else device)
    if found.type not in _KERNELS or not _status:
        return
    status = _status.get(torch.cuda.current_device() if found.index is None else found.index)
    wrong = Status() if status is None else Status.of(status.tolist())
    if wrong:
        status.zero_()
        raise ParameterError(_short(wrong.index))


def compile(*, arch: str | None = None, device: torch.device | str | int | None = None) -> Entry:  # noqa: A001
    """Build custom_mask's kernel ahead: for a named architecture ("9.0a"), without a GPU, or for a CUDA device (by default the current
    one), where it is loaded too, so that the first call may be captured. Returns its cache entry."""
    if arch is None:
        found = torch.device("cuda" if device is None else device)
        index = torch.cuda.current_device() if found.index is None else found.index
        _load(index)
        arch = cuda.device_arch(index).name
    return cuda.build(_specialise(arch_named(arch).name))[0]


# ---------------------------------------------------------------- checks


def _check_bools(x: Any, bitorder: str) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.bool:
        found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ParameterError(f"x is {found}: required a tensor of bools; x != 0 makes one")
    if bitorder not in ("little", "big"):
        raise ParameterError(f'bitorder {bitorder!r}: required "little" or "big"')


def _ints(name: str, given: Any, device: torch.device) -> torch.Tensor:
    """An int32 vector on the device, or an int64 one where ``given`` is that."""
    if isinstance(given, torch.Tensor) and given.device == device and given.dim() == 1 and given.dtype in (torch.int32, torch.int64):
        return given if name == "indptr" else given.to(torch.int32)
    tensor = torch.as_tensor(given)
    if tensor.dim() != 1 or (tensor.numel() and tensor.dtype not in (torch.int32, torch.int64)):
        raise ParameterError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: required a vector of int32 on {device}")
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        raise ParameterError(f"{name} is on {given.device}: required on {device}, where the mask is")
    return tensor.to(torch.int64 if name == "indptr" else torch.int32).to(device, non_blocking=True)


def _on_host(q_indptr: Any, kv_lens: Any) -> list[int] | None:
    """q_len * kv_len of each request, where the host knows them."""
    if any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in (q_indptr, kv_lens)):
        return None
    lens = torch.as_tensor(kv_lens).tolist()
    starts = list(range(len(lens) + 1)) if q_indptr is None else torch.as_tensor(q_indptr).tolist()
    return [(b - a) * n for a, b, n in zip(starts, starts[1:], lens)]


def _check_bytes(mask: torch.Tensor, mask_indptr: torch.Tensor, bits: torch.Tensor) -> None:
    starts = mask_indptr.tolist()
    for request, (first, end, needed) in enumerate(zip(starts, starts[1:], bits.tolist())):
        if first < 0 or min(end, mask.numel()) - first < -(-needed // 8):
            raise ParameterError(_short(request))


def _short(request: int) -> str:
    return (
        f"request {request}: its mask has fewer bits than q_len * kv_len, by mask_indptr or by the length of the mask.\n  do: give kv_lens and "
        "q_indptr of the batch, and mask_indptr as segment_packbits returns it"
    )


# ---------------------------------------------------------------- rows


def _rows_cpu(mask: torch.Tensor, mask_indptr: torch.Tensor, q_indptr: torch.Tensor | None, kv_lens: torch.Tensor, found: torch.Tensor) -> None:
    # A row is one Python int: without numpy, and for long rows faster than its passes over bytes.
    starts = list(range(len(kv_lens) + 1)) if q_indptr is None else q_indptr.tolist()
    found.zero_()
    for first, n, q0, q1 in zip(mask_indptr.tolist(), kv_lens.tolist(), starts, starts[1:]):
        q1 = min(q1, found.shape[1])
        if n <= 0 or q1 <= q0:
            continue
        bits = (q1 - q0) * n
        packed, every = ctypes.string_at(mask.data_ptr() + first, -(-bits // 8)), (1 << n) - 1
        rows = [int.from_bytes(packed[at >> 3 : (at + n + 7) >> 3], "little") >> (at & 7) & every for at in range(0, bits, n)]
        found[:, q0:q1] = torch.tensor([_ends(row) for row in rows], dtype=torch.int32).T


def _ends(row: int) -> tuple[int, int, int]:
    """Of a row's bits: the first one, the first zero after it, and past the last one; zeros without ones."""
    if not row:
        return 0, 0, 0
    begin = (row & -row).bit_length() - 1
    row >>= begin
    return begin, begin + (~row & (row + 1)).bit_length() - 1, begin + row.bit_length()


def _rows_cuda(mask: torch.Tensor, mask_indptr: torch.Tensor, q_indptr: torch.Tensor | None, kv_lens: torch.Tensor, found: torch.Tensor) -> None:
    index = mask.device.index
    special, kernel = _load(index)
    tokens = found.shape[1]
    if not tokens:
        return
    held = [t if t is None else t.contiguous() for t in (mask, mask_indptr, q_indptr, kv_lens)]
    names = ("mask", "mask_indptr", "q_indptr", "kv_lens")
    values: dict[str, Any] = {name: 0 if t is None else t.data_ptr() for name, t in zip(names, held)}
    values |= {name: t.data_ptr() for name, t in zip(("mask_begin", "mask_run", "mask_end"), found)}
    values |= {"status": _status[index].data_ptr(), "num_bytes": mask.numel(), "num_tokens": tokens, "num_requests": kv_lens.shape[0]}
    buffer = bytearray(special.layout.size)
    special.layout.pack_into(buffer, 0, *(values[f.name] for f in special.layout.fields))
    kernel.launch(buffer, special.config.blocks(tokens), 1, cuda.current_stream(index))


def _specialise(arch_name: str) -> cuda.Specialised:
    return cuda.specialise_plain("mask_rows", "custom_mask", MaskConfig(arch_name), MASK_FIELDS)


def _load(index: int) -> tuple[cuda.Specialised, Any]:
    found = _loaded.get(index)
    if found is None:
        gpu = cuda.device_arch(index)
        cuda.refuse_capture(index, "custom_mask's kernel", "call custom_mask, or attngen.masks.compile, before the capture")
        special = _specialise(gpu.name)
        kernel = cuda.load(special, index, special.config.threads, 0, gpu.dependent_launch)
        if index not in _status:  # a copy from the host waits, so that other streams may use it at once
            with torch.inference_mode(False):
                _status.setdefault(index, torch.tensor([0] * STATUS_WORDS, dtype=torch.int32, device=f"cuda:{index}"))
        found = _loaded.setdefault(index, (special, kernel))
    return found


