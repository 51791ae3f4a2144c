"""A wheel of kernels: a package that holds a cache folder and no code, for `pip install`.

    attngen_kernels_llama/__init__.py            a docstring
    attngen_kernels_llama/v1/kernels/<..>/<key>/ entries, as in a cache
    attngen_kernels_llama/v1/sets/llama.lock     the set's lock file
    entry point attngen.packs: llama             how layers.installed() finds it, without importing it
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import trust
from .entry import FORMAT, Entry, check_files, entry_folder, json_text, sealed_text, written_whole
from .errors import CacheError, ParameterError
from .layers import GROUP
from .pack import bare_manifest, check_name, files_of, plain_member


def write_wheel(
    folder: Path, name: str, version: str, entries: Iterable[Entry], lock: Mapping[str, Any] | None, sign: Path | None = None
) -> Path:
    """Write the wheel into ``folder`` and return its path. Equal kernels make equal bytes. Raises ParameterError, CacheError."""
    check_name(name)
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ParameterError(f"--version {version}: required numbers joined by dots, such as 1 or 2026.11")
    package = "attngen_kernels_" + re.sub(r"\W", "_", name).lower()
    files: dict[str, bytes] = {f"{package}/__init__.py": f'"""Kernels of the set {name}, built by attngen. Data only."""\n'.encode()}
    native = False
    for entry in entries:
        check_files(entry)
        native = native or entry.manifest.get("kind") != "cubin"
        where = f"{package}/{entry_folder(entry.key)}"
        for file in files_of(entry):
            files[f"{where}/{file}"] = entry.file(file)
        files[f"{where}/manifest.json"] = sealed_text(bare_manifest(entry, sign)).encode()
    if lock is not None:
        signed = trust.sign(lock, sign) if sign else lock
        files[f"{package}/v{FORMAT}/sets/{name}.lock"] = json_text(signed).encode()
    # Cubins are data; libraries are of one machine type.
    tag = f"py3-none-linux_{platform.machine()}" if native else "py3-none-any"
    info = f"{package}-{version}.dist-info"
    pure = "false" if native else "true"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n"
        f"Summary: Attention kernels of the set {name}, compiled by attngen\n"
    ).encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: attngen\nRoot-Is-Purelib: {pure}\nTag: {tag}\n".encode()
    files[f"{info}/entry_points.txt"] = f"[{GROUP}]\n{name} = {package}\n".encode()
    record = "".join(f"{path},sha256={_digest(files[path])},{len(files[path])}\n" for path in sorted(files))
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()

    target = folder / f"{package}-{version}-{tag}.whl"
    # The archive ends with its metadata, as wheels do.
    order = sorted(files, key=lambda path: (".dist-info/" in path, path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as private, zipfile.ZipFile(private, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in order:
                member = plain_member(path)
                member.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(member, files[path])
    except OSError as error:
        raise CacheError(
            f"the wheel {target} cannot be written.\n  required: a folder with room, that you can write\n  found: {error}\n"
            f"  do: give -o another folder"
        ) from error
    return target


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
