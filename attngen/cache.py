"""Cache: artifacts by key, published whole or not at all.

    <root>/v1/kernels/<key[:2]>/<key>/     artifact, its source files, build.log, manifest.json
    <root>/v1/host/<key[:2]>/<key>/        the host extension of a bare checkout, in the same form
    <root>/v1/locks/<key>.lock, .holder    who builds; a lock file is never unlinked
    <root>/v1/building/                    private folders, one a build
    <root>/v1/damaged/, <root>/failed/     what was set aside, for the user to read

A hit takes no lock and writes nothing, so a read-only cache serves what it holds. A miss takes a thread lock and a file
lock, looks again, builds in a private folder and renames it into place. The kernel of the OS drops the file lock of a
dead process, so a killed build never blocks the next one; a file system without locks costs a second compile, no more.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import keep_newest
from .errors import AttngenError, BuildError, CacheError, CacheWarning

FORMAT = 1  # of the folder layout and of manifest.json; part of every path as v1/
LOCK_TIMEOUT_S = 900.0  # longer than any build: past it the lock is broken, and building without it is still correct
STALE_S = 86400.0  # age at which a private folder of another machine is taken for abandoned
KEPT_DAMAGED = 20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ESTALE}

log = logging.getLogger("attngen.cache")


@dataclass(frozen=True)
class Entry:
    """A published artifact. `manifest` says what it is, how it was built and what it needs."""

    key: str
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / str(self.manifest["artifact"])

    @property
    def size(self) -> int:
        """Bytes of the artifact."""
        return int(self.manifest["size"])

    def sources(self) -> dict[str, str]:
        """The rendered source files, as they were compiled."""
        return {name: (self.folder / name).read_text(encoding="utf-8") for name in self.manifest.get("sources", ())}


def cache_root() -> Path:
    """$ATTNGEN_CACHE_DIR, else $XDG_CACHE_HOME/attngen, else ~/.cache/attngen."""
    own, xdg = os.environ.get("ATTNGEN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().absolute()
    if xdg and os.path.isabs(xdg):
        return Path(xdg) / "attngen"
    home = os.path.expanduser("~")
    if home == "~":
        raise CacheError(
            "no cache folder.\n  required: a folder for compiled kernels\n  found: neither ATTNGEN_CACHE_DIR nor "
            "XDG_CACHE_HOME nor a home folder\n  do: set ATTNGEN_CACHE_DIR to a folder that you can write"
        )
    return Path(home) / ".cache" / "attngen"


def default() -> Cache:
    """The cache of this process's environment: the same object as long as the environment names the same folder."""
    return _cache_of(*map(os.environ.get, ("ATTNGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@functools.cache
def _cache_of(*environment: str | None) -> Cache:
    return Cache(cache_root())


class Cache:
    """One cache folder, made for its user alone (0700). Any number of threads and processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = root / f"v{FORMAT}"
        self._entries: dict[tuple[str, str], Entry] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        # A thread that held one of these in the parent does not exist in a forked child.
        os.register_at_fork(after_in_child=self._forget_locks)

    def _forget_locks(self) -> None:
        self._locks, self._guard = {}, threading.Lock()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def folder(self, key: str, shelf: str = "kernels") -> Path:
        """Where the entry of `key` is or would be."""
        return self.base / shelf / key[:2] / key

    def failed(self, key: str) -> Path:
        """Where a failed build of `key` is kept (`compile_kernel(keep_failed=...)`)."""
        return self.root / "failed" / key

    def lookup(self, key: str, shelf: str = "kernels") -> Entry | None:
        """The entry of `key` after a check of its format, size and sha256; None where there is none.

        Raises CacheError where the entry is damaged or of another format, or the folder cannot be read.
        """
        folder = self.folder(key, shelf)
        try:
            text = (folder / "manifest.json").read_bytes()
        except FileNotFoundError:
            if not folder.is_dir():
                return None
            raise _damaged(folder, "a manifest.json", "none") from None
        except OSError as error:
            raise _unusable(self.root, f"reading {folder / 'manifest.json'}", error) from error
        try:
            manifest = json.loads(text)
            found, artifact = (manifest["format"], manifest["key"]), folder / manifest["artifact"]
            size, digest = manifest["size"], manifest["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, "a manifest.json with format, key, artifact, size and sha256", repr(error)) from None
        if found != (FORMAT, key):
            raise _damaged(folder, f"format {FORMAT}, key {key}", f"format {found[0]}, key {found[1]}")
        try:
            content = artifact.read_bytes()
        except OSError as error:
            raise _damaged(folder, f"a readable {artifact.name}", str(error)) from None
        if len(content) != size:
            raise _damaged(folder, f"{artifact.name} of {size} bytes", f"{len(content)} bytes")
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(folder, f"{artifact.name} with sha256 {digest}", hashlib.sha256(content).hexdigest())
        return Entry(key, folder, manifest)

    def entries(self, shelf: str = "kernels") -> Iterator[Entry]:
        """All entries with a readable manifest, oldest first; artifacts are not verified."""
        found = []
        for path in self.base.glob(f"{shelf}/*/*/manifest.json"):
            try:
                found.append(Entry(path.parent.name, path.parent, json.loads(path.read_bytes())))
            except (OSError, ValueError) as error:
                log.warning("unreadable manifest %s: %s", path, error)
        yield from sorted(found, key=lambda entry: entry.manifest.get("created", 0.0))

    def size(self) -> int:
        """Bytes of all files below the root."""
        return sum(path.lstat().st_size for path in self.root.rglob("*") if path.is_file())

    def clear(self) -> tuple[int, int]:
        """Removes everything but lock files: (kernels removed, bytes freed). Loaded kernels go on working."""
        before, count = self.size(), sum(1 for _ in self.entries())
        folders = [self.base / name for name in ("kernels", "host", "damaged", "building")]
        for folder in (*folders, self.root / "failed"):
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _unusable(self.root, f"removing {folder}", error) from error
        self._entries.clear()
        return count, before - self.size()

    # ---- building ----------------------------------------------------------------------------------------------------

    def get_or_build(
        self, key: str, build: Callable[[Path], Mapping[str, Any]], shelf: str = "kernels"
    ) -> tuple[Entry, bool]:
        """The entry of `key` and whether it was there (True) or had to be built.

        build(folder) makes the artifact in the empty private `folder` and returns the manifest's own fields: `kind`,
        `artifact` (file name), `sources` (file names) and whatever else describes it, all JSON. It runs once for any
        number of threads and processes that ask at the same time; what it raises reaches the caller unchanged.
        Raises CacheError where the folder cannot be written or is full. A damaged entry is set aside with a
        CacheWarning and built again.
        """
        hit = self._entries.get((shelf, key))
        if hit is not None:
            return hit, True
        with self._guard:
            thread_lock = self._locks.setdefault(key, threading.Lock())
        with thread_lock:
            hit = self._entries.get((shelf, key))
            if hit is not None:
                return hit, True
            try:
                entry = self.lookup(key, shelf)
            except CacheError as error:  # decided under the lock: another process may be mending it now
                log.debug("%s", error)
                entry = None
            built = False
            if entry is None:
                entry, built = self._build_locked(key, build, shelf)
            self._entries[shelf, key] = entry
            log.debug("%s %s %s", "built" if built else "hit", shelf, key)
            return entry, not built

    def _build_locked(
        self, key: str, build: Callable[[Path], Mapping[str, Any]], shelf: str
    ) -> tuple[Entry, bool]:
        with self._writing(self.base):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.base, self.base / "locks", self.base / "building"):
                folder.mkdir(exist_ok=True)
        with self._file_lock(key):
            damage = None
            try:
                entry = self.lookup(key, shelf)
            except CacheError as error:
                damage, entry = error, None
            if entry is not None:
                return entry, False
            if damage is not None:
                self._set_aside(key, shelf, damage)
            self._collect_abandoned()
            with self._writing(self.base / "building"):
                folder = self.base / "building" / f".build-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
                folder.mkdir()
            try:
                with self._writing(folder):
                    return self._publish(key, shelf, folder, build(folder)), True
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, key: str, shelf: str, folder: Path, described: Mapping[str, Any]) -> Entry:
        content = (folder / described["artifact"]).read_bytes()
        manifest = {
            **described,
            "format": FORMAT,
            "key": key,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "created": time.time(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        # What a lookup checks must be on the disk before the name is; sources and log are for people to read.
        for path in (folder / described["artifact"], folder / "manifest.json", folder):
            _fsync(path)
        final = self.folder(key, shelf)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(final)
        except OSError as error:
            # Only where file locks do not work: another builder came first, and its entry is as good as ours.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            other = self.lookup(key, shelf)
            if other is None:
                raise
            return other
        _fsync(final.parent)
        return Entry(key, final, manifest)

    def _set_aside(self, key: str, shelf: str, damage: CacheError) -> None:
        aside = self.base / "damaged"
        with self._writing(aside):
            aside.mkdir(exist_ok=True)
            target = aside / f"{key}-{secrets.token_hex(4)}"
            self.folder(key, shelf).rename(target)
        keep_newest(aside, KEPT_DAMAGED)
        warnings.warn(CacheWarning(f"{damage}\n  done: set aside as {target}, built again"), stacklevel=2)

    def _collect_abandoned(self) -> None:
        """Removes private folders of builds that were killed: of this machine's dead processes, or a day old."""
        for folder in (self.base / "building").glob(".build-*-*-*"):
            machine, pid = folder.name.split("-")[1:3]
            try:
                dead = machine == _machine() and not _alive(int(pid))
                if dead or time.time() - folder.stat().st_mtime > STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # its builder published it at this moment
                continue

    @contextmanager
    def _file_lock(self, key: str) -> Iterator[None]:
        """Holds <key>.lock across processes. A waiter says whom it waits for after a second."""
        from filelock import FileLock, Timeout  # only where something is built: a hit imports nothing

        lock = FileLock(self.base / "locks" / f"{key}.lock", thread_local=False)
        holder = self.base / "locks" / f"{key}.holder"
        start, locked, waits = time.monotonic(), False, 0
        while not locked and time.monotonic() - start < LOCK_TIMEOUT_S:
            try:
                lock.acquire(timeout=1 if waits == 0 else 10)
                locked = True
            except Timeout:
                waits += 1
                waited = time.monotonic() - start
                log.log(logging.INFO if waits == 1 else logging.WARNING,
                        "waiting for %s to build %s (%.0f s so far)", _read_holder(holder), key, waited)  # fmt: skip
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise _unusable(self.root, f"locking {lock.lock_file}", error) from error
                log.warning("no file locks in %s (%s): another process may build the same kernel too", self.root, error)
                break
        try:
            if locked:
                with self._writing(holder):
                    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            if locked:
                holder.unlink(missing_ok=True)
                lock.release()

    @contextmanager
    def _writing(self, place: Path) -> Iterator[None]:
        """Turns what a folder that is full or not ours to write does into a CacheError."""
        try:
            yield
        except AttngenError as error:
            full = os.strerror(errno.ENOSPC)
            if isinstance(error, BuildError) and full in str(error):
                raise _unusable(self.root, f"compiling in {place}", OSError(errno.ENOSPC, full)) from error
            raise
        except OSError as error:
            if error.errno not in _FULL | _CLOSED:
                raise
            raise _unusable(self.root, f"writing {error.filename or place}", error) from error


# ---- helpers ---------------------------------------------------------------------------------------------------------


def sources_digest(*roots: Path) -> str:
    """A digest of the content of files and folders: of names relative to each root and bytes, never of mtimes."""
    total = hashlib.sha256()
    for root in roots:
        files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
        for path in sorted(files):
            if "__pycache__" in path.parts:
                continue
            name = path.name if path == root else path.relative_to(root).as_posix()
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@functools.cache
def _machine() -> str:
    """Names the space in which a pid means something: this host and, in a container, its pid namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: the host alone
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # it has just finished, or has not yet said
        return "another process"


def _damaged(folder: Path, required: str, found: str) -> CacheError:
    return CacheError(
        f"a damaged cache entry.\n  required: {required}\n  found: {found} in {folder}\n"
        f"  do: nothing where it can be built again; else copy the entry anew, or run `attngen cache clear`"
    )


def _unusable(root: Path, tried: str, error: OSError) -> CacheError:
    full = error.errno in _FULL
    remedy = "free some space, run `attngen cache clear`" if full else "make it yours to read and write"
    return CacheError(
        f"the cache folder {root} {'is full' if full else 'cannot be used'}.\n"
        f"  required: a folder with room for compiled kernels, readable and writable\n"
        f"  found: {tried}: {error.strerror or error}\n"
        f"  do: {remedy}, or set ATTNGEN_CACHE_DIR to another folder"
    )
