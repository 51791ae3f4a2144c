"""What a cache survives, with real processes: kills at any moment, dead lock holders, folders that vanish, clocks that jump,
two releases at once, many keys. Nothing is lost, nothing hangs, no wrong kernel is loaded."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from test_cache import ask_together, never, plain, wait_for
from test_ship import SERVE, next_release  # noqa: F401

import attngen as ag
from attngen import cache, load, locks, run
from attngen.cache import Cache
from attngen.errors import CacheError
from attngen.prune import in_use, prune, usage
from attngen.variants import Causal
from toolchain import needs_nvcc

FORK = multiprocessing.get_context("fork")


def key(i: int) -> str:
    return f"{i:04x}" + "0" * 60


def content(i: int) -> bytes:
    return bytes([i % 256]) * (1000 + i)


def slow(i: int):
    """A build of several steps, each long enough to be killed in, that needs no compiler."""

    def build(folder: Path) -> dict[str, object]:
        with open(folder / "kernel.so", "wb") as out:
            for start in range(0, 1000 + i, 200):
                out.write(content(i)[start : start + 200])
                out.flush()
                time.sleep(0.0005)
        (folder / "kernel.cpp").write_text(f"source {i}")
        return {"kind": "cpu", "artifact": "kernel.so", "sources": ["kernel.cpp"]}

    return build


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_a_hundred_kills_at_random_moments(tmp_path):
    """Around the end of a build, publishing included: later after one that was killed, earlier after one that was done. Each key
    is then asked for once more."""
    root, chance, outcomes = tmp_path / "cache", random.Random(1), {True: 0, False: 0}

    def start(i: int) -> multiprocessing.Process:
        process = FORK.Process(target=lambda: Cache(root).get_or_build(key(i), slow(i)))
        process.start()
        return process

    begun = time.monotonic()
    start(999).join()
    took = time.monotonic() - begun
    for i in range(100):
        process = start(i // 2)
        time.sleep(took * chance.uniform(0.3, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Cache(root).lookup(key(i // 2))  # nothing, or all of it
        took *= 1.1 if found is None else 0.8
        outcomes[found is not None] += 1
        assert found is None or found.artifact.read_bytes() == content(i // 2)
    assert outcomes[True] > 5 and outcomes[False] > 5  # the kills fell before and after
    for i in range(50):
        entry, _ = Cache(root).get_or_build(key(i), slow(i))
        assert entry.artifact.read_bytes() == content(i) and entry.sources() == {"kernel.cpp": f"source {i}"}
    assert os.listdir(root / "v1" / "building") == []


def test_kills_while_a_real_compiler_runs(tmp_path):
    root, chance = tmp_path / "cache", random.Random(2)
    for _ in range(8):
        process = FORK.Process(target=lambda: Cache(root).get_or_build(toy.KEY, toy.builder()))
        process.start()
        time.sleep(chance.uniform(0, 0.35))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    entry, _ = Cache(root).get_or_build(toy.KEY, toy.builder())
    x = torch.zeros(100)
    load.load_kernel(entry).launch(toy.PARAMS.pack(x.data_ptr(), 100, 2))
    assert torch.equal(x, torch.ones(100))


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_a_lock_that_outlives_its_dead_holder_is_taken_over(tmp_path, caplog):
    """The builder was killed, but a child of its own inherited the lock."""
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    lock_file = store.base / "locks" / f"{key(2)}.lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    said = {"pid": dead.pid, "machine": locks.machine(), "host": "here", "beat": 0}
    (store.base / "locks" / f"{key(2)}.holder").write_text(json.dumps(said))
    with open(lock_file, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with caplog.at_level(logging.INFO, logger="attngen.cache"):
            _, hit = Cache(store.root).get_or_build(key(2), plain())
    assert not hit and f"waiting for process {dead.pid} on here to build" in caplog.text
    assert "no longer builds" in caplog.text and Cache(store.root).get_or_build(key(2), never)[1]


def test_a_lock_that_is_held_for_too_long_is_passed(tmp_path, monkeypatch, caplog):
    """By a live process that still says it builds."""
    monkeypatch.setattr(locks, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(locks, "SILENT_S", 1e6)
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    said = {"pid": os.getpid(), "machine": locks.machine(), "host": "here", "beat": 0}
    (store.base / "locks" / f"{key(2)}.holder").write_text(json.dumps(said))
    with open(store.base / "locks" / f"{key(2)}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not Cache(store.root).get_or_build(key(2), plain())[1]
    assert f"process {os.getpid()} on here no longer builds" in caplog.text


TAMPERED = {
    "pid": lambda lock, holder: holder.write_text(json.dumps({"pid": 2**70, "machine": locks.machine(), "host": "h"})),
    "holder is a folder": lambda lock, holder: holder.mkdir(),
    "holder is a link": lambda lock, holder: holder.symlink_to(lock.parent.parent / "precious"),
    "lock is a folder": lambda lock, holder: (lock.unlink(missing_ok=True), lock.mkdir()),
    "lock is a link": lambda lock, holder: (lock.unlink(missing_ok=True), lock.symlink_to(lock.parent.parent / "precious")),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_lock_files_that_are_none(tmp_path, monkeypatch, change):
    monkeypatch.setattr(locks, "SILENT_S", 3.0)
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    precious, lock = store.base / "precious", store.base / "locks" / f"{key(2)}.lock"
    precious.write_text("precious")
    change(lock, lock.with_suffix(".holder"))
    if lock.is_dir() or lock.is_symlink():
        with pytest.raises(CacheError, match=f"(?s)cannot be used.*{lock}"):
            Cache(store.root).get_or_build(key(2), plain())
    else:
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            process = FORK.Process(target=lambda: Cache(store.root).get_or_build(key(2), plain()))
            process.start()
            time.sleep(1.5)  # the child has the lock too, and takes it for that of a holder that is silent
        process.join(120)
        assert process.exitcode == 0 and Cache(store.root).lookup(key(2)) is not None
    assert precious.read_text() == "precious"


def test_hosts_of_one_name_are_told_apart(monkeypatch):
    """Clones on one file server: each would take the other's builds for those of dead processes."""
    here, boot = locks.machine(), "/proc/sys/kernel/random/boot_id"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "another boot" if str(self) == boot else read(self, *a, **k))
    locks.machine.cache_clear()
    try:
        assert locks.machine() != here
    finally:
        locks.machine.cache_clear()


def test_a_silent_holder_on_another_machine_is_taken_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SILENT_S", 3.0)
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    holder = store.base / "locks" / f"{key(2)}.holder"
    stop = FORK.Event()

    def beat() -> None:  # of a builder elsewhere, alive for 4 s
        for i in range(20):
            holder.write_text(json.dumps({"pid": 1, "machine": "other", "host": "elsewhere", "beat": i}))
            if stop.wait(0.2):
                return

    process = FORK.Process(target=beat)
    process.start()
    wait_for(holder.exists, "no holder")
    with open(store.base / "locks" / f"{key(2)}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        with caplog.at_level(logging.INFO, logger="attngen.cache"):
            Cache(store.root).get_or_build(key(2), plain())
    stop.set()
    process.join()
    assert time.monotonic() - start > 4 and "process 1 on elsewhere" in caplog.text  # not while it lived


def test_a_waiter_is_served_by_a_holder_that_never_lets_go(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "TIMEOUT_S", 5.0)
    caplog.set_level(logging.INFO, logger="attngen.cache")
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    with open(store.base / "locks" / f"{key(1)}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        entry, built = Cache(store.root)._build_locked(key(1), never, "kernels")  # as if it had been asked before it was there
    assert not built and entry.key == key(1) and "waiting for" in caplog.text
    assert "building it here" not in caplog.text  # it saw that there is nothing left to wait for


def test_thirty_two_processes_over_broken_locks(tmp_path):
    """A file system whose locks keep nobody out: all are served, by whole entries; extra builds are allowed."""
    log, go = tmp_path / "log", tmp_path / "go"
    import filelock

    def ask() -> None:
        filelock.FileLock.acquire = lambda self, *args, **kwargs: None
        filelock.FileLock.release = lambda self, *args, **kwargs: None
        wait_for(go.exists, "never asked")

        def build(folder: Path):
            with log.open("a") as lines:
                lines.write("build\n")
            return slow(7)(folder)

        entry, _ = Cache(tmp_path / "cache").get_or_build(key(7), build)
        assert entry.read() == content(7)

    ask_together(ask, go, 120)
    assert 1 <= len(log.read_text().splitlines()) <= 32
    assert os.listdir(tmp_path / "cache" / "v1" / "building") == []


# ---- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [0, 2**33], ids=["1970", "2242"])
def test_equal_and_absurd_times_change_nothing(tmp_path, moment, monkeypatch):
    store = Cache(tmp_path / "cache")
    for i in (1, 2):
        store.get_or_build(key(i), plain(content(i)))
    for path in store.root.rglob("*"):
        os.utime(path, (moment, moment))
    for i in (1, 2):
        assert Cache(store.root).get_or_build(key(i), never)[0].read() == content(i)
    assert [u.entry.key for u in usage(store)]
    assert prune(store, max_age_s=86400 * 365, dry_run=True).removed == ([] if moment else [])  # the hits just now count


def test_a_clock_that_jumps_abandons_no_build(tmp_path, monkeypatch):
    store = Cache(tmp_path / "cache")
    store.get_or_build(key(1), plain())
    elsewhere, mine = store.base / "building" / ".build-00000000-1-2", store.base / "building" / f".build-{locks.machine()}-{os.getpid()}-1"
    elsewhere.mkdir()
    mine.mkdir()
    os.utime(mine, (1, 1))
    monkeypatch.setattr(time, "time", lambda: 4e9)  # of this process, not of the file system
    store.get_or_build(key(2), plain())
    assert elsewhere.is_dir() and mine.is_dir()


# ---- folders that move or vanish -------------------------------------------------------------------------------------


def test_a_cache_that_is_removed_under_a_running_process(tmp_path):
    store = Cache(tmp_path / "cache")
    entry, _ = store.get_or_build(toy.KEY, toy.builder())
    kernel = load.load_kernel(entry)
    shutil.rmtree(store.root)
    x = torch.zeros(10)
    kernel.launch(toy.PARAMS.pack(x.data_ptr(), 10, 1))
    assert torch.equal(x, torch.ones(10))
    again, hit = store.get_or_build(toy.KEY, plain())  # not served from a memory of what is gone
    assert not hit and again.read() == b"artifact"
    assert store.get_or_build(key(1), plain())[1] is False


def test_a_loaded_set_outlives_its_cache(tmp_path):
    """Even what no call has used yet: it is loaded."""
    pack = one_pack(tmp_path)
    program = (
        "import shutil, sys, torch, attngen as ag; from attngen.variants import Causal\n"
        "ag.load_set('one', jit=False); shutil.rmtree(sys.argv[1]); q = torch.randn(1, 5, 2, 32)\n"
        "print((ag.attention(q, q, q, Causal()) - ag.reference(q, q, q, Causal())).abs().max() < 1e-5)"
    )
    env = {"ATTNGEN_CACHE_DIR": str(tmp_path / "imported"), "ATTNGEN_JIT": "off"}
    done = subprocess.run([sys.executable, "-m", "attngen", "cache", "import", pack], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert toy.finish(toy.python(program, tmp_path / "imported", **env)).split()[-1] == "tensor(True)"


def test_a_cache_that_is_removed_during_a_build(tmp_path):
    store, times = Cache(tmp_path / "cache"), []

    def build(folder: Path):
        times.append(folder)
        if len(times) == 1:
            shutil.rmtree(store.root)
        return plain()(folder)

    assert store.get_or_build(key(1), build)[1] is False
    assert len(times) == 2 and Cache(store.root).lookup(key(1)) is not None


@needs_nvcc
def test_neither_a_moved_toolkit_nor_a_moved_checkout_rebuilds(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    before = ag.compile(Causal(), arch="sm_90a", head_dim=64, paged=True)
    program = (
        "import attngen as ag; from attngen.variants import Causal\n"
        "found = ag.compile(Causal(), arch='sm_90a', head_dim=64, paged=True)\n"
        "print(ag.stats()['builds'], ag.__file__, *(k.spec_hash for k in found))"
    )
    moved = tmp_path / "moved" / "checkout"
    for name in ("attngen", "templates", "variants"):
        shutil.copytree(Path(ag.__file__).parent.parent / name, moved / name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {"PYTHONPATH": str(moved), "PYTHONSAFEPATH": "1", "CUDA_HOME": "/opt/cuda-elsewhere", "PATH": "/nowhere"}
    builds, where, *keys = toy.finish(toy.python(program, **env)).split()
    assert builds == "0" and Path(where).is_relative_to(moved) and keys == [k.spec_hash for k in before]


# ---- versions --------------------------------------------------------------------------------------------------------


def test_two_releases_share_a_cache(tmp_path, next_release):  # noqa: F811
    """Both at once, for one variant: each builds and finds its own."""
    env = {"ATTNGEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}
    paths = {"this": str(Path(ag.__file__).parent.parent), "next": str(next_release)}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for builds in ("1", "0"):
        started = {name: toy.python(SERVE, "-", **env, PYTHONPATH=path) for name, path in paths.items()}
        for name, process in started.items():
            answer = toy.finish(process).split()[-2:]
            assert answer[1] == builds
            found[name].add(answer[0])
    assert all(len(keys) == 1 for keys in found.values()) and found["this"] != found["next"]


def test_two_pythons_and_torches_share_kernels_and_not_the_extension(tmp_path, monkeypatch):
    """Another Python's extension has another key; the kernels' keys know neither Python nor torch."""
    problem = run.problem_for(torch.float32, 32, 32, {}, "avx2")
    kernel_key, host_key = run.specialise(Causal(), problem)[-1], load._host_key("digest")
    monkeypatch.setattr(load, "PYTHON_ABI", ".cpython-399-x86_64-linux-gnu.so")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    assert run.specialise(Causal(), problem)[-1] == kernel_key and load._host_key("digest") != host_key


OTHER = """
import importlib.machinery, sys, torch
if sys.argv[2] == "other":  # another Python and another torch, as far as attngen can tell
    importlib.machinery.EXTENSION_SUFFIXES.insert(0, ".cpython-399-x86_64-linux-gnu.so")
    torch.__version__ = "9.9.9"
"""


def test_two_pythons_share_a_cache_of_a_bare_checkout(tmp_path):
    """In processes: each has a host extension of its own, and both load one kernel."""
    checkout = tmp_path / "checkout"
    for name in ("attngen", "templates", "variants"):
        ignore = shutil.ignore_patterns("__pycache__", "_host*.so")
        shutil.copytree(Path(ag.__file__).parent.parent / name, checkout / name, ignore=ignore)
    env = {"ATTNGEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
    keys = [toy.finish(toy.python(OTHER + SERVE, "-", who, **env)).split()[-2] for who in ("this", "other", "this")]
    shelves = {name: len(list((tmp_path / "cache" / "v1" / name).glob("*/*"))) for name in ("host", "kernels")}
    assert len(set(keys)) == 1 and shelves == {"host": 2, "kernels": 1}


# ---- many keys, pruning ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Cache:
    store = Cache(tmp_path_factory.mktemp("many") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "fsync", lambda path: None)  # of a scratch folder: the disk's time is not the point
        for i in range(1000):
            store.get_or_build(key(i), plain(content(i)))
    return store


def test_a_thousand_keys(thousand):
    fresh = Cache(thousand.root)
    for i in range(0, 1000, 7):
        assert fresh.get_or_build(key(i), never)[0].read() == content(i)
    assert sum(1 for _ in fresh.entries()) == 1000
    assert len(os.listdir("/proc/self/fd")) < 200  # a kernel keeps no file open


def test_prune_removes_the_least_recently_used(thousand):
    for i in range(0, 1000, 7):  # used after they were built
        stamp = time.time() + 5
        path = thousand.base / "hits" / key(i)
        path.touch()
        os.utime(path, (stamp, stamp))
    each = usage(thousand)[0].bytes
    planned = prune(thousand, max_bytes=500 * each, dry_run=True)
    assert sum(1 for _ in thousand.entries()) == 1000 and planned.removed
    done = prune(thousand, max_bytes=500 * each)
    assert [u.entry.key for u in done.removed] == [u.entry.key for u in planned.removed]
    left = {e.key for e in thousand.entries()}
    assert {key(i) for i in range(0, 1000, 7)} <= left and sum(u.bytes for u in usage(thousand)) <= 500 * each
    assert prune(thousand, max_age_s=1e9).removed == []
    assert os.listdir(thousand.base / "building") == []


HOLD = """
import sys
from pathlib import Path
import toy
from attngen import load
from attngen.cache import Cache
entry, hit = Cache(Path(sys.argv[1])).get_or_build(sys.argv[2], None)
if sys.argv[3] == "cubin":
    load._mark_in_use(entry.artifact)
else:
    load.load_kernel(entry)
print("holds", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["cpu", "cubin"])
def test_prune_leaves_what_a_running_process_has_loaded(tmp_path, kind):
    store = Cache(tmp_path / "cache")
    store.get_or_build(toy.KEY, toy.builder())
    store.get_or_build(key(1), plain())
    path = os.pathsep.join(str(p) for p in (Path(ag.__file__).parent.parent, Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.root, toy.KEY, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout.readline() == "holds\n"
    assert in_use(store) == {toy.KEY}
    done = prune(store, max_bytes=0)
    assert [u.entry.key for u in done.removed] == [key(1)] and [u.entry.key for u in done.in_use] == [toy.KEY]
    assert Cache(store.root).lookup(toy.KEY) is not None and Cache(store.root).lookup(key(1)) is None
    process.communicate("go\n", timeout=60)
    assert [u.entry.key for u in prune(store, max_bytes=0).removed] == [toy.KEY]


@pytest.mark.parametrize("how", ["another path", "meanwhile"])
def test_prune_leaves_what_is_loaded(tmp_path, how, monkeypatch):
    """Under another path, as in a container; or loaded between the look at what processes have and the removal."""
    from attngen import prune as module

    store, mounted = Cache(tmp_path / "cache"), tmp_path / "mounted"
    store.get_or_build(toy.KEY, toy.builder())
    root = store.root
    if how == "another path":
        mounted.mkdir()
        if subprocess.run(["mount", "--bind", store.root, mounted], capture_output=True).returncode:
            pytest.skip("no right to mount")
        root = mounted
    path = os.pathsep.join(str(p) for p in (Path(ag.__file__).parent.parent, Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, root, toy.KEY, "cpu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout.readline() == "holds\n"
    if mounted.exists():
        subprocess.run(["umount", "--lazy", mounted], check=True)
    look, looks = module._mapped, []
    if how == "meanwhile":
        monkeypatch.setattr(module, "_mapped", lambda: looks.append(1) or (set() if len(looks) == 1 else look()))
    done = prune(store, max_bytes=0)
    assert done.removed == [] and [u.entry.key for u in done.in_use] == [toy.KEY]
    assert Cache(store.root).lookup(toy.KEY) is not None and os.listdir(store.base / "building") == []
    process.communicate("go\n", timeout=60)
    assert [u.entry.key for u in prune(store, max_bytes=0).removed] == [toy.KEY]


LOADS = """
import shutil, sys, time
from pathlib import Path
import torch, toy
from attngen import load
from attngen.cache import Cache
root, ready, times = Path(sys.argv[1]), Path(sys.argv[2]), 0

def build(folder):
    shutil.copy(ready / "kernel.so", folder)
    return {"kind": "cpu", "abi": toy.LAUNCH_ABI, "artifact": "kernel.so", "sources": [], "flags": []}

for i in range(150):
    store = Cache(root)
    find = lambda: store.get_or_build(f"{i:064x}", build)
    entry, hit = find()
    load._cpu_kernels.clear()  # as in a new process
    time.sleep(0.004 * (i % 3))
    x = torch.zeros(10)
    load.load_kept(entry, lambda: find()[0]).launch(toy.PARAMS.pack(x.data_ptr(), 10, 2))
    assert torch.equal(x, torch.ones(10)), x
print("served")
"""


def test_prunes_race_with_loads(tmp_path):
    """Two processes build, find and load, a third removes all it may: everything that is loaded is whole, and computes."""
    ready = Cache(tmp_path / "ready").get_or_build(toy.KEY, toy.builder())[0].folder
    root = tmp_path / "cache"
    Cache(root).get_or_build(key(1), plain())
    loading = [toy.python(LOADS, root, ready) for _ in range(2)]
    removed = 0
    while any(process.poll() is None for process in loading):
        removed += len(prune(Cache(root), max_bytes=0).removed)
    assert [toy.finish(process).split()[-1] for process in loading] == ["served"] * 2
    assert removed


def test_a_kernel_that_is_removed_before_it_is_loaded_is_found_anew(tmp_path):
    store = Cache(tmp_path / "cache")
    entry, _ = store.get_or_build(toy.KEY, toy.builder())
    load._cpu_kernels.clear()
    shutil.rmtree(entry.folder)
    kernel = load.load_kept(entry, lambda: store.get_or_build(toy.KEY, toy.builder())[0])
    x = torch.zeros(10)
    kernel.launch(toy.PARAMS.pack(x.data_ptr(), 10, 1))
    assert torch.equal(x, torch.ones(10)) and kernel.entry.exists()


# ---- damage, seen by servers -----------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_a_server_meets_damage(tmp_path):
    """Each in a process of its own: what is damaged is never loaded; it is built again, or with ATTNGEN_JIT=off an error that
    says what was found. Times of 1970 and 2242 are no damage."""
    env = {"ATTNGEN_CACHE_DIR": str(tmp_path / "cache")}
    served = toy.finish(toy.python(SERVE, "-", **env)).split()[-2:]
    folder = Cache(tmp_path / "cache").folder(served[0])
    for moment in (0, 2**33):
        for path in (tmp_path / "cache").rglob("*"):
            os.utime(path, (moment, moment))
        assert toy.finish(toy.python(SERVE, "-", **env)).split()[-2:] == [served[0], "0"]
    for name, how, said in (
        ("kernel.so", "flip", "with sha256"), ("kernel.so", "cut", "bytes"), ("manifest.json", "cut", "manifest.json with"),
        ("manifest.json", "flip", "manifest.json with"),
    ):  # fmt: skip
        spoil(folder / name, how)
        refused = toy.python(SERVE, "-", **env, ATTNGEN_JIT="off")
        output, _ = refused.communicate(timeout=120)
        assert refused.returncode and "damaged cache entry" in output and said in output, output
        assert toy.finish(toy.python(SERVE, "-", **env)).split()[-2:] == [served[0], "1"]
    assert len(list((tmp_path / "cache" / "v1" / "damaged").iterdir())) == 4


# ---- a server --------------------------------------------------------------------------------------------------------

STRICT = """
import os, sys, torch, zipfile, encodings.cp437
import attngen as ag, attngen.layers, attngen.start
from attngen.variants import Causal
if os.getuid() == 0:  # only now: this Python may lie where other users cannot read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
bad = []
def audit(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "socket.connect"):
        bad.append((event, args[:1]))
    if event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        bad.append((event, args[0]))
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink"):
        bad.append((event, args[0]))
sys.addaudithook(audit)
loaded = ag.load_set(sys.argv[1], jit=False)
q, k, v = (torch.randn(1, 5, 2, 32) for _ in range(3))
out = ag.attention(q, k, v, Causal())
assert (out - ag.reference(q, k, v, Causal())).abs().max() < 1e-5
late = [m for m in ("attngen.units", "attngen.precompile", "jinja2", "ninja", "rich", "typer", "torch.utils.cpp_extension") if m in sys.modules]
print(os.getuid(), len(loaded.kernels), bad, late, ag.stats()["builds"])
"""


def one_pack(folder: Path) -> Path:
    """A pack of one CPU kernel, from the cache of the environment."""
    from attngen.pack import write_pack
    from attngen.precompile import Plan, build
    from attngen.sets import VariantSet

    (folder / "one.toml").write_text('[[kernels]]\nvariants = ["Causal"]\nhead_dims = [32]\narchs = ["cpu"]\n')
    result = build(Plan.of(VariantSet(folder / "one.toml")), 2)
    write_pack(folder / "one.attnpack", "one", result.entries.values(), result.lock())
    return folder / "one.attnpack"


def serve_strictly(python: str, pack: Path, **env: str) -> None:
    """Serves from a pack as another user, with an empty PATH and a home that is not there: nothing is executed, written or
    built."""
    modes = {p: p.stat().st_mode for p in (pack, *pack.parents) if p.stat().st_uid == os.getuid() and p != Path("/")}
    try:
        for path, mode in modes.items():
            path.chmod(mode | 0o055)
        env = {"PATH": "", "HOME": "/nonexistent", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", **env}
        done = subprocess.run([python, "-c", STRICT, pack], env=env, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(os.getuid() or 65534), "1", "[]", "[]", "0"], done.stdout
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize("home", ["none", "locked", "read-only"])
def test_a_server_without_path_home_or_rights(tmp_path, home):
    pack, folder = one_pack(tmp_path), tmp_path / "home"
    if home != "none":
        (folder / ".cache").mkdir(parents=True)
        folder.chmod(0o700 if home == "locked" else 0o555)  # of another user
    serve_strictly(sys.executable, pack, PYTHONPATH=str(Path(ag.__file__).parent.parent), HOME=str(folder))


def test_a_full_disk_during_an_import(tmp_path):
    from attngen.pack import Pack, write_pack

    source = Cache(tmp_path / "source")
    source.get_or_build(key(1), plain(b"x" * 200_000))
    write_pack(tmp_path / "big.attnpack", "big", source.entries())
    root = tmp_path / "cache"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", root], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        pack = Pack(tmp_path / "big.attnpack")
        with pytest.raises(CacheError, match="is full"):
            Cache(root).adopt(pack.lookup(key(1), "pack"))
        assert Cache(root).lookup(key(1)) is None
    finally:
        subprocess.run(["umount", root], check=True)
