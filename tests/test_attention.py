"""The public calls: attention, reference, compile, build_log; threads and forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import attngen as ag
from attngen.variants import Causal, SoftCap


def inputs(batch=2, q_len=33, kv_len=70, heads=4, kv_heads=2, d=32, dv=None, dtype=torch.float32):
    shapes = ((q_len, heads, d), (kv_len, kv_heads, d), (kv_len, kv_heads, dv or d))
    return tuple(torch.randn(batch, *shape).to(dtype) for shape in shapes)


def error(out, ref):
    return (out.double() - ref).abs().max().item()


def test_layouts_agree():
    q, k, v = inputs()
    out, lse = ag.attention(q, k, v, Causal, return_lse=True)
    swapped = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    out2, lse2 = ag.attention(*swapped, Causal, layout="bhsd", return_lse=True)
    assert torch.equal(out, out2.transpose(1, 2)) and torch.equal(lse, lse2)
    strided = ag.attention(*(t.transpose(1, 2) for t in swapped), Causal)
    assert torch.equal(out, strided)
    assert lse.shape == (2, 4, 33) and lse.dtype == torch.float32


def test_no_variant_attends_everywhere():
    q, k, v = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    assert error(ag.attention(q, k, v), expected) < 1e-5


def test_out_is_written_and_returned():
    q, k, v = inputs()
    out = torch.full(q.shape, torch.nan)
    result = ag.attention(q, k, v, Causal, out=out)
    assert result is out and torch.equal(out, ag.attention(q, k, v, Causal))


@pytest.mark.parametrize("bad", ["shape", "dtype", "strides", "alias"])
def test_bad_out_is_refused(bad):
    q, k, v = inputs(kv_len=33, kv_heads=4)
    out = {
        "shape": torch.empty(2, 33, 4, 16), "dtype": torch.empty(q.shape, dtype=torch.bfloat16),
        "strides": torch.empty(2, 4, 33, 32).transpose(1, 2), "alias": q,
    }[bad]  # fmt: skip
    with pytest.raises(ag.ParameterError, match="out"):
        ag.attention(q, k, v, Causal, out=out)


def test_scale_argument_beats_the_variants():
    q, k, v = inputs()

    class Scaled(ag.Variant):
        scale = 0.5

    assert error(ag.attention(q, k, v, Scaled), ag.reference(q, k, v, scale=0.5)) < 1e-5
    assert error(ag.attention(q, k, v, Scaled, scale=0.25), ag.reference(q, k, v, scale=0.25)) < 1e-5
    assert error(ag.attention(q, k, v, scale=-0.25), ag.reference(q, k, v, scale=-0.25)) < 1e-5


def test_scalars_are_run_time_values():
    q, k, v = inputs()
    ag.attention(q, k, v, SoftCap, cap=20.0)
    before = len(ag.build_log())
    for cap in (1.0, 7, torch.tensor(3.0), np.float32(2.5), np.int64(6)):
        assert error(ag.attention(q, k, v, SoftCap, cap=cap), ag.reference(q, k, v, SoftCap, cap=cap)) < 1e-5
    for two in (2.0, np.float32(2.0)):
        assert error(ag.attention(q, k, v, SoftCap(two)), ag.reference(q, k, v, SoftCap, cap=2.0)) < 1e-5
    assert len(ag.build_log()) == before


def test_q_offset_moves_the_positions():
    q, k, v = inputs(q_len=5, kv_len=40)
    for offset in (0, 7, [3, -2], torch.tensor([35, 100]), [-50, 0]):
        out, lse = ag.attention(q, k, v, Causal, q_offset=offset, return_lse=True)
        ref, ref_lse = ag.reference(q, k, v, Causal, q_offset=offset, return_lse=True)
        assert error(out, ref) < 1e-5
        assert torch.equal(lse.isinf(), ref_lse.isinf())


def test_inputs_that_require_grad_are_refused():
    q, k, v = inputs()
    with pytest.raises(ag.UnsupportedError, match="no backward"):
        ag.attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert ag.attention(q, k, v).isfinite().all()


def test_kernel_object():
    kernel = ag.compile(SoftCap, dtype=torch.float32, head_dim=32)
    assert kernel.path.is_file()
    assert "hook_logits" in kernel.source and "static_assert" in kernel.source
    assert len(kernel.spec_hash) == 64
    assert str(kernel.config.block_m) in str(kernel.config)
    assert ag.compile(SoftCap(5.0), dtype=torch.float32, head_dim=32) is kernel


def test_many_shapes_do_not_grow_without_bound():
    variant = Causal()
    for kv_len in range(1, 1100):
        q, k, v = torch.ones(1, 1, 1, 32), torch.ones(1, kv_len, 1, 32), torch.ones(1, kv_len, 1, 32)
        assert ag.attention(q, k, v, variant)[0, 0, 0, 0].item() == pytest.approx(1.0)
    assert len(variant._sites) <= 1024


def test_sixteen_threads_build_one_kernel_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))

    class Fresh(ag.Variant):
        def logits(self, s, at):
            return s + 0.8125 * at.kv

    q, k, v = inputs()
    gate = threading.Barrier(16)

    def first_call(_):
        gate.wait()
        return ag.attention(q, k, v, Fresh())

    before = len(ag.build_log())
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(first_call, range(16)))
    assert all(torch.equal(results[0], r) for r in results)
    assert error(results[0], ag.reference(q, k, v, Fresh())) < 1e-5
    assert sum(not r.hit for r in ag.build_log()[before:]) == 1


_FORK = """
import os, sys, torch
import attngen as ag
from attngen.variants import Causal, SoftCap

torch.set_num_threads(2)
torch.manual_seed(0)
q, k, v = (torch.randn(2, 300, 4, 32) for _ in range(3))
expected = ag.attention(q, k, v, Causal)          # OpenMP has run in the parent
torch.randn(600, 600) @ torch.randn(600, 600)
pid = os.fork()
if pid == 0:
    class Child(ag.Variant):
        def logits(self, s, at):
            return s * 0.71875
    again, built = ag.attention(q, k, v, Causal), ag.attention(q, k, v, Child())  # on two threads
    torch.set_num_threads(1)  # torch's own operations hang here with more: its pool's threads stayed in the parent
    same = torch.equal(again, expected)
    built = (built.double() - ag.reference(q, k, v, Child())).abs().max().item() < 1e-5
    os._exit(0 if same and built else 7)
_, status = os.waitpid(pid, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_runs_and_builds(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen([sys.executable, "-c", _FORK], env=env, start_new_session=True)
    try:
        status = child.wait(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("the forked child hangs")
    assert status == 0


def test_parallel_callers_do_not_disturb_each_other():
    q, k, v = inputs(q_len=200, kv_len=200)
    expected = ag.attention(q, k, v, Causal)
    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(lambda _: ag.attention(q, k, v, Causal), range(64)):
            assert torch.equal(out, expected)


def test_the_oracle_in_chunks(monkeypatch):
    """Long inputs go through the oracle a few rows at a time."""
    from attngen import interp
    from attngen.variants import Sinks

    q, k, v = torch.randn(2, 50, 4, 16), torch.randn(2, 70, 2, 16), torch.randn(2, 70, 2, 16)
    options = dict(sinks=torch.randn(4), kv_lens=[70, 9], return_lse=True)
    whole = ag.reference(q, k, v, Sinks(), **options)
    monkeypatch.setattr(interp, "_CHUNK_ELEMENTS", 1000)
    for a, b in zip(whole, ag.reference(q, k, v, Sinks(), **options)):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
