"""Random hooks: what attngen makes of them against uncompiled FlexAttention in float64, on the CPU.

Most cases go through the oracle, which needs no compiler; some through kernels, in each dtype. A failing case prints its hooks.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import attngen as ag
import pytest
import torch
from compare import compare
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Value = Callable[..., Any]  # (score, b, h, q_idx, kv_idx) -> what torch or attngen makes of it
B, H, D = 2, 4, 8
CASES, PER_TEST = 80, 20


class Made:
    """An expression and its text."""

    def __init__(self, text: str, value: Value) -> None:
        self.text, self.value = text, value


class Maker:
    """Expressions over a hook's arguments and captured tensors; ints stay small, since ours have 32 bits and Flex's 64."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, kinds: list[Callable[[int], Made]], depth: int) -> Made:
        return self.random.choice(kinds)(depth - 1)

    def unary(self, text: str, f: Callable[[Any], Any], a: Made) -> Made:
        return Made(text.format(a.text), lambda *at: f(a.value(*at)))

    def binary(self, text: str, f: Callable[[Any, Any], Any], a: Made, b: Made) -> Made:
        return Made(text.format(a.text, b.text), lambda *at: f(a.value(*at), b.value(*at)))

    # ---- ints
    def int(self, depth: int) -> Made:
        leaves = [self.argument, self.int_constant, self.int_number]
        return self.of(leaves if depth <= 0 else [self.argument, self.int_op, self.int_op, self.int_divided, self.int_chosen, self.int_read], depth)

    def argument(self, depth: int) -> Made:
        n = self.random.choice((1, 2, 3, 3, 4, 4))
        return Made(("score", "b", "h", "q_idx", "kv_idx")[n], lambda *at: at[n])

    def int_constant(self, depth: int) -> Made:
        n = self.random.randint(-9, 20)
        return Made(str(n), lambda *at: torch.tensor(n))

    def int_number(self, depth: int) -> Made:
        t = torch.tensor(self.random.randint(-3, 9), dtype=self.random.choice((torch.int32, torch.int64)))
        return Made(f"{t}", lambda *at: t)

    def int_op(self, depth: int) -> Made:
        text, f = self.random.choice((
            ("({} + {})", lambda a, b: a + b), ("({} - {})", lambda a, b: a - b), ("minimum({}, {})", torch.minimum),
            ("({}).max({})", lambda a, b: a.max(b)), ("({} & {})", lambda a, b: a & b), ("({} | {})", torch.bitwise_or),
            ("({} ^ {})", lambda a, b: a ^ b), ("({} * ({} % 4))", lambda a, b: a * (b % 4)), ("abs({} - {})", lambda a, b: (a - b).abs()),
            ("({} << ({} & 3))", lambda a, b: a << (b & 3)), ("({} >> ({} & 3))", lambda a, b: a >> (b & 3)),
            ("rsub({}, {}, alpha=2)", lambda a, b: torch.rsub(a, b, alpha=2)), ("({} + ({} > 3))", lambda a, b: a + (b > 3)),
            ("({} + 3 ** ({} & 3))", lambda a, b: a + 3 ** (b & 3)), ("({} + 2 ** ({} & 3))", lambda a, b: a + torch.pow(2, b & 3)),
        ))  # fmt: skip
        return self.binary(text, f, self.int(depth), self.int(depth))

    def int_divided(self, depth: int) -> Made:
        n = self.random.choice((1, 2, 3, 5, 8, -2, -3))
        text, f = self.random.choice((
            ("({} // %d)", lambda a: a // n), ("({} %% %d)", lambda a: a % n), ("fmod({}, %d)", lambda a: torch.fmod(a, n)),
            ("div({}, %d, trunc)", lambda a: torch.div(a, n, rounding_mode="trunc")),
            ("div({}, %d, floor)", lambda a: torch.div(a, n, rounding_mode="floor")), ("-({}).clamp(-%d, 11)", lambda a: -a.clamp(-abs(n), 11)),
        ))  # fmt: skip
        return self.unary(text % n, f, self.int(depth))

    def int_chosen(self, depth: int) -> Made:
        c, a, b = self.bool(depth), self.int(depth), self.int(depth)
        return Made(f"where({c.text}, {a.text}, {b.text})", lambda *at: torch.where(c.value(*at), a.value(*at), b.value(*at)))

    def int_read(self, depth: int) -> Made:
        dtype = self.random.choice((torch.int32, torch.int64, torch.uint8))
        made = self.read(lambda *shape: torch.randint(0, 20, shape, generator=self.generator).to(dtype), depth)
        return self.unary("{}.long()", lambda a: a.long(), made)  # torch's uint8 is a mask where it is an index

    def read(self, make: Callable[..., torch.Tensor], depth: int) -> Made:
        """A tensor of any rank, perhaps a view, at indices of either sign, by one subscript or several."""
        shape = [self.random.randint(1, 7) for _ in range(self.random.randint(1, 4))]
        tensor = make(*shape)
        if self.random.random() < 0.3:
            tensor, shape = tensor.transpose(0, -1), [*shape[-1:], *shape[1:-1], *shape[:1]] if len(shape) > 1 else shape
        index = [self.int(min(depth, 1)) for _ in shape]
        negative = [self.random.random() < 0.3 for _ in shape]
        chained = self.random.random() < 0.4

        def value(*at: Any) -> Any:
            found = [i.value(*at) % n - (n if below else 0) for i, n, below in zip(index, shape, negative)]
            if not chained:
                return tensor[tuple(found)]
            row = tensor
            for i in found:
                row = row[i]
            return row

        text = ", ".join(f"{i.text} % {n}{f' - {n}' * below}" for i, n, below in zip(index, shape, negative))
        return Made(f"{tensor.dtype}{shape}[{text}]", value)

    # ---- bools
    def bool(self, depth: int) -> Made:
        return self.of([self.compared] if depth <= 0 else [self.compared, self.compared, self.logic, self.inverted, self.bool_read, self.floats_compared], depth)

    def compared(self, depth: int) -> Made:
        text, f = self.random.choice((
            ("({} >= {})", lambda a, b: a >= b), ("({} < {})", torch.lt), ("({} == {})", lambda a, b: a == b), ("({} != {})", lambda a, b: a.ne(b)),
            ("({} > {})", torch.greater), ("({} <= {})", lambda a, b: a.less_equal(b)),
        ))  # fmt: skip
        return self.binary(text, f, self.int(depth), self.int(depth))

    def floats_compared(self, depth: int) -> Made:
        return self.binary("({} < {} * 0.25)", lambda a, b: a < b * 0.25, self.int(depth), self.int(depth))

    def logic(self, depth: int) -> Made:
        text, f = self.random.choice((
            ("({} & {})", lambda a, b: a & b), ("({} | {})", torch.logical_or), ("({} ^ {})", torch.logical_xor),
            ("({} == {})", lambda a, b: a == b), ("({} * {})", lambda a, b: a * b),
        ))  # fmt: skip
        return self.binary(text, f, self.bool(depth), self.bool(depth))

    def inverted(self, depth: int) -> Made:
        return self.unary("~{}", self.random.choice((torch.logical_not, lambda a: ~a)), self.bool(depth))

    def bool_read(self, depth: int) -> Made:
        return self.read(lambda *shape: torch.rand(*shape, generator=self.generator) < 0.6, depth)

    # ---- scores
    def score(self, depth: int) -> Made:
        if depth <= 0:
            return Made("score", lambda *at: at[0])
        return self.of([self.score_op, self.score_op, self.score_function, self.score_chosen], depth)

    def score_op(self, depth: int) -> Made:
        text, f = self.random.choice((
            ("({} + {})", lambda a, b: a + b), ("({} - {} * 0.1)", lambda a, b: a - b * 0.1), ("({} / (1 + abs({})))", lambda a, b: a / (1 + abs(b))),
            ("maximum({}, {})", torch.maximum), ("({} * sigmoid({}))", lambda a, b: a * torch.sigmoid(b)),
        ))  # fmt: skip
        other = self.random.choice((self.float_read, self.float_of_int, self.float_number))
        return self.binary(text, f, self.score(depth), other(depth))

    def float_read(self, depth: int) -> Made:
        dtype = self.random.choice((torch.float32, torch.bfloat16, torch.float16))
        made = self.read(lambda *shape: torch.randn(*shape, generator=self.generator).to(dtype), depth)
        return self.unary("{}.float()", lambda a: a.float(), made)

    def float_of_int(self, depth: int) -> Made:
        return self.unary("({}).float().clamp(-9, 9)", lambda a: a.float().clamp(-9, 9), self.int(depth))

    def float_number(self, depth: int) -> Made:
        t = torch.randn((), generator=self.generator)
        return Made(f"{t:.3f}", lambda *at: t)

    def score_function(self, depth: int) -> Made:
        text, f = self.random.choice((
            ("tanh({})", torch.tanh), ("-{}", lambda a: -a), ("exp2(-abs({}))", lambda a: torch.exp2(-a.abs())), ("relu({})", torch.relu),
            ("clamp({}, max=2)", lambda a: a.clamp(max=2)), ("log(1 + {} ** 2)", lambda a: torch.log(1 + a**2)),
            ("sqrt(1 + square({}))", lambda a: torch.sqrt(1 + a.square())), ("rsqrt(1 + abs({}))", lambda a: (1 + abs(a)).rsqrt()),
        ))  # fmt: skip
        return self.unary(text, f, self.score(depth))

    def score_chosen(self, depth: int) -> Made:
        c, a, b = self.bool(depth), self.score(depth), self.random.choice((self.score(depth), Made("-inf", lambda *at: float("-inf"))))
        return Made(f"where({c.text}, {a.text}, {b.text})", lambda *at: torch.where(c.value(*at), a.value(*at), b.value(*at)))


def hooks(seed: int) -> tuple[Made, Made, Value, Value]:
    maker = Maker(seed)
    score, mask = maker.score(maker.random.randint(1, 3)), maker.bool(maker.random.randint(0, 3))
    return score, mask, lambda score_, b, h, q_idx, kv_idx: score.value(score_, b, h, q_idx, kv_idx), (
        lambda b, h, q_idx, kv_idx: mask.value(None, b, h, q_idx, kv_idx)
    )


def inputs(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, q_len, kv_len = choose.choice((1, 2, 4)), choose.randint(1, 24), choose.randint(1, 40)
    shapes = ((H, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return tuple(torch.randn(B, heads, n, D, generator=generator).to(dtype) for heads, n in shapes)


def torchs(q: Any, k: Any, v: Any, score_mod: Any, mask_mod: Any) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.ones(1, 1, 1, dtype=torch.int32)  # uncompiled FlexAttention reads the mask_mod alone
    mask = BlockMask.from_kv_blocks(one, one[..., None] - 1, BLOCK_SIZE=1 << 20, mask_mod=mask_mod, seq_lengths=(q.shape[2], k.shape[2]))
    torch._dynamo.reset()  # "eager" FlexAttention goes through Dynamo, which keeps every hook, and slows down
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        return flex_attention(q, k, v, score_mod, mask, enable_gqa=True, return_lse=True)


@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_the_oracle_agrees_with_flex(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        score, mask, score_mod, mask_mod = hooks(seed)
        q, k, v = inputs(seed, torch.float32)
        variant = ag.from_flex(score_mod, mask_mod)
        found = ag.reference(q, k, v, variant, layout="bhsd", return_lse=True)
        for ours, theirs in zip(found, torchs(q.double(), k.double(), v.double(), score_mod, mask_mod)):
            try:
                compare(ours, theirs, torch.float32)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: score_mod {score.text}\nmask_mod {mask.text}\n{variant.explain()}") from error


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_kernels_agree_with_flex(seed: int) -> None:
    """One pair of hooks, through a kernel of each dtype in turn, as hooks and as a block mask."""
    score, mask, score_mod, mask_mod = hooks(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float32)[seed % 4]
    q, k, v = inputs(seed, dtype)
    block_mask = create_block_mask(mask_mod, B, H, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=16)
    theirs = torchs(q.double(), k.double(), v.double(), score_mod, mask_mod)
    plain = torchs(q, k, v, score_mod, mask_mod)
    for block in (mask_mod, block_mask):
        for ours, ref, like in zip(ag.flex_attention(q, k, v, score_mod, block, enable_gqa=True, return_lse=True), theirs, plain):
            try:
                compare(ours, ref, dtype, like)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: score_mod {score.text}\nmask_mod {mask.text}") from error
