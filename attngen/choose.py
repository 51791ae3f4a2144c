"""Choice of a kernel's configuration: listed candidates, listed rules, one printable record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UnsupportedError
from .isa import CPU_ISAS
from .records import record

if TYPE_CHECKING:
    from .spec import Problem

_AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]  # generic tuning would not gather tensor parameters
_AVX512_FLAGS = [
    "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mtune=skylake-avx512",
    "-mprefer-vector-width=512",
]  # fmt: skip
_ISA_FLAGS = {
    "avx512_bf16": [*_AVX512_FLAGS, "-mavx512bf16"],
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
    "generic": [],
}
# No -ffast-math: masks rest on infinities, and user expressions are neither reassociated nor contracted.
_COMMON_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
]  # fmt: skip
_LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "generic": 4}


def cpu_flags(isa: str) -> list[str]:
    """Compiler flags of a CPU kernel for `isa`, the same on every host: an artifact does not depend on its builder."""
    if isa not in _ISA_FLAGS:
        raise UnsupportedError(f"CPU instruction set {isa!r} is unknown; choose one of {', '.join(CPU_ISAS)}")
    return [*_COMMON_FLAGS, *_ISA_FLAGS[isa]]


@record
class KernelConfig:
    """What a CPU kernel is specialised to, beside its hooks and its problem."""

    isa: str  # one of CPU_ISAS
    compute: str  # type of the products: "float32", or "bfloat16" with float32 sums
    lanes: int  # float32 values in a vector
    block_m: int  # query rows that share a staged tile of keys and values
    block_n: int  # keys in a tile
    mr: int  # keys or head dims in a microkernel's register block
    nr: int  # query rows in a strip: the other side of the register block
    few_rows: int  # items of at most this many rows put head_dim in the lanes
    few_stage_k: bool  # few-row path: keys pass through a padded float32 tile, else they are read in place
    few_stage_v: bool  # the same for values
    split_keys: int  # shortest key range worth an item of its own
    items_per_thread: int  # key ranges are split until each thread has this many items

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


@record
class Candidate:
    """A register block and tile that was considered; `lost` says why it was not taken, and is empty for the winner."""

    mr: int
    vectors: int  # nr is vectors * lanes
    block_m: int
    block_n: int
    lost: str = ""


@record
class Choice:
    """The chosen configuration, every candidate that was considered for it, in the order of the list, and what chose: "rule", or
    what was measured."""

    config: KernelConfig
    candidates: tuple[Candidate, ...]
    by: str = "rule"


@record
class Preference:
    """A candidate that was measured to be the fastest: its fields, and a line that says so."""

    shape: Mapping[str, Any]
    why: str


C = TypeVar("C", bound=Any)


def settle(candidates: Sequence[C], possible: Sequence[C], won: C, prefer: Preference | None) -> tuple[tuple[C, ...], C, str]:
    """Candidates, winner and what chose it: the rule's ``won``, unless one of ``possible`` is preferred."""
    named = prefer and next((c for c in possible if all(getattr(c, n, None) == v for n, v in prefer.shape.items())), None)
    if named is None or prefer is None:
        return tuple(candidates), won, "rule"
    taken = replace(named, lost="")
    others = {id(named): taken} if named is won else {id(named): taken, id(won): replace(won, lost="the rule's choice; another one was measured")}
    return tuple(others.get(id(c), c) for c in candidates), taken, prefer.why


# (lanes, compute): mr, vectors, block_m, block_n and why it lost, best first. A ratio is its time over the first's:
# causal, one thread, CPU time on an EPYC of family 26 (Zen 5), least and greatest over the head_dims measured (8, 64,
# 128, 256 with AVX-512; 64, 128 else). The first against itself differed by up to 0.02, so less than that is a tie.
_CANDIDATES: dict[tuple[int, str], tuple[tuple[int, int, int, int, str], ...]] = {
    (16, "float32"): (
        (8, 2, 128, 64, ""),
        (8, 2, 256, 64, "0.95-0.99x, but half as many items to share among threads"),
        (8, 2, 128, 128, "0.98-1.01x: a tie, with larger scratch"),
        (8, 2, 128, 32, "0.97-1.01x: a tie at head_dim 64 and 128"),
        (8, 2, 64, 64, "1.01-1.05x"),
        (8, 3, 144, 64, "1.00-1.05x"),
        (4, 4, 128, 64, "1.00-1.04x"),
    ),
    (16, "bfloat16"): (
        (8, 2, 128, 128, ""),
        (8, 2, 256, 128, "0.98-1.00x, but half as many items to share among threads"),
        (8, 2, 128, 64, "0.99-1.02x: a tie except at head_dim 128"),
        (8, 2, 64, 128, "1.04-1.06x"),
        (8, 3, 144, 128, "1.01-1.08x"),
        (4, 4, 128, 128, "1.00-1.05x"),
    ),
    (8, "float32"): (
        (4, 3, 120, 64, ""),
        (4, 3, 240, 64, "0.99-1.00x: a tie, with half as many items"),
        (4, 2, 128, 64, "1.06-1.07x"),
        (8, 1, 128, 64, "1.10x"),
    ),
    (4, "float32"): (
        (2, 4, 128, 64, ""),
        (2, 5, 120, 64, "1.05-1.08x"),
        (4, 2, 128, 64, "1.09-1.10x"),
        (8, 1, 128, 64, "1.23-1.24x"),
        (4, 3, 120, 64, "1.34-1.39x"),
    ),
}  # fmt: skip
# Items of up to so many rows take the path with head_dim in the lanes; measured at 1024 keys, head_dim 64 and 128.
_FEW_ROWS = {(16, "float32"): 16, (16, "bfloat16"): 12, (8, "float32"): 16, (4, "float32"): 12}
_SCRATCH_LIMIT = 1 << 20  # bytes of a thread's tiles: they should stay in its level 2 cache


def choose_cpu(problem: Problem, isa: str, hooks: object | None = None, prefer: Preference | None = None) -> Choice:
    """The configuration of the CPU kernel for `problem` on `isa`, one of CPU_ISAS.

    Rules: bfloat16 products where the ISA has them and both operands are bfloat16; then the first candidate whose tiles
    fit the level 2 cache, or the preferred one if its tiles do. `hooks` do not matter to a CPU kernel's tiles. Raises UnsupportedError for an unknown ISA or
    a head_dim that is not a multiple of 8 from 8 to 256.
    """
    cpu_flags(isa)
    for name, size in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if size % 8 or not 8 <= size <= 256:
            raise UnsupportedError(f"{name} must be a multiple of 8 from 8 to 256 on the CPU; found {size}; pad it")
    lanes = _LANES[isa]
    pairs = isa == "avx512_bf16" and problem.q_dtype == problem.kv_dtype == "bfloat16"
    compute = "bfloat16" if pairs else "float32"
    listed = [Candidate(*row) for row in _CANDIDATES[lanes, compute]]
    sizes = [_scratch_bytes(c, lanes, problem, 2 if pairs else 4) for c in listed]
    winner = next((i for i, size in enumerate(sizes) if size <= _SCRATCH_LIMIT), 0)
    candidates = tuple(
        replace(c, lost=f"tiles take {size >> 10} KiB of cache" if i < winner else "" if i == winner else c.lost)
        for i, (c, size) in enumerate(zip(listed, sizes))
    )
    fitting = [c for c, size in zip(candidates, sizes) if size <= _SCRATCH_LIMIT]
    candidates, best, by = settle(candidates, fitting, candidates[winner], prefer)
    config = KernelConfig(
        isa=isa, compute=compute, lanes=lanes, block_m=best.block_m, block_n=best.block_n, mr=best.mr,
        nr=best.vectors * lanes, few_rows=_FEW_ROWS[lanes, compute], few_stage_k=problem.head_dim % lanes != 0,
        few_stage_v=problem.head_dim_v % lanes != 0, split_keys=256, items_per_thread=2,
    )  # fmt: skip
    return Choice(config, candidates, by)


def _scratch_bytes(c: Candidate, lanes: int, problem: Problem, word: int) -> int:
    """What a thread's tiles occupy: Q^T and O^T of its rows, K, V, S^T."""
    rows = c.block_m * (problem.head_dim * word + problem.head_dim_v * 4)
    keys = c.block_n * ((problem.head_dim + problem.head_dim_v) * word + c.vectors * lanes * 4)
    return rows + keys
