"""A tiny kernel of the launch ABI, for tests of what stands between source and call."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attngen
from attngen.abi import LAUNCH_ABI
from attngen.build import Recipe, compile_kernel

# Adds 1 to n floats in parallel; status 7 for a negative n.
SOURCE = f"""
extern "C" const char attngen_abi[] = "{LAUNCH_ABI}";
struct Params {{ float* x; long n; int threads; }};
extern "C" int attngen_attention(const Params* p) {{
    if (p->n < 0) return 7;
#pragma omp parallel for num_threads(p->threads)
    for (long i = 0; i < p->n; i++) p->x[i] += 1;
    return 0;
}}
"""
RECIPE = Recipe("cpu", ("kernel.cpp",), ("-O2", "-fopenmp"), ("-fopenmp",))
KEY = "ab" + "0" * 62
PARAMS = struct.Struct("=qqi4x")


def builder(source: str = SOURCE, recipe: Recipe = RECIPE, **more: Any) -> Callable[[Path], Mapping[str, Any]]:
    """A build function for `Cache.get_or_build`."""

    def build(folder: Path) -> dict[str, Any]:
        result = compile_kernel({"kernel.cpp": source}, recipe, folder)
        return {
            "kind": "cpu", "abi": LAUNCH_ABI, "artifact": result.artifact.name, "sources": ["kernel.cpp"],
            "compiler": result.compiler, "seconds": result.seconds, **more,
        }  # fmt: skip

    return build


def python(program: str, *args: object, **env: str) -> subprocess.Popen[str]:
    """Starts a Python process that imports the same attngen and this module."""
    where = [Path(attngen.__file__).parent.parent, Path(__file__).parent]
    path = os.pathsep.join([*map(str, where), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)], env={**os.environ, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 300) -> str:
    """Its output, after it ended well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def in_child(work: Callable[[], object], *, nobody: bool = False, timeout: int = 60) -> str:
    """Runs `work` in a forked child and returns the text of what it returned or raised.

    nobody: without root's rights, if we have them. A child that hangs is killed by its alarm, and fails the test.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        import signal

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout)
        try:
            if nobody and os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}: {text}"
    return text
