"""Where attngen's own files are: in a wheel, in an editable install and in a bare checkout alike.

A wheel holds templates/ and variants/ inside the package. In a checkout they stand at the repository's top level,
beside attngen/; there this module also makes `attngen.variants` importable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
IS_CHECKOUT = not (PACKAGE / "templates").is_dir()


def templates_dir() -> Path:
    """The folder of the Jinja templates."""
    return _top() / "templates"


def variants_dir() -> Path:
    """The folder of the library of variants."""
    return _top() / "variants"


def _top() -> Path:
    return PACKAGE.parent if IS_CHECKOUT else PACKAGE


class _VariantsFinder:
    """Finds `attngen.variants` at the top level of a checkout; its submodules are then found through its __path__."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "attngen.variants":
            return None
        folder = variants_dir()
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if IS_CHECKOUT and _VariantsFinder not in sys.meta_path:
    sys.meta_path.insert(0, _VariantsFinder)
