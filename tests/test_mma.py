"""attention_sm80 without a GPU: its text runs on the CPU (on_host_mma.py), planned by the device's planner, against the float64 oracle."""

from __future__ import annotations

import on_host_mma
import pytest
import torch
from compare import compare
from grid import VARIANTS
from test_attention_gpu import Sunk
from test_hopper import STORED, check

import attngen as ag
from attngen import engine, variants

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    """All requests go to tiles of 128 rows."""

    def largest(self: engine.Kernels, *_: int) -> tuple[int, ...]:
        assert self.classes[-1].config.block_m == 128
        return (len(self.classes) - 1,)

    on_host_mma.install(monkeypatch)
    monkeypatch.setattr(engine.Kernels, "needed", largest)
    monkeypatch.setattr(engine.Kernels, "launched", largest)


def halves(variant: ag.Variant, d: int, dv: int, dtype: torch.dtype = BF16) -> int:
    storage = tuple((name, STORED[field.dtype]) for name, field in variant.trace.used().items())
    kernels = engine.kernels_of(variant, engine.cuda_problem("80", dtype, d, dv, storage), page_size=16)
    return kernels.classes[-1].config.halves


@pytest.mark.parametrize("name", ["Sinks", "Gemma2", "Sigmoid", "Document", "Streaming", "OutputGate"])
def test_pairs_of_warps(name):
    """Wide values: two warps score half of the keys each, and sum half of the columns."""
    assert halves(VARIANTS[name], 256, 256) == (1 if name == "Document" else 2)  # listed tiles need the registers
    check(VARIANTS[name], [1, 64, 0, 130, 3, 1], [300, 64, 40, 200, 0, 17], d=256, heads=4)


@pytest.mark.parametrize("d, dv, dtype", [(64, 160, F16), (192, 256, BF16), (96, 192, F16), (256, 208, BF16)])
def test_widths(d, dv, dtype):
    assert halves(variants.Causal(), d, dv, dtype) == (1 if dv == 208 else 2)  # halves are multiples of 16
    check(variants.Causal(), [70, 3, 129], [200, 90, 129], d=d, dv=dv, dtype=dtype)


@pytest.mark.parametrize("variant", [Sunk(), variants.Sigmoid()], ids=lambda v: v.name)
def test_pieces(variant):
    """Requests that three multiprocessors share, whose results meet."""
    check(variant, [3, 150], [900, 500], d=256)


@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("growth", [1.0, 30.0])
def test_scores_that_grow(d, growth):
    """Maxima that rise in one half of a block's keys alone, in the first block or in later ones."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 140, 2, d), torch.randn(1, 400, 1, d), torch.randn(1, 400, 1, d)
    steps = torch.zeros(400)
    steps[[10, 45, 130, 190, 200, 390]] = torch.arange(1.0, 7.0)
    k = k + growth * steps[None, :, None, None] * q[:, :1, :1].sign() / d**0.5
    q, k, v = q.to(BF16), k.to(BF16), v.to(BF16)
    out = ag.attention(q, k, v, variants.Causal())
    ref = ag.reference(q, k, v, variants.Causal())
    compare(out, ref, like=ref.to(BF16) + 2e-3)


def test_ragged_and_lse():
    check(variants.Causal(), [2, 0, 1, 70, 0, 63, 65, 64, 130], [900, 128, 7, 0, 900, 0, 129, 127, 16], heads=6, ragged=True, d=256)
