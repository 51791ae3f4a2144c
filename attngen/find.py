"""Variants by name: of the library, or of a file of the user's, ``FILE.py`` or ``FILE.py:Class``."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AttngenError, ParameterError, VariantError
from .ops import BOOL, F32, I32

if TYPE_CHECKING:
    from .spec import Variant


def load_variant(spec: str, bound: Sequence[str] = (), *, in_set: bool = False) -> Variant:
    """The variant that ``spec`` names, made with the ``NAME=VALUE`` bindings: those of ``--set``, or ``in_set`` of a set's ``bind``.

    Raises:
        VariantError: no such file, class or library name; a file that does not import; bindings of an instance.
        ParameterError: a binding that fits no field; a Const without a value.
    """
    file, _, name = spec.partition(":")
    found = _from_file(Path(file), name) if is_file(file) else _from_library(spec)
    if not isinstance(found, type):
        if bound:
            given = "bind" if in_set else "--set"
            raise VariantError(f"{given} with {spec}, an instance: give its class, or bind the values in the file")
        return found
    values = _bindings(found, bound, in_set)
    missing = [n for n, f in found.fields.items() if f.kind == "const" and n not in values and getattr(found, n, None) is None]
    if missing:
        how = _as_given(missing[0], "...", in_set)
        how = f"{{name = ..., {how}}}" if in_set else how
        raise ParameterError(f"{found.__name__} needs a value for its Const {', '.join(missing)}: {how}")
    return found(**values)


def is_file(name: str) -> bool:
    """Whether ``name`` means a file, not a variant of the library."""
    return name.endswith(".py") or os.sep in name


def _from_library(name: str) -> type[Variant]:
    from .variants import library

    known = library()
    if name not in known:
        folded = {n.lower(): n for n in known}
        close = [folded[n] for n in difflib.get_close_matches(name.lower().replace("_", ""), folded, n=3, cutoff=0.6)]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise VariantError(
            f"no variant {name!r} in the library. {hint}`attngen list` names them; a variant of yours is FILE.py or "
            f"FILE.py:Class"
        )
    return known[name]


def _from_file(path: Path, name: str) -> Any:
    from .spec import Variant

    if not path.is_file():
        raise VariantError(f"no file {path}: required a Python file that defines a subclass of ag.Variant")
    module = _import_file(path)
    if name:
        found = getattr(module, name, None)
        if isinstance(found, Variant) or (isinstance(found, type) and issubclass(found, Variant)):
            return found
        what = "has no such name" if found is None else f"has a {type(found).__name__} of that name"
        raise VariantError(f"{path}:{name}: required a subclass or an instance of ag.Variant, and the file {what}")
    own = [
        x for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, Variant) and x.__module__ == module.__name__
    ]  # fmt: skip
    if len(own) != 1:
        names = ", ".join(f"{path}:{cls.__name__}" for cls in own)
        raise VariantError(
            f"{path} defines {len(own)} subclasses of ag.Variant: {f'name one of {names}' if own else 'required one'}"
        )
    return own[0]


def _import_file(path: Path) -> Any:
    name = f"attngen_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise VariantError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE.py` does, so that it may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except AttngenError:
        raise
    except (Exception, SystemExit) as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        line = where[-1].lineno if where else getattr(error, "lineno", None)
        raise VariantError(
            f"{path}:{line or 1}: importing it raised {type(error).__name__}: {error}. Mend the file; code that runs "
            f'something belongs under if __name__ == "__main__"'
        ) from error
    finally:
        sys.path.pop(0)
    return module


def _as_given(name: str, text: str, in_set: bool) -> str:
    """A binding as people write it."""
    return f"bind = {{{name} = {text}}}" if in_set else f"--set {name}={text}"


def _bindings(cls: type[Variant], given: Sequence[str], in_set: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        field = cls.fields.get(name)
        if not equals or field is None:
            known, what = ", ".join(cls.fields) or "no fields", _as_given(name, text, in_set) if equals else f"--set {item}"
            form = "a name" if in_set else "NAME=VALUE"
            raise ParameterError(f"{what}: required {form} with a field of {cls.__name__} ({known})")
        readers = {F32: float, I32: int, BOOL: {"true": True, "false": False}.__getitem__, None: json.loads}
        try:
            if field.kind == "tensor":
                raise ValueError("a tensor cannot be given here")
            values[name] = readers[field.dtype](text.lower() if field.dtype == BOOL else text)
        except (ValueError, KeyError) as error:
            raise ParameterError(f"{_as_given(name, text, in_set)}: {name} is {field.kind} {field.dtype or 'number'} ({error})") from None
    return values
