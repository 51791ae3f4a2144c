"""Kernels that a set's lock file has chosen for this process: looked up by what they serve instead of by their key.

A key changes with every release of attngen, since the compiler is part of it; what a kernel serves does not. load_set
pins, for each identity (structure, problem, layout), the entries that its lock file names. Then the kernels of the last
release serve this one, as long as their launch ABI is one that it knows: their configurations and parameter structs come
from their manifests. A process without pins pays nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .abi import Layout
from .entry import Entry
from .errors import CacheError
from .spec import Problem

Role = Entry | Mapping[str, Any]  # a kernel, or name, variant and choice of one that its set left out
_pinned: dict[str, tuple[Role, ...]] = {}


def pin(identity: str, entries: Sequence[Role]) -> None:
    """Serve ``identity`` by ``entries``, in the order of its roles, from now on."""
    _pinned[identity] = tuple(entries)


def unpin_all() -> None:
    """Forget all of them."""
    _pinned.clear()


def pinned_cpu(structure: str, problem: Problem) -> Entry | None:
    """The CPU kernel that serves a variant's structure (``Trace.key``) and problem, if one is pinned."""
    return _first(cpu_identity(structure, problem)) if _pinned else None


def pinned_cuda(
    structure: str, problem: Problem, page_size: int | None, batch_invariant: bool, few_rows: bool, shared: bool
) -> tuple[Role, ...]:
    """The kernels of the row-tile classes, that of shared prefixes if it is asked for, then their planner; empty without a pin.
    Arguments as ``cuda_identity``."""
    return _pinned.get(cuda_identity(structure, problem, page_size, batch_invariant, few_rows, shared), ()) if _pinned else ()


def pinned_plain(name: str, config: Any) -> Entry | None:
    """The kernel without hooks that ``name`` and its configuration name, if one is pinned."""
    return _first(plain_identity(name, config)) if _pinned else None


def _first(identity: str) -> Entry | None:
    """The kernel of an identity that one kernel serves: no set leaves that out."""
    found = _pinned.get(identity, (None,))[0]
    return found if isinstance(found, Entry) else None


# ---- identities: equal in every release ------------------------------------------------------------------------------


def cpu_identity(structure: str, problem: Problem) -> str:
    return _hash("cpu", structure, _facts(problem))


def cuda_identity(
    structure: str, problem: Problem, page_size: int | None, batch_invariant: bool, few_rows: bool, shared: bool = False
) -> str:
    """Of ``page_size`` it counts whether there are pages and, on Hopper, whether they are multiples of 8. ``few_rows``: of
    batch-invariant kernels, those of requests of at most 16 rows; ``shared``: with those of shared prefixes."""
    odd = page_size is not None and page_size % 8 and problem.isa == "90a"
    layout = "contiguous" if page_size is None else "paged-odd" if odd else "paged"
    layout += "-shared" if shared else ""
    return _hash("cuda", structure, _facts(problem), layout, batch_invariant, batch_invariant and few_rows)


def plain_identity(name: str, config: Any) -> str:
    return _hash("plain", name, _facts(config))


def _hash(*facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts(record: Any) -> list[tuple[str, Any]]:
    """A record's fields that are not at their default: one that a later release adds changes nothing."""
    fields = dataclasses.fields(record)
    return sorted((f.name, getattr(record, f.name)) for f in fields if getattr(record, f.name) != f.default)


# ---- configurations in manifests -------------------------------------------------------------------------------------


def config_record(config: Any) -> Any:
    """A configuration as JSON, for ``restore_config``."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: config_record(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"module": type(config).__module__.rpartition(".")[2], "type": type(config).__name__, "fields": fields}
    return [config_record(x) for x in config] if isinstance(config, (tuple, list)) else config


@functools.cache
def _record_type(module: Any, name: Any) -> type:
    if not re.fullmatch(r"choose(_\w+)?", module):
        raise ValueError(f"module {module!r}")
    found = vars(importlib.import_module(f"attngen.{module}"))[name]
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"{name!r} is no record")
    return found


def restore_config(record: Any, place: Any) -> Any:
    """The configuration that ``config_record`` wrote, perhaps in another release. Raises CacheError where this one cannot
    hold it. Only the records of the choose rooms are made: nothing that a manifest says is executed."""
    if isinstance(record, list):
        return tuple([restore_config(x, place) for x in record])
    if not isinstance(record, dict):  # as JSON has them
        return record
    module, name, fields = (record.get(x) for x in ("module", "type", "fields"))
    try:
        return _record_type(module, name)(**{n: restore_config(v, place) for n, v in fields.items()})
    except (ImportError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(
            f"a kernel of another release, which this one cannot launch: {place}\n  required: a configuration that "
            f"attngen.{module}.{name} holds\n  found: {error}\n  do: build the set again with `attngen precompile`"
        ) from None


_layout_of = functools.lru_cache(maxsize=256)(Layout)  # the kernels of a variant share one


def restore_layout(manifest: Mapping[str, Any], place: Any) -> Layout:
    """A kernel's parameter struct, from its manifest. Raises CacheError where this release lays it out otherwise."""
    try:
        found = _layout_of(tuple([(str(ctype), str(name)) for ctype, name, _ in manifest["params"]]))
        offsets = [offset for _, _, offset in manifest["params"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"a manifest without a parameter struct ({error!r}): {place}; build it again") from None
    if [f.offset for f in found.fields] != offsets:
        raise CacheError(f"a parameter struct of other offsets: {place}; build it again with `attngen precompile`")
    return found
