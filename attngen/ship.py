"""Commands of kernels on their way: ``precompile``, ``cache ...``, ``doctor``, ``explain-miss``."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .errors import AttngenError, CacheError, MissingKernelError, ParameterError
from .printing import print_json, record, stderr, stdout, table

if TYPE_CHECKING:
    from .entry import Entry
    from .precompile import Plan, Result

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SetArg = Annotated[Path, typer.Argument(metavar="SET", help="A set's TOML file, or its lock file.")]
SetOrAll = Annotated[
    Path | None, typer.Argument(metavar="SET", help="A set's TOML or lock file; without: the whole cache.")
]  # fmt: skip
SignOption = Annotated[Path | None, typer.Option("--sign", metavar="KEY.pem", help="An Ed25519 private key to sign with.")]
cache_app = typer.Typer(help="The kernel cache: what is in it, and how it travels.", no_args_is_help=True)


# ---------------------------------------------------------------- precompile


def precompile(
    source: Annotated[Path, typer.Argument(metavar="SET.toml", help="The set: what is served (docs/deploy.md).")],
    arch: Annotated[
        str, typer.Option(help="For these alone: 8.0,9.0a,avx2 ... GPUs take the place of the set's GPUs, CPUs of its CPUs.")
    ] = "",
    jobs: Annotated[int | None, typer.Option("-j", "--jobs", min=1, help="Compilers at once; default by cores and memory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built and what it costs.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build every kernel of a set, without a GPU, and write its lock file. Goes on where an interrupted run stopped."""
    from .precompile import Plan, build, workers_for
    from .sets import VariantSet

    archs = [name for part in arch.split(",") if (name := part.strip())]
    if arch and not archs:
        raise ParameterError(f"--arch {arch!r}: required names such as 9.0a or avx2, joined by commas")
    with stderr().status("tracing the set"):
        plan = Plan.of(VariantSet(source, archs))
    workers = workers_for(jobs)
    facts = {
        "set": plan.variant_set.name, "kernels": len(plan.jobs), "there": len(plan.there), "missing": len(plan.missing),
        "workers": workers, "estimate_s": plan.estimate(workers),
    }  # fmt: skip
    cost = f", about {facts['estimate_s']:.0f} s with {_compilers(workers)}" if plan.missing else ""
    said = f"{facts['set']}: {facts['kernels']} kernels, {facts['there']} there, {facts['missing']} to build{cost}"
    stderr().print(said, markup=False, soft_wrap=True)
    if plan.variant_set.cpu_by_default:
        stderr().print(f'{source} names no archs for some of its kernels, which are built for CPUs alone; for GPUs give archs = '
                       '["9.0a"], or say --arch 9.0a', style="yellow", markup=False, soft_wrap=True)  # fmt: skip
    if dry_run:
        return _print_dry_run(plan, facts, as_json)
    with _ended_as_by_hand() as ended:
        result = build(plan, workers) if as_json else _build_watched(plan, workers)
    lock_path = plan.variant_set.lock_path
    if result.complete:
        _write_lock(lock_path, result.lock(), bool(arch))
    facts |= {"seconds": result.seconds, "peak_bytes": result.peak_bytes, "lock": str(lock_path) if result.complete else None}
    rows = [
        {"key": s.job.key, "variant": s.job.title, "kernel": s.job.name, "arch": s.job.arch, "state": s.state,
         "seconds": s.seconds, "peak_bytes": s.peak_bytes, "error": s.error}
        for s in result.states
    ]  # fmt: skip
    if as_json:
        print_json({**facts, "interrupted": result.interrupted, "rows": rows})
    else:
        _print_summary(result, lock_path)
    if result.interrupted:
        raise typer.Exit(128 + (ended[0] if ended else signal.SIGINT))
    if not result.complete:
        raise typer.Exit(1)


@contextmanager
def _ended_as_by_hand() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does, which takes the compilers along: they are sessions of their own. Gives
    those that came."""
    came: list[int] = []

    def heard(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    wanted = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, heard) for n in wanted if signal.getsignal(n) == signal.SIG_DFL}  # nohup's stays
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compilers(workers: int) -> str:
    from .precompile import cores

    return f"{workers} compiler{'s' if workers > 1 else ''} at once on {cores()} core{'s' if cores() > 1 else ''}"


def _write_lock(path: Path, lock: dict[str, Any], keep_others: bool) -> None:
    """``keep_others``: with --arch, the lock's kernels of other archs stay, as long as they belong to the same set."""
    from .entry import json_text, written_whole
    from .sets import read_lock, sealed

    if keep_others and path.exists():
        try:
            before = read_lock(path)
        except ParameterError:
            before = {"set_sha256": None}
        if (before["set_sha256"], before.get("files")) == (lock["set_sha256"], lock["files"]):
            archs = {unit["arch"] for unit in lock["units"]}
            kept = [unit for unit in before["units"] if unit["arch"] not in archs]
            keys = {role["key"] for unit in kept for role in unit["roles"] if "key" in role}
            lock = {**lock, "units": [*kept, *lock["units"]], "sources": {**before["sources"], **lock["sources"]}}
            lock["kernels"] = dict(sorted({**{k: before["kernels"][k] for k in keys}, **lock["kernels"]}.items()))
            lock = sealed(lock)
    try:
        with written_whole(path) as private:
            private.write_text(json_text(lock), encoding="utf-8")
    except OSError as error:
        raise CacheError(
            f"the lock file {path} cannot be written; the kernels are built.\n  required: a folder with room, that you can write\n"
            f"  found: {error}\n  do: make room or move the set, and run the same command again: it builds nothing anew"
        ) from error


def _print_dry_run(plan: Plan, facts: dict[str, Any], as_json: bool) -> None:
    from .pins import config_record

    units: dict[str, list[Any]] = {}  # a planner serves several
    for unit in plan.units:
        for job in unit.jobs:
            units.setdefault(job.key, []).append({**unit.facts, "consts": job.consts})
    rows = [
        {"key": job.key, "variant": job.title, "kernel": job.name, "arch": job.arch, **_served(units[job.key]),
         "config": str(job.config), "tiles": _tiles({"choice": config_record(job.config)}), "there": job.key in plan.there,
         "seconds": plan.seconds.get(job.key, 0.0)}
        for job in plan.jobs
    ]  # fmt: skip
    if as_json:
        return print_json({**facts, "rows": rows})
    shown = table("key", "variant", "kernel", "config", "dtype", ">head_dim", "arch", "", ">about s")
    for row in rows:
        state = "[green]there[/]" if row["there"] else "to build"
        seconds = "" if row["there"] else f"{row['seconds']:.1f}"
        variant = escape(f"{row['variant']} {row['consts']}".rstrip())
        shown.add_row(row["key"][:12], variant, row["kernel"], escape(row["tiles"]), row["dtype"], row["head_dim"], row["arch"],
                      state, seconds)  # fmt: skip
    stdout().print(shown)


def _served(units: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """dtype and head_dim of what a kernel serves, of a merge what it writes too, and the values of its Consts."""
    consts = {u["consts"] for u in units}
    dtypes = [f"{u['dtype']} to {u['out_dtype']}" if "out_dtype" in u else u.get("dtype", "") for u in units]
    dims = [str(d) if d == dv else f"{d}x{dv}" for u in units for d, dv in [(u.get("head_dim", ""), u.get("head_dim_v", ""))]]
    shared = consts.pop() if len(consts) == 1 else ""
    return {"consts": shared, "dtype": ", ".join(dict.fromkeys(dtypes)), "head_dim": ", ".join(dict.fromkeys(dims))}


def _build_watched(plan: Plan, workers: int) -> Result:
    """Builds with a live display on a terminal, else with a line a kernel on stderr."""
    from rich.live import Live

    from .precompile import build

    err = stderr()
    if not plan.missing:
        return build(plan, workers)
    if err.is_terminal:
        with Live(console=err, refresh_per_second=8, transient=True) as live:
            return build(plan, workers, lambda result: live.update(_display(result)))
    said: set[str] = set()

    def watch(result: Result) -> None:
        done = [s for s in result.states if s.state in ("built", "failed")]
        for state in done:
            if state.job.key not in said:
                said.add(state.job.key)
                err.print(f"[{len(said)}/{len(plan.missing)}] {state.job.title} {state.job.name} {state.job.arch}: {state.state} in "
                          f"{state.seconds:.1f} s, {state.peak_bytes >> 20} MB", markup=False, soft_wrap=True)  # fmt: skip

    return build(plan, workers, watch)


def _display(result: Result) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    shown = table("kernel", "", "arch", "state", ">s", ">cores", ">MB")
    busy = [s for s in result.states if s.state == "builds"]
    last = sorted((s for s in result.states if s.state in ("built", "failed")), key=lambda s: s.started)[-3:]
    for s in (*last, *busy):
        colour = {"built": "green", "failed": "red"}.get(s.state, "cyan")
        shown.add_row(escape(s.job.title), s.job.name, s.job.arch, f"[{colour}]{s.state}[/]", f"{s.seconds:.1f}",
                      f"{s.cores:.1f}", f"{s.peak_bytes >> 20}")  # fmt: skip
    done = sum(s.state in ("built", "failed") for s in result.states)
    total = len(result.plan.missing)
    left = sum(result.plan.seconds[s.job.key] for s in result.states if s.state in ("waits", "builds")) / result.workers
    line = Text(f" {done} of {total} built, {sum(s.state == 'failed' for s in result.states)} failed, about {left:.0f} s left")
    return Group(shown, ProgressBar(total=max(total, 1), completed=done, width=60), line)


def _print_summary(result: Result, lock_path: Path) -> None:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for s in result.states:
        groups.setdefault((s.job.title, s.job.name, s.job.arch), []).append(s)
    shown = table("variant", "kernel", "arch", ">kernels", ">built", ">there", ">compile s", ">peak MB", ">kB")
    for (title, name, arch), states in groups.items():
        entries = [result.entries[s.job.key] for s in states if s.job.key in result.entries]
        shown.add_row(
            escape(title), name, arch, str(len(states)), str(sum(s.state == "built" for s in states)),
            str(sum(s.state == "there" for s in states)), f"{sum(s.seconds for s in states):.1f}",
            f"{max(s.peak_bytes for s in states) >> 20}", f"{sum(e.size for e in entries) / 1e3:.0f}",
        )  # fmt: skip
    out = stdout()
    out.print(shown)
    for s in result.failed:
        out.print(f"FAILED {s.job.title} {s.job.name} {s.job.arch}: {s.error}", style="red", markup=False, soft_wrap=True)
    built = sum(s.state == "built" for s in result.states)
    text = f"{len(result.entries)} of {len(result.states)} kernels are there, "
    text += f"{built} built in {result.seconds:.1f} s with {_compilers(result.workers)}"
    if built:
        text += f", {result.peak_bytes >> 20} MB at most"
    out.print(text, markup=False, soft_wrap=True)
    if result.complete:
        out.print(f"lock file {lock_path}", markup=False, soft_wrap=True)
    elif result.interrupted:
        out.print("interrupted: the same command goes on from here", style="yellow")


# ---------------------------------------------------------------- cache


@cache_app.command("path")
def cache_path(as_json: JsonFlag = False) -> None:
    """Where the cache is."""
    from . import cache

    root = str(cache.cache_root())
    print_json({"path": root}) if as_json else print(root)


@cache_app.command("ls")
def cache_ls(as_json: JsonFlag = False) -> None:
    """The kernels in the cache: variant, configuration, size, age, hits, origin."""
    from . import cache
    from .prune import usage

    store = cache.default()
    rows = []
    for u in usage(store):
        m = u.entry.manifest
        problem = m.get("problem") or {}
        rows.append({
            "key": u.entry.key, "variant": m.get("variant", ""), "kernel": m.get("name", ""), "dtype": problem.get("q_dtype", ""),
            "isa": m.get("isa", ""), "head_dim": problem.get("head_dim", ""), "config": m.get("config", ""), "tiles": _tiles(m),
            "bytes": u.entry.size, "compile_s": m.get("seconds", 0.0), "created": m.get("created", 0.0), "used": u.used, "hits": u.hits,
            "origin": u.origin, "path": str(u.entry.folder),
        })  # fmt: skip
    total = store.size() if store.root.is_dir() else 0
    if as_json:
        return print_json({"path": str(store.root), "bytes": total, "kernels": rows})
    out = stdout()
    if rows:
        shown = table("key", "variant", "kernel", "config", "dtype", ">head_dim", "isa", ">kB", "age", ">hits", "origin")
        for r in rows:
            shown.add_row(
                r["key"][:12], escape(r["variant"]), r["kernel"], escape(r["tiles"]), r["dtype"], str(r["head_dim"]), r["isa"],
                f"{r['bytes'] / 1e3:.0f}", _age(r["created"]), str(r["hits"]), escape(r["origin"]),
            )  # fmt: skip
        out.print(shown)
    summary = f"{len(rows)} kernels, {total / 1e6:.1f} MB in {store.root}"
    out.print(summary, markup=False, highlight=False, soft_wrap=True)


def _tiles(manifest: Any) -> str:
    """The heart of a configuration: its tile, of a planner those it plans for, and what else tells kernels of one problem apart."""
    fields = (manifest.get("choice") or {}).get("fields", {})
    rows = fields.get("block_m") or 64 * fields.get("groups", 0)
    tile = "x".join(str(x) for x in (rows, fields.get("block_n")) if x)
    tile = tile or ", ".join(f"{c['fields']['bm']}x{c['fields']['bn']}{' mixed' * bool(c['fields'].get('mixed'))}" for c in fields.get("classes", ()))
    paged = {True: "paged", False: "contiguous"}.get(fields.get("paged"), "")
    split = f"pieces of {fields['split']}" if fields.get("split") else ""
    more = [word for name, word in (("gather", "gather"), ("rotating_registers", "rotates"), ("mixed", "mixed"), ("joins", "joins")) if fields.get(name)]
    requests = f"{fields['requests']} requests" if "requests" in fields else ""
    return " ".join(filter(None, (tile, paged, split, *more, requests)))


def _age(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@cache_app.command("clear")
def cache_clear(as_json: JsonFlag = False) -> None:
    """Remove every kernel; each is built again at its next use."""
    from . import cache

    store = cache.default()
    count, freed = store.clear() if store.root.is_dir() else (0, 0)
    if as_json:
        return print_json({"path": str(store.root), "removed": count, "bytes": freed})
    print(f"removed {count} kernels, {freed / 1e6:.1f} MB from {store.root}")


@cache_app.command("verify")
def cache_verify(as_json: JsonFlag = False) -> None:
    """Hash every file of every entry anew. Exit status 1 if one is damaged; it is built again at its next use."""
    from . import cache
    from .prune import verify

    rows = [{"key": key, "path": str(folder), "error": error and str(error)} for key, folder, error in verify(cache.default())]
    bad = [row for row in rows if row["error"]]
    if as_json:
        print_json({"checked": len(rows), "damaged": bad})
    else:
        for row in bad:
            stdout().print(row["error"], style="red", markup=False, soft_wrap=True)
        print(f"{len(rows)} entries checked, {len(bad)} damaged")
    if bad:
        raise typer.Exit(1)


@cache_app.command("prune")
def cache_prune(
    max_size: Annotated[str, typer.Option(help="Keep at most this much: 500M, 2G.")] = "",
    max_age: Annotated[str, typer.Option(help="Remove what was not used for this long: 90s, 30m, 12h, 30d.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove the least recently used kernels, never one that a running process has loaded."""
    from . import cache
    from .prune import prune

    if not max_size and not max_age:
        raise ParameterError("cache prune: required --max-size, --max-age or both")
    limit = _amount("--max-size", max_size, {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}) if max_size else None
    age = _amount("--max-age", max_age, {"s": 1, "m": 60, "h": 3600, "d": 86400}) if max_age else None
    done = prune(cache.default(), limit, age, dry_run)
    rows = [{"key": u.entry.key, "variant": u.entry.manifest.get("variant", ""), "bytes": u.bytes} for u in done.removed]
    if as_json:
        return print_json({"removed": rows, "bytes": done.bytes, "in_use": [u.entry.key for u in done.in_use], "dry_run": dry_run})
    word = "would remove" if dry_run else "removed"
    print(f"{word} {len(rows)} kernels, {done.bytes / 1e6:.1f} MB; {len(done.in_use)} stay, which processes have loaded")


def _amount(option: str, text: str, units: dict[str, int]) -> int:
    digits, unit = (text[:-1], text[-1]) if text and not text[-1].isdigit() else (text, "")
    if unit not in units or not digits.replace(".", "", 1).isdecimal():
        raise ParameterError(f"{option} {text}: required a number and one of {', '.join(filter(None, units))}, such as 30{list(units)[-1]}")
    return int(float(digits) * units[unit])


# ---------------------------------------------------------------- packs, wheels, remote stores


def _entries_of(source: Path | None) -> tuple[str, list[Entry], dict[str, Any] | None]:
    """Name, entries and lock file of a set; without one, all of the user's cache."""
    from . import cache
    from .sets import lock_path, read_lock, stale

    store = cache.default()
    if source is None:
        return "all", [entry.light() for e in store.entries() if (entry := store.lookup(e.key)) is not None], None
    path = source if source.suffix == ".lock" else lock_path(source)
    if not source.exists() and not path.exists():
        raise ParameterError(f"no set {source}.\n  required: a set's TOML file, or its lock file beside where it would be\n  found: neither")
    if not path.exists():
        raise MissingKernelError(f"the set {source} has no lock file {path}: run `attngen precompile {source}` first")
    lock = read_lock(path)
    why = stale(source, lock) if source.suffix == ".toml" and source.exists() else ""
    if why:
        raise MissingKernelError(f"{why}: run `attngen precompile {source}` first")
    found = {key: store.find(key) for key in lock["kernels"]}
    missing = [key for key, entry in found.items() if entry is None]
    if missing:
        raise MissingKernelError(
            f"{len(missing)} kernels of {path} are not there, {missing[0][:12]} first: run `attngen precompile {source}` first"
        )
    return lock["name"], [entry.light() for entry in found.values() if entry is not None], lock


@cache_app.command("export")
def cache_export(
    source: SetOrAll = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The pack to write.")] = Path("kernels.attnpack"),
    sign: SignOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a set's kernels and lock file into one file. Equal kernels make equal bytes."""
    from .pack import write_pack

    name, entries, lock = _entries_of(source)
    digest = write_pack(out, name, entries, lock, sign)
    facts = {"pack": str(out), "name": name, "kernels": len(entries), "bytes": out.stat().st_size, "sha256": digest}
    print_json(facts) if as_json else print(f"{out}: {len(entries)} kernels, {facts['bytes'] / 1e6:.1f} MB, sha256 {digest}")


@cache_app.command("import")
def cache_import(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="A file that `cache export` wrote.")],
    into: Annotated[Path | None, typer.Option(help="Another cache folder, readable by all users, such as a system cache; default the user's.")] = None,
    sha256: Annotated[str, typer.Option(help="The digest that the pack must have.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Verify a pack and copy its kernels into the cache."""
    from . import cache
    from .pack import Pack
    from .sets import check_lock

    opened = Pack(pack)
    if sha256 and opened.digest != sha256.lower():
        raise ParameterError(f"{pack} is not the pack that was asked for.\n  required: sha256 {sha256}\n  found: {opened.digest}")
    store = cache.Cache(into.absolute(), shared=True) if into else cache.default()
    if opened.lock is not None:
        check_lock(opened.lock, f"the lock file in {pack}")
    for key in opened.keys:  # all of it, before any of it; one kernel at a time is held
        opened.lookup(key, "pack")
        for read in opened.files(key).values():
            read()
    there = sum(store.adopt(entry)[1] for key in opened.keys if (entry := opened.lookup(key, "pack")) is not None)
    if opened.lock is not None:
        store.keep_lock(opened.name, opened.lock)
    facts = {"pack": str(pack), "name": opened.name, "sha256": opened.digest, "kernels": len(opened.keys), "there": there,
             "signed_by": opened.signed_by, "path": str(store.root)}  # fmt: skip
    if as_json:
        return print_json(facts)
    print(f"{opened.name}: {len(opened.keys) - there} kernels imported, {there} were there, in {store.root}")


@cache_app.command("wheel")
def cache_wheel(
    source: SetArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write it into.")] = Path("dist"),
    version: Annotated[str, typer.Option(help="Of the wheel.")] = "1",
    sign: SignOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a wheel of a set's kernels; where it is installed, they are found by themselves."""
    from .wheel import write_wheel

    name, entries, lock = _entries_of(source)
    path = write_wheel(out, name, version, entries, lock, sign)
    facts = {"wheel": str(path), "name": name, "kernels": len(entries), "bytes": path.stat().st_size}
    print_json(facts) if as_json else print(f"{path}: {len(entries)} kernels, {facts['bytes'] / 1e6:.1f} MB")


@cache_app.command("push")
def cache_push(
    url: Annotated[str, typer.Argument(metavar="URL", help="A store that fsspec knows: s3://..., gs://..., file://...")],
    source: SetOrAll = None,
    sign: SignOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload kernels to a remote store, for ATTNGEN_REMOTE_CACHE to name."""
    from .entry import check_files
    from .layers import RemoteLayer

    name, entries, _ = _entries_of(source)
    for entry in entries:  # all of it, before any of it
        check_files(entry)
    remote = RemoteLayer(url)
    try:
        sent = sum(remote.store(entry, sign) for entry in entries)
    except OSError as error:
        if isinstance(error, AttngenError):
            raise
        raise ParameterError(f"{url} does not take the kernels: {error}") from error
    facts = {"url": url, "name": name, "kernels": len(entries), "sent": sent}
    print_json(facts) if as_json else print(f"{sent} kernels sent, {len(entries) - sent} were there, at {url}")


# ---------------------------------------------------------------- doctor, explain-miss


def doctor(as_json: JsonFlag = False) -> None:
    """What this machine has, what is missing and how to get it. Exit status 1 if the CPU backend cannot work: with ATTNGEN_JIT=off,
    as on a server, that needs nothing that builds."""
    from .doctor import compiles, examine

    with stderr().status("examining"):
        findings = examine()
    works = all(f.ok or not f.required for f in findings)
    if as_json:
        print_json({"cpu_backend": works, "findings": [{**record(f), "verdict": f.verdict} for f in findings]})
    else:
        shown = table("", "", "found", "to do")
        for f in findings:
            colour = "green" if f.ok else "red" if f.required else "yellow"
            shown.add_row(f.name, f"[{colour}]{f.verdict}[/]", escape(f.found), escape(f.remedy))
        stdout().print(shown)
        served = "" if compiles() else ", with kernels that are there already (ATTNGEN_JIT=off)"
        stdout().print(f"[green]the CPU backend works here{served}[/]" if works else "[red]the CPU backend cannot work here[/]")
    if not works:
        raise typer.Exit(1)


def explain_miss(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key, or its first digits, as errors and logs name it.")],
    lock: Annotated[
        list[Path], typer.Option("--lock", help="A lock file or pack that may name the key, beside the sets that are imported or installed; may be repeated.")
    ] = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Why a kernel was not there: which inputs of its key differ from the nearest entry's."""
    from . import cache, explain
    from .pack import Pack

    store = cache.default()
    manifests = [*store.manifests(), *(m for path in lock if path.suffix == ".attnpack" for m in Pack(path).manifests())]
    wanted = _find_inputs(key, store.base / "misses", lock, manifests)
    near = explain.nearest(wanted["inputs"], manifests, but=wanted["key"])
    rows = [record(d) for d in near.differences] if near else []
    if as_json:
        return print_json({"key": wanted["key"], "variant": wanted["variant"], "nearest": near and near.key, "differences": rows})
    out = stdout()
    out.print(f"{wanted['variant']} {wanted['key']}", markup=False, soft_wrap=True)
    if near is None:
        return out.print("the cache has no other kernel of its kind to compare with")
    count = "1 input" if len(rows) == 1 else f"{len(rows)} inputs"
    out.print(f"nearest: {near.title} {near.key}, which differs in {count}", markup=False, soft_wrap=True)
    shown = table("input", "wanted", "found", "means")
    for row in rows:
        shown.add_row(escape(row["name"]), escape(str(row["wanted"])), escape(str(row["found"])), escape(row["meaning"]))
    out.print(shown)


def _find_inputs(key: str, misses: Path, locks: Sequence[Path], manifests: Sequence[Any]) -> dict[str, Any]:
    """What is known of a key: from the entry itself, a refused request, or a lock file."""
    found = [{"key": m["key"], "variant": m.get("variant", ""), "inputs": m["inputs"]} for m in manifests
             if m["key"].startswith(key) and "inputs" in m]  # fmt: skip
    for path in sorted(misses.glob(f"{key}*.json")) if key.isalnum() else ():
        try:
            noted = json.loads(path.read_bytes())
            found.append({"key": noted["key"], "variant": noted["variant"], "inputs": dict(noted["inputs"])})
        except (OSError, ValueError, KeyError, TypeError) as error:  # cut short by a full disk, or not ours to read
            stderr().print(f"passed over {path}: {error!r}", style="yellow", markup=False, soft_wrap=True)
    for content in _locks(locks):
        for name, kernel in content["kernels"].items():
            if name.startswith(key):
                inputs = {**kernel["inputs"], "sources": content["sources"].get(kernel["inputs"].get("backend"), {})}
                found.append({"key": name, "variant": kernel["variant"], "inputs": inputs})
    keys = {item["key"] for item in found}
    if len(keys) != 1:
        raise ParameterError(
            f"{key}: {'several keys begin so' if keys else 'nothing is known of this key'}.\n  required: a key of the cache, of a "
            f"request that ATTNGEN_JIT=off refused here (kept once the cache has its folders, which a first build or import makes), or of "
            f"an imported set, a lock file or a pack (--lock)\n"
            f"  found: {', '.join(k[:16] for k in sorted(keys)) or 'none'}"
        )
    return found[0]


def _locks(given: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The lock files and packs that are ``given``, then those of imported and installed sets."""
    from . import cache, layers
    from .pack import Pack
    from .sets import check_lock, read_lock

    for path in given:
        if path.suffix != ".attnpack":
            yield read_lock(path)
        elif (lock := Pack(path).lock) is not None:
            yield check_lock(lock, f"the lock file in {path}")
    own = layers.FolderLayer("cache", cache.default().root)
    for layer in (*layers.before(), own, *layers.installed()):
        for name in layer.sets():
            with suppress(AttngenError):  # load_set says what is wrong with one that is asked for
                yield check_lock(layer.lock(name), name)
