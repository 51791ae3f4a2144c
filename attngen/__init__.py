"""attngen: a JIT compiler for attention variants.

    import attngen as ag

    class SoftCap(ag.Variant):
        cap: ag.Scalar = 50.0
        def logits(self, s, at):
            return self.cap * ag.tanh(s / self.cap)

    out = ag.attention(q, k, v, variant=SoftCap(), cap=30.0)
"""

import os as _os
import sys as _sys

if _sys.platform == "win32":
    raise ImportError("attngen runs on Linux; found Windows: use it in WSL or in a container")

from . import paths as _paths  # finds attngen.variants in a checkout
from .counters import stats
from .errors import (
    AttngenError,
    BuildError,
    CacheError,
    CacheWarning,
    JitWarning,
    LoadError,
    MissingKernelError,
    ParameterError,
    UnsupportedError,
    VariantError,
)
from .expr import absolute as abs  # noqa: A004
from .expr import cast, exp, exp2, floor, log, log2, rsqrt, sigmoid, sqrt, tanh, where
from .expr import maximum as max  # noqa: A004
from .expr import minimum as min  # noqa: A004
from .fields import Const, Scalar, Tensor
from .run import BuildRecord, Kernel, attention, build_log, compile, reference  # noqa: A004
from .run import collector_paused as _collector_paused
from .run import device_compilers as _device_compilers
from .run import device_sites as _device_sites
from .spec import Variant, compose

__version__ = "0.1.0"


def _dense_site(*call: object) -> object:
    from .dense import DenseSite  # what only a GPU needs is imported when it is asked for

    return DenseSite(*call)


def _compile_cuda(*args: object, **facts: object) -> object:
    from .engine import compile_cuda

    return compile_cuda(*args, **facts)


_device_sites["cuda"], _device_compilers["cuda"] = _dense_site, _compile_cuda


# What not every program needs is imported when it is asked for.
_LATE = {
    "BatchAttention": "batch", "append_kv": "append", "append_positions": "append", "check_append": "append",
    "BlockSparseAttention": "sparse", "VariableBlockSparseAttention": "sparse", "over_blocks": "sparse", "over_pages": "sparse",
    "check_masks": "masks", "custom_mask": "masks", "packbits": "masks", "segment_packbits": "masks",
    "flex_attention": "flex", "from_flex": "flex",
    "DynamicNTK": "rope", "Linear": "rope", "Llama3": "rope", "LongRoPE": "rope", "Proportional": "rope", "RoPE": "rope", "YaRN": "rope",
    "ComposedAttention": "levels", "join_levels": "levels",
    "merge_states": "merge", "workspace_bytes": "engine", "load_set": "start", "warmup": "start", "LoadedSet": "start",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _LATE:
        from importlib import import_module

        with _collector_paused():  # imports allocate enough to set off a collection of all of torch's heap
            value = globals()[name] = getattr(import_module(f".{_LATE[name]}", __name__), name)
        return value
    raise AttributeError(f"module 'attngen' has no attribute {name!r}")


if _os.environ.get("ATTNGEN_LOG"):
    from .logs import configure as _configure

    _configure(_os.environ["ATTNGEN_LOG"])

__all__ = [
    "AttngenError", "BatchAttention", "BlockSparseAttention", "BuildError", "BuildRecord", "CacheError", "CacheWarning", "ComposedAttention", "Const", "DynamicNTK", "JitWarning", "Kernel",
    "Linear", "Llama3", "LoadError", "LoadedSet", "LongRoPE", "MissingKernelError", "ParameterError", "Proportional", "RoPE", "Scalar", "Tensor", "UnsupportedError", "VariableBlockSparseAttention", "Variant",
    "VariantError", "YaRN", "abs", "append_kv", "append_positions", "attention", "build_log", "cast", "check_append",
    "check_masks", "compile", "compose", "custom_mask", "exp", "exp2", "flex_attention", "floor", "from_flex", "join_levels", "load_set", "log", "log2", "max", "merge_states", "min", "over_blocks", "over_pages", "packbits", "reference", "rsqrt",
    "segment_packbits", "sigmoid", "sqrt", "stats", "tanh", "warmup", "where", "workspace_bytes",
]  # fmt: skip
