"""``attngen show --stage config | source | bounds``: what was chosen and why, the text that is compiled, and what the analysis of a
mask finds. Compiles nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.markup import escape

from .errors import ParameterError
from .printing import print_json, record, stdout, table
from .spec import Variant


def storage_of(variant: Variant) -> dict[str, str]:
    """The stored dtype of each tensor that the variant reads: of its value, or its declaration's own."""
    from .run import stored_dtypes

    return stored_dtypes(variant, None)


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
    named = [*zip(kernels.classes, choices_of(variant.trace, problem, hooks, page_size=page_size).values()), (kernels.plan, None)]
    shown = [(special, choice) for special, choice in named if kernel in (None, special.name)]
    if not shown:
        raise ParameterError(f"--kernel {kernel}: required one of {', '.join(dict.fromkeys(s.name for s, _ in named))}")
    if stage == "source":
        from .render_cuda import render_cuda

        special = next((s for s, c in reversed(shown) if c is not None), shown[-1][0])  # the largest tile's
        files = render_cuda(special.name, special.hooks, special.config, special.layout, special.problem, special.title)
        return _show_source({"variant": variant.name, "key": special.key}, f"{special.name}.cu", files, as_json)
    why = unserved(problem, problem.isa, hooks)
    if as_json:
        listed = [
            {"kernel": s.name, "key": s.key, "config": record(s.config), "candidates": [] if c is None else _choice(c)["candidates"],
             "chosen_by": "rule" if c is None else c.by}
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
    return {"config": record(choice.config), "candidates": [record(c) for c in choice.candidates], "chosen_by": choice.by}


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
    by = "by rule: the first that fits" if choice.by == "rule" else f"as {choice.by}"
    for line in (f"chosen {by}", *getattr(choice.config, "notes", ())):
        stdout().print(line, markup=False, soft_wrap=True, highlight=False)


def _show_source(facts: dict[str, Any], main: str, files: dict[str, str], as_json: bool) -> None:
    if as_json:
        return print_json({**facts, "main": main, "files": files})
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        stdout().print(Syntax(files[main], "cpp", theme="ansi_dark", word_wrap=False))
    else:
        sys.stdout.write(files[main])
    return None


# ---------------------------------------------------------------- bounds


def show_bounds(variant: Variant, q_len: int, kv_len: int, block_q: int, block_kv: int, plot: Path | None, as_json: bool) -> None:
    """What is known of the mask before it is evaluated: closed bounds in symbols, and how many tiles keep none, all or some pairs, at
    example values of the parameters that are not bound."""
    import torch

    from .bounds import analyse
    from .classes import findings, stop_of
    from .expr import Node, conjuncts, text
    from .intervals import Tile, classify, tiles
    from .variants import example_params

    for name, value in (("q-len", q_len), ("kv-len", kv_len), ("block-q", block_q), ("block-kv", block_kv)):
        if value < 1:
            raise ParameterError(f"--{name} {value}: required 1 or more")
    mask = variant.trace.mask
    given = variant.q_offset
    offset = kv_len - q_len if given is None else int(given.flatten()[0] if hasattr(given, "flatten") else given)
    symbols = {"request": 0, "head": 0, "kv_head": 0, "num_heads": 1, "num_kv_heads": 1, "q_len": q_len, "kv_len": kv_len, "q_offset": offset}
    params = {**variant.values, **example_params(variant, requests=1, q_len=q_len, kv_len=kv_len, num_heads=1, num_kv_heads=1)}
    rows, columns = tiles(q_len, kv_len, offset, block_q, block_kv)
    known = {name: (torch.tensor(x), torch.tensor(x)) for name, x in symbols.items()}
    known |= {"q_token": (rows[0] - offset, rows[1] - offset), "kv_token": columns}

    def classes_of(node: Node | None) -> torch.Tensor:
        return classify(node, rows, columns, known, params)

    def counts(classes: torch.Tensor) -> dict[str, int]:
        return {tile.name: int((classes == tile).sum()) for tile in Tile}

    found, classes = analyse(mask), classes_of(mask)
    terms = [] if mask is None else conjuncts(mask)
    facts = {
        "variant": variant.name, "q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv,
        "closed": [str(b) for b in found.closed], "either": [[str(b) for b in x] for x in found.either],
        "evaluated": [text(n) for n in found.opaque],
        "stops": {text(n): text(stop) for n in found.opaque if (stop := stop_of(n)) is not None},
        "tiles": counts(classes), "terms": [{"term": text(n), **counts(classes_of(n))} for n in terms],
    }  # fmt: skip
    if plot is not None:
        _plot(plot, variant, (rows, columns), classes, symbols, params, offset, facts)
    if as_json:
        return print_json(facts)
    out = stdout()
    print_plain = dict(markup=False, soft_wrap=True, highlight=False)
    out.print("first and last key, and full tiles, from:  " + ("; ".join(facts["closed"]) or "nothing: all keys"), **print_plain)
    for what, term in findings(mask) if mask is not None else []:
        if not any(what == f"bounds: {b}" for b in facts["closed"]):
            out.print(f"{what}:  {term}", **print_plain)
    shown = table(f"tiles of {block_q} x {block_kv}, {q_len} x {kv_len}", *(tile.name.lower() for tile in Tile))
    for term in facts["terms"] if len(terms) > 1 else []:
        shown.add_row(escape(term["term"]), *(str(term[tile.name]) for tile in Tile))
    shown.add_row("[bold]the mask[/]", *(f"[bold]{facts['tiles'][tile.name]}[/]" for tile in Tile))
    out.print(shown)
    if plot is not None:
        out.print(f"drawn to {plot}", **print_plain)
    return None


def _plot(path: Path, variant: Variant, ranges: Any, classes: Any, symbols: dict[str, int], params: dict[str, Any], offset: int, facts: Any) -> None:
    """The mask, a pixel a pair, under its tiles: empty ones red, full ones green."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ParameterError(f"--plot {path}: required matplotlib.\n  do: pip install 'attngen[plot]'") from error
    import torch

    from .expr import discrete_inputs
    from .interp import evaluate
    from .intervals import Tile

    rows, columns = (torch.arange(facts[n], dtype=torch.int32) for n in ("q_len", "kv_len"))
    values = {name: torch.tensor(x, dtype=torch.int32) for name, x in symbols.items()}
    values |= {"q": rows[:, None] + offset, "kv": columns[None], "q_token": rows[:, None], "kv_token": columns[None]}
    mask = variant.trace.mask
    kept = torch.ones((), dtype=torch.bool) if mask is None else evaluate(mask, values, params, discrete_inputs([mask]))
    figure = Figure(figsize=(6, 6 * min(2.0, max(0.5, facts["q_len"] / facts["kv_len"]))))
    axes = figure.add_subplot()
    axes.imshow((~kept).expand(len(rows), len(columns)).numpy(), cmap="gray", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    colours = {Tile.EMPTY: "tab:red", Tile.FULL: "tab:green"}
    for i, line in enumerate(classes.tolist()):
        for j, tile in enumerate(line):
            if tile in colours:
                x, y = int(ranges[1][0][0, j]) - 0.5, int(ranges[0][0][i, 0]) - offset - 0.5
                width, height = int(ranges[1][1][0, j]) + 0.5 - x, int(ranges[0][1][i, 0]) - offset + 0.5 - y
                axes.add_patch(Rectangle((x, y), width, height, facecolor=colours[tile], edgecolor="white", alpha=0.35, linewidth=0.5))
    axes.set(xlabel="key", ylabel="query", title=f"{variant.name}: {facts['tiles']['EMPTY']} empty (red), {facts['tiles']['FULL']} full (green), "
             f"{facts['tiles']['PARTIAL']} partial")  # fmt: skip
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ParameterError(f"--plot {path}: required a file that can be written, in a format of matplotlib's.\n  found: {error}") from error
