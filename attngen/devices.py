"""Devices that a user names: the CPU, or a CUDA device that is there."""

from __future__ import annotations

from typing import Any

import torch

from .errors import ParameterError, UnsupportedError


def as_device(given: Any) -> torch.device:
    """The device that is meant, whether or not it is there; or ParameterError, UnsupportedError."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:  # torch asks for a device to make one of an int
        return torch.device("cuda", given)
    try:
        found = torch.device(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ParameterError(f'device {given!r}: required "cpu", "cuda" or a number of a CUDA device, as in "cuda:0"') from error
    if found.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {found}: attngen runs on CUDA devices and on the CPU")
    return found


def cuda_index(given: Any = None, otherwise: str = "") -> int:
    """The number of a CUDA device that is there, by default the current one; or ParameterError, UnsupportedError.

    ``otherwise``: what to do where there is none."""
    found = torch.device("cuda") if given is None else as_device(given)
    if found.type != "cuda":
        raise ParameterError(f"device {found}: required a CUDA device")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"no CUDA device here{otherwise and ': '}{otherwise}")
    if found.index is None:
        return int(torch.cuda.current_device())
    if found.index >= (count := torch.cuda.device_count()):
        raise UnsupportedError(f"device {found}: this machine has {count}, cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}")
    return found.index
