"""Where else kernels may be: read-only layers around the user's own cache, asked in this order.

    system       $ATTNGEN_SYSTEM_CACHE: cache folders or packs, joined by ":"; read only
    cache        the user's own (cache.py)
    pack:NAME    packs that load_set opened
    wheel:NAME   installed wheels of kernels, found through the entry point group "attngen.packs"
    remote       $ATTNGEN_REMOTE_CACHE: a URL for fsspec; what it has is copied into the user's cache, unless ATTNGEN_JIT=off

The last two are asked only when all before them have nothing: looking for wheels costs milliseconds, a network more.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import trust
from .entry import FORMAT, Entry, check_content, entry_folder, parse_manifest, read_entry, sealed_text
from .errors import CacheError, ParameterError
from .pack import MAX_FILE, MemoryEntry, Pack, bare_manifest, files_of

GROUP = "attngen.packs"
log = logging.getLogger("attngen.cache")


class FolderLayer:
    """A cache folder that is only read."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root

    def check_private(self) -> None:
        """Raises CacheError where others can write it. A wheel lies where Python's packages do, and is trusted as they are."""
        if not self.name.startswith("wheel:"):
            trust.check_private(self.root)

    def lookup(self, key: str, shelf: str) -> Entry | None:
        self.check_private()
        return read_entry(self.root / entry_folder(key, shelf), key, self.name)

    def keys(self) -> list[str]:
        return sorted(path.parent.name for path in (self.root / f"v{FORMAT}" / "kernels").glob("*/*/manifest.json"))

    def manifests(self) -> Iterator[Any]:
        """What its entries say of themselves, unchecked: for people."""
        for path in (self.root / f"v{FORMAT}" / "kernels").glob("*/*/manifest.json"):
            with suppress(OSError, ValueError):
                yield json.loads(path.read_bytes())

    def sets(self) -> list[str]:
        """The names of the sets whose lock files it has."""
        return sorted(path.stem for path in (self.root / f"v{FORMAT}" / "sets").glob("*.lock"))

    def lock(self, name: str) -> Any:
        """A set's lock file. Raises CacheError."""
        self.check_private()
        path = self.root / f"v{FORMAT}" / "sets" / f"{name}.lock"
        try:
            lock = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"the lock file {path} cannot be read: {error}\n  do: import its pack again") from None
        trust.check_signed(lock, f"the lock file {path}")
        return lock


class PackLayer:
    """A pack that is read where it lies."""

    def __init__(self, name: str, pack: Pack) -> None:
        self.name, self.pack = name, pack

    def lookup(self, key: str, shelf: str) -> Entry | None:
        return self.pack.lookup(key, self.name) if shelf == "kernels" else None

    def keys(self) -> list[str]:
        return self.pack.keys

    def manifests(self) -> Iterator[Any]:
        return self.pack.manifests()

    def sets(self) -> list[str]:
        return [self.pack.name] if self.pack.lock else []

    def lock(self, name: str) -> Any:
        return self.pack.lock


class RemoteLayer:
    """A store behind a URL, through fsspec: laid out as a cache folder is."""

    name = "remote"

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self.fs, self.root = url_to_fs(self.url)
        except ImportError as error:
            raise ParameterError(
                f"ATTNGEN_REMOTE_CACHE={url} needs {error.name or 'a driver'}.\n  required: fsspec, and its driver for the URL\n"
                f"  found: {error}\n  do: pip install 'attngen[remote]' (s3fs for s3://, gcsfs for gs://, aiohttp for http://)"
            ) from None
        except ValueError as error:
            raise ParameterError(f"ATTNGEN_REMOTE_CACHE={url}: required a URL that fsspec knows; found: {error}") from None

    def folder(self, key: str) -> str:
        return f"{self.root}/{entry_folder(key)}"

    def lookup(self, key: str, shelf: str) -> MemoryEntry | None:
        """The entry of ``key``, all its files in memory. Raises CacheError where it is damaged, OSError."""
        if shelf != "kernels":
            return None
        folder, where = self.folder(key), Path(self.folder(key))
        try:
            text = self._fetch(f"{folder}/manifest.json")
        except FileNotFoundError:
            return None
        manifest = parse_manifest(text, where, key)
        trust.check_signed(manifest, f"the kernel in {self.url}/.../{key[:12]}")
        manifest["origin"] = {"remote": self.url}
        held = {manifest["artifact"]: self._fetch(f"{folder}/{manifest['artifact']}")}
        check_content(where, manifest, held[manifest["artifact"]])
        for name in manifest.get("files", manifest.get("sources", ())):
            held[name] = self._fetch(f"{folder}/{name}")
        return MemoryEntry(key, where, manifest, self.name, get=held.__getitem__)

    def _fetch(self, path: str) -> bytes:
        content: bytes = self.fs.cat_file(path, end=MAX_FILE + 1)  # whatever the store would send
        if len(content) > MAX_FILE:
            raise CacheError(f"{path} in {self.url}: required at most {MAX_FILE} bytes, found more")
        return content

    def store(self, entry: Entry, sign: Path | None = None) -> bool:
        """Upload an entry unless it is there; its manifest last, so that who sees it finds the rest."""
        folder = self.folder(entry.key)
        if self.fs.exists(f"{folder}/manifest.json"):
            return False
        self.fs.makedirs(folder, exist_ok=True)
        for name in files_of(entry):
            self.fs.pipe_file(f"{folder}/{name}", entry.file(name))
        self.fs.pipe_file(f"{folder}/manifest.json", sealed_text(bare_manifest(entry, sign)).encode())
        return True


Layer = FolderLayer | PackLayer | RemoteLayer
_attached: list[PackLayer] = []


def attach(pack: Pack) -> PackLayer:
    """Serve this process from a pack; from now on its kernels are found."""
    pack.check_private()
    for layer in _attached:
        if layer.pack.digest == pack.digest:
            return layer
    _attached.append(PackLayer(f"pack:{pack.name}", pack))
    return _attached[-1]


def before() -> tuple[FolderLayer | PackLayer, ...]:
    """The layers that are asked before the user's cache."""
    setting = os.environ.get("ATTNGEN_SYSTEM_CACHE")
    return _system(setting) if setting else ()


def after() -> Iterator[Layer]:
    """The layers that are asked after it. Each is made when its turn comes."""
    yield from _attached
    yield from installed()
    url = os.environ.get("ATTNGEN_REMOTE_CACHE")
    if url:
        yield _remote(url)


@functools.lru_cache(maxsize=8)
def _system(setting: str) -> tuple[FolderLayer | PackLayer, ...]:
    found: list[FolderLayer | PackLayer] = []
    for part in filter(None, setting.split(os.pathsep)):
        path = Path(part).expanduser()
        if path.suffix == ".attnpack":
            pack = Pack(path)
            pack.check_private()
            found.append(PackLayer("system", pack))
        else:
            found.append(FolderLayer("system", path))
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _remote(url: str) -> RemoteLayer:
    return RemoteLayer(url)


@functools.lru_cache(maxsize=1)
def installed() -> tuple[FolderLayer, ...]:
    """Installed wheels of kernels. Their packages are found, not imported: nothing of them is executed."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    start, found = time.perf_counter(), []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        spec = find_spec(point.value.partition(":")[0])
        if spec is None or not spec.submodule_search_locations:
            log.warning("the wheel of kernels %s names %s, which is no package here", point.name, point.value)
            continue
        found.append(FolderLayer(f"wheel:{point.name}", Path(next(iter(spec.submodule_search_locations)))))
    log.debug("%d wheels of kernels, found in %.1f ms", len(found), 1e3 * (time.perf_counter() - start))
    return tuple(found)


def manifests() -> Iterator[Any]:
    """Of everything that the layers on this machine have, the user's cache aside."""
    for layer in (*before(), *_attached, *installed()):
        yield from (m for m in layer.manifests() if isinstance(m, dict) and "key" in m)


def look(layer: Layer, key: str, shelf: str) -> Entry | None:
    """``layer.lookup``, where a layer that is damaged, unsigned or out of reach has nothing."""
    try:
        return layer.lookup(key, shelf)
    except CacheError as error:
        log.warning("%s: passed over: %s", layer.name, error)
    except OSError as error:
        log.warning("%s is out of reach: %s", layer.name, error)
    return None
