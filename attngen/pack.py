"""Packs: kernels in one file, `NAME.attnpack`.

    attnpack.json            {format, name, entries {key: {manifest, files {name: [sha256, bytes]}}}, lock}
    blobs/<sha256>           every file of every entry once, in order of its hash

A zip archive without compression, times or attributes, so that equal kernels make equal bytes. Everything in it is
named by its hash and checked when it is read; the sha256 of attnpack.json stands for the whole. Nothing of the archive
names a path: files are written under names that are checked here. No member is compressed, so none can swell; what the
directory, the index and files named by many entries can swell to is bounded before they are parsed or copied.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

from . import trust
from .entry import FILE_NAME, KEY, Entry, check_files, check_manifest, written_whole
from .errors import CacheError, ParameterError
from .records import record

PACK_FORMAT = "attnpack-1"
INDEX = "attnpack.json"
MAX_FILE = 64 << 20  # bytes of one file; kernels take some 100 kB
MAX_TOTAL = 16 << 30  # bytes that an import may write,
MAX_SHARED = 8  # and times the pack's size, past 64 MiB: files that many entries share are in it once (found: 1.1)
MAX_INDEX = 64 << 20  # a kernel takes 7 kB of it
MAX_VALUES = 4 << 20  # of its JSON, by its punctuation: as much as 400 MB where they are small; a kernel takes 500
MAX_DIRECTORY = 8 << 20  # of the archive: a member takes 117 bytes of it
SET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_BLOB = re.compile(r"blobs/[0-9a-f]{64}")
_spellings = itertools.count()


@record
class MemoryEntry(Entry):
    """An entry that lies in no folder: in a pack, or fetched from a remote store. `get` reads one of its files, checked."""

    get: Callable[[str], bytes] = field(default=lambda name: b"", compare=False, repr=False)
    on_disk: ClassVar[bool] = False

    @contextmanager
    def opened(self) -> Iterator[str]:
        # A library is opened by name, and the loader takes equal names for equal libraries: a descriptor that serves again must
        # not be spelled as before. None stays open, or a thousand kernels would need a thousand.
        number, descriptor = next(_spellings), os.memfd_create(f"attngen-{self.key[:12]}")
        with os.fdopen(descriptor, "wb") as out:
            out.write(self.read())
            out.flush()
            yield f"/proc/self/fd{'/' * (1 + number % 1000)}.{'/' * (1 + number // 1000)}{descriptor}"

    def exists(self) -> bool:
        return True

    def file(self, name: str) -> bytes:
        return self.get(name)

    def read(self) -> bytes:
        return self.get(self.manifest["artifact"])


# ---- writing ---------------------------------------------------------------------------------------------------------


def files_of(entry: Entry) -> list[str]:
    """The files that travel with an entry: the artifact, its sources, the compiler's output."""
    return sorted({entry.manifest["artifact"], *entry.manifest.get("files", entry.manifest.get("sources", ()))})


def bare_manifest(entry: Entry, sign: Path | None = None) -> dict[str, Any]:
    """An entry's manifest without the facts of one copy, signed if ``sign`` names a key."""
    manifest = {n: v for n, v in entry.manifest.items() if n not in trust.OF_THE_COPY or (n == "signature" and sign is None)}
    return trust.sign(manifest, sign) if sign else manifest


def write_pack(
    path: Path, name: str, entries: Iterable[Entry], lock: Mapping[str, Any] | None = None, sign: Path | None = None
) -> str:
    """Write ``entries`` and a set's ``lock`` to ``path``, whole or not at all. Returns the pack's digest.

    Raises CacheError for a damaged entry, ParameterError for a bad name.
    """
    check_name(name)
    blobs: dict[str, bytes] = {}
    listed = {}
    for entry in sorted(entries, key=lambda e: e.key):
        check_files(entry)
        files = {}
        for file in files_of(entry):
            content = entry.file(file)
            digest = hashlib.sha256(content).hexdigest()
            blobs[digest] = content
            files[file] = [digest, len(content)]
        listed[entry.key] = {"manifest": bare_manifest(entry, sign), "files": files}
    if sign and lock is not None:
        lock = trust.sign(lock, sign)  # it is kept by itself, where the pack is imported
    index: dict[str, Any] = {"format": PACK_FORMAT, "name": name, "entries": listed, "lock": lock}
    if sign:
        index = trust.sign(index, sign)
    text = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    try:
        with written_whole(path) as private, zipfile.ZipFile(private, "w", zipfile.ZIP_STORED) as archive:
            for member, content in [(INDEX, text), *((f"blobs/{d}", blobs[d]) for d in sorted(blobs))]:
                archive.writestr(plain_member(member), content)
    except OSError as error:
        raise CacheError(
            f"the pack {path} cannot be written.\n  required: a folder with room, that you can write\n  found: {error}\n"
            f"  do: give -o another path"
        ) from error
    return hashlib.sha256(text).hexdigest()


def plain_member(name: str) -> zipfile.ZipInfo:
    """An archive member without time, owner or attributes."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o100644 << 16
    return info


def check_name(name: str) -> None:
    if not SET_NAME.fullmatch(name):
        raise ParameterError(f"the name {name!r} of a set: required letters, digits, '_', '-' and '.', at most 100")


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Opened(io.FileIO):
    """A file whose reader cannot be made to take much of it at once: zipfile reads the directory whole, whatever its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"a directory of {size} bytes; required at most {MAX_DIRECTORY}")
        return super().read(MAX_DIRECTORY if size is None or size < 0 else size)


class Pack:
    """A pack that is open for reading, its index checked: names, hashes and sizes, and the signature where one is required.

    Attributes: ``path, name, digest`` (sha256 of the index, which stands for all), ``lock`` (a set's, or None), ``keys``.
    """

    def __init__(self, path: Path, max_total: int = MAX_TOTAL) -> None:
        self.path = path
        try:
            # Read by place, not through the archive: forked processes share the position of an open file.
            self._file = _Opened(path, "rb")
            with zipfile.ZipFile(self._file) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                self._check_members(archive.infolist())
                with archive.open(INDEX) as member:
                    text = b"".join(iter(functools.partial(member.read, 1 << 20), b""))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, EOFError) as error:
            if isinstance(error, CacheError):
                raise
            found = error.strerror if isinstance(error, OSError) and error.strerror else f"{error} ({type(error).__name__})"
            raise self._bad("a pack as `attngen cache export` writes it", found) from None
        self.digest = hashlib.sha256(text).hexdigest()
        if (values := sum(map(text.count, (b",", b":", b"[", b"{")))) > MAX_VALUES:
            raise self._bad(f"an index of at most {MAX_VALUES} values", f"about {values}")
        try:
            index = json.loads(text)
            found = index["format"]
            if found != PACK_FORMAT:
                raise self._bad(f"format {PACK_FORMAT}", f"format {found!r}: it was made by another release")
            self.name, self.lock, self._entries = index["name"], index["lock"], index["entries"]
            self._check_entries(max_total)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._bad("an index of entries", repr(error)) from None
        trust.check_signed(index, f"the pack {path}")
        self.signed_by = index.get("signature", {}).get("key", "")

    def check_private(self) -> None:
        """Raises CacheError where others can write the file that is open, whatever its path names by now."""
        trust.check_private(self.path, self._file.fileno())

    @property
    def keys(self) -> list[str]:
        return list(self._entries)

    def manifests(self) -> Iterator[Any]:
        """Of each entry."""
        return (listed["manifest"] for listed in self._entries.values())

    def lookup(self, key: str, layer: str) -> MemoryEntry | None:
        """The entry of ``key``, its artifact checked; None where the pack has none. Raises CacheError."""
        listed = self._entries.get(key)
        if listed is None:
            return None
        manifest = {**listed["manifest"], "origin": {"pack": self.name, "sha256": self.digest}}
        entry = MemoryEntry(key, self.path, manifest, layer, get=lambda name: self._content(key, name))
        content = entry.read()  # whose hash the manifest has too: _check_entries
        trust.check_signed(manifest, f"the kernel {key[:12]} in {self.path}")
        return replace(entry, held=content) if manifest.get("kind") == "cubin" else entry

    def files(self, key: str) -> dict[str, Callable[[], bytes]]:
        """How to read each file of an entry, checked, by its name."""
        return {name: functools.partial(self._content, key, name) for name in self._entries[key]["files"]}

    def _content(self, key: str, name: str) -> bytes:
        digest, size = self._entries[key]["files"][name]
        try:
            at = self._members[f"blobs/{digest}"].header_offset
            # Before the content stand 30 bytes, the name and an extra field, whose lengths are in bytes 26 to 30.
            head = os.pread(self._file.fileno(), 30, at)
            content = os.pread(self._file.fileno(), size, at + 30 + sum(struct.unpack_from("<HH", head, 26)))
        except (OSError, struct.error) as error:
            raise self._bad(f"a readable {name} of {key[:12]}", str(error)) from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise self._bad(f"{name} of {key[:12]} with sha256 {digest}", hashlib.sha256(content).hexdigest())
        return content

    def _check_members(self, members: list[zipfile.ZipInfo]) -> None:
        seen = set()
        for info in members:
            limit = MAX_INDEX if info.filename == INDEX else MAX_FILE
            if info.filename != INDEX and not _BLOB.fullmatch(info.filename):
                raise self._bad(f"{INDEX} and blobs/<sha256> alone", f"a member {info.filename[:200]!r}")
            if info.filename in seen:
                raise self._bad("each member once", f"{info.filename} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise self._bad("members that are stored plainly", f"{info.filename} compressed or encrypted")
            if (info.external_attr >> 28) not in (0, 0o10):
                raise self._bad("plain files", f"{info.filename} is a link or a special file")
            if info.file_size > limit:
                raise self._bad(f"members of at most {limit} bytes", f"{info.filename} of {info.file_size}")
            seen.add(info.filename)
        if INDEX not in seen:
            raise self._bad(f"a member {INDEX}", "none")

    def _check_entries(self, max_total: int) -> None:
        check_name(self.name)
        if self.lock is not None and not isinstance(self.lock, dict):
            raise TypeError("lock")
        total, there = 0, {name: info.file_size for name, info in self._members.items()}
        for key, listed in self._entries.items():
            if not KEY.fullmatch(key):
                raise self._bad("keys of 64 hex digits", repr(key[:80]))
            manifest = check_manifest(listed["manifest"], self.path, key)
            hashes = {manifest["artifact"]: manifest["sha256"], **manifest.get("files", {})}
            if listed["files"].get(manifest["artifact"], ("", -1))[1] != manifest["size"]:
                raise self._bad(f"{manifest['artifact']} of {key[:12]} of {manifest['size']} bytes", "another size")
            for name in {*hashes, *manifest.get("sources", ())}:
                found = listed["files"].get(name, ("no such file in the pack",))[0]
                if found != hashes.get(name, found) or name not in listed["files"]:
                    raise self._bad(f"{name} of {key[:12]} with sha256 {hashes.get(name)}", found)
            for name, (digest, size) in listed["files"].items():
                if not FILE_NAME.fullmatch(name) or name == "manifest.json":
                    raise self._bad("plain file names", repr(name[:200]))
                if not isinstance(size, int) or there.get(f"blobs/{digest}") != size:
                    raise self._bad(f"{name} of {key[:12]}: {size} bytes", f"{there.get(f'blobs/{digest}')}")
                total += size
        max_total = min(max_total, (64 << 20) + MAX_SHARED * os.fstat(self._file.fileno()).st_size)
        if total > max_total:
            raise self._bad(f"at most {max_total} bytes unpacked", f"{total}")

    def _bad(self, required: str, found: str) -> CacheError:
        return CacheError(
            f"the pack {self.path} cannot be used; nothing was taken from it.\n  required: {required}\n  found: {found}\n"
            f"  do: copy it anew, or export it again"
        )
