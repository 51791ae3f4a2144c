"""attngen: a JIT compiler for attention variants.

    import attngen as ag

    class SoftCap(ag.Variant):
        cap: ag.Scalar = 50.0
        def logits(self, s, at):
            return self.cap * ag.tanh(s / self.cap)

    out = ag.attention(q, k, v, variant=SoftCap(), cap=30.0)
"""

from . import paths as _paths  # finds attngen.variants in a checkout
from .errors import (
    AttngenError,
    BuildError,
    CacheError,
    CacheWarning,
    LoadError,
    ParameterError,
    UnsupportedError,
    VariantError,
)
from .expr import absolute as abs  # noqa: A004
from .expr import cast, exp, exp2, floor, log, log2, rsqrt, sigmoid, sqrt, tanh, where
from .expr import maximum as max  # noqa: A004
from .expr import minimum as min  # noqa: A004
from .rope import DynamicNTK, Linear, Llama3, LongRoPE, RoPE, YaRN
from .run import BuildRecord, Kernel, attention, build_log, compile, reference  # noqa: A004
from .spec import Const, Scalar, Tensor, Variant, compose

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "BatchAttention":  # what only a GPU needs is imported when it is asked for
        from .batch import BatchAttention

        return BatchAttention
    raise AttributeError(f"module 'attngen' has no attribute {name!r}")


__all__ = [
    "AttngenError", "BatchAttention", "BuildError", "BuildRecord", "CacheError", "CacheWarning", "Const", "DynamicNTK", "Kernel", "Linear",
    "Llama3", "LoadError", "LongRoPE", "ParameterError", "RoPE", "Scalar", "Tensor", "UnsupportedError", "Variant",
    "VariantError", "YaRN", "abs", "attention", "build_log", "cast", "compile", "compose", "exp", "exp2", "floor", "log",
    "log2", "max", "min", "reference", "rsqrt", "sigmoid", "sqrt", "tanh", "where",
]  # fmt: skip
