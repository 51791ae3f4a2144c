"""The library of variants, each written as a user would write it: public API only, formula and source in its docstring.

A variant named after a technique does that one thing and composes: ``ag.compose(ALiBi(), Causal())``,
``Document() & Causal()``. One named after a model is what that model's layer computes, causal mask included.

To add one: a file here, its class in the import and in ``ALL``, and in ``_examples.py`` the parameters at which small
inputs show its effect, where the defaults do not. Tests, ``attngen list`` and ``attngen check`` pick it up.
"""

from ._examples import example_params
from .alibi import ALiBi, ALiBiSlopes
from .attention_bias import AttentionBias
from .bidirectional_window import BidirectionalWindow
from .block_causal import BlockCausal
from .block_diffusion import BlockDiffusion
from .causal import Causal
from .chunked import Chunked
from .custom_mask import CustomMask
from .dilated_window import DilatedWindow
from .document import Document
from .duo_attention import DuoAttention
from .forgetting import Forgetting
from .full import Full
from .gemma2 import Gemma2
from .grok import Grok
from .hstu import HSTU
from .images import Images
from .left_padding import LeftPadding
from .llama3_rope import Llama3RoPE
from .llama4_temperature import Llama4Temperature, Ministral3Temperature
from .longformer import Longformer
from .multi_item import MultiItem
from .neighborhood import Neighborhood2D
from .output_gate import HeadGate, OutputGate
from .prefix_lm import PrefixLM
from .prefix_window import PrefixWindow
from .relative_bias import RelativeBias2D
from .retention import Retention
from .scalable_softmax import ScalableSoftmax
from .selected_blocks import SelectedBlocks
from .sigmoid import Sigmoid
from .sinks import GptOss, Sinks
from .sliding_tile import SlidingTile
from .sliding_window import SlidingWindow
from .soft_cap import SoftCap
from .streaming import Streaming
from .streaming_llm import StreamingLLM
from .t5_bias import T5Bias
from .tree_mask import TreeMask
from .vertical_slash import VerticalSlash

ALL = (
    Full, Causal, SlidingWindow, BidirectionalWindow, PrefixLM, PrefixWindow, Document, Images, MultiItem, LeftPadding, Chunked, BlockCausal,
    BlockDiffusion, Streaming, DuoAttention, DilatedWindow, Longformer, Neighborhood2D, SlidingTile, SelectedBlocks, VerticalSlash, TreeMask,
    CustomMask, SoftCap, ALiBi, ALiBiSlopes, T5Bias, RelativeBias2D, AttentionBias, Forgetting, Llama4Temperature, Ministral3Temperature,
    ScalableSoftmax, Sinks, Sigmoid, Retention, HSTU, OutputGate, HeadGate, Llama3RoPE, StreamingLLM, Gemma2, GptOss, Grok,
)  # fmt: skip


def library() -> dict[str, type]:
    """Every variant of the library, by class name, in reading order."""
    return {variant.__name__: variant for variant in ALL}


__all__ = [variant.__name__ for variant in ALL] + ["ALL", "example_params", "library"]
