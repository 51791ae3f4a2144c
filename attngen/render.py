"""Rendering: config and holes in, ``{file name: text}`` out. Pure; Jinja with StrictUndefined."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from .abi import LAUNCH_ABI, Layout
from .emit import Hooks
from .paths import templates_dir
from .spec import Problem

MAIN = "attention.cpp"
_ORIGIN = re.compile(r"// ([\w.\-]+:\d+)\s*$")


def render_cpu(hooks: Hooks, config: Any, layout: Layout, problem: Problem, title: str) -> dict[str, str]:
    """The source files of a CPU kernel: the rendered main loop and the shelf of headers it includes."""
    headers = [*sorted((templates_dir() / "cpu").glob("*.h")), *([templates_dir() / "shared" / "intervals.h"] if hooks.classes else [])]
    files = {path.name: path.read_text(encoding="utf-8") for path in headers}
    template = environment().get_template(f"cpu/{MAIN}.jinja")
    text = template.render(
        hooks=hooks, config=config, params=layout.fields, params_size=layout.size, problem=problem, abi=LAUNCH_ABI,
        title=" ".join(title.split()),
    )  # fmt: skip
    return {MAIN: text, **files}


@lru_cache(maxsize=1)
def environment() -> Any:
    """Jinja over the templates, strict. What Jinja compiles of them is not kept: 50 ms a process that builds, and no code in a
    cache that is executed for its own hash's sake."""
    import jinja2  # a warm start renders nothing and never imports it

    return jinja2.Environment(
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
