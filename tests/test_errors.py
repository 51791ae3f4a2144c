"""Bad input: a table of what a user may get wrong, and what each message must say: required, found and what to do.

Errors of a declaration carry the user's file and line. No row of the first three tables needs a compiled kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attngen as ag
import pytest
import torch
from attngen import append, cache, devices, merge, variants
from attngen.paths import PACKAGE

# ---------------------------------------------------------------- declarations

HEADER = """import math
import numpy as np
import torch
import attngen as ag
TABLE = torch.ones(4)
class Bad(ag.Variant):
"""


def hook(body: str, fields: str = "cap: ag.Scalar = 1.0", signature: str = "logits(self, s, at)") -> str:
    return f"    {fields}\n    def {signature}:\n        {body}\n"


# name: (class body, 1-based line in the file where the error is, what the message must contain)
DECLARATIONS: dict[str, tuple[str, int, list[str]]] = {
    "if on a symbol": (
        hook("return s if s > 0 else -s"),
        9,
        ["`(0 < s)` has no truth value", "branches on a symbol", "ag.where"],
    ),
    "and": (hook("return ag.where((at.q > 1) and (at.kv > 1), s, 0.0)"), 9, ["branches on a symbol", "& | ~"]),
    "chained comparison": (
        hook("return ag.where(0 < at.kv < 4, s, 0.0)"),
        9,
        ["branches on a symbol", "(a < b) & (b < c)"],
    ),
    "Python's max": (hook("return max(s, 0.0)"), 9, ["branches on a symbol", "ag.min/ag.max"]),
    "while": (hook("\n        while s < 1: s = s + 1\n        return s"), 10, ["branches on a symbol"]),
    "range of a symbol": (hook("return sum(s for _ in range(at.head))"), 9, ["`at.head` is a symbol", "range()"]),
    "math.exp": (hook("return math.exp(s)"), 9, ["`s` is a symbol and has no float value", "ag.exp"]),
    "int()": (hook("return s + int(at.q)"), 9, ["`at.q` is a symbol and has no integer value", "ag.cast"]),
    "round": (hook("return round(s)"), 9, ["TypeError", "__round__", "ag.where/min"]),
    "torch function": (hook("return torch.exp(s)"), 9, ["torch's `exp` was called on a symbol", "ag.exp"]),
    "numpy function": (hook("return np.exp(s)"), 9, ["TypeError", "exp", "ag.where/min"]),
    "unknown attngen function": (hook("return ag.erf(s)"), 9, ["AttributeError", "erf", "ag.where/min"]),
    "unknown method": (hook("return s.tanh()"), 9, ["AttributeError", "'tanh'", "tanh"]),
    "global tensor indexed": (
        hook("return s + TABLE[at.head]"),
        9,
        ["global torch tensor", 'table: ag.Tensor("heads")'],
    ),
    "global tensor added": (
        hook("return s + TABLE"),
        9,
        ["torch tensor of shape (4,)", 'ag.Tensor("heads")', "pass table="],
    ),
    "tensor on the left": (hook("return TABLE * s"), 9, ["global torch tensor", "ag.Tensor"]),
    "list indexed": (
        hook("return s + [1.0, 2.0][at.head]"),
        9,
        ["`at.head` is a symbol", "indexing a list", "ag.Tensor"],
    ),
    "numpy array": (hook("return s + np.ones(4)"), 9, ["ndarray", "Python bool, int and float"]),
    "a string": (hook("return s + 'x'"), 9, ["`'x'` of type str", "Python bool, int and float"]),
    "no return": (hook("s * 2"), 8, ["hook `logits` returned None", "`return` missing", "a float expression"]),
    "bool for float": (hook("return at.kv <= at.q"), 8, ["hook `logits` returned bool", "ag.where(condition, a, b)"]),
    "int for bool": (
        hook("return at.kv - at.q", signature="mask(self, at)"),
        8,
        ["hook `mask` returned i32", "comparison"],
    ),
    "float for bool": (
        hook("return self.cap", signature="mask(self, at)"),
        8,
        ["hook `mask` returned f32", "comparison"],
    ),
    "a tuple": (hook("return s, s"), 8, ["returned tuple", "a float expression"]),
    "unknown at": (hook("return s * at.pos"), 9, ["`at.pos` in hook `logits`", "at.head, at.kv"]),
    "sink reads the key": (
        hook("return 1.0 * at.kv", signature="sink(self, at)"),
        9,
        ["`at.kv` in hook `sink`", "may read"],
    ),
    "assigning at": (hook("at.q = 1\n        return s"), 9, ["`at.q` is assigned", "local variable"]),
    "assigning self": (hook("self.cap = 2.0\n        return s"), 9, ["`Bad.cap` is assigned", "immutable"]),
    "unknown field": (hook("return self.nope * s"), 9, ["AttributeError", "nope"]),
    "bool arithmetic": (hook("return s + (at.q < 3)"), 9, ["`add` got (f32, bool)", "ag.cast"]),
    "and of ints and bools": (
        hook("return ag.where(at.q & (at.kv < 3), s, 0.0)"),
        9,
        ["`and` got (i32, bool)", "ag.cast"],
    ),
    "where on a number": (hook("return ag.where(at.q, s, 0.0)"), 9, ["`where` got (i32, f32, f32)", "bool"]),
    "shift of a float": (hook("return s << 2"), 9, ["`shl` got (f32, f32)", "(i32, i32)"]),
    "big int": (
        hook("return s * (at.q + 5_000_000_000)"),
        9,
        ["5000000000 does not fit i32", "[-2147483648, 2147483647]"],
    ),
    "power": (hook("return s ** self.cap"), 9, ["constant integer power", "ag.exp2(y * ag.log2(x))"]),
    "cast to str": (hook("return ag.cast(s, str)"), 9, ["ag.cast to <class 'str'>", "float, int or bool"]),
    "wrong arity": (
        hook("return s", signature="logits(self, s)"),
        8,
        ["hook `logits` is declared as logits(s)", "def logits(self, s, at)"],
    ),
    "raises": (hook("return s / (1 - 1) + 1 / 0"), 9, ["hook `logits` raised ZeroDivisionError", "ag.where/min"]),
    "typo of a hook": (
        hook("return s", signature="logit(self, s, at)"),
        8,
        ["Bad.logit is no hook", "`logits`", "underscore"],
    ),
    "letters swapped": (hook("return True", signature="maks(self, at)"), 8, ["Bad.maks is no hook", "`mask`"]),
    "capital": (hook("return True", signature="Mask(self, at)"), 8, ["Bad.Mask is no hook", "`mask`"]),
    "typo of mask": (hook("return True", signature="masks(self, at)"), 8, ["Bad.masks is no hook", "`mask`"]),
    "tensor unindexed": (hook("return s + self.t", 't: ag.Tensor("heads")'), 9, ["tensor field self.t", "self.t[...]"]),
    "tensor iterated": (
        hook("return s + sum(self.t)", 't: ag.Tensor("heads")'),
        9,
        ["`self.t` is iterated over", "Index it"],
    ),
    "tensor in torch": (
        hook("return s + torch.sum(self.t)", 't: ag.Tensor("heads")'),
        9,
        ["torch's `sum`", "Index it"],
    ),
    "tensor sliced": (
        hook("return s + self.t[:]", 't: ag.Tensor("heads")'),
        9,
        ["`self.t` is sliced", "one integer expression"],
    ),
    "float index": (
        hook("return s + self.t[s]", 't: ag.Tensor("heads")'),
        9,
        ["index `s`", "'heads'", "f32", "ag.cast(x, int)"],
    ),
    "number of indices": (
        hook("return s + self.t[0, at.q]", 't: ag.Tensor("heads")'),
        9,
        ["2 indices", "1 axes", "per axis"],
    ),
    "annotation": (
        hook("return s", "cap: float = 1.0"),
        6,
        ["field `cap` of Bad is annotated <class 'float'>", "ag.Scalar"],
    ),
    "unknown annotation": (
        hook("return s", "cap: 'ag.Scaler' = 1.0"),
        6,
        ["`cap: ag.Scaler`", "does not evaluate", "ag.Scalar"],
    ),
    "tensor without axes": (hook("return s", "t: ag.Tensor"), 6, ["a Tensor without axes", 'ag.Tensor("heads")']),
    "default of another type": (
        hook("return s", "n: ag.Scalar[int] = 1.5"),
        6,
        ["Bad.n is scalar i32 and got 1.5", "Give a number"],
    ),
    "field assigned": (
        hook("return s", "window = ag.Scalar[int]"),
        6,
        ["`window` of Bad is assigned a field's type", "window: ag.Scalar[int]"],
    ),
    "tensor assigned": (hook("return s", 't = ag.Tensor("heads", 3)'), 6, ["`t` of Bad", "t: ag.Tensor('heads', 3)"]),
    "field type called": (hook("return s", "cap = ag.Scalar(30.0)"), 7, ["Scalar(30.0) is called", "x: ag.Scalar = 30.0"]),
    "field named like a hook": (hook("return s", "mask: ag.Scalar = 1.0"), 6, ["field `mask` of Bad", "Rename"]),
    "field named like an argument": (
        hook("return s", "kv_lens: ag.Scalar = 1.0"),
        6,
        ["field `kv_lens` of Bad", "Rename"],
    ),
    "sink and weight": (
        "    def sink(self, at):\n        return 0.0\n    def weight(self, s, at):\n        return ag.sigmoid(s)\n",
        16,
        ["has both `weight` and `sink`", "no denominator"],
    ),
    "scale is a symbol": (
        "    cap: ag.Scalar = 1.0\n    def scale(self):\n        return self.cap\n",
        16,
        ["`scale` of Bad is the symbol", "query_scale"],
    ),
    "scale is text": ("    scale = 'big'\n", 16, ["`scale` of Bad is 'big'", "finite number"]),
    "rope is a number": ("    rope = 10000.0\n", 16, ["`rope` is 10000.0", "ag.RoPE"]),
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_bad_declaration_fails_at_the_users_line(name, tmp_path):
    body, line, parts = DECLARATIONS[name]
    file = tmp_path / "user.py"
    source = HEADER + body
    source += "\n" * (15 - source.count("\n")) + "Bad()\n"  # made on line 16
    scope: dict[str, Any] = {"__name__": "user"}
    sys.modules["user"] = type(sys)("user")
    sys.modules["user"].__dict__.update(ag=ag)
    try:
        with pytest.raises(ag.VariantError) as caught:
            exec(compile(source, str(file), "exec", dont_inherit=True), scope)
    finally:
        del sys.modules["user"]
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: "), message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


class Causal(ag.Variant):
    def mask(self, at):
        return at.kv <= at.q


class Capped(ag.Variant):
    cap: ag.Scalar
    window: ag.Scalar[int] = 4

    def logits(self, s, at):
        return self.cap * ag.tanh(s / self.cap)

    def mask(self, at):
        return at.q - at.kv < self.window


class Biased(ag.Variant):
    bias: ag.Tensor("heads", "buckets")
    ids: ag.Tensor("requests", "positions", dtype=int)
    far: ag.Tensor("buckets")

    def logits(self, s, at):
        return s + self.bias[at.head, self.ids[at.request, at.kv]] + self.far[0]


class Sigmoid(ag.Variant):
    def weight(self, s, at):
        return ag.sigmoid(s)


class Rope(ag.Variant):
    rope = ag.RoPE(10000.0)


class Sink(ag.Variant):
    def sink(self, at):
        return 0.0


class Depth(ag.Variant):
    depth: ag.Const[int]

    def logits(self, s, at):
        return s * self.depth


INSTANCES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "too many values": (lambda: Capped(1.0, 2, 3), ["Capped() got 3 values", "cap, window"]),
    "unknown value": (lambda: Capped(cup=1.0), ["unknown field `cup`", "cap, window"]),
    "twice": (lambda: Capped(1.0, cap=2.0), ["two values for field `cap`"]),
    "ill-typed": (lambda: Capped("x"), ["Capped.cap is scalar f32 and got 'x'", "number"]),
    "float for an int": (lambda: Capped(window=1.5), ["Capped.window is scalar i32 and got 1.5"]),
    "bool for an int": (lambda: Capped(window=True), ["scalar i32 and got True"]),
    "no tensor": (lambda: Biased(bias=[1.0]), ["Biased.bias is a Tensor field and got list", "torch.Tensor"]),
    "assignment": (lambda: setattr(Capped(1.0), "cap", 2.0), ["`Capped.cap` is assigned", "Capped(cap=...)"]),
    "Const unbound": (lambda: Depth(), ["no value for Const `depth`", "Depth(depth=...)"]),
    "two sinks": (lambda: ag.compose(Sink(), Sink()), ["both have `sink`", "Only one part"]),
    "two weights": (lambda: ag.compose(Sigmoid(), Sigmoid()), ["both have `weight`"]),
    "two ropes": (lambda: ag.compose(Rope(), Rope()), ["both have `rope`"]),
    "weight and sink": (lambda: ag.compose(Sigmoid(), Sink()), ["both `weight` and `sink`"]),
    "one field twice": (lambda: ag.compose(Capped(1.0), Capped(2.0)), ["both have a field `cap`", "Rename"]),
    "& with logits": (lambda: Causal() & Capped(1.0), ["`&` on Capped", "logits", "ag.compose"]),
    "& of classes": (lambda: Causal & Sigmoid, ["`&` combines instances", "Write Causal(...)"]),
    "& with a class": (lambda: Causal() & Sigmoid, ["Sigmoid is a class", "Write Sigmoid(...)"]),
    "| with a class": (lambda: Causal() | Sigmoid, ["`|` combines instances", "Sigmoid(...)"]),
    "~ of a class": (lambda: ~Causal, ["`~` combines instances", "Causal(...)"]),
    "~ with a weight": (lambda: ~Sigmoid(), ["`~` on Sigmoid", "weight", "ag.compose"]),
    "| with rope": (lambda: Rope() | Causal(), ["`|` on Rope", "rope", "ag.compose"]),
    "compose nothing": (lambda: ag.compose(), ["compose() of nothing", "at least one"]),
    "compose a function": (lambda: ag.compose(Causal(), print), ["is no variant", "ag.Variant"]),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_a_bad_instance_or_composition(name):
    make, parts = INSTANCES[name]
    with pytest.raises(ag.VariantError) as caught:
        make()
    message = str(caught.value)
    assert re.match(r".*test_errors\.py:\d+: ", message), message
    assert all(part in message for part in parts), message


# ---------------------------------------------------------------- calls


def qkv(q_heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **options: Any) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(2, 5, q_heads, head_dim, **options)
    return q, *(torch.zeros(2, 7, kv_heads, head_dim, **options) for _ in "kv")


GOOD = {"bias": torch.zeros(4, 3), "ids": torch.zeros(2, 7, dtype=torch.int32), "far": torch.zeros(3)}
Call = Callable[..., Any]

# name: (call of ag.attention or ag.reference, error, what the message must contain)
CALLS: dict[str, tuple[Callable[[Call], Any], type, list[str]]] = {
    "no tensor": (lambda f: f([1.0], *qkv()[1:]), ag.ParameterError, ["q is list", "torch.Tensor"]),
    "three dimensions": (
        lambda f: f(qkv()[0][0], *qkv()[1:]),
        ag.ParameterError,
        ["q has shape (5, 4, 64)", "4 dimensions", "bshd"],
    ),
    "layout": (lambda f: f(*qkv(), layout="sbhd"), ag.ParameterError, ["layout 'sbhd'", '"bshd"', '"bhsd"']),
    "layout no text": (lambda f: f(*qkv(), layout=["bshd"]), ag.ParameterError, ["layout ['bshd']", '"bshd"']),
    "dtypes": (
        lambda f: f(qkv()[0].half(), *qkv()[1:]),
        ag.ParameterError,
        ["torch.float16, torch.float32", "one dtype"],
    ),
    "devices": (lambda f: f(qkv(device="meta")[0], *qkv()[1:]), ag.ParameterError, ["meta, cpu, cpu", "one device"]),
    "meta device": (lambda f: f(*qkv(device="meta")), ag.UnsupportedError, ["meta", "cpu"]),
    "batch": (lambda f: f(qkv()[0][:1], *qkv()[1:]), ag.ParameterError, ["1, 2, 2", "equal"]),
    "kv length": (
        lambda f: f(*qkv()[:2], qkv()[2][:, :3]),
        ag.ParameterError,
        ["(2, 7, 2, 64)", "(2, 3, 2, 64)", "same kv_len"],
    ),
    "head_dim of k": (
        lambda f: f(qkv(head_dim=32)[0], *qkv()[1:]),
        ag.ParameterError,
        ["head_dim of q is 32 and of k 64", "equal"],
    ),
    "heads do not divide": (
        lambda f: f(*qkv(5, 2)),
        ag.ParameterError,
        ["num_heads 5 and num_kv_heads 2", "must divide", "layout"],
    ),
    "more kv heads": (lambda f: f(*qkv(2, 4)), ag.ParameterError, ["num_heads 2 and num_kv_heads 4", "must divide"]),
    "last dimension": (
        lambda f: f(torch.zeros(2, 5, 64, 4).transpose(2, 3), *qkv()[1:]),
        ag.ParameterError,
        ["q has strides", "last dimension must be contiguous", "q.contiguous()"],
    ),
    "no variant": (lambda f: f(*qkv(), variant="causal"), ag.VariantError, ["'causal' is no variant", "ag.Variant"]),
    "unbound tensor": (
        lambda f: f(*qkv(), Biased(), bias=GOOD["bias"], far=GOOD["far"]),
        ag.ParameterError,
        ["Biased needs `ids`", "['requests', 'positions']", "pass ids=..."],
    ),
    "unknown parameter": (
        lambda f: f(*qkv(), Capped(1.0), cup=2.0),
        ag.ParameterError,
        ["Capped has no parameter cup", "cap, window"],
    ),
    "no parameters at all": (
        lambda f: f(*qkv(), Causal(), cap=2.0),
        ag.ParameterError,
        ["Causal has no parameter cap", "none"],
    ),
    "storage": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"bias": torch.zeros(4, 3).double()}),
        ag.ParameterError,
        ["Biased.bias has dtype torch.float64", "torch.bfloat16", "cast it"],
    ),
    "ints as floats": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"ids": torch.zeros(2, 7)}),
        ag.ParameterError,
        ["Biased.ids has dtype torch.float32", "torch.int32"],
    ),
    "tensor is a list": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"far": [0.0]}),
        ag.ParameterError,
        ["Biased.far is list", "torch.Tensor"],
    ),
    "int dtype of q": (
        lambda f: f(*qkv(dtype=torch.int32)),
        ag.UnsupportedError,
        ["dtype torch.int32", "torch.float32, torch.bfloat16 or torch.float16"],
    ),
    "float64": (lambda f: f(*qkv(dtype=torch.float64)), ag.UnsupportedError, ["dtype torch.float64", "cast"]),
    "head_dim 20": (
        lambda f: f(*qkv(head_dim=20)),
        ag.UnsupportedError,
        ["head_dim 20", "multiples of 8 from 8 to 256", "pad"],
    ),
    "head_dim 264": (lambda f: f(*qkv(head_dim=264)), ag.UnsupportedError, ["head_dim 264", "8 to 256"]),
}
# What the oracle takes although no kernel does.
ORACLE_TAKES = {"int dtype of q", "float64", "head_dim 20", "head_dim 264"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("function", [ag.attention, ag.reference], ids=["attention", "reference"])
def test_a_bad_call(function, name, monkeypatch):
    call, error, parts = CALLS[name]
    if function is ag.reference and name in ORACLE_TAKES:
        call(function)
        return
    monkeypatch.setattr(ag.run, "_compile_uncached", lambda *args: pytest.fail("compiled a kernel for a bad call"))
    with pytest.raises(error) as caught:
        call(function)
    message = str(caught.value)
    assert all(part in message for part in parts), message


# The same for checks that may come after the kernel is at hand.
BOUND_CALLS: dict[str, tuple[Callable[[Call], Any], type, list[str]]] = {
    "unbound scalar": (
        lambda f: f(*qkv(), Capped()),
        ag.ParameterError,
        ["Capped needs `cap`", "f32 number", "pass cap=..."],
    ),
    "scalar of another type": (
        lambda f: f(*qkv(), Capped(), cap="2"),
        ag.ParameterError,
        ["Capped.cap is '2'", "number"],
    ),
    "float for an int": (
        lambda f: f(*qkv(), Capped(1.0), window=2.0),
        ag.ParameterError,
        ["Capped.window is 2.0", "an int"],
    ),
    "int of 33 bits": (lambda f: f(*qkv(), Capped(1.0), window=2**31), ag.ParameterError, ["2147483648", "32 bits"]),
    "float past f32": (lambda f: f(*qkv(), Capped(), cap=1e39), ag.ParameterError, ["Capped.cap is 1e+39", "f32"]),
    "tensor of one element": (
        lambda f: f(*qkv(), Capped(), cap=torch.ones(1)),
        ag.ParameterError,
        ["Capped.cap is tensor", "number"],
    ),
    "rank": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"far": torch.zeros(1, 3)}),
        ag.ParameterError,
        ["Biased.far has shape (1, 3)", "1 axes", "buckets"],
    ),
    "heads": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"bias": torch.zeros(3, 3)}),
        ag.ParameterError,
        ["Biased.bias", "'heads' must have 4"],
    ),
    "requests": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"ids": torch.zeros(1, 7, dtype=torch.int32)}),
        ag.ParameterError,
        ["Biased.ids", "'requests' must have 2"],
    ),
    "positions": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"ids": torch.zeros(2, 6, dtype=torch.int32)}),
        ag.ParameterError,
        ["Biased.ids has 6 entries", "positions", "7"],
    ),
    "free axis": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"far": torch.zeros(4)}),
        ag.ParameterError,
        ["axis 'buckets'", "4", "3", "equal"],
    ),
    "tensor's device": (
        lambda f: f(*qkv(), Biased(), **GOOD | {"far": torch.zeros(3, device="meta")}),
        ag.ParameterError,
        ["Biased.far is on meta", "move it"],
    ),
    "kv_lens past the cache": (
        lambda f: f(*qkv(), kv_lens=[7, 8]),
        ag.ParameterError,
        ["kv_lens[1] is 8", "0 to 7", "slots of k and v"],
    ),
    "negative kv_lens": (lambda f: f(*qkv(), kv_lens=[-1, 7]), ag.ParameterError, ["kv_lens[0] is -1", "0 to 7"]),
    "number of kv_lens": (
        lambda f: f(*qkv(), kv_lens=[7]),
        ag.ParameterError,
        ["kv_lens has 1 entries", "one a request, 2"],
    ),
    "float kv_lens": (
        lambda f: f(*qkv(), kv_lens=torch.ones(2)),
        ag.ParameterError,
        ["kv_lens is torch.float32", "int32 or int64"],
    ),
    "kv_lens of one int": (lambda f: f(*qkv(), kv_lens=7), ag.ParameterError, ["kv_lens is 7", "2 ints"]),
    "q_lens past q": (lambda f: f(*qkv(), q_lens=[6, 5]), ag.ParameterError, ["q_lens[0] is 6", "0 to 5", "rows of q"]),
    "q_offset": (lambda f: f(*qkv(), q_offset=[2**30, 0]), ag.ParameterError, ["q_offset[0] is 1073741824", "2**30"]),
    "scale of NaN": (lambda f: f(*qkv(), scale=float("nan")), ag.ParameterError, ["scale is nan", "finite number"]),
    "scale of text": (lambda f: f(*qkv(), scale="1"), ag.ParameterError, ["scale is '1'", "finite number"]),
    "LSE of a weight": (
        lambda f: f(*qkv(), Sigmoid(), return_lse=True),
        ag.UnsupportedError,
        ["return_lse with Sigmoid", "no LSE"],
    ),
}


@pytest.mark.parametrize("name", BOUND_CALLS)
@pytest.mark.parametrize("function", [ag.attention, ag.reference], ids=["attention", "reference"])
def test_a_bad_value(function, name):
    call, error, parts = BOUND_CALLS[name]
    with pytest.raises(error) as caught:
        call(function)
    message = str(caught.value)
    assert all(part in message for part in parts), message


def test_gradients_are_refused_and_only_where_they_would_be_lost():
    q, k, v = qkv()
    for at, name in enumerate("qkv"):
        tensors = [t.clone().requires_grad_() if i == at else t for i, t in enumerate((q, k, v))]
        with pytest.raises(ag.UnsupportedError, match="requires grad.*no backward.*no_grad"):
            ag.attention(*tensors)
        with torch.no_grad():
            ag.attention(*tensors)
    with pytest.raises(ag.UnsupportedError, match="Biased.far requires grad"):
        ag.attention(q, k, v, Biased(), **GOOD | {"far": torch.zeros(3, requires_grad=True)})
    with pytest.raises(ag.UnsupportedError, match="out requires grad"):
        ag.attention(q, k, v, out=torch.empty_like(q, requires_grad=True))


OUTS = {
    "shape": (lambda q, k, v: torch.empty(2, 5, 4, 32), "out is \\(2, 5, 4, 32\\).*required \\(2, 5, 4, 64\\)"),
    "dtype": (lambda q, k, v: torch.empty(2, 5, 4, 64, dtype=torch.bfloat16), "bfloat16.*required.*float32"),
    "type": (lambda q, k, v: [0.0], "out is list"),
    "strides": (lambda q, k, v: torch.empty(2, 4, 5, 64).transpose(1, 2), "required a contiguous"),
    "q itself": (lambda q, k, v: q, "shares memory with q, k or v"),
    "a view of v": (lambda q, k, v: v.flatten()[: q.numel()].view(q.shape), "shares memory"),
}


@pytest.mark.parametrize("name", OUTS)
def test_a_bad_out(name):
    q, k, v = qkv(kv_heads=4)
    make, message = OUTS[name]
    with pytest.raises(ag.ParameterError, match=message):
        ag.attention(q, k, v, out=make(q, k, v))


def test_an_out_of_no_elements_shares_no_memory():
    q, k, v = (t[:0] for t in qkv())
    out = torch.empty(0, 5, 4, 64)
    assert ag.attention(q, k, v, out=out) is out


def test_compile_refuses_what_no_kernel_serves():
    for options, error, message in (
        ({"dtype": torch.int8}, ag.UnsupportedError, "dtype torch.int8"),
        ({"head_dim": 12}, ag.UnsupportedError, "head_dim 12"),
        ({"head_dim_v": 300}, ag.UnsupportedError, "head_dim_v 300"),
        ({"isa": "mmx"}, ag.UnsupportedError, "'mmx' is unknown; choose one of avx512_bf16"),
    ):
        with pytest.raises(error, match=message):
            ag.compile(Causal, **options)
    with pytest.raises(ag.ParameterError, match="Biased.ids has dtype torch.float32: the field is i32"):
        ag.compile(Biased, storage={"ids": torch.float32})


# ---------------------------------------------------------------- compilers and cache, through the public API

PROGRAM = """
import sys, torch, attngen as ag
class V(ag.Variant):
    def logits(self, s, at):
        return s * {constant}
q = torch.zeros(1, 2, 1, 8)
try:
    ag.attention(q, q, q, V())
except ag.AttngenError as error:
    print(type(error).__name__, error)
else:
    print("ran")
"""


def in_process(constant: float, **env: str) -> str:
    """What a fresh process says that compiles a variant of its own."""
    full = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **env}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(constant=constant)], env=full, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_says(message: str, *parts: str) -> None:
    assert all(part in message for part in parts), message


def test_no_compiler_on_the_path(tmp_path):
    message = in_process(1.25, PATH=str(tmp_path), CXX="")
    assert_says(
        message, "BuildError no C++ compiler", "required: a C++17 compiler", f"PATH={tmp_path}", "do: apt install g++"
    )


def test_a_compiler_that_fails_is_quoted_with_source_and_hook(tmp_path):
    refusing = tmp_path / "c++"
    refusing.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo broken 1.0; exit 0;; esac\n'
        'echo "attention.cpp:1:1: error: no such thing" >&2\nexit 1\n'
    )
    refusing.chmod(0o755)
    message = in_process(1.375, CXX=str(refusing))
    assert_says(message, "BuildError the compiler refused", "no such thing", "broken 1.0", "attention.cpp")
    source = re.search(r"source: (\S+attention.cpp)", message)
    assert source and Path(source[1]).is_file()


def test_an_unwritable_cache_folder(tmp_path):
    """A file stands where the folder should be: not even root can write there."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = in_process(1.5, ATTNGEN_CACHE_DIR=str(blocked / "cache"))
    assert_says(message, "CacheError", str(blocked), "required: a folder", "ATTNGEN_CACHE_DIR")


def compiled(constant: float) -> ag.Kernel:
    class V(ag.Variant):
        def logits(self, s, at):
            return s * constant

    return ag.compile(V, head_dim=8)


def test_a_corrupt_cached_library_is_set_aside_and_built_again(monkeypatch):
    path = compiled(1.625).path
    damaged = path.with_name("damaged")
    damaged.write_bytes(path.read_bytes()[:100])
    damaged.replace(path)  # not truncated in place: this process has it mapped, and would die of SIGBUS at its end
    output = in_process(1.625)
    assert output == "ran\n" and path.stat().st_size > 1000


def test_a_cached_library_of_another_format_is_named_and_built_again(monkeypatch):
    kernel = compiled(1.75)
    manifest = kernel.path.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {cache.FORMAT}', '"format": 99'))
    with pytest.raises(ag.CacheError) as caught:
        cache.Cache(cache.cache_root()).lookup(kernel.spec_hash)
    assert_says(str(caught.value), f"required: format {cache.FORMAT}", "found: format 99", "attngen cache clear")
    monkeypatch.setattr(ag.run, "_kernels", {})
    monkeypatch.setattr(cache.default(), "_entries", {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert compiled(1.75).path.is_file()
    assert any(isinstance(w.message, ag.CacheWarning) and "format 99" in str(w.message) for w in seen)


def test_a_library_of_another_launch_abi_is_refused():
    kernel = compiled(1.875)
    entry = kernel.loaded.entry
    other = cache.Entry(entry.key, entry.folder, {**entry.manifest, "abi": "attngen-cpu-0"})
    with pytest.raises(ag.LoadError) as caught:
        ag.load.load_kernel(other)
    assert_says(
        str(caught.value),
        "required: kind cpu, launch ABI",
        "found: kind cpu, launch ABI attngen-cpu-0",
        "attngen cache clear",
    )


# ---------------------------------------------------------------- devices


META = torch.empty(1, 8, 2, 64, device="meta")


def batch_on(device: object) -> ag.BatchAttention:
    return ag.BatchAttention(
        variants.Causal(), num_heads=2, num_kv_heads=2, head_dim=64, max_requests=2, max_q_tokens=8, page_size=16, max_pages=8, device=device
    )


ON_DEVICES = {
    "BatchAttention": batch_on,
    "compile": lambda device: ag.compile(variants.Causal(), device=device),
    "append.compile": lambda device: append.compile(dtype=torch.bfloat16, head_dim=64, device=device),
    "merge.compile": lambda device: merge.compile(dtype=torch.bfloat16, head_dim_v=64, device=device),
    "load_set": lambda device: devices.cuda_index(device),
}


@pytest.mark.parametrize("name", ON_DEVICES)
def test_devices_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ON_DEVICES[name]
    with pytest.raises(ag.ParameterError, match='device \'gpu\': required "cpu", "cuda" or a number'):
        call("gpu")
    with pytest.raises(ag.UnsupportedError, match="device meta: attngen runs on CUDA devices and on the CPU"):
        call("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", 1):
        with pytest.raises(ag.UnsupportedError, match="no CUDA device here"):
            call(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda:1", 1):
        with pytest.raises(ag.UnsupportedError, match="device cuda:1: this machine has 1, cuda:0$"):
            call(device)


def test_tensors_without_values() -> None:
    q = torch.randn(1, 8, 2, 64)
    empty = torch.zeros(1, dtype=torch.int32, device="meta")
    for call, match in (
        (lambda: ag.attention(META, META, META, variants.Causal()), "q, k, v are on meta: required cpu"),
        (lambda: ag.reference(META, META, META, variants.Causal()), "q, k, v are on meta: required cpu"),
        (lambda: ag.attention(q, q, q, variants.Causal(), kv_lens=empty), "kv_lens is on meta, without values"),
        (lambda: batch_on("cpu").plan(None, empty, [0], [1]), "kv_indptr is on meta: required ints on cpu"),
        (lambda: ag.merge_states([META[0]], [META[0, :, :, 0]]), "merge_states on meta"),
    ):  # fmt: skip
        with pytest.raises(ag.AttngenError, match=match):
            call()
