"""The library of variants, each written as a user would write it: public API only, formula and source in its docstring.

A variant named after a technique does that one thing and composes: ``ag.compose(ALiBi(), Causal())``,
``Document() & Causal()``. One named after a model is what that model's layer computes, causal mask included.

To add one: a file here, its class in ``_FILES``, and in ``_examples.py`` the parameters at which small inputs show its
effect, where the defaults do not. Tests, ``attngen list`` and ``attngen check`` pick it up.
"""

from typing import Any

# The file of each, in reading order. It is imported when its variant is asked for: a server needs one or two.
_FILES = {
    "Full": "full", "Causal": "causal", "SlidingWindow": "sliding_window", "SoftCap": "soft_cap", "Gemma2": "gemma2",
    "ALiBi": "alibi", "ALiBiSlopes": "alibi", "T5Bias": "t5_bias", "PrefixLM": "prefix_lm", "Document": "document",
    "Chunked": "chunked", "Sinks": "sinks", "GptOss": "sinks", "Streaming": "streaming", "DilatedWindow": "dilated_window",
    "Sigmoid": "sigmoid", "TreeMask": "tree_mask", "Llama3RoPE": "llama3_rope", "Llama4Temperature": "llama4_temperature",
    "Grok": "grok", "StreamingLLM": "streaming_llm",
}  # fmt: skip


def library() -> dict[str, type]:
    """Every variant of the library, by class name, in reading order."""
    return {name: __getattr__(name) for name in _FILES}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ALL":
        return tuple(library().values())
    if name == "example_params" or name in _FILES:
        value = globals()[name] = getattr(import_module(f".{_FILES.get(name, '_examples')}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [*_FILES, "ALL", "example_params", "library"]  # noqa: F822
