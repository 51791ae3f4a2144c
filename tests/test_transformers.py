"""attngen inside transformers: tiny random models against transformers' own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import attngen as ag
from attngen import variants
from attngen.errors import ParameterError, UnsupportedError
from attngen.integrations.transformers import register

SIZE = dict(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LENGTH = 24


def tiny(family: str, **changes: Any):
    """A random two-layer model in float32. Weights are large enough that attention is far from uniform."""
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZE, **changes),
        "mistral": lambda: transformers.MistralConfig(**SIZE, **{"sliding_window": 8, "head_dim": 16, **changes}),
        "gemma2": lambda: transformers.Gemma2Config(
            **SIZE, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **changes
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **SIZE, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1, **changes
        ),
        "llama4": lambda: transformers.Llama4TextConfig(
            **SIZE, head_dim=16, attention_chunk_size=8, num_local_experts=1, intermediate_size_mlp=96,
            no_rope_layers=[1, 0], interleave_moe_layer_step=9, **changes,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    config = configs[family]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6.0)
            if "sinks" in name:
                weight.normal_()
    return model


def batch(padding: str = "none", length: int = LENGTH) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 101, (2, length))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :7] = 0
    elif padding == "right":
        mask[0, -7:] = 0
    elif padding == "holes":
        mask[0, 4:9] = mask[0, 12] = mask[1, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def logits(model, implementation: str, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(**inputs).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    rows = torch.ones(ours.shape[:2], dtype=torch.bool) if rows is None else rows.bool()
    assert theirs[rows].std() > 0.05  # a judge that says nothing would agree with everything
    assert (ours[rows] - theirs[rows]).abs().max() < 2e-5


@pytest.fixture(autouse=True)
def plain() -> None:
    register()


# ---------------------------------------------------------------- what is honoured


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_logits(family: str, padding: str) -> None:
    model, inputs = tiny(family), batch(padding)
    ours, theirs = logits(model, "attngen", **inputs), logits(model, "eager", **inputs)
    assert_close(ours, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(family: str, padding: str, cache: str | None) -> None:
    """Greedy tokens through a cache that grows, one that is allocated ahead, and those that drop what a window left."""
    model, inputs = tiny(family), batch(padding)
    del inputs["position_ids"]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    found = {}
    for implementation in ("eager", "attngen"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(**inputs, **options)
    assert found["attngen"].shape == (2, LENGTH + 12)
    assert torch.equal(found["attngen"], found["eager"])


def test_arguments_change_the_result() -> None:
    """Each of scaling, window, cap and sinks is there to be dropped: the tests above would not see a weak one."""
    inputs = batch()
    base = logits(tiny("gemma2"), "attngen", **inputs)
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": 64}, {"query_pre_attn_scalar": 32}):
        model = tiny("gemma2")
        for name, value in change.items():
            setattr(model.config, name, value)
        changed = type(model)(model.config).eval()
        changed.load_state_dict(model.state_dict())
        assert (logits(changed, "attngen", **inputs) - base).abs().max() > 1e-3
    model = tiny("gpt_oss")
    base = logits(model, "attngen", **inputs)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.add_(1.0)
    assert (logits(model, "attngen", **inputs) - base).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No further from the float32 model than transformers' own sdpa in the same precision, give or take."""
    model, inputs = tiny("llama"), batch("left")
    judge = logits(model, "eager", **inputs)
    model = model.to(dtype)
    rows = inputs["attention_mask"].bool()
    ours, theirs = (
        (logits(model, name, **inputs).float() - judge)[rows].abs().max() for name in ("attngen", "sdpa")
    )
    assert ours < 2 * theirs + 1e-4


@torch.no_grad()
def test_prompt_in_pieces() -> None:
    """More than one query against a cache that holds some: q_len 5 of kv_len 24."""
    for family in ("llama", "mistral"):
        model, inputs = tiny(family), batch()
        whole = logits(model, "eager", **inputs)
        model.set_attn_implementation("attngen")
        cache = transformers.DynamicCache(config=model.config)
        ids = inputs["input_ids"]
        model(ids[:, :19], past_key_values=cache)
        assert_close(model(ids[:, 19:], past_key_values=cache).logits, whole[:, 19:])


def test_packed_sequences() -> None:
    """Two texts in one row, told apart by positions that start anew."""
    model, ids = tiny("mistral"), batch()["input_ids"]
    positions = torch.cat((torch.arange(10), torch.arange(LENGTH - 10)))[None].expand(2, -1)
    packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    ours = logits(model, "attngen", **packed)
    assert_close(ours, logits(model, "eager", **packed))
    assert_close(ours[:, 10:], logits(model, "eager", input_ids=ids[:, 10:]))


def test_masks_of_the_caller() -> None:
    """4-D masks, bool and float, are read as they are."""
    model, inputs = tiny("llama"), batch()
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[:, 3] = False
    allowed[3, 3] = True
    for mask in (allowed.expand(2, 1, -1, -1), torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]):
        ours = logits(model, "attngen", input_ids=inputs["input_ids"], attention_mask=mask)
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
        assert_close(ours, logits(model, "eager", input_ids=inputs["input_ids"], attention_mask=additive))


def test_unknown_mask_functions_are_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    """Image tokens of Gemma 3 see each other: a disjunction, which no declaration here says. A warning says so."""
    from transformers.masking_utils import create_causal_mask

    from attngen.integrations import transformers as adapter

    adapter._warn_dense.cache_clear()
    model, inputs = tiny("llama"), batch("left")
    blocks = torch.full((2, LENGTH), -1)
    blocks[:, 10:15] = 0
    arguments = dict(inputs_embeds=torch.empty(2, LENGTH, 0), past_key_values=None, block_sequence_ids=blocks)
    found = {}
    for name in ("attngen", "eager"):
        model.set_attn_implementation(name)
        mask = create_causal_mask(model.config, attention_mask=inputs["attention_mask"], **arguments)
        rest = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "attention_mask": mask}
        found[name] = logits(model, name, **rest)
    assert_close(found["attngen"], found["eager"], inputs["attention_mask"])
    assert "evaluated into a [queries, keys] tensor" in caplog.text


def test_encoder() -> None:
    """Not causal, padded on either side; no mask at all."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    for padding in ("none", "left", "right"):
        inputs = batch(padding)
        found = {}
        for name in ("attngen", "eager"):
            model.set_attn_implementation(name)
            with torch.no_grad():
                found[name] = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        assert_close(found["attngen"], found["eager"], inputs["attention_mask"])


def test_two_sided_window() -> None:
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model, inputs = transformers.ModernBertModel(config).eval(), batch("left")
    found = {}
    for name in ("attngen", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    assert_close(found["attngen"], found["eager"], inputs["attention_mask"])


# ---------------------------------------------------------------- a variant on top


class Absolute(ag.Variant):
    """An additive penalty of the absolute position: what sees padding would be wrong."""

    slope: ag.Scalar = 0.25

    def logits(self, s, at):
        return s - self.slope * ag.cast(at.kv % 5, float)


class Unscaled(ag.Variant):
    scale = 1.0


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_variant_counts_real_tokens(padding: str) -> None:
    """A padded sequence gives what it gives alone, whatever the padding: prompt, then a step."""
    register(Absolute(), slope=0.5)
    model, inputs = tiny("llama"), batch(padding)
    ours = logits(model, "attngen", **inputs)
    for b in range(2):
        real = inputs["attention_mask"][b].bool()
        alone = logits(model, "attngen", input_ids=inputs["input_ids"][b : b + 1, real])
        torch.testing.assert_close(ours[b, real], alone[0], rtol=0, atol=2e-5)
    register()
    assert (logits(model, "attngen", **inputs) - ours).abs().max() > 1e-3
    if padding == "left":
        register(Absolute(), slope=0.5)
        model.set_attn_implementation("attngen")
        del inputs["position_ids"]
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        together = model.generate(**inputs, **options)
        for b in range(2):
            real = inputs["attention_mask"][b].bool()
            alone = model.generate(inputs["input_ids"][b : b + 1, real], **options)
            assert torch.equal(together[b, LENGTH:], alone[0, int(real.sum()) :])


def test_variant_is_added_to_the_model() -> None:
    """Streaming on a causal model: the mask of both, which eager attention gets as a tensor."""
    register(variants.Streaming(sinks=2), window=5)
    model, ids = tiny("llama"), batch()["input_ids"]
    q, kv = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    allowed = (kv <= q) & ((kv < 2) | (q - kv < 5))
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    assert_close(logits(model, "attngen", input_ids=ids), logits(model, "eager", input_ids=ids, attention_mask=mask))

    # The model's mask holds too, unless the variant's is to replace it.
    prefix_len = torch.tensor([6, 6], dtype=torch.int32)
    register(variants.PrefixLM(), prefix_len=prefix_len)
    plain = logits(model, "eager", input_ids=ids)
    assert_close(logits(model, "attngen", input_ids=ids), plain)
    register(variants.PrefixLM(), replace_mask=True, prefix_len=prefix_len)
    mask = torch.where((kv <= q) | (kv < 6), 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    assert_close(logits(model, "attngen", input_ids=ids), logits(model, "eager", input_ids=ids, attention_mask=mask))


def test_a_value_said_twice() -> None:
    """Equal values are applied once, others refused: never the one without a word about the other."""
    model, inputs = tiny("gemma2"), batch()
    expected = logits(model, "eager", **inputs)
    register(variants.SoftCap(2.0))
    assert_close(logits(model, "attngen", **inputs), expected)
    register(variants.SoftCap(3.0))
    with pytest.raises(ParameterError, match="softcap: one value required; found the model's 2.0 and cap=3.0"):
        logits(model, "attngen", **inputs)
    register(variants.SlidingWindow(), window=9)
    with pytest.raises(ParameterError, match="sliding_window: one value required; found the model's 8 and window=9"):
        logits(model, "attngen", **inputs)
    register(Unscaled())
    with pytest.raises(ParameterError, match="scaling: the variant's own scale 1.0 required; found 0.35"):
        logits(model, "attngen", **inputs)
    register(variants.Sinks(torch.zeros(4)))
    with pytest.raises(ParameterError, match="s_aux: one attention sink required"):
        logits(tiny("gpt_oss"), "attngen", **inputs)


# ---------------------------------------------------------------- no tensor of masks, no second build


def test_kernels_are_declared_ones() -> None:
    """Padding, windows and caches reach the kernel as declarations; a model runs a handful of kernels, made once."""
    before = len(ag.build_log())
    register()
    model = tiny("gemma2")
    inputs = {k: v for k, v in batch("left").items() if k != "position_ids"}
    model.set_attn_implementation("attngen")
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    names = {record.variant for record in ag.build_log()[before:]}
    assert len(ag.build_log()) - before <= 2 and not any("Dense" in name for name in names)


# ---------------------------------------------------------------- what is refused


def call(**arguments: Any) -> None:
    """The registered function, as a layer calls it."""
    q, kv = torch.randn(1, 4, 6, 16), torch.randn(1, 2, arguments.pop("kv_length", 6), 16)
    function = transformers.AttentionInterface()["attngen"]
    function(torch.nn.Module(), q, kv, kv, arguments.pop("attention_mask", None), **{"scaling": 0.25, **arguments})


REFUSED = {
    "dropout": ({"dropout": 0.1}, r"`dropout`: found 0.1; call model.eval\(\)"),
    "output_attentions": ({"output_attentions": True}, "`output_attentions`: found True; the probabilities"),
    "position_bias": ({"position_bias": torch.zeros(1, 4, 6, 6)}, r"`position_bias`: found a tensor \(1, 4, 6, 6\)"),
    "head_mask": ({"head_mask": torch.ones(4)}, "`head_mask`"),
    "cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([0, 6])}, "`cu_seq_lens_q`.*drop these"),
    "cache": ({"cache": object()}, "`cache`.*continuous batching"),
    "unknown": ({"curvature": 2.0}, "`curvature`: found 2.0; it may change the result"),
    "mask shape": ({"attention_mask": torch.ones(1, 6)}, r"`attention_mask`: found shape \(1, 6\); pass 2-D"),
    "mask per head": ({"attention_mask": torch.ones(1, 4, 6, 6, dtype=torch.bool)}, r"found shape \(1, 4, 6, 6\)"),
    "additive bias": ({"attention_mask": torch.full((1, 1, 6, 6), -1.5)}, "values other than 0 and its lowest"),
    "where the queries lie": ({"kv_length": 9}, "None, with is_causal and 6 queries of 9 keys"),
    "window without order": ({"sliding_window": 4, "is_causal": False}, "`sliding_window`: found 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        call(**dict(arguments))


def test_harmless_arguments_pass() -> None:
    call(position_ids=torch.arange(6)[None], use_cache=True, output_attentions=False, position_bias=None, dropout=0.0)


def test_training_is_refused() -> None:
    model = tiny("llama", attention_dropout=0.1).train()
    model.set_attn_implementation("attngen")
    with pytest.raises(UnsupportedError, match="`dropout`"):
        model(**batch())
    with pytest.raises(UnsupportedError, match="requires grad"):
        model.eval()(**batch())


def test_dropped_keys_and_a_variant() -> None:
    """A window's cache forgets the first tokens, so that a variant's positions would be wrong."""
    register(Absolute())
    model, inputs = tiny("mistral"), batch()
    model.set_attn_implementation("attngen")
    del inputs["position_ids"]
    with pytest.raises(UnsupportedError, match=r"`past_key_values`.*pass past_key_values=DynamicCache\(\)"):
        model.generate(**inputs, max_new_tokens=3)
    model.generate(**inputs, max_new_tokens=3, past_key_values=transformers.DynamicCache())


REGISTRATIONS = {
    "flash in the name": (lambda: register(name="my_flash"), ParameterError, "found 'my_flash'; choose another"),
    "no plain name": (lambda: register(name="user/attngen"), ParameterError, "a plain name"),
    "unknown parameter": (lambda: register(variants.SoftCap, caps=3.0), ParameterError, "found 'caps'"),
    "parameter of nothing": (lambda: register(cap=3.0), ParameterError, "it has none"),
    "no mask left": (lambda: register(replace_mask=True), ParameterError, "a variant required with replace_mask=True"),
    "rope": (lambda: register(variants.Llama3RoPE()), UnsupportedError, "models rotate q and k themselves"),
}


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_refused_registrations(name: str) -> None:
    act, error, message = REGISTRATIONS[name]
    with pytest.raises(error, match=message):
        act()
