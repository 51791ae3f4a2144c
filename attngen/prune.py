"""Upkeep of a cache folder: what is in it, whether it is whole, what may go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import Cache
from .entry import Entry, check_files, read_entry
from .errors import CacheError
from .locks import private_name

SHELVES = ("kernels", "host")


@dataclass(frozen=True)
class Usage:
    """An entry and how it was used: bytes of its folder, processes that found it here, the time of the last."""

    entry: Entry
    bytes: int
    hits: int
    used: float

    @property
    def origin(self) -> str:
        """Where it came from: built here, or copied from a pack, a remote store or another layer."""
        origin: dict[str, Any] = self.entry.manifest.get("origin") or {}
        if "pack" in origin:
            return f"pack {origin['pack']} {str(origin.get('sha256', ''))[:12]}"
        if "remote" in origin:
            return f"remote {origin['remote']}"
        return str(origin.get("layer", "built here"))


def usage(store: Cache) -> list[Usage]:
    """Every kernel of the cache, the least recently used first."""
    found = []
    for entry in store.entries():
        hits, used = 0, float(entry.manifest.get("created", 0.0))
        with suppress(OSError):
            stat = (store.base / "hits" / entry.key).stat()
            hits, used = stat.st_size, max(used, stat.st_mtime)
        found.append(Usage(entry, _bytes(entry.folder), hits, used))
    return sorted(found, key=lambda u: u.used)


def verify(store: Cache) -> Iterator[tuple[str, Path, CacheError | None]]:
    """(key, folder, what is wrong) of every entry: all its files hashed anew."""
    store.check_private()
    for shelf in SHELVES:
        for folder in sorted((store.base / shelf).glob("*/*")):
            if folder.is_dir():
                yield folder.name, folder, _wrong(folder)


def _wrong(folder: Path) -> CacheError | None:
    try:
        entry = read_entry(folder, folder.name)
        if entry is not None:
            check_files(entry)
    except CacheError as error:
        return error
    except OSError as error:
        return CacheError(f"{folder} cannot be read: {error}")
    return None


@dataclass(frozen=True)
class Pruned:
    """What a prune removed, or would remove, and what it left because a process has it loaded."""

    removed: list[Usage]
    in_use: list[Usage]

    @property
    def bytes(self) -> int:
        return sum(u.bytes for u in self.removed)


def prune(store: Cache, max_bytes: int | None = None, max_age_s: float | None = None, dry_run: bool = False) -> Pruned:
    """Remove the kernels that were not used for ``max_age_s``, and the least recently used ones past ``max_bytes`` in all.

    What a process of this machine has loaded stays (as far as /proc shows its maps to this user); elsewhere a loaded kernel
    outlives its file. An entry goes whole, by one rename. Ages in the future, after a clock was set back, count as 0.
    """
    store.check_private()
    known, now = usage(store), time.time()
    total, doomed = sum(u.bytes for u in known), []
    for item in known:
        old = max_age_s is not None and now - item.used > max_age_s
        if old or (max_bytes is not None and total > max_bytes):
            doomed.append(item)
            total -= item.bytes
    mapped = _mapped()
    busy = {u.entry.key for u in doomed if _is_mapped(u.entry.artifact, mapped)}
    loaded = [u for u in doomed if u.entry.key in busy]
    doomed = [u for u in doomed if u.entry.key not in busy]
    if dry_run or not doomed:
        return Pruned(doomed, loaded)
    aside: list[tuple[Usage, Path]] = []
    (store.base / "building").mkdir(mode=0o700, exist_ok=True)
    for item in doomed:
        target = store.base / "building" / private_name()
        with suppress(FileNotFoundError):  # another prune was here
            item.entry.folder.rename(target)
            aside.append((item, target))
    # Who opened one between the look and the rename has it mapped by now.
    mapped, removed = _mapped(), []
    for item, target in aside:
        if _is_mapped(target / item.entry.artifact.name, mapped):
            with suppress(OSError):
                target.rename(item.entry.folder)
                loaded.append(item)
                continue
        shutil.rmtree(target, ignore_errors=True)
        with suppress(OSError):
            (store.base / "hits" / item.entry.key).unlink()
        store.forget(item.entry)
        removed.append(item)
    return Pruned(removed, loaded)


def in_use(store: Cache) -> set[str]:
    """Keys of this cache that some process of this machine has mapped."""
    mapped = _mapped()
    return {entry.key for entry in store.entries() if _is_mapped(entry.artifact, mapped)}


def _is_mapped(file: Path, mapped: set[tuple[int, str]]) -> bool:
    with suppress(OSError):
        return (file.stat().st_ino, file.name) in mapped
    return False


def _mapped() -> set[tuple[int, str]]:
    """(inode, name) of the files that processes have mapped. Not their paths, which are others in a container that mounts the
    cache elsewhere, nor their devices, of which file systems of several volumes name another here than stat does."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                fields = line.split(None, 5)
                if len(fields) == 6 and "/" in fields[5]:
                    found.add((int(fields[4]), fields[5].rpartition("/")[2]))
    return found


def _bytes(folder: Path) -> int:
    total = 0
    with suppress(OSError):  # another prune takes it away
        for path in folder.iterdir():
            with suppress(OSError):
                total += path.stat().st_size
    return total
