"""The start of a server: a set's kernels, all loaded before the first request, or an error that says what is missing.

    loaded = ag.load_set("llama.toml", jit=False)       its lock file names the kernels; or a pack; or an installed set
    print(loaded.report())
    ag.warmup(loaded)                                   runs each kernel once
"""

from __future__ import annotations

import logging
import os
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache, counters, layers, pins, sets
from .isa import host_isa
from .entry import Entry
from .devices import as_device, cuda_index
from .errors import CacheError, JitWarning, LoadError, MissingKernelError, ParameterError, VariantError
from .load import host, load_kernel
from .pack import SET_NAME, Pack
from .run import collector_paused
from .spec import Problem, Variant

log = logging.getLogger("attngen.start")
_SHOWN = 100  # missing kernels that an error's text lists; its attribute ``missing`` has all


class LoadedKernelRow(NamedTuple):
    """One kernel of a start: what it is, which layer had it, and what finding and loading it took."""

    key: str
    variant: str
    name: str
    arch: str
    layer: str
    bytes: int
    find_ms: float
    load_ms: float


@dataclass(eq=False)
class LoadedSet:
    """A set that this process serves.

    Attributes:
        name, lock: of the set.
        kernels: a row a kernel, in the order of loading.
        units: what they serve, as the lock file says.
        device: where CUDA kernels are loaded; None where there are none.
        built: how many had to be compiled.
        read_ms, host_ms, total_ms: reading the lock file or the pack's index; loading the host extension; all of load_set.
    """

    name: str
    lock: Mapping[str, Any]
    folder: Path
    device: torch.device | None = None
    kernels: list[LoadedKernelRow] = field(default_factory=list)
    units: list[Mapping[str, Any]] = field(default_factory=list)
    built: int = 0
    read_ms: float = 0.0
    host_ms: float = 0.0
    total_ms: float = 0.0

    def layers(self) -> dict[str, int]:
        """How many kernels came from each layer."""
        return dict(Counter(row.layer for row in self.kernels))

    def report(self) -> str:
        """The start-up report: a line a kernel, then the sums."""
        lines = [
            f"{row.variant} {row.name} {row.arch} {row.key[:12]} | {row.layer} | {row.bytes / 1e3:.0f} kB | find "
            f"{row.find_ms:.2f} ms, load {row.load_ms:.2f} ms"
            for row in self.kernels
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        where = ", ".join(f"{count} from {layer}" for layer, count in self.layers().items())
        built = f", {self.built} of them compiled now" if self.built else ""
        return (f"set {self.name}: {len(self.kernels)} kernels in {self.total_ms:.1f} ms ({where}{built}; host extension "
                f"{self.host_ms:.1f} ms)")  # fmt: skip


def load_set(source: str | os.PathLike[str], *, jit: bool = True, device: torch.device | str | None = None) -> LoadedSet:
    """Load every kernel of a set that fits this machine, before anything is served.

    Args:
        source: a set's TOML file, whose lock file lies beside it; a lock file; a pack (NAME.attnpack), which is read where
            it lies; or the name of a set that an imported pack or an installed wheel of kernels brought.
        jit: whether what is missing may be compiled (from a TOML file). False needs no compiler, ninja, Jinja, right to
            write or network. ATTNGEN_JIT=off means False everywhere.
        device: "cpu", "cuda" or one CUDA device: load for it alone. Default: for the CPU, and for the current CUDA device
            where there is one, as far as the set has either.

    From now on calls and batches that the set serves use its kernels, though a later release of attngen would choose
    others; other calls go on as ever.

    Raises:
        MissingKernelError: with jit=False, at once: what is missing, and the command that builds it.
        ParameterError, CacheError, LoadError, BuildError.
    """
    start = time.perf_counter()
    allowed = jit and counters.jit_mode() != "off"
    with nullcontext() if allowed else counters.jit("off"), collector_paused():
        path, lock = _find(source)
        read_ms = 1e3 * (time.perf_counter() - start)
        here, built = _here(device), 0
        try:
            loaded = _load(path, lock, here, device)
        except MissingKernelError:
            if not allowed or path.suffix != ".toml":
                raise
            lock, built = _build(path, list(here.values()))
            loaded = _load(path, lock, here, device)
        loaded.built, loaded.read_ms = built, read_ms
    loaded.total_ms = 1e3 * (time.perf_counter() - start)
    facts = {"event": "load_set", "set": loaded.name, "kernels": len(loaded.kernels), "ms": loaded.total_ms, "layers": loaded.layers()}
    log.info("%s", loaded.summary(), extra={"facts": facts})
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", loaded.report())
    return loaded


# ---- finding ---------------------------------------------------------------------------------------------------------


def _find(source: str | os.PathLike[str]) -> tuple[Path, dict[str, Any] | None]:
    """The path that ``source`` means and its lock file; None where it has none yet."""
    text, path = os.fspath(source), Path(source)
    if path.suffix == ".attnpack":
        pack = Pack(path)
        if pack.lock is None:
            raise ParameterError(f"{path} holds kernels, but no lock file: it was exported without a set; export one with a set")
        layers.attach(pack)
        return path, sets.check_lock(pack.lock, f"the lock file in {path}")
    if path.suffix == ".lock":
        return path, sets.read_lock(path)
    if path.suffix == ".toml":
        if not path.exists() and not sets.lock_path(path).exists():
            raise ParameterError(f"no set {path}: required a TOML file, or its lock file beside it")
        lock = sets.lock_path(path)
        return path, sets.read_lock(lock) if lock.exists() else None
    if SET_NAME.fullmatch(text):
        known: list[str] = []
        own = layers.FolderLayer("cache", cache.default().root)
        for layer in (*layers.before(), own, *layers.after()):
            if isinstance(layer, layers.RemoteLayer):
                continue
            known += layer.sets()
            if text in layer.sets():
                return Path(text), sets.check_lock(layer.lock(text), f"the set {text} of layer {layer.name}")
        names = ", ".join(dict.fromkeys(known)) or "none"
        raise ParameterError(
            f"no set named {text!r}.\n  required: a set of an imported pack or an installed wheel of kernels, or a path that ends "
            f"in .toml, .lock or .attnpack\n  found: {names}{layers.passed_over()}\n  do: attngen cache import {text}.attnpack"
        )
    raise ParameterError(f"{text}: required a path that ends in .toml, .lock or .attnpack, or the name of an imported set")


def _here(device: Any) -> dict[str, str]:
    """The architecture of each backend that this machine has, or of the device that was asked for."""
    wanted = as_device(device).type if device is not None else None
    found = {"cpu": host_isa()} if wanted in (None, "cpu") else {}
    if wanted == "cuda" or (wanted is None and torch.cuda.is_available()):
        from . import cuda

        found["cuda"] = cuda.device_arch(_cuda_device(device).index or 0).name
    return found


def _fitting(lock: Mapping[str, Any], here: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The units that this machine serves."""
    return [unit for unit in lock["units"] if here.get(unit["backend"]) == unit["arch"]]


def _fit(path: Path, lock: Mapping[str, Any] | None, here: Mapping[str, str], device: Any) -> Mapping[str, Any]:
    """The lock file, if it can serve here. Raises MissingKernelError where it is not there, is older than its set, or has nothing
    for a backend that is here and that the set serves."""
    toml = sets_path(path, lock)
    why = "there is no lock file" if lock is None else sets.stale(path, lock) if path.suffix == ".toml" and path.exists() else ""
    if why or lock is None:
        raise MissingKernelError(
            f"the set {path} cannot be loaded as it is: {why}.\n  required: {sets.lock_path(toml)}, written for this set\n"
            f"  found: {why}\n  do: {sets.missing_command(toml, ())}"
        )
    if device is None and "cuda" in here and not any(unit["backend"] == "cuda" for unit in lock["units"]):
        log.warning("the set %s has kernels for CPUs alone: calls on this machine's GPU (%s) compile theirs, or fail under "
                    "ATTNGEN_JIT=off. Add it to the set's archs", lock["name"], here["cuda"])  # fmt: skip
    for backend, arch in here.items():
        archs = sorted({unit["arch"] for unit in lock["units"] if unit["backend"] == backend})
        if arch not in archs and (archs or device is not None):
            raise MissingKernelError(
                f"the set {lock['name']} has no kernels for {arch}, which this machine's {backend} runs.\n  required: {arch}\n"
                f"  found: {', '.join(archs) or 'none'}\n  do: {_remedy(path, lock, [arch])}"
            )
    if not _fitting(lock, here):
        archs = sorted({str(unit["arch"]) for unit in lock["units"]})
        raise MissingKernelError(
            f"nothing of the set {lock['name']} runs here.\n  required: one of {', '.join(archs)}\n"
            f"  found: {', '.join(here.values())}{'' if torch.cuda.is_available() else ', no CUDA device'}\n"
            f"  do: {_remedy(path, lock, list(here.values()))}"
        )
    return lock


def sets_path(path: Path, lock: Mapping[str, Any] | None) -> Path:
    """The TOML file that a set was made from, as far as its path or name tells."""
    if path.suffix == ".toml":
        return path
    return path.with_name(f"{lock['name'] if lock else path.stem}.toml")


def _missing(path: Path, lock: Mapping[str, Any], missing: Mapping[str, str], needed: int) -> MissingKernelError:
    rows = [
        f"    {k['variant']} {k['name']} {k['arch']} {key[:12]}: {why}"
        for key, why in missing.items() for k in [lock["kernels"][key]]
    ]  # fmt: skip
    more = [f"    and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    archs = sorted({str(lock["kernels"][key]["arch"]) for key in missing})
    text = "\n".join([*rows[:_SHOWN], *more])
    count = "1 kernel" if len(missing) == 1 else f"{len(missing)} kernels"
    listed = len(lock["kernels"])
    required = f"all {listed}, as its lock file says" if needed == listed else f"the {needed} for this machine of {listed} in its lock file"
    where = sets.lock_path(path) if path.suffix == ".toml" else path  # of an imported set it is found by itself
    given = f" --lock {shlex.quote(str(where))}" if where.suffix in (".lock", ".attnpack") else ""
    error = MissingKernelError(
        f"{count} of the set {lock['name']} {'is' if len(missing) == 1 else 'are'} not there.\n  required: {required}\n"
        f"  found missing:\n{text}\n  do: {_remedy(path, lock, archs)}; to see why: "
        f"attngen explain-miss {next(iter(missing))[:16]}{given}"
    )
    error.missing = dict(missing)
    return error


def _remedy(path: Path, lock: Mapping[str, Any], archs: Sequence[str]) -> str:
    """How to get what a set lacks: from its TOML file, where that is here, else from where it was made."""
    toml = sets_path(path, lock)
    shown = toml if toml.exists() else Path(toml.name)
    kinds = {unit["backend"] == "cpu" for unit in lock["units"]}  # --arch takes the place of its own kind
    lacking = next((arch for arch in archs if sets.is_cpu(arch) not in kinds), "")
    command = sets.missing_command(shown, () if lacking else archs)
    if lacking:
        command = f"{sets.name_arch(lacking, shown)}, then {command}"
    if toml.exists():
        return f"{command}, or import its pack"
    return f"{command}, where {toml.name} is, and export it anew; or import a pack that has them"


def _build(path: Path, archs: Sequence[str]) -> tuple[dict[str, Any], int]:
    from .precompile import Plan, build, workers_for  # a start that finds everything needs none of it

    kinds = sets.VariantSet(path).kinds  # it need not serve all that this machine has
    plan = Plan.of(sets.VariantSet(path, [arch for arch in archs if sets.is_cpu(arch) in kinds] or archs))
    if plan.missing and counters.jit_mode() == "warn":
        what = f"ATTNGEN_JIT=warn: compiling {len(plan.missing)} kernels of the set {path} while the process runs"
        log.info("%s", what, extra={"facts": {"event": "jit", "set": str(path), "keys": [job.key for job in plan.missing]}})
        warnings.warn(JitWarning(what), stacklevel=3)
    result = build(plan, workers_for(None))
    for state in result.failed:
        raise CacheError(f"the set {path} cannot be built: {state.job.title} {state.job.name}:\n{state.error}")
    if result.interrupted:
        raise KeyboardInterrupt
    return result.lock(), sum(state.state == "built" for state in result.states)


# ---- loading ---------------------------------------------------------------------------------------------------------


def _cuda_device(device: Any) -> torch.device:
    return torch.device("cuda", cuda_index(device))


def _load(path: Path, lock: Mapping[str, Any] | None, here: Mapping[str, str], device: Any) -> LoadedSet:
    """What this machine serves of a set, all of it loaded. Raises MissingKernelError for all that no layer has."""
    lock = _fit(path, lock, here, device)
    loaded = LoadedSet(lock["name"], lock, path.parent, units=_fitting(lock, here))
    if any(unit["backend"] == "cuda" for unit in loaded.units):
        loaded.device = _cuda_device(device)
    begun = time.perf_counter()
    host()
    loaded.host_ms, load = 1e3 * (time.perf_counter() - begun), _loader(loaded.device)
    store, missing, found = cache.default(), {}, {}
    needed = dict.fromkeys(role["key"] for unit in loaded.units for role in unit["roles"] if "key" in role)
    for key in needed:
        begun = time.perf_counter()
        try:
            entry = store.find(key)
        except CacheError as error:
            missing[key] = str(error).splitlines()[0]
            continue
        if entry is None:
            missing[key] = f"in no layer{layers.passed_over()}"
        if entry is None or missing:
            continue  # nothing more is loaded, but all that is missing is named
        read = time.perf_counter()
        try:
            load(entry)  # at once: what was read to be checked need not be held longer
        except LoadError:
            if entry.exists():
                raise
            missing[key] = "removed while it was loaded"
            continue
        find_ms, load_ms = 1e3 * (read - begun), 1e3 * (time.perf_counter() - read)
        found[key] = entry = entry.light()
        store.remember(entry)
        m = entry.manifest
        loaded.kernels.append(LoadedKernelRow(
            key, str(m.get("variant")), str(m.get("name")), str(m.get("isa")), entry.layer, entry.size, find_ms, load_ms
        ))  # fmt: skip
    if missing:
        raise _missing(path, lock, missing, len(needed))
    served = [(unit, [found[role["key"]] if "key" in role else role for role in unit["roles"]]) for unit in loaded.units]
    for unit, roles in served:
        _check_serves(unit, roles, path)
    for unit, roles in served:  # none before all are loaded
        pins.pin(unit["identity"], roles)
    return loaded


def _check_serves(unit: Mapping[str, Any], roles: Sequence[pins.Role], path: Path) -> None:
    """Raises CacheError where the kernels that a lock file gives to a unit serve something else, as after a bad merge of two."""
    try:
        fits = _serves(unit, [role.manifest if isinstance(role, Entry) else role for role in roles], path)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, StopIteration) as error:
        raise CacheError(f"the kernels of the set {path} do not say what they serve ({error!r}): build it again") from None
    if not fits:
        found = ", ".join(role.key[:12] for role in roles if isinstance(role, Entry))
        raise CacheError(
            f"the lock file of {path} gives {unit['variant']} ({unit['arch']}) kernels that serve something else.\n  required: the kernels "
            f"that `attngen precompile` named\n  found: {found}\n  do: run attngen precompile again"
        )


def _serves(unit: Mapping[str, Any], roles: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Whether the manifests of a unit's roles add up to its identity; of a role that is not built there is the choice alone."""
    first = next(role for role in roles if "problem" in role)
    if first["problem"] is None:
        return len(roles) == 1 and unit["identity"] == pins.plain_identity(first["name"], pins.restore_config(first["choice"], path))
    structure, storage = first["inputs"]["structure"], tuple([(str(name), str(dtype)) for name, dtype in first["problem"]["storage"]])
    problem = Problem(**{**first["problem"], "storage": storage})
    if unit["backend"] == "cpu":
        return len(roles) == 1 and unit["identity"] == pins.cpu_identity(structure, problem)
    *classes, plan = roles
    built = [role for role in classes if "problem" in role]
    if not all(role["inputs"]["structure"] == structure and role["problem"] == first["problem"] for role in built):
        return False
    page_size, invariant = sets.PAGE_SIZES[unit["layout"]], bool(unit["batch_invariant"])
    few = (False, True) if invariant else (False,)
    shared = unit["layout"] == "paged-shared"
    if unit["identity"] not in [pins.cuda_identity(structure, problem, page_size, invariant, x, shared) for x in few]:
        return False
    # Layout and split are of the configuration, the tiles' rows what the planner counts on. Variants share planners.
    paged, planned = page_size is not None, [shape["fields"]["bm"] for shape in plan["choice"]["fields"]["classes"]]
    tiles = [role["choice"]["fields"] for role in classes]
    rows = [tile.get("block_m") or 64 * tile.get("groups", 0) for tile in tiles]
    if len(rows) != len(planned) or any(row not in (0, bm) for row, bm in zip(rows, planned)):
        return False
    return all(tile.get("paged", paged) == paged and bool(tile.get("split", invariant)) == invariant for tile in tiles)


def _loader(device: torch.device | None) -> Callable[[Entry], Any]:
    """How a kernel is loaded; what a GPU's kernels need is imported now."""

    if device is None:
        return load_kernel
    from . import cuda, engine

    def load(entry: Entry) -> Any:
        if entry.manifest.get("kind") == "cpu":
            return load_kernel(entry)
        assert device.index is not None
        engine.load(cuda.from_entry(entry, None), device.index)

    return load


# ---- warming up ------------------------------------------------------------------------------------------------------


def warmup(
    loaded: LoadedSet,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    variants: Mapping[str, Variant | type[Variant]] | None = None,
) -> float:
    """Run everything that a loaded set serves once, on small inputs: what a driver or torch does at first use is done.

    Args:
        params: parameters by the variant's name, for variants whose tensors cannot be invented; others get random ones.
        variants: the set's variants by their names in it, such as {"mine.py:Mine": Mine}. Others are of the library, or of
            files that lie as the set names them, beside the set, lock file or pack that was loaded.

    Returns:
        Milliseconds. Raises what the calls raise; VariantError where a variant's file is not there.
    """
    start = time.perf_counter()
    with torch.no_grad():
        for unit in loaded.units:
            device = torch.device("cpu") if unit["backend"] == "cpu" else loaded.device
            assert device is not None
            if unit["variant"] == "append_kv":
                _warm_append(unit, device)
            elif unit["variant"] == "merge_states":
                _warm_merge(unit, device)
            elif unit["variant"] == "custom_mask":
                _warm_mask(device)
            elif unit["variant"] == "shared prefixes":
                continue  # batches that share run it
            else:
                variant = _variant_of(unit, loaded.folder, (variants or {}).get(unit["variant"]))
                _warm_attention(unit, device, variant, (params or {}).get(unit["variant"]))
    if loaded.device is not None:
        torch.cuda.synchronize(loaded.device)
    took = 1e3 * (time.perf_counter() - start)
    log.info("set %s: warmed up in %.1f ms", loaded.name, took, extra={"facts": {"event": "warmup", "set": loaded.name, "ms": took}})
    return took


def _variant_of(unit: Mapping[str, Any], folder: Path, given: Variant | type[Variant] | None) -> Variant:
    from .find import is_file
    from .units import variant_of_unit

    if isinstance(given, type):
        return given(**unit.get("bind", {}))
    file, _, name = unit["variant"].partition(":")
    if given is None and is_file(file) and not (folder / file).is_file():
        raise VariantError(
            f"warmup runs the variant {unit['variant']} of the set, and there is no file {folder / file}.\n  required: the file where "
            f"the set names it\n  found: none; a pack holds kernels, not Python\n  do: copy {file} to {folder}, or pass "
            f"variants={{\"{unit['variant']}\": {name or 'TheClass'}}}"
        )
    return variant_of_unit(unit, folder) if given is None else given


def _warm_attention(unit: Mapping[str, Any], device: torch.device, variant: Variant, given: Mapping[str, Any] | None) -> None:
    from .batch import BatchAttention
    from .check import Case, invent
    from .run import attention
    from .sets import DTYPES

    dtype = DTYPES[unit["dtype"]]
    whole = all("key" in role for role in unit["roles"])  # else a set of the phase decode alone
    for rows in (1, 24, 80) if whole else (1,):
        heads, kv_heads, keys = 2, 2, 97 if unit.get("layout") == "paged-odd" else 96  # all of them one page
        case = Case("warmup", 1, rows, keys, heads, kv_heads)
        values = {**(invent(variant, case)[0]), **(given or {})}
        values = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        q = torch.zeros(1, rows, heads, unit["head_dim"], dtype=dtype, device=device)
        k = torch.zeros(1, keys, kv_heads, unit["head_dim"], dtype=dtype, device=device)
        v = torch.zeros(1, keys, kv_heads, unit["head_dim_v"], dtype=dtype, device=device)
        if unit["backend"] == "cpu" or (unit["layout"] == "contiguous" and whole and not unit["batch_invariant"]):
            attention(q, k, v, variant, **values)
        if unit["backend"] == "cpu" or unit["layout"] != "contiguous" or unit["batch_invariant"]:
            paged = unit.get("layout") != "contiguous"
            attn = BatchAttention(
                variant, num_heads=heads, num_kv_heads=kv_heads, head_dim=unit["head_dim"], head_dim_v=unit["head_dim_v"],
                page_size=keys if paged else None, dtype=dtype, max_requests=1, max_q_tokens=rows, max_pages=1,
                max_kv_tokens=keys, device=device, batch_invariant=bool(unit.get("batch_invariant")),
                shared_prefix=unit.get("layout") == "paged-shared",
                storage={n: x.dtype for n, x in values.items() if isinstance(x, torch.Tensor)},
            )  # fmt: skip
            to_plan = {n: x for n, x in values.items() if n in attn.plan_fields}
            indptr = [0, keys] if not paged else None
            table = {"block_table": [[0]], "kv_lens": [keys]} if paged else {}
            attn.plan([0, rows], indptr, **table, **to_plan)
            attn.run(q[0], (k, v) if paged else (k[0], v[0]), **{n: x for n, x in values.items() if n in attn.run_fields})


def _warm_append(unit: Mapping[str, Any], device: torch.device) -> None:
    from .append import append_kv
    from .rope import RoPE
    from .sets import DTYPES

    rotary = int(unit["rotary_dim"])
    rope = RoPE(rotary_dim=rotary, interleaved=bool(unit["interleaved"])) if rotary else None
    k = torch.zeros(1, 1, unit["head_dim"], dtype=DTYPES[unit["dtype"]], device=device)
    v = torch.zeros(1, 1, unit["head_dim_v"], dtype=DTYPES[unit["dtype"]], device=device)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    cached = (k.new_zeros(1, 1, 1, unit["head_dim"]), v.new_zeros(1, 1, 1, unit["head_dim_v"]))
    places = {"positions": slot.int()} if rope else {}
    append_kv(k, v, cached, slot_mapping=slot, rope=rope, **places)


def _warm_mask(device: torch.device) -> None:
    from .masks import custom_mask

    custom_mask(torch.zeros(1, 1, 1, dtype=torch.bool, device=device))


def _warm_merge(unit: Mapping[str, Any], device: torch.device) -> None:
    from .merge import merge_states
    from .sets import DTYPES

    outs = [torch.zeros(1, 1, unit["head_dim_v"], dtype=DTYPES[unit["dtype"]], device=device)] * 2
    lses = [torch.zeros(1, 1, device=device)] * 2
    merge_states(outs, lses, out_dtype=DTYPES[unit["out_dtype"]])


