"""Where else kernels may be: read-only layers around the user's own cache, asked in this order.

    system       $ATTNGEN_SYSTEM_CACHE: cache folders or packs, joined by ":"; read only
    cache        the user's own (cache.py)
    pack:NAME    packs that load_set opened
    wheel:NAME   installed wheels of kernels, found through the entry point group "attngen.packs"
    remote       $ATTNGEN_REMOTE_CACHE: a URL for fsspec; what it has is copied into the user's cache, unless ATTNGEN_JIT=off

The last two are asked only when all before them have nothing: looking for wheels costs milliseconds, a network more. A layer
that is damaged or out of reach has nothing, and says so: in the log, and in ``troubles``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from . import trust
from .entry import FORMAT, Entry, check_content, check_files, check_manifest, damaged, entry_folder, parse_manifest, read_entry, sealed_text
from .errors import AttngenError, CacheError, ParameterError
from .pack import MAX_FILE, MemoryEntry, Pack, bare_manifest, files_of

GROUP = "attngen.packs"
MAX_MANIFEST = 4 << 20
TIMEOUT_S = 30.0  # of one question to a remote store
SLOW_S, QUIET_S = 5.0, 60.0
Result = TypeVar("Result")
log = logging.getLogger("attngen.cache")


class FolderLayer:
    """A cache folder that is only read."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self._private = False  # whether it was checked: then only we can change that

    def check_private(self) -> None:
        """Raises CacheError where others can write it. A wheel lies where Python's packages do, and is trusted as they are."""
        if not self._private and not self.name.startswith("wheel:"):
            trust.check_private(self.root)
            self._private = os.path.exists(self.root)

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
        """The names of the sets whose lock files it has; none where it is out of reach."""
        try:
            return sorted(name[:-5] for name in os.listdir(self.root / f"v{FORMAT}" / "sets") if name.endswith(".lock"))
        except FileNotFoundError:
            return []
        except OSError as error:
            _pass_over(self.name, error)
            return []

    def lock(self, name: str) -> Any:
        """A set's lock file. Raises CacheError."""
        self.check_private()
        path = self.root / f"v{FORMAT}" / "sets" / f"{name}.lock"
        if not self.name.startswith("wheel:"):
            trust.check_inside(self.root, path.parent, path.name)
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
            self._quiet_until = 0.0
            # Else fsspec asks an HTTP server for the size first, and takes any failure for a file that is not there.
            self._stream = {"block_size": 0, "size": 1} if "http" in self.fs.protocol else {}
        except ImportError as error:
            raise ParameterError(
                f"the remote store {url} needs {error.name or 'a driver'}.\n  required: fsspec, and its driver for the URL\n"
                f"  found: {error}\n  do: pip install 'attngen[remote]' (s3fs for s3://, gcsfs for gs://, aiohttp for http://)"
            ) from None
        except ValueError as error:
            raise ParameterError(f"the remote store {url}: required a URL that fsspec knows; found: {error}") from None
        except Exception as error:  # whatever a driver raises that asks its network at once
            raise CacheError(f"the remote store {url}: its driver does not start: {type(error).__name__}: {error}") from error

    def folder(self, key: str) -> str:
        return f"{self.root}/{entry_folder(key)}"

    def lookup(self, key: str, shelf: str) -> MemoryEntry | None:
        """The entry of ``key``, all its files in memory. Raises CacheError where it is damaged, OSError where the store does not
        answer: one that was slow to fail is ``quiet`` for a while, for else every kernel of a set would wait for it."""
        if shelf != "kernels":
            return None
        start = time.monotonic()
        try:
            return self._entry(key)
        except OSError as error:
            if not isinstance(error, CacheError) and time.monotonic() - start > SLOW_S:
                log.warning("remote: not asked again for %.0f s", QUIET_S)
                self._quiet_until = time.monotonic() + QUIET_S
            raise

    @property
    def quiet(self) -> bool:
        """Whether it is not to be asked now."""
        return time.monotonic() < self._quiet_until

    def _entry(self, key: str) -> MemoryEntry | None:
        folder, where = self.folder(key), Path(self.folder(key))
        try:
            text = self._fetch(f"{folder}/manifest.json", MAX_MANIFEST)
        except FileNotFoundError:
            return None
        manifest = parse_manifest(text, where, key)
        trust.check_signed(manifest, f"the kernel in {self.url}/.../{key[:12]}")
        manifest["origin"] = {"remote": self.url}
        held: dict[str, bytes] = {}
        entry = MemoryEntry(key, where, manifest, self.name, get=held.__getitem__)
        for name in files_of(entry):  # the artifact, and the rest of what is signed
            try:
                held[name] = self._fetch(f"{folder}/{name}", MAX_FILE)
            except FileNotFoundError as error:
                raise damaged(where, f"a readable {name}", str(error)) from None
        check_content(where, manifest, held[manifest["artifact"]])
        check_files(entry)
        return entry

    def _fetch(self, path: str, limit: int) -> bytes:
        """A file of at most ``limit`` bytes. Raises CacheError, OSError."""

        def read() -> bytes:
            content = bytearray()
            with self.fs.open(path, "rb", **self._stream) as file:  # not cat_file: without ranges a server sends all it likes
                while piece := file.read(min(1 << 20, limit + 1 - len(content))):
                    content += piece
            if len(content) > limit:
                raise CacheError(f"{path} in {self.url}: required at most {limit} bytes, found more")
            return bytes(content)

        return self._ask(read)

    def _ask(self, work: Callable[[], Result]) -> Result:
        """work(), for as long as TIMEOUT_S. Raises OSError, whatever the driver raised."""
        answer: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((work(), None))
            except Exception as error:
                answer.put((None, error))

        # A driver that hangs cannot be stopped, only left behind: the end of the process does not wait for a daemon.
        threading.Thread(target=run, daemon=True, name="attngen-remote").start()
        try:
            found, error = answer.get(timeout=TIMEOUT_S)
        except queue.Empty:
            raise TimeoutError(f"no answer from {self.url} within {TIMEOUT_S:.0f} s") from None
        if isinstance(error, OSError | AttngenError):
            raise error
        if error is not None:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error
        return cast(Result, found)

    def answers(self) -> bool:
        """Whether there is anything. Raises OSError."""
        return self._ask(lambda: bool(self.fs.exists(self.root)))

    def store(self, entry: Entry, sign: Path | None = None) -> bool:
        """Upload an entry unless it is there whole and signed as asked; its manifest last, so that who sees it finds the rest.

        Raises CacheError for a damaged entry, and where the store does not take it.
        """
        check_files(entry)
        wanted, folder = bare_manifest(entry, sign), self.folder(entry.key)
        try:
            there = self._entry(entry.key)
        except CacheError as error:
            log.warning("remote: sent again: %s", error)
            there = None
        except OSError as error:
            raise self._refused(error) from error
        if there is not None and (trust.signer(wanted) in ("", trust.signer(there.manifest))):
            return False
        files = {name: entry.file(name) for name in files_of(entry)}

        def send() -> None:
            self.fs.makedirs(folder, exist_ok=True)
            for name, content in files.items():
                self.fs.pipe_file(f"{folder}/{name}", content)
            self.fs.pipe_file(f"{folder}/manifest.json", sealed_text(wanted).encode())

        try:
            self._ask(send)
        except OSError as error:
            raise self._refused(error) from error
        return True

    def _refused(self, error: OSError) -> CacheError:
        return CacheError(
            f"the store {self.url} does not take the kernels.\n  required: a store that can be read and written\n"
            f"  found: {error}\n  do: mend the URL, the credentials or the network; HTTP stores are only read"
        )


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
        try:
            remote = _remote(url, os.getpid())
        except CacheError as error:
            return _pass_over("remote", error)
        yield remote


@functools.lru_cache(maxsize=8)
def _system(setting: str) -> tuple[FolderLayer | PackLayer, ...]:
    """Read once a process: a layer that is mended is seen by the next one."""
    found: list[FolderLayer | PackLayer] = []
    for part in filter(None, setting.split(os.pathsep)):
        path = Path(part).expanduser()
        try:
            if path.suffix == ".attnpack":
                pack = Pack(path)
                pack.check_private()
                found.append(PackLayer("system", pack))
            elif os.stat(path):
                found.append(FolderLayer("system", path))
        except OSError as error:
            _pass_over(f"system {path}", error)
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _remote(url: str, process: int) -> RemoteLayer:
    """``process``: drivers keep threads, which a forked child has not."""
    return RemoteLayer(url)


@functools.lru_cache(maxsize=1)
def installed() -> tuple[FolderLayer, ...]:
    """Installed wheels of kernels. Their packages are found, not imported: nothing of them is executed."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    start, found = time.perf_counter(), []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        name = point.value.partition(":")[0].strip()
        try:  # a name with dots would import the packages before them
            spec = find_spec(name) if name.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            _pass_over(f"wheel:{point.name}", CacheError(f"its entry point names {point.value}, which is no top-level package here"))
            continue
        found.append(FolderLayer(f"wheel:{point.name}", Path(next(iter(spec.submodule_search_locations)))))
    log.debug("%d wheels of kernels, found in %.1f ms", len(found), 1e3 * (time.perf_counter() - start))
    return tuple(found)


def manifests() -> Iterator[Any]:
    """Of everything that the layers on this machine have, the user's cache aside."""
    for layer in (*before(), *_attached, *installed()):
        for manifest in layer.manifests():
            with suppress(CacheError):
                yield check_manifest(manifest, Path(layer.name), manifest.get("key") if isinstance(manifest, dict) else "")


_troubles: dict[str, str] = {}


def troubles() -> dict[str, str]:
    """The layers that were last passed over, and why."""
    return dict(_troubles)


def passed_over() -> str:
    """``troubles`` as the end of a line that says what was not found."""
    return "".join(f"; {name} passed over: {why}" for name, why in _troubles.items())


def _pass_over(name: str, error: OSError) -> None:
    log.warning("%s: passed over: %s", name, error)
    _troubles[name] = str(error).splitlines()[0] if isinstance(error, CacheError) else f"out of reach: {error}"


def look(layer: Layer, key: str, shelf: str) -> Entry | None:
    """``layer.lookup``, where a layer that is damaged, unsigned or out of reach has nothing."""
    if isinstance(layer, RemoteLayer) and layer.quiet:
        return None
    try:
        found = layer.lookup(key, shelf)
    except OSError as error:
        _pass_over(layer.name, error)
        return None
    _troubles.pop(layer.name, None)
    return found
