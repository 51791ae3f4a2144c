"""What a function captures: closure cells, globals, defaults, partial arguments, attributes of objects that it calls.

``captures`` gives a key that is equal for two functions only if they do the same with whatever tensors they hold, and those
tensors beside it, in order; so that a caller may keep what it derived from one and use it for the other. What cannot be known
to be constant (an object with operators of its own, an iterator) has no key.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

_STEADY = frozenset("torch math numpy attngen builtins functools operator typing collections".split())  # whose functions never change
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
_DESCRIPTORS = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_MAX_ITEMS = 4096
# What a function finds through these has names that its code does not hold.
_DYNAMIC = frozenset("getattr hasattr vars globals locals eval exec __dict__ __getattribute__ attrgetter import_module __import__".split())
# Methods that leave an object a plain record: what it says lies in its attributes.
_PLAIN = frozenset(
    f"__{name}__" for name in "init new repr str eq ne hash module doc dict weakref annotations call slots qualname post_init "
    "dataclass_fields dataclass_params match_args init_subclass setattr delattr replace firstlineno static_attributes getstate "
    "setstate reduce reduce_ex orig_bases parameters class_getitem abstractmethods annotate_func annotations_cache annotate "
    "set_name sizeof dir subclasshook format conditional_annotations".split()
)  # fmt: skip


class NoKey(Exception):
    """Something is captured that may change unseen."""


@dataclass
class Captures:
    """``key``: equal for equal functions; None where there is none. ``tensors``: (name, tensor) in the key's order.
    ``keep``: what the key names by identity, to be held as long as the key."""

    key: Hashable | None
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)


def captures(*functions: Any) -> Captures:
    """What ``functions`` (each a callable or None) capture."""
    walk = _Walk()
    try:
        for function in functions:
            walk.visit(function, "tensor")
        walk.finish()
        key: Hashable | None = tuple(walk.key)
        hash(key)
    except (NoKey, TypeError):
        key = None
    return Captures(key, walk.tensors, walk.keep)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function's code may look up, by name or by a string, in nested functions too."""
    found = dict.fromkeys(code.co_names)
    for x in code.co_consts:
        if isinstance(x, str) and x.isidentifier():
            found[x] = None
        elif isinstance(x, types.CodeType):
            found |= dict.fromkeys(_names(x))
    return tuple(found)


class _Walk:
    def __init__(self) -> None:
        self.key: list[Any] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.keep: list[Any] = []
        self._alive: list[Any] = []
        self._seen: dict[int, int] = {}
        self._holders: list[tuple[Any, int]] = []  # objects whose attributes functions read, and how many names were looked up
        self._read: dict[str, None] = {}  # every name that some function may look up

    def finish(self) -> None:
        """Attributes: any that a function may read by name, of any object that was found."""
        changed = True
        while changed:
            changed = False
            for n, (holder, done) in enumerate(self._holders):
                names = list(self._read)[done:]
                if names:
                    changed = True
                    self._holders[n] = holder, done + len(names)
                    for name in names:
                        self._attribute(holder, name)

    def visit(self, x: Any, name: str) -> None:
        kind = type(x)
        if kind in _NUMBERS:
            self.key.append((kind, repr(x) if kind in (float, complex) else x))
            return
        if id(x) in self._seen:
            self.key.append(("again", self._seen[id(x)]))
            return
        self._seen[id(x)] = len(self._seen)
        if isinstance(x, torch.Tensor):
            self.key.append(("tensor", x.dtype, tuple(x.shape), x.device, x.layout))
            self.tensors.append((name, x))
            return
        self._alive.append(x)  # so that no other object takes its id meanwhile
        if isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self.key.append("method")
            self.visit(x.__func__, name)
            self.visit(x.__self__, name)
        elif kind is functools.partial:
            self._items("partial", (x.func, *x.args, *sorted(x.keywords.items())), name)
        elif isinstance(x, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self._known(x)
            if not isinstance(x.__self__, (types.ModuleType, type, type(None))):
                self.visit(x.__self__, name)
        elif isinstance(x, _DESCRIPTORS):
            self._known(x)
        elif isinstance(x, (tuple, list)):
            self._items(kind, x, name)
        elif isinstance(x, (set, frozenset)):
            self._items(kind, sorted(x, key=repr), name)
        elif kind in (dict, types.MappingProxyType):
            self._items(kind, [y for item in x.items() for y in item], name)
        elif isinstance(x, types.ModuleType) or isinstance(x, type):
            self._known(x)
            owner = x.__name__ if isinstance(x, types.ModuleType) else x.__module__
            if owner.partition(".")[0] not in _STEADY:
                self._holders.append((x, 0))
        elif isinstance(x, (staticmethod, classmethod)):
            self.visit(x.__func__, name)
        elif isinstance(x, property):
            self._items(kind, (x.fget,), name)
        else:
            self._instance(x, name)

    def _known(self, x: Any) -> None:
        self.keep.append(x)
        self.key.append((type(x), id(x)))

    def _items(self, kind: Any, items: Any, name: str) -> None:
        if len(items) > _MAX_ITEMS:
            raise NoKey
        self.key.append((kind, len(items)))
        for x in items:
            self.visit(x, name)

    def _function(self, f: types.FunctionType) -> None:
        code = f.__code__
        self.keep.append(code)
        self.key.append(("function", id(code)))
        for name, cell in zip(code.co_freevars, f.__closure__ or ()):
            try:
                self.visit(cell.cell_contents, name)
            except ValueError:
                self.key.append("empty")
        for name, default in zip(code.co_varnames[code.co_argcount - len(f.__defaults__ or ()) :], f.__defaults__ or ()):
            self.visit(default, name)
        for name, default in sorted((f.__kwdefaults__ or {}).items()):
            self.key.append(name)
            self.visit(default, name)
        if hasattr(f, "__wrapped__"):
            self.visit(f.__wrapped__, f.__name__)
        if (f.__module__ or "").partition(".")[0] in _STEADY:
            return
        scope, read = f.__globals__, _names(code)
        if not _DYNAMIC.isdisjoint(read):
            raise NoKey
        for name in read:
            self._read[name] = None
            if name in scope:
                self.key.append(name)
                self.visit(scope[name], name)
        if vars(f):
            self._holders.append((f, 0))

    def _instance(self, x: Any, name: str) -> None:
        kind = type(x)
        if isinstance(x, torch.nn.Module):
            self._known(kind)
        elif any(n.startswith("__") and n.endswith("__") and n not in _PLAIN for c in kind.__mro__[:-1] for n in vars(c)):
            if not isinstance(x, numbers.Number):  # numpy's
                raise NoKey
            self.key.append((kind, repr(x)))
            return
        elif not (hasattr(x, "__dict__") or any("__slots__" in vars(c) for c in kind.__mro__)):
            raise NoKey
        else:
            self._known(kind)
        self._holders.append((x, 0))
        call = getattr(kind, "__call__", None)
        if isinstance(call, types.FunctionType):
            self.visit(call, name)

    def _attribute(self, holder: Any, name: str) -> None:
        """What ``holder.name`` finds: in the object, then in its class."""
        spaces: list[Any] = [vars(holder)] if hasattr(holder, "__dict__") else []
        if isinstance(holder, torch.nn.Module):
            spaces += [holder._parameters, holder._buffers, holder._modules]
        for c in (holder if isinstance(holder, type) else type(holder)).__mro__[:-1] if not isinstance(holder, types.ModuleType) else ():
            if c.__module__.partition(".")[0] not in _STEADY:
                spaces.append(vars(c))
            elif name in vars(c) and isinstance(vars(c)[name], types.MemberDescriptorType):
                spaces.append(vars(c))
        for space in spaces:
            if name in space:
                found = space[name]
                if isinstance(found, types.MemberDescriptorType) and not isinstance(holder, type):
                    if not hasattr(holder, name):
                        continue
                    found = getattr(holder, name)  # a slot
                self.key.append(("attribute", self._seen.get(id(holder)), name))
                self.visit(found, name)
                return
