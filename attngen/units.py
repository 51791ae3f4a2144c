"""What a set means: everything that it serves, each with the kernels that serve it, and how to build them.

    units = units_of(VariantSet(path))          one a call or batch that is looked up at once
    make_lock(variant_set, units, entries)      what later starts go by
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import append, cuda, masks, merge, pins, run, tuned
from .isa import host_isa
from .choose_cuda import DecodeConfig, arch_named
from .engine import SHARE_SIZES, cuda_problem, kernels_of, share_kernel
from .entry import FORMAT, Entry
from .errors import ParameterError, UnsupportedError, VariantError
from .find import load_variant
from .sets import DTYPES, LOCK_FORMAT, PAGE_SIZES, STORED, VariantSet, bind_of, gpu, is_cpu, name_of, sealed
from .spec import Variant, as_variant


@dataclass(frozen=True)
class Job:
    """One kernel to build. ``build`` gives its entry, whether it was there, and the seconds."""

    key: str
    title: str
    name: str  # the template's: decode, attention_sm80, plan, share, attention, append, mask_rows, merge
    arch: str
    build: Callable[[], tuple[Entry, bool, float]] = field(compare=False, repr=False)
    config: Any = field(default=None, compare=False, repr=False)
    consts: str = ""  # the values of its variant's Consts, for people


@dataclass(frozen=True)
class Unit:
    """One thing that is served: what a call or a batch looks up at once."""

    identity: str
    facts: Mapping[str, Any]  # backend, variant, arch, dtype, head_dim, ...: for people, warm-up and choosing what fits
    jobs: tuple[Job, ...]
    roles: tuple[Mapping[str, Any], ...]  # what is pinned, in order: a key each, or the configuration of what is not built


def units_of(variant_set: VariantSet) -> list[Unit]:
    """Everything that the set serves, once each. Traces the variants; renders and compiles nothing."""
    found: dict[str, Unit] = {}
    for i, table in enumerate(variant_set.tables):
        try:
            for unit in _units_of_table(table, variant_set.path.parent):
                found.setdefault(unit.identity, unit)
        except (UnsupportedError, VariantError, ParameterError) as error:
            raise type(error)(f"{variant_set.path}, [[kernels]] number {i + 1}: {error}") from error
    return list(found.values())


def _units_of_table(table: Mapping[str, Any], folder: Path) -> Iterator[Unit]:
    for arch in table["archs"]:
        on_cpu = is_cpu(arch)
        dtypes = table["dtypes"] or (["float32"] if on_cpu else ["bfloat16"])
        for given in table["variants"]:
            variant = _named_variant(name_of(given), bind_of(given), folder)
            stored = run.stored_dtypes(variant, _storage(variant, table["storage"]))
            for dtype in dtypes:
                for d, dv in table["head_dims"]:
                    facts = {"variant": name_of(given), "bind": bind_of(given), "dtype": dtype, "head_dim": d,
                             "head_dim_v": dv, "storage": dict(sorted(stored.items()))}  # fmt: skip
                    if not set(table["phases"]) & {"prefill", "decode"}:
                        continue
                    if on_cpu:
                        yield _cpu_unit(variant, DTYPES[dtype], d, dv, stored, arch, facts)
                    else:
                        yield from _cuda_units(variant, DTYPES[dtype], d, dv, stored, arch, facts, table)
        if not on_cpu:
            yield from _plain_units(arch, dtypes, table, folder)


def _plain_units(arch: str, dtypes: Sequence[str], table: Mapping[str, Any], folder: Path) -> Iterator[Unit]:
    """append_kv for each rope of the variants, or none; merge_states to the dtype and from raw states; custom_mask; what finds shared
    prefixes."""
    target = arch_named(gpu(arch)).name
    if "mask" in table["phases"]:
        yield _plain_unit("mask_rows", masks._specialise(target), {"backend": "cuda", "arch": target})
    if "paged-shared" in table["layouts"]:
        for size in SHARE_SIZES:
            yield _plain_unit("share", share_kernel(target, size), {"backend": "cuda", "arch": target})
    for dtype in dtypes:
        for d, dv in table["head_dims"]:
            facts = {"backend": "cuda", "arch": target, "dtype": dtype, "head_dim": d, "head_dim_v": dv}
            if "append" in table["phases"]:
                for rope in (None, *(_rope(given, folder) for given in table["variants"])):
                    config = append.config_of(target, DTYPES[dtype], d, dv, rope)
                    more = {"rotary_dim": config.rotary_dim, "interleaved": config.interleaved}
                    yield _plain_unit("append", append.specialise(config), facts | more)
            if "merge" in table["phases"]:
                for given, out in ((dtype, dtype), ("float32", dtype)):
                    merging = merge.config_of(target, DTYPES[given], DTYPES[out], dv)
                    yield _plain_unit("merge", merge.specialise(merging), facts | {"dtype": given, "out_dtype": out})


def _rope(given: Any, folder: Path) -> Any:
    rope = _named_variant(name_of(given), bind_of(given), folder).trace.rope
    return rope.rope if rope and rope.rope.keys == "cached" else None


def _named_variant(name: str, bind: Mapping[str, Any], folder: Path) -> Variant:
    if name.partition(":")[0].endswith(".py"):
        name = str(folder / name)
    return as_variant(load_variant(name, [f"{n}={json.dumps(v)}" for n, v in bind.items()], in_set=True))


def variant_of_unit(unit: Mapping[str, Any], folder: Path) -> Variant:
    """The variant that a lock file's unit names; its file lies relative to ``folder``."""
    return _named_variant(unit["variant"], unit.get("bind", {}), folder)


def _cpu_unit(
    variant: Variant, dtype: torch.dtype, d: int, dv: int, stored: Mapping[str, str], arch: str, facts: dict[str, Any]
) -> Unit:
    isa = host_isa() if arch == "cpu" else arch
    problem = run.problem_for(dtype, d, dv, stored, isa)
    with tuned.ignored():  # a set is the same wherever it is built
        _, choice, *_, key = run.specialise(variant, problem)

    def build() -> tuple[Entry, bool, float]:
        with tuned.ignored():
            *_, entry, hit, seconds = run.build_cpu(variant, problem)
        return entry, hit, seconds

    job = Job(key, variant.name, "attention", isa, build, choice.config, _consts(variant, facts["bind"]))
    identity = pins.cpu_identity(variant.trace.key(d), problem)
    return Unit(identity, {"backend": "cpu", "arch": isa, **facts}, (job,), ({"key": key},))


def _cuda_units(
    variant: Variant, dtype: torch.dtype, d: int, dv: int, stored: Mapping[str, str], arch: str, facts: dict[str, Any],
    table: Mapping[str, Any],
) -> Iterator[Unit]:  # fmt: skip
    target = arch_named(gpu(arch)).name
    problem = cuda_problem(target, dtype, d, dv, tuple(sorted(stored.items())))
    invariant, phases = table["batch_invariant"], table["phases"]
    for layout in table["layouts"]:
        shared = layout == "paged-shared"
        for most_rows in (16, 64) if invariant else (0,):
            with tuned.ignored():
                kernels = kernels_of(
                    variant, problem, page_size=PAGE_SIZES[layout], batch_invariant=invariant, most_rows=most_rows, shared=int(shared)
                )
            decodes = [isinstance(special.config, DecodeConfig) for special in kernels.classes]
            # A batch that prefills decodes too, with the smallest class. A decode-only object never needs the others.
            chosen = [s for s, decode in zip(kernels.classes, decodes) if decode or "prefill" in phases]
            if not chosen:
                continue
            jobs = tuple(
                Job(s.key, s.title, s.name, target, lambda s=s: cuda.build(s), s.config, _consts(variant, facts["bind"]))
                for s in (*chosen, *([kernels.nodes] if kernels.nodes else []), kernels.plan)
            )  # fmt: skip
            identity = pins.cuda_identity(variant.trace.key(d), problem, PAGE_SIZES[layout], invariant, most_rows <= 16, shared)
            more = {"layout": layout, "batch_invariant": invariant}
            roles = [
                {"key": s.key} if s in chosen else {"name": s.name, "variant": s.title, "choice": pins.config_record(s.config)}
                for s in kernels.classes
            ]  # fmt: skip
            if kernels.nodes:
                roles.append({"key": kernels.nodes.key})
            yield Unit(identity, {"backend": "cuda", "arch": target, **facts, **more}, jobs, (*roles, {"key": kernels.plan.key}))


def _plain_unit(name: str, special: cuda.Specialised, facts: Mapping[str, Any]) -> Unit:
    job = Job(special.key, special.title, name, special.config.arch, lambda: cuda.build(special), special.config)
    identity = pins.plain_identity(name, special.config)
    return Unit(identity, {**facts, "variant": special.title, "config": str(special.config)}, (job,), ({"key": special.key},))


def _consts(variant: Variant, bind: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in bind.items() if name not in variant.trace.fields)


def _storage(variant: Variant, given: Mapping[str, str]) -> dict[str, torch.dtype]:
    return {name: STORED[dtype] for name, dtype in given.items() if name in variant.trace.fields}


def make_lock(found: VariantSet, units: Sequence[Unit], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The lock file of a set whose kernels are built: ``entries`` by key."""
    from . import __version__

    kernels: dict[str, Any] = {}
    sources: dict[str, Any] = {}
    for unit in units:
        for job in unit.jobs:
            m = entries[job.key].manifest
            inputs = dict(m.get("inputs", {}))
            sources[unit.facts["backend"]] = inputs.pop("sources", {})  # the same for all
            kernels[job.key] = {"name": job.name, "variant": m.get("variant", job.title), "arch": job.arch, "abi": m["abi"],
                                "inputs": inputs}  # fmt: skip
    return sealed({
        "format": LOCK_FORMAT, "name": found.name, "attngen": __version__, "entries": FORMAT, "set_sha256": found.digest,
        "files": found.files(), "sources": sources, "kernels": dict(sorted(kernels.items())),
        "units": [{"identity": u.identity, **u.facts, "roles": list(u.roles)} for u in units],
    })  # fmt: skip
