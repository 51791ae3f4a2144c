"""Rendering of the CUDA kernels: ``{file name: text}`` from a template, its holes and its configuration."""

from __future__ import annotations

from typing import Any

from .abi import Layout
from .abi_cuda import MERGE_POINTERS
from .emit import Hooks
from .paths import templates_dir
from .render import environment
from .spec import Problem


def render_cuda(
    name: str, hooks: Hooks | None, config: Any, layout: Layout, problem: Problem | None, title: str
) -> dict[str, str]:
    """The source of kernel ``name`` ("plan", "decode", "append" ...) and the headers it includes."""
    folder = templates_dir() / "cuda"
    template = environment().get_template(f"cuda/{name}.cu.jinja")
    text = template.render(
        hooks=hooks, config=config, params=layout.fields, params_size=layout.size, problem=problem, title=" ".join(title.split()),
        pointers=MERGE_POINTERS,
    )
    shelf = [*sorted(folder.glob("*.cuh")), templates_dir() / "shared" / "intervals.h"]
    shelved = {path.name: path.read_text(encoding="utf-8") for path in shelf}
    wanted = {"ptx.cuh"}
    for including in (text, *(shelved["zones.cuh"] for _ in range('#include "zones.cuh"' in text))):
        wanted |= {header for header in shelved if f'#include "{header}"' in including}
    return {f"{name}.cu": text, **{header: found for header, found in shelved.items() if header in wanted}}
