"""Plans and runs that repeat: the host extension launches what Python would have launched, byte for byte, and leaves to Python
whatever is not like a call that was good."""

from __future__ import annotations

import attngen as ag
import pytest
import stand_in
import torch
from attngen import batch as batches
from attngen import variants
from attngen.errors import ParameterError, UnsupportedError

HEADS, KV_HEADS, D, PAGE, PAGES, REQUESTS = 4, 2, 64, 16, 40, 4


class Kernel:
    """Keeps what it is launched with."""

    launches: list[tuple[str, bytes, int, int]] = []

    def __init__(self, special, *_):
        self.name = f"{special.name} {getattr(special.config, 'block_m', '')}"

    def blocks_per_sm(self):
        return 2

    def launch(self, params, grid_x, grid_y, stream):
        self.launches.append((self.name, bytes(params), grid_x, stream))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """An H100 whose kernels do nothing; no copy engine."""
    stand_in.install(monkeypatch, "90a", Kernel)
    monkeypatch.setattr(batches, "_engine_for", lambda device: stand_in.Engine)
    monkeypatch.setattr("attngen.boxes.host", lambda: type("Host", (), {"tensor_map": staticmethod(encode)}))
    Kernel.launches.clear()
    with torch.no_grad():
        yield


def encode(address, *facts):
    return repr((address, facts)).encode().ljust(128)[:128]


def taken() -> list[tuple[str, bytes, int, int]]:
    found = list(Kernel.launches)
    Kernel.launches.clear()
    return found


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def make(variant=None, **more):
    given = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=D, page_size=PAGE, max_requests=REQUESTS, max_q_tokens=256, max_pages=PAGES,
                 device="cpu")  # fmt: skip
    return ag.BatchAttention(variant or variants.Causal(), **{**given, **more})


def batch(longest=1, seed=0):
    """Plan's tensors, and q, k and v."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(REQUESTS * longest, HEADS, D, generator=random).bfloat16()
    k, v = torch.randn(2, PAGES, PAGE, KV_HEADS, D, generator=random).bfloat16()
    q_indptr = ints(*range(0, REQUESTS * longest + 1, longest))
    return (q_indptr, ints(0, 3, 6, 9, 12), torch.randperm(PAGES, generator=random)[:12].int(), ints(1, 16, 5, 9)), q, (k, v)


class both:
    """A call twice, by Python alone and then as it comes: the same launches. Gives whether the second was a repetition."""

    def __init__(self, attn, monkeypatch):
        self.attn, self.repeated = attn, []
        for name in ("remember_plan", "remember_run"):
            found = getattr(attn.engine, name)
            monkeypatch.setattr(attn.engine, name, lambda *a, found=found, name=name: (self.repeated.append(False), found(*a))[1])

    def __call__(self, name, *args, **given):
        taken()
        calls = self.attn._calls
        ran = calls.ran
        self.repeated = []
        result = getattr(self.attn, name)(*args, **given)
        quick = taken()
        repeated = not self.repeated
        if name == "run" and not ran:  # what follows would be another run of the plan
            return result, repeated
        self.attn._calls = None
        getattr(self.attn, name)(*args, **({"out": result} | given if name == "run" and isinstance(result, torch.Tensor) else given))
        self.attn._calls = calls
        assert quick == taken() and quick
        if name == "plan":  # the one by Python alone left nothing for run
            getattr(self.attn, name)(*args, **given)
            taken()
        return result, repeated


def again(attn, monkeypatch, lengths, q, kv, plan=None, run=None):
    """Several plans and runs of other tensors alike; all but the first are repetitions."""
    call = both(attn, monkeypatch)
    for i in range(3):
        plan_now = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in (plan or {}).items()}
        run_now = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in (run or {}).items()}
        assert call("plan", *(x.clone() for x in lengths), **plan_now)[1] == (i > 0)
        for layer in range(3):
            now = tuple(x.clone() for x in kv) if isinstance(kv, tuple) else kv.clone()
            assert call("run", q.clone(), now, **run_now)[1] == (i > 0 or layer > 0)
            out = torch.empty(*q.shape[:2], attn.head_dim_v, dtype=q.dtype)
            result, repeated = call("run", q.clone(), now, out=out, **run_now)
            assert result is out and repeated == (i > 0 or layer > 0)


@pytest.mark.parametrize("longest", [1, 8, 20, 64])
def test_structs_are_the_same(longest, monkeypatch):
    lengths, q, kv = batch(longest)
    again(make(), monkeypatch, lengths, q, kv)


def test_one_tensor_of_keys_and_values(monkeypatch):
    lengths, q, kv = batch()
    again(make(), monkeypatch, lengths, q, torch.stack(kv, 1))


def test_tensors_read_by_their_attributes(monkeypatch):
    """Torch before 2.10 exports no C functions. A process chooses once, so another one runs the tests."""
    import subprocess
    import sys
    from pathlib import Path

    script = "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch is such a one")
    names = [f"{__file__}::{test}" for test in ("test_structs_are_the_same", "test_one_tensor_of_keys_and_values", "test_what_is_bad_stays_bad")]
    done = subprocess.run([sys.executable, "-c", script, "-q", "-p", "no:cacheprovider", *names], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", ["Gemma2", "GptOss", "StreamingLLM", "Llama3RoPE", "ALiBi", "Document", "Sinks", "SlidingWindow"])
def test_parameters(name, monkeypatch):
    lengths, q, kv = batch(3)
    variant = variants.library()[name]()
    params = variants.example_params(type(variant), requests=REQUESTS, q_len=3, kv_len=40, num_heads=HEADS, num_kv_heads=KV_HEADS)
    attn = make(variant)
    to_plan, to_run = ({n: x for n, x in params.items() if n in fields} for fields in (attn.plan_fields, attn.run_fields))
    again(attn, monkeypatch, lengths, q, kv, to_plan, to_run)


def test_numbers_change_without_a_look(monkeypatch):
    lengths, q, kv = batch()
    attn = make(ag.compose(variants.SoftCap(), variants.SlidingWindow()))
    call = both(attn, monkeypatch)
    for i, (window, cap) in enumerate(((7, 20.0), (9, 30.0), (11, 5))):
        assert call("plan", *lengths, window=window)[1] == (i > 0)
        for j in range(2):
            assert call("run", q, kv, cap=cap)[1] == (i > 0 or j > 0)
    assert not call("plan", *lengths, window=torch.tensor(9, dtype=torch.int32))[1]  # is read on the device
    assert call("plan", *lengths, window=torch.tensor(3, dtype=torch.int32))[1]
    call("run", q, kv, cap=3.0)
    assert call("plan", *lengths, window=9)[1]
    call("run", q, kv, cap=3.0)
    with pytest.raises(ParameterError, match="32 bits"):
        attn.plan(*lengths, window=2**31)
    with pytest.raises(ParameterError, match="run before plan"):
        attn.run(q, kv)
    attn.plan(*lengths, window=9)
    with pytest.raises(ParameterError, match="fits f32"):
        attn.run(q, kv, cap=1e300)
    with pytest.raises(ParameterError, match="no parameter"):
        attn.run(q, kv, cap=1.0, scale=2.0)


def test_block_tables_and_positions(monkeypatch):
    _, q, kv = batch(2)
    attn = make(variants.SlidingWindow())
    call = both(attn, monkeypatch)
    q_indptr, lens, table = ints(0, 2, 4, 6, 8), ints(40, 3, 20, 17), torch.arange(12).int().view(4, 3)
    for i in range(2):
        assert call("plan", q_indptr.clone(), block_table=table.clone(), kv_lens=lens.clone())[1] == (i > 0)
        assert call("plan", q_indptr, block_table=table, kv_lens=lens, kv_start=ints(0, 1, 0, 5))[1] == (i > 0)
        assert call("plan", q_indptr, block_table=table, kv_lens=lens, q_positions=ints(7, 8, 9, 10))[1] == (i > 0)
        assert call("plan", q_indptr, block_table=table, kv_lens=lens, max_q_len=2)[1] == (i > 0)
    wider = torch.arange(24).int().view(4, 6)
    assert not call("plan", q_indptr, block_table=wider[:, :3], kv_lens=lens)[1]  # another stride
    with pytest.raises(ParameterError, match="kv_lens has 3 entries"):
        attn.plan(q_indptr, block_table=table, kv_lens=lens[:3])


def test_shared_prefixes(monkeypatch):
    lengths, q, kv = batch(3)
    attn = make(ag.Variant(), shared_prefix=True)
    call = both(attn, monkeypatch)
    for i in range(2):
        for given in ({}, {"shared_prefix": "off"}, {"shared_prefix": ints(0, 0, 1, -1)}):
            assert call("plan", *lengths, **given)[1] == (i > 0)
            for layer in range(2):
                assert call("run", q, kv)[1] == (i > 0 or layer > 0 or given != {})
            wide = torch.randn(20 + len(str(given)), HEADS, D).bfloat16()
            assert call("run", wide, kv)[1] == (i > 0)
    names = [name for name, *_ in (attn.plan(*lengths, shared_prefix=ints(0, 0, 0, 0)), attn.run(q, kv), taken())[2]]
    assert names[0].startswith("share") and len(names) >= 4
    with pytest.raises(ParameterError, match="shared_prefix 'on'"):
        attn.plan(*lengths, shared_prefix="on")


def test_a_plan_that_repeats_serves_a_run_that_does_not(monkeypatch):
    lengths, q, kv = batch(3)
    attn = make(variants.SlidingWindow())
    call = both(attn, monkeypatch)
    for _ in range(2):
        attn.plan(*lengths, window=5)
        attn.run(q, kv)
    lengths = [x.clone() for x in lengths]
    attn.plan(*lengths, window=6)
    attn.run(q, kv)
    wide = torch.randn(20, HEADS, D).bfloat16()
    assert not call("run", wide, kv)[1]  # compares what the repeated plan gave
    assert call("run", wide, kv)[1]


def test_classes_that_a_later_plan_launches(monkeypatch):
    lengths, q, kv = batch(8)
    attn = make()
    call = both(attn, monkeypatch)
    attn.plan(*lengths, max_q_len=8)
    call("run", q, kv)
    assert call("run", q, kv)[1]
    attn.plan(*lengths)
    assert call("run", q, kv)[1]
    names = {name for name, *_ in (attn.run(q, kv), taken())[1]}
    assert len(names) > 1


def test_tiles_of_32_rows_are_decodes_where_units_are_few():
    """2 blocks on each of 3 multiprocessors are 6 workers."""
    lengths, q, kv = batch(16)
    attn = make(max_q_len=16)
    for requests, wanted in ((1, "decode 32"), (4, "attention_sm90 64"), (1, "decode 32"), (3, "attention_sm90 64"), (4, "attention_sm90 64")):
        attn.plan(lengths[0][: requests + 1], lengths[1][: requests + 1], *lengths[2:3], lengths[3][:requests])
        attn.run(q[: 16 * requests], kv)
        assert [name for name, *_ in taken()] == ["plan ", "decode 16", wanted]
    assert [name for name, *_ in (attn.plan(*lengths, max_q_len=8), attn.run(q, kv), taken())[2]] == ["plan ", "decode 16"]


def test_partial_states(monkeypatch):
    lengths, q, kv = batch(2)
    attn = make()
    call = both(attn, monkeypatch)
    attn.plan(*lengths)
    for given in ({"return_lse": True}, {"partial": True}, {"return_lse": True, "partial": True}):
        first = attn.run(q, kv, **given)
        call.repeated.clear()
        out, lse = attn.run(q, kv, **given)
        assert not call.repeated and out.shape == first[0].shape and lse.shape == (8, HEADS) and lse.dtype == torch.float32
        assert out.dtype == (torch.float32 if "partial" in given else torch.bfloat16)
    sums = make(variants.Sigmoid(-8.0))
    sums.plan(*lengths)
    for _ in range(3):
        assert sums.run(q, kv, partial=True)[1] is None
        with pytest.raises(UnsupportedError, match="there is no LSE"):
            sums.run(q, kv, return_lse=True)


def test_tensors_that_the_copy_engine_reads(monkeypatch):
    """A layer has a cache of its own: maps by address."""
    lengths, q, kv = batch(64)
    attn = make()
    call = both(attn, monkeypatch)
    caches = [tuple(x.clone() for x in kv) for _ in range(3)]
    attn.plan(*lengths)
    for i in range(3):
        for j, cache in enumerate(caches):
            assert call("run", q, cache)[1] == (i + j > 0)


def test_two_objects_in_one_workspace():
    lengths, q, kv = batch()
    raw = torch.empty(1 << 26, dtype=torch.uint8)
    space = raw[-raw.data_ptr() % 256 :]
    a, b = make(workspace=space), make(workspace=space)
    for _ in range(3):
        a.plan(*lengths)
        a.run(q, kv)
        b.plan(*lengths)
        b.run(q, kv)
        with pytest.raises(ParameterError, match="another object has planned"):
            a.run(q, kv)
    a.plan(*lengths)
    a.run(q, kv)


def test_what_is_bad_stays_bad():
    """After good calls, repeated ones among them."""
    lengths, q, (k, v) = batch(2)
    attn = make()
    out = torch.empty_like(q)
    for _ in range(3):
        attn.plan(*lengths)
        attn.run(q, (k, v))
        attn.run(q, (k, v), out=out)
    flat = torch.empty(q.numel() + 8, dtype=q.dtype)
    odd = flat[1 : 1 + q.numel()].view(q.shape)
    grown = q.clone().requires_grad_()
    for match, wrong in {
        "q is torch.float16": dict(q=q.half()),
        "required \\[tokens, 4, 64\\]": dict(q=q[:, :2]),
        "required contiguous \\(6": dict(q=q[:6]),
        "no multiple of 16": dict(q=odd),
        "k is torch.float16": dict(kv=(k.half(), v)),
        "v has shape": dict(kv=(k, v[:, :8])),
        "k has strides": dict(kv=(k.transpose(-1, -2).contiguous().transpose(-1, -2), v)),
        "k has 39 pages and v 40": dict(kv=(k[:39], v)),
        "dimension of 2": dict(kv=k),
        "out is": dict(out=out.float()),
        "required contiguous": dict(out=torch.empty(8, HEADS, 2 * D, dtype=q.dtype)[..., :D]),
        "out starts at": dict(out=odd),
        "out shares memory": dict(out=q),
        "resolve_neg": dict(q=torch._neg_view(q)),
        "no parameter": dict(window=3),
    }.items():
        for _ in range(2):
            given = {"q": q, "kv": (k, v), "out": out} | wrong
            with pytest.raises(ParameterError, match=match):
                attn.run(given.pop("q"), given.pop("kv"), **given)
    with torch.enable_grad():
        for wrong in (dict(q=grown), dict(out=torch.empty_like(q).requires_grad_())):
            given = {"q": q, "out": out} | wrong
            with pytest.raises(UnsupportedError, match="grad"):
                attn.run(given["q"], (k, v), out=given["out"])
        attn.run(q, (k, v), out=out)
    attn.run(grown, (k, v), out=out)  # under no_grad
    q_indptr, kv_indptr, indices, last = lengths
    for match, wrong in {
        "q_indptr is torch.int64": (q_indptr.long(), kv_indptr, indices, last),
        "contiguous int32 vector": (torch.stack([q_indptr] * 2, 1)[:, 0], kv_indptr, indices, last),
        "q_indptr is of 3 requests and the key lengths of 4": (q_indptr[:4], kv_indptr, indices, last),
        "kv_last_page_len has 3 entries": (q_indptr, kv_indptr, indices, last[:3]),
        "required kv_indptr, kv_indices": (q_indptr, kv_indptr, indices, None),
    }.items():
        with pytest.raises(ParameterError, match=match):
            attn.plan(*wrong)
        with pytest.raises(ParameterError, match="run before plan"):
            attn.run(q, (k, v))
        attn.plan(*lengths)
        attn.run(q, (k, v))
    with pytest.raises(ParameterError, match="no parameter"):
        attn.plan(*lengths, window=3)
    for bad in (-1, 0, 10**9, 2**70):
        with pytest.raises(ParameterError, match="max_q_len"):
            attn.plan(*lengths, max_q_len=bad)


def test_rows_that_the_host_counts():
    lengths, q, kv = batch()
    attn = make()
    for rows in (4, 3, 2):
        attn.plan(None, lengths[1][: rows + 1], lengths[2], lengths[3][:rows])
        for wanted in (4, 3, 2, 4, 3, 2):
            if wanted >= rows:
                attn.run(q[:wanted], kv)
            else:
                with pytest.raises(ParameterError, match=f"q has {wanted} rows: required the {rows} of the {rows} planned requests"):
                    attn.run(q[:wanted], kv)


def test_pages_that_the_host_has_seen():
    lengths, q, kv = batch()
    attn = make()
    attn.plan(*lengths)
    attn.run(q, kv)
    attn.run(q, kv)
    attn.plan([0, 1], [0, 1], [PAGES], [3])
    for _ in range(2):
        with pytest.raises(ParameterError, match=f"page {PAGES} of the plan"):
            attn.run(q, kv)
    attn.plan(*lengths)
    attn.run(q, kv)
