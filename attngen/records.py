"""Records: immutable dataclasses that cost an import little.

``@record`` is ``@dataclass(frozen=True)``, but for the methods that dataclass compiles anew for each class: `import attngen` and
a server's start make 40 of them, and half a millisecond each was a third of the start.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

Class = TypeVar("Class", bound=type)


def _setattr(self: Any, name: str, value: Any) -> None:
    if name in self.__dict__ or name not in self.__dataclass_fields__:  # __init__ gives each field its value once
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    self.__dict__[name] = value


def _delattr(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, f.name) for f in fields(self) if f.compare])


def _eq(self: Any, other: Any) -> Any:
    return _compared(self) == _compared(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _repr(self: Any) -> str:
    shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{self.__class__.__qualname__}({shown})"


_METHODS = {"__setattr__": _setattr, "__delattr__": _delattr, "__eq__": _eq, "__hash__": _hash, "__repr__": _repr}

if TYPE_CHECKING:
    record = dataclass(frozen=True)
else:

    def record(cls: Class) -> Class:
        """What ``dataclass(frozen=True)`` makes of ``cls``."""
        own = dict(vars(cls))
        made = dataclass(eq=False, repr=False)(cls)
        for name, method in _METHODS.items():
            # A class with __eq__ alone has __hash__ = None; all else that it defines stays.
            if name not in own or (name == "__hash__" and own[name] is None):
                setattr(made, name, method)
        return made
