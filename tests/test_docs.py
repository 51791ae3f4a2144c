"""The documentation runs: each file's ```python blocks in order, in one namespace; a ```text block that follows one is
what it prints, "..." standing for anything. Links between files lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_layering import STREET

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [path.name for path in FILES]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def matches(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, where "..." stands for anything and the space at the ends of lines for nothing."""
    expected, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, printed))
    return re.fullmatch(".*?".join(map(re.escape, expected.split("..."))), printed, re.S) is not None


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_python_blocks_run_and_print_what_they_say(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    module = ModuleType(path.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    printed: str | None = None
    end = 0
    for block in _FENCE.finditer(text):
        line = text.count("\n", 0, block.start(2))
        follows, end = not text[end : block.start()].strip(), block.end()
        if block[1] == "python":
            code = compile("\n" * line + block[2], str(path.relative_to(ROOT)), "exec")  # errors name the document's own line
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, module.__dict__)
            printed = out.getvalue()
        elif block[1] == "text" and follows and printed is not None:
            assert matches(block[2], printed), f"{path.name}:{line} does not show what is printed:\n{printed}"
            printed = None


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link.partition("#")[0] for link in _LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {missing}"


def test_the_tour_goes_down_the_street() -> None:
    rooms = re.findall(r"^\| \[(\w+)\.py\]", (ROOT / "docs" / "tour.md").read_text(encoding="utf-8"), re.M)
    assert len(rooms) >= 16 and rooms == [room for room in STREET if room in rooms]


def test_expected_output_can_fail() -> None:
    assert matches("a ... c\n", "a bb c  \n")
    assert not matches("a ... c", "a bb d")
    assert not matches("a", "a b")
