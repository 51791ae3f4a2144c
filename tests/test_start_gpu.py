"""A pack on a GPU: loaded by a process that may build nothing and has no compiler, its first batch right, everything warmed up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from toolchain import needs_nvcc

import attngen as ag

pytestmark = pytest.mark.gpu

START = """
import sys, torch
import attngen as ag
from attngen.variants import Causal, Gemma2
loaded = ag.load_set(sys.argv[1], jit=False)
cache = torch.randn(8, 2, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
q = torch.randn(37, 8, 64, dtype=torch.bfloat16, device="cuda")
for variant in (Causal(), Gemma2()):
    attn = ag.BatchAttention(variant, num_heads=8, num_kv_heads=2, head_dim=64, page_size=16, max_requests=4, max_q_tokens=256,
                             max_pages=64, device="cuda")
    attn.plan([0, 36, 37], block_table=[[0, 1, 2, 3], [4, 5, 6, 7]], kv_lens=[60, 64])
    out = attn.run(q, cache)
    attn.check()
    for i, (start, end, length) in enumerate(((0, 36, 60), (36, 37, 64))):
        k, v = (cache[4 * i : 4 * i + 4, j].flatten(0, 1)[None, :length].float().cpu() for j in (0, 1))
        expected = ag.reference(q[None, start:end].float().cpu(), k, v, variant)[0]
        assert (out[start:end].float().cpu() - expected).abs().max() < 2e-2
assert ag.warmup(loaded) > 0
stats = ag.stats()
print(len(loaded.kernels), stats["builds"], loaded.layers())
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """For this machine's GPU, of two variants in all phases."""
    folder = tmp_path_factory.mktemp("pack")
    major, minor = torch.cuda.get_device_capability()
    (folder / "two.toml").write_text(
        f'[[kernels]]\nvariants = ["Causal", "Gemma2"]\nhead_dims = [64]\nphases = ["prefill", "decode", "append", "merge"]\n'
        f'archs = ["{major}.{minor}{"a" if major == 9 else ""}"]\n'
    )
    for command in (["precompile", "two.toml"], ["cache", "export", "two.toml", "-o", "two.attnpack"]):
        done = subprocess.run([sys.executable, "-m", "attngen", *command], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(Path(ag.__file__).parent.parent)})  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "two.attnpack"


@needs_nvcc
def test_a_pack_serves_without_a_compiler(pack, tmp_path):
    cache = {"ATTNGEN_CACHE_DIR": str(tmp_path / "cache")}
    toy.finish(toy.python("from attngen.load import host; host()", **cache))  # a bare checkout builds it, a wheel brings it
    env = {"PATH": "/nowhere", "ATTNGEN_JIT": "off", **cache}
    count, builds, layers = toy.finish(toy.python(START, pack, **env)).splitlines()[-1].split(" ", 2)
    assert int(count) > 10 and builds == "0" and layers == f"{{'pack:two': {count}}}"
    assert not (tmp_path / "cache" / "v1" / "kernels").exists()
