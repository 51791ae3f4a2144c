"""What a machine has of what attngen needs. The library behind ``attngen doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import AttngenError


@dataclass(frozen=True)
class Finding:
    """One line: whether it is there, what was found and, where it is not there, what to do."""

    name: str
    ok: bool
    required: bool  # for the CPU backend
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding, the required ones first. Builds nothing but the host extension, and that only where it is missing
    and can be built."""
    return [_python(), _torch(), *map(_package, ("jinja2", "filelock")), _ninja(), _cxx(), _openmp(), _isa(), _cache(),
            _host(), _nvcc(), _gpu()]  # fmt: skip


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


def _from_error(name: str, required: bool, error: AttngenError) -> Finding:
    """A finding from the found: and do: lines of an error's message."""
    lines = [line.strip() for line in str(error).splitlines()]
    parts = {
        key: line.removeprefix(f"{key}: ") for key in ("found", "do") for line in lines if line.startswith(f"{key}:")
    }
    return Finding(name, False, required, parts.get("found", lines[0]), parts.get("do", ""))


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
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = compile_kernel({"probe.cpp": source}, recipe, Path(folder))
        except AttngenError as error:
            lines = [line for line in str(error).splitlines() if "error" in line]
            return Finding(
                "OpenMP", False, True, lines[-1] if lines else "no compiler", "apt install g++ (clang: libomp-dev)"
            )
    return Finding("OpenMP", True, True, f"a probe compiles and links in {result.seconds:.2f} s")


def _isa() -> Finding:
    from .choose import host_isa

    isa = host_isa()
    slow = "kernels are portable C++ here: correct, but slow" if isa == "generic" else ""
    return Finding("CPU features", True, True, f"{isa} on {platform.machine()}, {os.cpu_count()} CPUs", slow)


def _cache() -> Finding:
    from .cache import cache_root

    try:
        root = cache_root()
    except AttngenError as error:
        return _from_error("cache folder", True, error)
    folder = root
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        return Finding(
            "cache folder", False, True, f"{folder}: {error.strerror}", "set ATTNGEN_CACHE_DIR to a folder of yours"
        )
    return Finding("cache folder", True, True, f"{root} is writable")


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
