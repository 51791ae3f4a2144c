"""Emission for CUDA: random hooks as device functions. nvcc compiles them where it exists; a host compiler runs them
through the shim of test_ops.py, so that their values are checked without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import attngen as ag
import pytest
import torch
from attngen.abi import layout
from attngen.build import Recipe, compile_kernel
from attngen.emit import CTYPE, Hooks, emit
from attngen.expr import Node, discrete_inputs, text
from attngen.interp import evaluate
from attngen.ops import BOOL, F32, I32
from attngen.fields import Field
from attngen.spec import Trace
from compare import compare
from hypothesis import HealthCheck, given, settings
from test_ops import headers
from toolchain import needs_nvcc
from trees import masks, smooth

FIELDS = {
    "a": Field("scalar", F32),
    "n": Field("scalar", I32),
    "table": Field("tensor", F32, ("heads",)),
    "ids": Field("tensor", I32, ("requests", "positions")),
    "flags": Field("tensor", BOOL, ("heads", 5)),
}
STORAGE = {"table": "bfloat16", "ids": "int64", "flags": "bool"}
LAYOUT = layout(FIELDS, STORAGE)
HEADS, GROUP, Q_LEN, KV_LEN, Q_OFFSET, REQUESTS = 4, 2, 5, 7, -1, 2


def drawn(count: int) -> list[tuple[Node, Node]]:
    """(logits, mask) pairs, the same in every run."""
    found: list[tuple[Node, Node]] = []

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(logits=smooth(4), mask=masks(3))
    def draw(logits: Node, mask: Node) -> None:
        found.append((logits, mask))

    draw()
    return found


def function(i: int, hooks: Hooks) -> str:
    """One spec as device functions, and an entry that computes one element."""

    def members(values: list) -> str:
        return " ".join(f"{v.ctype} {v.name};" for v in values)

    def locals_(values: list, known: tuple[str, ...]) -> str:
        return "".join(f"  const {v.ctype} {v.name} = {v.expr};\n" for v in values if v.name not in known)

    def element(name: str, result: str, first: str, fn) -> str:
        params = "".join(f", {ctype} {param}" for ctype, param, _ in fn.params)
        body = "".join(f"  const {line.ctype} {line.name} = {line.expr};\n" for line in fn.lines)
        head = f"DEVICE {result} {name}{i}(const Params& p, const Call{i}& c, const Tile{i}& t{first}{params})"
        return f"{head} {{\n{body}  return {fn.result};\n}}\n"

    def call(name: str, first: str, fn) -> str:
        return f"{name}{i}(p, c, t{first}{''.join(f', {param}' for _, param, _ in fn.params)})"

    out = f"struct Call{i} {{ {members(hooks.call)} }};\n"
    out += f"struct Tile{i} {{ int request, kv_head, q_len, kv_len, q_offset; {members(hooks.tile)} }};\n"
    results = []
    for name, ctype, first, given_, fn in (
        ("logits", "float", ", float s", ", s", hooks.logits),
        ("mask", "bool", "", "", hooks.mask),
    ):
        if fn is not None:
            out += element(name, ctype, first, fn)
        results.append(call(name, given_, fn) if fn else "s" if name == "logits" else "true")
    return out + (
        f"ENTRY void run{i}(const Params* params, int request, int head, int32_t q, int32_t kv, float s, "
        f"float* logits, bool* keep) {{\n"
        f"  const Params& p = *params;\n  const int q_len = p.q_len, kv_len = p.kv_len, q_offset = {Q_OFFSET};\n"
        f"  const int kv_head = head / {GROUP}, q_token = request * q_len + q - q_offset;\n"
        f"  const int kv_token = request * kv_len + kv;\n"
        f"{'  const float distance = (float)ag_sub(q, kv);' if hooks.distance else ''}\n"
        f"  Call{i} c;\n{''.join(f'  c.{v.name} = {v.expr};' for v in hooks.call)}\n"
        f"  Tile{i} t;\n  t.request = request, t.kv_head = kv_head, t.q_len = q_len;\n"
        f"  t.kv_len = kv_len, t.q_offset = q_offset;\n"
        f"{''.join(f'  t.{v.name} = {v.expr};' for v in hooks.tile)}\n"
        f"{locals_(hooks.row, ('q', 'q_token', 'head', 'kv_head'))}{locals_(hooks.col, ('kv', 'kv_token'))}"
        f"  *logits = {hooks.logit_factor + ' * ' if hooks.logit_factor else ''}{results[0]};\n  *keep = {results[1]};\n}}\n"
    )


def source(specs: list[tuple[Node, Node]], include: str) -> str:
    members = "".join(f"  {f.ctype} {f.name};\n" for f in LAYOUT.fields)
    functions = (
        function(i, emit(Trace(logits=x, mask=m, fields=FIELDS), STORAGE, 64, "cuda")) for i, (x, m) in enumerate(specs)
    )
    return f"{include}\nstruct Request;\nstruct Params {{\n{members}}};\n" + "\n".join(functions)


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_random_hooks_compile_for_cuda(arch, tmp_path: Path):
    include = '#include "math.cuh"\n#define DEVICE __device__ __forceinline__\n#define ENTRY extern "C" __global__'
    files = {"hooks.cu": source(drawn(60), include), "math.cuh": headers("cuda")["math.cuh"]}
    recipe = Recipe("cubin", ("hooks.cu",), (f"-arch={arch}", "-std=c++17"), artifact="hooks.cubin")
    assert compile_kernel(files, recipe, tmp_path).artifact.stat().st_size > 0


def test_random_hooks_compute_what_the_oracle_computes(tmp_path: Path):
    specs = drawn(100)
    include = '#include "shim.h"\n#include "math.cuh"\n#define DEVICE static inline\n#define ENTRY extern "C"'
    files = {"hooks.cpp": source(specs, include), **headers("cuda")}
    recipe = Recipe("cpu", ("hooks.cpp",), ("-O1", "-std=c++17", "-ffp-contract=off"))
    library = ctypes.CDLL(str(compile_kernel(files, recipe, tmp_path).artifact))

    random = torch.Generator().manual_seed(0)
    tensors = {
        "table": torch.randn(HEADS, generator=random).bfloat16(),
        "ids": torch.randint(-3, 4, (REQUESTS, KV_LEN), generator=random),
        "flags": torch.rand(HEADS, 5, generator=random) < 0.5,
    }
    values = {"a": 0.8, "n": 3}
    packed = {
        "num_heads": HEADS,
        "num_kv_heads": HEADS // GROUP,
        "total_heads": HEADS,
        "q_len": Q_LEN,
        "kv_len": KV_LEN,
    }
    packed |= {f"param_{name}": x for name, x in values.items()}
    for name, tensor in tensors.items():
        packed[f"param_{name}"] = tensor.data_ptr()
        packed |= {f"stride{i}_{name}": n for i, n in enumerate(tensor.stride())}
        packed |= {f"size{i}_{name}": n for i, n in enumerate(tensor.shape)}
    params = (ctypes.c_char * LAYOUT.size)()
    LAYOUT.pack_into(params, 0, *(packed.get(f.name, 0) for f in LAYOUT.fields))

    i32 = torch.int32
    s = torch.randn(HEADS, Q_LEN, KV_LEN, generator=random)
    for request in range(REQUESTS):
        at = {
            "q": torch.arange(Q_OFFSET, Q_OFFSET + Q_LEN, dtype=i32).view(1, -1, 1),
            "kv": torch.arange(KV_LEN, dtype=i32).view(1, 1, -1),
            "head": torch.arange(HEADS, dtype=i32).view(-1, 1, 1),
            "request": torch.tensor(request, dtype=i32),
            "kv_len": torch.tensor(KV_LEN, dtype=i32),
            "q_len": torch.tensor(Q_LEN, dtype=i32),
            "s": s,
        }
        for i, (logits, mask) in enumerate(specs):
            exact = discrete_inputs([logits, mask])
            wanted = evaluate(logits, at, values | tensors, exact).double().expand(s.shape)
            wanted_keep = evaluate(mask, at, values | tensors, exact).expand(s.shape)
            found, keep = torch.empty_like(s), torch.empty(s.shape, dtype=torch.bool)
            x, k = ctypes.c_float(), ctypes.c_bool()
            for h, r, j in torch.cartesian_prod(
                torch.arange(HEADS), torch.arange(Q_LEN), torch.arange(KV_LEN)
            ).tolist():
                library[f"run{i}"](
                    params, request, h, r + Q_OFFSET, j, ctypes.c_float(s[h, r, j]), ctypes.byref(x), ctypes.byref(k)
                )
                found[h, r, j], keep[h, r, j] = x.value, k.value
            assert torch.equal(keep, wanted_keep), f"mask {text(mask)}"
            error = ((found.double() - wanted).abs() / (1 + wanted.abs())).max()
            assert error < 2e-5, f"logits {text(logits)} are off by {error}"


def test_types_of_the_emitted_values_are_c_types():
    hooks = emit(Trace(logits=drawn(5)[-1][0], fields=FIELDS), STORAGE, 64, "cuda")
    assert {v.ctype for v in (*hooks.call, *hooks.tile, *hooks.row, *hooks.col)} <= set(CTYPE.values())


def test_the_text_of_shared_and_deep_expressions_is_linear():
    """Written out, the first has 2**60 terms and the second nests 4000 deep."""
    shared, deep = ag.cast(ag.expr.symbol("q"), float) * 0.01, ag.expr.symbol("s")
    for _ in range(60):
        shared = shared + shared * 0.5
    for i in range(2000):
        deep = ag.tanh(deep + i % 5 * 0.25)
    for dialect in ("cpp", "cuda"):
        hooks = emit(Trace(query_scale=shared, logits=deep), {}, 64, dialect)
        assert sum(len(v.expr) for v in hooks.row) < 20_000
        assert sum(len(line.expr) for line in hooks.logits.lines) + len(hooks.logits.result) < 200_000


def test_a_long_shared_row_expression_runs(tmp_path: Path):
    class Shared(ag.Variant):
        gain: ag.Scalar = 0.7

        def query_scale(self, at):
            x = ag.cast(at.q, float) * 0.01 + self.gain
            for _ in range(12):
                x = ag.tanh(x * 0.9 + x * x * 0.1) + 0.2
            return x + self._per_call() * 1e-3

        def _per_call(self):
            y = self.gain
            for _ in range(8):
                y = ag.sigmoid(y + y * y)
            return y

    q = torch.randn(1, 9, 2, 8)
    compare(ag.attention(q, q, q, Shared()), ag.reference(q, q, q, Shared()))
