"""Random variants: compiled kernels against the oracle. Each example is one kernel, called with many shapes and values.

Masks are any trees of exactly computed ops; logits are trees that float32 computes to a few ulp (see trees.py).
"""

from __future__ import annotations

from typing import Any

import attngen as ag
import torch
from attngen.expr import Node
from compare import compare
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from trees import masks, smooth

HEAD_DIM = 16
# (requests, q_len, kv_len, heads, kv_heads, kv_lens, q_offset)
SHAPES: list[tuple[int, int, int, int, int, list[int] | None, int | None]] = [
    (1, 1, 1, 1, 1, None, None),
    (2, 1, 300, 4, 2, [300, 17], None),
    (1, 70, 70, 2, 2, None, None),
    (2, 33, 130, 6, 2, [130, 40], None),
    (1, 40, 12, 3, 1, None, None),
    (2, 9, 65, 2, 1, [0, 65], None),
    (1, 20, 150, 2, 2, None, 0),
    (1, 17, 33, 4, 4, None, -5),
]


def make(hooks: dict[str, Node]) -> ag.Variant:
    """A variant with these nodes as hooks."""

    def given_node(name: str) -> Any:
        node = hooks[name]
        inputs = {"logits": 1, "weight": 1, "output": 1}.get(name, 0)
        return (lambda self, x, at: node) if inputs else (lambda self, at: node)

    annotations = {
        "a": ag.Scalar,
        "n": ag.Scalar[int],
        "table": ag.Tensor("heads"),
        "ids": ag.Tensor("requests", "positions", dtype=int),
        "flags": ag.Tensor("heads", 5, dtype=bool),
    }
    return type(
        "Random", (ag.Variant,), {"__annotations__": annotations, **{name: given_node(name) for name in hooks}}
    )()


@st.composite
def variants(draw: st.DrawFn) -> dict[str, Node]:
    hooks: dict[str, Node] = {}
    if draw(st.integers(0, 4)):
        hooks["mask"] = draw(masks(3))
    if draw(st.integers(0, 3)) == 0:
        hooks["weight"] = draw(smooth(2))
    elif draw(st.integers(0, 2)) == 0:
        hooks["sink"] = draw(smooth(2, None))
    if draw(st.integers(0, 4)):
        hooks["logits"] = draw(smooth(3))
    if draw(st.integers(0, 3)) == 0:
        hooks["query_scale"] = draw(smooth(2, None))
    if draw(st.integers(0, 3)) == 0:
        hooks["output"] = draw(smooth(2, "o")) if draw(st.booleans()) else ag.expr.symbol("o") * draw(smooth(1, None))
    return hooks


def rowwise(node: Node) -> bool:
    return not node.symbols & {"kv", "kv_token", "s"}


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    hooks=variants(),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    ids=st.sampled_from([torch.int32, torch.int64, torch.uint8]),
    table=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_random_variants(hooks, dtype, ids, table):
    hooks = {name: node for name, node in hooks.items() if name != "output" or rowwise(node)}
    variant = make(hooks)
    try:
        for seed, shape in enumerate(SHAPES):
            one_call(variant, shape, seed, getattr(torch, dtype), ids, table)
    except AssertionError as error:
        raise AssertionError(f"{variant.explain()}\n{dtype}, {error}") from error


def one_call(
    variant: ag.Variant, shape: Any, seed: int, dtype: torch.dtype, ids: torch.dtype, table: torch.dtype
) -> None:
    requests, q_len, kv_len, heads, kv_heads, kv_lens, q_offset = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random)

    q, k, v = normal(requests, q_len, heads, HEAD_DIM), *(normal(requests, kv_len, kv_heads, HEAD_DIM) for _ in "kv")
    q, k, v = (t.to(dtype) for t in (q, k, v))
    for r, n in enumerate(kv_lens or ()):
        k[r, n:] = v[r, n:] = torch.nan
    params = {
        "a": 0.6 + 0.3 * seed,
        "n": [3, 0, -2, 64, 2**31 - 1, -(2**31), 17, 5][seed],
        "table": normal(heads).to(table),
        "ids": torch.randint(0, 5, (requests, kv_len), generator=random).to(ids),
        "flags": torch.rand(heads, 5, generator=random) < 0.5,
    }
    softmax = variant.trace.weight is None
    options = dict(kv_lens=kv_lens, q_offset=q_offset, return_lse=softmax, **params)
    found, wanted = ag.attention(q, k, v, variant, **options), ag.reference(q, k, v, variant, **options)
    out, ref = (found[0], wanted[0]) if softmax else (found, wanted)
    # Room for rounding p, and for unnormalised weights, which sum over the keys with their roundings.
    room = (1e-5 if dtype == torch.float32 else 2**-7) * (1.0 if softmax else max(1.0, kv_len**0.5))
    try:
        compare(out, ref, dtype, like=ref + room)
        if softmax:
            compare(found[1], wanted[1], dtype)
    except AssertionError as error:
        raise AssertionError(f"shape {shape}, seed {seed}: {error}") from None


def test_the_strategy_reaches_every_hook():
    seen: set[str] = set()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(hooks=variants())
    def draw(hooks: dict[str, Node]) -> None:
        seen.update(hooks)

    draw()
    assert seen == {"mask", "weight", "sink", "logits", "query_scale", "output"}


NAMES = (
    "NAN INFINITY NULL assert INT32_MAX AG_INLINE HEAD_DIM Params bf16 int32_t size_t ag_exp e0 e1 p c t rows "
    "kv_begin LANES double class std omp main errno row call x_stride0"
).split()


def test_fields_may_have_any_name():
    """Names that mean something to C++ or to the templates, all in one kernel."""
    names = [name for name in NAMES if name.isidentifier()]

    def logits(self, s, at):
        for name in names:
            s = s * getattr(self, name) + getattr(self, f"{name}_")[at.head % 3]
        return s

    def mask(self, at):
        return at.kv + getattr(self, f"{names[0]}_2") >= 0

    annotations = {name: ag.Scalar for name in names} | {f"{name}_": ag.Tensor("n") for name in names}
    annotations |= {f"{name}_2": ag.Scalar[int] for name in names}
    variant = type("Named", (ag.Variant,), {"__annotations__": annotations, "logits": logits, "mask": mask})()
    q = torch.randn(1, 9, 2, 8)
    params = {name: 1.0 + i / 64 for i, name in enumerate(names)}
    params |= {f"{name}_": torch.randn(3) for name in names} | {f"{names[0]}_2": -2}
    compare(ag.attention(q, q, q, variant, **params), ag.reference(q, q, q, variant, **params))
