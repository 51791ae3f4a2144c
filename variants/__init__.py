"""The library of variants, each written as a user would write it: public API only, formula and source in its docstring.

A variant named after a technique does that one thing and composes: ``ag.compose(ALiBi(), Causal())``,
``Document() & Causal()``. One named after a model is what that model's layer computes, causal mask included.

To add one: a file here, its class in ``_FILES``, and in ``_examples.py`` the parameters at which small inputs show its
effect, where the defaults do not. Tests, ``attngen list`` and ``attngen check`` pick it up.
"""

from typing import Any

# The file of each, in reading order. It is imported when its variant is asked for: a server needs one or two.
_FILES = {
    "Full": "full", "Causal": "causal", "SlidingWindow": "sliding_window", "BidirectionalWindow": "bidirectional_window",
    "PrefixLM": "prefix_lm", "PrefixWindow": "prefix_window", "Document": "document", "Images": "images", "MultiItem": "multi_item",
    "LeftPadding": "left_padding", "Chunked": "chunked", "BlockCausal": "block_causal", "BlockDiffusion": "block_diffusion",
    "Streaming": "streaming", "DuoAttention": "duo_attention", "DilatedWindow": "dilated_window", "Longformer": "longformer",
    "Neighborhood2D": "neighborhood", "SlidingTile": "sliding_tile", "SelectedBlocks": "selected_blocks", "VerticalSlash": "vertical_slash",
    "TreeMask": "tree_mask", "CustomMask": "custom_mask", "SoftCap": "soft_cap", "ALiBi": "alibi", "ALiBiSlopes": "alibi",
    "T5Bias": "t5_bias", "RelativeBias2D": "relative_bias", "AttentionBias": "attention_bias", "Forgetting": "forgetting",
    "Llama4Temperature": "llama4_temperature", "Ministral3Temperature": "llama4_temperature", "ScalableSoftmax": "scalable_softmax",
    "Sinks": "sinks", "Sigmoid": "sigmoid", "Retention": "retention", "HSTU": "hstu", "OutputGate": "output_gate",
    "HeadGate": "output_gate", "Llama3RoPE": "llama3_rope", "StreamingLLM": "streaming_llm", "Gemma2": "gemma2", "GptOss": "sinks",
    "Grok": "grok",
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
