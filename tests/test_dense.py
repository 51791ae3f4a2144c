"""``attention`` on CUDA without a GPU: structs, strides, lengths and errors, the kernels played on the host."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

import attngen as ag
import emulated
from attngen import cuda, engine
from attngen.engine import CudaEngine, Facts
from attngen.variants import Causal, SlidingWindow
from compare import compare
from toolchain import needs_nvcc


def tensors(layout, q_len, kv_len, batch=3, heads=4, kv_heads=2, d=64, dv=64, dtype=torch.bfloat16, sliced=False):
    """Random q, k, v; sliced: windows of larger tensors that hold NaN elsewhere."""
    def one(length, heads, dim):
        if not sliced:
            x = torch.randn(batch, length, heads, dim).to(dtype)
            return x if layout == "bshd" else x.transpose(1, 2).contiguous()
        shape = (batch, length + 3, heads + 1, dim + 8) if layout == "bshd" else (batch, heads + 1, length + 3, dim + 8)
        x = torch.full(shape, torch.nan, dtype=dtype)
        view = x[:, 2 : 2 + length, :heads, :dim] if layout == "bshd" else x[:, :heads, 2 : 2 + length, :dim]
        return view.copy_(torch.randn(view.shape))

    return one(q_len, heads, d), one(kv_len, kv_heads, d), one(kv_len, kv_heads, dv)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("q_len", [1, 17, 70])
@pytest.mark.parametrize("given", ["none", "lists", "device"])
def test_rows_and_keys_are_where_the_strides_say(monkeypatch, layout, sliced, q_len, given):
    variant = SlidingWindow(20)
    q, k, v = tensors(layout, q_len, 90, sliced=sliced, dv=32)
    lens = {}
    if given != "none":
        rng = random.Random(q_len)
        lens = {"q_lens": [rng.randint(0, q_len), 0, q_len], "kv_lens": [rng.randint(1, 89), 90, 0], "q_offset": [5, -2, 30]}
    ref, ref_lse = ag.reference(q, k, v, variant, layout=layout, return_lse=True, window=30, **lens)
    launches = emulated.install(monkeypatch, variant)
    if given == "device":
        lens = {n: torch.tensor(x, dtype=torch.int32 if n == "q_lens" else torch.int64) for n, x in lens.items()}
    window = torch.tensor(30, dtype=torch.int32) if given == "device" else 30
    out, lse = ag.attention(q, k, v, variant, layout=layout, return_lse=True, window=window, **lens)
    compare(out, ref)
    compare(lse, ref_lse, dtype=torch.float32)
    names = ["plan", {1: "decode", 17: "attention_sm90", 70: "attention_sm90"}[q_len]]
    assert [name for name, _, _ in launches] == names
    given_out = torch.full_like(out, torch.nan)
    assert ag.attention(q, k, v, variant, layout=layout, out=given_out, window=30, **lens) is given_out
    compare(given_out, ref)


def test_uniform_calls_need_no_index_tensors(monkeypatch):
    q, k, v = tensors("bshd", 5, 40)
    launches = emulated.install(monkeypatch, variant := Causal())
    ag.attention(q, k, v, variant)
    plan = launches[0][1]
    assert not any(getattr(plan, n) for n in ("q_indptr", "q_lens", "q_positions", "kv_indptr", "kv_lens", "kv_starts"))


def test_lengths_out_of_range_on_the_device_spoil_their_request_alone(monkeypatch):
    q, k, v = tensors("bhsd", 5, 40)
    emulated.install(monkeypatch, variant := Causal())
    for lens in ({"q_lens": torch.tensor([5, 6, 2])}, {"kv_lens": torch.tensor([40, 41, 2])}, {"kv_lens": torch.tensor([1, 2**40, 2])}):
        out, lse = ag.attention(q, k, v, variant, layout="bhsd", return_lse=True, **lens)
        assert out[1].isnan().all() and lse[1].isnan().all() and out[::2].isfinite().all() and not lse[::2].isnan().any()


def test_kernels_are_shared_by_calls_of_one_class(monkeypatch):
    emulated.install(monkeypatch, variant := Causal())
    loads = []
    fake = cuda.load
    monkeypatch.setattr(cuda, "load", lambda special, *rest: loads.append(special.name) or fake(special, *rest))
    for kv_len in (8, 9, 30):
        for q_len in (1, 8, 20, 33, 100):
            ag.attention(*tensors("bshd", q_len, kv_len), variant)
    assert sorted(loads) == ["attention_sm90", "attention_sm90", "decode", "plan", "plan", "plan"]


def test_two_calls_share_no_workspace(monkeypatch):
    """Memory of a call that the device has not finished is not another's: torch frees it in the stream's order."""
    q, k, v = tensors("bshd", 1, 30)
    launches = emulated.install(monkeypatch, variant := Causal())
    made, empty = [], torch.empty
    def recorded(*args, **kwargs):
        made.append(empty(*args, **kwargs))
        return made[-1]
    monkeypatch.setattr(torch, "empty", recorded)
    for _ in range(2):
        ag.attention(q, k, v, variant)
    assert len({p.workers for name, p, _ in launches if name == "decode"}) == 2


def test_bad_input(monkeypatch):
    variant = Causal()
    emulated.install(monkeypatch, variant)
    q, k, v = tensors("bshd", 5, 40)
    with pytest.raises(ag.UnsupportedError, match="float32 on CUDA"):
        ag.attention(q.float(), k.float(), v.float(), variant)
    with pytest.raises(ag.ParameterError, match="multiples of 8"):
        ag.attention(torch.empty(3, 5, 4, 68, dtype=torch.bfloat16)[..., :64], k, v, variant)
    flat = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    with pytest.raises(ag.ParameterError, match="no multiple of 16"):
        ag.attention(flat, k, v, variant)
    with pytest.raises(ag.ParameterError, match="out starts at an address"):
        ag.attention(q, k, v, variant, out=flat)
    with pytest.raises(ag.ParameterError, match="contiguous"):
        ag.attention(q, k, v, variant, out=torch.empty(3, 4, 5, 64, dtype=q.dtype).transpose(1, 2))
    with pytest.raises(ag.ParameterError, match="out shares memory"):
        ag.attention(q, k, v, variant, out=q)
    with pytest.raises(ag.UnsupportedError, match="requires grad"):
        ag.attention(q.clone().requires_grad_(), k, v, variant)
    with pytest.raises(ag.UnsupportedError, match="multiple of 16 from 32 to 256"):
        ag.attention(*tensors("bshd", 5, 40, d=24, dv=24), variant)
    with pytest.raises(ag.ParameterError, match=r"kv_lens\[1\] is 41: required 0 to 40"):
        ag.attention(q, k, v, variant, kv_lens=[1, 41, 2])
    with pytest.raises(ag.ParameterError, match="q_lens is torch.float32"):
        ag.attention(q, k, v, variant, q_lens=torch.ones(3))
    with pytest.raises(ag.ParameterError, match="kv_lens is torch.int32"):
        ag.attention(q, k, v, variant, kv_lens=torch.ones(2, dtype=torch.int32))
    window = SlidingWindow()
    emulated.install(monkeypatch, window)
    with pytest.raises(ag.ParameterError, match="required a number or a 0-dim torch.int32"):
        ag.attention(q, k, v, window, window=torch.tensor(3.0))


def test_devices_that_have_no_kernels(monkeypatch):
    cuda.device_arch.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(ag.UnsupportedError, match="sm_75 has no CUDA kernels"):
        cuda.device_arch(0)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(ag.UnsupportedError, match="ROCm"):
        cuda.device_arch(1)
    cuda.device_arch.cache_clear()
    with pytest.raises(ag.UnsupportedError, match="meta: required cpu"):
        ag.attention(*(x.to("meta") for x in tensors("bshd", 1, 4)))


def test_windows_is_refused_by_name():
    program = "import torch, sys; sys.platform = 'win32'; import attngen"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: attngen runs on Linux; found Windows" in done.stderr


def test_a_capture_that_would_load_is_refused(monkeypatch):
    emulated.install(monkeypatch, variant := Causal())

    def capturing(device, what, do):
        raise ag.UnsupportedError(f"{what} is not loaded. {do}")

    monkeypatch.setattr(cuda, "refuse_capture", capturing)
    q, k, v = tensors("bshd", 5, 40)
    with pytest.raises(ag.UnsupportedError, match="kernel of Causal for bfloat16, head_dim 64/64.*call attention once"):
        ag.attention(q, k, v, variant)
    monkeypatch.setattr(cuda, "refuse_capture", lambda *_: None)
    ag.attention(q, k, v, variant)
    monkeypatch.setattr(cuda, "refuse_capture", capturing)
    ag.attention(q, k, v, variant)
    with pytest.raises(ag.UnsupportedError, match="kv_lens, which the host holds"):
        ag.attention(q, k, v, variant, kv_lens=[1, 2, 3])


# ---------------------------------------------------------------- ahead of time


def batch_engine(variant, space=None, **more):
    facts = dict(
        variant=variant, device=torch.device("cpu"), dtype=torch.bfloat16, num_heads=8, num_kv_heads=2, head_dim=64, head_dim_v=64,
        page_size=16, max_requests=9, max_q_tokens=300, max_q_len=300, capacity=77, max_kv_len=77 * 16, head_offset=0, total_heads=8,
        batch_invariant=False, storage=(), scale=0.1,
    )  # fmt: skip
    raw = torch.empty(1 << 25, dtype=torch.uint8)
    return CudaEngine(Facts(**facts | more), raw[-raw.data_ptr() % 256 :])


def test_compile_builds_what_batches_and_calls_look_up(monkeypatch):
    emulated.install(monkeypatch, variant := SlidingWindow(20))
    built, loaded = [], []
    monkeypatch.setattr(cuda, "build", lambda special: built.append(special.key) or (None, True, 0.0))
    kernels = ag.compile(variant, arch="sm_90", head_dim=64)
    ahead = {k.spec_hash for k in kernels}
    assert ahead == set(built) and len(kernels) == len(ahead)
    assert sorted(k.name for k in kernels) == ["attention_sm90"] * 6 + ["decode"] * 4 + ["plan"]
    invariant = {k.spec_hash for k in ag.compile(variant, arch="sm_90a", head_dim=64, batch_invariant=True)}

    fake = cuda.load
    monkeypatch.setattr(cuda, "load", lambda special, *rest: loaded.append(special.key) or fake(special, *rest))
    for q_len in (1, 40, 300):
        ag.attention(*tensors("bshd", q_len, 30, d=64), variant)
        for page_size in (16, 5, None):
            batch_engine(variant, max_q_len=q_len, page_size=page_size)
    assert set(loaded) == ahead
    del loaded[:]
    for q_len in (1, 40):
        batch_engine(variant, max_q_len=q_len, batch_invariant=True)
    assert set(loaded) < invariant and not set(loaded) & ahead


@needs_nvcc
def test_compile_for_a_gpu_that_is_not_here():
    kernels = ag.compile(Causal(), arch="sm_86", head_dim=64, dtype=torch.float16, paged=False)
    assert [k.name for k in kernels] == ["decode", "decode", "attention_sm80", "attention_sm80", "plan"]
    for k in kernels:
        assert k.path.read_bytes()[:4] == b"\x7fELF" and "__global__" in k.source and k.config.arch == "86"
    again = ag.compile(Causal, device="cuda", arch="sm_86", head_dim=64, dtype=torch.float16, paged=False)
    assert [k.spec_hash for k in again] == [k.spec_hash for k in kernels]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": "sm_75"}, ag.UnsupportedError, "sm_75 has no CUDA kernels"),
        ({"arch": "hopper"}, ag.UnsupportedError, "arch 'hopper': required the name"),
        ({"arch": "sm_90a", "dtype": torch.float32}, ag.UnsupportedError, "float32 on CUDA"),
        ({"arch": "sm_90a", "head_dim": 24}, ag.UnsupportedError, "multiple of 16"),
        ({"arch": "sm_90a", "device": "cpu"}, ag.ParameterError, "arch, paged, batch_invariant and shared_prefix belong to CUDA"),
        ({"arch": "sm_90a", "isa": "avx2"}, ag.ParameterError, "isa belongs to the CPU"),
    ],
)
def test_compile_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ag.compile(Causal(), **arguments)


@pytest.mark.parametrize("page_size", [16, None])
@pytest.mark.parametrize("most", [1, 40, 300])
@pytest.mark.parametrize("invariant", [False, True])
def test_workspace_bytes_is_known_without_a_gpu(monkeypatch, page_size, most, invariant):
    given = dict(num_heads=8, num_kv_heads=2, head_dim=64, page_size=page_size, max_requests=9, max_q_tokens=300, max_q_len=most,
                 batch_invariant=invariant)  # fmt: skip
    size = ag.workspace_bytes(Causal, max_pages=77, max_kv_tokens=77, arch="sm_90", multiprocessors=3, **given)
    emulated.install(monkeypatch, variant := Causal())
    made = batch_engine(variant, page_size=page_size, max_q_len=most, batch_invariant=invariant, max_kv_len=77 * (page_size or 1))
    assert made.workspace_bytes == size
    assert all(n <= part.num_workers for n, part in zip(made._loaded.workers, made._space.classes))


@pytest.mark.parametrize("name", ["80", "86", "90a", "120"])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_no_more_blocks_fit_than_the_workspace_is_sized_for(name, d):
    problem = engine.cuda_problem(name, torch.bfloat16, d, d, ())
    for kernel in engine.kernels_of(Causal(), problem, page_size=16).classes:
        most = engine.most_blocks(kernel.config)
        assert kernel.config.blocks_per_sm <= most and most * kernel.config.threads <= 2048
