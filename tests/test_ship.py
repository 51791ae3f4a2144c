"""Sets from their TOML file to a server: precompile, lock file, pack, wheel, layers, load_set, and what each refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy
from test_cache import never
from test_cli import attngen, read_json  # noqa: F401

import attngen as ag
from attngen import cache, counters, debug, find, layers, load, logs, pins, run, sets, start
from attngen.cache import Cache
from attngen.entry import sealed_text
from attngen.errors import CacheError, LoadError, MissingKernelError, ParameterError
from attngen.isa import CPU_ISAS
from attngen.pack import Pack, write_pack
from attngen.paths import PACKAGE, templates_dir
from attngen.precompile import Plan, build
from attngen.prune import usage
from attngen.records import record
from attngen.spec import Problem
from attngen.variants import Causal
from toolchain import needs_nvcc

SET = """
[[kernels]]
variants = ["Causal", {name = "mine.py:Mine", bind = {gain = 2}}]
dtypes = ["float32"]
head_dims = [32]
archs = ["cpu"]
"""
MINE = """
import attngen as ag

class Mine(ag.Variant):
    gain: ag.Const
    bias: ag.Tensor("heads")

    def logits(self, s, at):
        return s * self.gain + self.bias[at.head]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a set, its lock file, and a cache that holds its kernels. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "llama.toml").write_text(SET)
    (folder / "mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNGEN_CACHE_DIR", str(folder / "cache"))
        result = build(Plan.of(sets.VariantSet(folder / "llama.toml")), 2)
        assert result.complete and not result.failed
        (folder / "llama.lock").write_text(json.dumps(result.lock(), indent=1, sort_keys=True) + "\n")
        entries = [cache.default().lookup(key) for key in result.lock()["kernels"]]
        write_pack(folder / "llama.attnpack", "llama", entries, result.lock())
    return folder


@pytest.fixture
def here(built, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the set's folder without its cache, an empty cache in the environment, and a process that loaded nothing."""
    for name in ("llama.toml", "llama.lock", "mine.py", "llama.attnpack"):
        shutil.copy(built / name, tmp_path / name)
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As in a process that loaded nothing yet."""
    pins.unpin_all()
    run._kernels.clear()
    layers._attached.clear()
    layers.installed.cache_clear()
    cache._cache_of.cache_clear()
    counters.reset()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def keys_of(folder: Path) -> list[str]:
    return keys_of_lock(json.loads((folder / "llama.lock").read_text()))


def keys_of_lock(lock: dict[str, object]) -> list[str]:
    return list(lock["kernels"])


# ---- precompile ------------------------------------------------------------------------------------------------------


def test_precompile_builds_what_is_missing_and_writes_the_lock(here, built, attngen):  # noqa: F811
    (here / "llama.lock").unlink()
    shutil.copytree(built / "cache", here / "cache")
    one, two = keys_of(built)
    shutil.rmtree(Cache(here / "cache").folder(two))  # as after an interruption
    dry = read_json(attngen("precompile", here / "llama.toml", "--dry-run", "--json"))
    assert (dry["kernels"], dry["there"], dry["missing"]) == (2, 1, 1) and dry["estimate_s"] > 0
    assert {row["key"]: row["there"] for row in dry["rows"]} == {one: True, two: False}
    assert not (here / "llama.lock").exists() and not Cache(here / "cache").folder(two).exists()
    done = read_json(attngen("precompile", here / "llama.toml", "--json"))
    assert {row["key"]: row["state"] for row in done["rows"]} == {one: "there", two: "built"}
    assert next(row for row in done["rows"] if row["key"] == two)["peak_bytes"] > 1 << 20
    assert (here / "llama.lock").read_bytes() == (built / "llama.lock").read_bytes()
    status, out, err = attngen("precompile", here / "llama.toml")
    assert status == 0 and "2 of 2 kernels are there, 0 built" in out and "2 there, 0 to build" in err
    (here / ("long" * 20 + ".toml")).write_text(SET)
    said = attngen("precompile", here / ("long" * 20 + ".toml"), "--dry-run")[2].splitlines()
    assert said == ["long" * 20 + ": 2 kernels, 2 there, 0 to build"]  # a line, though no terminal says how wide


def test_archs_on_the_command_line_take_the_place_of_their_kind(tmp_path, attngen):  # noqa: F811
    table = '[[kernels]]\nvariants = ["Causal"]\nphases = ["decode"]\nlayouts = ["paged"]\nhead_dims = [64]\n'
    (tmp_path / "two.toml").write_text(f'{table}archs = ["9.0a"]\n{table}archs = ["cpu"]\ndtypes = ["float32"]\n')

    def archs(*options: str) -> set[str]:
        return {row["arch"] for row in read_json(attngen("precompile", tmp_path / "two.toml", "--dry-run", "--json", *options))["rows"]}

    assert archs() == {"90a", run.host_isa()}
    assert archs("--arch", "8.0,8.6") == {"80", "86"} and archs("--arch", "avx2,generic") == {"avx2", "generic"}
    assert archs("--arch", "generic, 8.0 ,") == {"generic", "80"}
    (tmp_path / "gpu.toml").write_text(f'{table}archs = ["9.0a"]\n')
    for name, given, said in (
        ("two", "3.0", "archs has '3.0'"), ("two", "foo", "arch 'foo'"), ("gpu", "8.9,foo", "arch 'foo'"), ("two", " ,", "required names"),
        ("gpu", "8.9,cpu", 'serves nothing on cpu. required: a table whose archs have a CPU, which --arch cpu takes the place of found: '
         f'GPUs alone do: add "cpu" to the archs of {tmp_path}/gpu.toml, or leave cpu out'),
    ):  # fmt: skip
        status, _, err = attngen("precompile", tmp_path / f"{name}.toml", "--dry-run", "--arch", given)
        assert status == 2 and said in " ".join(err.split()), (given, err)


def test_rows_of_a_dry_run_can_be_told_apart(here, attngen):  # noqa: F811
    (here / "many.toml").write_text(
        '[[kernels]]\nvariants = [{name = "mine.py:Mine", bind = {gain = 2}}, {name = "mine.py:Mine", bind = {gain = 3}}]\n'
        'head_dims = [64, "192x128"]\narchs = ["9.0a", "8.0", "cpu"]\nphases = ["prefill", "decode", "append", "merge", "mask"]\n'
        'layouts = ["paged", "paged-odd", "contiguous"]\ndtypes = ["bfloat16", "float16"]\n'
        '[[kernels]]\nvariants = ["Causal"]\narchs = ["9.0a"]\nlayouts = ["paged", "paged-shared"]\n'
    )
    rows = read_json(attngen("precompile", here / "many.toml", "--dry-run", "--json"))["rows"]
    table = [line.split()[1:] for line in attngen("precompile", here / "many.toml", "--dry-run")[1].splitlines() if " to build " in line]
    assert len(rows) == len(table) > 100
    assert [line for line in table if table.count(line) > 1] == []
    assert {"64", "192x128"} <= {row["head_dim"] for row in rows} and all(row["config"] for row in rows)
    assert any(line[:6] == ["Mine", "gain=3", "decode", "16", "paged", "bfloat16"] for line in table), table[:3]


def test_archs_on_the_command_line_leave_the_locks_others(here, built, attngen):  # noqa: F811
    shutil.copytree(built / "cache", here / "cache")
    before = json.loads((here / "llama.lock").read_text())
    assert attngen("precompile", here / "llama.toml", "--arch", "generic")[0] == 0
    lock = json.loads((here / "llama.lock").read_text())
    assert [u["arch"] for u in lock["units"]] == [run.host_isa()] * 2 + ["generic"] * 2
    assert len(lock["kernels"]) == 4 and before["kernels"].items() < lock["kernels"].items()
    assert len(ag.load_set(here / "llama.toml", jit=False).kernels) == 2  # of this machine
    again = (here / "llama.lock").read_bytes()
    assert attngen("precompile", here / "llama.toml", "--arch", "generic")[0] == 0 and (here / "llama.lock").read_bytes() == again
    (here / "mine.py").write_text(MINE + "\n# another file, so that what the lock says of it is no longer so\n")
    assert attngen("precompile", here / "llama.toml", "--arch", "generic")[0] == 0
    assert {u["arch"] for u in json.loads((here / "llama.lock").read_text())["units"]} == {"generic"}


def test_a_set_that_names_no_archs_says_so(tmp_path, attngen):  # noqa: F811
    (tmp_path / "bare.toml").write_text('[[kernels]]\nvariants = ["Causal"]\nphases = ["decode"]\nhead_dims = [64]\n')
    status, _, err = attngen("precompile", tmp_path / "bare.toml", "--dry-run")
    assert status == 0 and "built for CPUs alone" in err and "--arch 9.0a" in err
    status, out, err = attngen("precompile", tmp_path / "bare.toml", "--dry-run", "--arch", "9.0a")
    assert status == 0 and "CPUs alone" not in err and " 90a " in out and "avx" not in out


def test_the_estimate_counts_cpu_seconds(here, built, monkeypatch):
    """A clock's seconds count whatever else the machine did while a kernel was built."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / "cache"))
    shutil.copytree(built / "cache", here / "cache")
    one, two = keys_of(built)
    manifest = Cache(here / "cache").folder(one) / "manifest.json"
    found = json.loads(manifest.read_text())
    assert 0 < found["cpu_seconds"] < 60
    manifest.write_text(sealed_text({**found, "cpu_seconds": 7.5, "seconds": 1000.0}))
    shutil.rmtree(Cache(here / "cache").folder(two))
    assert Plan.of(sets.VariantSet(here / "llama.toml")).estimate(2) == 7.5


@pytest.mark.parametrize("free,most", [(0, 1), (800 << 20, 1), (1100 << 20, 2), (1 << 40, 4)], ids=["none left", "for one", "for two", "plenty"])
def test_as_many_compilers_as_memory_allows(here, monkeypatch, free, most):
    from attngen import precompile
    from attngen.units import Job

    monkeypatch.setattr(precompile, "free_bytes", lambda: free)
    at_once, seen, change = 0, [], threading.Lock()

    def compiler() -> tuple[object, bool, float]:
        nonlocal at_once
        with change:
            at_once += 1
            seen.append(at_once)
        time.sleep(0.3)
        with change:
            at_once -= 1
        return object(), False, 0.3

    jobs = tuple(Job(f"{i:064x}", "Toy", "decode", "90a", compiler) for i in range(4))
    plan = Plan(sets.VariantSet(here / "llama.toml"), (), jobs, {}, {job.key: 1.0 for job in jobs})
    result = build(plan, 4)
    assert result.complete and max(seen) == most and precompile.workers_for(None) == min(most, len(os.sched_getaffinity(0)))


def test_the_display_shows_what_is_being_built(here):
    from rich.console import Console

    from attngen.precompile import Result, State
    from attngen.ship import _display
    from attngen.units import Job

    jobs = [Job(f"{i:064x}", title, "decode", "90a", lambda: None) for i, title in enumerate(("Done", "Busy", "Later"))]
    plan = Plan(sets.VariantSet(here / "llama.toml"), (), tuple(jobs), {}, {job.key: 3.0 for job in jobs})
    states = [State(jobs[0], "built", 2.5), State(jobs[1], "builds", 1.2, cores=0.9, peak_bytes=99 << 20), State(jobs[2])]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(_display(Result(plan, states, {}, workers=2)))
    text = console.export_text()
    for said in (r"Done +decode +90a +built +2\.5", r"Busy +decode +90a +builds +1\.2 +0\.9 +99", r"1 of 3 built, 0 failed, about 3 s left"):
        assert re.search(said, text), text
    assert "Later" not in text


def test_a_kernel_that_fails_does_not_stop_the_others(here, attngen, monkeypatch):  # noqa: F811
    real = run.build_cpu

    def broken(variant, problem):
        if variant.name == "Mine":
            raise ag.BuildError("the compiler refused a kernel")
        return real(variant, problem)

    monkeypatch.setattr(run, "build_cpu", broken)
    (here / "llama.lock").unlink()
    done = read_json(attngen("precompile", here / "llama.toml", "--json", "-j", 1), status=1)
    assert sorted(row["state"] for row in done["rows"]) == ["built", "failed"]
    assert done["lock"] is None and not (here / "llama.lock").exists()
    assert "FAILED Mine" in attngen("precompile", here / "llama.toml")[1]


def test_an_interrupted_precompile_goes_on_where_it_stopped(here, monkeypatch):
    monkeypatch.setenv("ATTNGEN_JIT", "off")  # of servers; who asks to build gets it
    (here / "llama.lock").unlink()
    command = [sys.executable, "-m", "attngen", "precompile", here / "llama.toml", "-j", "1"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  - a suite in the background ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for line in process.stderr:
        if line.startswith("[1/2]"):
            process.send_signal(signal.SIGINT)
            break
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted: the same command goes on from here" in out
    assert not (here / "llama.lock").exists() and len(list(Cache(here / "cache").entries())) == 1
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert sorted(row["state"] for row in json.loads(done.stdout)["rows"]) == ["built", "there"], done.stderr
    assert (here / "llama.lock").exists()


def sessions() -> dict[int, str]:
    """Command lines by process, of those whose session is not this one's."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[3]) != os.getsid(0):
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_ended_precompile_takes_its_compilers_along(here, number):
    """As `docker stop` or a closed terminal end it."""
    (here / "llama.lock").unlink()
    compiler = here / "slow-cxx"
    compiler.write_text(f'#!/bin/sh\ncase "$1" in --version) exec g++ --version;; esac\nsleep 100 # {here}\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "attngen", "precompile", here / "llama.toml", "-j", "2"]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  - a suite under nohup ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard,
                               env={**os.environ, "CXX": str(compiler)})  # fmt: skip
    mine = lambda: [text for text in sessions().values() if str(compiler) in text]  # noqa: E731
    deadline = time.monotonic() + 60
    while len(mine()) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "it does not compile"
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "interrupted: the same command goes on from here" in out
    assert mine() == [] and list((here / "cache" / "v1" / "building").iterdir()) == []


def test_the_readmes_set_serves_a_batch_as_it_comes(here, monkeypatch):
    """With the dtype that BatchAttention takes where none is given, also on the CPU."""
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    (here / "readme.toml").write_text(text.replace('["Causal", "SlidingWindow"]', '["Causal"]'))
    assert build(Plan.of(sets.VariantSet(here / "readme.toml")), 2).complete
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    attn = ag.BatchAttention(Causal(), num_heads=2, num_kv_heads=2, head_dim=128, page_size=16, max_requests=1, max_q_tokens=8,
                             max_pages=1, device="cpu")  # fmt: skip
    attn.plan([0, 8], block_table=[[0]], kv_lens=[8])
    assert attn.run(torch.zeros(8, 2, 128, dtype=torch.bfloat16), torch.zeros(1, 2, 16, 2, 128, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(
    "text,message",
    [
        ("[[kernels]]\nvariants = 'Causal'\n", "variants is 'Causal'; required a list"),
        ("[[kernels]]\nvariant = ['Causal']\n", "unknown key 'variant'"),
        ("[[kernels]]\nvariants = ['Causal']\nhead_dims = ['12y8']\n", "head_dims has '12y8'"),
        ("[[kernels]]\nvariants = ['Causal']\ndtypes = ['fp8']\n", "dtypes has 'fp8'"),
        ("[[kernels]]\nvariants = ['Causal']\narchs = ['pdp11']\n", "arch 'pdp11'"),
        ("[[kernels]]\nvariants = ['Causal']\narchs = ['7.5']\n", r"'7.5': .* sm_75 has no CUDA .*; required sm_80, .*, sm_120; or of a CPU: cpu, avx512_bf16"),
        ("[[kernels]]\nvariants = ['Causla']\n", "no variant 'Causla' in the library. Did you mean Causal"),
        ("[[kernels]]\nvariants = ['Causal']\nhead_dims = [12]\n", "head_dim 12"),
        ("[[kernels]]\nvariants = ['mine.py']\n", r"Mine needs a value for its Const gain: {name = \.\.\., bind = {gain = \.\.\.}}"),
        ("[[kernels]]\nvariants = [{name = 'SoftCap', bind = {cup = 3}}]\n", r"bind = {cup = 3}: required a name with a field of SoftCap \(cap\)"),
        ("[[kernels]]\nvariants = [{name = 'SoftCap', bind = {cap = 'big'}}]\n", "bind = {cap = \"big\"}: cap is scalar f32"),
        ("[kernels]\n", r"one \[\[kernels\]\] table or more .*found \[kernels\]: write \[\[kernels\]\], in double brackets"),
        ("kernels = [", "is not TOML"),
    ],
)
def test_a_set_that_is_wrong_says_where(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises((ParameterError, ag.VariantError, ag.UnsupportedError), match=message) as caught:
        Plan.of(sets.VariantSet(tmp_path / "bad.toml"))
    assert "bad.toml" in str(caught.value)


# ---- load_set --------------------------------------------------------------------------------------------------------


def test_a_set_is_loaded_and_serves(here, built, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    before = snapshot(built)
    loaded = ag.load_set(here / "llama.toml", jit=False)
    assert [row.key for row in loaded.kernels] == [k for u in loaded.units for k in [u["roles"][0]["key"]]]
    assert loaded.layers() == {"cache": 2} and loaded.built == 0
    stats = ag.stats()
    assert (stats["hits"], stats["layers"], stats["misses"], stats["builds"]) == (2, {"cache": 2}, 0, 0)
    assert "2 kernels in" in loaded.report() and "Causal attention" in loaded.report()
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    q, k, v = (torch.randn(1, 5, 2, 32) for _ in range(3))
    torch.testing.assert_close(ag.attention(q, k, v, Causal()), ag.reference(q, k, v, Causal()).float(), rtol=1e-5, atol=1e-5)
    assert ag.warmup(loaded) > 0
    assert ag.stats()["builds"] == 0
    used = {u.entry.key: u.hits for u in usage(Cache(built / "cache"))}
    assert all(used[row.key] for row in loaded.kernels)  # else a prune by age would remove what a server starts with
    assert {p: s for p, s in snapshot(built).items() if "/hits" not in p} == {p: s for p, s in before.items() if "/hits" not in p}


def test_what_is_missing_is_said_at_once(here, built):
    shutil.copytree(built / "cache", here / "cache")
    gone, kept = keys_of(here)
    shutil.rmtree(Cache(here / "cache").folder(gone))
    with pytest.raises(MissingKernelError) as caught:
        ag.load_set(here / "llama.toml", jit=False)
    message = str(caught.value)
    assert message.startswith("1 kernel of the set llama is not there.") and gone[:12] in message and kept[:12] not in message and f"do: attngen precompile {here / 'llama.toml'} --arch" in message
    flip(Cache(here / "cache").folder(kept) / "kernel.so")
    with pytest.raises(MissingKernelError, match=f"(?s)^2 kernels of the set llama are not there.*{kept[:12]}: a damaged cache entry") as caught:
        ag.load_set(here / "llama.toml", jit=False)
    assert set(caught.value.missing) == {gone, kept} and caught.value.missing[gone] == "in no layer"
    assert "  required: all 2, as its lock file says\n" in str(caught.value)
    lock = json.loads((here / "llama.lock").read_text())
    lock["units"][0]["arch"] = "avx2" if run.host_isa() != "avx2" else "generic"  # of another machine
    (here / "other.lock").write_text(json.dumps(sets.sealed(lock)))
    with pytest.raises(MissingKernelError, match="required: the 1 for this machine of 2 in its lock file"):
        ag.load_set(here / "other.lock", jit=False)


def test_what_a_server_lacks_can_be_asked_about(here, built, attngen, monkeypatch):  # noqa: F811
    """Of a set, a pack and an imported set: the commands of the error are whole, and work."""
    folder = here / "my models"
    folder.mkdir()
    for name in ("llama.toml", "llama.lock", "mine.py"):
        shutil.copy(here / name, folder / name)
    lock = json.loads((here / "llama.lock").read_text())
    gone, kept = lock["kernels"]
    kernel = Cache(built / "cache").lookup(kept)
    write_pack(here / "half.attnpack", "half", [kernel], lock)
    (here / "alone").mkdir()
    shutil.move(here / "half.attnpack", here / "alone" / "half.attnpack")
    for source in (here / "alone" / "half.attnpack", "half", folder / "llama.toml"):
        if source == "half":
            layers._attached.clear()
            assert attngen("cache", "import", here / "alone" / "half.attnpack")[0] == 0
        with pytest.raises(MissingKernelError) as caught:
            ag.load_set(source, jit=False)
        assert set(caught.value.missing) == {gone}
        remedy = str(caught.value).splitlines()[-1]
        assert (f"attngen precompile '{folder}/llama.toml' --arch" in remedy) == (source == folder / "llama.toml"), remedy
        assert ("precompile llama.toml" in remedy and "where llama.toml is" in remedy) == (source != folder / "llama.toml"), remedy
        words = shlex.split(remedy.partition("to see why: attngen ")[2])
        assert words[:2] == ["explain-miss", gone[:16]]
        asked = read_json(attngen(*words, "--json"))
        assert (asked["key"], asked["nearest"]) == (gone, kept) and asked["differences"]
    (here / "cache" / "v1" / "misses" / f"{gone}.json").write_text('{"key": ')
    status, _, err = attngen("explain-miss", gone)
    assert status == 0 and "passed over" in err


def test_warnings_of_compiling_while_the_process_runs(here, monkeypatch, caplog):
    monkeypatch.setenv("ATTNGEN_JIT", "warn")
    with pytest.warns(ag.JitWarning, match="ATTNGEN_JIT=warn: compiling 2 kernels of the set .*llama.toml while the process runs"):
        assert ag.load_set(here / "llama.toml").built == 2
    assert caplog.text == ""  # a process that says nothing of logs would print it once more
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ag.load_set(here / "llama.toml").built == 0


def test_jit_builds_what_is_missing(here):
    (here / "llama.lock").unlink()
    with pytest.raises(MissingKernelError, match="(?s)there is no lock file.*attngen precompile"):
        ag.load_set(here / "llama.toml", jit=False)
    loaded = ag.load_set(here / "llama.toml")
    assert loaded.built == 2 and len(loaded.kernels) == 2
    # A lock file of another release, whose kernels are nowhere: this one's are built instead.
    text = json.dumps(loaded.lock)
    for key in keys_of_lock(json.loads(text)):
        text = text.replace(key, key[::-1])
    (here / "llama.lock").write_text(json.dumps(sets.sealed(json.loads(text))))
    forget()
    with pytest.raises(MissingKernelError, match="2 kernels of the set"):
        ag.load_set(here / "llama.toml", jit=False)
    assert {row.key for row in ag.load_set(here / "llama.toml").kernels} == {row.key for row in loaded.kernels}


def test_a_lock_file_that_no_longer_fits_is_refused(here):
    (here / "mine.py").write_text(MINE.replace("s * self.gain", "s - self.gain"))
    with pytest.raises(MissingKernelError, match="mine.py changed since llama.lock was written"):
        ag.load_set(here / "llama.toml", jit=False)
    shutil.copy(here / "llama.toml", here / "x.toml")
    (here / "llama.toml").write_text(SET + "phases = ['decode']\n")
    with pytest.raises(MissingKernelError, match="llama.toml changed since"):
        ag.load_set(here / "llama.toml", jit=False)
    (here / "mine.py").unlink()
    shutil.copy(here / "x.toml", here / "llama.toml")
    with pytest.raises(MissingKernelError, match=r"mine.py, which .*llama.toml names, cannot be read \(No such file or directory\)"):
        ag.load_set(here / "llama.toml", jit=False)
    (here / "llama.lock").write_text("{}")
    with pytest.raises(ParameterError, match="is no lock file"):
        ag.load_set(here / "llama.lock")


def test_a_set_for_another_machine_is_refused(here, monkeypatch):
    other = next(isa for isa in CPU_ISAS if isa != run.host_isa())
    monkeypatch.setattr("attngen.start.host_isa", lambda: other)
    with pytest.raises(MissingKernelError, match=f"(?s)no kernels for {other},.*do: attngen precompile .*--arch {other}"):
        ag.load_set(here / "llama.attnpack", jit=False)


def for_gpus(here: Path) -> Path:
    """A set for GPUs alone, and its lock file. Its kernels are none."""
    (here / "gpu.toml").write_text(SET.replace('["cpu"]', '["9.0a"]').replace("float32", "bfloat16"))
    lock = json.loads((here / "llama.lock").read_text())
    units = [unit | {"backend": "cuda", "arch": "90a", "layout": "paged", "batch_invariant": False} for unit in lock["units"]]
    kernels = {key: kernel | {"arch": "90a"} for key, kernel in lock["kernels"].items()}
    digest = sets.VariantSet(here / "gpu.toml").digest
    lock |= {"name": "gpu", "units": units, "kernels": kernels, "set_sha256": digest}
    (here / "gpu.lock").write_text(json.dumps(sets.sealed(lock)))
    return here / "gpu.toml"


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_remedy_of_a_set_without_a_kind_of_archs_works(here, attngen, monkeypatch, device):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = for_gpus(here)
    with pytest.raises(MissingKernelError) as caught:
        ag.load_set(path, jit=False, device=device)
    remedy = re.search(r'do: add "(\S+)" to the archs of (\S+), then attngen (.*), or import its pack', str(caught.value))
    assert remedy and remedy[2] == str(path), caught.value
    path.write_text(path.read_text().replace('"9.0a"', f'"9.0a", "{remedy[1]}"'))
    rows = read_json(attngen(*shlex.split(remedy[3]), "--dry-run", "--json"))["rows"]
    assert {row["arch"] for row in rows} == {"90a", run.host_isa()}


def test_a_start_that_may_compile_builds_what_the_set_has_of_this_machine(here, built):
    shutil.copytree(built / "cache", here / "cache")
    lock, _ = start._build(here / "llama.toml", [run.host_isa(), "90a"])
    assert {unit["arch"] for unit in lock["units"]} == {run.host_isa()}
    with pytest.raises(ParameterError, match="serves nothing on generic"):
        start._build(for_gpus(here), ["generic"])


@pytest.mark.parametrize("source", ["nowhere.toml", "nobody", "some/folder"])
def test_a_source_that_is_none(here, source):
    with pytest.raises(ParameterError, match="required"):
        ag.load_set(source)


def test_warming_up_says_whose_file_it_lacks(here, monkeypatch):
    """A pack holds no Python: the variants of a set are beside it, or are given."""
    loaded = ag.load_set(here / "llama.attnpack", jit=False)
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    assert ag.warmup(loaded) > 0
    (here / "mine.py").rename(here / "elsewhere.py")
    with pytest.raises(ag.VariantError, match="(?s)there is no file .*mine.py.*do: copy mine.py to .*variants={\"mine.py:Mine\": Mine}"):
        ag.warmup(loaded)
    mine = find._from_file(here / "elsewhere.py", "Mine")
    for given in (mine, mine(gain=2)):
        assert ag.warmup(loaded, variants={"mine.py:Mine": given}) > 0
    assert ag.stats()["builds"] == 0


def test_a_set_for_cpus_says_so_where_a_gpu_is(here, monkeypatch, caplog):
    from attngen.choose_cuda import arch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("attngen.cuda.device_arch", lambda index: arch("90a"))
    ag.load_set(here / "llama.attnpack", jit=False)
    assert "the set llama has kernels for CPUs alone" in caplog.text
    caplog.clear()
    ag.load_set(here / "llama.attnpack", jit=False, device="cpu")
    assert "CPUs alone" not in caplog.text


# ---- kernels that are not what they seem -----------------------------------------------------------------------------


def exchanged(lock: dict, one: int, two: int) -> None:
    units = lock["units"]
    units[one]["roles"], units[two]["roles"] = units[two]["roles"], units[one]["roles"]


def test_a_lock_file_that_gives_the_wrong_kernel_is_refused(here, built, monkeypatch):
    """As after a bad merge of two lock files: each kernel is whole, and serves another variant."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    lock = json.loads((here / "llama.lock").read_text())
    exchanged(lock, 0, 1)
    (here / "llama.lock").write_text(json.dumps(lock))
    with pytest.raises(ParameterError, match="(?s)is no lock file.*edited, merged or cut"):
        ag.load_set(here / "llama.toml", jit=False)
    (here / "llama.lock").write_text(json.dumps(sets.sealed(lock)))
    with pytest.raises(CacheError, match="(?s)gives Causal .* kernels that serve something else.*precompile again"):
        ag.load_set(here / "llama.toml", jit=False)
    assert not pins._pinned  # nothing of it


def test_half_a_lock_file_is_not_served_as_the_whole(here, built, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    whole = json.loads((here / "llama.lock").read_text())

    def refused(lock: dict, message: str) -> None:
        (here / "cut.lock").write_text(json.dumps(lock))
        with pytest.raises(ParameterError, match=f"(?s)is no lock file.*{message}.*do: write it again"):
            ag.load_set(here / "cut.lock", jit=False)

    half = {**whole, "units": whole["units"][1:]}
    refused(half, "edited, merged or cut")
    del half["seal"]  # as the last release wrote them
    refused(half, "1 kernels that its units name and 2 that it lists")
    key = half["units"][0]["roles"][0]["key"]
    refused({**half, "seal": whole["seal"], "kernels": {key: whole["kernels"][key]}}, "edited, merged or cut")
    (here / "cut.lock").write_text(json.dumps({n: v for n, v in whole.items() if n != "seal"}))
    assert len(ag.load_set(here / "cut.lock", jit=False).kernels) == 2


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Of everything inside a JSON value."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, name)
        yield from places(inner, (*at, name))


def test_a_lock_file_of_other_types_is_an_error_of_ours(here, built, monkeypatch):
    """Every field of one without a seal in turn: of another type, or gone."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    whole = {n: v for n, v in json.loads((here / "llama.lock").read_text()).items() if n != "seal"}
    for place in places(whole):
        for bad in (None, 7, "x", [], {}, ["x"], {"key": "x"}, [[]], "gone"):
            lock = json.loads(json.dumps(whole))
            holder = lock
            for name in place[:-1]:
                holder = holder[name]
            if bad == "gone":
                del holder[place[-1]]
            else:
                holder[place[-1]] = bad
            with contextlib.suppress(ag.AttngenError):
                start._load(here / "llama.lock", sets.check_lock(lock, "it"), start._here(None), None)


@pytest.mark.parametrize("key", ["../../../../tmp/evil", "A" * 64, "ab"])
def test_a_lock_file_names_no_path(here, key):
    text = (here / "llama.lock").read_text().replace(keys_of(here)[0], key)
    (here / "llama.lock").write_text(json.dumps(sets.sealed(json.loads(text))))
    with pytest.raises(ParameterError, match="a key that is none"):
        ag.load_set(here / "llama.lock", jit=False)
    (here / "llama.lock").write_text("[" * 100_000)
    with pytest.raises(ParameterError, match="cannot be read"):
        ag.load_set(here / "llama.lock", jit=False)


def test_a_kernel_for_a_better_cpu_is_not_loaded(here, built, monkeypatch):
    """It would end the process by an illegal instruction."""
    entry = Cache(built / "cache").lookup(keys_of(here)[0])
    monkeypatch.setattr(load, "_cpu_kernels", {})
    for isa, here_is in (("avx512_bf16", "avx512"), ("avx512", "avx2"), ("avx2", "generic"), ("armv9", "generic")):
        monkeypatch.setattr(load, "host_isa", lambda isa=here_is: isa)
        with pytest.raises(LoadError, match=f"(?s)required: a kernel that a CPU with {here_is} runs.*found: one for {isa}"):
            load.load_kernel(dataclasses.replace(entry, manifest={**entry.manifest, "isa": isa}))


def test_of_two_packs_with_one_key_the_first_serves_whole(tmp_path, monkeypatch):
    """Other bytes under the same key: each pack is true to itself, and their files are never mixed."""
    packs = []
    for name in ("one", "two"):
        store = Cache(tmp_path / name)
        store.get_or_build("cd" + "0" * 62, described(name.encode() * 1000))
        write_pack(tmp_path / f"{name}.attnpack", name, store.entries())
        packs.append(Pack(tmp_path / f"{name}.attnpack"))
    monkeypatch.setattr(layers, "_attached", [])
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    for pack in (*packs, packs[0]):
        layers.attach(pack)
    assert len(layers._attached) == 2
    entry = cache.default().find("cd" + "0" * 62)
    assert (entry.layer, entry.read(), entry.manifest["origin"]["sha256"]) == ("pack:one", b"one" * 1000, packs[0].digest)
    # A pack whose blob is the other's does not open, though the index is untouched.
    content = (tmp_path / "one.attnpack").read_bytes()
    (tmp_path / "one.attnpack").write_bytes(content.replace(b"one" * 1000, b"two" * 1000))
    with pytest.raises(CacheError, match="with sha256"):
        Pack(tmp_path / "one.attnpack").lookup("cd" + "0" * 62, "pack")
    with pytest.raises(CacheError, match="with sha256"):  # it is read where it lies
        packs[0].lookup("cd" + "0" * 62, "pack")


def test_the_pack_that_is_open_is_looked_at_not_its_name(packed, tmp_path):
    opened = Pack(packed)
    others = tmp_path / "others.attnpack"
    shutil.copy(packed, others)
    others.chmod(0o666)
    packed.unlink()
    packed.symlink_to(others)
    opened.check_private()  # what is open is still ours alone
    with pytest.raises(CacheError, match="can be written by others"):
        Pack(packed).check_private()


# ---- a later release, another place ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_release(tmp_path_factory) -> Path:
    """attngen as a later release might be: another text of the compiler, so that every key differs."""
    folder = tmp_path_factory.mktemp("next")
    shutil.copytree(PACKAGE, folder / "attngen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(templates_dir(), folder / "templates")
    shutil.copytree(PACKAGE.parent / "variants", folder / "variants", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "templates" / "cpu" / "functions.h", "a") as text:
        text.write("// a later release\n")
    return folder


SERVE = """
import sys, torch
import attngen as ag
from attngen.variants import Causal
if sys.argv[1] != "-":
    print(ag.load_set(sys.argv[1], jit=False).summary(), file=sys.stderr)
q, k, v = (torch.randn(1, 5, 2, 32) for _ in range(3))
out = ag.attention(q, k, v, Causal())
assert (out - ag.reference(q, k, v, Causal())).abs().max() < 1e-5
print(ag.build_log()[-1].key, ag.stats()["builds"])
"""


def test_a_later_release_serves_the_last_ones_pack(here, next_release):
    env = {"PYTHONPATH": str(next_release), "PYTHONSAFEPATH": "1", "ATTNGEN_JIT": "off", "PATH": "/nowhere"}
    key, builds = toy.finish(toy.python(SERVE, here / "llama.attnpack", **env)).split()[-2:]
    assert key in keys_of(here) and builds == "0"
    refused = toy.python(SERVE, "-", **{**env, "ATTNGEN_SYSTEM_CACHE": str(here / "llama.attnpack")})
    output, _ = refused.communicate(timeout=120)  # by its own key there is nothing
    assert f"nearest: Causal {key[:12]} differs in sources.functions.h" in output, output  # in a pack
    assert refused.returncode and "MissingKernelError: Causal float32 head_dim 32 is not there, and ATTNGEN_JIT=off" in output


def test_a_configuration_of_another_release_is_made_or_refused():
    from attngen.choose_cuda import AppendConfig, PlanConfig, TileClass

    for config in (AppendConfig("90a", "bfloat16", 128, 128, 64), PlanConfig("90a", (TileClass(16, 64, 2), TileClass(64, 64, 4)))):
        told = json.loads(json.dumps(pins.config_record(config)))
        assert pins.restore_config(told, "here") == config
    older = pins.config_record(AppendConfig("90a", "bfloat16", 128, 128))
    del older["fields"]["threads"]  # a field that came later, with a default
    assert pins.restore_config(older, "here") == AppendConfig("90a", "bfloat16", 128, 128)
    for change in (
        {"module": "os", "type": "system"}, {"module": "choose_cuda", "type": "choose_decode"}, {"module": "choose_cuda.x"},
        {"type": "NoSuchConfig"}, {"fields": {"arch": "90a", "later": 1}}, {"fields": None}, {"module": None},
    ):  # fmt: skip
        with pytest.raises(CacheError, match="(?s)another release, which this one cannot launch: here.*attngen precompile"):
            pins.restore_config({**pins.config_record(AppendConfig("90a", "bfloat16", 128, 128)), **change}, "here")


def test_an_identity_does_not_know_fields_at_their_default():
    @record
    class Later(Problem):  # as a later release might have it
        k_scale: bool = False

    today = run.problem_for(torch.float32, 32, 32, {}, "avx2")
    later = Later(*dataclasses.astuple(today))
    assert pins.cpu_identity("s", today) == pins.cpu_identity("s", later)
    assert pins.cpu_identity("s", later) != pins.cpu_identity("s", dataclasses.replace(later, k_scale=True))


def test_a_struct_of_another_release_is_refused(here, built, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    ag.load_set(here / "llama.toml", jit=False)
    monkeypatch.setattr(run, "describe", lambda layout: [["float", "other", 0]])
    q = torch.randn(1, 5, 2, 32)
    with pytest.raises(CacheError, match="(?s)of another release.*required: the parameter struct of attngen-cpu"):
        ag.attention(q, q, q, Causal())


def test_a_refused_kernel_is_explained(here, built, next_release, attngen):  # noqa: F811
    shutil.copytree(built / "cache", here / "cache")
    env = {"PYTHONPATH": str(next_release), "PYTHONSAFEPATH": "1", "ATTNGEN_JIT": "off", "ATTNGEN_CACHE_DIR": str(here / "cache")}
    refused = toy.python(SERVE, "-", **env)
    output, _ = refused.communicate(timeout=120)
    assert "nearest: Causal" in output and "differs in sources.functions.h" in output, output
    key = next(line.split()[-1] for line in output.splitlines() if "required: key" in line)
    found = read_json(attngen("explain-miss", key[:16], "--json"))
    assert found["key"] == key and [d["name"] for d in found["differences"]] == ["sources.functions.h"]
    said = attngen("explain-miss", key[:16])[1]
    assert "another version of attngen" in said and "which differs in 1 input\n" in said
    status, _, err = attngen("explain-miss", "0123")
    assert status == 2 and "nothing is known of this key" in err
    known = read_json(attngen("explain-miss", keys_of(built)[0], "--lock", built / "llama.lock", "--json"))
    assert known["nearest"] == keys_of(built)[1] and {d["name"] for d in known["differences"]} > {"structure"}


# ---- packs -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def packed(tmp_path) -> Path:
    """A pack of three entries that need no compiler, of 10 kB."""
    store = Cache(tmp_path / "source")
    for i in range(3):
        store.get_or_build(f"{i}a" + "0" * 62, described(bytes([i]) * 3000))
    write_pack(tmp_path / "toy.attnpack", "toy", store.entries())
    return tmp_path / "toy.attnpack"


def described(content: bytes = b"artifact", **more: object):
    def make(folder: Path) -> dict[str, object]:
        (folder / "kernel.so").write_bytes(content)
        (folder / "kernel.cpp").write_text("source")
        (folder / "build.log").write_text("log")
        return {"kind": "cpu", "abi": "x", "artifact": "kernel.so", "sources": ["kernel.cpp"], "variant": "toy", **more}

    return make


def take(pack: Path, into: Path) -> int:
    opened, store = Pack(pack), Cache(into)
    return sum(not store.adopt(opened.lookup(key, "pack"))[1] for key in opened.keys)


def test_equal_kernels_make_equal_packs(tmp_path):
    """Two caches, two builds by a real compiler at two times, in another order."""
    packs = []
    for name, order in (("one", (0, 1)), ("two", (1, 0))):
        store = Cache(tmp_path / name)
        for i in order:
            store.get_or_build(f"{i}b" + "0" * 62, toy.builder(toy.SOURCE + f"// {i}\n"))
        write_pack(tmp_path / f"{name}.attnpack", "toy", store.entries(), {"format": "x"})
        packs.append((tmp_path / f"{name}.attnpack").read_bytes())
    assert packs[0] == packs[1]


def test_export_and_import(here, built, attngen, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    said = read_json(attngen("cache", "export", here / "llama.toml", "-o", here / "again.attnpack", "--json"))
    assert (here / "again.attnpack").read_bytes() == (here / "llama.attnpack").read_bytes() and said["kernels"] == 2
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / "cache"))
    wrong = attngen("cache", "import", here / "again.attnpack", "--sha256", "0" * 64)
    assert wrong[0] == 2 and "is not the pack that was asked for" in wrong[2] and not (here / "cache").exists()
    assert read_json(attngen("cache", "import", here / "again.attnpack", "--sha256", said["sha256"], "--json"))["there"] == 0
    assert read_json(attngen("cache", "import", here / "again.attnpack", "--json"))["there"] == 2
    rows = read_json(attngen("cache", "ls", "--json"))["kernels"]
    assert {row["origin"] for row in rows} == {f"pack llama {said['sha256'][:12]}"}
    assert len(ag.load_set("llama", jit=False).kernels) == 2  # by its name
    assert read_json(attngen("cache", "verify", "--json")) == {"checked": 2, "damaged": []}
    flip(Cache(here / "cache").folder(keys_of(here)[0]) / "attention.cpp")
    damaged = read_json(attngen("cache", "verify", "--json"), status=1)["damaged"]
    assert [row["key"] for row in damaged] == [keys_of(here)[0]] and "attention.cpp with sha256" in damaged[0]["error"]
    assert attngen("cache", "import", here / "llama.attnpack", "--into", here / "system")[0] == 0
    forget()
    monkeypatch.setenv("ATTNGEN_SYSTEM_CACHE", str(here / "system"))
    assert ag.load_set("llama", jit=False).layers() == {"system": 2}


def test_a_source_of_an_export_or_an_import_that_is_none(here, attngen):  # noqa: F811
    (here / "text.attnpack").write_text("not a zip")
    for command, said in (
        (("export", here / "nofile.toml"), f"no set {here}/nofile.toml"),
        (("import", here / "text.attnpack"), "found: File is not a zip file (BadZipFile)"),
        (("import", here / "nofile.attnpack"), "found: No such file or directory\n"),
    ):  # fmt: skip
        status, _, err = attngen("cache", *command)
        assert status == 2 and said in err and "Error(" not in err, err


def test_a_full_disk_beside_the_cache(here, built, attngen, monkeypatch):  # noqa: F811
    """What precompile, export and wheel write is there whole, or not at all and the error says so."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    full = here / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "none", full], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        for name in ("llama.toml", "mine.py"):
            shutil.copy(here / name, full / name)
        with contextlib.suppress(OSError), open(full / "rest", "wb", buffering=0) as rest:
            while True:
                rest.write(bytes(4096))
        before = sorted(full.rglob("*"))
        for command in (("precompile", full / "llama.toml"), ("cache", "export", here / "llama.toml", "-o", full / "x.attnpack"),
                        ("cache", "wheel", here / "llama.toml", "-o", full)):  # fmt: skip
            status, _, err = attngen(*command)
            assert status == 2 and "cannot be written" in err and "No space left" in err, err
            assert sorted(full.rglob("*")) == before
    finally:
        subprocess.run(["umount", full], check=True)


def test_a_damaged_source_or_log_is_neither_shipped_nor_kept(here, built, attngen, monkeypatch):  # noqa: F811
    """No lookup reads them, so that only what ships or imports an entry can see it."""
    pytest.importorskip("fsspec")
    shutil.copytree(built / "cache", here / "cache")
    key = keys_of(here)[0]
    for name in ("attention.cpp", "build.log"):
        damaged = Cache(here / "cache").folder(key) / name
        whole = damaged.read_bytes()
        flip(damaged, 2)
        for command in (("export", here / "llama.toml", "-o", here / "new.attnpack"), ("wheel", here / "llama.toml", "-o", here / "new"),
                        ("push", f"file://{here}/new", here / "llama.toml")):  # fmt: skip
            status, _, err = attngen("cache", *command)
            assert status == 2 and f"{name} with sha256" in err, err
            assert not list(here.glob("*new*"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ag.CacheWarning)  # it is set aside
            done = read_json(attngen("cache", "import", here / "llama.attnpack", "--json"))
        assert (done["kernels"], done["there"]) == (2, 1) and damaged.read_bytes() == whole
    assert read_json(attngen("cache", "verify", "--json"))["damaged"] == []


def test_a_truncated_or_flipped_pack_gives_nothing_or_the_truth(packed, tmp_path):
    whole = packed.read_bytes()
    refused = 0
    for at in range(0, len(whole), 67):
        for damage in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]):
            packed.write_bytes(damage)
            try:
                opened = Pack(packed)
                for key in opened.keys:
                    entry = opened.lookup(key, "pack")
                    assert entry.read() == bytes([int(key[0])]) * 3000  # where the flip is in nothing that counts
            except CacheError as error:
                assert "cannot be used" in str(error) or "damaged" in str(error)
                refused += 1
    assert refused > len(whole) / 67  # of twice as many: every truncation, and most flips


def rebuilt(pack: Path, change) -> None:
    """The pack with its index changed, and otherwise in order."""
    with zipfile.ZipFile(pack) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    index = json.loads(members["attnpack.json"])
    change(index, members)
    members["attnpack.json"] = json.dumps(index).encode()
    with zipfile.ZipFile(pack, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def first(index):
    return index["entries"][min(index["entries"])]


HOSTILE = {
    "a path as a file name": (lambda i, m: first(i)["files"].update({"../../x": next(iter(first(i)["files"].values()))}), "plain file names"),
    "an absolute artifact": (lambda i, m: first(i)["manifest"].update(artifact="/etc/passwd"), "damaged cache entry"),
    "a manifest as a file": (lambda i, m: first(i)["files"].update({"manifest.json": next(iter(first(i)["files"].values()))}), "plain file names"),
    "a key that is a path": (lambda i, m: i["entries"].update({"../x": first(i)}), "64 hex digits"),
    "an entry under another key": (lambda i, m: i["entries"].update({"f" * 64: first(i)}), "key " + "f" * 64),
    "a name that is a path": (lambda i, m: i.update(name="../up"), "required letters"),
    "a member that is a path": (lambda i, m: m.update({"../../x": b""}), "blobs/<sha256> alone"),
    "a blob of other content": (lambda i, m: m.update({n: b"x" * len(c) for n, c in m.items() if len(c) == 3000}), "with sha256"),
    "a source of other content": (lambda i, m: m.update({n: b"SOURCE" for n, c in m.items() if c == b"source"}), "kernel.cpp .*with sha256"),
    "a missing blob": (lambda i, m: m.pop(next(n for n, c in m.items() if len(c) == 3000)), "3000 bytes"),
    "a newer format": (lambda i, m: i.update(format="attnpack-9"), "format attnpack-1"),
    "no entries": (lambda i, m: i.pop("entries"), "an index of entries"),
}


@pytest.mark.parametrize("change,message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pack_is_refused_whole(packed, tmp_path, change, message):
    rebuilt(packed, change)
    before = set(tmp_path.rglob("*"))
    with pytest.raises((CacheError, ParameterError), match=message):
        take(packed, tmp_path / "a" / "b" / "target")
    new = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert all(name in ("a", "a/b") or name.startswith("a/b/target") for name in new), new


def test_links_and_bombs_are_refused(packed, tmp_path):
    def write(*members: tuple[zipfile.ZipInfo | str, bytes], how: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(packed, "w", how) as archive:
            for name, content in members:
                archive.writestr(name, content, how)

    link = zipfile.ZipInfo("blobs/" + "0" * 64)
    link.external_attr = 0o120777 << 16
    write(("attnpack.json", b"{}"), (link, b"/etc/passwd"))
    with pytest.raises(CacheError, match="is a link or a special file"):
        Pack(packed)
    write(("attnpack.json", b" " * 50_000_000), how=zipfile.ZIP_DEFLATED)  # 50 kB that would swell to 50 MB
    with pytest.raises(CacheError, match="compressed or encrypted"):
        Pack(packed)
    with pytest.warns(UserWarning, match="Duplicate"):
        write(("attnpack.json", b"{}"), ("attnpack.json", b"{}"))
    with pytest.raises(CacheError, match="attnpack.json twice"):
        Pack(packed)


def test_what_a_small_pack_can_swell_to_is_bounded(packed, tmp_path, monkeypatch):
    def refused(message: str, *members: tuple[str, bytes]) -> None:
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        with pytest.raises(CacheError, match=message):
            Pack(packed)

    whole = packed.read_bytes()
    swelling = b'{"x": [' + b"[]," * 2_500_000 + b'0], "format": "attnpack-1", "name": "n", "entries": {}, "lock": null}'
    refused("an index of at most 4194304 values", ("attnpack.json", swelling))
    refused("a directory of [0-9]+ bytes; required at most 8388608", ("attnpack.json", b"{}"), *((f"blobs/{i:064x}", b"") for i in range(80_000)))
    blob = bytes(32 << 20)
    digest = hashlib.sha256(blob).hexdigest()
    entries = {
        key: {"manifest": {"format": 1, "key": key, "artifact": "k.cubin", "size": len(blob), "sha256": digest, "kind": "cubin"},
              "files": {"k.cubin": [digest, len(blob)]}}
        for key in (f"{i:064x}" for i in range(20))
    }  # fmt: skip
    index = {"format": "attnpack-1", "name": "n", "entries": entries, "lock": None}
    refused("bytes unpacked", ("attnpack.json", json.dumps(index).encode()), (f"blobs/{digest}", blob))
    packed.write_bytes(whole)
    monkeypatch.setattr("attngen.pack.MAX_FILE", 2999)
    with pytest.raises(CacheError, match="(?s)members of at most 2999 bytes.*of 3000"):
        Pack(packed)


def test_an_import_holds_one_kernel_at_a_time(tmp_path, attngen):  # noqa: F811
    store, size = Cache(tmp_path / "source"), 8 << 20
    for i in range(12):
        store.get_or_build(f"{i:064x}", described(bytes([i]) * size, kind="cubin"))
    write_pack(tmp_path / "big.attnpack", "big", store.entries())

    def grown() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert attngen("cache", "import", tmp_path / "big.attnpack", "--into", tmp_path / "cache")[0] == 0
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    assert int(toy.in_child(grown)) < 6 * size


def test_forked_servers_read_one_pack_at_once(packed):
    opened = Pack(packed)

    def read() -> None:
        for _ in range(300):
            for key in opened.keys:
                assert opened.lookup(key, "pack").read() == bytes([int(key[0])]) * 3000

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_blob_that_is_named_often_does_not_fill_the_disk(packed):
    with pytest.raises(CacheError, match="at most 9000 bytes unpacked"):
        Pack(packed, max_total=9000)


# ---- signatures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def signers(tmp_path) -> tuple[Path, Path]:
    """Private keys of two signers; the public ones lie beside them, as .pub.pem."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    paths = []
    for name in ("one", "two"):
        key = Ed25519PrivateKey.generate()
        path = tmp_path / f"{name}.key.pem"
        path.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        path.with_name(f"{name}.pub.pem").write_bytes(public)
        paths.append(path)
    return tuple(paths)


def test_only_signed_packs_are_taken_where_keys_are_trusted(here, built, signers, attngen, monkeypatch):  # noqa: F811
    one, two = signers
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    assert attngen("cache", "export", here / "llama.toml", "-o", here / "signed.attnpack", "--sign", one)[0] == 0
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / "cache"))
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(one.with_name("one.pub.pem")))
    status, _, err = attngen("cache", "import", here / "llama.attnpack")
    assert status == 2 and "is not signed by a trusted key" in err and "found: no signature" in err
    with pytest.raises(CacheError, match="no signature"):
        ag.load_set(here / "llama.attnpack", jit=False)
    assert attngen("cache", "import", here / "signed.attnpack")[0] == 0
    assert len(ag.load_set("llama", jit=False).kernels) == 2
    # What was imported is looked at again at each lookup: a manifest that was changed since is refused.
    manifest = Cache(here / "cache").folder(keys_of(here)[0]) / "manifest.json"
    changed = json.loads(manifest.read_text())
    manifest.write_text(sealed_text({**changed, "variant": "Not Causal"}))
    with pytest.raises(CacheError, match="a signature that does not fit"):
        Cache(here / "cache").lookup(keys_of(here)[0])
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(two.with_name("two.pub.pem")))
    with pytest.raises(CacheError, match="which is not among them"):
        Pack(here / "signed.attnpack")
    with zipfile.ZipFile(here / "signed.attnpack") as archive:
        index = json.loads(archive.read("attnpack.json"))
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(one.with_name("one.pub.pem")))
    unit = index["lock"]["units"]
    unit[0]["roles"], unit[1]["roles"] = unit[1]["roles"], unit[0]["roles"]  # another kernel for what is asked
    rebuilt(here / "signed.attnpack", lambda i, m: i.update(index))
    with pytest.raises(CacheError, match="a signature that does not fit"):
        Pack(here / "signed.attnpack")
    # A remote store's kernels are held to it too.
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    for name, sign in (("bare", ()), ("signed", ("--sign", one))):
        forget()
        monkeypatch.delenv("ATTNGEN_REMOTE_CACHE", raising=False)
        monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
        assert attngen("cache", "push", f"file://{here}/{name}", here / "llama.toml", *sign)[0] == 0
        monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", f"file://{here}/{name}")
        monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / f"cache of {name}"))
        assert (cache.default().find(keys_of(here)[0]) is not None) == (name == "signed")
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(here / "llama.toml"))
    with pytest.raises(ParameterError, match="required a public key in PEM"):
        Pack(here / "signed.attnpack")


def test_wheels_and_system_folders_must_be_signed_too(here, built, signers, attngen, monkeypatch):  # noqa: F811
    one, _ = signers
    for name, sign in (("bare", ()), ("signed", ("--sign", one))):
        monkeypatch.delenv("ATTNGEN_TRUSTED_KEYS", raising=False)
        monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
        wheel = read_json(attngen("cache", "wheel", here / "llama.toml", "-o", here / name, *sign, "--json"))["wheel"]
        assert attngen("cache", "export", here / "llama.toml", "-o", here / f"{name}.attnpack", *sign)[0] == 0
        assert attngen("cache", "import", here / f"{name}.attnpack", "--into", here / f"system of {name}")[0] == 0
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(here / name / "site")
        monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(one.with_name("one.pub.pem")))
        for layer in (layers.FolderLayer("wheel:llama", here / name / "site" / "attngen_kernels_llama"),
                      layers.FolderLayer("system", here / f"system of {name}")):  # fmt: skip
            found = [layers.look(layer, key, "kernels") for key in keys_of(here)]
            assert [entry is not None for entry in found] == [name == "signed"] * 2, layer.name
            if name == "bare":
                with pytest.raises(CacheError, match="no signature"):
                    layer.lock("llama")
            else:
                assert layer.lock("llama")["name"] == "llama"


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_a_remote_store_fills_the_users_cache(here, built, attngen, monkeypatch):  # noqa: F811
    pytest.importorskip("fsspec")
    url = f"file://{here}/store"
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    assert read_json(attngen("cache", "push", url, here / "llama.toml", "--json"))["sent"] == 2
    assert read_json(attngen("cache", "push", url, here / "llama.toml", "--json"))["sent"] == 0
    forget()
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / "cache"))
    monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", url)
    one, two = keys_of(here)
    entry, hit = cache.default().get_or_build(one, never)
    assert hit and entry.manifest["origin"] == {"remote": url}
    assert Cache(here / "cache").lookup(one) is not None  # kept
    shutil.rmtree(here / "cache")
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    assert cache.default().get_or_build(one, never)[0].layer == "remote" and not (here / "cache").exists()
    monkeypatch.delenv("ATTNGEN_JIT")
    for jit, layer, kept in ((False, "remote", 0), (True, "remote", 2), (True, "cache", 2)):  # a lock file, and nothing beside it
        forget()
        loaded = ag.load_set(here / "llama.lock", jit=jit)
        assert loaded.layers() == ag.stats()["layers"] == {layer: 2}
        assert len([*Cache(here / "cache").entries()]) == kept
    shutil.rmtree(here / "cache")
    flip(here / "store" / "v1" / "kernels" / two[:2] / two / "kernel.so")
    assert cache.default().find(two) is None and Cache(here / "cache").lookup(two) is None
    monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", f"file://{here}/nowhere")
    assert cache.default().find(two) is None
    monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", "gopher://store")
    with pytest.raises(ParameterError, match="gopher"):
        cache.default().find(two)


def test_a_wheel_of_kernels_is_found_and_not_executed(here, built, attngen, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    made = [read_json(attngen("cache", "wheel", here / "llama.toml", "-o", here / f"dist{i}", "--json"))["wheel"] for i in (1, 2)]
    assert Path(made[0]).read_bytes() == Path(made[1]).read_bytes()
    site = here / "site"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "--target", site, made[0]]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (site / "attngen_kernels_llama" / "__init__.py").write_text("raise SystemExit('executed')")
    env = {"PYTHONPATH": str(site), "ATTNGEN_JIT": "off", "PATH": "/nowhere"}
    key, builds = toy.finish(toy.python(SERVE, "llama", **env)).split()[-2:]
    assert key in keys_of(here) and builds == "0"
    key, builds = toy.finish(toy.python(SERVE, "-", **env)).split()[-2:]  # by its key alone
    assert key in keys_of(here) and builds == "0"


# ---- whom the cache believes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_cache_that_others_can_write_is_refused(tmp_path, mode, monkeypatch):
    store = Cache(tmp_path / "cache")
    entry, _ = store.get_or_build(toy.KEY, described())
    store.root.chmod(mode)
    for act in (lambda s: s.lookup(toy.KEY), lambda s: s.get_or_build("cd" + "0" * 62, described())):
        with pytest.raises(CacheError, match="(?s)can be written by others.*chmod go-w"):
            act(Cache(store.root))
    with pytest.raises(CacheError, match="can be written by others"):
        layers.FolderLayer("system", store.root).lookup(toy.KEY, "kernels")
    monkeypatch.setenv("ATTNGEN_ALLOW_SHARED_CACHE", "1")
    assert Cache(store.root).lookup(toy.KEY) == entry


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(tmp_path):
    store = Cache(tmp_path / "cache")
    store.get_or_build(toy.KEY, described())
    os.chown(store.root, 12345, 12345)
    with pytest.raises(CacheError, match="owned by user 12345"):
        Cache(store.root).lookup(toy.KEY)


# ---- seeing ----------------------------------------------------------------------------------------------------------


def test_jit_modes(tmp_path, monkeypatch):
    store = Cache(tmp_path / "cache")
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    with pytest.raises(MissingKernelError, match="(?s)toy is not there, and ATTNGEN_JIT=off.*attngen precompile"):
        store.get_or_build(toy.KEY, described(), title="toy")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("ATTNGEN_JIT", "warn")
    with pytest.warns(ag.JitWarning, match="compiling toy abababab|compiling toy ab0000000000 while the process runs"):
        store.get_or_build(toy.KEY, described(), title="toy")
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    assert Cache(tmp_path / "cache").get_or_build(toy.KEY, described())[1]
    monkeypatch.setenv("ATTNGEN_JIT", "never")
    with pytest.raises(ParameterError, match="ATTNGEN_JIT=never: required one of on, off, warn"):
        Cache(tmp_path / "cache").get_or_build("cd" + "0" * 62, described())


def test_a_pack_that_others_can_write_is_not_served_from(here):
    (here / "llama.attnpack").chmod(0o666)
    with pytest.raises(CacheError, match="(?s)llama.attnpack can be written by others.*chmod go-w"):
        ag.load_set(here / "llama.attnpack", jit=False)


def test_stats_count(tmp_path):
    counters.reset()
    store = Cache(tmp_path / "cache")
    store.get_or_build(toy.KEY, described())
    Cache(tmp_path / "cache").get_or_build(toy.KEY, described())
    found = ag.stats()
    assert (found["misses"], found["builds"], found["hits"], found["layers"]) == (1, 1, 1, {"cache": 1})
    assert found["build_ms"] > 0
    hits = tmp_path / "cache" / "v1" / "hits" / toy.KEY
    assert hits.stat().st_size == 1
    Cache(tmp_path / "cache").get_or_build(toy.KEY, described())
    assert hits.stat().st_size == 2


def test_logs_and_the_debug_ladder_speak_on_hits(here, built, monkeypatch, capsys):
    env = {"ATTNGEN_CACHE_DIR": str(built / "cache"), "ATTNGEN_LOG": "debug,json", "ATTNGEN_DEBUG": "6", "ATTNGEN_JIT": "off"}
    output = toy.finish(toy.python(SERVE, "-", **env))
    records = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    hit = next(r for r in records if r.get("event") == "hit")
    assert hit["title"] == "Causal float32 head_dim 32" and hit["layer"] == "cache" and hit["key"] in keys_of(built)
    rungs = ("hit in cache", "attngen: config", "Candidate(", "mask = (at.kv <= at.q)", "attngen_attention(const Params* params)",
             "-fopenmp", "machine code")  # fmt: skip
    assert [rung for rung in rungs if rung not in output] == []
    if shutil.which("objdump"):
        assert "vfmadd" in output or "mulps" in output

    entry = Cache(built / "cache").lookup(hit["key"])
    machine_code = debug.machine_code(entry)
    assert debug.machine_code(Pack(here / "llama.attnpack").lookup(hit["key"], "pack:llama")).splitlines()[2:] == machine_code.splitlines()[2:]
    monkeypatch.setenv("ATTNGEN_DEBUG", "1")
    debug.show(entry, True, 0.0)
    quiet = capsys.readouterr().err
    assert "hit in cache" in quiet and "attngen: config" not in quiet
    for wrong in ("x", "9", "12", "-1"):
        monkeypatch.setenv("ATTNGEN_DEBUG", wrong)
        with pytest.raises(ParameterError, match=f"ATTNGEN_DEBUG={wrong}: required a number from 0 to 6"):
            debug.level()
    with pytest.raises(ParameterError, match="ATTNGEN_LOG=loud: required"):
        logs.configure("loud")


def test_an_age_needs_its_unit(here, built, attngen):  # noqa: F811
    """30 was 30 seconds, and emptied the cache."""
    shutil.copytree(built / "cache", here / "cache")
    for wrong in ("30", "1.5", "d", "30x", ""):
        status, _, err = attngen("cache", "prune", "--max-age", wrong)
        assert status == 2 and "required" in err, wrong
    assert "30: required a number and one of s, m, h, d, such as 30d" in attngen("cache", "prune", "--max-age", "30")[2]
    for entry in Cache(here / "cache").entries():  # in use two hours ago
        path = entry.folder / "manifest.json"
        path.write_text(sealed_text({**json.loads(path.read_text()), "created": time.time() - 7200}))
    shutil.rmtree(here / "cache" / "v1" / "hits")
    assert read_json(attngen("cache", "prune", "--max-age", "3h", "--json"))["removed"] == []
    assert len(read_json(attngen("cache", "prune", "--max-age", "90m", "--json"))["removed"]) == 2


def test_doctor_has_a_verdict_and_a_remedy(here, attngen, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ATTNGEN_SYSTEM_CACHE", str(here / "llama.attnpack"))
    (here / "cache").mkdir(mode=0o700)
    findings = {f["name"]: f for f in read_json(attngen("doctor", "--json"))["findings"]}
    assert findings["layer system"]["found"].startswith("2 kernels") and findings["cache locks"]["ok"]
    (here / "cache").chmod(0o777)
    findings = {f["name"]: f for f in read_json(attngen("doctor", "--json"), status=1)["findings"]}
    assert findings["cache folder"]["verdict"] == "wrong" and "chmod go-w" in findings["cache folder"]["remedy"]


def test_doctor_asks_a_server_for_nothing_that_builds(here, attngen, monkeypatch):  # noqa: F811
    """On a root that is read-only, without a compiler."""
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setenv("ATTNGEN_SYSTEM_CACHE", str(here / "llama.attnpack"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(here / "nowhere"))
    monkeypatch.delenv("CXX", raising=False)
    report = read_json(attngen("doctor", "--json"), status=1)
    lacking = {f["name"] for f in report["findings"] if f["verdict"] == "missing"}
    assert not report["cpu_backend"] and lacking == {"C++ compiler", "OpenMP", "cache folder"}
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    report = read_json(attngen("doctor", "--json"))
    found = {f["name"]: f for f in report["findings"]}
    assert report["cpu_backend"] and found["layer system"]["found"].startswith("2 kernels")
    assert all(found[name]["verdict"] == "absent" and found[name]["remedy"].startswith("none needed") for name in lacking)
    assert "the CPU backend works here, with kernels that are there already" in attngen("doctor")[1]


def test_doctor_says_which_kernels_of_a_layer_are_refused(here, built, signers, attngen, monkeypatch):  # noqa: F811
    system = here / "system"
    assert attngen("cache", "import", here / "llama.attnpack", "--into", system)[0] == 0
    monkeypatch.setenv("ATTNGEN_SYSTEM_CACHE", str(system))

    def layer() -> dict[str, object]:
        return next(f for f in read_json(attngen("doctor", "--json"))["findings"] if f["name"] == "layer system")

    assert layer()["verdict"] == "ok"
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(signers[0].with_name("one.pub.pem")))
    assert layer()["verdict"] == "wrong" and "all refused" in layer()["found"] and "--sign" in layer()["remedy"]
    monkeypatch.delenv("ATTNGEN_TRUSTED_KEYS")
    key = keys_of(here)[0]
    flip(Cache(system).folder(key) / "kernel.so")
    assert layer()["verdict"] == "wrong" and "2 kernels" in layer()["found"] and "1 refused: a damaged cache entry" in layer()["found"]


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@needs_nvcc
def test_cubins_are_shipped_checked_and_launched(here, monkeypatch, attngen):  # noqa: F811
    """All but the driver is real: what load_set hands to it is recorded."""
    from attngen import cuda, engine
    from attngen.choose_cuda import arch

    (here / "gpu.toml").write_text(
        '[[kernels]]\nvariants = ["Causal"]\nhead_dims = [64]\nlayouts = ["paged"]\nphases = ["decode", "merge", "mask"]\narchs = ["9.0a"]\n'
    )
    assert attngen("precompile", here / "gpu.toml")[0] == 0
    lock = json.loads((here / "gpu.lock").read_text())
    names = [k["name"] for k in lock["kernels"].values()]
    assert set(names) == {"decode", "merge", "mask_rows", "plan"} and names.count("merge") == 2 and names.count("plan") == 1
    attention = next(u for u in lock["units"] if u["variant"] == "Causal")
    built_or_not = ["key" in role for role in attention["roles"]]
    assert built_or_not[0] and built_or_not[-1] and built_or_not.count(False) >= 2  # prefill is left out

    loaded: list[tuple[str, int, int]] = []
    handed: list[bytes] = []

    class Driver:
        @staticmethod
        def driver_version() -> int:
            return version

        @staticmethod
        def CudaKernel(content, symbol, *, device, threads, shared_bytes, dependent):  # noqa: N802
            assert symbol.encode() in content  # the name that profilers show
            loaded.append((symbol, threads, shared_bytes))
            handed.append(content)
            return object()

    version = 13000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(load, "host", lambda: Driver)
    monkeypatch.setattr("attngen.start.host", lambda: Driver)
    monkeypatch.setattr(cuda, "host", lambda: Driver)
    monkeypatch.setattr(cuda, "_loaded", {})
    monkeypatch.setattr(cuda, "device_arch", lambda index: arch("90a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    found = ag.load_set(here / "gpu.toml", jit=False, device="cuda:0")
    assert {symbol.rpartition("_")[0] for symbol, _, _ in loaded} == {"attngen_Causal_decode", "attngen_Causal_plan", "attngen_merge_states_merge", "attngen_custom_mask_mask"}
    assert all(key[:8] in {symbol[-8:] for symbol, _, _ in loaded} for key in lock["kernels"])
    assert len(found.kernels) == len(names)

    wrong = json.loads((here / "gpu.lock").read_text())
    roles = next(u for u in wrong["units"] if u["variant"] == "Causal")["roles"]
    for one, two in ((0, 1), (0, len(roles) - 1)):  # tiles in another order; the planner as a class
        roles[one], roles[two] = roles[two], roles[one]
        (here / "wrong.lock").write_text(json.dumps(sets.sealed(wrong)))
        with pytest.raises(CacheError, match="serve something else|do not say what they serve"):
            ag.load_set(here / "wrong.lock", jit=False, device="cuda:0")
        roles[one], roles[two] = roles[two], roles[one]

    # The pinned kernels serve, configurations and structs as a fresh choice would make them; what was left out says so.
    problem = engine.cuda_problem("90a", torch.bfloat16, 64, 64, ())
    pinned = engine.kernels_of(Causal(), problem, page_size=64)
    assert engine.kernels_of(Causal(), problem, page_size=1).classes[0].entry is None  # is another layout's
    pins.unpin_all()
    fresh = engine.kernels_of(Causal(), problem, page_size=16)
    assert [k.config for k in (*pinned.classes, pinned.plan)] == [k.config for k in (*fresh.classes, fresh.plan)]
    assert pinned.classes[0].layout.fields == fresh.classes[0].layout.fields and pinned.plan.key == fresh.plan.key
    with pytest.raises(MissingKernelError, match='add "prefill" to its phases'):
        engine.build(pinned.classes)

    monkeypatch.setattr(cuda, "_loaded", {})
    version = 12080
    with pytest.raises(LoadError, match=r"(?s)too old.*a driver of CUDA 13.0 or newer.*found: CUDA 12.8"):
        ag.load_set(here / "gpu.toml", jit=False, device="cuda:0")
    version = 13000
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(LoadError, match="(?s)required: a cubin for compute capability 8.0.*found: one for sm_90a"):
        ag.load_set(here / "gpu.toml", jit=False, device="cuda:0")
    in_cache = cache.default().lookup(attention["roles"][0]["key"])
    write_pack(here / "gpu.attnpack", "gpu", [in_cache])
    machine_code = debug.machine_code(Pack(here / "gpu.attnpack").lookup(in_cache.key, "pack:gpu"))
    assert "not shown" in machine_code or ("sm_90" in machine_code and in_cache.manifest["symbol"] in machine_code), machine_code
    # A cubin that was damaged after it was found is not handed over: what was checked is, or it is checked again.
    entry = cache.default().lookup(attention["roles"][0]["key"])
    flip(entry.artifact)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    load.load_cubin(entry, entry.manifest["symbol"], 0, 128, 0, False)
    assert hashlib.sha256(handed[-1]).hexdigest() == entry.manifest["sha256"]
    with pytest.raises(CacheError, match="sha256"):
        load.load_cubin(entry.light(), entry.manifest["symbol"], 0, 128, 0, False)


def test_a_start_reads_its_pack_without_the_collector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parsing an index of a hundred kernels sets off a full collection, 150 ms over torch's heap."""
    seen, find = [], start._find
    monkeypatch.setattr(start, "_find", lambda source: (seen.append(gc.isenabled()), find(source))[1])
    with pytest.raises(ParameterError, match="no set"):
        ag.load_set(tmp_path / "missing.toml")
    assert seen == [False] and gc.isenabled()
