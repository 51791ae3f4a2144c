"""The command line: ``attngen list | show | check | run | tune | precompile | cache | explain-miss | doctor``, each with ``--json``.

A VARIANT is a name of the library or a file, ``FILE.py`` or ``FILE.py:Class``. Results go to stdout, progress and
errors to stderr. Exit status: 0 well, 1 a check failed, 2 an error, 130 interrupted; ``ATTNGEN_DEBUG=1`` shows an error's traceback.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .errors import AttngenError, ParameterError
from .find import load_variant
from .isa import CPU_ISAS
from .printing import print_json, record, stderr, stdout, table
from .ship import JsonFlag, cache_app, doctor, explain_miss, precompile

if TYPE_CHECKING:
    from .spec import Variant

app = typer.Typer(
    help="attngen: a JIT compiler for attention variants.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 well, 1 a check failed, 2 an error, 130 interrupted.\n\n"
    "Environment (docs/build.md says more): ATTNGEN_CACHE_DIR, where kernels are kept; ATTNGEN_JIT=on, off or warn, whether they may be "
    "compiled; ATTNGEN_TUNED=off, choices by rule alone; ATTNGEN_SYSTEM_CACHE and ATTNGEN_REMOTE_CACHE, where else kernels are; "
    "ATTNGEN_TRUSTED_KEYS, who must have signed those; ATTNGEN_ALLOW_SHARED_CACHE=1, a cache that others can write; ATTNGEN_LOG=debug, "
    "info, warning or error; ATTNGEN_DEBUG=1 to 6, what each kernel is, and errors with tracebacks; CXX, CUDA_HOME and CUDA_PATH, the compilers.",
)  # fmt: skip

VariantArg = Annotated[str, typer.Argument(metavar="VARIANT", help="A name of the library, FILE.py or FILE.py:Class.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Bind a field; may be repeated.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
NoTuned = Annotated[
    bool, typer.Option("--no-tuned", help="Choose by rule alone, as under ATTNGEN_TUNED=off.", callback=lambda ctx, on: _ignore_tuned(ctx, on))
]
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
        if os.environ.get("ATTNGEN_DEBUG", "").strip() in tuple("123456"):
            traceback.print_exc()
        elif "--json" in sys.argv:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            stderr().print(f"[bold red]{type(error).__name__}:[/] [red]{escape(str(error))}[/]", soft_wrap=True)
        sys.exit(2)


def _ignore_tuned(ctx: typer.Context, wanted: bool) -> bool:
    if wanted:
        from . import tuned

        ctx.with_resource(tuned.ignored())
    return wanted


def _device(given: str) -> str:
    """ "cpu", or "cuda:N" of a device that is there."""
    from .devices import as_device, cuda_index

    return "cpu" if as_device(given).type == "cpu" else f"cuda:{cuda_index(given, '--device cpu is there')}"


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
        return print_json(rows)
    shown = table("variant", "fields", "what it does")
    for row in rows:
        shown.add_row(row["name"], escape("\n".join(f"{n}: {t}" for n, t in row["fields"].items())), escape(row["doc"]))
    stdout().print(shown)


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
    ctx: typer.Context,
    variant: VariantArg,
    stage: Annotated[str, typer.Option(help="trace, config, source or bounds.")] = "trace",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; float32 unless --arch is given, then bfloat16.")] = None,
    head_dim: Annotated[int, typer.Option(help="A multiple of 8 up to 256.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Defaults to head_dim.")] = None,
    isa: Annotated[str | None, typer.Option(help=f"CPU features: {', '.join(CPU_ISAS)}; this host's best, unless given.")] = None,
    arch: Annotated[str | None, typer.Option(help="A GPU, such as 9.0a or sm_90a: its kernels instead of the CPU's.")] = None,
    page_size: Annotated[int, typer.Option(help="With --arch: slots of a page, 0 without pages.")] = 16,
    kernel: Annotated[str | None, typer.Option(help="With --arch: decode, attention_sm80, attention_sm90 or plan alone.")] = None,
    q_len: Annotated[int, typer.Option(help="With --stage bounds: queries, the last at the last key.")] = 1024,
    kv_len: Annotated[int, typer.Option(help="With --stage bounds: keys.")] = 1024,
    block_q: Annotated[int, typer.Option(help="With --stage bounds: queries of a tile.")] = 128,
    block_kv: Annotated[int, typer.Option(help="With --stage bounds: keys of a tile.")] = 128,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="With --stage bounds: draw the mask and its tiles.")] = None,
    no_tuned: NoTuned = False,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """What attngen makes of a variant: traced hooks, bounds of its mask, chosen config, or rendered source. Compiles nothing."""
    dtype = dtype or ("bfloat16" if arch else "float32")
    _check_dtypes([dtype])
    _check_used(ctx, stage, arch)
    found = load_variant(variant, bound)
    if arch and stage in ("config", "source"):
        from .show import show_cuda

        show_cuda(found, stage, arch, dtype, head_dim, head_dim_v or head_dim, page_size or None, kernel, as_json)
    elif stage == "trace":
        _show_trace(found, as_json)
    elif stage == "bounds":
        from .show import show_bounds

        show_bounds(found, q_len, kv_len, block_q, block_kv, plot, as_json)
    elif stage in ("config", "source"):
        plan = _specialise(found, dtype, head_dim, head_dim_v, isa)
        from .show import show_cpu

        show_cpu(plan, stage, as_json)
    else:
        raise ParameterError(f"--stage {stage}: required trace, config, source or bounds")


def _check_used(ctx: typer.Context, stage: str, arch: str | None) -> None:
    """Raises ParameterError for an option that what is shown does not look at."""
    unused = {"isa": "without --arch"} if arch else {name: "with --arch" for name in ("page_size", "kernel")}
    if stage != "bounds":
        unused |= {name: "with --stage bounds" for name in ("q_len", "kv_len", "block_q", "block_kv", "plot")}
    for name, when in unused.items():
        if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            raise ParameterError(f"--{name.replace('_', '-')} says something only {when}: show it so, or leave the option out")


def _show_trace(variant: Variant, as_json: bool) -> None:
    from .bounds import analyse
    from .expr import text

    if not as_json:
        return stdout().print(variant.explain(), markup=False, soft_wrap=True, highlight=False)
    trace = variant.trace
    bounds = analyse(trace.mask)
    print_json({
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
    from .show import storage_of

    problem = run.problem_for(DTYPES[dtype], head_dim, head_dim_v or head_dim, storage_of(variant), isa)
    return _Plan(variant, problem, *run.specialise(variant, problem))


# ---------------------------------------------------------------- check and run


@app.command()
def check(
    variant: VariantArg,
    dtype: Annotated[list[str], typer.Option(help="May be repeated; all that the device has, unless given.")] = [],  # noqa: B006
    head_dim: Annotated[list[int], typer.Option(help="May be repeated.")] = [64],  # noqa: B006
    device: DeviceOption = "cpu",
    no_tuned: NoTuned = False,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Compile a variant and compare it with the float64 oracle over a grid of shapes. Exit status 1 if it differs."""
    on = _device(device)
    dtype = dtype or list(DTYPE_NAMES if on == "cpu" else DTYPE_NAMES[1:])
    _check_dtypes(dtype)
    found = load_variant(variant, bound)
    from . import check as checking

    _, notes = checking.invent(found, checking.CASES[0])
    with stderr().status("tracing") as status:
        results = list(checking.check(found, dtype, head_dim, progress=lambda text: status.update(escape(text)), device=on))
    passed = all(r.ok for r in results)
    if as_json:
        rows = [record(r) | {"case": record(r.case), "ok": r.ok} for r in results]
        print_json({"variant": found.name, "device": on, "passed": passed, "invented": notes, "results": rows})
    else:
        _print_check(found, results, notes, on)
    if not passed:
        raise typer.Exit(1)


def _print_check(variant: Variant, results: Sequence[Any], notes: Sequence[str], device: str) -> None:
    out = stdout()
    several = len({r.head_dim for r in results}) > 1
    shown = table(
        "case", "dtype", *(["head_dim"] if several else []), ">max error", ">torch's", ">compile s", ">warm ms",
        "verdict",
        title=f"{variant!r}{'' if device == 'cpu' else f' on {device}'} against the float64 oracle",
    )  # fmt: skip
    for i, r in enumerate(results):
        first = i == 0 or (r.dtype, r.head_dim) != (results[i - 1].dtype, results[i - 1].head_dim)
        compiled = f"{r.compile_seconds:.1f}{' (cached)' if r.cached else ''}" if first else ""
        shown.add_row(
            str(r.case), r.dtype, *([str(r.head_dim)] if several else []), f"{r.error:.1e}", f"{r.torch_error:.1e}",
            compiled, f"{r.warm_ms:.2f}", "[green]ok[/]" if r.ok else f"[red]{escape(r.reason)}[/]",
        )  # fmt: skip
    out.print(shown)
    for note in notes:
        out.print(f"invented  {note}", markup=False, highlight=False)
    failed = sum(not r.ok for r in results)
    colour, verdict = ("green", "passed") if not failed else ("red", f"{failed} FAILED")
    out.print(f"[{colour}]{variant.name}: {len(results)} checks, {verdict}[/]")


@app.command()
def run(
    variant: VariantArg,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    q_len: Annotated[int, typer.Option(min=1, help="Queries of each.")] = 1024,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Keys of each; defaults to q_len.")] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Heads of keys and values; defaults to heads.")] = None,
    head_dim: Annotated[int, typer.Option(help="A multiple of 8 up to 256; on a GPU of 16, from 32.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; float32, on a GPU bfloat16, unless given.")] = None,
    device: DeviceOption = "cpu",
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls; the median is printed.")] = 10,
    no_tuned: NoTuned = False,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Run attention on random inputs: time, GFLOP/s, whether the kernels were in the cache."""
    on = _device(device)
    dtype = dtype or ("float32" if on == "cpu" else "bfloat16")
    _check_dtypes([dtype])
    found = load_variant(variant, bound)
    import torch

    from . import check as checking
    from . import run as conductor

    case = checking.Case("run", batch, q_len, kv_len or q_len, heads, kv_heads or heads)
    q, k, v = checking.inputs(case, checking.DTYPES[dtype], head_dim)
    params, notes = checking.invent(found, case)
    q, k, v = (x.to(on) for x in (q, k, v))
    params = checking.on_device(found, params, on)
    times = []
    with torch.no_grad(), stderr().status("compiling") as status:
        start = time.perf_counter()
        compiled = checking.compile_for(found, dtype, head_dim, on)
        ready = time.perf_counter() - start
        for i in range(repeat + 1):
            times.append(checking.timed(lambda: conductor.attention(q, k, v, found, **params), on))
            status.update(f"running, call {i + 1} of {repeat + 1}")
    seconds = median(times[1:])
    work = 4 * batch * heads * q_len * case.kv_len * head_dim  # q.k and p.v over the whole matrix, masked or not
    facts = {
        "variant": found.name, "sizes": str(case).removeprefix("run "), "head_dim": head_dim, "dtype": dtype,
        "device": on, "isa": compiled.isa, "threads": torch.get_num_threads(), "key": compiled.keys[0], "keys": compiled.keys,
        "cache": "hit" if compiled.cached else "miss", "ready_s": ready, "first_call_s": times[0],
        "ms": 1e3 * seconds, "gflops": work / seconds / 1e9, "invented": notes,
    }  # fmt: skip
    if as_json:
        return print_json(facts)
    cache_text = "cache hit" if compiled.cached else f"cache miss, built in {ready:.2f} s"
    isa, where = (compiled.isa, f"{facts['threads']} threads") if on == "cpu" else (f"sm_{compiled.isa}", on)
    out = stdout()
    out.print(
        f"{found.name} {facts['sizes']} d={head_dim} {dtype} {isa} | {1e3 * seconds:.3f} ms | "
        f"{facts['gflops']:.1f} GFLOP/s (masked elements counted) | {where} | {cache_text}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    for note in notes:
        out.print(f"invented  {note}", markup=False, highlight=False)


# ---------------------------------------------------------------- tune


@app.command()
def tune(
    variant: VariantArg,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; float32, on a GPU bfloat16, unless given.")] = None,
    head_dim: Annotated[int, typer.Option(help="As the calls that it is for.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Defaults to head_dim.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU where there is one, unless given.")] = None,
    page_size: Annotated[int, typer.Option(help="On a GPU: slots of a page, 0 without pages.")] = 16,
    phase: Annotated[list[str], typer.Option(help="On a GPU '16 rows', '32 rows', '64 rows' or 'prefill', on the CPU 'attention'; all unless given.")] = [],  # noqa: B006
    batch: Annotated[int | None, typer.Option(min=1, help="Requests; 32, of a prefill 4, on the CPU 1, unless given.")] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Keys of each; 4096, on the CPU 1024, unless given.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="32, on the CPU 8, unless given.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="8 unless given.")] = None,
    bound: SetOption = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Time the candidates of each kernel's configuration on this machine, and keep the fastest for it.

    Results stay what they are but for rounding.

    A record serves a structure, dtypes, head sizes, layout and row-tile class on one model of GPU or CPU, until attngen is upgraded.

    ATTNGEN_TUNED=off ignores all records, `attngen cache clear` removes them."""
    from . import tune as tuning
    from .check import DTYPES
    from .devices import as_device
    import torch

    on = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("float32" if on == "cpu" else "bfloat16")
    _check_dtypes([dtype])
    found = load_variant(variant, bound)
    num_heads, num_kv_heads = heads or (8 if on == "cpu" else 32), kv_heads or 8
    if num_heads % num_kv_heads:
        raise ParameterError(f"--heads {num_heads}, --kv-heads {num_kv_heads}: the second must divide the first")
    listed = {p: tuning.workload_of(p, num_heads, num_kv_heads, batch, kv_len) for p in tuning.chosen_phases(on, phase)}
    workloads = {p: w for p, w in listed.items() if w is not None}
    if on == "cpu" and device is None and not as_json:
        stderr().print("no CUDA device here: the CPU's kernel is tuned", markup=False, highlight=False)
    results = []
    with stderr().status("tracing") as status, torch.no_grad():
        for result in tuning.tune(
            found, dtype=DTYPES[dtype], head_dim=head_dim, head_dim_v=head_dim_v or head_dim, device=on, workloads=workloads,
            page_size=page_size or None if as_device(on).type == "cuda" else None, progress=lambda text: status.update(escape(text)),
        ):  # fmt: skip
            results.append(result)
            if not as_json:
                _print_tuned(result)
    if as_json:
        rows = [record(r) | {"workload": str(r.workload), "measured": [record(m) for m in r.measured], "ratio": r.ratio} for r in results]
        print_json({"variant": found.name, "device": on, "dtype": dtype, "head_dim": head_dim, "phases": rows})


def _print_tuned(result: Any) -> None:
    out = stdout()
    shown = table(*result.measured[0].shape, ">ms", "verdict", title=f"{result.phase}, {result.workload}")
    for i, m in enumerate(result.measured):
        verdict = "[green]kept[/]" if i == result.best else "the rule's choice" if i == result.by_rule else escape(m.left_out)
        shown.add_row(*map(str, m.shape.values()), "" if m.ms is None else f"{m.ms:.3f}", verdict)
    out.print(shown)
    if result.best == result.by_rule:
        out.print(f"{result.phase}: the rule's choice stays, no other is faster by 2%")
    else:
        out.print(f"{result.phase}: {result.ratio:.2f}x the time of the rule's choice")


# Commands are listed in the order in which they are added: these come last.
app.command()(precompile)
app.command("explain-miss")(explain_miss)
app.command()(doctor)
app.add_typer(cache_app, name="cache")
