"""examples/serve on a GPU: CUDA graphs, steps that run ahead, chunks beside decodes, forks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.serve.engine import Engine, Request
from examples.serve.models import ATTENTION, load
from served import tokens_of

pytestmark = pytest.mark.gpu
SHAPE = dict(
    model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, eos_token_id=None, bos_token_id=None, initializer_range=0.2,
)  # fmt: skip


@torch.no_grad()
def regret(model: torch.nn.Module, prompt: np.ndarray, new: list[int]) -> float:
    """How much less than the likeliest token's the logits of ``new`` are, at most, when the model reads the whole text at once."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt.tolist(), *new]], device="cuda")
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    model.set_attn_implementation(ATTENTION)
    return float((logits.max(-1).values - logits[range(len(new)), new]).max())


@pytest.mark.parametrize("graphs", [[1, 4, 12], []], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["attngen", "sdpa"])
def test_tokens_are_the_models(backend: str, graphs: list[int]) -> None:
    torch.manual_seed(0)
    model, _ = load(SHAPE, device="cuda", dtype=torch.bfloat16)
    engine = Engine(model, backend=backend, page_size=16, num_pages=400, max_slots=12, max_len=400, max_chunk=64, graphs=graphs)
    random = np.random.default_rng(0)
    prefix = random.integers(0, 512, 90)
    requests = [
        Request(np.concatenate([prefix[: 90 * (i % 2)], random.integers(0, 512, random.integers(1, 150))]), 20, n=1 + 2 * (i % 5 == 0))
        for i in range(24)
    ]
    found = tokens_of(engine, requests)
    assert engine.pool.held == 0 and engine.stats.cached_tokens > 0 and engine.stats.decode_steps > 10
    assert bool(engine.runner._graphs) == bool(graphs)
    for request, samples in zip(requests, found):
        for new in samples:
            assert len(new) == 20
            assert regret(model, request.prompt, new) < 0.3  # bfloat16; another token's is 5 and more
    wrong = [(token + 1) % 512 for token in found[0][0]]
    assert regret(model, requests[0].prompt, wrong) > 3


def test_seeds_repeat_under_graphs() -> None:
    torch.manual_seed(0)
    model, _ = load(SHAPE, device="cuda", dtype=torch.bfloat16)
    ask, found = dict(n=4, temperature=0.9, top_p=0.8, seed=3), []
    for _ in range(2):  # a new engine, where no part of the prompt is known: chunks of other lengths round otherwise
        engine = Engine(model, page_size=16, num_pages=200, max_slots=8, max_len=200, max_chunk=64, graphs=[8])
        found += tokens_of(engine, [Request(np.arange(30), 24, **ask)])
        assert engine.pool.held == 0 and engine.runner._graphs
    assert found[0] == found[1] and len({tuple(sample) for sample in found[0]}) == 4
