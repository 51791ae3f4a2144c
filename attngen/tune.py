"""Measuring the candidates of a kernel's configuration. Behind ``attngen tune``.

The choose rooms list candidates and take one by rule. Here each candidate that fits is built and timed, in turns with the others,
through the API that serves; the fastest is kept in the cache (tuned.py), and from then on it is the choice on this machine.
Never required. A candidate whose result is not the rule's, but for rounding, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

import torch

from . import check, run, tuned
from .batch import BatchAttention
from .devices import as_device
from .emit import emit
from .engine import PHASES, choices_of, cuda_problem
from .errors import AttngenError, ParameterError
from .spec import Problem, Variant

GAIN = 0.02  # of the rule's time: less is noise
ROUNDS = 7
_ROUND_S = 0.03  # of a candidate's calls in a round
CPU_PHASE = "attention"


@dataclass(frozen=True)
class Workload:
    """What is timed: a batch of equal requests."""

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int

    def __str__(self) -> str:
        return f"b={self.batch} h={self.num_heads}/{self.num_kv_heads} q={self.q_len} kv={self.kv_len}"


@dataclass(frozen=True)
class Measured:
    """A candidate: its fields, its time, or why it has none."""

    shape: Mapping[str, Any]
    ms: float | None
    left_out: str = ""


@dataclass(frozen=True)
class Result:
    """A row-tile class: its candidates in the order of the list, those of the rule and of the measurement, and the record's name."""

    phase: str
    workload: Workload
    measured: tuple[Measured, ...]
    by_rule: int
    best: int
    name: str

    @property
    def ratio(self) -> float:
        """The best one's time over the rule's."""
        best, rule = self.measured[self.best].ms, self.measured[self.by_rule].ms
        assert best is not None and rule is not None
        return best / rule


def phases_of(device: Any) -> tuple[str, ...]:
    """What can be tuned on a device."""
    return (CPU_PHASE,) if as_device(device).type == "cpu" else PHASES


def workload_of(phase: str, num_heads: int, num_kv_heads: int, batch: int | None = None, kv_len: int | None = None) -> Workload | None:
    """What ``phase`` is timed with, unless it is given; None where a group of heads has more rows than its tiles."""
    group = num_heads // num_kv_heads
    if phase == CPU_PHASE:
        return Workload(batch or 1, kv_len or 1024, kv_len or 1024, num_heads, num_kv_heads)
    if phase == PHASES[-1]:
        return Workload(batch or 4, kv_len or 4096, kv_len or 4096, num_heads, num_kv_heads)
    rows = int(phase.partition(" ")[0])
    q_len = 1 if phase == PHASES[0] else rows // group
    if not q_len or q_len * group > rows or (rows > 16 and q_len * group <= rows // 2):
        return None
    return Workload(batch or 32, q_len, kv_len or 4096, num_heads, num_kv_heads)


def tune(
    variant: Variant, *, dtype: torch.dtype, head_dim: int, head_dim_v: int, page_size: int | None, device: Any,
    workloads: Mapping[str, Workload], progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:  # fmt: skip
    """Time the candidates of each phase in ``workloads`` and keep the fastest, if it gains 2% on the rule's.

    Args:
        page_size: of the KV cache, or None without pages. The CPU's kernel serves both.
        device: "cpu" or a CUDA device that is there, which becomes the current one.
        progress: is told what is about to be done.

    Raises what compiling raises.
    """
    on = as_device(device)
    stored = run.stored_dtypes(variant, None)
    if on.type == "cuda":
        torch.cuda.set_device(on)
        problem = cuda_problem(_arch(on), dtype, head_dim, head_dim_v, tuple(sorted(stored.items())))
    else:
        problem = run.problem_for(dtype, head_dim, head_dim_v, stored)
    for phase, workload in workloads.items():
        with tuned.ignored():
            choice = _choice(variant, problem, page_size, phase)
        if choice is None:
            continue
        shapes = [{f.name: getattr(c, f.name) for f in fields(c) if f.name != "lost"} for c in choice.candidates]
        by_rule = next(i for i, c in enumerate(choice.candidates) if not c.lost)
        measured = _measure(variant, problem, page_size, phase, workload, on, shapes, by_rule, progress)
        rule_ms = measured[by_rule].ms
        assert rule_ms is not None
        best = min((i for i, m in enumerate(measured) if m.ms is not None), key=lambda i: measured[i].ms or 0.0)
        if (measured[best].ms or 0.0) > (1 - GAIN) * rule_ms:
            best = by_rule
        name = _record_name(variant, problem, page_size, phase)
        result = Result(phase, workload, tuple(measured), by_rule, best, name)
        timed = sum(m.ms is not None for m in measured)
        gain = f"{result.ratio:.2f}x the time of the rule's choice" if best != by_rule else "the rule's choice, which no other beats by 2%"
        why = f"measured on {tuned.machine(problem)}, {workload}, {timed} candidates: {gain}"
        tuned.keep(name, {
            "shape": measured[best].shape, "why": why, "variant": variant.name, "phase": phase, "machine": tuned.machine(problem),
            "workload": str(workload), "times_ms": [[m.shape, m.ms, m.left_out] for m in measured],
        })  # fmt: skip
        yield result


def _arch(device: torch.device) -> str:
    from .cuda import device_arch

    return device_arch(device.index or 0).name


def _choice(variant: Variant, problem: Problem, page_size: int | None, phase: str) -> Any:
    """What is chosen now; None where the phase has no kernel."""
    if problem.backend == "cpu":
        return run.specialise(variant, problem)[1]
    hooks = emit(variant.trace, dict(problem.storage), problem.head_dim, dialect="cuda", device_scalars=True)
    return choices_of(variant.trace, problem, hooks, page_size=page_size).get(phase)


def _record_name(variant: Variant, problem: Problem, page_size: int | None, phase: str) -> str:
    from .cuda import compiler_digest

    structure = variant.trace.key(problem.head_dim)
    if problem.backend == "cpu":
        return tuned.identity(structure, problem, phase, "any", run.compiler_digest())
    return tuned.identity(structure, problem, phase, "contiguous" if page_size is None else "pages", compiler_digest())


def _measure(
    variant: Variant, problem: Problem, page_size: int | None, phase: str, workload: Workload, device: torch.device,
    shapes: Sequence[Mapping[str, Any]], by_rule: int, progress: Callable[[str], None],
) -> list[Measured]:  # fmt: skip
    call = _Call(variant, problem, page_size, workload, device)
    found = [Measured(shape, None) for shape in shapes]
    calls: dict[int, Callable[[], torch.Tensor]] = {}
    for i in sorted(range(len(shapes)), key=lambda i: i != by_rule):  # the rule's first: it says what is right
        progress(f"{phase}: building candidate {i + 1} of {len(shapes)}")
        with tuned.trying(phase, shapes[i]):
            if _choice(variant, problem, page_size, phase).by == "rule":
                found[i] = replace(found[i], left_out="does not fit")
                continue
            try:
                calls[i] = call.prepared()
                out = calls[i]()
            except AttngenError as error:
                if i == by_rule:
                    raise
                calls.pop(i, None)
                found[i] = replace(found[i], left_out=str(error).partition("\n")[0])
                continue
        if i == by_rule:
            wanted = out.float()
        elif not torch.allclose(out.float(), wanted, rtol=0.0, atol=call.rounding * float(wanted.abs().max())):
            calls.pop(i)
            found[i] = replace(found[i], left_out="its result is another one")
    times: dict[int, list[float]] = {i: [] for i in calls}
    repeats = max(1, min(200, int(_ROUND_S / max(check.timed(calls[by_rule], device), 1e-6))))
    for turn in range(ROUNDS):
        progress(f"{phase}: timing {len(calls)} candidates, round {turn + 1} of {ROUNDS}")
        for i, run_once in calls.items():
            times[i].append(check.timed(lambda: [run_once() for _ in range(repeats)], device) / repeats)
    return [replace(m, ms=1e3 * median(times[i])) if i in times else m for i, m in enumerate(found)]


class _Call:
    """The batch that is timed, and its tensors."""

    def __init__(self, variant: Variant, problem: Problem, page_size: int | None, workload: Workload, device: torch.device) -> None:
        self.variant, self.problem, self.page_size, self.workload, self.device = variant, problem, page_size, workload, device
        w, dtype = workload, check.DTYPES[problem.q_dtype]
        self.dtype, self.rounding = dtype, 8 * torch.finfo(dtype).eps
        random = torch.Generator().manual_seed(0)
        case = check.Case("tune", w.batch, w.q_len, w.kv_len, w.num_heads, w.num_kv_heads)
        params, _ = check.invent(variant, case)
        stored = {n: getattr(torch, dtype) for n, dtype in problem.storage}
        bound = {n: x for n in stored if isinstance(x := variant.values.get(n), torch.Tensor)} | params
        self.params = {n: x.to(device, stored[n]) if n in stored else x for n, x in bound.items()}
        rows = page_size or w.kv_len
        self.pages = -(-w.kv_len // rows)
        slots = (w.batch * self.pages, rows) if page_size else (w.batch * w.kv_len,)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float32).to(device, dtype)

        self.q = tensor(w.batch * w.q_len, w.num_heads, problem.head_dim)
        self.k, self.v = (tensor(*slots, w.num_kv_heads, d) for d in (problem.head_dim, problem.head_dim_v))

    def prepared(self) -> Callable[[], torch.Tensor]:
        """The call, planned and ready, with the kernels that are chosen now."""
        w, p = self.workload, self.problem
        capacity = dict(page_size=self.page_size, max_pages=w.batch * self.pages) if self.page_size else dict(max_kv_tokens=w.batch * w.kv_len)
        attn = BatchAttention(
            self.variant, num_heads=w.num_heads, num_kv_heads=w.num_kv_heads, head_dim=p.head_dim, head_dim_v=p.head_dim_v, dtype=self.dtype,
            max_requests=w.batch, max_q_tokens=w.batch * w.q_len, max_q_len=w.q_len, device=self.device,
            storage={n: getattr(torch, dtype) for n, dtype in p.storage}, **capacity,
        )  # fmt: skip
        ends = torch.arange(w.batch + 1, dtype=torch.int32)
        mask = variant_mask(self.variant)
        plan = {n: x for n, x in self.params.items() if n in mask}
        rest = {n: x for n, x in self.params.items() if n not in mask}
        if self.page_size:
            indices = torch.arange(w.batch * self.pages, dtype=torch.int32)
            last = torch.full((w.batch,), w.kv_len - (self.pages - 1) * self.page_size, dtype=torch.int32)
            lengths: tuple[torch.Tensor, ...] = (ends * self.pages, indices, last)
        else:
            lengths = (ends * w.kv_len,)
        attn.plan((ends * w.q_len).to(self.device), *(x.to(self.device) for x in lengths), **plan)
        out = torch.empty(w.batch * w.q_len, w.num_heads, p.head_dim_v, dtype=self.dtype, device=self.device)
        return lambda: attn.run(self.q, (self.k, self.v), out=out, **rest)


def variant_mask(variant: Variant) -> frozenset[str]:
    """Names of the parameters that the mask reads."""
    return frozenset(variant.trace.mask.params) if variant.trace.mask is not None else frozenset()


def chosen_phases(device: Any, wanted: Sequence[str]) -> tuple[str, ...]:
    """The phases to tune: those named, or all of the device's. Raises ParameterError for an unknown one."""
    known = phases_of(device)
    for name in wanted:
        if name not in known:
            raise ParameterError(f"phase {name!r}: required {', '.join(map(repr, known))} on {device}")
    return tuple(wanted) or known
