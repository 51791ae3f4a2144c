"""Load: a cache entry becomes a function of this process.

    LoadedKernel = load_kernel(Entry);  LoadedKernel.launch(packed parameter struct)

The host extension does the work. An installed package carries it built; a bare checkout builds it at first use, through
`torch.utils.cpp_extension` and ninja, but in a child process of ours, inside a private folder and lock of our cache:
cpp_extension's own lock waits forever for a killed build, serves another source's module under the same name and hides
the compiler's message on a second try (docs/build.md). None of that can happen to a folder that is used once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cache, counters
from .abi import LAUNCH_ABI
from .abi_cuda import CUDA_ABI
from .errors import BuildError, LoadError
from .isa import CPU_ISAS, host_isa
from .paths import PACKAGE

if TYPE_CHECKING:
    from typing_extensions import Buffer

HOST_SOURCES = sorted((PACKAGE / "csrc").iterdir())  # host.cpp and what it includes
HOST_FLAGS = ("-O2", "-std=c++17", "-fvisibility=hidden", "-g0")
# cpp_extension links torch's libraries. Nothing here needs them, if libstdc++ comes first: libc10 exports parts of it.
HOST_LINK = ("-s", "-Wl,--as-needed", "-lstdc++")
# Launch ABIs that this release can launch: its own and, where a release changes the number, the last one's.
CPU_ABIS, CUDA_ABIS = (LAUNCH_ABI,), (CUDA_ABI,)
PYTHON_ABI = importlib.machinery.EXTENSION_SUFFIXES[0]  # names version, ABI flags and platform
HOST_TIMEOUT_S = 600.0  # it takes 7 s

log = logging.getLogger("attngen.load")
_host: ModuleType | None = None
_cpu_kernels: dict[tuple[str, str], LoadedKernel] = {}  # of this process, by key and sha256
_host_lock = threading.Lock()


def _forget_lock() -> None:
    """In a forked child: the thread that may have held the lock in the parent does not exist here."""
    global _host_lock
    _host_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


class LoadedKernel(NamedTuple):
    """A kernel of this process.

    launch(params) runs it on its packed parameter struct (any buffer: bytes, bytearray, ctypes array) and returns when
    it is done; the GIL is released meanwhile. Raises RuntimeError where the kernel reports a status other than 0.
    """

    entry: cache.Entry
    launch: Callable[[Buffer], None]


def load_kernel(entry: cache.Entry) -> LoadedKernel:
    """Loads a verified entry. Raises LoadError for a library of another launch ABI or CPU, or one that does not link here."""
    abi = _check_kind(entry, "cpu", CPU_ABIS)
    known = _cpu_kernels.get((entry.key, entry.manifest["sha256"]))
    if known is not None:  # its file may be gone by now
        return known
    isa, here = entry.manifest.get("isa", "generic"), host_isa()
    if isa not in CPU_ISAS[CPU_ISAS.index(here) :]:  # it would end in an illegal instruction
        raise _unloadable(entry.folder, f"a kernel that a CPU with {here} runs", f"one for {isa}")
    module = host()
    try:
        with entry.opened() as name, counters.timed("loads", "load_ms"):
            address = module.load_cpu(name, abi)
    except RuntimeError as error:
        raise _unloadable(entry.artifact, f"a library of launch ABI {abi}", str(error)) from None
    made = LoadedKernel(entry, functools.partial(module.launch_cpu, address))
    return _cpu_kernels.setdefault((entry.key, entry.manifest["sha256"]), made)


def load_kept(entry: cache.Entry, again: Callable[[], cache.Entry]) -> LoadedKernel:
    """``load_kernel``, where the entry may be removed between its check and its loading, by a prune of another process:
    ``again`` finds or builds it anew."""
    for _ in range(3):
        try:
            return load_kernel(entry)
        except LoadError:
            if entry.exists():
                raise
            log.warning("%s was removed as it was to be loaded: once more", entry.folder)
            entry = again()
    return load_kernel(entry)


def load_cubin(
    entry: cache.Entry, symbol: str, device: int, threads: int, shared_bytes: int, dependent: bool
) -> Any:
    """Loads a cubin on CUDA device `device`: a `CudaKernel` with .launch(params, grid_x, grid_y, stream) and
    .blocks_per_sm(). `dependent` launches may overlap the end of the kernel before them on the stream.

    Raises LoadError for an entry of another kind, launch ABI or architecture, one that a newer driver must load, or where
    the driver refuses it; CacheError where the cubin is not what its manifest says.
    """
    _check_kind(entry, "cubin", CUDA_ABIS)
    _check_device(entry, device)
    content, module = entry.content(), host()
    try:
        with counters.timed("loads", "load_ms"):
            found = module.CudaKernel(
                content, symbol, device=device, threads=threads, shared_bytes=shared_bytes, dependent=dependent
            )
    except RuntimeError as error:
        raise _unloadable(entry.artifact, f"a cubin for CUDA device {device}", str(error)) from None
    if entry.on_disk:
        _mark_in_use(entry.artifact)
    return found


def _check_kind(entry: cache.Entry, kind: str, abis: tuple[str, ...]) -> str:
    """The entry's launch ABI, if it is of this kind and one of ``abis``."""
    found, abi = entry.manifest.get("kind"), entry.manifest.get("abi")
    if found != kind or abi not in abis:
        raise _unloadable(entry.folder, f"kind {kind}, launch ABI {' or '.join(abis)}", f"kind {found}, launch ABI {abi}")
    return abi


def _check_device(entry: cache.Entry, device: int) -> None:
    """Raises LoadError where the device or its driver cannot run the entry's code."""
    import torch

    isa = str(entry.manifest.get("isa", ""))
    major, minor = torch.cuda.get_device_capability(device)
    wanted = isa.rstrip("af")
    runs = wanted.isdigit() and int(wanted[:-1]) == major and (int(wanted[-1]) == minor if isa.endswith("a") else int(wanted[-1]) <= minor)
    if not runs:
        raise _unloadable(entry.folder, f"a cubin for compute capability {major}.{minor}", f"one for sm_{isa}")
    least = min_driver(entry.manifest)
    if least and host().driver_version() < least:
        raise LoadError(
            f"a kernel that this machine's NVIDIA driver is too old for: {entry.folder}\n  required: a driver of CUDA "
            f"{cuda_version(least)} or newer (cuDriverGetVersion)\n  found: CUDA {cuda_version(host().driver_version())}\n"
            f"  do: update the driver, or build the kernels with a toolkit of CUDA {host().driver_version() // 1000}"
        )


def min_driver(manifest: Any) -> int:
    """The oldest driver, as cuDriverGetVersion counts, that runs a cubin of this manifest: any of the compiler's major
    version. 0 where the manifest does not say."""
    found = re.search(r"release (\d+)\.", str(manifest.get("compiler", "")))
    return 1000 * int(found[1]) if found else 0


def cuda_version(number: int) -> str:
    """A version as cuDriverGetVersion counts, as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _mark_in_use(path: Path) -> None:
    """Maps a page of the file for the process's life: /proc then tells `cache prune` that it is in use, as it does of a
    library. A Python mmap would keep a descriptor."""
    with contextlib.suppress(OSError, AttributeError), open(path, "rb", buffering=0) as file:
        _mmap()(None, 1, 1, 2, file.fileno(), 0)  # PROT_READ, MAP_PRIVATE


@functools.cache
def _mmap() -> Any:
    import ctypes

    mmap = ctypes.CDLL(None).mmap
    mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return mmap


def host() -> ModuleType:
    """The host extension: from the package, from the cache, or built now (a bare checkout, once).

    Raises BuildError without a compiler or Python's headers, CacheError, LoadError.
    """
    global _host
    if _host is None:
        with _host_lock:
            if _host is None:
                _host = _find_host()
    return _host


def _find_host() -> ModuleType:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in HOST_SOURCES)).hexdigest()  # as setup.py
    try:
        packaged = importlib.import_module("attngen._host")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            log.warning("the package's host extension does not load here (%s): building another", error)
    else:
        if packaged.digest == digest:
            return packaged
        log.info("the host extension at %s is older than %s", packaged.__file__, HOST_SOURCES[0].parent)
    key = _host_key(digest)
    entry, hit = cache.default().get_or_build(key, functools.partial(_build_host, digest), shelf="host", title="host extension")
    log.info("host extension %s at %s", "found" if hit else "built", entry.artifact)
    spec = importlib.util.spec_from_file_location("attngen._host", entry.artifact)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _unloadable(entry.artifact, f"a module for {PYTHON_ABI}", str(error)) from error
    return module


def _host_key(digest: str) -> str:
    """Everything that decides whether one build serves another process: source, flags, Python's ABI, machine, libc."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    facts = (cache.FORMAT, digest, HOST_FLAGS, HOST_LINK, PYTHON_ABI, os.uname().machine, libc)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _build_host(digest: str, folder: Path) -> dict[str, Any]:
    """Builds the host extension in `folder`, by a fresh process that shares no lock or version suffix with this one."""
    import shlex
    import sysconfig

    from . import build

    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise BuildError(
            f"no Python headers, which the host extension is built with (once).\n  required: {header}\n"
            f"  found: no such file\n  do: apt install python3-dev (or your Python's -dev package), or "
            f"install attngen from a wheel"
        )
    compiler, ninja = build.find_cxx(), build.find_ninja()
    # cpp_extension quotes $CXX as one word, so that "ccache g++" needs a script of one word.
    wrapper = folder / "cxx"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(compiler.argv)} "$@"\n')
    wrapper.chmod(0o700)
    names = [path.name for path in HOST_SOURCES]
    for path in HOST_SOURCES:
        (folder / path.name).write_bytes(path.read_bytes())
    flags = [*HOST_FLAGS, shlex.quote(f'-DATTNGEN_HOST_DIGEST="{digest}"')]
    program = f"""
import pybind11
from torch.utils.cpp_extension import load
load(name="_host", sources=["host.cpp"], build_directory=".", with_cuda=False, extra_cflags={flags},
     extra_include_paths=[pybind11.get_include()], extra_ldflags={[*HOST_LINK]})
"""
    kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
    path = [os.path.dirname(ninja.path), os.path.dirname(compiler.path), os.environ.get("PATH", os.defpath)]
    env = {
        **kept,
        "PATH": os.pathsep.join(path),
        "CXX": os.fspath(wrapper),
        "LC_ALL": "C",
        "TMPDIR": os.fspath(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log.info("building the host extension, once for this Python (about 10 s)")
    start = time.perf_counter()
    status, text, _ = build.run_group([sys.executable, "-c", program], folder, env, HOST_TIMEOUT_S)
    seconds = time.perf_counter() - start
    if status != 0 or not (folder / "_host.so").is_file():
        raise BuildError(
            f"the host extension does not build.\n  required: {HOST_SOURCES[0].parent} compiled by {compiler.version} through "
            f"torch.utils.cpp_extension\n  found: {'no end in time' if status is None else f'exit status {status}'}\n"
            f"  do: mend what the message below names, or install attngen from a wheel\n\n{text.strip()[-6000:]}"
        )
    for path_left in folder.iterdir():
        if path_left.name not in (*names, "_host.so", "build.ninja"):
            path_left.unlink()
    return {"kind": "host", "artifact": "_host.so", "sources": names, "seconds": seconds,
            "compiler": compiler.version, "python": PYTHON_ABI}  # fmt: skip


def noexec(path: Path) -> bool:
    """Whether ``path`` lies in a file system that is mounted noexec: no library loads from there, cubins do."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False


def _unloadable(path: Path, required: str, found: str) -> LoadError:
    remedy = "run `attngen cache clear`; it is built again at its next use"
    if path.suffix == ".so" and noexec(path):
        found += "; its file system is mounted noexec"
        remedy = "mount it without noexec, set ATTNGEN_CACHE_DIR to a folder elsewhere, or serve from a pack, which needs none"
    return LoadError(f"a library that this process cannot load: {path}\n  required: {required}\n  found: {found}\n  do: {remedy}")
