"""``attngen show --stage config | source``: what was chosen and why, and the text that is compiled. Compiles nothing."""

from __future__ import annotations

import sys
from typing import Any

from rich.markup import escape

from .errors import ParameterError
from .printing import print_json, record, stdout, table
from .spec import STORAGE, Variant


def storage_of(variant: Variant) -> dict[str, str]:
    """The stored dtype of each tensor that the variant reads: of its value, or its declaration's first."""
    storage = {}
    for name, field in variant.trace.used().items():
        if field.kind == "tensor":
            value = variant.values.get(name)
            storage[name] = str(STORAGE[field.dtype][0] if value is None else value.dtype).removeprefix("torch.")
    return storage


def show_cpu(plan: Any, stage: str, as_json: bool) -> None:
    """The CPU kernel of a variant after every stage before rendering."""
    if stage == "source":
        from .render import MAIN, render_cpu

        files = render_cpu(plan.hooks, plan.choice.config, plan.layout, plan.problem, plan.variant.name)
        return _show_source({"variant": plan.variant.name, "key": plan.key}, MAIN, files, as_json)
    facts = {"variant": plan.variant.name, "key": plan.key, "problem": record(plan.problem), "flags": plan.flags}
    if as_json:
        return print_json({**facts, **_choice(plan.choice)})
    _facts("problem", facts["problem"])
    _show_choice("config", plan.choice)
    return stdout().print(f"key    {plan.key}\nflags  {' '.join(plan.flags)}", markup=False, soft_wrap=True, highlight=False)


def show_cuda(
    variant: Variant, stage: str, arch: str, dtype: str, head_dim: int, head_dim_v: int, page_size: int | None,
    kernel: str | None, as_json: bool,
) -> None:  # fmt: skip
    """The kernels of a variant on a GPU, a row-tile class each, and their planner. ``kernel``: a template's name, for those alone."""
    from .check import DTYPES
    from .choose_cuda import arch_named
    from .choose_hopper import unserved
    from .emit import emit
    from .engine import choices_of, cuda_problem, kernels_of

    storage = storage_of(variant)
    problem = cuda_problem(arch_named(arch).name, DTYPES[dtype], head_dim, head_dim_v, tuple(sorted(storage.items())))
    hooks = emit(variant.trace, storage, head_dim, dialect="cuda", device_scalars=True)
    kernels = kernels_of(variant, problem, page_size=page_size)
    named = [*zip(kernels.classes, choices_of(problem, hooks, page_size=page_size)), (kernels.plan, None)]
    shown = [(special, choice) for special, choice in named if kernel in (None, special.name)]
    if not shown:
        raise ParameterError(f"--kernel {kernel}: required one of {', '.join(dict.fromkeys(s.name for s, _ in named))}")
    if stage == "source":
        from .render_cuda import render_cuda

        special = next((s for s, c in reversed(shown) if c is not None), shown[-1][0])  # the largest tile's
        files = render_cuda(special.name, special.hooks, special.config, special.layout, special.problem, special.title)
        return _show_source({"variant": variant.name, "key": special.key}, f"{special.name}.cu", files, as_json)
    why = unserved(problem, problem.isa, hooks, page_size)
    if as_json:
        listed = [
            {"kernel": s.name, "key": s.key, "config": record(s.config), "candidates": [] if c is None else _choice(c)["candidates"]}
            for s, c in shown
        ]
        return print_json({"variant": variant.name, "problem": record(problem), "not_hopper": why, "kernels": listed})
    _facts("problem", record(problem))
    for special, choice in shown:
        if choice is None:
            stdout().print(f"\nplan: {special.config}", markup=False, soft_wrap=True, highlight=False)
        else:
            _show_choice(f"{special.name}, {choice.config.block_m} rows", choice)
    if why:
        stdout().print(f"no attention_sm90: {why}", markup=False, soft_wrap=True, highlight=False)
    return None


def _choice(choice: Any) -> dict[str, Any]:
    return {"config": record(choice.config), "candidates": [record(c) for c in choice.candidates]}


def _facts(title: str, facts: dict[str, Any]) -> None:
    shown = table(title, "")
    for name, value in facts.items():
        shown.add_row(name, escape(str(value)))
    stdout().print(shown)


def _show_choice(title: str, choice: Any) -> None:
    """The configuration, and a row a candidate: chosen, or why it lost."""
    _facts(title, record(choice.config))
    candidates = [record(c) for c in choice.candidates]
    shown = table(*[name for name in candidates[0] if name != "lost"], "verdict")
    for row in candidates:
        lost = row.pop("lost")
        shown.add_row(*map(str, row.values()), escape(lost) if lost else "[green]chosen[/]")
    stdout().print(shown)


def _show_source(facts: dict[str, Any], main: str, files: dict[str, str], as_json: bool) -> None:
    if as_json:
        return print_json({**facts, "main": main, "files": files})
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        stdout().print(Syntax(files[main], "cpp", theme="ansi_dark", word_wrap=False))
    else:
        sys.stdout.write(files[main])
    return None
