"""@record is dataclass(frozen=True), made faster."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
from attngen.records import record


def define(decorate):
    @decorate
    class Tile:
        """A tile."""

        rows: int
        name: str = "tile"
        note: str = field(default="", compare=False, repr=False)
        parts: tuple[int, ...] = field(default_factory=tuple)

        @property
        def area(self) -> int:
            return self.rows * len(self.parts)

    @decorate
    class Wide(Tile):
        width: int = 2

    return Tile, Wide


RECORDS, DATACLASSES = define(record), define(dataclass(frozen=True))


@pytest.mark.parametrize("which", [0, 1], ids=["own", "inherited"])
def test_as_a_frozen_dataclass(which):
    ours, theirs = RECORDS[which], DATACLASSES[which]
    values = [((1,), {}), ((1, "x"), {"note": "n"}), ((2,), {"parts": (1, 2)})]
    for args, named in values:
        a, b = ours(*args, **named), theirs(*args, **named)
        assert repr(a) == repr(b) and hash(a) == hash(b) and dataclasses.asdict(a) == dataclasses.asdict(b)
        assert a == ours(*args, **named) == copy.deepcopy(a) and a != b and a.area == b.area
        assert dataclasses.replace(a, rows=9) == ours(**{**vars(a), "rows": 9})
        for change in (lambda: setattr(a, "rows", 3), lambda: setattr(a, "other", 3), lambda: delattr(a, "rows")):
            with pytest.raises(FrozenInstanceError):
                change()
    assert ours(1, note="a") == ours(1, note="b") and ours(1) != ours(2) and RECORDS[0](1) != RECORDS[1](1)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    with pytest.raises(TypeError):
        ours()
    with pytest.raises(TypeError):
        ours(1, nothing=2)


def test_what_a_class_defines_stays():
    @record
    class Said:
        x: int

        def __repr__(self) -> str:
            return "said"

        def __eq__(self, other: object) -> bool:
            return True

    assert repr(Said(1)) == "said" and Said(1) == 7 and hash(Said(1)) == hash((1,))


@record
class Pickled:
    x: int


def test_they_can_be_pickled():
    assert pickle.loads(pickle.dumps(Pickled(3))) == Pickled(3)
