"""The library of variants: the oracle against formulas, and compiled kernels against the oracle.

Each variant is compiled once a dtype for head_dim 64 and called in every shape of the grid; a few are compiled for all
kinds of head dims, instruction sets and stored dtypes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import attngen as ag
import pytest
import torch
from attngen import run, variants
from attngen.isa import CPU_ISAS, host_isa
from attngen.paths import variants_dir
from attngen.variants import example_params
from compare import compare
from formulas import FORMULAS, evaluate, paper_slopes
from grid import SHAPES, VARIANTS, Call, KernelCase, Shape, make_call

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = Shape("small", 2, 9, 21, 6, 2, (9, 4), (21, 13))
MIXED = Shape("mixed", 3, 40, 150, 6, 2, (40, 1, 23), (150, 150, 10))
MANY_HEADS = Shape("many-heads", 1, 5, 12, 24, 8)


def check_kernel(variant: ag.Variant, name: str, call: Call, dtype: torch.dtype) -> None:
    """One call of ``variant`` against the oracle, with torch's own error in ``dtype`` as the yardstick."""
    has_lse = variant.trace.weight is None
    result = ag.attention(call.q, call.k, call.v, variant, return_lse=has_lse, **call.keywords, **call.params)
    ref = ag.reference(call.q, call.k, call.v, variant, return_lse=has_lse, **call.keywords, **call.params)
    like, like_lse = evaluate(name, *call.seen(), call.params, q_lens=call.q_lens, kv_lens=call.kv_lens, dtype=dtype)
    if call.keywords["layout"] == "bhsd":
        like = like.transpose(1, 2)
    out, lse, ref, ref_lse = (*result, *ref) if has_lse else (result, None, ref, None)
    assert out.dtype == dtype
    compare(out, ref, like=like)
    if has_lse:
        assert lse.dtype == F32
        compare(lse, ref_lse, dtype, like=like_lse)


# ---------------------------------------------------------------- the meaning


@pytest.mark.parametrize("shape", [*SHAPES, MANY_HEADS], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_oracle_is_the_formula(name: str, shape: Shape) -> None:
    variant = VARIANTS[name]
    call = make_call(shape, variant, torch.float64, 32)
    has_lse = variant.trace.weight is None
    result = ag.reference(call.q, call.k, call.v, variant, return_lse=has_lse, **call.keywords, **call.params)
    out, lse = evaluate(name, *call.seen(), call.params, q_lens=call.q_lens, kv_lens=call.kv_lens, dtype=torch.float64)
    if shape.layout == "bhsd":
        out = out.transpose(1, 2)
    # angles are rounded to float32, and StreamingLLM's are those of other positions than the formula's
    dtype = F32 if name == "StreamingLLM" else torch.float64
    compare(result[0] if has_lse else result, out, dtype)
    if has_lse:
        compare(result[1], lse, dtype)


def test_examples_show_the_effect() -> None:
    """At its example parameters a variant is not plain attention, or the tests above would prove nothing."""
    results = {}
    for name, variant in VARIANTS.items():  # q, k and v are the same for all
        call = make_call(MIXED, variant, F32, 32)
        results[name] = ag.reference(call.q, call.k, call.v, variant, **call.keywords, **call.params)
    for plain in ("Full", "Causal"):
        for name in VARIANTS.keys() - {plain}:
            assert (results[name] - results[plain]).abs().max() > 1e-3, f"{name} differs from {plain}"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 8, 12, 16, 20, 40, 71, 112])
def test_alibi_slopes_are_the_papers(n: int) -> None:
    # one key at distance 1 and zero queries: the LSE is minus the slope
    q, k = torch.zeros(1, 1, n, 8), torch.zeros(1, 1, n, 8)
    lse = ag.reference(q, k, k, variants.ALiBi, q_offset=1, return_lse=True)[1].flatten()
    torch.testing.assert_close(-lse, torch.tensor(paper_slopes(n), dtype=torch.float64))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("max_distance", [20, 128, 1000])
def test_t5_buckets_are_transformers(bidirectional: bool, max_distance: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    buckets = T5Attention._relative_position_bucket
    # one key, zero queries, and a table that says its own column: the LSE is the bucket
    rows = 4 * max_distance
    variant = variants.T5Bias(bidirectional=bidirectional, max_distance=max_distance)
    q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, 1, 1, 8)
    table = torch.arange(32.0)[None]
    lse = ag.reference(q, k, k, variant, q_offset=-rows // 2, return_lse=True, table=table)[1].flatten()
    relative = -(torch.arange(rows) - rows // 2)
    wanted = buckets(relative, bidirectional=bidirectional, num_buckets=32, max_distance=max_distance)
    assert lse.tolist() == wanted.tolist()


WINDOWS = ("SlidingWindow", "Gemma2", "GptOss", "Streaming", "DilatedWindow", "StreamingLLM")


@pytest.mark.parametrize("kernel", [KernelCase(name, F32) for name in WINDOWS], ids=str)
@pytest.mark.usefixtures("kernels")
def test_a_window_counts_its_keys(kernel: KernelCase) -> None:
    """window = W admits W keys, the query's own included: W of transformers and vLLM, FlashInfer's window_left + 1."""
    seq, window = 60, 7
    extra = {"Streaming": {"sinks": 0}, "StreamingLLM": {"sinks": 0}, "DilatedWindow": {"dilation": 1}}
    params = {"sinks": torch.zeros(1)} if kernel.name == "GptOss" else extra.get(kernel.name, {})
    q, k = torch.randn(1, seq, 1, 64), torch.randn(1, seq, 1, 64)
    v = torch.eye(seq, 64).view(1, seq, 1, 64)  # the output is the row of weights
    out = ag.attention(q, k, v, kernel.variant, window=window, **params)[0, :, 0]
    seen = out[:, :seq] > 0
    distance = torch.arange(seq)[:, None] - torch.arange(seq)
    window_left = window - 1  # FlashInfer, and FlashAttention's window_size=(window - 1, 0)
    assert torch.equal(seen, (distance >= 0) & (distance <= window_left))
    assert seen.sum(1).tolist() == [min(row + 1, window) for row in range(seq)]


@pytest.mark.parametrize("kernel", [KernelCase(name, F32) for name in WINDOWS[:3]], ids=str)
@pytest.mark.parametrize("window", [0, -1, -(2**31)])
@pytest.mark.usefixtures("kernels")
def test_no_window(kernel: KernelCase, window: int) -> None:
    """FlashInfer's window_left = -1 is window = 0, and FlashAttention's -1 passed as it is means the same."""
    params = {"sinks": torch.zeros(2)} if kernel.name == "GptOss" else {}
    q, k, v = torch.randn(3, 1, 70, 2, 64)
    out = ag.attention(q, k, v, kernel.variant, window=window, **params)
    assert torch.equal(out, ag.attention(q, k, v, kernel.variant, window=70, **params))
    wanted = ag.reference(q, k, v, kernel.variant, window=70, **params)
    torch.testing.assert_close(ag.reference(q, k, v, kernel.variant, window=window, **params), wanted, rtol=0, atol=0)


# ---------------------------------------------------------------- kernels


# Half is float32 between its loads and stores, so that a few shapes say it all.
HALF_SHAPES = [s for s in SHAPES if s.name in ("decode-ragged", "ragged", "strided", "edge-129-127")]
GRID = [
    pytest.param(KernelCase(name, dtype), shape, id=f"{name}-{str(dtype).removeprefix('torch.')}-{shape}")
    for name in VARIANTS for dtype in (F32, BF16, F16) for shape in (HALF_SHAPES if dtype == F16 else SHAPES)
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "shape"), GRID)
@pytest.mark.usefixtures("kernels")
def test_kernel(kernel: KernelCase, shape: Shape) -> None:
    check_kernel(kernel.variant, kernel.name, make_call(shape, kernel.variant, kernel.dtype), kernel.dtype)


DIMS = [(8, 8), (40, 40), (80, 80), (128, 128), (256, 256), (192, 128), (64, 24)]
DIM_CASES = [
    *(KernelCase("Gemma2", d, *dims) for dims in DIMS for d in (F32, BF16)),
    *(KernelCase("Full", F16, *dims) for dims in ((8, 8), (40, 40), (256, 256))),
    *(KernelCase("Llama3RoPE", d, *dims) for dims in ((8, 8), (80, 80), (128, 128)) for d in (F32, BF16)),
    KernelCase("Sigmoid", F32, 24, 72),
    KernelCase("Sigmoid", BF16, 24, 72),
]


@pytest.mark.parametrize("kernel", DIM_CASES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_head_dims(kernel: KernelCase) -> None:
    for shape in (Shape("decode", 2, 1, 600, 4, 2), MIXED):
        call = make_call(shape, kernel.variant, kernel.dtype, kernel.head_dim, kernel.head_dim_v)
        check_kernel(kernel.variant, kernel.name, call, kernel.dtype)


LESSER_ISAS = CPU_ISAS[CPU_ISAS.index(host_isa()) + 1 :]


@pytest.mark.parametrize(("name", "dtype"), [("Gemma2", F32), ("Gemma2", BF16), ("StreamingLLM", F32)], ids=str)
@pytest.mark.parametrize("isa", LESSER_ISAS)
def test_lesser_instruction_sets(name: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "host_isa", lambda: isa)
    variant = type(VARIANTS[name])()  # an instance keeps its call sites, those of this host's best set
    for shape in (Shape("decode", 2, 1, 600, 4, 2), MIXED):
        check_kernel(variant, name, make_call(shape, variant, dtype), dtype)
    assert {r.problem.isa for r in ag.build_log() if r.variant == name} >= {isa}


@pytest.mark.parametrize(
    ("name", "field", "store"),
    [
        ("T5Bias", "table", lambda t: t.bfloat16().T.contiguous().T),  # as transformers stores it: [buckets, heads]
        ("Sinks", "sinks", lambda t: t.half().repeat_interleave(2)[::2]),
        ("Document", "doc", lambda t: t.long()),
        ("Document", "doc", lambda t: (t % 256).to(torch.uint8)),
        ("TreeMask", "ancestors", lambda t: t.to(torch.uint8)),
    ],
)
def test_stored_dtypes_and_strides(name: str, field: str, store: Callable[[torch.Tensor], torch.Tensor]) -> None:
    variant = VARIANTS[name]
    call = make_call(MIXED, variant, F32)
    call.params[field] = store(call.params[field])
    check_kernel(variant, name, call, F32)


class Nothing(ag.Variant):
    def mask(self, at):
        return at.kv < 0


class NothingPerHead(ag.Variant):
    """Rows of odd heads and even positions see nothing, by a mask without closed bounds."""

    def mask(self, at):
        return (at.head % 2 == 0) | (at.q % 2 == 1)

    def output(self, o, at):
        return 2.0 * o


@pytest.mark.parametrize("variant", [Nothing(), NothingPerHead()], ids=lambda v: v.name)
@pytest.mark.parametrize("sinks", [False, True])
def test_fully_masked_rows(variant: ag.Variant, sinks: bool) -> None:
    q, k, v = torch.randn(2, 70, 4, 64), torch.randn(2, 90, 2, 64), torch.randn(2, 90, 2, 64)
    levels = torch.tensor([0.5, -2.0, 3.0, -torch.inf])
    composed, params = (ag.compose(variant, variants.Sinks()), {"sinks": levels}) if sinks else (variant, {})
    out, lse = ag.attention(q, k, v, composed, return_lse=True, **params)
    ref, ref_lse = ag.reference(q, k, v, composed, return_lse=True, **params)
    compare(out, ref)
    compare(lse, ref_lse)
    head, row = (slice(None), slice(None)) if variant.name == "Nothing" else (slice(1, None, 2), slice(0, None, 2))
    # positions start at kv_len - q_len = 20, so that even rows have even positions
    assert torch.all(out[:, row, head] == 0)
    empty = levels if sinks else torch.full((4,), -torch.inf)
    assert torch.equal(lse[:, head, row], empty[None, head, None].expand_as(lse[:, head, row]))


# ---------------------------------------------------------------- parameters


def test_new_values_do_not_recompile() -> None:
    q, k, v = torch.randn(1, 30, 4, 64), torch.randn(1, 30, 4, 64), torch.randn(1, 30, 4, 64)
    ag.attention(q, k, v, variants.Gemma2)
    before = len(ag.build_log())
    for variant, params in ((variants.Gemma2(), {"cap": 3.0, "window": 5}), (variants.Gemma2(cap=1.0, window=9), {})):
        compare(ag.attention(q, k, v, variant, **params), ag.reference(q, k, v, variant, **params))
    assert len(ag.build_log()) == before


def test_rope_frequencies_are_run_time_values() -> None:
    """Two thetas share a kernel and differ in their results."""
    q, k, v = torch.randn(1, 30, 4, 64), torch.randn(1, 30, 4, 64), torch.randn(1, 30, 4, 64)
    first, second = variants.Llama3RoPE(), variants.Llama3RoPE(theta=100.0, factor=32.0)
    results = [ag.attention(q, k, v, variant) for variant in (first, second)]
    for result, variant in zip(results, (first, second)):
        compare(result, ag.reference(q, k, v, variant))
    assert (results[0] - results[1]).abs().max() > 1e-2
    kernels = [ag.compile(variant, dtype=F32, head_dim=64) for variant in (first, second)]
    assert kernels[0].spec_hash == kernels[1].spec_hash


def test_cached_and_unrotated_keys_agree() -> None:
    """Rotating keys in the kernel, or in the cache beforehand, is the same attention."""
    from attngen.rope import rotate

    q, k, v = torch.randn(2, 20, 4, 64), torch.randn(2, 50, 2, 64), torch.randn(2, 50, 2, 64)
    fused, cached = variants.Llama3RoPE(), variants.Llama3RoPE(rotated_cache=True)
    frequencies = fused.rope().inv_freq(64)[0]
    rotated = rotate(k, torch.arange(50)[:, None], frequencies)
    compare(ag.attention(q, rotated, v, cached), ag.reference(q, k, v, fused))


def test_streaming_llm_needs_no_long_positions() -> None:
    """A cache long past the window gives what the paper's short cache gives: positions are re-counted."""
    sinks, window, seq = 4, 28, 5000
    q, k, v = torch.randn(1, 1, 4, 64), torch.randn(1, seq, 2, 64), torch.randn(1, seq, 2, 64)
    kept = [*range(sinks), *range(seq - window, seq)]
    long = ag.attention(q, k, v, variants.StreamingLLM, sinks=sinks, window=window)
    short = ag.attention(q, k[:, kept], v[:, kept], variants.StreamingLLM, sinks=sinks, window=window)
    compare(long, short.double())


class Beyond(ag.Variant):
    def mask(self, at):
        return at.q - at.kv >= 9


def test_compositions() -> None:
    """Techniques compose into models' layers, and the composition is what the parts say."""
    cases: list[tuple[ag.Variant, ag.Variant, dict]] = [
        (ag.compose(variants.SoftCap(2.0), variants.SlidingWindow(9)), variants.Gemma2(2.0, 9), {}),
        (ag.compose(variants.Sinks(), variants.SlidingWindow(9)), variants.GptOss(window=9), {"sinks": torch.randn(6)}),
        (variants.Causal() & ~variants.SlidingWindow(9), variants.Causal() & Beyond(), {}),
        (variants.SlidingWindow(9) | Beyond(), variants.Causal(), {}),
    ]
    call = make_call(SMALL, VARIANTS["Full"], F32)
    for composed, named, params in cases:
        a = ag.reference(call.q, call.k, call.v, composed, **call.keywords, **params)
        b = ag.reference(call.q, call.k, call.v, named, **call.keywords, **params)
        compare(a, b)


# ---------------------------------------------------------------- the library itself


def test_every_variant_is_listed_and_has_a_formula() -> None:
    found = {
        node.name
        for file in variants_dir().glob("*.py") if not file.name.startswith("_")
        for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    assert found == set(variants.library()) == set(FORMULAS)
    assert set(variants.__all__) >= found
    page = (Path(__file__).parent.parent / "docs" / "library.md").read_text()
    assert found == {name for name in re.findall(r"`(\w+)`", page) if name in found}


@pytest.mark.parametrize("file", sorted(variants_dir().glob("[!_]*.py")), ids=lambda f: f.name)
def test_library_is_written_as_a_user_would(file: Path) -> None:
    """Public API only, short, with formula and source."""
    tree = ast.parse(file.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import attngen as ag"]
    names = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ag"
    }  # fmt: skip
    assert names <= set(ag.__all__)
    assert len(file.read_text().splitlines()) <= 40
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert "Source:" in "".join(ast.get_docstring(node) or "" for node in classes)
    assert all(ast.get_docstring(node) for node in classes)


def test_examples_are_complete_and_repeatable() -> None:
    sizes = {"requests": 3, "q_len": 5, "kv_len": 17, "num_heads": 8, "num_kv_heads": 2}

    class User(ag.Variant):
        table: ag.Tensor("heads", "kv_heads", "requests", "positions", 3)
        rows: ag.Tensor("q_tokens", dtype=int)
        keys: ag.Tensor("kv_tokens", "mine", dtype=bool)

        def mask(self, at):
            return self.keys[at.kv_token, 0] | (self.rows[at.q_token] > 1)

    assert {n: tuple(t.shape) for n, t in example_params(User, **sizes).items()} == {
        "table": (8, 2, 3, 17, 3), "rows": (15,), "keys": (51, 17),
    }  # fmt: skip
    assert example_params(variants.Sinks(torch.zeros(8)), **sizes) == {}
    assert set(example_params(variants.Gemma2(window=3), **sizes)) == {"cap"}
    assert set(example_params(ag.compose(variants.Sinks(), variants.ALiBiSlopes()), **sizes)) == {"sinks", "slopes"}
    for variant in VARIANTS.values():
        first, again = example_params(variant, **sizes), example_params(variant, **sizes)
        needed = {n for n, value in variant.values.items() if value is None}
        assert needed <= set(first) <= set(variant.values)
        assert all(torch.equal(torch.as_tensor(first[n]), torch.as_tensor(again[n])) for n in first)
