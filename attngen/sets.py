"""Variant sets: a TOML file names what is served, its lock file the kernels that serve it.

    # llama.toml                                      every combination of a table's lists is built; tables add up
    [[kernels]]
    variants = ["Causal", "mine.py:Mine"]             library names, files, or {name = "mine.py:Mine", bind = {chunk = 64}}
    dtypes = ["bfloat16"]                             default bfloat16; on the CPU float32
    head_dims = [64, 128, "192x128"]                  or head_dim x head_dim_v
    layouts = ["paged", "contiguous"]                 of keys and values; default both (the CPU's serve either)
    phases = ["prefill", "decode", "append", "merge"] default prefill and decode; append needs no variant but its RoPE
    archs = ["9.0a", "8.0", "cpu"]                    GPUs by compute capability, CPUs as "cpu" or an instruction set
    batch_invariant = false
    storage = {slopes = "float32"}                    stored dtypes of tensor fields

`llama.lock`, beside it, is JSON without times: for each thing served its identity (pins.py) and the keys of its kernels.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import append, cuda, merge, pins, run
from .choose import CPU_ISAS, host_isa
from .choose_cuda import DecodeConfig, arch_named
from .engine import cuda_problem, kernels_of
from .entry import FORMAT, Entry
from .errors import ParameterError, UnsupportedError, VariantError
from .find import load_variant
from .pack import check_name
from .spec import Variant, as_variant

LOCK_FORMAT = "attngen-lock-1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in run.DTYPE_NAMES}
_LAYOUTS = ("paged", "contiguous")
_PHASES = ("prefill", "decode", "append", "merge")
_KEYS = ("variants", "dtypes", "head_dims", "layouts", "phases", "archs", "batch_invariant", "storage")


@dataclass(frozen=True)
class Job:
    """One kernel to build. ``build`` gives its entry, whether it was there, and the seconds."""

    key: str
    title: str
    name: str  # the template's: decode, attention_sm80, plan, attention, append, merge
    arch: str
    build: Callable[[], tuple[Entry, bool, float]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Unit:
    """One thing that is served: what a call or a batch looks up at once."""

    identity: str
    facts: Mapping[str, Any]  # backend, variant, arch, dtype, head_dim, ...: for people, warm-up and choosing what fits
    jobs: tuple[Job, ...]
    roles: tuple[Mapping[str, Any], ...]  # what is pinned, in order: a key each, or the configuration of what is not built


class VariantSet:
    """A set as its TOML file says. ``arch`` replaces the archs of every table.

    Raises ParameterError with the file, the table and the key that is wrong.
    """

    def __init__(self, path: Path, arch: Sequence[str] = ()) -> None:
        self.path, self.name = path, path.stem
        check_name(self.name)
        self.tables = _read(path)
        for table in self.tables:
            if arch:
                table["archs"] = list(arch)
        text = json.dumps([LOCK_FORMAT, _read(path)], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    @property
    def lock_path(self) -> Path:
        return lock_path(self.path)

    def files(self) -> dict[str, str]:
        """The user's files that the set names, relative to it, with their sha256."""
        return {name: hashlib.sha256((self.path.parent / name).read_bytes()).hexdigest() for name in sorted(self._files())}

    def _files(self) -> Iterator[str]:
        for table in self.tables:
            for given in table["variants"]:
                file = _name_of(given).partition(":")[0]
                if file.endswith(".py"):
                    yield file

    def units(self) -> list[Unit]:
        """Everything that the set serves, once each. Traces the variants; renders and compiles nothing."""
        found: dict[str, Unit] = {}
        for i, table in enumerate(self.tables):
            try:
                for unit in self._units_of(table):
                    found.setdefault(unit.identity, unit)
            except (UnsupportedError, VariantError, ParameterError) as error:
                raise type(error)(f"{self.path}, [[kernels]] number {i + 1}: {error}") from error
        return list(found.values())

    def _units_of(self, table: Mapping[str, Any]) -> Iterator[Unit]:
        for arch in table["archs"]:
            on_cpu = _is_cpu(arch)
            dtypes = table["dtypes"] or (["float32"] if on_cpu else ["bfloat16"])
            for given in table["variants"]:
                variant = self._variant(given)
                stored = run.stored_dtypes(variant, _storage(variant, table["storage"]))
                for dtype in dtypes:
                    for d, dv in table["head_dims"]:
                        facts = {"variant": _name_of(given), "bind": _bind_of(given), "dtype": dtype, "head_dim": d,
                                 "head_dim_v": dv, "storage": dict(sorted(stored.items()))}  # fmt: skip
                        if not set(table["phases"]) & {"prefill", "decode"}:
                            continue
                        if on_cpu:
                            yield _cpu_unit(variant, DTYPES[dtype], d, dv, stored, arch, facts)
                        else:
                            yield from _cuda_units(variant, DTYPES[dtype], d, dv, stored, arch, facts, table)
            if not on_cpu:
                yield from self._plain_units(arch, dtypes, table)

    def _plain_units(self, arch: str, dtypes: Sequence[str], table: Mapping[str, Any]) -> Iterator[Unit]:
        """append_kv for each rope of the variants, or none; merge_states to the dtype and from raw states."""
        gpu = arch_named(_gpu(arch)).name
        for dtype in dtypes:
            for d, dv in table["head_dims"]:
                facts = {"backend": "cuda", "arch": gpu, "dtype": dtype, "head_dim": d, "head_dim_v": dv}
                if "append" in table["phases"]:
                    for rope in (None, *map(self._rope, table["variants"])):
                        config = append._config(gpu, DTYPES[dtype], d, dv, rope)
                        more = {"rotary_dim": config.rotary_dim, "interleaved": config.interleaved}
                        yield _plain_unit("append", append._specialise(config), facts | more)
                if "merge" in table["phases"]:
                    for given, out in ((dtype, dtype), ("float32", dtype)):
                        merging = merge._config(gpu, DTYPES[given], DTYPES[out], dv)
                        yield _plain_unit("merge", merge._specialise(merging), facts | {"dtype": given, "out_dtype": out})

    def _variant(self, given: Any) -> Variant:
        return _named_variant(_name_of(given), _bind_of(given), self.path.parent)

    def _rope(self, given: Any) -> Any:
        rope = self._variant(given).trace.rope
        return rope.rope if rope and rope.rope.keys == "cached" else None


def _named_variant(name: str, bind: Mapping[str, Any], folder: Path) -> Variant:
    if name.partition(":")[0].endswith(".py"):
        name = str(folder / name)
    return as_variant(load_variant(name, [f"{n}={json.dumps(v)}" for n, v in bind.items()]))


def variant_of_unit(unit: Mapping[str, Any], folder: Path) -> Variant:
    """The variant that a lock file's unit names; its file lies relative to ``folder``."""
    return _named_variant(unit["variant"], unit.get("bind", {}), folder)


def _cpu_unit(
    variant: Variant, dtype: torch.dtype, d: int, dv: int, stored: Mapping[str, str], arch: str, facts: dict[str, Any]
) -> Unit:
    isa = host_isa() if arch == "cpu" else arch
    problem = run.problem_for(dtype, d, dv, stored, isa)
    key = run.specialise(variant, problem)[-1]

    def build() -> tuple[Entry, bool, float]:
        *_, entry, hit, seconds = run.build_cpu(variant, problem)
        return entry, hit, seconds

    job = Job(key, variant.name, "attention", isa, build)
    identity = pins.cpu_identity(variant.trace.key(d), problem)
    return Unit(identity, {"backend": "cpu", "arch": isa, **facts}, (job,), ({"key": key},))


def _cuda_units(
    variant: Variant, dtype: torch.dtype, d: int, dv: int, stored: Mapping[str, str], arch: str, facts: dict[str, Any],
    table: Mapping[str, Any],
) -> Iterator[Unit]:  # fmt: skip
    gpu = arch_named(_gpu(arch)).name
    problem = cuda_problem(gpu, dtype, d, dv, tuple(sorted(stored.items())))
    invariant, phases = table["batch_invariant"], table["phases"]
    for layout in table["layouts"]:
        for most_rows in (16, 64) if invariant else (0,):
            kernels = kernels_of(
                variant, problem, paged=layout == "paged", batch_invariant=invariant, most_rows=most_rows
            )
            decodes = [isinstance(special.config, DecodeConfig) for special in kernels.classes]
            # A batch that prefills decodes too, with the smallest class. A decode-only object never needs the others.
            chosen = [s for s, decode in zip(kernels.classes, decodes) if decode or "prefill" in phases]
            if not chosen:
                continue
            jobs = tuple(
                Job(s.key, s.title, s.name, gpu, lambda s=s: cuda.build(s)) for s in (*chosen, kernels.plan)
            )  # fmt: skip
            identity = pins.cuda_identity(variant.trace.key(d), problem, layout == "paged", invariant, most_rows <= 16)
            more = {"layout": layout, "batch_invariant": invariant}
            roles = [
                {"key": s.key} if s in chosen else {"name": s.name, "variant": s.title, "choice": pins.config_record(s.config)}
                for s in kernels.classes
            ]  # fmt: skip
            yield Unit(identity, {"backend": "cuda", "arch": gpu, **facts, **more}, jobs, (*roles, {"key": kernels.plan.key}))


def _plain_unit(name: str, special: cuda.Specialised, facts: Mapping[str, Any]) -> Unit:
    job = Job(special.key, special.title, name, special.config.arch, lambda: cuda.build(special))
    identity = pins.plain_identity(name, special.config)
    return Unit(identity, {**facts, "variant": special.title, "config": str(special.config)}, (job,), ({"key": special.key},))


# ---- lock files ------------------------------------------------------------------------------------------------------


def lock_path(path: Path) -> Path:
    """The lock file of a set's TOML file."""
    return path.with_suffix(".lock")


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
    return {
        "format": LOCK_FORMAT, "name": found.name, "attngen": __version__, "entries": FORMAT, "set_sha256": found.digest,
        "files": found.files(), "sources": sources, "kernels": dict(sorted(kernels.items())),
        "units": [{"identity": u.identity, **u.facts, "roles": list(u.roles)} for u in units],
    }  # fmt: skip


def read_lock(path: Path) -> dict[str, Any]:
    """A lock file. Raises ParameterError where it is none."""
    try:
        lock = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ParameterError(f"the lock file {path} cannot be read: {error}\n  do: write it with `attngen precompile`") from None
    return check_lock(lock, str(path))


def check_lock(lock: Any, where: str) -> dict[str, Any]:
    """``lock``, if it has the form of a lock file. Raises ParameterError."""
    try:
        if lock["format"] != LOCK_FORMAT:
            raise ValueError(f"format {lock['format']!r}")
        for unit in lock["units"]:
            keys = {role["key"] for role in unit["roles"] if "key" in role}
            if not isinstance(unit["identity"], str) or not keys or not keys <= set(lock["kernels"]):
                raise ValueError("a unit of unknown kernels")
            str(unit["backend"]), str(unit["arch"])
        check_name(lock["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ParameterError(
            f"{where} is no lock file of this release.\n  required: format {LOCK_FORMAT}\n  found: {error!r}\n"
            f"  do: write it again with `attngen precompile SET.toml`"
        ) from None
    return lock


def stale(path: Path, lock: Mapping[str, Any]) -> str:
    """Why the lock file no longer fits its TOML file; empty where it does."""
    found = VariantSet(path)
    if found.digest != lock.get("set_sha256"):
        return f"{path} changed since {lock_path(path).name} was written"
    with suppress(OSError):
        changed = [name for name, digest in found.files().items() if lock.get("files", {}).get(name) != digest]
        return f"{', '.join(changed)} changed since {lock_path(path).name} was written" if changed else ""
    return f"a file that {path} names is not there"


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> list[dict[str, Any]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(f"no set {path}: {error.strerror}.\n  required: a TOML file with [[kernels]] tables") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not TOML: {error}") from None
    tables, extra = content.get("kernels"), [name for name in content if name != "kernels"]
    if extra or not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ParameterError(f"{path}: required one [[kernels]] table or more and nothing else; found {', '.join(content) or 'nothing'}")
    return [_check_table(f"{path}, [[kernels]] number {i + 1}", table) for i, table in enumerate(tables)]


def _check_table(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in _KEYS:
            raise ParameterError(f"{where}: unknown key {name!r}; required some of {', '.join(_KEYS)}")

    def listed(name: str, default: list[Any], allowed: Sequence[str] | None = None) -> list[Any]:
        values = given.get(name, default)
        if not isinstance(values, list) or not values and default != []:
            raise ParameterError(f"{where}: {name} is {values!r}; required a list that is not empty")
        for value in values:
            if allowed is not None and value not in allowed:
                raise ParameterError(f"{where}: {name} has {value!r}; required {', '.join(allowed)}")
        return values

    phases = listed("phases", ["prefill", "decode"], _PHASES)
    table = {
        "variants": listed("variants", []), "dtypes": listed("dtypes", [], tuple(DTYPES)),
        "head_dims": [_dims(where, x) for x in listed("head_dims", [128])],
        "layouts": listed("layouts", list(_LAYOUTS), _LAYOUTS), "phases": phases,
        "archs": [str(x) for x in listed("archs", ["cpu"])], "batch_invariant": given.get("batch_invariant", False),
        "storage": given.get("storage", {}),
    }  # fmt: skip
    if not isinstance(table["batch_invariant"], bool):
        raise ParameterError(f"{where}: batch_invariant is {table['batch_invariant']!r}; required true or false")
    if not isinstance(table["storage"], dict) or not all(x in _TORCH for x in table["storage"].values()):
        raise ParameterError(f"{where}: storage is {table['storage']!r}; required names of dtypes by names of fields")
    if not table["variants"] and set(phases) & {"prefill", "decode"}:
        raise ParameterError(f"{where}: no variants; required variants = [...] for the phases prefill and decode")
    for variant in table["variants"]:
        if not _name_of(variant) or not isinstance(_bind_of(variant), dict):
            raise ParameterError(f"{where}: variants has {variant!r}; required a name, or {{name = ..., bind = {{...}}}}")
    for arch in table["archs"]:
        if not _is_cpu(arch):
            arch_named(_gpu(arch))
    return table


def _name_of(given: Any) -> str:
    name = given.get("name") if isinstance(given, dict) else given
    return name if isinstance(name, str) else ""


def _bind_of(given: Any) -> Any:
    return given.get("bind", {}) if isinstance(given, dict) else {}


def _dims(where: str, given: Any) -> tuple[int, int]:
    parts = str(given).split("x") if isinstance(given, (int, str)) and not isinstance(given, bool) else []
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise ParameterError(f'{where}: head_dims has {given!r}; required a number, or "192x128" for head_dim and head_dim_v')
    return int(parts[0]), int(parts[-1])


def _is_cpu(arch: str) -> bool:
    return arch == "cpu" or arch in CPU_ISAS


def _gpu(arch: str) -> str:
    """ "9.0a" as "90a"."""
    return arch.replace(".", "")


def _storage(variant: Variant, given: Mapping[str, str]) -> dict[str, torch.dtype]:
    return {name: _TORCH[dtype] for name, dtype in given.items() if name in variant.trace.fields}
