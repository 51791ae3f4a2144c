"""RoPE against transformers' own rotary embeddings, each scaling type, near and far positions, and its errors."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from attngen.errors import VariantError
from attngen.rope import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, RoPE, YaRN, rotate

HEAD_DIM = 64
NEAR = torch.arange(0, 300)
FAR = torch.tensor([4095, 4096, 20_000, 100_003, 131_071])
SHORT = tuple(1.0 + 0.01 * i for i in range(HEAD_DIM // 2))
LONG = tuple(1.0 + 0.7 * i for i in range(HEAD_DIM // 2))

# name -> (what the config's rope_parameters say beside theta, the same declared by hand)
CASES = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, Linear(4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, DynamicNTK(2.0, 4096)),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        YaRN(4.0, 1024),
    ),
    "yarn-deepseek": (
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.8,
         "mscale_all_dim": 1.2, "beta_fast": 16.0, "beta_slow": 2.0},
        YaRN(40.0, 4096, 16.0, 2.0, mscale=0.8, mscale_all_dim=1.2),
    ),
    "yarn-gpt-oss": (
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        YaRN(32.0, 4096, truncate=False),
    ),
    "yarn-factor-given": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "attention_factor": 1.25},
        YaRN(8.0, 512, attention_factor=1.25),
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 1024},
        Llama3(8.0, 1.0, 4.0, 1024),
    ),
    "proportional": ({"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 8.0}, Proportional(0.25, 8.0)),
    "proportional-all": ({"rope_type": "proportional"}, Proportional(1.0)),
    "longrope": (
        {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG),
         "original_max_position_embeddings": 1024, "factor": 4.0},
        LongRoPE(SHORT, LONG, 1024, factor=4.0),
    ),
    "longrope-phi3": (
        {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG),
         "original_max_position_embeddings": 1024},
        LongRoPE(SHORT, LONG, 1024, factor=4.0),  # max_position_embeddings / the original
    ),
}  # fmt: skip


def llama_config(parameters: dict, theta: float = 500_000.0):
    return transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **parameters},
    )  # fmt: skip


def cos_sin(rope: RoPE, positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin as `rotate` sees them: what it makes of the unit pair (1, 0)."""
    half = inv_freq.shape[-1]
    unit = torch.cat((torch.ones(half), torch.zeros(half))).expand(len(positions), -1)
    turned = rotate(unit, positions, inv_freq, rope.mscale)
    return turned[:, :half], turned[:, half:]


def assert_same_angles(ours: torch.Tensor, theirs: torch.Tensor, positions: torch.Tensor, scale: float) -> None:
    """Cos or sin, of tables that may differ by 2 float32 ulps (transformers raises theta to a power in float32)."""
    tolerance = scale * (1e-6 + positions[:, None] * 4 * torch.finfo(torch.float32).eps)
    assert ((ours - theirs).abs() <= tolerance).all(), (ours - theirs).abs().max()


@pytest.mark.parametrize("positions", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("name", CASES)
def test_llama_rotary_embedding(name: str, positions: torch.Tensor) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters, scaling = CASES[name]
    config = llama_config(parameters)
    rope = RoPE.from_config(config)
    assert rope == RoPE(500_000.0, scaling=scaling)

    embedding = LlamaRotaryEmbedding(config)
    q, k = torch.randn(1, 4, len(positions), HEAD_DIM), torch.randn(1, 2, len(positions), HEAD_DIM)
    cos, sin = embedding(q, positions[None])
    assert rope.mscale == pytest.approx(embedding.attention_scaling, rel=1e-6)

    rows, index = rope.tables(HEAD_DIM, [int(positions.max()) + 1])
    inv_freq = rows[0 if index is None else index[0]]
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, embedding.inv_freq, rtol=1e-6, atol=0)

    ours = cos_sin(rope, positions, inv_freq)
    half = HEAD_DIM // 2
    assert_same_angles(ours[0], cos[0, :, :half], positions, rope.mscale)
    assert_same_angles(ours[1], sin[0, :, :half], positions, rope.mscale)
    # With transformers' own table the rotation itself agrees to float32, at any position.
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    for x, y in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rotate(x, positions, embedding.inv_freq, rope.mscale), y, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "longrope"])
def test_partial_rotation(name: str) -> None:
    """Half of each head turns, the rest passes through: Phi-3's embedding and rotation."""
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

    parameters = {k: v[: HEAD_DIM // 4] if isinstance(v, list) else v for k, v in CASES[name][0].items()}
    config = llama_config({**parameters, "partial_rotary_factor": 0.5})
    rope = RoPE.from_config(config)
    assert rope.rotary_dim == HEAD_DIM // 2 and rope.structure(HEAD_DIM)["rotary_dim"] == HEAD_DIM // 2
    embedding = Phi3RotaryEmbedding(config)
    q = torch.randn(1, 4, len(NEAR), HEAD_DIM)
    theirs, _ = apply_rotary_pos_emb(q, q, *embedding(q, NEAR[None]))
    rows, _ = rope.tables(HEAD_DIM, [len(NEAR)])
    ours = rotate(q, NEAR, rows[0], rope.mscale)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert torch.equal(ours[..., HEAD_DIM // 2 :], q[..., HEAD_DIM // 2 :])


def test_interleaved_cohere_and_glm() -> None:
    for family, fraction in (("cohere", 1.0), ("glm", 0.5)):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        config = llama_config({"rope_type": "default", "partial_rotary_factor": fraction}, theta=10_000.0)
        embedding = getattr(module, f"{family.capitalize()}RotaryEmbedding")(config)
        q = torch.randn(1, 4, len(NEAR), HEAD_DIM)
        theirs, _ = module.apply_rotary_pos_emb(q, q, *embedding(q, NEAR[None]))
        rope = RoPE.from_config(config, interleaved=True)
        ours = rotate(q, NEAR, rope.inv_freq(HEAD_DIM)[0], rope.mscale, rope.interleaved)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


def test_interleaved_gptj() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    config = transformers.GPTJConfig(n_embd=256, n_head=4, rotary_dim=32)
    rope = RoPE.from_config(config, interleaved=True)
    assert (rope.theta, rope.rotary_dim) == (10_000.0, 32)
    sin, cos = create_sinusoidal_positions(len(NEAR), 32)[None].chunk(2, dim=-1)
    x = torch.randn(1, len(NEAR), 4, HEAD_DIM)
    theirs = torch.cat((apply_rotary_pos_emb(x[..., :32], sin, cos), x[..., 32:]), -1)
    ours = rotate(x, NEAR[:, None], rope.inv_freq(HEAD_DIM)[0], interleaved=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


def test_tables_are_each_requests_own() -> None:
    """transformers takes the longest sequence of a batch; a batch of one is therefore the judge of every row."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    lens = [10, 1024, 1025, 4097, 9000]
    for name in ("dynamic", "longrope"):
        config = llama_config(CASES[name][0])
        rope = RoPE.from_config(config)
        rows, index = rope.tables(HEAD_DIM, torch.tensor(lens))
        assert rope.needs_kv_lens and index.dtype == torch.int32 and rows.dtype == torch.float32
        for n, i in zip(lens, index, strict=True):
            embedding = LlamaRotaryEmbedding(config)
            embedding(torch.zeros(1), torch.arange(n)[None])
            torch.testing.assert_close(rows[i], embedding.inv_freq, rtol=1e-6, atol=0)
    assert RoPE(scaling=Linear(2.0)).tables(HEAD_DIM, lens)[1] is None
    assert RoPE(scaling=CASES["longrope"][1]).inv_freq(HEAD_DIM).shape == (2, HEAD_DIM // 2)


def test_a_table_outlives_the_modes_it_is_made_in() -> None:
    rope = RoPE(12_345.0)
    with torch.inference_mode(), torch.device("meta"):
        found = rope.inv_freq(HEAD_DIM)
    assert found.device.type == "cpu" and not found.is_inference() and rope.inv_freq(HEAD_DIM) is found
    with torch._subclasses.FakeTensorMode():
        RoPE(54_321.0).inv_freq(HEAD_DIM)
    assert type(RoPE(54_321.0).inv_freq(HEAD_DIM)) is torch.Tensor


def test_rotate_is_a_rotation() -> None:
    torch.manual_seed(0)
    rope = RoPE(10_000.0)
    inv_freq = rope.inv_freq(HEAD_DIM)[0]
    x = torch.randn(5, HEAD_DIM, dtype=torch.float64)
    turned = rotate(x, FAR, inv_freq)
    assert turned.dtype == torch.float64
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(rotate(turned, -FAR, inv_freq), x, rtol=1e-12, atol=1e-12)
    # q . k depends on the distance alone
    q, k = x[:1], x[1:2]
    at = [(rotate(q, torch.tensor([p]), inv_freq) * rotate(k, torch.tensor([p - 7]), inv_freq)).sum() for p in (7, 500)]
    torch.testing.assert_close(*at, rtol=1e-4, atol=1e-4)
    # interleaved pairs are the same rotation of permuted elements
    pairs = torch.arange(HEAD_DIM).view(2, -1).T.flatten()
    torch.testing.assert_close(rotate(x[:, pairs], FAR, inv_freq, interleaved=True), turned[:, pairs])


def test_old_and_foreign_configs() -> None:
    """Field names of releases 4.5x, of GPT-NeoX, and of layers that rotate differently."""
    size = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
    old = SimpleNamespace(**size, rope_theta=500_000.0, rope_scaling={"type": "linear", "factor": 4.0})
    assert RoPE.from_config(old) == RoPE(500_000.0, scaling=Linear(4.0))
    plain = SimpleNamespace(**size, rope_theta=10_000.0, rope_scaling=None, partial_rotary_factor=0.5)
    assert RoPE.from_config(plain) == RoPE(rotary_dim=32)
    phi3 = SimpleNamespace(
        **size, rope_theta=10_000.0, original_max_position_embeddings=1024,
        rope_scaling={"type": "su", "short_factor": list(SHORT), "long_factor": list(LONG)},
    )  # fmt: skip
    assert RoPE.from_config(phi3).scaling == LongRoPE(SHORT, LONG, 1024, factor=4.0)
    neox = transformers.GPTNeoXConfig(hidden_size=256, num_attention_heads=4)  # rotary_pct 0.25
    assert RoPE.from_config(neox) == RoPE(rotary_dim=16)
    layers = SimpleNamespace(
        **size,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert RoPE.from_config(layers, layer_type="full_attention") == RoPE(1e6, scaling=Linear(8.0))
    assert RoPE.from_config(layers, layer_type="sliding_attention") == RoPE(1e4)
    with pytest.raises(VariantError, match="layer_type of full_attention, sliding_attention required; found None"):
        RoPE.from_config(layers)


def test_values_hash_and_compare() -> None:
    by_dict = RoPE(scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0,
                            "original_max_position_embeddings": 16})  # fmt: skip
    assert hash(by_dict) == hash(RoPE(scaling=LongRoPE((1.0,), (2.0,), 16, factor=2.0)))
    assert RoPE(scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}).theta == 5e5
    by_length = RoPE(scaling=LongRoPE((1.0,), (1.0,), 1024, max_position=4096))
    assert by_length.mscale == RoPE(scaling=LongRoPE((1.0,), (1.0,), 1024, factor=4.0)).mscale > 1
    assert RoPE(rotary_dim=32, keys="rotate").structure(64) == {
        "rotary_dim": 32,
        "interleaved": False,
        "keys": "rotate",
    }


ERRORS = {
    "odd rotary_dim": (lambda: RoPE(rotary_dim=25), "even rotary_dim required; found 25"),
    "rotary_dim past the head": (lambda: RoPE(rotary_dim=128).inv_freq(64), "found 128 of 64"),
    "odd head_dim": (lambda: RoPE().structure(65), "even head_dim required; found 65"),
    "negative theta": (lambda: RoPE(-1.0), "positive theta required; found -1.0"),
    "keys": (lambda: RoPE(keys="yes"), "keys='cached' or keys='rotate' required; found 'yes'"),
    "scaling": (lambda: RoPE(scaling=4.0), "None, Linear, DynamicNTK, YaRN, Llama3, LongRoPE, Proportional or a dict required"),
    "unknown rope_type": (lambda: RoPE(scaling={"rope_type": "axial"}), "found 'axial'"),
    "missing factor": (lambda: RoPE(scaling={"rope_type": "linear"}), "missing factor"),
    "missing context": (lambda: RoPE(scaling={"rope_type": "dynamic", "factor": 2.0}), "missing max_position"),
    "unknown key": (
        lambda: RoPE(scaling={"rope_type": "default", "mrope_section": [8, 12, 12]}),
        "found mrope_section; remove",
    ),
    "two thetas": (lambda: RoPE(5e5, scaling={"rope_type": "default", "rope_theta": 1e6}), "one theta required"),
    "partial in the dict": (
        lambda: RoPE(scaling={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "use RoPE.from_config",
    ),
    "factor of zero": (lambda: Linear(0.0), "Linear: positive factor required; found 0.0"),
    "factor below 1": (lambda: DynamicNTK(0.5, 4096), "factor of 1 or more required"),
    "portion": (lambda: RoPE(scaling=Proportional(1.5)), "portion of 1 or less required; found 1.5"),
    "swapped factors": (lambda: Llama3(8.0, 4.0, 1.0, 8192), "high_freq_factor above low_freq_factor required"),
    "longrope stretch": (lambda: LongRoPE((1.0,), (1.0,), 16), "one of factor and max_position required"),
    "longrope lengths": (lambda: LongRoPE((1.0,), (1.0, 2.0), 16, factor=2.0), "found 1 and 2 values"),
    "longrope of another head": (
        lambda: RoPE(scaling=LongRoPE((1.0,), (1.0,), 16, factor=2.0)).inv_freq(64),
        "rotary_dim / 2 = 32 factors required; found 1",
    ),
    "no rope in the config": (lambda: RoPE.from_config(transformers.BertConfig()), "found none of them in BertConfig"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(VariantError) as error:
        call()
    assert message in str(error.value)
