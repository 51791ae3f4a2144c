"""Whom the cache believes: folders that only their user can write, and records that a trusted key has signed.

Whoever can write a cache folder can run code as its user. So a folder that others can write is refused, and what comes
from elsewhere can be required to carry an Ed25519 signature: $ATTNGEN_TRUSTED_KEYS names public keys, PEM files or
folders of them, joined by ":". A record is a JSON object; its signature covers all of it but `signature` and the fields
that belong to one copy of it (when it was made, where it came from).
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CacheError, ParameterError

OF_THE_COPY = ("signature", "seal", "created", "seconds", "cpu_seconds", "origin")


def check_private(folder: Path, opened: int | None = None) -> None:
    """Raises CacheError where others than root and this process's user can write ``folder`` or put another in its place: every
    folder and link that its name leads through is looked at. Of a pack, which is ``opened`` under that descriptor, what is open."""
    if _shared_allowed():
        return
    if opened is not None:
        return _check(folder, os.fstat(opened), True)
    for place, found, last in _way(folder):
        _check(place, found, last)


def check_inside(root: Path, folder: Path, *names: str) -> None:
    """Raises CacheError where others can write what lies between ``root`` and ``folder``, that, or its files ``names``. Nobody gets
    there where the root is closed."""
    top, at = os.fspath(root), os.fspath(folder)
    places = [os.path.join(at, name) for name in names]
    try:
        if not os.stat(top).st_mode & (stat.S_IXGRP | stat.S_IXOTH) or _shared_allowed():
            return
        while len(at) > len(top):
            places.append(at)
            at = os.path.dirname(at)
        seen = [(place, os.lstat(place)) for place in places]
    except OSError:
        return  # not there, or not ours to see: who uses it says so
    for place, found in seen:
        _check(place, found, True)


def _shared_allowed() -> bool:
    return os.environ.get("ATTNGEN_ALLOW_SHARED_CACHE") == "1"


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Each folder and link that ``path`` leads through, as far as this user can see, and whether it is the last."""
    at, left, links = "/", os.path.join(os.getcwd(), path).split("/")[::-1], 0
    with suppress(OSError):
        while left and links < 40:
            part = left.pop()
            if part in ("", ".", ".."):
                at = os.path.dirname(at) if part == ".." else at
                continue
            name = os.path.join(at, part)
            found = os.lstat(name)
            if stat.S_ISLNK(found.st_mode):
                links, target = links + 1, os.readlink(name)
                left += target.split("/")[::-1]
            else:
                at = name
            yield Path(name), found, not any(left)


def _check(place: Path | str, found: os.stat_result, last: bool) -> None:
    """``last``: nothing may be put into it; into a folder above it things may, where the sticky bit keeps others from ours."""
    link = stat.S_ISLNK(found.st_mode)
    others = not link and _others_write(found) and (last or not found.st_mode & stat.S_ISVTX)
    if not others and found.st_uid in (0, os.geteuid()):
        return
    what = f"mode {stat.S_IMODE(found.st_mode):04o}" if others else f"owned by user {found.st_uid}, not {os.geteuid()}"
    remedy = f"chmod {'go-w' if last else '+t'} {place}" if others else f"chown {'-h ' if link else ''}it"
    raise CacheError(
        f"{place} can be written by others, who could run code as you through it.\n"
        f"  required: a cache folder or pack that only its user (or root) can write, and no folder above it where others can put "
        f"theirs in its place\n  found: {what}\n  do: {remedy} (after a look at what is in it), or set ATTNGEN_CACHE_DIR to a folder "
        "whose parents are yours or root's (ATTNGEN_ALLOW_SHARED_CACHE=1 takes it as it is)"
    )


def _others_write(found: os.stat_result) -> bool:
    mode = found.st_mode
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _own_group(found.st_gid, os.geteuid())))


@functools.lru_cache(maxsize=32)
def _own_group(gid: int, uid: int) -> bool:
    """Whether the group is the user's alone, of the user's name: there the umask is 002."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return uid != 0 and user.pw_gid == gid and group.gr_name == user.pw_name and not {*group.gr_mem} - {user.pw_name}


# ---- signatures ------------------------------------------------------------------------------------------------------


def signed_bytes(record: Mapping[str, Any]) -> bytes:
    """What a signature of ``record`` covers."""
    covered = {name: value for name, value in record.items() if name not in OF_THE_COPY}
    return b"attngen 1\n" + json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()


def sign(record: Mapping[str, Any], key_file: Path) -> dict[str, Any]:
    """``record`` with its signature by the Ed25519 private key in ``key_file`` (PEM, as `openssl genpkey -algorithm
    ed25519` writes it). Raises ParameterError."""
    key = _private_key(key_file, _stamp(key_file))
    public = key.public_key().public_bytes_raw()
    signature = {"key": public.hex(), "ed25519": key.sign(signed_bytes(record)).hex()}
    return {**record, "signature": signature}


def signer(record: Mapping[str, Any]) -> str:
    """The public key of who signed ``record``, in hex and unchecked; "" where nobody did."""
    found = record.get("signature")
    return str(found.get("key", "")) if isinstance(found, dict) else ""


def required() -> bool:
    """Whether signatures are: whether ATTNGEN_TRUSTED_KEYS is set."""
    return bool(os.environ.get("ATTNGEN_TRUSTED_KEYS"))


def check_signed(record: Mapping[str, Any], what: str) -> None:
    """Raises CacheError unless signatures are not required, or a trusted key has signed ``record``."""
    setting = os.environ.get("ATTNGEN_TRUSTED_KEYS")
    if not setting:
        return
    trusted = trusted_keys(setting)
    found = record.get("signature")
    if not isinstance(found, dict) or not isinstance(found.get("key"), str) or not isinstance(found.get("ed25519"), str):
        raise _untrusted(what, "no signature", setting)
    key = trusted.get(found["key"])
    if key is None:
        raise _untrusted(what, f"the signature of key {found['key'][:16]}..., which is not among them", setting)
    try:
        key.verify(bytes.fromhex(found["ed25519"]), signed_bytes(record))
    except (ValueError, _crypto("exceptions").InvalidSignature):
        raise _untrusted(what, f"a signature that does not fit: the content is not what key {found['key'][:16]}... signed",
                         setting) from None  # fmt: skip


def _untrusted(what: str, found: str, setting: str) -> CacheError:
    return CacheError(
        f"{what} is not signed by a trusted key.\n  required: an Ed25519 signature of a key in ATTNGEN_TRUSTED_KEYS={setting}\n"
        f"  found: {found}\n  do: export it with --sign, or add the signer's public key, or unset ATTNGEN_TRUSTED_KEYS"
    )


def _crypto(module: str) -> Any:
    try:
        import cryptography.exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ParameterError(
            "signatures need the package `cryptography`.\n  required: cryptography 42 or newer\n  found: it does not import\n"
            "  do: pip install 'attngen[sign]'"
        ) from None
    return {"exceptions": cryptography.exceptions, "serialization": serialization, "ed25519": ed25519}[module]


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat() if path.exists() else None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if found else (0, 0, 0)


@functools.lru_cache(maxsize=8)
def _private_key(path: Path, stamp: object) -> Any:
    try:
        key = _crypto("serialization").load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ParameterError(f"--sign {path}: required an unencrypted Ed25519 private key in PEM; found: {error}") from None
    if not isinstance(key, _crypto("ed25519").Ed25519PrivateKey):
        raise ParameterError(f"--sign {path}: required an Ed25519 key; found {type(key).__name__}")
    return key


def trusted_keys(setting: str) -> dict[str, Any]:
    """The public keys that $ATTNGEN_TRUSTED_KEYS names, by their bytes in hex. Raises ParameterError."""
    files: list[Path] = []
    for part in filter(None, setting.split(os.pathsep)):
        path = Path(part).expanduser()
        files += sorted(path.glob("*.pem")) if path.is_dir() else [path]
    return _load_trusted(tuple((path, _stamp(path)) for path in files), setting)


@functools.lru_cache(maxsize=8)
def _load_trusted(files: tuple[tuple[Path, object], ...], setting: str) -> dict[str, Any]:
    found = {}
    for path, _ in files:
        try:
            key = _crypto("serialization").load_pem_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ParameterError(f"ATTNGEN_TRUSTED_KEYS: {path}: required a public key in PEM; found: {error}") from None
        if not isinstance(key, _crypto("ed25519").Ed25519PublicKey):
            raise ParameterError(f"ATTNGEN_TRUSTED_KEYS: {path}: required an Ed25519 key; found {type(key).__name__}")
        found[key.public_bytes_raw().hex()] = key
    if not found:
        raise ParameterError(f"ATTNGEN_TRUSTED_KEYS={setting}: required PEM files of public keys; found none")
    return found
