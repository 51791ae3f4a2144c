"""An entry of a cache: an artifact, its sources and a manifest, checked before anything is made of them.

    manifest.json: format, key, kind, abi, artifact, size, sha256, files {name: sha256}, what describes the kernel and how it
                   is launched, and a seal over all of it
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

from . import trust
from .errors import CacheError
from .records import record

FORMAT = 1  # of the folder layout and of manifest.json; part of every path as v1/
KEY = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
CACHE = "cache"  # the layer that this user's builds go to


@record
class Entry:
    """A published artifact. `manifest` says what it is, how it was built and what it needs; `layer`, where it was found;
    `held`, of a cubin just found, is its content as it was checked: what is loaded is read and hashed once."""

    key: str
    folder: Path
    manifest: Mapping[str, Any]
    layer: str = CACHE
    held: bytes | None = field(default=None, compare=False, repr=False)
    on_disk: ClassVar[bool] = True

    @property
    def artifact(self) -> Path:
        return self.folder / str(self.manifest["artifact"])

    @property
    def size(self) -> int:
        """Bytes of the artifact."""
        return int(self.manifest["size"])

    @contextmanager
    def opened(self) -> Iterator[str]:
        """A name under which a loader finds the artifact, until the context ends."""
        yield os.fspath(self.artifact)

    def exists(self) -> bool:
        """Whether its artifact is still there."""
        return self.artifact.exists()

    def file(self, name: str) -> bytes:
        """One of its files."""
        return (self.folder / name).read_bytes()

    def read(self) -> bytes:
        """The artifact, of the size and sha256 that the manifest says. Raises CacheError."""
        try:
            content = self.file(self.manifest["artifact"])
        except OSError as error:
            raise damaged(self.folder, f"a readable {self.artifact.name}", str(error)) from None
        check_content(self.folder, self.manifest, content)
        return content

    def content(self) -> bytes:
        """The artifact as it was checked when it was found; read and checked now, where it is not held."""
        return self.read() if self.held is None else self.held

    def light(self) -> Entry:
        """Itself without what it holds, to be kept."""
        return self if self.held is None else replace(self, held=None)

    def sources(self) -> dict[str, str]:
        """The rendered source files, as they were compiled."""
        return {name: self.file(name).decode() for name in self.manifest.get("sources", ())}


def read_entry(folder: Path, key: str, layer: str = CACHE) -> Entry | None:
    """The entry of ``key`` in ``folder`` after a check of its format, size and sha256; None where there is no folder.

    Raises CacheError where it is damaged, of another format, others' to write, or unsigned though signatures are required;
    OSError where the folder cannot be read.
    """
    before = None
    while True:
        text = _manifest_text(folder)
        if text is None:
            return None
        try:
            return _checked(text, folder, key, layer)
        except CacheError:
            if text == before:
                raise
            before = text  # an entry that is removed or replaced as it is read is not damaged: once more


def _manifest_text(folder: Path) -> bytes | None:
    for _ in range(2):  # entries appear whole, and this one may have come between the two looks
        with suppress(FileNotFoundError):
            return (folder / "manifest.json").read_bytes()
        if not folder.is_dir():
            return None
    raise damaged(folder, "a manifest.json", "none")


def _checked(text: bytes, folder: Path, key: str, layer: str) -> Entry:
    manifest = parse_manifest(text, folder, key)
    entry = Entry(key, folder, manifest, layer)
    if not layer.startswith("wheel:"):  # which lies where Python's packages do, and is trusted as they are
        trust.check_inside(folder.parents[3], folder, "manifest.json", manifest["artifact"])
    content = entry.read()
    if layer != CACHE or "origin" in manifest:  # what was built here needs no signature
        trust.check_signed(manifest, f"the kernel in {folder}")
    return replace(entry, held=content) if manifest.get("kind") == "cubin" else entry


def parse_manifest(text: bytes, place: Path, key: str) -> dict[str, Any]:
    """A manifest, as ``sealed_text`` wrote it, with the fields that every check relies on. Raises CacheError."""
    try:
        manifest = check_manifest(json.loads(text), place, key)
    except (ValueError, RecursionError) as error:
        raise _no_manifest(place, error) from None
    seal = manifest.pop("seal", None)  # the last release's have none
    if seal is not None and seal != hashlib.sha256(text.replace(_seal(str(seal)).encode(), _seal(_UNSEALED).encode())).hexdigest():
        raise damaged(place, f"a manifest.json with the seal {str(seal)[:64]}", "other content")
    return manifest


# What people and later steps read of a manifest, where it is there; None is no value but where it stands here.
_TYPES = {
    name: types
    for types, names in (
        (str, "artifact sha256 kind abi isa name variant compiler config symbol spec_hash python"),
        (int, "format size params_size"),
        ((int, float), "created seconds cpu_seconds"),
        (list, "sources flags params"),
        (dict, "files inputs origin signature"),
        ((dict, type(None)), "problem choice"),
    )
    for name in names.split()
}
_PARAM = (str, str, int)


def check_manifest(manifest: Any, place: Path, key: str) -> dict[str, Any]:
    """``manifest``, if it is one of this format and of ``key``, each field of its type. Raises CacheError."""
    try:
        found = (manifest["format"], manifest["key"])
        for name, value in manifest.items():
            if name in _TYPES and not isinstance(value, _TYPES[name]):
                raise ValueError(f"{name} is {value!r:.80}")
        hashes, params = manifest.get("files", {}), manifest.get("params", [])
        files = [manifest["artifact"], *manifest.get("sources", ()), *hashes]
        if not all(isinstance(name, str) and FILE_NAME.fullmatch(name) for name in files):
            raise ValueError("a name that is no plain file name")
        if not all(isinstance(x, str) for x in (manifest["sha256"], *hashes.values(), *manifest.get("flags", ()))):
            raise ValueError("a hash or a flag that is no text")
        if {tuple(map(type, param)) for param in params} - {_PARAM}:
            raise ValueError("params that are not [type, name, offset]")
        if not isinstance((manifest.get("choice") or {}).get("fields", {}), dict) or manifest["size"] < 0:
            raise ValueError("a choice without fields, or a negative size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(place, error) from None
    if found != (FORMAT, key):
        raise damaged(place, f"format {FORMAT}, key {key}", f"format {found[0]}, key {found[1]}")
    checked: dict[str, Any] = manifest
    return checked


def _no_manifest(place: Path, error: Exception) -> CacheError:
    return damaged(place, "a manifest.json with format, key, artifact, size and sha256", repr(error))


def check_content(place: Path, manifest: Mapping[str, Any], content: bytes) -> None:
    """Raises CacheError unless ``content`` is the artifact that the manifest speaks of."""
    name, size, digest = manifest["artifact"], manifest["size"], manifest["sha256"]
    if len(content) != size:
        raise damaged(place, f"{name} of {size} bytes", f"{len(content)} bytes")
    if hashlib.sha256(content).hexdigest() != digest:
        raise damaged(place, f"{name} with sha256 {digest}", hashlib.sha256(content).hexdigest())


def check_files(entry: Entry) -> None:
    """Re-hash every file of an entry. Raises CacheError."""
    entry.read()
    for name, digest in entry.manifest.get("files", {}).items():
        try:
            found = hashlib.sha256(entry.file(name)).hexdigest()
        except OSError as error:
            raise damaged(entry.folder, f"a readable {name}", str(error)) from None
        if found != digest:
            raise damaged(entry.folder, f"{name} with sha256 {digest}", found)


def entry_folder(key: str, shelf: str = "kernels") -> str:
    """Where an entry lies below a cache's root: in folders, remote stores and wheels alike."""
    return f"v{FORMAT}/{shelf}/{key[:2]}/{key}"


def json_text(record: Mapping[str, Any]) -> str:
    """A record as its file holds it: equal records make equal bytes."""
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


_UNSEALED = "0" * 64


def _seal(digest: str) -> str:
    return f'"seal": "{digest}"'


def sealed_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as its file holds it, with a digest of that text: a flipped bit would launch the right code in a wrong way."""
    text = json_text({**manifest, "seal": _UNSEALED})
    return text.replace(_seal(_UNSEALED), _seal(hashlib.sha256(text.encode()).hexdigest()))


@contextmanager
def written_whole(path: Path, sync: bool = True) -> Iterator[Path]:
    """A private path beside ``path`` to write to: at the end it takes the place of ``path``, or on an error it goes. ``sync``: its
    content is on the disk before its name is. Raises OSError."""
    # Random: a pid is 1 in every container.
    private = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    os.close(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield private
        if sync:
            fsync(private)
        private.replace(path)
    finally:
        private.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """What was written to a file or folder is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(place: Path, required: str, found: str) -> CacheError:
    return CacheError(
        f"a damaged cache entry.\n  required: {required}\n  found: {found} in {place}\n"
        f"  do: nothing where it can be built again; else copy the entry anew, or run `attngen cache clear`"
    )


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


def sources_digest(*roots: Path) -> str:
    """A digest of the content of files and folders: of names relative to each root and bytes, never of mtimes."""
    total = hashlib.sha256()
    for name, digest in source_files(*roots):
        total.update(f"{name}\0".encode() + bytes.fromhex(digest))
    return total.hexdigest()


def source_files(*roots: Path) -> list[tuple[str, str]]:
    """(name relative to its root, sha256) of every file of files and folders."""
    found = []
    for root in roots:
        files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
        for path in sorted(files):
            if "__pycache__" not in path.parts:
                name = path.name if path == root else path.relative_to(root).as_posix()
                found.append((name, hashlib.sha256(path.read_bytes()).hexdigest()))
    return found


@functools.cache
def short_digests(*roots: Path) -> dict[str, str]:
    """What explains a changed digest: the head of each file's sha256."""
    return {name: digest[:12] for name, digest in source_files(*roots)}
