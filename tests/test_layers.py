"""Layers around the cache: whom they are believed from, and stores that fail, hang, lie or hold half of something."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy
from test_cache import flip, never, others, plain  # noqa: F401
from test_cli import attngen  # noqa: F401
from test_ship import built, forget, here, keys_of, signers  # noqa: F401

import attngen as ag
from attngen import cache, counters, layers, load
from attngen.cache import Cache
from attngen.errors import CacheError, MissingKernelError

# ---- whom they are believed from -------------------------------------------------------------------------------------

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")


def test_a_cache_where_others_can_put_theirs_is_refused(tmp_path):
    """The folder is private, but lies in one where another user can rename it."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    store = Cache(volume / "mine" / "cache")
    with pytest.raises(CacheError, match=f"(?s){volume} can be written by others.*chmod \\+t {volume}"):
        store.get_or_build(toy.KEY, plain())
    volume.chmod(0o1777)
    store.get_or_build(toy.KEY, plain())
    assert (volume / "mine").stat().st_mode & 0o777 == 0o700  # the folders above it are made private too
    volume.chmod(0o777)
    for act in (lambda: Cache(store.root).lookup(toy.KEY), lambda: layers.FolderLayer("system", store.root).lookup(toy.KEY, "kernels")):
        with pytest.raises(CacheError, match="can be written by others"):
            act()


@root_only
def test_a_link_of_another_user_is_not_followed(tmp_path):
    store = Cache(tmp_path / "cache")
    store.get_or_build(toy.KEY, plain())
    (tmp_path / "link").symlink_to("cache")
    assert Cache(tmp_path / "link").lookup(toy.KEY) is not None
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(CacheError, match="(?s)link can be written by others.*owned by user 12345"):
        Cache(tmp_path / "link").lookup(toy.KEY)


@pytest.mark.parametrize("mask", [0o000, 0o002])
def test_no_umask_lets_others_write_into_a_cache(tmp_path, mask):
    (tmp_path / "open").mkdir(mode=0o755)
    before = os.umask(mask)
    try:
        store, system = Cache(tmp_path / "open"), Cache(tmp_path / "system", shared=True)
        for made in (store, system):
            made.get_or_build(toy.KEY, plain())
            made.keep_lock("toy", {})
            made.write_record("tuned", "toy", {})
    finally:
        os.umask(before)
    assert [p for made in (store, system) for p in (made.root, *made.root.rglob("*")) if p.stat().st_mode & 0o022] == []


@pytest.mark.parametrize("which", ["v1", "v1/kernels", "shard", "entry", "manifest.json", "artifact"])
def test_what_others_could_have_written_in_a_cache_is_refused(tmp_path, which):
    root = tmp_path / "cache"
    entry, _ = Cache(root, shared=True).get_or_build(toy.KEY, plain())
    place = {"shard": entry.folder.parent, "entry": entry.folder, "manifest.json": entry.folder / which, "artifact": entry.artifact}
    place.get(which, root / which).chmod(0o777)
    for layer in (Cache(root), layers.FolderLayer("system", root)):
        with pytest.raises(CacheError, match="can be written by others"):
            layer.lookup(toy.KEY, "kernels")
    root.chmod(0o700)  # where nobody else gets in, nobody wrote
    assert Cache(root).lookup(toy.KEY) == entry


def test_a_system_cache_serves_another_user(here, others):  # noqa: F811
    """As `USER nobody` in an image; where it cannot be read, the error says so."""
    before = os.umask(0o077)
    try:
        run = [sys.executable, "-m", "attngen", "cache", "import", here / "llama.attnpack", "--into", here / "opt" / "sys"]
        subprocess.run(run, check=True, capture_output=True)
    finally:
        os.umask(before)

    def serve(source: str) -> str:
        os.environ |= {"ATTNGEN_SYSTEM_CACHE": str(here / "opt" / "sys"), "ATTNGEN_CACHE_DIR": "/nonexistent/cache"}
        forget()
        return str(ag.load_set(source, jit=False).layers())

    load.host()
    assert toy.in_child(lambda: serve("llama"), nobody=True) == "{'system': 2}"
    if os.geteuid() == 0:
        (here / "opt" / "sys" / "v1").chmod(0o700)
        assert "system passed over: out of reach: [Errno 13] Permission denied" in toy.in_child(lambda: serve("llama"), nobody=True)
        shutil.copy(here / "llama.lock", here / "one.lock")
        said = toy.in_child(lambda: serve(str(here / "one.lock")), nobody=True)
        assert "in no layer; system passed over: out of reach: [Errno 13] Permission denied" in said


# ---- layers that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["missing.attnpack", "damaged.attnpack", "nowhere", "one that others can write"])
def test_a_system_layer_that_fails_leaves_the_others(tmp_path, monkeypatch, caplog, what):
    system = tmp_path / what
    if what.startswith("damaged"):
        system.write_bytes(b"PK" * 100)
    elif what.startswith("one"):
        system.mkdir()
        system.chmod(0o777)
    monkeypatch.setenv("ATTNGEN_SYSTEM_CACHE", str(system))
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    Cache(tmp_path / "cache").get_or_build(toy.KEY, plain())
    assert cache.default().get_or_build(toy.KEY, never)[0].layer == "cache"
    assert "passed over" in caplog.text and str(system) in caplog.text
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    with pytest.raises(MissingKernelError, match="or another layer; system.* passed over: "):
        cache.default().get_or_build("cd" + "0" * 62, never)


def test_a_damaged_entry_that_another_layer_has_is_mended(here, caplog, monkeypatch):  # noqa: F811
    """Else it would be passed over, unsaid, at every start."""
    one = keys_of(here)[0]
    from attngen.pack import Pack

    pack = Pack(here / "llama.attnpack")
    store = Cache(here / "cache")
    flip(store.adopt(pack.lookup(one, "pack"))[0].folder)
    layers.attach(pack)
    counters.reset()
    monkeypatch.setenv("ATTNGEN_JIT", "off")
    assert cache.default().find(one).layer == "pack:llama" and f"{one} is served from pack:llama: a damaged" in caplog.text
    monkeypatch.delenv("ATTNGEN_JIT")
    with pytest.warns(ag.CacheWarning, match="set aside as"):
        assert cache.default().find(one).layer == "pack:llama"
    assert counters.stats()["damaged"] == 1 and Cache(here / "cache").lookup(one).manifest["origin"]["pack"] == "llama"


@pytest.mark.parametrize("value", ["gone_package", "gone.package", "outer.kernels"])
def test_a_wheel_whose_package_is_gone_is_passed_over(tmp_path, value):
    """pip was interrupted, or the entry point would import what it lies in."""
    (tmp_path / "outer" / "kernels").mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("raise SystemExit('executed')")
    info = tmp_path / "kernels-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[attngen.packs]\ngone = {value}\n")
    program = "import attngen, attngen.layers as l; print(l.installed(), l.troubles())"
    said = toy.finish(toy.python(program, PYTHONPATH=f"{tmp_path}:{Path(ag.__file__).parent.parent}")).splitlines()[-1]
    assert said == f"() {{'wheel:gone': 'its entry point names {value}, which is no top-level package here'}}"


def test_a_kernel_counts_once(here, built, monkeypatch):  # noqa: F811
    """That load_set built, or found and loaded, and a call then uses."""
    from attngen.variants import Causal

    def counted() -> list[int]:
        q = torch.randn(1, 5, 2, 32)
        ag.attention(q, q, q, Causal())
        return [counters.stats()[name] for name in ("hits", "misses", "builds", "loads")]

    for folder, expected in ((here / "cache", [0, 2, 2, 2]), (built / "cache", [2, 0, 0, 2])):
        monkeypatch.setattr(load, "_cpu_kernels", {})
        monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(folder))
        forget()
        ag.load_set(here / "llama.toml")
        assert counted() == expected
        ag.load_set(here / "llama.toml")
        assert counted() == expected


def test_a_note_of_a_miss_that_is_damaged_is_passed_over(here, attngen):  # noqa: F811
    misses = here / "cache" / "v1" / "misses"
    misses.mkdir(parents=True)
    (misses / f"{toy.KEY}.json").write_text('{"key": "ab')
    status, _, err = attngen("explain-miss", toy.KEY)
    assert status == 2 and f"passed over {misses}" in err and "nothing is known of this key" in err


# ---- remote stores ---------------------------------------------------------------------------------------------------


class Endless:
    """A file of a server that sends all it likes."""

    sent = 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        Endless.sent += size
        return bytes(size)


@pytest.fixture
def faulty(monkeypatch):
    """A store faulty://store/ that is well until its ``fault`` is set: what opening a file does."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Faulty(MemoryFileSystem):
        protocol, store, pseudo_dirs, fault, written = "faulty", {}, [""], None, []

        def open(self, path, mode="rb", **kwargs):
            if mode == "wb":
                Faulty.written.append(path.rpartition("/")[2])
            return super().open(path, mode, **kwargs) if self.fault is None or mode != "rb" else Faulty.fault()

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            with self.open(path, "wb") as file:
                file.write(value)

    fsspec.register_implementation("faulty", Faulty, clobber=True)
    layers._remote.cache_clear()
    layers._troubles.clear()
    monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", "faulty://store")
    yield Faulty
    layers._remote.cache_clear()
    layers._troubles.clear()


class DriverError(Exception):
    """Of no base that is known."""


def fail() -> None:
    raise DriverError("500")


def test_a_store_that_fails_is_passed_over(here, faulty, caplog):  # noqa: F811
    faulty.fault = staticmethod(fail)
    assert cache.default().find(keys_of(here)[0]) is None
    assert "remote: passed over: faulty://store: DriverError: 500" in caplog.text
    with pytest.raises(MissingKernelError, match="in no layer; remote passed over: out of reach: faulty://store: DriverError: 500"):
        ag.load_set(here / "llama.toml", jit=False)


def test_a_store_that_hangs_stalls_one_kernel_not_each(here, faulty, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(layers, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(layers, "SLOW_S", 0.2)
    faulty.fault = staticmethod(lambda: time.sleep(1000))
    for key in keys_of(here):
        assert cache.default().find(key) is None
    assert caplog.text.count("no answer from faulty://store within") == 1 and "not asked again for 60 s" in caplog.text
    monkeypatch.setattr(layers, "QUIET_S", 0.0)
    layers._remote.cache_clear()
    assert all(cache.default().find(key) is None for key in keys_of(here))
    assert caplog.text.count("no answer from faulty://store within") == 3


def test_a_store_that_sends_without_end_is_not_listened_to(here, faulty, caplog):  # noqa: F811
    faulty.fault = staticmethod(lambda: contextlib.nullcontext(Endless()))
    assert cache.default().find(keys_of(here)[0]) is None
    assert "required at most 4194304 bytes, found more" in caplog.text and Endless.sent == layers.MAX_MANIFEST + 1


def test_a_forked_server_asks_a_store_anew(here, faulty):  # noqa: F811
    cache.default().find(keys_of(here)[0])
    mine = id(next(iter(layers.after())))
    assert toy.in_child(lambda: id(list(layers.after())[-1]) != mine) == "True"


def push(here: Path, built: Path, *sign: str | Path) -> dict[str, int]:  # noqa: F811
    """What a push of the set's kernels sends."""
    from attngen.layers import RemoteLayer

    remote, store = RemoteLayer("faulty://store"), Cache(built / "cache")
    return sum(remote.store(store.lookup(key), *sign) for key in keys_of(here))


@pytest.mark.parametrize("which", ["attention.cpp", "build.log", "kernel.so", "gone"])
def test_what_a_store_holds_wrong_is_not_taken_and_is_sent_again(here, built, faulty, which, caplog):  # noqa: F811
    assert push(here, built) == 2 and push(here, built) == 0
    assert [faulty.written[i] for i in (len(faulty.written) // 2 - 1, -1)] == ["manifest.json"] * 2  # who sees it finds the rest
    one = keys_of(here)[0]
    (path,) = [p for p in faulty.store if p.endswith(f"{one}/{'kernel.so' if which == 'gone' else which}")]
    if which == "gone":
        faulty.store.pop(path)
    else:
        faulty.store[path].seek(0)
        faulty.store[path].write(b"tampered")
    assert cache.default().find(one) is None and "remote: passed over: a damaged cache entry" in caplog.text
    assert Cache(here / "cache").lookup(one) is None
    assert push(here, built) == 1 and cache.default().find(one) is not None


def test_signatures_reach_what_was_there_without(here, built, signers, faulty, monkeypatch, attngen):  # noqa: F811
    """In a store, and in the user's cache, from a store or a pack."""
    one, key = signers[0], keys_of(here)[0]
    assert push(here, built) == 2
    assert cache.default().find(key).manifest.get("signature") is None
    assert push(here, built, one) == 2 and push(here, built, one) == 0 and push(here, built) == 0
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    assert attngen("cache", "export", here / "llama.toml", "-o", here / "signed.attnpack", "--sign", one)[0] == 0
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(here / "cache"))
    assert attngen("cache", "import", here / "llama.attnpack")[0] == 0
    assert attngen("cache", "import", here / "signed.attnpack")[0] == 0
    monkeypatch.setenv("ATTNGEN_TRUSTED_KEYS", str(one.with_name("one.pub.pem")))
    found = Cache(here / "cache").lookup(key)
    assert found is not None and os.listdir(here / "cache" / "v1" / "building") == [] and not (here / "cache" / "v1" / "damaged").exists()
    shutil.rmtree(here / "cache")
    forget()
    assert cache.default().find(key).layer == "remote" and Cache(here / "cache").lookup(key) is not None  # kept with its signature


def test_a_store_that_takes_nothing_says_so(here, built, faulty, attngen, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(built / "cache"))
    monkeypatch.delenv("ATTNGEN_REMOTE_CACHE")
    monkeypatch.setattr(faulty, "pipe_file", lambda self, *a, **k: fail())
    status, _, err = attngen("cache", "push", "faulty://store", here / "llama.toml")
    assert status == 2 and "does not take the kernels" in err and "DriverError: 500" in err


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder, or answers 500; without ranges."""

    root, status = Path(), 200

    def do_GET(self) -> None:
        path = self.root / self.path.lstrip("/")
        self.send_response(self.status if self.status != 200 or path.is_file() else 404)
        self.end_headers()
        if self.status == 200 and path.is_file():
            self.wfile.write(path.read_bytes())

    def log_message(self, *args: object) -> None:
        pass


def test_a_store_over_http(here, built, monkeypatch, caplog):  # noqa: F811
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(Server, "root", built / "cache")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("ATTNGEN_REMOTE_CACHE", f"http://127.0.0.1:{server.server_port}")
        one, two = keys_of(here)
        assert cache.default().find("cd" + "0" * 62) is None and caplog.text == ""
        assert cache.default().find(one).layer == "remote"
        assert toy.in_child(lambda: cache.default().find(two).layer) == "remote"
        shutil.rmtree(here / "cache")
        Server.status = 500
        assert cache.default().find(one) is None and "ClientResponseError: 500" in caplog.text
        Server.status = 200
        server.shutdown()
