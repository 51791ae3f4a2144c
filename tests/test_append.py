"""append_kv: what it writes and what it leaves alone, bit for bit, by every way to name a slot; RoPE against the oracle.

Each test runs on the CPU, with the CUDA kernel's text compiled for this host ("text"), and, marked gpu, on a GPU.
"""

from __future__ import annotations

from itertools import count

import pytest
import torch
from compare import compare
from on_host import kernel

import attngen as ag
from attngen import append, cuda
from attngen.abi_cuda import APPEND_FIELDS
from attngen.rope import DynamicNTK, Linear, Llama3, LongRoPE, RoPE, YaRN, rotate

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", "text", pytest.param("cuda", marks=pytest.mark.gpu)]
seeds = count()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where tensors go; "text" has the CPU's tensors served by the kernel's text."""
    if request.param != "text":
        return torch.device(request.param)

    def load(index, dtype, d, dv, rope):
        config = append.config_of("90a", dtype, d, dv, rope)
        special = append.specialise(config)
        status = append._status.setdefault(0, torch.zeros(2, dtype=torch.int32))
        return append._Loaded(kernel(special), config, special, None if rope is None else rope.inv_freq(d), status)

    monkeypatch.setattr(append, "_load", load)
    monkeypatch.setattr(append, "_KERNELS", ("cpu", "cuda"))
    monkeypatch.setattr(append, "_sites", {})
    monkeypatch.setattr(append, "_status", {})
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0)
    return torch.device("cpu")


def check(device):
    """Also of "text", whose status word stands for that of cuda:0."""
    ag.check_append("cuda:0" if append._status else device)


def ints(x, device, dtype=torch.int32):
    return torch.tensor(x, dtype=dtype, device=device)


def same_bits(a, b):
    return torch.equal(a.view(torch.int16 if a.element_size() == 2 else torch.int32),
                       b.view(torch.int16 if b.element_size() == 2 else torch.int32))  # fmt: skip


class Batch:
    """New tokens of several requests, random pages, a cache of NaN, and where everything goes."""

    def __init__(self, device, q_lens=(5, 0, 1, 9), kv_lens=(20, 7, 1, 9), page_size=4, layout="NHD", heads=3, d=64, dv=40,
                 dtype=BF16, interleaved=False):  # fmt: skip
        random = torch.Generator().manual_seed(next(seeds))
        self.q_lens, self.kv_lens, self.layout, self.page_size = q_lens, kv_lens, layout, page_size
        tokens = sum(q_lens)
        pages = [-(-n // page_size) for n in kv_lens]
        order = torch.randperm(sum(pages) + 3, generator=random).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in pages]
        shape = (sum(pages) + 3, page_size, heads) if layout == "NHD" else (sum(pages) + 3, heads, page_size)
        if interleaved:
            both = torch.full((shape[0], 2, *shape[1:], d), torch.nan, dtype=dtype)
            self.cache = both.to(device)
            self.k_cache, self.v_cache = self.cache[:, 0], self.cache[:, 1]
        else:
            self.k_cache, self.v_cache = (torch.full((*shape, n), torch.nan, dtype=dtype).to(device) for n in (d, dv))
            self.cache = (self.k_cache, self.v_cache)
        # k and v as slices of a projection's output
        fused = torch.randn(tokens, heads, d + dv + 8, generator=random).to(dtype).to(device)
        self.k, self.v = fused[:, :, :d], fused[:, :, d : d + dv]
        self.request = [r for r, n in enumerate(q_lens) for _ in range(n)]
        self.position = [m - n + i for n, m in zip(q_lens, kv_lens) for i in range(n)]
        self.q_indptr = ints([0, *torch.tensor(q_lens).cumsum(0).tolist()], device)
        self.lens = ints(list(kv_lens), device)
        self.indices = ints([p for own in self.pages for p in own], device)
        self.indptr = ints([0, *torch.tensor(pages).cumsum(0).tolist()], device)
        width = max(pages) + 2
        wide = torch.full((len(pages), width + 3), 10**6, dtype=torch.int32)
        self.table = wide[:, :width]  # rows of a wider table
        for r, own in enumerate(self.pages):
            self.table[r, : len(own)] = torch.tensor(own, dtype=torch.int32)
        self.table = wide.to(device)[:, :width]

    def place(self, i):
        page, slot = self.pages[self.request[i]][self.position[i] // self.page_size], self.position[i] % self.page_size
        return (page, slot) if self.layout == "NHD" else (page, slice(None), slot)

    def slots(self):
        n = self.page_size
        return [self.pages[r][p // n] * n + p % n for r, p in zip(self.request, self.position)]

    def index(self, style, device):
        """The keyword arguments of a style, from append_positions where it needs them."""
        request_of, positions = ag.append_positions(self.q_indptr, self.lens, num_tokens=len(self.k))
        if style == "slots":
            return {"slot_mapping": ints(self.slots(), device, torch.int64), "positions": positions, "request_of": request_of}
        if style == "slots32":
            return {"slot_mapping": ints(self.slots(), device), "positions": positions.long(), "request_of": request_of.long()}
        where = {"positions": positions, "request_of": request_of}
        if style == "table":
            return where | {"block_table": self.table}
        return where | {"kv_indices": self.indices, "kv_indptr": self.indptr}

    def expected(self, k=None):
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        for i in range(len(self.k)):
            k_cache[self.place(i)], v_cache[self.place(i)] = (self.k if k is None else k)[i], self.v[i]
        return k_cache, v_cache


@pytest.mark.parametrize("style", ["slots", "slots32", "indices", "table"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["pair", "one tensor"])
def test_writes_what_it_should_and_nothing_else(style, layout, interleaved, device):
    for page_size in (1, 5, 16):
        batch = Batch(device, page_size=page_size, layout=layout, dv=64, interleaved=interleaved)
        k_cache, v_cache = batch.expected()
        ag.append_kv(batch.k, batch.v, batch.cache, kv_layout=layout, **batch.index(style, device))
        assert same_bits(batch.k_cache, k_cache) and same_bits(batch.v_cache, v_cache)
    check(device)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_head_sizes_and_dtypes(dtype, device, request):
    if dtype == F32 and "cpu" not in request.node.callspec.id:
        pytest.skip("float32 is the CPU's")
    for d, dv, heads in ((64, 40, 1), (8, 128, 7), (192, 128, 4)):
        batch = Batch(device, d=d, dv=dv, heads=heads, dtype=dtype)
        k_cache, v_cache = batch.expected()
        ag.append_kv(batch.k, batch.v, batch.cache, **batch.index("table", device))
        assert same_bits(batch.k_cache, k_cache) and same_bits(batch.v_cache, v_cache)


@pytest.mark.parametrize("style", ["slots", "indices", "table"])
def test_padding_is_skipped(style, device):
    """Rows past the index tensors, and negative slots, positions, requests and pages."""
    batch = Batch(device)
    given = batch.index(style, device)
    skipped = [2, 7] if style == "slots" else [2, 7, 9]
    for name, i, value in (("slot_mapping", 2, -1), ("positions", 2, -5), ("request_of", 7, -1), ("positions", 7, 2**31 - 1)):
        if name in given and (style != "slots" or (name, i) in (("slot_mapping", 2), ("request_of", 7))):
            given[name][i] = value
    if style == "table":
        batch.table[3, batch.position[9] // 4] = -1
        skipped += [i for i in range(len(batch.k)) if batch.request[i] == 3 and batch.position[i] // 4 == batch.position[9] // 4]
    elif style == "indices":
        batch.indices[batch.indptr[3] + batch.position[9] // 4] = -1
        skipped += [i for i in range(len(batch.k)) if batch.request[i] == 3 and batch.position[i] // 4 == batch.position[9] // 4]
    given = {n: x[:-2] if n in ("slot_mapping", "positions", "request_of") else x for n, x in given.items()}
    skipped += [len(batch.k) - 2, len(batch.k) - 1]
    k_cache, v_cache = batch.k_cache.clone(), batch.v_cache.clone()
    for i in set(range(len(batch.k))) - set(skipped):
        k_cache[batch.place(i)], v_cache[batch.place(i)] = batch.k[i], batch.v[i]
    ag.append_kv(batch.k, batch.v, batch.cache, **given)
    check(device)
    assert same_bits(batch.k_cache, k_cache) and same_bits(batch.v_cache, v_cache)


LONG = LongRoPE(tuple(1.0 + 0.01 * i for i in range(32)), tuple(1.0 + 0.7 * i for i in range(32)), 512, factor=4.0)
ROPES = {
    "llama": RoPE(500_000.0), "interleaved": RoPE(interleaved=True), "half of the head": RoPE(rotary_dim=32),
    "24 of 64": RoPE(rotary_dim=24), "24 interleaved": RoPE(rotary_dim=24, interleaved=True),
    "48 interleaved": RoPE(rotary_dim=48, interleaved=True), "linear": RoPE(scaling=Linear(4.0)),
    "yarn": RoPE(scaling=YaRN(8.0, 512, attention_factor=1.25)), "llama3": RoPE(5e5, scaling=Llama3(8.0, 1.0, 4.0, 1024)),
    "longrope": RoPE(scaling=LONG), "dynamic": RoPE(scaling=DynamicNTK(2.0, 512)),
    "dynamic, 24 interleaved": RoPE(rotary_dim=24, interleaved=True, scaling=DynamicNTK(2.0, 512)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [*((name, BF16) for name in ROPES), ("llama", F16), ("24 interleaved", F16)])
def test_rope(name, dtype, device):
    rope = ROPES[name]
    batch = Batch(device, q_lens=(3, 1, 40), kv_lens=(3, 100_003, 700), page_size=16, dtype=dtype)
    turned = []
    for r, (n, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens)):
        rows, index = rope.tables(64, [kv_len])
        own = batch.k[[i for i, x in enumerate(batch.request) if x == r]].double().cpu()
        at = torch.arange(kv_len - n, kv_len)[:, None]
        turned.append(rotate(own, at, rows[0 if index is None else int(index[0])], rope.mscale, rope.interleaved))
    turned = torch.cat(turned)
    for style in ("table", "slots"):
        k_cache, v_cache = batch.expected()
        more = {"kv_lens": batch.lens} if rope.needs_kv_lens else {}
        ag.append_kv(batch.k, batch.v, batch.cache, rope=rope, **batch.index(style, device), **more)
        found = torch.stack([batch.k_cache[batch.place(i)] for i in range(len(batch.k))]).cpu()
        compare(found, turned)
        rotary = rope.rotary_dim or 64
        assert same_bits(found[..., rotary:].contiguous(), batch.k[..., rotary:].cpu().contiguous())
        assert not torch.equal(found[1], batch.k[1].cpu()) and same_bits(batch.v_cache, v_cache)
        for i in range(len(batch.k)):  # beside its tokens the cache is as it was
            batch.k_cache[batch.place(i)] = k_cache[batch.place(i)] = 0
        assert same_bits(batch.k_cache, k_cache)
    check(device)


@pytest.mark.parametrize("name", ["llama", "24 interleaved", "yarn", "longrope", "dynamic"])
def test_cached_keys_attend_as_rotated_ones(name, device):
    """Appending with RoPE, then keys="cached": the same attention as keys="rotate" over unrotated keys."""
    rope = ROPES[name]

    class Cached(ag.Variant):
        pass

    class Rotated(ag.Variant):
        pass

    Cached.rope = rope
    Rotated.rope = RoPE(rope.theta, scaling=rope.scaling, interleaved=rope.interleaved, rotary_dim=rope.rotary_dim, keys="rotate")
    batch = Batch(device, q_lens=(30, 600), kv_lens=(30, 600), dv=64, dtype=F16)
    more = {"kv_lens": batch.lens} if rope.needs_kv_lens else {}
    ag.append_kv(batch.k, batch.v, batch.cache, rope=rope, **batch.index("indices", device), **more)
    for r, n in enumerate(batch.kv_lens):
        own = [i for i, x in enumerate(batch.request) if x == r]
        k, v = (torch.stack([c[batch.place(i)] for i in own]).cpu()[None].double() for c in (batch.k_cache, batch.v_cache))
        q = torch.randn(1, 4, 3, 64).double()
        found = ag.reference(q, k, v, Cached())
        compare(found, ag.reference(q, batch.k[own].cpu()[None].double(), v, Rotated()), dtype=BF16)


@pytest.mark.gpu
def test_batch_attention_over_appended_keys():
    """Prefill in two steps through append_kv and BatchAttention, against the oracle on unrotated keys."""
    from attngen.variants import Llama3RoPE

    rope = Llama3RoPE().trace.rope.rope

    class Cached(ag.Variant):
        def mask(self, at):
            return at.kv <= at.q

    class Rotated(Cached):
        pass

    Cached.rope = RoPE(rope.theta, scaling=rope.scaling)
    Rotated.rope = RoPE(rope.theta, scaling=rope.scaling, keys="rotate")
    batch = Batch(torch.device("cuda"), q_lens=(90, 300), kv_lens=(90, 300), page_size=16, heads=2, d=128, dv=128)
    q = torch.randn(len(batch.k), 8, 128, device="cuda").to(BF16)
    attn = ag.BatchAttention(Cached(), num_heads=8, num_kv_heads=2, head_dim=128, page_size=16, max_requests=2, max_q_tokens=512,
                             max_pages=64)  # fmt: skip
    starts, cut = [0, 90], (50, 100)
    outs = [[], []]
    for step in (0, 1):
        rows = [range(s, s + c) if not step else range(s + c, s + n) for s, c, n in zip(starts, cut, batch.q_lens)]
        lens = list(cut) if not step else list(batch.q_lens)
        take = torch.tensor([i for r in rows for i in r], device="cuda")
        q_indptr, kv_lens = ints([0, len(rows[0]), len(take)], "cuda"), ints(lens, "cuda")
        request_of, positions = ag.append_positions(q_indptr, kv_lens, num_tokens=len(take))
        ag.append_kv(batch.k[take], batch.v[take], batch.cache, positions=positions, request_of=request_of,
                     block_table=batch.table, rope=Cached.rope)  # fmt: skip
        attn.plan(q_indptr, block_table=batch.table, kv_lens=kv_lens)
        out = attn.run(q[take], batch.cache)
        outs[0].append(out[: len(rows[0])]), outs[1].append(out[len(rows[0]) :])
    attn.check(), ag.check_append()
    for r, (s, n) in enumerate(zip(starts, batch.q_lens)):
        args = [x[s : s + n].cpu()[None] for x in (q, batch.k, batch.v)]
        ref = ag.reference(*args, Rotated())[0]
        compare(torch.cat(outs[r]).cpu(), ref, like=ref.to(BF16) + 2e-3)


def test_append_positions(device):
    lens, kv = [3, 0, 2, 1, 0], [10, 4, 2, 0, 0]  # request 3 has a token more than keys: position -1
    indptr = ints([0, 3, 3, 5, 6, 6], device)
    request_of, positions = ag.append_positions(indptr, ints(kv, device), num_tokens=9)
    assert request_of.tolist() == [0, 0, 0, 2, 2, 3, -1, -1, -1] and positions.tolist() == [7, 8, 9, 0, 1, -1, -1, -1, -1]
    assert request_of.dtype == positions.dtype == torch.int32 and request_of.device.type == device.type
    assert [len(x) for x in ag.append_positions(indptr, ints(kv, device))] == [6, 6]
    assert [x.tolist() for x in ag.append_positions(ints([0], device), ints([], device), num_tokens=2)] == [[-1, -1]] * 2
    for bad, match in ((dict(kv_lens=ints(kv[1:], device)), "6 entries and kv_lens 4"), (dict(num_tokens=-1), "at least 0"),
                       (dict(q_indptr=indptr.long()), "int64")):  # fmt: skip
        with pytest.raises(ag.ParameterError, match=match):
            ag.append_positions(**{"q_indptr": indptr, "kv_lens": ints(kv, device), "num_tokens": 6} | bad)


def bad_page(b, given):
    b.table[3, 0] = len(b.k_cache)
    return 6, 7, 8, 9  # request 3 begins there


def bad_position(b, given):
    given["positions"][4] = 4 * b.table.shape[1]
    return (4,)


def bad_request(b, given):
    given["request_of"][5] = 4
    return (5,)


def bad_slot(b, given):
    given["slot_mapping"][3] = 4 * len(b.k_cache)
    return (3,)


def bad_indptr(b, given):
    b.indptr[4] = len(b.indices) + 1
    return range(6, 15)


def far_position(b, given):
    given["positions"] = given["positions"].long()
    given["positions"][1] = 2**33
    return (1,)


DEVICE_ERRORS = {
    "page": ("table", bad_page, "page or slot \\d+ is past the end"), "position": ("table", bad_position, "past the pages"),
    "request": ("table", bad_request, "request 4 is past the last one"), "slot": ("slots", bad_slot, "page or slot \\d+ is past the end"),
    "indptr": ("indices", bad_indptr, "kv_indptr"), "position of 64 bits": ("slots", far_position, "2\\^30"),
    "position past kv_indptr": ("indices", bad_position, "past the pages"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEVICE_ERRORS)
def test_errors_that_only_the_device_sees(name, device):
    style, spoil, match = DEVICE_ERRORS[name]
    batch = Batch(device)
    given = batch.index(style, device)
    given |= {"kv_lens": batch.lens} if name == "request" else {}
    tokens = spoil(batch, given)
    before = batch.k_cache.clone()
    with pytest.raises(ag.ParameterError, match=f"token ({'|'.join(map(str, tokens))}): .*{match}"):
        ag.append_kv(batch.k, batch.v, batch.cache, **given)
        check(device)
    check(device)  # said once
    if not append._status:
        assert same_bits(batch.k_cache, before)  # nothing was written
    else:
        assert all(batch.k_cache[batch.place(i)].isnan().all() for i in tokens)
        assert all(same_bits(batch.k_cache[batch.place(i)], batch.k[i]) for i in set(range(len(batch.k))) - set(tokens))


def call(**change):
    b = Batch(torch.device("cpu"))
    given = dict(k=b.k, v=b.v, kv_cache=b.cache, positions=ints(b.position, "cpu"), request_of=ints(b.request, "cpu"),
                 block_table=b.table)  # fmt: skip
    return {n: x for n, x in (given | {n: f(b) if callable(f) else f for n, f in change.items()}).items() if x is not None}


HOST_ERRORS = {
    "dtype of v": (dict(v=lambda b: b.v.half()), "v is torch.float16"),
    "dtype": (dict(k=lambda b: b.k.double()), "float64"),
    "rank": (dict(k=lambda b: b.k[0]), "3 dimensions"),
    "heads of v": (dict(v=lambda b: b.v[:, :2]), "k's tokens and heads"),
    "shape of the cache": (dict(kv_cache=lambda b: (b.k_cache[:, :, :2], b.v_cache)), "k_cache has shape"),
    "fewer pages of v": (dict(kv_cache=lambda b: (b.k_cache, b.v_cache[1:])), "v_cache has shape"),
    "stride": (dict(k=lambda b: torch.randn(15, 3, 68).to(BF16)[:, :, :64]), "multiples of 8"),
    "address": (dict(k=lambda b: torch.randn(15, 3, 72).to(BF16)[:, :, 1:65]), "multiple of 16 bytes"),
    "expanded cache": (dict(kv_cache=lambda b: (b.k_cache[:1].expand(*b.k_cache.shape), b.v_cache)), "expanded"),
    "layout": (dict(kv_layout="DHN"), "NHD"),
    "one tensor of four dimensions": (dict(kv_cache=lambda b: b.k_cache), "five dimensions"),
    "two ways": (dict(slot_mapping=lambda b: ints(b.slots(), "cpu")), "one way"),
    "no way": (dict(block_table=None), "none of them"),
    "half a way": (dict(block_table=None, kv_indices=lambda b: b.indices), "kv_indptr"),
    "pages without positions": (dict(positions=None), "required positions="),
    "pages without requests": (dict(request_of=None), "required request_of="),
    "rope without positions": (dict(rope=RoPE(), slot_mapping=lambda b: ints(b.slots(), "cpu"), block_table=None, positions=None),
                               "required positions="),
    "rope without lengths": (dict(rope=RoPE(scaling=DynamicNTK(2.0, 512))), "required kv_lens="),
    "no rope": (dict(rope=True), "rope is bool"),
    "rope twice": (dict(rope=RoPE(keys="rotate")), "rotates cached keys"),
    "lengths of other requests": (dict(kv_lens=lambda b: b.lens[1:]), "required as many"),
    "too many positions": (dict(positions=lambda b: ints([0] * 16, "cpu")), "16 entries and k 15"),
    "lengths differ": (dict(request_of=lambda b: ints([0] * 3, "cpu")), "required 15"),
    "float positions": (dict(positions=lambda b: torch.zeros(15)), "float32"),
    "table of int64": (dict(block_table=lambda b: b.table.long()), "int64"),
    "a list": (dict(positions=lambda b: b.position), "list"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOST_ERRORS)
def test_errors_on_the_host(name):
    change, match = HOST_ERRORS[name]
    given = call(**change)
    with pytest.raises(ag.AttngenError, match=match):
        ag.append_kv(given.pop("k"), given.pop("v"), given.pop("kv_cache"), **given)
    ag.append_kv(**call())


def test_grad_refuses():
    given = call(k=lambda b: b.k.detach().requires_grad_())
    with pytest.raises(ag.UnsupportedError, match="requires grad"):
        ag.append_kv(**given)
    with torch.no_grad():
        ag.append_kv(**given)


def test_a_call_fills_the_pointers():
    names = [name for _, name in APPEND_FIELDS]
    assert names[:12] == ["k", "v", "k_cache", "v_cache", "slot_mapping", "positions", "request_of", "page_table", "page_indptr",
                          "rope_inv_freq", "rope_table", "status"]  # fmt: skip
    assert append.specialise(append.config_of("90a", BF16, 64, 64, None)).layout.fields[12].offset == append._POINTERS.size


def test_kernels_that_do_not_exist():
    wrong = (F32, 64, None, "float32"), (BF16, 64, RoPE(rotary_dim=20), "rotary_dim 20"), (F16, 20, None, "head_dim 20")
    for dtype, d, rope, match in wrong:
        with pytest.raises(ag.UnsupportedError, match=match):
            append.compile(dtype=dtype, head_dim=d, rope=rope, arch="90a")
    with pytest.raises(ag.UnsupportedError, match="sm_75"):
        append.compile(dtype=BF16, head_dim=64, arch="75")


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]], indirect=True)
@pytest.mark.parametrize("interleaved", [False, True], ids=["pair", "one tensor"])
def test_one_graph_under_torch_compile(interleaved, device):
    torch._dynamo.reset()

    def step(k, v, cache, slots, positions, rope):
        ag.append_kv(k + 0, v, cache, slot_mapping=slots, positions=positions, rope=rope)
        return cache.sum() if interleaved else cache[0].nansum() + cache[1].nansum()

    with torch.no_grad():
        call = torch.compile(step, backend="aot_eager", fullgraph=True)
        for q_lens, rope in (((3, 4), RoPE()), ((2, 9), RoPE()), ((2, 9), RoPE(5e5)), ((2, 9), None)):
            batch = Batch(device, q_lens, q_lens, dv=64, interleaved=interleaved)
            given = ints(batch.slots(), device), ints(batch.position, device), rope
            first, second = (batch.cache.clone() if interleaved else tuple(c.clone() for c in batch.cache) for _ in range(2))
            call(batch.k, batch.v, first, *given), step(batch.k, batch.v, second, *given)
            assert all(same_bits(a, b) for a, b in zip(first, second))
        batch = Batch(device)
        given = batch.index("table", device)
        inputs = batch.k, batch.v, batch.k_cache, batch.v_cache, None, given["positions"], given["request_of"], None, None, batch.table
        result = torch.library.opcheck(append._operator, (*inputs, None, "NHD", RoPE().handle))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_a_graph_replays_with_new_tokens_and_slots():
    device = torch.device("cuda")
    batch, rope = Batch(device, d=96, dv=96), RoPE(rotary_dim=80)
    append.compile(dtype=BF16, head_dim=96, head_dim_v=96, rope=rope)
    ag.append_positions(batch.q_indptr, batch.lens, num_tokens=len(batch.k))  # torch loads its kernels
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        r, p = ag.append_positions(batch.q_indptr, batch.lens, num_tokens=len(batch.k))
        ag.append_kv(batch.k, batch.v, batch.cache, positions=p, request_of=r, block_table=batch.table, rope=rope)
    assert batch.k_cache.isnan().all()  # a capture runs nothing
    for shift in (0, 1):
        batch.lens -= shift
        batch.k.copy_(torch.randn_like(batch.k)), batch.v.copy_(torch.randn_like(batch.v))
        batch.k_cache.fill_(torch.nan), batch.v_cache.fill_(torch.nan)
        batch.position = [p - shift for p in batch.position]
        graph.replay()
        kept = [i for i, p in enumerate(batch.position) if p >= 0]
        v_cache = torch.full_like(batch.v_cache, torch.nan)
        for i in kept:
            v_cache[batch.place(i)] = batch.v[i]
        assert same_bits(batch.v_cache, v_cache)
        found = torch.stack([batch.k_cache[batch.place(i)] for i in kept]).cpu()
        at = torch.tensor([batch.position[i] for i in kept])[:, None]
        compare(found, rotate(batch.k[kept].double().cpu(), at, rope.inv_freq(96)[0]))
    ag.check_append()


@pytest.mark.gpu
def test_a_status_word_made_in_inference_mode(monkeypatch):
    monkeypatch.setattr(append, "_status", {})
    monkeypatch.setattr(append, "_loaded", {})
    monkeypatch.setattr(append, "_sites", {})
    batch = Batch(torch.device("cuda"))
    with torch.inference_mode():
        ag.append_kv(batch.k, batch.v, batch.cache, slot_mapping=ints([10**6] * len(batch.k), "cuda"))
    with pytest.raises(ag.ParameterError, match="token"):
        ag.check_append()
    ag.check_append()
    assert batch.k_cache.isnan().all()


@pytest.mark.gpu
def test_a_capture_does_not_load():
    batch = Batch(torch.device("cuda"), d=104, dv=88)
    given = batch.index("slots", torch.device("cuda"))
    with pytest.raises(ag.UnsupportedError, match="being captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ag.append_kv(batch.k, batch.v, batch.cache, **given)
    torch.cuda.synchronize()
    k_cache, v_cache = batch.expected()
    ag.append_kv(batch.k, batch.v, batch.cache, **given)
    assert same_bits(batch.k_cache, k_cache) and same_bits(batch.v_cache, v_cache)
