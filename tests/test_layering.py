"""The one-way street: a room of attngen imports only from rooms before it, inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from attngen.paths import PACKAGE

# Top to bottom; a room may import from those above it.
STREET = (
    "errors",
    "records",
    "status",
    "devices",
    "counters",
    "logs",
    "paths",
    "ops",
    "expr",
    "bounds",
    "classes",
    "columns",
    "intervals",
    "trace",
    "rope",
    "fields",
    "spec",
    "captures",
    "flex_trace",
    "interp",
    "abi",
    "abi_cuda",
    "isa",
    "choose",
    "choose_cuda",
    "choose_hopper",
    "emit",
    "render",
    "render_cuda",
    "build",
    "trust",
    "entry",
    "pack",
    "layers",
    "locks",
    "explain",
    "cache",
    "library",
    "params",
    "shape",
    "load",
    "space",
    "lengths",
    "queued",
    "shared",
    "schedule",
    "pins",
    "tuned",
    "debug",
    "run",
    "cuda",
    "boxes",
    "engine",
    "engine_cpu",
    "append",
    "merge",
    "masks",
    "dense",
    "batch",
    "sparse",
    "levels",
    "flex",
    "find",
    "check",
    "tune",
    "sets",
    "units",
    "precompile",
    "start",
    "prune",
    "wheel",
    "doctor",
    "printing",
    "show",
    "ship",
    "cli",
    "__main__",
    "integrations",
)
# attngen.variants is the library that users import; these may too, since `import attngen` imports none of them.
MAY_USE_VARIANTS = {"check", "cli", "find", "integrations", "show", "sparse"}


def rooms() -> dict[str, list[ast.Module]]:
    found: dict[str, list[ast.Module]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ("templates", "variants"):  # a wheel has them here
            found.setdefault(parts[0], []).append(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """(room of attngen, line) of every import that can run, inside functions too."""
    found = []
    annotations_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in annotations_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("attngen.") for alias in node.names if alias.name.startswith("attngen.")]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level or base.split(".")[0] == "attngen":
                base = base.removeprefix("attngen").lstrip(".")
                names = [base] if base else [alias.name for alias in node.names]
        found += [(name.split(".")[0], node.lineno) for name in names]
    return found


ROOMS = rooms()


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "__init__"])
def test_a_room_imports_only_from_rooms_before_it(room):
    assert room in STREET, f"attngen/{room}.py has no place in the street: add it to STREET where it belongs"
    for tree in ROOMS[room]:
        for imported, line in imports(tree):
            if imported == "variants":
                assert room in MAY_USE_VARIANTS, f"attngen/{room} line {line} imports attngen.variants"
            elif imported in STREET and imported != room:
                before = STREET.index(imported) < STREET.index(room)
                assert before, f"attngen/{room} line {line} imports attngen/{imported}, which comes after it"


def test_the_scanner_sees_every_form_of_import():
    source = "import attngen.run\nfrom . import cache\nfrom .load import host\n"
    source += "def f():\n  from attngen.spec import x\n  from attngen import cli\n"
    source += "if TYPE_CHECKING:\n  from .emit import Hooks\n"
    found = imports(ast.parse(source))
    assert sorted(found) == [("cache", 2), ("cli", 6), ("load", 3), ("run", 1), ("spec", 5)]


def test_importing_attngen_loads_neither_the_library_nor_what_only_a_build_needs():
    late = [
        "attngen.variants",
        "attngen.cli",
        "attngen.check",
        "attngen.rope",
        "attngen.emit",
        "attngen.choose",
        "attngen.build",
        "attngen.schedule",
        "jinja2",
        "ninja",
        "filelock",
        "attngen.sets",
        "attngen.start",
        "cryptography",
        "fsspec",
        "importlib.metadata",
        "pybind11",
        "typer",
        "rich",
        "torch.utils.cpp_extension",
    ]
    program = "import sys, torch; before = set(sys.modules); import attngen; new = set(sys.modules) - before; "
    program += f"print([m for m in {late} if m in new])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert done.stdout.strip() == "[]"
