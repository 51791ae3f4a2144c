"""Choice of a kernel's configuration: listed candidates, listed rules, one printable record."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from attngen.errors import UnsupportedError

if TYPE_CHECKING:
    from attngen.spec import Problem

CPU_ISAS = ("avx512_bf16", "avx512", "avx2", "generic")  # best first
_ISA_NEEDS = {  # as /proc/cpuinfo names them
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "avx2", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "avx2"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set(),
}
_AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
_AVX512_FLAGS = [*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_ISA_FLAGS = {
    "avx512_bf16": [*_AVX512_FLAGS, "-mavx512bf16"],
    "avx512": _AVX512_FLAGS,
    "avx2": _AVX2_FLAGS,
    "generic": [],
}
# No -ffast-math: masks rest on infinities, and user expressions are neither reassociated nor contracted.
_COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off",
                 "-fno-math-errno", "-fno-trapping-math"]
_LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "generic": 4}


@functools.cache
def host_isa() -> str:
    """The best instruction set in CPU_ISAS that this host runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "generic"
    found = next((set(line.split(":", 1)[1].split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    return next(isa for isa in CPU_ISAS if _ISA_NEEDS[isa] <= found)


def cpu_flags(isa: str) -> list[str]:
    """Compiler flags of a CPU kernel for `isa`; the same on every host, so that artifacts do not depend on the builder."""
    if isa not in _ISA_FLAGS:
        raise UnsupportedError(f"CPU instruction set {isa!r} is unknown; choose one of {', '.join(CPU_ISAS)}")
    return [*_COMMON_FLAGS, *_ISA_FLAGS[isa]]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Candidate:
    """A register block and tile that was considered; `lost` says why it was not taken, and is empty for the winner."""

    mr: int
    nr: int
    block_m: int
    block_n: int
    lost: str


@dataclass(frozen=True)
class Choice:
    """The chosen configuration and every candidate, best first."""

    config: KernelConfig
    candidates: tuple[Candidate, ...]


def choose_cpu(problem: Problem, isa: str, hooks: object = None) -> Choice:
    """The configuration of the CPU kernel for `problem` on `isa`, one of CPU_ISAS."""
    cpu_flags(isa)
    lanes = _LANES[isa]
    pairs = isa == "avx512_bf16" and problem.q_dtype == problem.kv_dtype == "bfloat16"
    mr, vectors = {16: (8, 2), 8: (4, 3), 4: (4, 2)}[lanes]
    nr = vectors * lanes
    config = KernelConfig(
        isa=isa, compute="bfloat16" if pairs else "float32", lanes=lanes, block_m=128 // nr * nr, block_n=128 if pairs else 64,
        mr=mr, nr=nr, few_rows=8, few_stage_k=problem.head_dim % lanes != 0, few_stage_v=problem.head_dim_v % lanes != 0,
        split_keys=256, items_per_thread=2,
    )  # fmt: skip
    return Choice(config, (Candidate(mr, nr, config.block_m, config.block_n, ""),))
