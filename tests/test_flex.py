"""FlexAttention's hooks, unchanged, through attngen's CPU kernels and the oracle, against uncompiled FlexAttention in float64."""

from __future__ import annotations

import functools
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import attngen as ag
import numpy as np
import pytest
import torch
from attngen import flex
from attngen.captures import captures
from attngen.variants import Causal, SoftCap
from compare import compare
from test_referees import flex as eager_flex
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, or_masks

B, H, KV_HEADS, N, D = 2, 4, 2, 96, 8


def inputs(q_len: int = N, kv_len: int = N, kv_heads: int = KV_HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(q_len + kv_len)
    return tuple(torch.randn(B, h, n, D, generator=random) for h, n in ((H, q_len), (kv_heads, kv_len), (kv_heads, kv_len)))


def torchs(q: Any, k: Any, v: Any, score_mod: Any = None, mask: Any = None, scale: float | None = None) -> tuple[Any, Any]:
    """Output and LSE of uncompiled FlexAttention."""
    if mask is not None and not isinstance(mask, BlockMask):
        mask = create_block_mask(mask, B, H, q.shape[2], k.shape[2], device=q.device)
    return eager_flex(q, k, v, score_mod, mask, scale)


def agree(score_mod: Any = None, mask: Any = None, sizes: tuple[int, int] = (N, N)) -> None:
    q, k, v = inputs(*sizes)
    ref, ref_lse = torchs(q, k, v, score_mod, mask)
    out, lse = ag.flex_attention(q, k, v, score_mod, mask, enable_gqa=True, return_lse=True)
    compare(out, ref)
    compare(lse, ref_lse)
    variant = ag.from_flex(score_mod, mask) if not isinstance(mask, BlockMask) else ag.from_flex(score_mod, block_mask=mask)
    compare(ag.reference(q, k, v, variant, layout="bhsd"), ref, torch.float32)


# ---------------------------------------------------------------- hooks as users write them (attention-gym and the Flex blog)

RANDOM = torch.Generator().manual_seed(0)
WINDOW = 23
DOC = torch.repeat_interleave(torch.arange(5), torch.tensor([11, 40, 2, 30, 13]))
OFFSETS = torch.tensor([0, 11, 51, 53, 83, 96])
PREFIX = torch.tensor([17, 60], dtype=torch.int32)
REL_BIAS = torch.randn(H, 2 * N, generator=RANDOM)
BATCH_HEAD_TABLE = torch.randn(B, H, generator=RANDOM).to(torch.bfloat16)
IS_TEXT = torch.rand(B, N, generator=RANDOM) < 0.5
SEPARATORS = torch.rand(N, generator=RANDOM) < 0.05


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx <= WINDOW) & (q_idx >= kv_idx)


def prefix_lm(b, h, q_idx, kv_idx):
    return or_masks(lambda b, h, q_idx, kv_idx: kv_idx < PREFIX[b], causal)(b, h, q_idx, kv_idx)


def document(b, h, q_idx, kv_idx):
    return torch.logical_and(DOC[q_idx] == DOC[kv_idx], causal(b, h, q_idx, kv_idx))


def make_alibi(heads: int) -> Callable[..., Any]:
    def alibi(score, b, h, q_idx, kv_idx):
        scale = torch.exp2(-((h + 1) * 8.0 / heads))
        return score + (kv_idx - q_idx) * scale

    return alibi


def relative_bias(score, b, h, q_idx, kv_idx):
    return score + REL_BIAS[h, q_idx - kv_idx]  # negative distances count from the end


def soft_cap(cap: float) -> Callable[..., Any]:
    def tanh_softcap(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    tanh_softcap.__name__ = f"tanh_softcap_{cap}"
    return tanh_softcap


def dilated(b, h, q_idx, kv_idx, stride=3):
    distance = torch.abs(q_idx - kv_idx)
    return (distance <= WINDOW) & (distance % stride == 0)


def causal_mask_of_head(b, h, q_idx, kv_idx):
    return q_idx - kv_idx >= 8 * h


def natten(width: int, kernel: int) -> Callable[..., Any]:
    def natten_mask(b, h, q_idx, kv_idx):
        q_x, q_y = q_idx // width, q_idx % width
        kv_x, kv_y = kv_idx // width, kv_idx % width
        center_x = q_x.clamp(kernel // 2, (N // width - 1) - kernel // 2)
        center_y = q_y.clamp(min=kernel // 2, max=(width - 1) - kernel // 2)
        return ((center_x - kv_x).abs() <= kernel // 2) & ((center_y - kv_y).abs() <= kernel // 2)

    return natten_mask


class Transfusion:
    """Causal for text, full within an image: modality is a list of (offset, length)."""

    def __init__(self, modality: list[tuple[int, int]]) -> None:
        self.modality = torch.tensor(modality)

    def __call__(self, b, h, q_idx, kv_idx):
        mask = q_idx >= kv_idx
        for offset, length in zip(self.modality[:, 0], self.modality[:, 1]):
            q_in = (q_idx >= offset) & (q_idx < offset + length)
            mask = mask | (q_in & (kv_idx >= offset) & (kv_idx < offset + length))
        return mask


def jagged(b, h, q_idx, kv_idx):
    """The document of a query by a walk over offsets."""
    start = torch.zeros_like(q_idx)
    for i in range(OFFSETS.shape[0] - 1):
        start = torch.where(q_idx >= OFFSETS[i], OFFSETS[i], start)
    return (kv_idx >= start) & (kv_idx <= q_idx)


def checkerboard(score, b, h, q_idx, kv_idx):
    score = torch.where(torch.abs(kv_idx - q_idx) % 2 == 1, score * 0.5, score)
    return torch.where(torch.abs(kv_idx - q_idx) % 2 == 0, score * 2.0, score)


def causal_by_head(score, b, h, q_idx, kv_idx):
    return torch.where((h % 2 == 0) | (q_idx >= kv_idx), score, -float("inf"))


def batch_bias(score, b, h, q_idx, kv_idx, table=BATCH_HEAD_TABLE):
    scaled = score * torch.sigmoid(table[b][h].float())
    return torch.where(IS_TEXT[b, kv_idx] & ~SEPARATORS[q_idx], scaled, scaled.masked_fill(q_idx == kv_idx, 0.25))


def bits(b, h, q_idx, kv_idx):
    nearest = torch.minimum(q_idx >> 3, torch.tensor(9)) ^ (kv_idx >> 3)
    nearest = nearest + (2 ** (h & 1) - 1)
    return (nearest.bitwise_and(5) == 0).logical_or(kv_idx.eq(q_idx)) | ((torch.div(q_idx - 40, 7, rounding_mode="trunc")) == kv_idx // 7)


def floats(score, b, h, q_idx, kv_idx):
    position = (q_idx + 1.0).log2().floor() + torch.sqrt(kv_idx + 1) ** 2 / N
    return -(-score) + position.clamp(max=4.5) * 0.1 + torch.sign(q_idx - 40) * torch.rsqrt(1.0 + h) + torch.ceil(score * 0 + 0.5) * 0.01


# Pairs, to compile fewer kernels: a score_mod and the mask_mod of the same row, then the masks that are left.
HOOKS = [
    (make_alibi(H), causal), (relative_bias, None), (soft_cap(2.0), natten(12, 5)), (checkerboard, sliding_window),
    (causal_by_head, jagged), (batch_bias, prefix_lm), (floats, document), (None, bits), (None, functools.partial(dilated, stride=2)),
    (None, Transfusion([(10, 20), (40, 33)])), (None, and_masks(or_masks(dilated, causal), document)),
]  # fmt: skip


def label(hooks: tuple[Any, Any]) -> str:
    return "-".join(flex._label(f) for f in hooks if f is not None)


@pytest.mark.parametrize("hooks", HOOKS, ids=label)
def test_hooks_mean_what_they_do_in_flex(hooks: tuple[Any, Any]) -> None:
    agree(*hooks)


def test_negative_indices_count_from_the_end_with_sizes_that_are_read_at_each_call() -> None:
    def last(score, b, h, q_idx, kv_idx):
        return score + TABLES[0][-1 - h]

    TABLES = [torch.arange(4.0)]
    q, k, v = inputs()
    for table in (torch.arange(4.0), torch.arange(9.0).flip(0)):
        TABLES[0] = table
        out, lse = ag.flex_attention(q, k, v, last, enable_gqa=True, return_lse=True)
        compare(lse, torchs(q, k, v, last)[1])


def test_block_masks() -> None:
    """Of create_block_mask: its mask_mod. Of from_kv_blocks without one: its blocks, partial and full."""
    agree(None, create_block_mask(causal, B, H, N, N, device="cpu"))
    agree(None, create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=32))
    num = torch.tensor([[[1, 1, 2]], [[3, 0, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0, 2], [0, 1, 2], [0, 2, 1]]], [[[0, 1, 2], [0, 1, 2], [2, 1, 0]]]], dtype=torch.int32)
    full = torch.tensor([[[1, 0, 0]], [[0, 0, 1]]], dtype=torch.int32)
    blocks = BlockMask.from_kv_blocks(num, indices, full, torch.flip(indices, (-1,)).contiguous(), BLOCK_SIZE=32)

    def in_blocks(b, h, q_idx, kv_idx):  # eager FlexAttention ignores blocks, and the compiled one does not
        return blocks.to_dense()[b, 0, q_idx // 32, kv_idx // 32] != 0

    q, k, v = inputs()
    ref = torchs(q, k, v, None, in_blocks)[0]
    before = ag.flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    compare(before, ref)
    compare(ag.reference(q, k, v, ag.from_flex(block_mask=blocks), layout="bhsd"), ref, torch.float32)
    num[0, 0, 0] = 2  # seen: a block mask may be rewritten in place
    after = ag.flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    compare(after, torchs(q, k, v, None, in_blocks)[0])
    assert torch.equal(after[1], before[1]) and not torch.equal(after, before)


@pytest.mark.parametrize("full", (False, True))
@pytest.mark.parametrize("heads", (1, H))
def test_blocks_that_say_more_than_the_mask_mod(full: bool, heads: int) -> None:
    """As in compiled FlexAttention: a block that is left out is masked, a full one is not."""
    state = torch.randint(0, 3 if full else 2, (B, heads, 3, 3), generator=torch.Generator().manual_seed(3))

    def rows(kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = (state == kind).int()
        return chosen.sum(-1).int(), chosen.argsort(dim=-1, descending=True, stable=True).int()

    blocks = BlockMask.from_kv_blocks(*rows(1), *(rows(2) if full else ()), BLOCK_SIZE=32, mask_mod=causal)

    def meaning(b, h, q_idx, kv_idx):
        there = state[b, h % heads, q_idx // 32, kv_idx // 32]
        return (there == 2) | ((there == 1) & causal(b, h, q_idx, kv_idx))

    q, k, v = inputs()
    ref, ref_lse = torchs(q, k, v, None, meaning)
    for _ in range(2):
        out, lse = ag.flex_attention(q, k, v, None, blocks, enable_gqa=True, return_lse=True)
        compare(out, ref)
        compare(lse, ref_lse)
    compare(ag.reference(q, k, v, ag.from_flex(block_mask=blocks), layout="bhsd"), ref, torch.float32)


def test_blocks_that_the_mask_mod_implies_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_CHUNK", 1)  # block by block
    for mask in (causal, sliding_window, prefix_lm, document, causal_mask_of_head):
        for block in (16, 40, (48, 16)):
            blocks = create_block_mask(mask, B, H, N, N - 7, device="cpu", BLOCK_SIZE=block)
            assert ag.from_flex(block_mask=blocks).structure_hash == ag.from_flex(mask_mod=mask).structure_hash
    one = torch.ones(1, 1, 3, dtype=torch.int32)
    for size in (1 << 20, (1 << 20, 30), (40, 1 << 20)):  # blocks far larger than the lengths, and more of them than queries
        blocks = BlockMask.from_kv_blocks(one, one[..., None] - 1, BLOCK_SIZE=size, mask_mod=causal, seq_lengths=(30, 30))
        assert flex._mask_of(blocks)[1] is None
    blocks = create_block_mask(causal, B, H, N, N, device="cpu", BLOCK_SIZE=32)
    assert flex._mask_of(blocks)[1] is None
    blocks.kv_num_blocks[0, 0, 1] = 0  # seen: it leaves out more now
    assert flex._mask_of(blocks)[1] is not None
    with torch.inference_mode():  # tensors without a version
        blocks = create_block_mask(causal, B, H, N, N, device="cpu", BLOCK_SIZE=32)
        assert flex._mask_of(blocks)[1] is None and flex._state_of(blocks) is flex._state_of(blocks)
        blocks.kv_num_blocks[0, 0, 1] = 0
        assert flex._mask_of(blocks)[1] is not None


def test_a_batch_of_one_key_is_shared_under_a_block_mask() -> None:
    q, k, v = inputs()
    mask = create_block_mask(causal, B, None, N, N, device="cpu")
    compare(ag.flex_attention(q, k[:1], v[:1], block_mask=mask, enable_gqa=True), torchs(q, k[:1].expand_as(k), v[:1].expand_as(v), None, mask)[0])


def test_scores_of_minus_infinity_are_a_mask() -> None:
    def causal_score(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, float("-inf"))

    assert ag.from_flex(causal_score).structure_hash == ag.from_flex(mask_mod=causal).structure_hash

    def of_the_score(score, b, h, q_idx, kv_idx):
        return torch.where((score > 0) & (kv_idx != q_idx), score, -math.inf)

    agree(of_the_score)
    q, k, v = inputs()
    out, lse = ag.flex_attention(q[:, :, :8], -q[:, :, :8].abs() * q[:, :, :8].sign(), v[:, :1].expand(B, H, N, D)[:, :, :8], of_the_score, return_lse=True)
    assert not out.isnan().any() and lse.isneginf().any() and (out[lse.isneginf()] == 0).all()


# ---------------------------------------------------------------- the call


def test_flex_attention_has_torchs_signature() -> None:
    import inspect

    ours, theirs = (inspect.signature(f).parameters for f in (ag.flex_attention, torch_flex.flex_attention))
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {n: (p.kind, p.default) for n, p in theirs.items()}


def test_results_have_torchs_form() -> None:
    q, k, v = inputs(kv_heads=H)
    out = ag.flex_attention(q, k, v, block_mask=causal)
    ref, ref_lse = torchs(q, k, v, None, causal)
    compare(out, ref)
    for keywords in ({"return_lse": True}, {"return_aux": torch_flex.AuxRequest(lse=True)}):
        found, more = ag.flex_attention(q, k, v, None, causal, **keywords)
        assert torch.equal(found, out)
        compare(getattr(more, "lse", more), ref_lse)
    found, more = ag.flex_attention(q, k, v, None, causal, return_aux=torch_flex.AuxRequest())
    assert more == torch_flex.AuxOutput(None, None) and torch.equal(found, out)
    assert torch.equal(ag.flex_attention(q, k, v, None, causal, kernel_options={"BLOCK_M": 64, "fwd_num_warps": 4}), out)
    compare(ag.flex_attention(q, k, v, None, causal, scale=0.3), torchs(q, k, v, None, causal, 0.3)[0])
    compare(ag.flex_attention(q, k, v), torchs(q, k, v)[0])


CALLS: dict[str, tuple[Callable[[Any, Any, Any], Any], type[Exception], list[str]]] = {
    "heads without enable_gqa": (lambda q, k, v: ag.flex_attention(q, k, v), ag.ParameterError, ["4 heads and key 2", "enable_gqa=True"]),
    "heads that do not divide": (
        lambda q, k, v: ag.flex_attention(q[:, :3], k, v, enable_gqa=True), ag.ParameterError, ["num_kv_heads must divide"],
    ),
    "three dimensions": (lambda q, k, v: ag.flex_attention(q[0], k, v), ag.ParameterError, ["query is of shape", "[batch, heads, seq, head_dim]"]),
    "another head_dim": (lambda q, k, v: ag.flex_attention(q[..., :4], k, v, enable_gqa=True), ag.ParameterError, ["head_dim of q is 4"]),
    "another batch": (lambda q, k, v: ag.flex_attention(q, k[:1], v[:1], enable_gqa=True), ag.ParameterError, ["batch 2 and key 1", "block_mask"]),
    "another batch of values": (
        lambda q, k, v: ag.flex_attention(q, k[:1], v, block_mask=causal, enable_gqa=True), ag.ParameterError, ["key has batch 1 and value 2"],
    ),
    "no tensor": (lambda q, k, v: ag.flex_attention(q, k, None), ag.ParameterError, ["value is NoneType"]),
    "a block mask of another length": (
        lambda q, k, v: ag.flex_attention(q, k, v, block_mask=create_block_mask(causal, None, None, N, N - 1, device="cpu"), enable_gqa=True),
        ag.ParameterError, ["(any, any, 96, 95)", "(2, 4, 96, 96)", "mask_mod itself"],
    ),
    "a block mask of another length, as a variant": (
        lambda q, k, v: ag.attention(q, k, v, ag.from_flex(block_mask=create_block_mask(causal, 3, None, N, N, device="cpu")), layout="bhsd"),
        ag.ParameterError, ["made for batch 3, q_len 96", "the call has batch 2, q_len 96"],
    ),
    "a slice of a block mask": (
        lambda q, k, v: ag.flex_attention(q, k, v, block_mask=create_block_mask(causal, B, H, N, N, device="cpu")[:, :, 0], enable_gqa=True),
        ag.ParameterError, ["slice of a BlockMask", "q_idx + offset"],
    ),
    "a dense mask": (lambda q, k, v: ag.flex_attention(q, k, v, block_mask=torch.ones(N, N), enable_gqa=True), ag.ParameterError, ["BlockMask or a mask_mod"]),
    "a block mask as score_mod": (
        lambda q, k, v: ag.from_flex(create_block_mask(causal, 1, 1, N, N, device="cpu")), ag.ParameterError, ["pass it as block_mask="],
    ),
    "two masks": (
        lambda q, k, v: ag.from_flex(None, causal, create_block_mask(causal, 1, 1, N, N, device="cpu")), ag.ParameterError, ["and_masks"],
    ),
    "lse asked for twice": (
        lambda q, k, v: ag.flex_attention(q, q, q, return_lse=True, return_aux=torch_flex.AuxRequest(lse=True)), ag.ParameterError, ["both given"],
    ),
    "row maxima": (
        lambda q, k, v: ag.flex_attention(q, q, q, return_aux=torch_flex.AuxRequest(max_scores=True)), ag.UnsupportedError, ["max_scores"],
    ),
    "unknown options": (lambda q, k, v: ag.flex_attention(q, q, q, kernel_options={"BLOK_M": 1}), ag.ParameterError, ["BLOK_M", "BLOCK_M"]),
    "grad": (lambda q, k, v: ag.flex_attention(q.requires_grad_(), q, q), ag.UnsupportedError, ["requires grad"]),
    "float64": (lambda q, k, v: ag.flex_attention(*[q.double()] * 3), ag.UnsupportedError, ["float64"]),
    "an offset that is none": (lambda q, k, v: ag.from_flex(None, causal, q_offset="start"), ag.VariantError, ["'start'", '"end"']),
    "an offset of the wrong type": (lambda q, k, v: ag.from_flex(None, causal, q_offset=torch.zeros(2)), ag.VariantError, ["float32", "int64 tensor [batch]"]),
    "a block mask in a batch": (
        lambda q, k, v: ag.BatchAttention(
            ag.from_flex(block_mask=create_block_mask(causal, 1, 1, N, N, device="cpu")), num_heads=H, num_kv_heads=H, head_dim=D, max_requests=2,
            max_q_tokens=N, max_kv_tokens=N, device="cpu",
        ), ag.UnsupportedError, ["one q_len and kv_len", "mask_mod alone"],
    ),
    "positions of two kinds": (
        lambda q, k, v: ag.compose(ag.from_flex(mask_mod=causal), Causal()), ag.VariantError, ["from 0", "from the end", 'q_offset="end"'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls(name: str) -> None:
    call, error, parts = CALLS[name]
    with pytest.raises(error) as found:
        call(*inputs())
    for part in parts:
        assert part in str(found.value)


# ---------------------------------------------------------------- what hooks cannot do

HEADER = """import functools, math, random
import numpy as np
import torch
from torch.nn.attention.flex_attention import and_masks
T = torch.ones(4)
F64 = torch.ones(4, dtype=torch.float64)
GRAD = torch.ones(4, requires_grad=True)
N = torch.tensor(3)
calls = []
def hook(score, b, h, q_idx, kv_idx):
    """
# a body of `hook`, the line where it is wrong (of the body), what the message must say
BODIES: dict[str, tuple[str, list[str]]] = {
    "if": ("return score if q_idx >= kv_idx else -score", ["`(kv_idx <= q_idx)`", "branches on data", "torch.where"]),
    "and": ("return torch.where(q_idx > 1 and kv_idx > 1, score, 0.0)", ["branches on data", "& | ~"]),
    "a chained comparison": ("return torch.where(0 < kv_idx < 4, score, 0.0)", ["(a < b) & (b < c)"]),
    "if on a captured tensor": ("return score if N > 2 else -score", ["`(2 < N)`", "branches on data"]),
    "item of a symbol": ("return score * kv_idx.item()", ["`.item`", "kv_idx"]),
    "item of a captured tensor": ("return score * N.item()", ["`.item`", "frozen"]),
    "tolist": ("return score * T.tolist()[0]", ["`.tolist`", "tensor T", "frozen"]),
    "int()": ("return score * int(kv_idx)", ["`kv_idx` has no value", "int()"]),
    "math": ("return math.exp(score)", ["`score` has no value", "math.*"]),
    "numpy": ("return np.exp(score)", ["no value"]),
    "range": ("return sum(score for _ in range(h))", ["`h` has no value", "range()"]),
    "a write to an element": ("T[h] = score; return score", ["the hook writes", "an assignment"]),
    "a constant write": ("T[0] = 2.0; return score", ["the hook writes", "__setitem__", "T"]),
    "an in-place method": ("T.add_(1); return score", ["the hook writes", "add_", "T"]),
    "an in-place operator": ("global T; T += 1; return score", ["the hook writes", "T"]),
    "an in-place method of a symbol": ("score.mul_(2); return score", ["the hook writes", "mul_"]),
    "an in-place division": ("global T; T /= 2; return score", ["the hook writes", "div_", "T"]),
    "inplace=True": ("return score + torch.nn.functional.relu(T - 0, inplace=True)[h]", ["torch's `sub`", "captured tensor T"]),
    "inplace=True, of the tensor": ("return score + torch.nn.functional.threshold(T, 3.0, 0.0, inplace=True)[h]", ["the hook writes", "T"]),
    "a write that torch does not name so": ("return score + torch.nn.functional.dropout(T, 0.5, True, True)[h]", ["torch's `dropout`", "tensor T"]),
    "an attribute of a tensor": ("T.data = torch.zeros(4); return score + T[h]", ["the hook writes", "T"]),
    "a type by its name": ("return score + score.type('torch.IntTensor')", ["`.type('torch.IntTensor')`", ".to(torch.int32)"]),
    "an unknown power": ("return score ** h", ["`score ** h`", "torch.exp2(y * torch.log2(x))"]),
    "bits of a score": ("return score & 1", ["`and` got (f32,", ".to(torch.int32)"]),
    "a made tensor": ("return score + torch.ones(1)", ["a tensor that the hook makes", "(1,)"]),
    "out=": ("return torch.exp(score, out=N)", ["the hook writes", "out="]),
    "an unknown function": ("return torch.erf(score)", ["torch's `erf` on `score`", "torch.where"]),
    "an unknown method": ("return score.cumsum(0)", ["torch's `cumsum`"]),
    "a whole tensor": ("return score + T", ["T, a captured tensor of shape (4,)", "index every axis"]),
    "a whole tensor on the left": ("return T * score", ["T, a captured tensor", "used whole"]),
    "arithmetic on a whole tensor": ("return score + (T * 2)[h]", ["torch's `mul`", "captured tensor T", "outside of the hook"]),
    "a reduction": ("return score + T.sum()", ["torch's `sum`", "captured tensor T"]),
    "too many indices": ("return score + T[h, b]", ["2 indices", "1 axes"]),
    "a float index": ("return score + T[score]", ["is f32", ".to(torch.int32)"]),
    "a slice beside a symbol": ("return score + torch.ones(4, 4)[h, 1:]", ["the hook makes"]),
    "random numbers": ("return score + torch.rand(())", ["`rand`", "traced once"]),
    "float64 captured": ("return score + F64[h]", ["tensor F64", "torch.float64", ".float()"]),
    "float64": ("return score.double()", ["torch.float64", "float32"]),
    "grad": ("return score + GRAD[h]", ["GRAD", "requires grad", "detached"]),
    "an exception": ("return score + [1, 2][5]", ["IndexError", "hook"]),
    "a foreign type": ("return score + 'x'", ["'x'"]),
    "an int beyond 32 bits": ("return score + kv_idx * 2**40", ["does not fit i32"]),
}  # fmt: skip
# of these the line is that of the definition
RESULTS: dict[str, tuple[str, list[str]]] = {
    "no return": ("score * 2", ["returned None", "`return` missing"]),
    "a bool": ("return q_idx >= kv_idx", ["returned torch.bool", "score + bias[h]"]),
    "a tensor": ("return T", ["tensor of shape (4,)"]),
    "a string": ("return 'x'", ["returned str 'x'"]),
}


def load(body: str, path: Any) -> tuple[Any, dict[str, Any]]:
    path.write_text(HEADER + body + "\n")
    scope: dict[str, Any] = {"__name__": "hooks"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["hook"], scope


@pytest.mark.parametrize("name", [*BODIES, *RESULTS])
def test_what_cannot_be_expressed_is_refused_at_its_line(name: str, tmp_path: Any) -> None:
    body, parts = (BODIES | RESULTS)[name]
    hook, scope = load(body, tmp_path / "hooks.py")
    line = HEADER.count("\n") + (name in BODIES)
    for call in (lambda: ag.from_flex(hook), lambda: ag.flex_attention(*inputs(kv_heads=H), hook)):
        with pytest.raises(ag.VariantError) as found:
            call()
        message = str(found.value)
        assert message.startswith(f"{tmp_path}/hooks.py:{line}: "), message
        for part in parts:
            assert part in message
    assert torch.equal(scope["T"], torch.ones(4)), "a refused write has not happened"


def test_masks_return_bools_and_take_four_arguments() -> None:
    for hook, part in (
        (lambda b, h, q, kv: q - kv, "returned torch.int32: (q_idx - kv_idx). Return a bool"),
        (lambda score, b, h, q, kv: score, "is it a score_mod?"),
        (lambda b, h: b, "mask_mod takes (b, h, q_idx, kv_idx)"),
    ):
        with pytest.raises(ag.VariantError, match="test_flex.py") as found:
            ag.from_flex(mask_mod=hook)
        assert part in str(found.value)
    with pytest.raises(ag.VariantError, match="is it a mask_mod"):
        ag.from_flex(causal)


def test_a_hook_that_writes_python_values_is_refused() -> None:
    seen = []

    def appends(score, b, h, q_idx, kv_idx):
        seen.append(1)
        return score

    count = 0

    def counts(score, b, h, q_idx, kv_idx):
        nonlocal count
        count += 1
        return score * count

    table, other = torch.rand(H), torch.rand(H)

    def exchanges(score, b, h, q_idx, kv_idx):
        nonlocal table
        table = other
        return score + table[h]

    for hook in (appends, counts, exchanges):
        with pytest.raises(ag.VariantError, match="writes to what it captures"):
            ag.from_flex(hook)


# ---------------------------------------------------------------- positions


def test_queries_count_from_0_or_from_the_end_or_from_a_tensor() -> None:
    q, k, v = inputs(20, N)
    start = torch.tensor([30, 5], dtype=torch.int32)
    ref = functools.partial(torchs, q, k, v, None)
    for offset, mask in (
        (0, causal),
        ("end", lambda b, h, q, kv: q + (N - 20) >= kv),
        (7, lambda b, h, q, kv: q + 7 >= kv),
        (start, lambda b, h, q, kv: q + start[b] >= kv),
    ):
        variant = ag.from_flex(mask_mod=causal, q_offset=offset)
        compare(ag.attention(q, k, v, variant, layout="bhsd"), ref(mask)[0])
        compare(ag.reference(q, k, v, variant, layout="bhsd"), ref(mask)[0], torch.float32)
        compare(ag.attention(q, k, v, variant, layout="bhsd", q_offset=11), ref(lambda b, h, q, kv: q + 11 >= kv)[0])
    start += 2  # the last variant's own tensor
    compare(ag.attention(q, k, v, variant, layout="bhsd"), ref(lambda b, h, q, kv: q + start[b] >= kv)[0])
    compare(ag.flex_attention(q, k, v, block_mask=causal, enable_gqa=True), ref(causal)[0])


def test_a_batch_counts_as_the_variant_does() -> None:
    q, k, v = inputs(20, N)
    start = torch.tensor([30, 5])
    rows = [x.transpose(1, 2).reshape(-1, x.shape[1], D) for x in (q, k, v)]
    for offset, given in ((0, None), ("end", None), (start, None), (0, [30, 5])):
        variant = ag.from_flex(mask_mod=causal, q_offset=offset)
        batch = ag.BatchAttention(variant, num_heads=H, num_kv_heads=KV_HEADS, head_dim=D, dtype=torch.float32, max_requests=3, max_q_tokens=64,
                                  max_kv_tokens=2 * N, device="cpu")  # fmt: skip
        batch.plan([0, 20, 40], [0, N, 2 * N], q_positions=given)
        expected = ag.reference(q, k, v, variant, layout="bhsd", q_offset=given)
        compare(batch.run(rows[0], (rows[1], rows[2])), expected.transpose(1, 2).reshape(-1, H, D))


def test_a_batch_reads_captured_tensors() -> None:
    doc, window, slopes = DOC.int()[None].repeat(2, 1), torch.tensor(30), torch.rand(H)
    doc[1] += torch.arange(N) // 50

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window) & (doc[b, q_idx] == doc[b, kv_idx])

    def score_mod(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    q, k, v = inputs(20, N)
    rows = [x.transpose(1, 2).reshape(-1, x.shape[1], D) for x in (q, k, v)]
    variant = ag.from_flex(score_mod, mask_mod, q_offset="end")
    batch = ag.BatchAttention(variant, num_heads=H, num_kv_heads=KV_HEADS, head_dim=D, dtype=torch.float32, max_requests=2, max_q_tokens=64,
                              max_kv_tokens=2 * N, device="cpu")  # fmt: skip
    for size in (30, 7):
        window.fill_(size)
        slopes.mul_(2)
        batch.plan([0, 20, 40], [0, N, 2 * N])
        expected = ag.reference(q, k, v, variant, layout="bhsd")
        compare(batch.run(rows[0], (rows[1], rows[2])), expected.transpose(1, 2).reshape(-1, H, D))


def test_a_class_may_declare_its_offset() -> None:
    class FromTheStart(Causal):
        q_offset = 0

    q, k, v = inputs(20, N)
    compare(ag.attention(q, k, v, FromTheStart(), layout="bhsd"), torchs(q, k, v, None, causal)[0])
    both = ag.compose(FromTheStart(), ag.from_flex(soft_cap(2.0)), SoftCap(3.0))
    assert both.q_offset == 0
    with pytest.raises(ag.VariantError, match="q_offset` of Late is 'late'"):

        class Late(Causal):
            q_offset = "late"

        Late()


# ---------------------------------------------------------------- captured values


def test_tensors_that_change_in_place_are_seen() -> None:
    slopes, window = torch.ones(H), torch.tensor(40)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    q, k, v = inputs()
    variant = ag.from_flex(score_mod, mask_mod)
    assert {n: f.kind for n, f in variant.trace.fields.items()} == {"slopes": "tensor", "window": "scalar"}
    built = len(ag.build_log())
    for cost, size in ((1.0, 40), (0.1, 7)):
        slopes.fill_(cost)
        window.fill_(size)
        ref = torchs(q, k, v, score_mod, mask_mod)[0]
        compare(ag.attention(q, k, v, variant, layout="bhsd"), ref)
        compare(ag.flex_attention(q, k, v, score_mod, mask_mod, enable_gqa=True), ref)
    compare(ag.attention(q, k, v, variant, layout="bhsd", window=40, slopes=torch.full((H,), 0.1)),
            ag.reference(q, k, v, variant, layout="bhsd", window=40))  # fmt: skip
    assert len(ag.build_log()) == built + 1


def trace_count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of traces so far, in a list of one."""
    count = [0]
    original = flex.Tracer.trace

    def trace(*args: Any) -> Any:
        count[0] += 1
        return original(*args)

    monkeypatch.setattr(flex.Tracer, "trace", trace)
    return count


SETTING = 5


class Config:
    window = 9


def make(cap: float, table: torch.Tensor, config: Any) -> Callable[..., Any]:
    def inner(x):
        return x * cap + SETTING

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx - kv_idx < Config.window, inner(score) + table[h], score - config["shift"])

    return score_mod


def test_hooks_are_traced_again_only_if_they_say_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    count = trace_count(monkeypatch)
    monkeypatch.setitem(globals(), "SETTING", 5)
    monkeypatch.setattr(Config, "window", 9)
    q, k, v = inputs()
    table, config = torch.rand(H), {"shift": 1.0}

    def check(traces: int, *arguments: Any) -> None:
        before, hook = count[0], make(*arguments)
        for _ in range(2):
            compare(ag.flex_attention(q, k, v, hook, enable_gqa=True), torchs(q, k, v, hook)[0])
        assert count[0] == before + traces

    check(1, 2.0, table, config)
    check(0, 2.0, table, config)  # another function of the same code and values
    check(0, 2.0, torch.rand(H), config)  # another tensor
    table.mul_(2)
    check(0, 2.0, table, config)
    monkeypatch.setitem(globals(), "SETTING", 6)  # a global of a nested function
    check(1, 2.0, table, config)
    monkeypatch.setattr(Config, "window", 8)  # an attribute of a global
    check(1, 2.0, table, config)
    config["shift"] = 3.0  # an item of a captured dict
    check(1, 2.0, table, config)


def test_what_a_hook_captures_is_told_apart() -> None:
    class Mod:
        def __init__(self, n: int) -> None:
            self.n = n

        def __call__(self, score, b, h, q_idx, kv_idx):
            return score * self.n

        def method(self, score, b, h, q_idx, kv_idx):
            return score * self.n

    class Vector:
        def __init__(self, n: int) -> None:
            self.n = n

        def __mul__(self, other: Any) -> Any:
            return other * self.n

    def with_default(score, b, h, q_idx, kv_idx, n=1):
        return score * n

    def of(n: Any) -> Any:
        return lambda score, b, h, q_idx, kv_idx: n * score

    def key(hook: Any) -> Any:
        return captures(hook).key

    two = torch.rand(2)
    for same, other in (
        (lambda: Mod(1), Mod(2)),
        (lambda: Mod(1).method, Mod(2).method),
        (lambda: functools.partial(with_default, n=1), functools.partial(with_default, n=2)),
        (lambda: of(1), of(1.0)),
        (lambda: of(1), of(True)),
        (lambda: of(0.0), of(-0.0)),
        (lambda: of([1, (2, 3)]), of([1, (2, 4)])),
        (lambda: of(two), of(torch.rand(3))),
        (lambda: of((two, two)), of((two, torch.rand(2)))),
        (lambda: of(math), of(torch)),
    ):
        assert key(same()) == key(same()) is not None
        assert key(same()) != key(other)
    assert key(of(torch.rand(2))) == key(of(torch.rand(2)))
    assert key(lambda score, b, h, q_idx, kv_idx: score * getattr(math, "p" + "i")) is None
    assert key(of(Vector(1))) is None and key(of(iter([1]))) is None  # may say anything: traced at each call


def test_kept_variants_hold_no_tensors() -> None:
    table = torch.rand(H)
    q, k, v = inputs()
    ag.flex_attention(q, k, v, make(2.0, table, {"shift": 1.0}), enable_gqa=True)
    seen = weakref.ref(table)
    del table
    gc.collect()
    assert seen() is None


def test_modules_and_their_parameters() -> None:
    class Bias(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.rand(H))

        def score_mod(self, score, b, h, q_idx, kv_idx):
            return score + self.bias[h]

    module = Bias()
    q, k, v = inputs()
    with pytest.raises(ag.VariantError, match="bias.*requires grad"):
        ag.flex_attention(q, k, v, module.score_mod, enable_gqa=True)
    with torch.no_grad():
        for _ in range(2):
            compare(ag.flex_attention(q, k, v, module.score_mod, enable_gqa=True, return_lse=True)[1], torchs(q, k, v, module.score_mod)[1])
            module.bias.add_(1.0)


def test_views_and_numbers_of_captured_tensors() -> None:
    packed = torch.rand(3, 2, H)
    flag, scale = torch.tensor(True), torch.tensor(0.5, dtype=torch.bfloat16)

    def score_mod(score, b, h, q_idx, kv_idx):
        row = packed[1:].flatten(0, 1)[2]
        column = packed.transpose(0, 2)[h]
        width = packed.shape[0] + len(packed) + packed.size(1)
        return torch.where(flag, (score + row[h] + column[b, 2] + packed[2, 1, 3]) * scale, score) + width + score.new_ones(())

    q, k, v = inputs()
    for flip in (True, False):
        flag.fill_(flip)
        packed.mul_(1.5)
        compare(ag.flex_attention(q, k, v, score_mod, enable_gqa=True, return_lse=True)[1], torchs(q, k, v, score_mod)[1])


def test_numbers_of_numpy_and_tensors_as_indices() -> None:
    table, row = torch.rand(3, H), torch.tensor(1)

    def score_mod(score, b, h, q_idx, kv_idx):
        shift = np.float64(0.5) * score + np.sqrt(2.0) * h - np.int64(3) + score * np.float32(2)
        powers = 3**h + (q_idx - kv_idx) ** 2 % 5 + 3 ** (q_idx - kv_idx - N) + h**0 + torch.float_power(h, 2) // 3
        same = ((q_idx > 3) == (kv_idx > 3)).float() + score.where(condition=q_idx > kv_idx, other=score * 2)
        return shift + powers * 0.1 + same + table[row, h] + table[row][h] + table[torch.tensor(2)][h]

    q, k, v = inputs()
    variant = ag.from_flex(score_mod)
    for n in (1, 0):
        row.fill_(n)
        ref, ref_lse = torchs(q, k, v, score_mod)
        compare(ag.flex_attention(q, k, v, score_mod, enable_gqa=True, return_lse=True)[1], ref_lse)
        compare(ag.reference(q, k, v, variant, layout="bhsd"), ref, torch.float32)


def test_names_of_captured_tensors_are_fields() -> None:
    k, heads, Größe = torch.rand(H), torch.rand(H), torch.rand(H)
    variant = ag.from_flex(lambda score, b, h, q_idx, kv_idx: score + k[h] + heads[h] + Größe[h])
    assert list(variant.trace.fields) == ["k_tensor", "heads_tensor", "Gr__e"]
    copy = pickle.loads(pickle.dumps(variant))
    assert copy.structure_hash == variant.structure_hash and torch.equal(copy.k_tensor, k)


def test_inside_torch_compile() -> None:
    variant = ag.from_flex(mask_mod=sliding_window)
    q, k, v = inputs(20, N)

    def call(q, k, v):
        return ag.attention(q, k, v, variant, layout="bhsd") * 2

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))
    with pytest.raises(Exception, match="make the variant outside"):
        torch.compile(lambda q, k, v: ag.flex_attention(q, k, v, block_mask=causal), fullgraph=True, backend="eager")(q, q, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["window", "documents", "soft cap", "bias", "block mask"])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Hooks over tensors on the device, 128 rows and more a request."""
    device = torch.device("cuda", torch.cuda.current_device())
    n = 300
    documents = torch.arange(n, device=device) // 70
    bias = torch.randn(H, 2 * n, device=device)

    def in_documents(b, h, q_idx, kv_idx):
        return (documents[q_idx] == documents[kv_idx]) & (q_idx >= kv_idx)

    def biased(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx - kv_idx + n]

    score_mod, mask_mod = {
        "window": (None, sliding_window), "documents": (None, in_documents), "soft cap": (soft_cap(20.0), causal),
        "bias": (biased, None), "block mask": (None, create_block_mask(in_documents, 2, H, n, n, device=device)),
    }[name]  # fmt: skip
    q, k, v = (torch.randn(2, h, n, 64, device=device).to(dtype) for h in (H, KV_HEADS, KV_HEADS))
    out, lse = ag.flex_attention(q, k, v, score_mod, mask_mod, enable_gqa=True, return_lse=True)
    compare(out, torchs(q, k, v, score_mod, mask_mod)[0])
    assert lse.isfinite().all()
