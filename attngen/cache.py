"""Cache: artifacts by key, published whole or not at all.

    <root>/v1/kernels/<key[:2]>/<key>/     artifact, its source files, build.log, manifest.json
    <root>/v1/host/<key[:2]>/<key>/        the host extension of a bare checkout, in the same form
    <root>/v1/locks/<key>.lock, .holder    who builds; a lock file is never unlinked
    <root>/v1/building/                    private folders, one a build
    <root>/v1/hits/<key>                   a byte a process that found the key here; its time is that of the last use
    <root>/v1/misses/<key>.json            the inputs of keys that were refused, for `attngen explain-miss`
    <root>/v1/sets/<name>.lock             lock files of imported packs
    <root>/v1/damaged/, <root>/failed/     what was set aside, for the user to read

A hit takes no lock and needs no right to write, so a read-only cache serves what it holds. A miss takes a thread lock
and a file lock, looks again, builds in a private folder and renames it into place (locks.py). `default()` is also
surrounded by read-only layers (layers.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import counters, trust
from .entry import (
    FORMAT, Entry, cache_root, check_files, check_manifest, entry_folder, fsync, json_text, read_entry, sealed_text, sources_digest,
    written_whole,
)  # fmt: skip
from .errors import AttngenError, BuildError, CacheError, CacheWarning, JitWarning, MissingKernelError

__all__ = ["FORMAT", "Cache", "Entry", "cache_root", "default", "sources_digest"]

STALE_S = 86400.0  # age at which a private folder of another machine is taken for abandoned
KEPT_DAMAGED = 20
KEPT_MISSES = 1000
_TRIES = 3  # of a build whose folder another process removes meanwhile

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ESTALE, errno.EISDIR,
           errno.ELOOP}

log = logging.getLogger("attngen.cache")


def default() -> Cache:
    """The cache of this process's environment: the same object as long as the environment names the same folder."""
    return _cache_of(*map(os.environ.get, ("ATTNGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@functools.cache
def _cache_of(*environment: str | None) -> Cache:
    return Cache(cache_root(), layered=True)


class Cache:
    """One cache folder, made for its user alone. Any number of threads and processes may use it at once.
    ``layered``: the read-only layers are asked too. ``shared``: what is made here is for other users to read, as a system cache."""

    def __init__(self, root: Path, layered: bool = False, shared: bool = False) -> None:
        self.root = root
        self.shared = shared
        self.base = root / f"v{FORMAT}"
        self.layered = layered
        self._entries: dict[tuple[str, str], Entry] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._private = False  # whether the root was checked
        # A thread that held one of these in the parent does not exist in a forked child.
        os.register_at_fork(after_in_child=self._forget_locks)

    def _forget_locks(self) -> None:
        self._locks, self._guard = {}, threading.Lock()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def folder(self, key: str, shelf: str = "kernels") -> Path:
        """Where the entry of `key` is or would be."""
        return self.root / entry_folder(key, shelf)

    def failed(self, key: str) -> Path:
        """Where a failed build of `key` is kept (`compile_kernel(keep_failed=...)`)."""
        return self.root / "failed" / key

    def check_private(self) -> None:
        """Raises CacheError where others can write the root or put theirs in its place; once, for then only we can change that."""
        if not self._private:
            trust.check_private(self.root)
            self._private = os.path.exists(self.root)  # no, where it is not ours to see

    def lookup(self, key: str, shelf: str = "kernels") -> Entry | None:
        """The entry of `key` in this folder after a check of its format, size and sha256; None where there is none.

        Raises CacheError where the entry is damaged or of another format, or the folder cannot be read or is others' to
        write.
        """
        self.check_private()
        if not self._private:
            return None  # there is no folder yet
        folder = self.folder(key, shelf)
        try:
            return read_entry(folder, key)
        except CacheError:
            raise
        except OSError as error:
            raise _unusable(self.root, f"reading {folder / 'manifest.json'}", error) from error

    def find(self, key: str, shelf: str = "kernels") -> Entry | None:
        """The entry of `key` in the first layer that has it whole. Raises CacheError where only this folder has it, damaged."""
        if self.layered and os.environ.get("ATTNGEN_SYSTEM_CACHE"):
            from . import layers  # a hit without them imports nothing

            for layer in layers.before():
                entry = layers.look(layer, key, shelf)
                if entry is not None:
                    return entry
        damage = None
        try:
            entry = self.lookup(key, shelf)
            if entry is not None:
                self._count_hit(key, shelf)
                return entry
        except CacheError as error:
            damage = error
        if self.layered:
            from . import layers

            for layer in layers.after():
                entry = layers.look(layer, key, shelf)
                if entry is not None:
                    if damage is not None:
                        log.warning("%s is served from %s: %s", key, layer.name, damage)
                    return self._keep(entry) if damage is not None or layer.name == "remote" else entry
        if damage is not None:
            raise damage
        return None

    def _keep(self, entry: Entry) -> Entry:
        """An entry that was fetched, or takes a damaged one's place, published here where that is possible."""
        if counters.jit_mode() != "off":
            try:
                origin = {"origin": {"layer": entry.layer}, **entry.manifest}  # a wheel's has none; what has one is held to signatures
                return replace(self.adopt(replace(entry, manifest=origin))[0], layer=entry.layer)  # which had it: it is counted there
            except CacheError as error:
                log.warning("%s is not kept: %s", entry.key, error)
        return entry

    def _count_hit(self, key: str, shelf: str) -> None:
        """One byte more in the key's file of hits, where that can be written: without a server's, a prune would remove what it
        starts with."""
        if shelf == "kernels":
            try:
                handle = os.open(self.base / "hits" / key, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                return
            with contextlib.suppress(OSError):
                os.write(handle, b".")
            os.close(handle)

    def entries(self, shelf: str = "kernels") -> Iterator[Entry]:
        """All entries with a readable manifest, oldest first; artifacts are not verified."""
        found = []
        for path in self.base.glob(f"{shelf}/*/*/manifest.json"):
            try:
                manifest = check_manifest(json.loads(path.read_bytes()), path.parent, path.parent.name)
                found.append((manifest.get("created", 0.0), Entry(path.parent.name, path.parent, manifest)))
            except (OSError, ValueError, RecursionError) as error:
                log.warning("unreadable manifest %s: %s", path, error)
        yield from (entry for _, entry in sorted(found, key=lambda pair: pair[0]))

    def manifests(self) -> Iterator[Any]:
        """Of all entries, here and in the layers around; artifacts are not verified."""
        from . import layers

        yield from (entry.manifest for entry in self.entries())
        if self.layered:
            with contextlib.suppress(AttngenError):  # who wants them explains something else
                yield from layers.manifests()

    def size(self) -> int:
        """Bytes of all files below the root."""
        total = 0
        for path in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += path.lstat().st_size if path.is_file() else 0
        return total

    def clear(self) -> tuple[int, int]:
        """Removes everything but lock files: (kernels removed, bytes freed). Loaded kernels go on working."""
        before, count = self.size(), sum(1 for _ in self.entries())
        folders = [self.base / name for name in ("kernels", "host", "damaged", "building", "hits", "misses", "sets", "tuned", "templates")]
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
        self, key: str, build: Callable[[Path], Mapping[str, Any]], shelf: str = "kernels", title: str = "",
        inputs: Callable[[], Mapping[str, Any]] = dict,
    ) -> tuple[Entry, bool]:  # fmt: skip
        """The entry of `key` and whether it was there (True) or had to be built.

        build(folder) makes the artifact in the empty private `folder` and returns the manifest's own fields: `kind`,
        `artifact` (file name), `sources` (file names) and whatever else describes it, all JSON. It runs once for any
        number of threads and processes that ask at the same time; what it raises reaches the caller unchanged.
        `title` and inputs(), what went into the key, explain a miss.
        Raises CacheError where the folder cannot be written or is full, MissingKernelError where nothing may be built
        (ATTNGEN_JIT=off). A damaged entry is set aside with a CacheWarning and built again.
        """
        hit = self._entries.get((shelf, key))
        if hit is not None and hit.exists():
            return hit, True
        with self._guard:
            thread_lock = self._locks.setdefault(key, threading.Lock())
        with thread_lock:
            hit = self._entries.get((shelf, key))
            if hit is not None and hit.exists():
                return hit, True
            mode, damage = counters.jit_mode(), None
            try:
                entry = self.find(key, shelf)
            except CacheError as error:  # decided under the lock: another process may be mending it now
                log.warning("%s", error)
                entry, damage = None, error
            built = False
            if entry is None:
                if mode == "off":
                    counters.count("refused")
                    raise damage or self._missing(key, shelf, title, inputs)
                log.info("compiling %s %s, which no layer has", title or shelf, key,
                         extra={"facts": {"event": "build", "key": key, "title": title}})  # fmt: skip
                if mode == "warn":
                    what = f"ATTNGEN_JIT=warn: compiling {title or shelf} {key[:12]} while the process runs"
                    log.info("%s", what, extra={"facts": {"event": "jit", "key": key, "title": title}})  # the warning is Python's
                    warnings.warn(JitWarning(what), stacklevel=2)
                start = time.perf_counter()
                try:
                    entry, built = self._build_locked(key, build, shelf)
                except Exception:
                    counters.count("misses")
                    counters.count("failed")
                    raise
                if built:
                    took = time.perf_counter() - start
                    counters.count("misses")
                    counters.count("builds")
                    counters.count("build_ms", 1e3 * took)
                    log.info("built %s %s in %.2f s", title or shelf, key, took,
                             extra={"facts": {"event": "built", "key": key, "title": title, "seconds": took}})  # fmt: skip
            if not built:
                counters.count("hits", layer=entry.layer)
                log.debug("hit %s %s (%s)", shelf, key, entry.layer,
                          extra={"facts": {"event": "hit", "key": key, "title": title, "layer": entry.layer}})  # fmt: skip
            self._entries[shelf, key] = entry.light()
            return entry, not built

    def remember(self, entry: Entry, shelf: str = "kernels") -> None:
        """Serve `entry`, which ``find`` had, from memory: a hit, unless it was one before, or was built here."""
        if (shelf, entry.key) not in self._entries:
            counters.count("hits", layer=entry.layer)
        self._entries[shelf, entry.key] = entry.light()

    def forget(self, entry: Entry, shelf: str = "kernels") -> None:
        """Look it up again when it is next asked for."""
        self._entries.pop((shelf, entry.key), None)

    def adopt(self, entry: Entry, shelf: str = "kernels") -> tuple[Entry, bool]:
        """Publish a copy of an entry of another layer here. Returns it and whether it was there already: a copy that lacks its
        signature makes room. Raises CacheError, also where ``entry`` is damaged."""
        from .pack import files_of

        def copy(folder: Path) -> Mapping[str, Any]:
            for name in files_of(entry):
                (folder / name).write_bytes(entry.file(name))
            return entry.manifest

        def serves(there: Entry) -> bool:
            try:
                check_files(there)  # a source or the log, which no lookup reads
            except CacheError:
                return False
            return "origin" not in there.manifest or trust.signer(entry.manifest) in ("", trust.signer(there.manifest))

        try:
            there = self.lookup(entry.key, shelf)
        except CacheError:
            there = None
        if there is not None and serves(there):
            return there, True
        check_files(entry)
        return self._build_locked(entry.key, copy, shelf, serves)[0], False

    def keep_lock(self, name: str, lock: Mapping[str, Any]) -> None:
        """Keep a set's lock file, for load_set to find by its name."""
        folder = self.base / "sets"
        self.check_private()
        with self._writing(folder):
            self._make(folder)
            with written_whole(folder / f"{name}.lock") as private:
                private.write_text(json_text(lock), encoding="utf-8")
                private.chmod(self._file_mode)

    def _build_locked(
        self, key: str, build: Callable[[Path], Mapping[str, Any]], shelf: str, serves: Callable[[Entry], bool] = lambda there: True
    ) -> tuple[Entry, bool]:
        for attempt in range(_TRIES):
            try:
                return self._build_once(key, build, shelf, serves)
            except CacheError as error:
                # Someone cleared the cache while this process was building in it.
                cause = error.__cause__
                gone = isinstance(cause, OSError) and cause.errno in (errno.ENOENT, errno.ESTALE)
                if not gone or attempt == _TRIES - 1:
                    raise
                log.warning("the cache folder %s was removed during a build: once more", self.base)
        raise AssertionError

    def _build_once(
        self, key: str, build: Callable[[Path], Mapping[str, Any]], shelf: str, serves: Callable[[Entry], bool]
    ) -> tuple[Entry, bool]:
        from .locks import key_lock, private_name

        self.check_private()
        with self._writing(self.base):
            for name in ("locks", "building", "hits", "misses"):
                self._make(self.base / name)
            shard = self.folder(key, shelf).parent
            self._make(shard)
            trust.check_inside(self.root, shard)  # what others can write below it is damage: it is built again
        with contextlib.ExitStack() as held:
            with self._writing(self.base / "locks" / f"{key}.lock"):
                held.enter_context(key_lock(self.base / "locks", key, lambda: self._there(key, shelf)))
            damage = None
            try:
                entry = self.lookup(key, shelf)
            except CacheError as error:
                damage, entry = error, None
            if entry is not None and serves(entry):
                return entry, False
            if damage is not None:
                self._set_aside(key, shelf, damage)
            elif entry is not None:
                with self._writing(entry.folder), contextlib.suppress(FileNotFoundError):
                    old = self.base / "building" / private_name()
                    entry.folder.rename(old)
                    held.callback(shutil.rmtree, old, ignore_errors=True)
            with self._writing(self.base / "building"):
                folder = self.base / "building" / private_name()
                self._make(folder)
            self._collect_abandoned(folder)
            try:
                with self._writing(folder):
                    return self._publish(key, shelf, folder, build(folder)), True
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _folder_mode(self) -> int:
        return 0o755 if self.shared else 0o700

    @property
    def _file_mode(self) -> int:
        return 0o644 if self.shared else 0o600

    def _make(self, folder: Path) -> None:
        """Makes a folder and those above it that are not there, whatever the umask: for its user alone to write. Raises OSError."""
        if folder.is_dir():
            return
        if not folder.parent.is_dir():
            self._make(folder.parent)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not folder.is_dir():  # else another process was faster
                raise
        else:
            if self.shared:
                folder.chmod(0o755)

    def _there(self, key: str, shelf: str) -> bool:
        try:
            return self.lookup(key, shelf) is not None
        except CacheError:
            return False

    def _publish(self, key: str, shelf: str, folder: Path, described: Mapping[str, Any]) -> Entry:
        artifact = described["artifact"]
        content = (folder / artifact).read_bytes()
        others = [name for name in (*described.get("sources", ()), "build.log") if (folder / name).is_file()]
        hashes = {
            "format": FORMAT,
            "key": key,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in others},
        }
        # A copy has its own, which a signature may cover; what was copied was held to them.
        manifest = {**described, **({} if "sha256" in described else hashes), "created": time.time()}
        (folder / "manifest.json").write_text(sealed_text(manifest), encoding="utf-8")
        # What a lookup checks must be on the disk before the name is; sources and log are for people to read.
        for path in folder.iterdir():
            if not path.is_symlink():
                path.chmod(self._folder_mode if path.is_dir() else self._file_mode)
        for path in (folder / artifact, folder / "manifest.json", folder):
            fsync(path)
        final = self.folder(key, shelf)
        self._make(final.parent)
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
        fsync(final.parent)
        return Entry(key, final, manifest)

    def _set_aside(self, key: str, shelf: str, damage: CacheError) -> None:
        counters.count("damaged")
        aside = self.base / "damaged"
        with self._writing(aside):
            self._make(aside)
            target = aside / f"{key}-{os.urandom(4).hex()}"
            try:
                self.folder(key, shelf).rename(target)
            except FileNotFoundError:  # without locks, another process set it aside at this moment
                return
        from .build import keep_newest

        keep_newest(aside, KEPT_DAMAGED)
        warnings.warn(CacheWarning(f"{damage}\n  done: set aside as {target}, built again"), stacklevel=2)

    def _collect_abandoned(self, mine: Path) -> None:
        """Removes private folders of builds that were killed: of this machine's dead processes, or a day older than `mine`,
        which was made just now by the same file system's clock."""
        from .locks import alive, machine, owner_of

        with contextlib.suppress(OSError):
            now = mine.stat().st_mtime
            for folder in (self.base / "building").glob(".build-*-*-*"):
                owner, pid = owner_of(folder.name)
                try:
                    if not alive(int(pid)) if owner == machine() else now - folder.stat().st_mtime > STALE_S:
                        shutil.rmtree(folder, ignore_errors=True)
                except FileNotFoundError:  # its builder published it at this moment
                    continue

    # ---- records -----------------------------------------------------------------------------------------------------

    def write_record(self, shelf: str, name: str, record: Mapping[str, Any]) -> None:
        """Writes a small JSON record under its name, whole or not at all."""
        folder = self.base / shelf
        self.check_private()
        with self._writing(folder):
            self._make(folder)
            with written_whole(folder / f"{name}.json") as private:
                private.write_text(json_text(record), encoding="utf-8")
                private.chmod(self._file_mode)

    # ---- misses ------------------------------------------------------------------------------------------------------

    def _note_miss(self, key: str, title: str, facts: Mapping[str, Any]) -> None:
        """Keeps what a refused key was made of, where that can be written."""
        folder = self.base / "misses"
        with contextlib.suppress(OSError):
            if facts and folder.is_dir():
                record = {"key": key, "variant": title, "inputs": facts}
                with written_whole(folder / f"{key}.json", sync=False) as private:
                    private.write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n")
                if len(os.listdir(folder)) > KEPT_MISSES:
                    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime)[: KEPT_MISSES // 10]:
                        path.unlink(missing_ok=True)

    def _missing(self, key: str, shelf: str, title: str, inputs: Callable[[], Mapping[str, Any]]) -> MissingKernelError:
        if shelf == "host":
            return MissingKernelError(
                f"the host extension is not built, and nothing may be (ATTNGEN_JIT=off, or jit=False).\n  required: attngen._host, or {key} in the cache\n"
                f"  found: neither\n  do: install attngen from a wheel, or run `attngen doctor` once with ATTNGEN_JIT=on"
            )
        from . import explain, layers

        facts = inputs()
        self._note_miss(key, title, facts)
        near = explain.nearest(facts, self.manifests()) if facts else None
        hint = ""
        if near is not None:
            hint = f"\n  nearest: {near.title} {near.key[:12]} differs in " + "; ".join(map(str, near.differences[:4]))
        return MissingKernelError(
            f"{title or 'a kernel'} is not there, and ATTNGEN_JIT=off.\n  required: key {key}\n"
            f"  found: nothing under it in {self.root} or another layer{layers.passed_over()}{hint}\n"
            f"  do: build it with `attngen precompile SET.toml`, import a pack that has it, or set ATTNGEN_JIT=on"
        )

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


def _unusable(root: Path, tried: str, error: OSError) -> CacheError:
    full = error.errno in _FULL
    remedy = "free some space, run `attngen cache prune` or `attngen cache clear`" if full else "make it yours to read and write"
    return CacheError(
        f"the cache folder {root} {'is full' if full else 'cannot be used'}.\n"
        f"  required: a folder with room for compiled kernels, readable and writable\n"
        f"  found: {tried}: {error.strerror or error}\n"
        f"  do: {remedy}, or set ATTNGEN_CACHE_DIR to another folder"
    )
