"""How the command line prints: tables, JSON, what goes where."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def stdout() -> Console:
    wide = None if sys.stdout.isatty() else 160  # a pipe has no width: keep a row on a line
    return Console(width=wide, highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def table(*columns: str, title: str | None = None) -> Table:
    """A table; a column whose name starts with > is a number's."""
    from rich import box

    found = Table(box=box.SIMPLE, title=escape(title) if title else None, title_justify="left")
    for name in columns:
        found.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return found


def record(x: Any) -> dict[str, Any]:
    return asdict(x) if is_dataclass(x) and not isinstance(x, type) else dict(x)


def print_json(value: Any) -> None:
    """JSON on stdout; NaN and infinities, which JSON lacks, as strings."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        if isinstance(x, float) and x - x != 0:
            return str(x)
        return x

    print(json.dumps(plain(value), indent=2, default=str))
