"""Why a kernel was not there: the inputs of its key beside those of the nearest entry.

A manifest's `inputs` hold what went into the key, by name; values are JSON. The nearest entry is the one whose inputs
differ in the fewest places, the newest of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_WIDTH = 160  # of a value that is shown


@dataclass(frozen=True)
class Difference:
    """One input that differs; None where one side lacks it."""

    name: str
    wanted: Any
    found: Any
    meaning: str

    def __str__(self) -> str:
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{self.name}: wanted {_short(self.wanted)}, found {_short(self.found)}{meaning}"


@dataclass(frozen=True)
class Nearest:
    """The nearest entry and where it differs."""

    key: str
    title: str
    differences: tuple[Difference, ...]


_MEANINGS = {
    "sources": "another version of attngen, or edited templates",
    "structure": "another variant, or its hooks changed",
    "hooks": "another variant, or its hooks changed",
    "flags": "other compiler flags",
    "abi": "another launch ABI: another release of attngen",
    "format": "another format of keys: another release of attngen",
    "config": "another choice of tiles",
}


def nearest(wanted: Mapping[str, Any], manifests: Iterable[Mapping[str, Any]], but: str = "") -> Nearest | None:
    """The entry nearest to the inputs ``wanted``, leaving out the key ``but``; None where there is none to compare with."""
    best: tuple[tuple[int, float], Nearest] | None = None
    for manifest in manifests:
        found = manifest.get("inputs")
        if not isinstance(found, Mapping) or manifest.get("key") == but or found.get("backend") != wanted.get("backend"):
            continue
        differs = differences(wanted, found)
        # Hooks that differ outweigh everything: an entry of another variant is no neighbour.
        weight = sum(20 if d.name.partition(".")[0] in ("structure", "kernel") else 1 for d in differs)
        rank = (weight, -float(manifest.get("created", 0.0)))
        if best is None or rank < best[0]:
            best = rank, Nearest(manifest["key"], str(manifest.get("variant", "")), tuple(differs))
    return best[1] if best else None


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """Where two records of inputs differ, inner records name by name."""
    differs = []
    for name in (*wanted, *(n for n in found if n not in wanted)):
        a, b = wanted.get(name), found.get(name)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differs += [
                Difference(f"{name}.{d.name}", d.wanted, d.found, _MEANINGS.get(name, "")) for d in differences(a, b)
            ]
        else:
            differs.append(Difference(name, a, b, _MEANINGS.get(name, "")))
    return differs


def _short(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
