"""Variant sets: a TOML file names what is served, its lock file the kernels that serve it.

    # llama.toml                                      every combination of a table's lists is built; tables add up
    [[kernels]]
    variants = ["Causal", "mine.py:Mine"]             library names, files, or {name = "mine.py:Mine", bind = {chunk = 64}}
    dtypes = ["bfloat16"]                             of q, k and v; default bfloat16, on CPUs float32
    head_dims = [64, 128, "192x128"]                  or head_dim x head_dim_v; default 128
    layouts = ["paged", "contiguous"]                 of keys and values, the default; "paged-odd": pages that are no
                                                      multiples of 8; "paged-shared": with shared_prefix=True. The CPU's
                                                      kernels serve all
    phases = ["prefill", "decode", "append", "merge", "mask"] default prefill and decode; append needs no variant but its RoPE
    archs = ["9.0a", "8.0", "cpu"]                    GPUs by compute capability, CPUs as "cpu" or an instruction set; default cpu
    batch_invariant = false
    storage = {slopes = "float32"}                    stored dtypes of tensor fields

`llama.lock`, beside it, is JSON without times: for each thing served its identity (pins.py) and the keys of its kernels.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import trust
from .entry import KEY
from .errors import ParameterError, UnsupportedError
from .isa import CPU_ISAS
from .pack import check_name
from .params import DTYPE_NAMES

LOCK_FORMAT = "attngen-lock-1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PAGE_SIZES = {"paged": 16, "paged-odd": 1, "paged-shared": 16, "contiguous": None}  # one of each layout
_PHASES = ("prefill", "decode", "append", "merge", "mask")
_KEYS = ("variants", "dtypes", "head_dims", "layouts", "phases", "archs", "batch_invariant", "storage")


class VariantSet:
    """A set as its TOML file says, or for the GPUs and CPUs of ``arch`` instead of its own.

    ``kinds``: of CPUs (True), GPUs (False) or both, those that ``arch`` may name.
    Raises ParameterError with the file, the table and the key that is wrong, or the arch that no table takes.
    """

    def __init__(self, path: Path, arch: Sequence[str] = ()) -> None:
        self.path, self.name = path, path.stem
        check_name(self.name)
        given = _read(path)
        self.tables = [_check_table(f"{path}, [[kernels]] number {i + 1}", table) for i, table in enumerate(given)]
        open_tables = ["archs" not in table for table in given]  # which serve whatever is asked for
        self.kinds = {True, False} if any(open_tables) else {is_cpu(x) for table in self.tables for x in table["archs"]}
        self.cpu_by_default = not arch and any(open_tables)
        text = json.dumps([LOCK_FORMAT, self.tables], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        if arch:
            self._only(arch, open_tables)

    def _only(self, archs: Sequence[str], open_tables: Sequence[bool]) -> None:
        """GPUs take the place of a table's GPUs, CPUs of its CPUs; a table that has neither goes; one that says nothing of archs
        takes all."""
        _check_archs(f"{self.path} with --arch", archs)
        for arch in archs:
            if is_cpu(arch) not in self.kinds:
                this, other = ("CPU", "GPUs") if is_cpu(arch) else ("GPU", "CPUs")
                raise ParameterError(
                    f"{self.path} serves nothing on {arch}.\n  required: a table whose archs have a {this}, which --arch {arch} takes the "
                    f"place of\n  found: {other} alone\n  do: {name_arch(arch, self.path)}, or leave {arch} out"
                )
        for table, is_open in zip(self.tables, open_tables):
            kinds = {True, False} if is_open else {is_cpu(x) for x in table["archs"]}
            table["archs"] = [x for x in archs if is_cpu(x) in kinds]
        self.tables = [table for table in self.tables if table["archs"]]

    @property
    def lock_path(self) -> Path:
        return lock_path(self.path)

    def files(self) -> dict[str, str]:
        """The user's files that the set names, relative to it, with their sha256."""
        return {name: hashlib.sha256((self.path.parent / name).read_bytes()).hexdigest() for name in sorted(self._files())}

    def _files(self) -> Iterator[str]:
        for table in self.tables:
            for given in table["variants"]:
                file = name_of(given).partition(":")[0]
                if file.endswith(".py"):
                    yield file


# ---- lock files ------------------------------------------------------------------------------------------------------


def lock_path(path: Path) -> Path:
    """The lock file of a set's TOML file."""
    return path.with_suffix(".lock")


def read_lock(path: Path) -> dict[str, Any]:
    """A lock file. Raises ParameterError where it is none."""
    try:
        lock = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ParameterError(f"the lock file {path} cannot be read: {error}\n  do: write it with `attngen precompile`") from None
    return check_lock(lock, str(path))


def sealed(lock: Mapping[str, Any]) -> dict[str, Any]:
    """``lock`` with a digest of what a signature covers: a part that is lost or changed is not served as the whole."""
    return {**lock, "seal": hashlib.sha256(trust.signed_bytes(lock)).hexdigest()}


# What the parts of a lock file must hold: by name a type, or the values that it may have.
_LOCK = {"name": str, "set_sha256": str, "files": dict, "sources": dict, "kernels": dict, "units": list}
_KERNEL = {"name": str, "variant": str, "arch": str, "inputs": dict}
_UNIT = {"identity": str, "variant": str, "backend": ("cpu", "cuda"), "arch": str, "roles": list}
_DTYPED = {"dtype": DTYPES, "head_dim_v": int}
_UNITS = {
    "append_kv": {**_DTYPED, "head_dim": int, "rotary_dim": int, "interleaved": bool},
    "merge_states": {**_DTYPED, "out_dtype": DTYPES}, "custom_mask": {}, "shared prefixes": {}, "cpu": {**_DTYPED, "head_dim": int, "bind": dict},
    "cuda": {**_DTYPED, "head_dim": int, "bind": dict, "layout": PAGE_SIZES, "batch_invariant": bool},
}  # fmt: skip


def check_lock(lock: Any, where: str) -> dict[str, Any]:
    """``lock``, if it has the form of a lock file and is whole. Raises ParameterError."""
    try:
        if lock["format"] != LOCK_FORMAT:
            raise ValueError(f"format {lock['format']!r}")
        if "seal" in lock and lock["seal"] != sealed(lock)["seal"]:  # the last release's have none
            raise ValueError("other content than was written: it was edited, merged or cut")
        _check_fields("the lock file", lock, _LOCK)
        for key, kernel in lock["kernels"].items():
            _check_fields(f"kernel {key[:12]}", kernel, _KERNEL)
        served = {key for unit in lock["units"] for key in _check_unit(unit)}
        if served != set(lock["kernels"]):
            raise ValueError(f"{len(served)} kernels that its units name and {len(lock['kernels'])} that it lists, not the same")
        if not all(KEY.fullmatch(key) for key in served):  # it names a folder
            raise ValueError("a key that is none")
        check_name(lock["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ParameterError(
            f"{where} is no lock file of this release, or not a whole one.\n"
            f"  required: format {LOCK_FORMAT}, as `attngen precompile` wrote it\n  found: {error!r}\n"
            f"  do: write it again with `attngen precompile SET.toml`, or copy it or its pack anew"
        ) from None
    return lock


def _check_unit(unit: Any) -> list[str]:
    """The keys that a unit names, if it has all that serving it needs."""
    _check_fields("a unit", unit, _UNIT)
    _check_fields(f"the unit {unit['variant'][:80]}", unit, _UNITS.get(unit["variant"], _UNITS[unit["backend"]]))
    for role in unit["roles"]:
        _check_fields("a role", role, {"key": str} if "key" in role else {"name": str, "variant": str})
    keys = [role["key"] for role in unit["roles"] if "key" in role]
    if not keys:
        raise ValueError(f"the unit {unit['variant'][:80]} without kernels")
    return keys


def _check_fields(what: str, record: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(record, dict):
        raise TypeError(f"{what} is {record!r:.80}")
    for name, kind in wanted.items():
        value = record.get(name)
        fits = type(value) is kind if isinstance(kind, type) else isinstance(value, str) and value in kind
        if not fits:
            raise TypeError(f"{name} of {what} is {value!r:.80}")


def stale(path: Path, lock: Mapping[str, Any]) -> str:
    """Why the lock file no longer fits its TOML file; empty where it does."""
    found = VariantSet(path)
    if found.digest != lock.get("set_sha256"):
        return f"{path} changed since {lock_path(path).name} was written"
    try:
        changed = [name for name, digest in found.files().items() if lock.get("files", {}).get(name) != digest]
    except OSError as error:
        return f"{error.filename}, which {path} names, cannot be read ({error.strerror})"
    return f"{', '.join(changed)} changed since {lock_path(path).name} was written" if changed else ""


def missing_command(path: Path, archs: Sequence[str]) -> str:
    """The command that builds a set for ``archs``."""
    return f"attngen precompile {shlex.quote(str(path))}" + (f" --arch {','.join(archs)}" if archs else "")


def name_arch(arch: str, path: Path) -> str:
    """What to do where a set has no table for CPUs, or none for GPUs."""
    return f'add "{"cpu" if is_cpu(arch) else arch}" to the archs of {path}'


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
        found = ", ".join(f"[{name}]" if isinstance(value, dict) else name for name, value in content.items()) or "nothing"
        single = ": write [[kernels]], in double brackets" if isinstance(tables, dict) else ""
        raise ParameterError(f"{path}: required one [[kernels]] table or more and nothing else; found {found}{single}")
    return tables


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
        "layouts": listed("layouts", ["paged", "contiguous"], tuple(PAGE_SIZES)), "phases": phases,
        "archs": [str(x) for x in listed("archs", ["cpu"])], "batch_invariant": given.get("batch_invariant", False),
        "storage": given.get("storage", {}),
    }  # fmt: skip
    if not isinstance(table["batch_invariant"], bool):
        raise ParameterError(f"{where}: batch_invariant is {table['batch_invariant']!r}; required true or false")
    if not isinstance(table["storage"], dict) or not all(x in STORED for x in table["storage"].values()):
        raise ParameterError(f"{where}: storage is {table['storage']!r}; required names of dtypes by names of fields")
    if not table["variants"] and set(phases) & {"prefill", "decode"}:
        raise ParameterError(f"{where}: no variants; required variants = [...] for the phases prefill and decode")
    for variant in table["variants"]:
        if not name_of(variant) or not isinstance(bind_of(variant), dict):
            raise ParameterError(f"{where}: variants has {variant!r}; required a name, or {{name = ..., bind = {{...}}}}")
    _check_archs(where, table["archs"])
    return table


def _check_archs(where: str, archs: Sequence[str]) -> None:
    for arch in archs:
        if not is_cpu(arch):
            from .choose_cuda import arch_named

            try:
                arch_named(gpu(arch))
            except UnsupportedError as error:
                raise ParameterError(f"{where}: archs has {arch!r}: {error}; or of a CPU: cpu, {', '.join(CPU_ISAS)}") from None


def name_of(given: Any) -> str:
    name = given.get("name") if isinstance(given, dict) else given
    return name if isinstance(name, str) else ""


def bind_of(given: Any) -> Any:
    return given.get("bind", {}) if isinstance(given, dict) else {}


def _dims(where: str, given: Any) -> tuple[int, int]:
    parts = str(given).split("x") if isinstance(given, (int, str)) and not isinstance(given, bool) else []
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise ParameterError(f'{where}: head_dims has {given!r}; required a number, or "192x128" for head_dim and head_dim_v')
    return int(parts[0]), int(parts[-1])


def is_cpu(arch: str) -> bool:
    return arch == "cpu" or arch in CPU_ISAS


def gpu(arch: str) -> str:
    """ "9.0a" as "90a"."""
    return arch.replace(".", "")
