"""The cache under threads, processes, kills, damage, full and read-only disks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import toy

from attngen import cache, counters
from attngen.cache import Cache, sources_digest
from attngen.errors import BuildError, CacheError, CacheWarning, MissingKernelError
from attngen.locks import machine

# One line a build in a log beside the cache; a flag file holds the build back until every process has asked.
ASK = """
import sys, time
from pathlib import Path

import toy
from attngen.cache import Cache
root, log, go, seconds = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])

def build(folder):
    with log.open("a") as lines:
        lines.write("build\\n")
    time.sleep(seconds)
    return toy.builder()(folder)

print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
entry, hit = Cache(root).get_or_build(toy.KEY, build)
print(entry.artifact.stat().st_size, hit)
"""


@pytest.fixture
def store(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def plain(text: bytes = b"artifact"):
    """A build function that needs no compiler."""

    def build(folder: Path) -> dict[str, object]:
        (folder / "kernel.so").write_bytes(text)
        (folder / "kernel.cpp").write_text("source")
        return {"kind": "cpu", "artifact": "kernel.so", "sources": ["kernel.cpp"]}

    return build


def never(folder: Path) -> dict[str, object]:
    raise AssertionError("built, though it was there")


def wait_for(condition, what: str, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def ask_together(ask, go: Path, timeout: float = 300) -> None:
    """``ask`` in 32 processes that wait for ``go``; all of them end well."""
    processes = [multiprocessing.get_context("fork").Process(target=ask) for _ in range(32)]
    for process in processes:
        process.start()
    go.touch()
    for process in processes:
        process.join(timeout)
    assert [process.exitcode for process in processes] == [0] * 32


# ---- where -----------------------------------------------------------------------------------------------------------


def test_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ATTNGEN_CACHE_DIR", raising=False)
    assert cache.cache_root() == Path("/home/someone/.cache/attngen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_root() == Path("/xdg/attngen")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", "~/kernels")
    assert cache.cache_root() == Path("/home/someone/kernels")
    assert cache.default() is cache.default() and cache.default().root == Path("/home/someone/kernels")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    assert cache.default().root == tmp_path


def test_a_build_and_its_hit(store):
    assert store.lookup(toy.KEY) is None
    entry, hit = store.get_or_build(toy.KEY, toy.builder(variant="toy"))
    assert not hit
    assert entry.folder == store.root / "v1" / "kernels" / toy.KEY[:2] / toy.KEY
    assert entry.manifest["variant"] == "toy" and entry.manifest["format"] == cache.FORMAT
    assert entry.size == entry.artifact.stat().st_size
    assert entry.sources() == {"kernel.cpp": toy.SOURCE}
    assert store.get_or_build(toy.KEY, never) == (entry, True)  # from memory
    again, hit = Cache(store.root).get_or_build(toy.KEY, never)  # from disk
    assert hit and again == entry
    assert os.listdir(store.base / "building") == []
    assert store.root.stat().st_mode & 0o777 == 0o700


def test_entries_size_clear(store):
    for i, key in enumerate(("aa" + "1" * 62, "ab" + "2" * 62, "cc" + "3" * 62)):
        store.get_or_build(key, plain(b"x" * (i + 1)))
    assert [entry.size for entry in store.entries()] == [1, 2, 3]
    assert store.size() > 6
    count, freed = store.clear()
    assert count == 3 and freed > 6
    assert list(store.entries()) == []
    assert store.get_or_build(toy.KEY, plain())[1] is False


def test_sources_digest_sees_content_and_names_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "sub").mkdir(parents=True)
    (one / "a.jinja").write_text("a")
    (one / "sub" / "b.py").write_text("b")
    shutil.copytree(one, two)
    (two / "__pycache__").mkdir()
    (two / "__pycache__" / "b.pyc").write_text("c")
    os.utime(two / "a.jinja", (1, 1))
    digest = sources_digest(one)
    assert sources_digest(two) == digest
    (two / "a.jinja").rename(two / "c.jinja")
    assert sources_digest(two) != digest
    (one / "a.jinja").write_text("changed")
    assert sources_digest(one) != digest


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_sixteen_threads_build_once(store):
    builds, results, start = [], [], threading.Barrier(16)

    def build(folder: Path):
        builds.append(folder)
        time.sleep(0.2)
        return plain()(folder)

    def ask():
        start.wait()
        results.append(store.get_or_build(toy.KEY, build))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 16 and len(builds) == 1
    assert sorted(hit for _, hit in results) == [False] + [True] * 15


def test_two_processes_that_ask_at_once_build_once(tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"
    processes = [toy.python(ASK, tmp_path / "cache", log, go, 0.3) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    go.touch()
    answers = [toy.finish(process).split() for process in processes]
    assert log.read_text() == "build\n"
    assert len({size for size, _ in answers}) == 1
    assert sorted(hit for _, hit in answers) == ["False", "True"]


def test_thirty_two_forked_processes_build_once(tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"

    def build(folder: Path):
        with log.open("a") as lines:
            lines.write("build\n")
        time.sleep(0.3)
        return toy.builder()(folder)

    def ask() -> None:
        wait_for(go.exists, "never asked")
        entry, _ = Cache(tmp_path / "cache").get_or_build(toy.KEY, build)
        assert entry.sources() == {"kernel.cpp": toy.SOURCE}

    ask_together(ask, go)
    assert log.read_text() == "build\n"


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_without_working_file_locks_all_are_served(tmp_path, monkeypatch, caplog, code):
    """What a file system without them says is no lock that another holds: releases of filelock wait for some of these."""
    def no_locks(handle, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    caplog.set_level(logging.INFO, logger="attngen.cache")
    (tmp_path / "cache" / "v1" / "locks").mkdir(parents=True)
    (tmp_path / "cache" / "v1" / "locks" / f"{toy.KEY}.lock").touch()
    stores, results = [Cache(tmp_path / "cache") for _ in range(4)], []  # as four processes: they share only the disk
    start = threading.Barrier(4)

    def slow(folder: Path):
        start.wait()
        return plain()(folder)

    threads = [threading.Thread(target=lambda s=s: results.append(s.get_or_build(toy.KEY, slow))) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 4
    assert {entry.artifact.read_bytes() for entry, _ in results} == {b"artifact"}
    assert os.listdir(stores[0].base / "building") == []
    assert caplog.text.count("no file locks in") == 4 and "waiting for" not in caplog.text


def test_a_waiter_says_whom_it_waits_for(tmp_path, caplog):
    log, go = tmp_path / "log", tmp_path / "go"
    go.touch()
    process = toy.python(ASK, tmp_path / "cache", log, go, 4)
    wait_for(log.exists, "the other process never began to build", process)
    counters.reset()
    with caplog.at_level(logging.INFO, logger="attngen.cache"):
        _, hit = Cache(tmp_path / "cache").get_or_build(toy.KEY, never)
    toy.finish(process)
    assert hit
    assert f"waiting for process {process.pid} on " in caplog.text
    found = counters.stats()
    assert [found[name] for name in ("waits", "hits", "misses", "builds")] == [1, 1, 0, 0]  # another process built it


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_build_never_blocks_the_next(tmp_path, store):
    log, go = tmp_path / "log", tmp_path / "go"
    go.touch()
    for _ in range(2):
        log.unlink(missing_ok=True)
        process = toy.python(ASK, store.root, log, go, 1000)
        wait_for(log.exists, "the build never began", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(os.listdir(store.base / "building")) == 1  # the last one; each build collects those before it
    _, hit = store.get_or_build(toy.KEY, plain())
    assert not hit
    assert os.listdir(store.base / "building") == []


def test_a_waiter_takes_over_from_a_killed_builder(tmp_path):
    log, go = tmp_path / "log", tmp_path / "go"
    go.touch()
    first = toy.python(ASK, tmp_path / "cache", log, go, 1000)
    wait_for(log.exists, "the build never began", first)
    second = toy.python(ASK, tmp_path / "cache", log, go, 0)
    assert second.stdout.readline() == "ready\n"
    time.sleep(0.5)
    assert log.read_text() == "build\n"  # it waits
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert toy.finish(second).split()[1] == "False"


def test_folders_of_live_builds_are_left_alone(store):
    store.get_or_build(toy.KEY, plain())
    building = store.base / "building"
    ours = building / f".build-{machine()}-{os.getpid()}-1"
    elsewhere = building / ".build-00000000-1-2"
    abandoned = building / ".build-00000000-1-3"
    for folder in (ours, elsewhere, abandoned):
        folder.mkdir()
    os.utime(abandoned, (1, 1))
    store.get_or_build("cd" + "0" * 62, plain())
    assert sorted(building.iterdir()) == [elsewhere, ours]


def test_a_child_forked_during_a_build_builds(store):
    building, done = threading.Event(), threading.Event()

    def slow(folder: Path):
        building.set()
        done.wait(120)
        return plain()(folder)

    thread = threading.Thread(target=store.get_or_build, args=(toy.KEY, slow))
    thread.start()
    building.wait(120)
    other = "cd" + "0" * 62
    assert toy.in_child(lambda: store.get_or_build(other, plain())[1]) == "False"
    threading.Timer(2, done.set).start()
    # The same key: the child waits for the parent's file lock, not for a thread lock that nobody will open.
    answer = toy.in_child(lambda: Cache(store.root).get_or_build(toy.KEY, plain())[1])
    thread.join(120)
    assert answer == "True"


# ---- damage ----------------------------------------------------------------------------------------------------------


def rewrite(change):
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def flip(folder: Path) -> None:
    content = bytearray((folder / "kernel.so").read_bytes())
    content[3] ^= 1
    (folder / "kernel.so").write_bytes(content)


DAMAGE = {
    "truncated": (lambda folder: os.truncate(folder / "kernel.so", 3), "kernel.so of 8 bytes", "3 bytes"),
    "bit flip": (flip, "kernel.so with sha256", "found: "),
    "no artifact": (lambda folder: (folder / "kernel.so").unlink(), "a readable kernel.so", "No such file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "a manifest.json", "none"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 20), "a manifest.json with", "JSONDecode"),
    "not an object": (lambda folder: (folder / "manifest.json").write_text("[1]"), "a manifest.json with", "TypeError"),
    "no digest": (rewrite(lambda m: m.pop("sha256")), "a manifest.json with", "KeyError('sha256')"),
    "other format": (rewrite(lambda m: m.update(format=99)), "format 1", "format 99"),
    "a bit of how it is launched": (rewrite(lambda m: m.update(abi="other")), "a manifest.json with the seal", "other content"),
    "other key": (rewrite(lambda m: m.update(key="ff")), f"format 1, key {toy.KEY}", "key ff"),
}


def test_every_flipped_bit_of_a_manifest_is_seen(store):
    """Its numbers say how a kernel is launched."""
    entry, _ = store.get_or_build(toy.KEY, plain())
    path = entry.folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = Cache(store.root).lookup(toy.KEY)
        except CacheError:
            continue
        assert found.manifest == entry.manifest or "seal" not in path.read_text(errors="replace")
    path.write_bytes(whole)
    assert Cache(store.root).lookup(toy.KEY).manifest == entry.manifest


@pytest.mark.parametrize("damage,required,found", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_refused_set_aside_and_built_again(store, damage, required, found):
    entry, _ = store.get_or_build(toy.KEY, plain())
    damage(entry.folder)
    fresh = Cache(store.root)
    with pytest.raises(CacheError) as caught:
        fresh.lookup(toy.KEY)
    message = str(caught.value)
    assert f"required: {required}" in message and found in message and "attngen cache clear" in message
    with pytest.warns(CacheWarning, match="(?s)damaged cache entry.*set aside as .*/damaged/"):
        mended, hit = fresh.get_or_build(toy.KEY, plain())
    assert not hit and mended.artifact.read_bytes() == b"artifact"
    assert len(os.listdir(fresh.base / "damaged")) == 1
    assert Cache(store.root).get_or_build(toy.KEY, never)[1]


def test_what_was_set_aside_is_bounded(store, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_DAMAGED", 2)
    for _ in range(4):
        entry, _ = Cache(store.root).get_or_build(toy.KEY, plain())
        flip(entry.folder)
        with pytest.warns(CacheWarning):
            Cache(store.root).get_or_build(toy.KEY, plain())
    assert len(os.listdir(store.base / "damaged")) == 2


def test_a_failed_build_leaves_nothing_but_its_sources(store):
    from attngen.build import compile_kernel

    def build(folder: Path):
        return compile_kernel({"kernel.cpp": "broken"}, toy.RECIPE, folder, keep_failed=store.failed(toy.KEY))

    counters.reset()
    with pytest.raises(BuildError, match="broken"):
        store.get_or_build(toy.KEY, build)
    assert [counters.stats()[name] for name in ("misses", "failed", "builds")] == [1, 1, 0]
    assert os.listdir(store.base / "building") == []
    assert (store.root / "failed" / toy.KEY / "kernel.cpp").read_text() == "broken"
    assert store.get_or_build(toy.KEY, plain())[1] is False  # the next one is not held up


def test_an_entry_that_is_removed_as_it_is_read_is_not_damaged(store, monkeypatch):
    """By a prune between its manifest and its artifact; then another build's may have its place."""
    from attngen import entry as entries

    entry, _ = store.get_or_build(toy.KEY, plain())
    parse, then = entries.parse_manifest, []

    def removed(text, place, key):
        if len(then) < 2:
            shutil.rmtree(entry.folder)
            for act in then:
                act()
            then.append(lambda: Cache(store.root).get_or_build(toy.KEY, plain(b"another")))
        return parse(text, place, key)

    monkeypatch.setattr(entries, "parse_manifest", removed)
    assert Cache(store.root).lookup(toy.KEY) is None
    monkeypatch.setattr(entries, "parse_manifest", parse)
    Cache(store.root).get_or_build(toy.KEY, plain())
    monkeypatch.setattr(entries, "parse_manifest", removed)
    assert Cache(store.root).lookup(toy.KEY).read() == b"another"
    monkeypatch.setattr(entries, "parse_manifest", parse)
    assert not (store.base / "damaged").exists()


def test_the_newest_misses_are_kept(store, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_MISSES", 10)
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    (store.base / "misses").mkdir(parents=True)
    for i in range(15):
        with pytest.raises(MissingKernelError):
            store.get_or_build(f"{i:064x}", never, inputs=lambda: {"backend": "cpu"})
        os.utime(store.base / "misses" / f"{i:064x}.json", (i, i))
    assert sorted(os.listdir(store.base / "misses")) == [f"{i:064x}.json" for i in range(5, 15)]


WRONG = {
    "cpu_seconds": "abc", "created": "now", "seconds": [1], "problem": "x", "choice": [1], "variant": ["[red]"], "isa": 5, "abi": ["x"],
    "sources": None, "params": [3], "compiler": 3, "files": ["kernel.cpp"], "kind": ["cpu"], "name": ["x"], "flags": [1], "inputs": "x",
    "origin": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_another_type_is_damage(store, field):
    """From a pack or in a folder: what lists or counts entries would end in it."""
    from attngen.entry import json_text
    from attngen.pack import Pack, write_pack
    from attngen.prune import usage

    entry, _ = store.get_or_build(toy.KEY, plain())
    wrong = {**entry.manifest, field: WRONG[field]}
    (entry.folder / "manifest.json").write_text(json_text(wrong))
    with pytest.raises(CacheError, match="a manifest.json with format, key"):
        Cache(store.root).lookup(toy.KEY)
    assert usage(store) == [] and list(store.manifests()) == []
    (entry.folder / "kernel.cpp").write_text("source")
    bad = cache.Entry(toy.KEY, entry.folder, {**wrong, "files": {}} if field in ("sources", "files") else wrong)
    if field not in ("sources", "files"):
        write_pack(store.root / "bad.attnpack", "bad", [bad])
        if field not in ("created", "seconds", "cpu_seconds", "origin"):  # a pack leaves out what belongs to one copy
            with pytest.raises(CacheError, match="(?s)nothing was taken from it|damaged cache entry"):
                Pack(store.root / "bad.attnpack")


# ---- files -----------------------------------------------------------------------------------------------------------

KEEP = """
import json, sys, time
from pathlib import Path
from attngen.cache import Cache
store, mine = Cache(Path(sys.argv[1])), {"by": sys.argv[2], "filler": sys.argv[2] * int(sys.argv[3])}
import os; os.getpid = lambda: 1  # as in a container
end = time.monotonic() + 3
while time.monotonic() < end:
    store.keep_lock("llama", mine)
    found = json.loads((store.base / "sets" / "llama.lock").read_bytes())
    assert len(found["filler"]) in map(int, sys.argv[3:]), len(found["filler"])
"""


def test_writers_of_one_file_never_tear_it(tmp_path):
    """As two containers over one cache, in each of which the process is number 1."""
    Cache(tmp_path).keep_lock("llama", {"filler": "a"})
    writers = [toy.python(KEEP, tmp_path, who, size, other) for who, size, other in (("a", 3, 300_000), ("b", 300_000, 3))]
    for writer in writers:
        toy.finish(writer)
    assert os.listdir(tmp_path / "v1" / "sets") == ["llama.lock"]


def test_a_file_that_is_not_written_whole_leaves_the_old_one(tmp_path):
    from attngen.entry import written_whole

    (tmp_path / "it").write_text("old")
    with pytest.raises(OSError, match="half"), written_whole(tmp_path / "it") as private:
        private.write_text("ne")
        raise OSError("half")
    assert (tmp_path / "it").read_text() == "old" and os.listdir(tmp_path) == ["it"]


# ---- folders that cannot be written ----------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path):
    """Lets another user reach the test's folder: root's own rights would hide every refusal."""
    modes = {}
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o001 and folder != Path("/"):
            modes[folder] = folder.stat().st_mode
            folder.chmod(folder.stat().st_mode | 0o055)
    yield
    for folder, mode in modes.items():
        folder.chmod(mode)


def test_a_read_only_cache_serves_what_it_holds(store, others):
    store.get_or_build(toy.KEY, plain())
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    fresh = Cache(store.root)
    assert toy.in_child(lambda: fresh.get_or_build(toy.KEY, never)[1], nobody=True) == "True"
    message = toy.in_child(lambda: fresh.get_or_build("cd" + "0" * 62, plain()), nobody=True)
    assert message.startswith("CacheError") and "Permission denied" in message and "ATTNGEN_CACHE_DIR" in message
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o755)


def test_an_unwritable_folder(tmp_path, others):
    (tmp_path / "locked").mkdir(mode=0o555)
    root = tmp_path / "locked" / "cache"
    message = toy.in_child(lambda: Cache(root).get_or_build(toy.KEY, plain()), nobody=True)
    assert message.startswith(f"CacheError: the cache folder {root} cannot be used")
    assert f"writing {root}: Permission denied" in message and "set ATTNGEN_CACHE_DIR" in message


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="(?s)cannot be used.*ATTNGEN_CACHE_DIR"):
        Cache(tmp_path / "cache").get_or_build(toy.KEY, plain())


@pytest.mark.parametrize("build", [plain(b"x" * 2_000_000), toy.builder()], ids=["our write", "the compiler's"])
def test_a_full_disk(tmp_path, build):
    """On a tmpfs of a few pages; a user who may not mount gets a limit on file sizes, which fails in the same calls."""
    root = tmp_path / "cache"
    root.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k,mode=700", "none", root], capture_output=True)
    mounted = mount.returncode == 0

    def fill():
        if not mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return Cache(root).get_or_build(toy.KEY, build)

    try:
        message = toy.in_child(fill)
        assert message.startswith(f"CacheError: the cache folder {root} is full"), message
        assert "free some space" in message and "ATTNGEN_CACHE_DIR" in message
        assert Cache(root).lookup(toy.KEY) is None
    finally:
        if mounted:
            subprocess.run(["umount", root], check=True)


def test_an_entry_that_appears_between_two_looks_is_whole(tmp_path, monkeypatch):
    """Published after its manifest was found missing, before its folder was looked for: it was set aside as damaged."""
    from attngen.entry import read_entry

    cache = Cache(tmp_path)
    key = "ab" * 32
    entry, _ = cache.get_or_build(key, plain())
    hidden = entry.folder.with_name("hidden")
    entry.folder.rename(hidden)
    is_dir = Path.is_dir

    def appears(path: Path) -> bool:
        if path == entry.folder and hidden.exists():
            hidden.rename(entry.folder)
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", appears)
    found = read_entry(entry.folder, key)
    assert found is not None and found.read() == b"artifact"
