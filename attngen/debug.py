"""The debug ladder: ATTNGEN_DEBUG=1 ... 6 prints to stderr what each kernel is, as it is loaded.

    1 hit or built, from which layer    3 the traced hooks      5 compiler, flags and its report (registers, spills)
    2 configuration, losing candidates  4 the rendered source   6 the machine code

Each rung has those below it. All of it is read from the cache entry, so it works on hits as on misses; no rung is part
of a key.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from typing import Any

from .entry import Entry
from .errors import CacheError, ParameterError


def level() -> int:
    """$ATTNGEN_DEBUG as a number. Raises ParameterError for what is no rung."""
    text = os.environ.get("ATTNGEN_DEBUG", "").strip() or "0"
    if text not in "0123456" or len(text) > 1:
        raise ParameterError(f"ATTNGEN_DEBUG={text}: required a number from 0 to 6; unset it or mend it")
    return int(text)


def show(entry: Entry, hit: bool, seconds: float, kernel: Any = None, choice: Any = None) -> None:
    """Print what the rungs say of a loaded entry. ``kernel``: a cuda.Specialised; ``choice``: a choose room's result."""
    rung, m = level(), entry.manifest
    took = f"hit in {entry.layer}" if hit else f"built in {seconds:.2f} s"
    what = f"{m.get('variant')} {m.get('name', m.get('kind'))} {m.get('isa')} {entry.key[:12]}"
    _say(f"{what}: {took}, {entry.size} bytes, {entry.folder}")
    inputs = m.get("inputs", {})
    if rung >= 2:
        _say("config", f"{m.get('config')}\n" + "\n".join(f"{c}" for c in _candidates(kernel, choice)))
    if rung >= 3:
        _say("trace", "\n".join(f"{name} = {text}" for name, text in inputs.get("hooks", {}).items()) or "no hooks")
    if rung >= 4:
        for name, text in entry.sources().items():
            if name.endswith((".cpp", ".cu")):
                _say(f"source {name}", text)
    if rung >= 5:
        _say("compiler", f"{m.get('compiler')}\n{' '.join(m.get('flags', ()))}\n{_text(entry, 'build.log')}")
    if rung >= 6:
        _say("machine code", machine_code(entry))


def machine_code(entry: Entry) -> str:
    """The disassembled artifact, or what it takes to get it."""
    cubin = entry.manifest.get("kind") == "cubin"
    tool = _cuda_tool("nvdisasm") or _cuda_tool("cuobjdump") if cubin else shutil.which("objdump")
    if tool is None:
        return f"not shown: no {'nvdisasm or cuobjdump of the CUDA toolkit' if cubin else 'objdump (binutils)'} here"
    options = ["-sass"] if tool.endswith("cuobjdump") else ["-c"] if cubin else ["-d", "--no-show-raw-insn"]
    try:
        content = entry.content()
    except CacheError as error:
        return f"not shown: {error}"
    with os.fdopen(os.memfd_create("attngen"), "wb") as copy:  # it may lie in a pack; nothing is written
        copy.write(content)
        copy.flush()
        name = f"/proc/self/fd/{copy.fileno()}"
        done = subprocess.run([tool, *options, name], capture_output=True, text=True, pass_fds=[copy.fileno()])
    shown = done.stdout if done.returncode == 0 else f"{tool}: {done.stderr.strip()}"
    return shown.replace(name, os.fspath(entry.artifact))


@functools.cache
def _cuda_tool(name: str) -> str | None:
    from .build import cuda_roots

    found = [str(root / "bin" / name) for root in cuda_roots() if os.access(root / "bin" / name, os.X_OK)]
    return found[0] if found else shutil.which(name)


def _candidates(kernel: Any, choice: Any) -> list[str]:
    """What was considered, and why it lost."""
    if choice is None and kernel is not None and kernel.hooks is not None and kernel.problem is not None:
        from .choose_cuda import choose_attention, choose_decode
        from .choose_hopper import choose_hopper

        p, c = kernel.problem, kernel.config
        if kernel.name == "decode":
            choice = choose_decode(p, p.isa, kernel.hooks, c.block_m, paged=c.paged, split=c.split)
        elif kernel.name == "attention_sm80":
            choice = choose_attention(p, p.isa, kernel.hooks, c.block_m, paged=c.paged, split=c.split)
        elif kernel.name == "attention_sm90":
            choice = choose_hopper(p, p.isa, kernel.hooks, (1 if c.gather else 8) if c.paged else None, c.split, most_rows=c.block_m)
    return [f"  {candidate}" for candidate in getattr(choice, "candidates", ())]


def _text(entry: Entry, name: str) -> str:
    try:
        return entry.file(name).decode("utf-8", "replace")
    except (OSError, KeyError):
        return f"no {name}"


def _say(title: str, text: str = "") -> None:
    body = "".join(f"\n    {line}" for line in text.rstrip().splitlines())
    print(f"attngen: {title}{body}", file=sys.stderr, flush=True)

