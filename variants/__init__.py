"""The library of variants, each written as a user would write it: public API only, formula and source in its docstring.

A variant named after a technique does that one thing and composes: ``ag.compose(ALiBi(), Causal())``,
``Document() & Causal()``. One named after a model is what that model's layer computes, causal mask included.

To add one: a file here, its class in the import and in ``ALL``, and in ``_examples.py`` the parameters at which small
inputs show its effect, where the defaults do not. Tests, ``attngen list`` and ``attngen check`` pick it up.
"""

from ._examples import example_params
from .alibi import ALiBi, ALiBiSlopes
from .causal import Causal
from .chunked import Chunked
from .custom_mask import CustomMask
from .dilated_window import DilatedWindow
from .document import Document
from .full import Full
from .gemma2 import Gemma2
from .grok import Grok
from .llama3_rope import Llama3RoPE
from .llama4_temperature import Llama4Temperature
from .prefix_lm import PrefixLM
from .sigmoid import Sigmoid
from .sinks import GptOss, Sinks
from .sliding_window import SlidingWindow
from .soft_cap import SoftCap
from .streaming import Streaming
from .streaming_llm import StreamingLLM
from .t5_bias import T5Bias
from .tree_mask import TreeMask

ALL = (
    Full, Causal, SlidingWindow, SoftCap, Gemma2, ALiBi, ALiBiSlopes, T5Bias, PrefixLM, Document, Chunked, Sinks,
    GptOss, Streaming, DilatedWindow, Sigmoid, TreeMask, CustomMask, Llama3RoPE, Llama4Temperature, Grok, StreamingLLM,
)  # fmt: skip


def library() -> dict[str, type]:
    """Every variant of the library, by class name, in reading order."""
    return {variant.__name__: variant for variant in ALL}


__all__ = [variant.__name__ for variant in ALL] + ["ALL", "example_params", "library"]
