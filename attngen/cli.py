"""The command line: ``attngen list | show | check | run | cache | doctor``, each with ``--json``.

A VARIANT is a name of the library or a file, ``FILE.py`` or ``FILE.py:Class``. Results go to stdout, progress and
errors to stderr. Exit status: 0 well, 1 a check failed, 2 an error; ``ATTNGEN_DEBUG=1`` shows an error's traceback.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import AttngenError, ParameterError, VariantError
from .ops import BOOL, F32, I32

if TYPE_CHECKING:
    from .spec import Variant

app = typer.Typer(
    help="attngen: a JIT compiler for attention variants.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip
cache_app = typer.Typer(help="The kernel cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

VariantArg = Annotated[str, typer.Argument(metavar="VARIANT", help="A name of the library, FILE.py or FILE.py:Class.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Bind a field; may be repeated.")]
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"attngen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an AttngenError becomes one message and exit status 2."""
    try:
        app()
    except AttngenError as error:
        if os.environ.get("ATTNGEN_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        elif "--json" in sys.argv:
            _print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            _stderr().print(f"[bold red]{type(error).__name__}:[/] [red]{escape(str(error))}[/]", soft_wrap=True)
        sys.exit(2)


# ---------------------------------------------------------------- finding the variant


def load_variant(spec: str, bound: Sequence[str] = ()) -> Variant:
    """The variant that ``spec`` names, made with the ``NAME=VALUE`` bindings.

    Raises:
        VariantError: no such file, class or library name; a file that does not import; a field that does not fit.
    """
    file, _, name = spec.partition(":")
    found = _from_file(Path(file), name) if file.endswith(".py") or os.sep in file else _from_library(spec)
    if not isinstance(found, type):
        if bound:
            raise VariantError(f"--set with {spec}, an instance: give its class, or bind the values in the file")
        return found
    values = _bindings(found, bound)
    missing = [n for n, f in found.fields.items() if f.kind == "const" and n not in values and getattr(found, n, None) is None]
    if missing:
        raise ParameterError(f"{found.__name__} needs a value for its Const {', '.join(missing)}: --set {missing[0]}=...")
    return found(**values)


def _from_library(name: str) -> type[Variant]:
    from .variants import library

    known = library()
    if name not in known:
        folded = {n.lower(): n for n in known}
        close = [folded[n] for n in difflib.get_close_matches(name.lower().replace("_", ""), folded, n=3, cutoff=0.6)]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise VariantError(
            f"no variant {name!r} in the library. {hint}`attngen list` names them; a variant of yours is FILE.py or "
            f"FILE.py:Class"
        )
    return known[name]


def _from_file(path: Path, name: str) -> Any:
    from .spec import Variant

    if not path.is_file():
        raise VariantError(f"no file {path}: required a Python file that defines a subclass of ag.Variant")
    module = _import_file(path)
    if name:
        found = getattr(module, name, None)
        if isinstance(found, Variant) or (isinstance(found, type) and issubclass(found, Variant)):
            return found
        what = "has no such name" if found is None else f"has a {type(found).__name__} of that name"
        raise VariantError(f"{path}:{name}: required a subclass or an instance of ag.Variant, and the file {what}")
    own = [
        x for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, Variant) and x.__module__ == module.__name__
    ]  # fmt: skip
    if len(own) != 1:
        names = ", ".join(f"{path}:{cls.__name__}" for cls in own)
        raise VariantError(
            f"{path} defines {len(own)} subclasses of ag.Variant: {f'name one of {names}' if own else 'required one'}"
        )
    return own[0]


def _import_file(path: Path) -> Any:
    name = f"attngen_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise VariantError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE.py` does, so that it may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except AttngenError:
        raise
    except (Exception, SystemExit) as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        line = where[-1].lineno if where else getattr(error, "lineno", None)
        raise VariantError(
            f"{path}:{line or 1}: importing it raised {type(error).__name__}: {error}. Mend the file; code that runs "
            f'something belongs under if __name__ == "__main__"'
        ) from error
    finally:
        sys.path.pop(0)
    return module


def _bindings(cls: type[Variant], given: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        field = cls.fields.get(name)
        if not equals or field is None:
            known = ", ".join(cls.fields) or "no fields"
            raise ParameterError(f"--set {item}: required NAME=VALUE with a field of {cls.__name__} ({known})")
        readers = {F32: float, I32: int, BOOL: {"true": True, "false": False}.__getitem__, None: json.loads}
        try:
            if field.kind == "tensor":
                raise ValueError("a tensor cannot be given on the command line")
            values[name] = readers[field.dtype](text.lower() if field.dtype == BOOL else text)
        except (ValueError, KeyError) as error:
            raise ParameterError(f"--set {item}: {name} is {field.kind} {field.dtype or 'number'} ({error})") from None
    return values


def _check_dtypes(names: Iterable[str]) -> None:
    for name in names:
        if name not in DTYPE_NAMES:
            raise ParameterError(f"--dtype {name}: required {', '.join(DTYPE_NAMES)}")


# ---------------------------------------------------------------- list and show


@app.command("list")
def list_variants(as_json: JsonFlag = False) -> None:
    """The variants of the library: name, fields, what each does."""
    from .variants import library

    rows = [
        {"name": name, "fields": {n: _field_text(f, getattr(cls, n, None)) for n, f in cls.fields.items()},
         "hooks": list(_own_hooks(cls)), "doc": _first_sentence(cls.__doc__ or "")}
        for name, cls in library().items()
    ]  # fmt: skip
    if as_json:
        return _print_json(rows)
    table = _table("variant", "fields", "what it does")
    for row in rows:
        table.add_row(row["name"], escape("\n".join(f"{n}: {t}" for n, t in row["fields"].items())), escape(row["doc"]))
    _stdout().print(table)


def _own_hooks(cls: type[Variant]) -> Iterable[str]:
    from .trace import HOOKS

    return (hook for hook in (*HOOKS, "rope", "scale") if getattr(cls, hook, None) is not None)


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def _field_text(field: Any, default: Any = None) -> str:
    axes = f"[{', '.join(map(str, field.axes))}]" if field.kind == "tensor" else ""
    value = f" = {default}" if isinstance(default, (bool, int, float)) else ""
    return f"{field.kind} {field.dtype or ''}{axes}".strip() + value


@app.command()
def show(
    variant: VariantArg,
    stage: Annotated[str, typer.Option(help="trace, config or source.")] = "trace",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    head_dim: Annotated[int, typer.Option(help="A multiple of 8 up to 256.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Defaults to head_dim.")] = None,
    isa: Annotated[str | None, typer.Option(help="CPU features; defaults to this host's best.")] = None,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """What attngen makes of a variant: traced hooks, chosen config, or rendered source. Compiles nothing."""
    _check_dtypes([dtype])
    found = load_variant(variant, bound)
    if stage == "trace":
        _show_trace(found, as_json)
    elif stage in ("config", "source"):
        plan = _specialise(found, dtype, head_dim, head_dim_v, isa)
        _show_config(plan, as_json) if stage == "config" else _show_source(plan, as_json)
    else:
        raise ParameterError(f"--stage {stage}: required trace, config or source")


def _show_trace(variant: Variant, as_json: bool) -> None:
    from .bounds import analyse
    from .expr import text

    if not as_json:
        return _stdout().print(variant.explain(), markup=False, soft_wrap=True, highlight=False)
    trace = variant.trace
    bounds = analyse(trace.mask)
    _print_json({
        "variant": variant.name, "structure": variant.structure_hash,
        "fields": {n: _field_text(f, variant.values.get(n)) for n, f in trace.fields.items()},
        "hooks": {n: text(node) for n, node in trace.roots().items()},
        "rope": repr(trace.rope.rope) if trace.rope else None, "scale": trace.scale,
        "bounds": {"closed": [str(b) for b in bounds.closed], "evaluated": [text(n) for n in bounds.opaque]},
    })  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """A variant and problem after every stage before rendering."""

    variant: Variant
    problem: Any
    hooks: Any
    choice: Any
    layout: Any
    flags: tuple[str, ...]
    key: str


def _specialise(variant: Variant, dtype: str, head_dim: int, head_dim_v: int | None, isa: str | None) -> _Plan:
    from . import run
    from .check import DTYPES
    from .spec import STORAGE

    storage = {}
    for name, field in variant.trace.used().items():
        if field.kind == "tensor":
            value = variant.values.get(name)
            storage[name] = str(STORAGE[field.dtype][0] if value is None else value.dtype).removeprefix("torch.")
    problem = run.problem_for(DTYPES[dtype], head_dim, head_dim_v or head_dim, storage, isa)
    return _Plan(variant, problem, *run.specialise(variant, problem))


def _show_config(plan: _Plan, as_json: bool) -> None:
    candidates = [_record(c) for c in plan.choice.candidates]
    if as_json:
        return _print_json({
            "variant": plan.variant.name, "key": plan.key, "problem": _record(plan.problem), "flags": plan.flags,
            "config": _record(plan.choice.config), "candidates": candidates,
        })  # fmt: skip
    out = _stdout()
    for title, record in (("problem", _record(plan.problem)), ("config", _record(plan.choice.config))):
        table = _table(title, "")
        for name, value in record.items():
            table.add_row(name, escape(str(value)))
        out.print(table)
    table = _table(*[name for name in candidates[0] if name != "lost"], "verdict")
    for row in candidates:
        lost = row.pop("lost")
        table.add_row(*map(str, row.values()), escape(lost) if lost else "[green]chosen[/]")
    out.print(table)
    out.print(f"key    {plan.key}\nflags  {' '.join(plan.flags)}", markup=False, soft_wrap=True, highlight=False)


def _show_source(plan: _Plan, as_json: bool) -> None:
    from .render import MAIN, render_cpu

    files = render_cpu(plan.hooks, plan.choice.config, plan.layout, plan.problem, plan.variant.name)
    if as_json:
        return _print_json({"variant": plan.variant.name, "key": plan.key, "main": MAIN, "files": files})
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        _stdout().print(Syntax(files[MAIN], "cpp", theme="ansi_dark", word_wrap=False))
    else:
        sys.stdout.write(files[MAIN])


# ---------------------------------------------------------------- check and run


@app.command()
def check(
    variant: VariantArg,
    dtype: Annotated[list[str], typer.Option(help="May be repeated.")] = list(DTYPE_NAMES),  # noqa: B006
    head_dim: Annotated[list[int], typer.Option(help="May be repeated.")] = [64],  # noqa: B006
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Compile a variant and compare it with the float64 oracle over a grid of shapes. Exit status 1 if it differs."""
    _check_dtypes(dtype)
    found = load_variant(variant, bound)
    from . import check as checking

    _, notes = checking.invent(found, checking.CASES[0])
    with _stderr().status("tracing") as status:
        results = list(checking.check(found, dtype, head_dim, progress=lambda text: status.update(escape(text))))
    passed = all(r.ok for r in results)
    if as_json:
        rows = [_record(r) | {"case": _record(r.case), "ok": r.ok} for r in results]
        _print_json({"variant": found.name, "passed": passed, "invented": notes, "results": rows})
    else:
        _print_check(found, results, notes)
    if not passed:
        raise typer.Exit(1)


def _print_check(variant: Variant, results: Sequence[Any], notes: Sequence[str]) -> None:
    out = _stdout()
    several = len({r.head_dim for r in results}) > 1
    table = _table(
        "case", "dtype", *(["head_dim"] if several else []), ">max error", ">torch's", ">compile s", ">warm ms",
        "verdict",
        title=f"{variant!r} against the float64 oracle",
    )  # fmt: skip
    for i, r in enumerate(results):
        first = i == 0 or (r.dtype, r.head_dim) != (results[i - 1].dtype, results[i - 1].head_dim)
        compiled = f"{r.compile_seconds:.1f}{' (cached)' if r.cached else ''}" if first else ""
        table.add_row(
            str(r.case), r.dtype, *([str(r.head_dim)] if several else []), f"{r.error:.1e}", f"{r.torch_error:.1e}",
            compiled, f"{r.warm_ms:.2f}", "[green]ok[/]" if r.ok else f"[red]{escape(r.reason)}[/]",
        )  # fmt: skip
    out.print(table)
    for note in notes:
        out.print(f"invented  {note}", markup=False, highlight=False)
    failed = sum(not r.ok for r in results)
    colour, verdict = ("green", "passed") if not failed else ("red", f"{failed} FAILED")
    out.print(f"[{colour}]{variant.name}: {len(results)} checks, {verdict}[/]")


@app.command()
def run(
    variant: VariantArg,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    q_len: Annotated[int, typer.Option(min=1)] = 1024,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Defaults to q_len.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Defaults to heads.")] = None,
    head_dim: Annotated[int, typer.Option()] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls; the median is printed.")] = 10,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Run attention on random inputs: time, GFLOP/s, whether the kernel was in the cache."""
    _check_dtypes([dtype])
    found = load_variant(variant, bound)
    import torch

    from . import check as checking
    from . import run as conductor

    case = checking.Case("run", batch, q_len, kv_len or q_len, heads, kv_heads or heads)
    q, k, v = checking.inputs(case, checking.DTYPES[dtype], head_dim)
    params, notes = checking.invent(found, case)
    times = []
    with torch.no_grad(), _stderr().status("compiling") as status:
        start = time.perf_counter()
        kernel, cached = checking.compile_for(found, dtype, head_dim)
        ready = time.perf_counter() - start
        for i in range(repeat + 1):
            start = time.perf_counter()
            conductor.attention(q, k, v, found, **params)
            times.append(time.perf_counter() - start)
            status.update(f"running, call {i + 1} of {repeat + 1}")
    seconds = median(times[1:])
    work = 4 * batch * heads * q_len * case.kv_len * head_dim  # q.k and p.v over the whole matrix, masked or not
    facts = {
        "variant": found.name, "sizes": str(case).removeprefix("run "), "head_dim": head_dim, "dtype": dtype,
        "isa": kernel.problem.isa, "threads": torch.get_num_threads(), "key": kernel.spec_hash,
        "cache": "hit" if cached else "miss", "ready_s": ready, "first_call_s": times[0],
        "ms": 1e3 * seconds, "gflops": work / seconds / 1e9, "invented": notes,
    }  # fmt: skip
    if as_json:
        return _print_json(facts)
    cache_text = "cache hit" if cached else f"cache miss, built in {ready:.2f} s"
    out = _stdout()
    out.print(
        f"{found.name} {facts['sizes']} d={head_dim} {dtype} {kernel.problem.isa} | {1e3 * seconds:.3f} ms | "
        f"{facts['gflops']:.1f} GFLOP/s (masked elements counted) | {facts['threads']} threads | {cache_text}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for note in notes:
        out.print(f"invented  {note}", markup=False, highlight=False)


# ---------------------------------------------------------------- cache


@cache_app.command("path")
def cache_path(as_json: JsonFlag = False) -> None:
    """Where the cache is."""
    from . import cache

    root = str(cache.cache_root())
    _print_json({"path": root}) if as_json else print(root)


@cache_app.command("ls")
def cache_ls(as_json: JsonFlag = False) -> None:
    """The kernels in the cache."""
    from . import cache

    store = cache.default()
    rows = []
    for entry in store.entries():
        m = entry.manifest
        problem = m.get("problem") or {}
        rows.append({
            "key": entry.key, "variant": m.get("variant", ""), "dtype": problem.get("q_dtype", ""),
            "isa": m.get("isa", ""), "head_dim": problem.get("head_dim", ""), "bytes": entry.size,
            "compile_s": m.get("seconds", 0.0),
            "created": m.get("created", 0.0), "path": str(entry.folder),
        })  # fmt: skip
    total = store.size() if store.root.is_dir() else 0
    if as_json:
        return _print_json({"path": str(store.root), "bytes": total, "kernels": rows})
    out = _stdout()
    if rows:
        table = _table("key", "variant", "dtype", ">head_dim", "isa", ">kB", ">compile s", "built")
        for r in rows:
            built = time.strftime("%Y-%m-%d %H:%M", time.localtime(r["created"]))
            table.add_row(
                r["key"][:12], escape(r["variant"]), r["dtype"], str(r["head_dim"]), r["isa"],
                f"{r['bytes'] / 1e3:.0f}", f"{r['compile_s']:.1f}", built,
            )  # fmt: skip
        out.print(table)
    summary = f"{len(rows)} kernels, {total / 1e6:.1f} MB in {store.root}"
    out.print(summary, markup=False, highlight=False, soft_wrap=True)


@cache_app.command("clear")
def cache_clear(as_json: JsonFlag = False) -> None:
    """Remove every kernel; each is built again at its next use."""
    from . import cache

    store = cache.default()
    count, freed = store.clear() if store.root.is_dir() else (0, 0)
    if as_json:
        return _print_json({"path": str(store.root), "removed": count, "bytes": freed})
    print(f"removed {count} kernels, {freed / 1e6:.1f} MB from {store.root}")


# ---------------------------------------------------------------- doctor


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """What this machine has, what is missing and how to get it. Exit status 1 if the CPU backend cannot work."""
    from .doctor import examine

    with _stderr().status("examining"):
        findings = examine()
    works = all(f.ok or not f.required for f in findings)
    if as_json:
        _print_json({"cpu_backend": works, "findings": [_record(f) for f in findings]})
    else:
        table = _table("", "", "found", "to do")
        for f in findings:
            verdict = "[green]ok[/]" if f.ok else "[red]missing[/]" if f.required else "[yellow]absent[/]"
            table.add_row(f.name, verdict, escape(f.found), escape(f.remedy))
        _stdout().print(table)
        _stdout().print("[green]the CPU backend works here[/]" if works else "[red]the CPU backend cannot work here[/]")
    if not works:
        raise typer.Exit(1)


# ---------------------------------------------------------------- printing


def _stdout() -> Console:
    wide = None if sys.stdout.isatty() else 160  # a pipe has no width: keep a row on a line
    return Console(width=wide, highlight=False)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


def _table(*columns: str, title: str | None = None) -> Table:
    """A table; a column whose name starts with > is a number's."""
    from rich import box

    table = Table(box=box.SIMPLE, title=escape(title) if title else None, title_justify="left")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _record(x: Any) -> dict[str, Any]:
    return asdict(x) if is_dataclass(x) and not isinstance(x, type) else dict(x)


def _print_json(value: Any) -> None:
    """JSON on stdout; NaN and infinities, which JSON lacks, as strings."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        if isinstance(x, float) and x - x != 0:
            return str(x)
        return x

    print(json.dumps(plain(value), indent=2, default=str))
