"""What a machine has of what attngen needs. The library behind ``attngen doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .counters import jit_mode
from .errors import AttngenError, CacheError
from .trust import check_private


@dataclass(frozen=True)
class Finding:
    """One line: whether it is there, what was found and, where it is not there, what to do."""

    name: str
    ok: bool
    required: bool  # for the CPU backend
    found: str
    remedy: str = ""
    wrong: bool = False  # something is there, but damaged or refused

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else "wrong" if self.wrong else "missing" if self.required else "absent"


_TO_BUILD = {"jinja2", "filelock", "ninja", "C++ compiler", "OpenMP", "cache folder"}


def examine() -> list[Finding]:
    """Every finding, the required ones first: what builds is required unless ATTNGEN_JIT=off. Builds nothing but the host extension,
    and that only where it is missing and can be built."""
    found = [_python(), _torch(), *map(_package, ("jinja2", "filelock")), _ninja(), _cxx(), _openmp(), _isa(), _cache(),
             _cache_space(), _cache_locks(), _cache_entries(), *_layers(), _jit(), _keys(), _host(), _nvcc(), _gpu(),
             _driver()]  # fmt: skip
    return found if compiles() else [_not_to_build(f) if f.name in _TO_BUILD else f for f in found]


def compiles() -> bool:
    """Whether this process may compile what is not there; also where ATTNGEN_JIT is none of its values."""
    try:
        return jit_mode() != "off"
    except AttngenError:
        return True


def _not_to_build(f: Finding) -> Finding:
    remedy = f.remedy if f.ok or f.wrong else "none needed: ATTNGEN_JIT=off builds nothing"
    return replace(f, required=False, remedy=remedy)


def _python() -> Finding:
    version = platform.python_version()
    ok = sys.version_info >= (3, 10)
    return Finding("Python", ok, True, f"{version} at {sys.executable}", "" if ok else "install Python 3.10 or newer")


def _torch() -> Finding:
    import torch

    release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    ok = release >= (2, 6)
    found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    return Finding("torch", ok, True, found, "" if ok else "pip install 'torch>=2.6'")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, True, "not installed", f"pip install {name}")


def _tool(name: str, required: bool, find: Callable[[], object], show: Callable[[object], str]) -> Finding:
    try:
        return Finding(name, True, required, show(find()))
    except AttngenError as error:
        return _from_error(name, required, error)


def _from_error(name: str, required: bool, error: AttngenError, wrong: bool = False) -> Finding:
    """A finding from the found: and do: lines of an error's message."""
    lines = [line.strip() for line in str(error).splitlines()]
    parts = {
        key: line.removeprefix(f"{key}: ") for key in ("found", "do") for line in lines if line.startswith(f"{key}:")
    }
    return Finding(name, False, required, parts.get("found", lines[0]), parts.get("do", ""), wrong)


def _ninja() -> Finding:
    from .build import find_ninja

    return _tool("ninja", True, find_ninja, lambda tool: tool.path)


def _cxx() -> Finding:
    from .build import find_cxx

    return _tool("C++ compiler", True, find_cxx, lambda tool: f"{tool.version} at {tool.path}")


def _openmp() -> Finding:
    """A kernel is compiled with -fopenmp; some clang installations lack its library."""
    from .build import Recipe, compile_kernel

    source = '#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
    recipe = Recipe("cpu", ("probe.cpp",), ("-O0", "-fopenmp"), ("-fopenmp",))
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = compile_kernel({"probe.cpp": source}, recipe, Path(folder))
    except AttngenError as error:
        lines = [line for line in str(error).splitlines() if "error" in line]
        return Finding("OpenMP", False, True, lines[-1] if lines else "no compiler", "apt install g++ (clang: libomp-dev)")
    except OSError as error:  # a read-only root: compilers need one too
        return Finding("OpenMP", False, True, f"not tried: {error.strerror}", "set TMPDIR to a folder that can be written")
    return Finding("OpenMP", True, True, f"a probe compiles and links in {result.seconds:.2f} s")


def _isa() -> Finding:
    from .isa import host_isa

    isa = host_isa()
    slow = "kernels are portable C++ here: correct, but slow" if isa == "generic" else ""
    return Finding("CPU features", True, True, f"{isa} on {platform.machine()}, {os.cpu_count()} CPUs", slow)


def _cache() -> Finding:
    from .cache import cache_root
    from .load import noexec

    try:
        root = cache_root()
    except AttngenError as error:
        return _from_error("cache folder", True, error)
    folder = _existing(root)
    try:
        check_private(root)
    except AttngenError as error:
        return _from_error("cache folder", True, error, wrong=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        return Finding(
            "cache folder", False, True, f"{folder}: {error.strerror}", "set ATTNGEN_CACHE_DIR to a folder of yours"
        )
    if noexec(folder):
        return Finding("cache folder", False, True, f"{folder} is mounted noexec: no library of it loads",
                       "set ATTNGEN_CACHE_DIR to a folder elsewhere, or serve from a pack", wrong=True)  # fmt: skip
    return Finding("cache folder", True, True, f"{root} is writable")


def _existing(folder: Path) -> Path:
    """It, or its nearest parent that is there."""
    while not os.path.exists(folder):  # no error where it may not be looked for
        folder = folder.parent
    return folder


def _cache_space() -> Finding:
    from .cache import default

    try:
        store = default()
        folder = _existing(store.root)
        free, used = shutil.disk_usage(folder).free, store.size() if store.root.is_dir() else 0
    except (AttngenError, OSError) as error:
        return Finding("cache space", False, False, str(error).splitlines()[0], "set ATTNGEN_CACHE_DIR to a folder of yours")
    ok = free > 256 << 20
    remedy = "" if ok else "free some space, or run attngen cache prune --max-size 500M"
    return Finding("cache space", ok, False, f"{used / 1e6:.0f} MB used, {free / 1e9:.1f} GB free", remedy)


def _cache_locks() -> Finding:
    """Whether a second process is kept out by a lock file there."""
    from .cache import default

    program = "import sys, filelock\ntry: filelock.FileLock(sys.argv[1]).acquire(timeout=0)\nexcept filelock.Timeout: sys.exit(7)"
    try:
        from filelock import FileLock

        with tempfile.TemporaryDirectory(dir=_existing(default().root)) as probe:
            path = os.path.join(probe, "lock")
            with FileLock(path):
                done = subprocess.run([sys.executable, "-c", program, path], capture_output=True)
    except (AttngenError, ImportError, OSError, NotImplementedError) as error:
        return Finding("cache locks", False, False, f"not tried: {error}".splitlines()[0], "none needed to serve what is there")
    ok = done.returncode == 7
    found = "work between processes" if ok else "do not keep a second process out"
    return Finding("cache locks", ok, False, found, "" if ok else "none: several processes may compile the same kernel, correctly")


def _cache_entries() -> Finding:
    from .cache import default
    from .prune import verify

    try:
        checked = list(verify(default()))
    except AttngenError as error:
        return _from_error("cache entries", False, error, wrong=True)
    except OSError as error:
        return Finding("cache entries", False, False, str(error), "none needed to serve from other layers", wrong=True)
    bad = [folder for _, folder, error in checked if error]
    found = f"{len(checked)} whole" if not bad else f"{len(bad)} of {len(checked)} damaged, {bad[0]} first"
    remedy = "nothing: they are built again at their next use" if compiles() else "import their pack: ATTNGEN_JIT=off builds nothing"
    return Finding("cache entries", not bad, False, found, remedy if bad else "", wrong=bool(bad))


def _layers() -> list[Finding]:
    from . import layers

    found = []
    try:
        asked = [*layers.before(), *layers.after()]
    except AttngenError as error:
        return [_from_error("cache layers", False, error, wrong=True)]
    for layer in asked:
        if isinstance(layer, layers.RemoteLayer):
            found.append(_remote(layer))
            continue
        where = getattr(layer, "root", None)
        try:
            if isinstance(layer, layers.FolderLayer):
                layer.check_private()
            keys = layer.keys()
            remedy = "" if keys else f"import a pack into it: attngen cache import PACK --into {where}"
            place = f" in {where}" if where else ""
            refused = _refused(layer, keys)
            if refused:
                of = "all" if len(refused) == len(keys) else str(len(refused))
                place += f", {of} refused: {str(refused[0]).splitlines()[0]}"
                remedy = _from_error("", False, refused[0]).remedy or "import, copy or install its kernels again"
            ok = bool(keys) and not refused
            found.append(Finding(f"layer {layer.name}", ok, False, f"{len(keys)} kernels{place}", remedy, wrong=bool(refused)))
        except (AttngenError, OSError) as error:
            found.append(Finding(f"layer {layer.name}", False, False, str(error).splitlines()[0], "mend or remove it", wrong=True))
    found += [Finding(f"layer {name}", False, False, why, "mend or remove it", wrong=True) for name, why in layers.troubles().items()]
    return found


def _refused(layer: Any, keys: list[str]) -> list[CacheError]:
    """Why lookups pass kernels of a layer over: damaged, or not signed."""
    errors = []
    for key in keys:
        try:
            layer.lookup(key, "kernels")
        except CacheError as error:
            errors.append(error)
        except OSError as error:
            errors.append(CacheError(f"{key[:12]} cannot be read: {error}"))
    return errors


def _remote(layer: Any) -> Finding:
    try:
        there = layer.answers()
    except (AttngenError, OSError) as error:
        remedy = "mend the network or its credentials, or unset ATTNGEN_REMOTE_CACHE"
        return Finding("layer remote", False, False, f"{layer.url}: {error}", remedy)
    remedy = "" if there else f"attngen cache push {layer.url}"
    return Finding("layer remote", there, False, f"{layer.url} {'answers' if there else 'is empty'}", remedy)


def _jit() -> Finding:
    try:
        mode = jit_mode()
    except AttngenError as error:
        return Finding("ATTNGEN_JIT", False, True, str(error), "unset it")
    what = {"on": "compiled", "off": "an error", "warn": "compiled, with a warning"}
    return Finding("ATTNGEN_JIT", True, False, f"{mode}: what is not there is {what[mode]}")


def _keys() -> Finding:
    from . import trust

    if not trust.required():
        return Finding("trusted keys", True, False, "none required: unsigned packs are taken")
    try:
        keys = trust.trusted_keys(os.environ["ATTNGEN_TRUSTED_KEYS"])
    except AttngenError as error:
        return _from_error("trusted keys", True, error)
    return Finding("trusted keys", True, False, f"{len(keys)}: packs must be signed by one of them")


def _host() -> Finding:
    from .load import host

    packaged = importlib.util.find_spec("attngen._host") is not None
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return _tool(
        "host extension", True, host,
        lambda module: f"{module.__file__}" + ("" if packaged else f" (built here with {headers})"),
    )  # fmt: skip


def _nvcc() -> Finding:
    from .build import find_nvcc

    return _tool("CUDA compiler", False, find_nvcc, lambda tool: f"{tool.version} at {tool.path}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device"
        return Finding("CUDA device", False, False, why, "none needed: attngen.attention runs on the CPU")
    return Finding("CUDA device", True, False, torch.cuda.get_device_name())


def _driver() -> Finding:
    from .load import cuda_version, host, min_driver

    try:
        version = host().driver_version()
    except (AttngenError, RuntimeError) as error:
        remedy = "none needed on the CPU; for a GPU, install NVIDIA's driver"
        return Finding("NVIDIA driver", False, False, str(error).splitlines()[0], remedy)
    from .cache import default

    try:
        entries = list(default().entries())
    except AttngenError:  # the cache folder's finding says so
        entries = []
    least = max((min_driver(entry.manifest) for entry in entries if entry.manifest.get("kind") == "cubin"), default=0)
    ok = version >= least
    found = f"CUDA {cuda_version(version)}"
    return Finding("NVIDIA driver", ok, False, found if ok else f"{found}; kernels in the cache need {cuda_version(least)}",
                   "" if ok else "update the driver, or build the kernels with its toolkit")  # fmt: skip
