"""Build: rendered source in, one artifact out, by ninja in a private folder.

    BuildResult = compile_kernel({file name: text}, Recipe, folder)

We write our own build.ninja. `torch.utils.cpp_extension.load` cannot build a .cu file under a CPU-only torch, costs
90 s where torch's headers meet nvcc, and its lock waits forever after a killed build (docs/build.md). A CPU kernel
is compiled and linked by separate edges, so that a floating-point flag of the compiler can never reach the linker,
where it would turn denormals off for the whole process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import BuildError

TIMEOUT_S = 600.0  # a kernel takes 1-3 s; this only bounds a compiler that hangs
LOG_LINES = 60  # of the compiler's output shown in an error; build.log has all of it
KEPT_FAILURES = 20  # failed builds kept for the user to read

# A linker driver that sees one of these links crtfastmath.o, which sets flush-to-zero for the whole process.
_NOT_FOR_LINKING = {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"}

# What a compiler may see of the caller's environment. CPATH, LIBRARY_PATH, NVCC_APPEND_FLAGS, LD_PRELOAD and their like
# would change the artifact behind the cache key's back.
_ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT")

running: dict[int, int] = {}  # by thread: the process, and session, of the build that it waits for

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_GCC_ERROR = re.compile(r"^(?P<file>[^\s:][^:\n]*):(?P<line>\d+):(?:\d+:)? (?:fatal )?error: ", re.M)
_TIMES = re.compile(r"^.*Compile time = .*\n", re.M)  # of ptxas: equal builds have equal logs
_NVCC_ERROR = re.compile(r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?:catastrophic )?error", re.M)


@dataclass(frozen=True)
class Tool:
    """An external program: the argv that starts it, and the first line of its version text."""

    argv: tuple[str, ...]
    version: str

    @property
    def path(self) -> str:
        return self.argv[0]


@dataclass(frozen=True)
class Recipe:
    """How source becomes an artifact.

    kind "cpu" compiles every file of `sources` and links them into a shared library of the plain C ABI; kind "cubin"
    runs one `nvcc -cubin` over the only source. Flags are given one word each and hold no paths of this machine.
    """

    kind: Literal["cpu", "cubin"]
    sources: tuple[str, ...]
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()
    artifact: str = "kernel.so"

    def __post_init__(self) -> None:
        unsafe = _NOT_FOR_LINKING.intersection(self.link_flags)
        if unsafe:
            raise ValueError(f"{sorted(unsafe)} on a link line turns denormals off in the whole process; compile only")
        if self.kind == "cubin" and (len(self.sources) != 1 or self.link_flags):
            raise ValueError("a cubin is made of one source and is not linked")


@dataclass(frozen=True)
class BuildResult:
    """A finished build. `log` is everything the compiler printed (with -Xptxas -v: the register report); `cpu_seconds` do not
    count what other programs took meanwhile."""

    artifact: Path
    seconds: float
    cpu_seconds: float
    log: str
    compiler: str


def compile_kernel(
    files: Mapping[str, str],
    recipe: Recipe,
    folder: Path,
    *,
    locate: Callable[[str, int], str | None] | None = None,
    keep_failed: Path | None = None,
    timeout: float = TIMEOUT_S,
) -> BuildResult:
    """Writes `files` into the private `folder`, builds them there and leaves sources, artifact and build.log.

    locate: maps (file name, line) of the rendered source to the "file:line" of the user's hook it came from, or None.
    keep_failed: where the folder moves when the compiler refuses, so that the path in the error stays valid.
    Raises BuildError: no compiler or ninja, a compile error, a timeout.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"a source file needs a plain name, found {name!r}")
    ninja, compiler = find_ninja(), find_cxx() if recipe.kind == "cpu" else find_nvcc()
    folder = folder.resolve()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "build.ninja").write_text(_build_ninja(recipe, compiler), encoding="utf-8")

    start = time.perf_counter()
    status, log, cpu_seconds = run_group([*ninja.argv, "-f", "build.ninja"], folder, _clean_environment(folder, compiler), timeout)
    seconds = time.perf_counter() - start
    log = _TIMES.sub("", log)
    (folder / "build.log").write_text(log, encoding="utf-8")
    artifact = folder / recipe.artifact
    if status != 0 or not artifact.is_file():
        kept = _keep(folder, keep_failed) if keep_failed else folder
        raise BuildError(_explain_failure(recipe, compiler, status, log, kept, locate, timeout))
    for leftover in (".ninja_log", ".ninja_deps", *map(_object_name, recipe.sources)):
        (folder / leftover).unlink(missing_ok=True)
    return BuildResult(artifact, seconds, cpu_seconds, log, compiler.version)


def run_group(argv: list[str], cwd: Path, env: Mapping[str, str], timeout: float) -> tuple[int | None, str, float]:
    """Runs a command in its own process group, output captured. A timeout or an interrupt ends the whole group.

    Returns (exit status, output, CPU seconds); status None says that the time was up.
    """
    process = subprocess.Popen(
        argv, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    running[threading.get_ident()] = process.pid
    try:
        output = _read_all(process, timeout)
        _, ended, usage = os.wait4(process.pid, 0)  # Popen.wait would not say what it used
        process.returncode = os.waitstatus_to_exitcode(ended)
        status: int | None = process.returncode
        cpu_seconds = usage.ru_utime + usage.ru_stime
    except subprocess.TimeoutExpired as late:
        output, status, cpu_seconds = late.output + _end_group(process), None, 0.0
    except BaseException:
        _end_group(process)
        raise
    finally:
        running.pop(threading.get_ident(), None)
    return status, output.decode("utf-8", "replace"), cpu_seconds


def _read_all(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    """What a process prints until it closes its output, as its last act. Raises TimeoutExpired."""
    assert process.stdout is not None
    parts, deadline = [], time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(process.args, timeout, b"".join(parts))
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                process.stdout.close()
                return b"".join(parts)
            parts.append(part)


def _end_group(process: subprocess.Popen[bytes]) -> bytes:
    """Ends a group. ninja runs each compiler in a group of its own, and passes SIGTERM on to them, unlike SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[0]
    return b""  # what is left ignores SIGTERM and holds the pipe open


# ---- tools -----------------------------------------------------------------------------------------------------------


def find_cxx() -> Tool:
    """The C++ compiler: $CXX (which may hold a launcher: "ccache g++"), else g++, clang++ or c++ on the PATH."""
    wanted = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    for words in candidates:
        found = [shutil.which(word) or word for word in words[:1]] + words[1:]
        if os.path.isabs(found[0]) and os.access(found[0], os.X_OK):
            # Every word that is a program becomes a full path: ninja's shell then needs nothing of the PATH.
            argv = tuple(word if word.startswith("-") else shutil.which(word) or word for word in found)
            return Tool(argv, _version(argv))
    looked = f"CXX={wanted!r}" if wanted else "g++, clang++ and c++"
    raise BuildError(
        f"no C++ compiler.\n  required: a C++17 compiler, to build a kernel that is not in the cache\n"
        f"  found: nothing executable for {looked} on PATH={os.environ.get('PATH', '')}\n"
        f"  do: apt install g++ (conda: conda install cxx-compiler), or set CXX to a compiler"
    )


def find_nvcc() -> Tool:
    """nvcc: below $CUDA_HOME or $CUDA_PATH, else on the PATH, in /usr/local/cuda or in PyPI's nvidia/cu13 folder."""
    for root in cuda_roots():
        nvcc = root / "bin" / "nvcc"
        if os.access(nvcc, os.X_OK):
            return Tool((str(nvcc),), _version((str(nvcc),)))
    raise BuildError(
        f"no CUDA compiler.\n  required: nvcc of CUDA 12 or newer, to build a CUDA kernel that is not in the cache\n"
        f"  found: no bin/nvcc below CUDA_HOME={os.environ.get('CUDA_HOME', '')!r}, none on PATH="
        f"{os.environ.get('PATH', '')}, none in /usr/local/cuda\n"
        f"  do: pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt, or "
        f"install the CUDA toolkit and set CUDA_HOME to its root"
    )


def find_ninja() -> Tool:
    """ninja: from the `ninja` package, else from the PATH."""
    try:
        import ninja

        packaged = os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        packaged = ""
    path = packaged if os.access(packaged, os.X_OK) else shutil.which("ninja")
    if not path:
        raise BuildError(
            "no ninja.\n  required: ninja, which runs the compilers\n  found: neither the Python package `ninja` nor a "
            f"program on PATH={os.environ.get('PATH', '')}\n  do: pip install ninja"
        )
    return Tool((path,), "ninja")


def cuda_roots() -> list[Path]:
    """Toolkit roots, in order of preference. Where nvcc on the PATH is a wrapper script, it is asked for its root."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path:
        root = Path(os.path.realpath(on_path)).parent.parent
        if not (root / "nvvm").is_dir():
            root = _told_root(on_path) or root
        roots.append(root)
    return [*roots, Path("/usr/local/cuda"), Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"]


@functools.cache
def _told_root(nvcc: str) -> Path | None:
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    return Path(os.path.normpath(top[1].strip())) if top else None


@functools.cache
def _version(argv: tuple[str, ...]) -> str:
    """The version line of a compiler; g++ prints it first, nvcc last but one."""
    done = subprocess.run([*argv, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        raise BuildError(
            f"a compiler that does not run.\n  required: {shlex.join(argv)} --version\n"
            f"  found: exit status {done.returncode}: {done.stderr.strip()[:500]}\n  do: repair or replace it"
        )
    return next((line for line in lines if "release" in line), lines[0])


def _clean_environment(folder: Path, compiler: Tool) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    kept["PATH"] = os.pathsep.join(filter(None, [os.path.dirname(compiler.path), kept.get("PATH"), os.defpath]))
    # Temporary files go where they are collected with the folder; messages in English, for _GCC_ERROR.
    return {**kept, "TMPDIR": str(folder), "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}


# ---- build.ninja -----------------------------------------------------------------------------------------------------


def _object_name(source: str) -> str:
    return source + ".o"


def _build_ninja(recipe: Recipe, compiler: Tool) -> str:
    def words(*flags: str) -> str:
        return shlex.join(flags).replace("$", "$$")

    # Source names are relative to the folder, so that no path of this machine gets into the artifact.
    head = ["ninja_required_version = 1.5", f"compiler = {words(*compiler.argv)}"]
    flags = f"flags = {words(*recipe.compile_flags)}"
    if recipe.kind == "cubin":
        edges = [
            flags, "rule cubin", "  command = $compiler $flags -cubin -o $out $in",
            f"build {recipe.artifact}: cubin {recipe.sources[0]}",
        ]  # fmt: skip
    else:
        objects = [_object_name(source) for source in recipe.sources]
        edges = [
            flags, f"link_flags = {words(*recipe.link_flags)}",
            "rule compile", "  command = $compiler $flags -fPIC -ffile-prefix-map=\"$$PWD\"=. -c $in -o $out",
            "rule link", "  command = $compiler -shared -s $in $link_flags -o $out",
            *(f"build {out}: compile {source}" for out, source in zip(objects, recipe.sources, strict=True)),
            f"build {recipe.artifact}: link {' '.join(objects)}",
        ]  # fmt: skip
    return "\n".join([*head, *edges, ""])


# ---- failures --------------------------------------------------------------------------------------------------------


def _keep(folder: Path, kept: Path) -> Path:
    """Moves a failed build to `kept`, replaces an earlier one of that key, keeps KEPT_FAILURES of them."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    try:
        folder.rename(kept)
    except OSError:  # another process keeps the same failure at this moment: its files say the same
        return kept if kept.is_dir() else folder
    keep_newest(kept.parent, KEPT_FAILURES)
    return kept


def keep_newest(folder: Path, count: int) -> None:
    """Removes all but the `count` newest folders in `folder`; other processes may do the same meanwhile."""
    aged = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            aged.append((path.stat().st_mtime, path))
    for _, path in sorted(aged)[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def _explain_failure(
    recipe: Recipe,
    compiler: Tool,
    status: int | None,
    log: str,
    kept: Path,
    locate: Callable[[str, int], str | None] | None,
    timeout: float,
) -> str:
    errors = sorted((m.start(), m["file"], int(m["line"])) for p in (_GCC_ERROR, _NVCC_ERROR) for m in p.finditer(log))
    hooks: list[str] = []
    for _, file, line in errors:
        hook = locate(os.path.basename(file), line) if locate else None
        if hook and hook not in hooks:
            hooks.append(hook)
    if status is None:
        found = f"no end after {timeout:g} s; the compiler and its children were killed"
    elif errors:
        found = f"{len(errors)} error(s), the first at {kept / os.path.basename(errors[0][1])}:{errors[0][2]}"
    else:
        found = f"exit status {status}"
    lines = log.strip().splitlines()
    shown = lines[:LOG_LINES] + [f"... {len(lines) - LOG_LINES} more lines in build.log"] * (len(lines) > LOG_LINES)
    return "\n".join(
        [
            "the compiler refused a kernel.",
            f"  required: source that {compiler.version} compiles",
            f"  found: {found}",
            *(f"  hook: {hook}" for hook in hooks),
            f"  source: {', '.join(str(kept / source) for source in recipe.sources)}",
            "  do: mend the hook if the message below speaks of it; else report the source and this message",
            "",
            *shown,
        ]
    )
