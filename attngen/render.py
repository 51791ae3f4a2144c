"""Rendering: config and holes in, ``{file name: text}`` out. Pure; Jinja with StrictUndefined."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import re
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from .abi import LAUNCH_ABI, Layout
from .emit import Hooks
from .paths import templates_dir
from .spec import Problem

MAIN = "attention.cpp"
_ORIGIN = re.compile(r"// ([\w.\-]+:\d+)\s*$")


def render_cpu(
    hooks: Hooks, config: Any, layout: Layout, problem: Problem, title: str, compiled: Path | None = None
) -> dict[str, str]:
    """The source files of a CPU kernel: the rendered main loop and the shelf of headers it includes.

    ``compiled`` is a folder where Jinja keeps compiled templates: it saves 40 ms of each later process's first build.
    """
    headers = [*sorted((templates_dir() / "cpu").glob("*.h")), *([templates_dir() / "shared" / "intervals.h"] if hooks.classes else [])]
    files = {path.name: path.read_text(encoding="utf-8") for path in headers}
    template = environment(compiled).get_template(f"cpu/{MAIN}.jinja")
    text = template.render(
        hooks=hooks, config=config, params=layout.fields, params_size=layout.size, problem=problem, abi=LAUNCH_ABI,
        title=" ".join(title.split()),
    )  # fmt: skip
    return {MAIN: text, **files}


@lru_cache(maxsize=4)
def environment(compiled: Path | None) -> Any:
    """Jinja over the templates, strict; ``compiled`` as in ``render_cpu``."""
    import jinja2  # a warm start renders nothing and never imports it

    class Compiled(jinja2.BytecodeCache):
        """As Jinja's FileSystemBytecodeCache, but checked and without pickle. It lies in the user's own cache alone: no pack
        and no layer brings one."""

        def load_bytecode(self, bucket: Any) -> None:
            try:
                content = self._path(bucket).read_bytes()
            except OSError:
                return
            if content[:32] == hashlib.sha256(content[32:]).digest():
                bucket.code = marshal.loads(content[32:])

        def dump_bytecode(self, bucket: Any) -> None:
            content = marshal.dumps(bucket.code)
            private = self._path(bucket).with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            with contextlib.suppress(OSError):  # it only saves time
                private.write_bytes(hashlib.sha256(content).digest() + content)
                private.replace(self._path(bucket))

        def _path(self, bucket: Any) -> Path:
            facts = (bucket.key, bucket.checksum, jinja2.__version__, sys.implementation.cache_tag)
            assert compiled is not None
            return compiled / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.code"

    return jinja2.Environment(
        bytecode_cache=Compiled() if compiled else None,
        loader=jinja2.FileSystemLoader(templates_dir()), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip


def locate(files: dict[str, str], file: str, line: int) -> str | None:
    """The user's hook line ("gemma2.py:12") that line ``line`` of a rendered file came from: its own comment, or the
    nearest one above it within the same function."""
    lines = files.get(file, "").splitlines()
    for i in range(min(line, len(lines)) - 1, -1, -1):
        found = _ORIGIN.search(lines[i])
        if found:
            return found[1]
        if lines[i].startswith("}"):
            return None
    return None
