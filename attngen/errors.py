"""Errors. Each message says what was required, what was found and what to do."""

from __future__ import annotations

from collections.abc import Mapping


class AttngenError(Exception):
    """Base of every error attngen raises on purpose."""


class VariantError(AttngenError):
    """A variant's declaration is wrong; the message carries the user's file and line."""


class ParameterError(AttngenError, ValueError):
    """A call's argument or parameter is missing, unknown, ill-typed or ill-shaped."""


class UnsupportedError(AttngenError, NotImplementedError):
    """The request is well formed, but no kernel can serve it."""


class BuildError(AttngenError, RuntimeError):
    """No compiler, or the compiler failed; the message shows its output and the source's path."""


class CacheError(AttngenError, OSError):
    """The cache folder cannot be used, or an entry in it is damaged."""


class MissingKernelError(CacheError):
    """A kernel is in no layer of the cache, and nothing may be compiled (ATTNGEN_JIT=off, or jit=False).

    ``missing``: of load_set, why each key is missing.
    """

    missing: Mapping[str, str] = {}


class LoadError(AttngenError, OSError):
    """A built kernel cannot be loaded into this process."""


class CacheWarning(UserWarning):
    """A damaged cache entry was set aside and is being built again."""


class JitWarning(UserWarning):
    """A kernel is being compiled while the process runs, under ATTNGEN_JIT=warn."""
