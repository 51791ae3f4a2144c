"""Emission: nodes to C expressions for the template's named holes.

Every value is computed at its level: per call, per tile (one request and KV head), per row, per column, per element.
A value that a later level reads and that costs more than one operation is stored at its own level; cheaper ones are
recomputed where they are used. The C++ and CUDA dialects share all of this and differ in the op table's text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .bounds import Inequality, analyse
from .choose_cuda import ZoneMap
from .classes import ClassHoles, along_one_axis, tile_class
from .columns import column_texts
from .expr import (
    CALL,
    COL,
    CONST,
    ELEM,
    ROW,
    TILE,
    Node,
    discrete_inputs,
    maximum,
    minimum,
    substitute,
    symbol,
    to_f32,
    walk,
    where,
)
from .ops import BOOL, F32, I32, OPS, c_text, operand, scaled, sum_text
from .records import record
from .spec import Trace

CTYPE = {F32: "float", I32: "int32_t", BOOL: "bool"}
_RESERVED = frozenset(  # names that the template's loops and C++ use beside the values
    "p c t s o m n q kv q_token kv_token head kv_head num_heads num_kv_heads request q_len kv_len dim rows cols "
    "q_offset q_start kv_start kv_base kv_token0 kv_head0 rope_table query_scale sink kv_position kind row i first count "
    "group local_kv_head scale distance place NR LOG2E bool "
    "int float double char short long unsigned signed void auto register static const volatile extern inline return "
    "if else for while do switch case default break continue goto sizeof struct union enum typedef class public "
    "private protected template typename this new delete operator errno stdin stdout stderr namespace using try catch "
    "throw friend virtual explicit mutable true false and or not xor nullptr asm alignas alignof and_eq bitand bitor "
    "compl concept consteval constexpr constinit const_cast co_await co_return co_yield decltype dynamic_cast export "
    "noexcept not_eq or_eq reinterpret_cast requires static_assert static_cast thread_local typeid wchar_t xor_eq sum o2 "
    "final override import module".split()
)
# Names of the generated locals, of types, of helper functions and of macros: a field of such a name gets another one.
_MEANINGFUL = re.compile(r"e\d+|q_position\d+|\w+_t|ag_\w+|[A-Z][A-Z0-9_]*|assert|offsetof|bf16|f16|std|main")
_LEVEL_HINT = {CALL: "call", TILE: "tile", ROW: "row", COL: "col"}
_LONG_TEXT = 400  # characters of one expression: past it, a part gets a name
# A read indexed by exactly this symbol on this axis cannot be out of range: the call checks the axis's size. On CUDA lengths
# may be known to the device alone, so that only the first three are checked.
_SAFE_INDEX = {
    "cuda": {"heads": "head", "kv_heads": "kv_head", "requests": "request"},
    "cpp": {
        "heads": "head", "kv_heads": "kv_head", "requests": "request", "positions": "kv", "q_tokens": "q_token",
        "kv_tokens": "kv_token",
    },
}  # fmt: skip


@record
class Value:
    """One computed value: ``ctype name = expr;`` and the hook line it came from ("gemma2.py:12")."""

    ctype: str
    name: str
    expr: str
    where: str = ""


@record
class ElementFn:
    """A per-element hook as an inline function; ``params`` are (ctype, name, access in a loop over m and n)."""

    params: tuple[tuple[str, str, str], ...]
    lines: tuple[Value, ...]
    result: str
    where: str

    @property
    def reads_columns(self) -> bool:
        """Whether it needs of a key more than its place."""
        return any(access.startswith("cols.") and name not in ("kv", "kv_token") for _, name, access in self.params)


@record
class ColumnHoles:
    """A mask by columns (columns.py). ``row``: the word of a row, as uint32. ``terms``: what its words ``names`` hold, evaluated key by
    key. ``holds``: whether ``row`` says what the mask does; None: always."""

    row: ElementFn
    names: tuple[str, ...]
    terms: tuple[ElementFn, ...]
    holds: ElementFn | None


@record
class RopeHoles:
    """How the kernel rotates Q, and K where the cache holds unrotated keys."""

    rotary_dim: int
    interleaved: bool
    rotate_keys: bool
    q_positions: tuple[str, ...]  # row values
    kv_position: str | None  # column value
    kind: str | None  # column value: which q_position a key uses
    table: str  # row of inv_freq


@record
class BoundsHoles:
    """The closed tile bounds as int64 C expressions; ``exact`` where they are the whole mask. ``either``: ranges within [kv_begin,
    kv_end), of which keys lie in one at least."""

    kv_begin: str
    kv_end: str
    full: str
    exact: bool
    either: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _BoundTexts:
    """Of one inequality: its first key, the one after its last ('' where it has none), and the test that it holds for a tile."""

    begin: str
    end: str
    full: str


@dataclass
class Hooks:
    """What a template's holes are filled with."""

    call: list[Value] = field(default_factory=list)
    tile: list[Value] = field(default_factory=list)
    row: list[Value] = field(default_factory=list)
    col: list[Value] = field(default_factory=list)
    logits: ElementFn | None = None
    mask: ElementFn | None = None
    columns: ColumnHoles | None = None  # the mask again, on CUDA
    weight: ElementFn | None = None
    output: ElementFn | None = None
    sink: str | None = None
    query_scale: str | None = None
    dot_scale: str | None = None  # CUDA: what the first hook multiplies q.k * scale by
    logit_factor: str | None = None  # CUDA, softmax: what logits within -1 ... 1 are yet to be multiplied by, the same in a call
    softmax: bool = True
    distance: bool = False  # CUDA: scores need (float)(q - kv)
    rope: RopeHoles | None = None
    bounds: BoundsHoles = BoundsHoles("0", "t.kv_len", "true", True)
    classes: ClassHoles | None = None  # of tiles, where intervals say more than closed bounds
    zones: tuple[ZoneMap, ...] = ()  # that the classes read, on CUDA

    @property
    def reads_columns(self) -> bool:
        """Whether scores of a kernel that masks by columns need of a key more than its place."""
        fns = (self.logits, self.weight, *(self.columns.terms if self.columns else ()))
        return any(fn is not None and fn.reads_columns for fn in fns)


def emit(
    trace: Trace, storage: Mapping[str, str], head_dim: int, dialect: str = "cpp", device_scalars: bool = False, classes: bool = True
) -> Hooks:
    """Fill the holes for ``trace``. ``storage`` gives each tensor parameter's stored dtype; ``dialect`` is cpp or cuda;
    ``device_scalars`` as in ``abi.parameter_fields``; ``classes``: of tiles too, which a planner does without."""
    logits, weight, output = (_reciprocals(getattr(trace, name)) for name in ("logits", "weight", "output"))
    logits, weight = (_differences(root, trace.mask) for root in (logits, weight))
    if dialect == "cuda":
        logits, weight = _distances(logits), _distances(weight)
    where = dict(trace.where)
    for new, old in ((logits, trace.logits), (weight, trace.weight), (output, trace.output)):
        if old in where:
            where.setdefault(new, where[old])
    trace = replace(trace, logits=logits, weight=weight, output=output, where=where)
    return _Emitter(trace, storage, dialect, device_scalars).hooks(head_dim, classes)


def _differences(root: Node | None, mask: Node | None) -> Node | None:
    """|q - kv| and max(q - kv, 0) become q - kv where the mask keeps no later key: what they are of the others is never seen."""
    if root is None or mask is None:
        return root
    causal = any(
        bound.unit is None and (bound.cq, bound.ck) == (1, -1) and _never_wraps(bound) and sum(sign * node.attr for sign, node in bound.terms) <= 0
        for bound in analyse(mask).closed
    )  # fmt: skip
    q, kv = symbol("q"), symbol("kv")
    return substitute(root, {abs(q - kv): q - kv, abs(kv - q): q - kv, maximum(q - kv, 0): q - kv}) if causal else root


def _distances(root: Node | None) -> Node | None:
    """Floats of |q - kv| as that of q - kv without its sign, which kernels have cheaply (``Hooks.distance``)."""
    if root is None:
        return None
    ahead, behind = symbol("q") - symbol("kv"), symbol("kv") - symbol("q")
    distance = to_f32(ahead)
    return substitute(root, {to_f32(abs(ahead)): abs(distance), to_f32(abs(behind)): abs(distance)})


def _never_wraps(bound: Inequality) -> bool:
    """Whether its int32 arithmetic cannot wrap for any positions; these stay below 2^30, the call checks it."""
    return (
        all(node.op == "const" for _, node in bound.terms) and bound.wq <= 1 and bound.wk <= 1
        and sum(abs(sign * node.attr) for sign, node in bound.terms) < 2**20
    )  # fmt: skip


def _dot_scale(root: Node) -> tuple[Node, Node | None]:
    """``root`` as a function of s times a row's or call's value, and that value, where s has no other use."""
    s = symbol("s")
    users = {n for n in walk(root) if any(a is s for a in n.args)}
    if len(users) != 1:
        return root, None
    (product,) = users
    others = [a for a in product.args if a is not s]
    if product.op != "mul" or len(others) != 1 or others[0].level > ROW or product is root:
        return root, None
    return substitute(root, {product: s}), others[0]


def _logit_factor(root: Node) -> tuple[Node, Node | None]:
    """The tanh that ``root`` multiplies by a call's value, and that value: a softmax has a factor already. Of a tanh, since a result within
    -1 ... 1 is neither too large for any factor nor too small."""
    if root.op == "mul":
        for bounded, factor in (root.args, root.args[::-1]):
            if bounded.op == "tanh" and factor.level <= CALL:
                return bounded, factor
    return root, None


def _reciprocals(root: Node | None) -> Node | None:
    """Division of an element by a row's, column's or call's value becomes a product with its hoisted reciprocal: one
    more rounding, a tenth of the time. Values that decide a mask keep the IEEE quotient."""
    if root is None:
        return None
    exact = discrete_inputs([root])
    quotients = {
        n: n.args[1] for n in walk(root)
        if n.op == "div" and n not in exact and n.level == ELEM and n.args[1].level < ELEM
    }  # fmt: skip
    for node, divisor in quotients.items():
        root = substitute(root, {node: node.args[0] * _reciprocal(divisor)})
    return root


def _reciprocal(divisor: Node) -> Node:
    """1 / divisor, kept finite where a divisor near 0 would make it infinite: 0 * inf is NaN where 0 / divisor is 0."""
    exact = 1.0 / divisor
    if divisor.op == "const":
        return exact
    return where(divisor == 0.0, exact, minimum(maximum(exact, -_F32_MAX), _F32_MAX))


_F32_MAX = 3.4028234663852886e38


_SYMBOL_TEXT = {
    "num_heads": "p.total_heads", "num_kv_heads": "(p.total_heads / (p.num_heads / p.num_kv_heads))",
    "request": "t.request", "q_len": "t.q_len", "kv_len": "t.kv_len", "q_offset": "t.q_offset", "kv_head": "t.kv_head",
}  # fmt: skip


class _Emitter:
    def __init__(self, trace: Trace, storage: Mapping[str, str], dialect: str, device_scalars: bool) -> None:
        self.device_scalars = device_scalars
        self.trace, self.storage, self.dialect = trace, storage, dialect
        self.exact = discrete_inputs(trace.roots().values())
        self.out = Hooks(softmax=trace.weight is None)
        self.sections = {CALL: self.out.call, TILE: self.out.tile, ROW: self.out.row, COL: self.out.col}
        self.stored: dict[Node, str] = {}
        self.names: set[str] = set(_RESERVED)
        self.zones: dict[str, ZoneMap] = {}
        self.distance: Node | None = None  # what scores may call so

    def hooks(self, head_dim: int, classes: bool) -> Hooks:
        trace, out = self.trace, self.out
        if trace.rope:
            out.rope = self.rope(head_dim)
        for name in ("query_scale", "sink"):
            if getattr(trace, name) is not None:
                self.store(getattr(trace, name), ROW, name)
                setattr(out, name, name)
        first = "weight" if trace.logits is None else "logits"
        for name in ("logits", "mask", "weight", "output"):
            node = getattr(trace, name)
            if self.dialect == "cuda" and name == "logits" and node is not None and out.softmax:
                node, factor = _logit_factor(node)
                out.logit_factor = None if factor is None else self.leaf(factor, ELEM)
            if self.dialect == "cuda" and node is not None and name == first:
                node, factor = _dot_scale(node)
                if factor is not None:
                    out.dot_scale = self.leaf(factor, ROW) or self.expression(factor, ROW)
            if self.dialect == "cuda" and name in ("logits", "weight"):
                self.distance = to_f32(symbol("q") - symbol("kv"))
            if node is not None and not (name == "mask" and node.op == "const" and node.attr):
                setattr(out, name, self.element(node))
            self.distance = None
        out.distance = any(fn is not None and "distance" in (param for _, param, _ in fn.params) for fn in (out.logits, out.weight))
        out.bounds = self.bounds()
        if out.mask is not None and self.dialect == "cuda":
            out.columns = self.columns(trace.mask)
        if classes:
            out.classes = tile_class(trace.mask, self.uniform, self.readable, self.read, self.name)
            out.zones = tuple(zone for _, zone in sorted(self.zones.items()))
        return out

    # ---- levels
    def store(self, node: Node, level: int, name: str) -> str:
        """Compute ``node`` at ``level`` under ``name``."""
        text = self.expression(node, level)
        self.sections[level].append(Value(CTYPE[node.dtype], name, text, self.where(node)))
        return name

    def leaf(self, node: Node, level: int) -> str | None:
        """The text of a value that is already at hand at ``level``, storing it at its own level if need be."""
        if node.op == "const":
            return literal(node)
        if node is self.distance:
            return "distance"
        if node.op == "param":
            return f"c.{self.ensure(node, CALL)}"
        if node.op == "sym" and node.attr in _SYMBOL_TEXT:
            return node.attr if level == TILE and node.level == TILE else _SYMBOL_TEXT[node.attr]
        if node.op == "sym":
            if level == ELEM and node.level in (ROW, COL):
                self.ensure(node, node.level)
            return node.attr
        own = node.level
        if own == CONST or own >= level:
            return None
        if own in (CALL, TILE):
            return f"{'c' if own == CALL else 't'}.{self.ensure(node, own)}"
        if level == ELEM and cost(node) > 1:
            return self.ensure(node, own)
        return None

    def ensure(self, node: Node, level: int) -> str:
        """Store ``node`` at ``level`` once; returns its name."""
        if node not in self.stored:
            if node.op == "param":
                name, text = self.name(node.attr[0]), f"p.param_{node.attr[0]}"
                if self.device_scalars:
                    text = f"p.at_{node.attr[0]} ? *p.at_{node.attr[0]} : {text}"
            elif node.op == "sym":
                name = text = node.attr
            else:
                hint = node.attr[0] if node.op == "load" else _LEVEL_HINT[level]
                text = self.expression(node, level)
                name = self.name(hint)
            self.stored[node] = name
            self.sections[level].append(Value(CTYPE[node.dtype], name, text, self.where(node)))
        return self.stored[node]

    def name(self, hint: str) -> str:
        if _MEANINGFUL.fullmatch(hint):
            hint += "_"
        candidate, n = hint, 0
        while candidate in self.names:
            n += 1
            candidate = f"{hint}{n}"
        self.names.add(candidate)
        return candidate

    def member(self, name: str, level: int) -> str:
        """How the values of ``level`` that follow reach ``name``, one of them: CUDA keeps those of a row or column in a struct."""
        structs = {CALL: "c", TILE: "t"} | ({ROW: "row", COL: "col"} if self.dialect == "cuda" else {})
        return f"{structs[level]}.{name}" if level in structs else name

    # ---- expressions
    def expression(self, root: Node, level: int, lines: list[Value] | None = None) -> str:
        """C text of ``root`` at ``level``. With ``lines``, values used twice become locals there; without, and wherever
        a text grows long, they become values of the level, so that the text stays linear in the nodes."""
        uses: Counter[Node] = Counter()
        for node in walk(root):
            for a in node.args:
                uses[a] += 2 if node.op == "load" and a.args else 1
        texts: dict[Node, str] = {}
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in texts:
                continue
            if not ready:
                text = self.leaf(node, level) if node is not root or not node.args else None
                if text is None:
                    stack.append((node, True))
                    stack.extend((a, False) for a in reversed(node.args))
                else:
                    texts[node] = text
                continue
            text = self.operation(node, [texts[a] for a in node.args])
            if node is not root:
                shared = uses[node] > 1
                if lines is not None and (shared or len(text) > _LONG_TEXT):
                    name = f"e{len(lines)}"
                    lines.append(Value(CTYPE[node.dtype], name, text, self.where(node)))
                    text = name
                elif lines is None and len(text) > (_LONG_TEXT // 4 if shared else _LONG_TEXT):
                    name = self.name(_LEVEL_HINT[level])
                    self.sections[level].append(Value(CTYPE[node.dtype], name, text, self.where(node)))
                    text = self.member(name, level)
            texts[node] = text
        return texts[root]

    def operation(self, node: Node, args: list[str]) -> str:
        if node.op == "load":
            return self.load(node, args)
        text = c_text(OPS[node.op], self.dialect, node.dtype, node.args[0].dtype, node in self.exact)
        return text.format(*map(operand, args))

    def load(self, node: Node, index: list[str], dtype: str | None = None) -> str:
        name, axes = node.attr
        stored, checks, offset = self.storage[name], [], []
        for i, (axis, text, arg) in enumerate(zip(axes, index, node.args)):
            safe = text != "at" and arg.op == "sym" and _SAFE_INDEX[self.dialect].get(axis) == arg.attr
            if not safe:
                checks.append(f"(uint32_t)({text}) < (uint32_t)p.size{i}_{name}")
            offset.append(f"(int64_t)({text}) * p.stride{i}_{name}")
        suffix = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "i32", "int64": "i64"}.get(stored, "u8")
        # Bitwise and: the checks have no side effects, and loops with && do not vectorise.
        call = f"ag_load_{suffix}(p.param_{name}, {' & '.join(f'({x})' for x in checks) or 'true'}, {' + '.join(offset)})"
        return {F32: call, I32: f"(int32_t)({call})", BOOL: f"({call} != 0)"}[dtype or node.dtype]

    def where(self, node: Node) -> str:
        for n in (node, *reversed(list(walk(node)))):
            if n in self.trace.where:
                file, line = self.trace.where[n]
                return f"{Path(file).name}:{line}"
        return ""

    def element(self, root: Node) -> ElementFn:
        lines: list[Value] = []
        result = self.leaf(root, ELEM) or self.expression(root, ELEM, lines)
        return ElementFn(self.parameters([result, *(line.expr for line in lines)]), tuple(lines), result, self.where(root))

    def columns(self, mask: Node) -> ColumnHoles:
        stored = {name for name, dtype in self.storage.items() if dtype == "uint8"}
        found = column_texts(mask, lambda node: self.leaf(node, ELEM) or self.expression(node, ELEM), self.name, stored)
        lines = tuple(Value("uint32_t", name, text) for name, text in found.lines)
        row = ElementFn(self.parameters([found.result, *(line.expr for line in lines)]), lines, found.result, self.where(mask))
        holds = ElementFn(self.parameters([found.holds]), (), found.holds, "") if found.holds else None
        return ColumnHoles(row, tuple(name for name, _ in found.terms), tuple(self.element(node) for _, node in found.terms), holds)

    def parameters(self, texts: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
        """The row and column values that texts name."""
        words = set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", " ".join(texts)))
        sections = ((self.out.row, "rows", "m"), (self.out.col, "cols", "n"))
        found = tuple((v.ctype, v.name, f"{array}.{v.name}[{i}]") for section, array, i in sections for v in section if v.name in words)
        return (*found, ("float", "distance", "distance")) if self.distance is not None and "distance" in words else found

    # ---- rope and bounds
    def rope(self, head_dim: int) -> RopeHoles:
        traced = self.trace.rope
        facts = traced.rope.structure(head_dim)
        rotate_keys = facts["keys"] == "rotate"
        rows = tuple(self.store(node, ROW, f"q_position{i}") for i, node in enumerate(traced.q_positions))
        position = self.store(traced.kv_position, COL, "kv_position") if rotate_keys else None
        kind = self.store(traced.kind, COL, "kind") if traced.kind is not None else None
        table = "(p.rope_table ? p.rope_table[request] : 0)"
        return RopeHoles(facts["rotary_dim"], facts["interleaved"], rotate_keys, rows, position, kind, table)

    def bounds(self) -> BoundsHoles:
        found = analyse(self.trace.mask)
        texts = {x: self.bound_texts(x) for x in (*found.closed, *(x for alternative in found.either for x in alternative))}
        begin, end = self.range_texts([texts[x] for x in found.closed], "0", "t.kv_len")
        either = tuple(self.range_texts([texts[x] for x in alternative], "kv_begin", "kv_end") for alternative in found.either)
        test = " && ".join(f"({texts[x].full})" for x in found.closed) or "true"
        return BoundsHoles(begin, end, test if found.exact else "false", found.exact, either)

    @staticmethod
    def range_texts(bounds: Sequence[_BoundTexts], begin: str, end: str) -> tuple[str, str]:
        """The first key, and the one after the last, that satisfy all."""
        for x in bounds:
            begin = f"ag_max64({begin}, {x.begin})" if x.begin else begin
            end = f"ag_min64({end}, {x.end})" if x.end else end
        return begin, end

    def bound_texts(self, bound: Inequality) -> _BoundTexts:
        rest, guard = self.bound_terms(bound)
        cq, ck = bound.cq, bound.ck
        unit = "" if bound.unit is None else self.uniform(bound.unit)

        def at(name: str) -> str:
            return f"ag_quotient({name}, {unit})" if unit else name

        def key(limit: str) -> str:
            return f"({limit}) * {unit}" if unit else limit

        best = sum_text(scaled(cq, at("q_hi" if cq > 0 else "q_lo")), rest)
        worst = sum_text(scaled(cq, at("q_lo" if cq > 0 else "q_hi")), scaled(ck, at("k_lo" if ck > 0 else "k_hi")), rest)
        begin = end = ""
        if ck > 0:
            begin = _guarded(guard, key(f"-({best})" if ck == 1 else f"ag_ceildiv64(-({best}), {ck})"), "0")
        elif ck < 0:
            end = _guarded(guard, key(f"{best} + 1" if ck == -1 else f"ag_floordiv64({best}, {-ck}) + 1"), "t.kv_len")
        else:
            end = _guarded(guard, f"{best} >= 0 ? t.kv_len : 0", "t.kv_len")
        return _BoundTexts(begin, end, _guarded(guard, f"{worst} >= 0", "false"))

    def bound_terms(self, bound: Inequality) -> tuple[str, str]:
        """The sum of an inequality's uniform terms, and the test that it holds: i32 arithmetic could not wrap, the unit is positive ('' if
        nothing has to be tested)."""
        constant = sum(sign * node.attr for sign, node in bound.terms if node.op == "const")
        others = [(sign, node) for sign, node in bound.terms if node.op != "const"]
        positive = [f"{self.uniform(bound.unit)} > 0"] if bound.unit is not None and bound.unit.op != "const" else []
        if _never_wraps(bound) and not positive:
            return (str(constant) if constant else ""), ""
        texts = [(sign, f"(int64_t)({self.expression(node, TILE) if node.args else self.leaf(node, TILE)})")
                 for sign, node in others]  # fmt: skip
        total = " + ".join([str(constant), *(scaled(sign, text) for sign, text in texts)])
        weight = [str(sum(abs(sign * node.attr) for sign, node in bound.terms if node.op == "const"))]
        weight += [f"ag_abs64({scaled(sign, text)})" for sign, text in texts]
        weight += [f"{bound.wq} * (ag_abs64(q_offset) + q_len)", f"{bound.wk} * (int64_t)kv_len"]
        ok, rest = self.name("bound_ok"), self.name("bound")
        tests = " && ".join([*positive, f"{' + '.join(weight)} < 2147483648LL"])
        self.out.tile.append(Value("bool", ok, tests, self.where(bound.source)))
        self.out.tile.append(Value("int32_t", rest, f"(int32_t)({total})", self.where(bound.source)))
        return f"t.{rest}", f"t.{ok}"

    # ---- classes of tiles
    def uniform(self, node: Node) -> str:
        """The text of a value that is the same for a whole tile."""
        return self.leaf(node, ELEM) or self.expression(node, TILE)

    def readable(self, node: Node) -> bool:
        """Whether there is a range of what a tile reads: on the CPU its values are at hand, on CUDA it reads along one axis."""
        if self.dialect == "cpp":
            return node.level in (ROW, COL) and node.dtype != F32
        zone = self.zones.get(node.attr[0])
        return along_one_axis(node) and (zone is None or node.args[zone.axis].level > TILE)

    def read(self, node: Node, index: Sequence[str]) -> str:
        """The range of what a tile reads; ``index``: texts of its indices' ranges, which are values where a tile has one."""
        if self.dialect == "cpp":
            name = self.ensure(node, node.level)
            found = f"ag_range_of(rows.{name}, NR)" if node.level == ROW else f"ag_range_of(cols.{name} + lo, hi - lo)"
            return f"ag_nonzero({found})" if node.dtype == BOOL else found
        name, axes = node.attr
        (axis,) = (i for i, a in enumerate(node.args) if a.level > TILE)
        entry = f"[&](int32_t at) {{ return {self.load(node, [*index[:axis], 'at', *index[axis + 1 :]], I32)}; }}"
        if node.args[axis].symbols <= {"head", "kv_head", "num_heads", "num_kv_heads"}:
            found = f"ag_entry_range(p.size{axis}_{name}, {index[axis]}, {entry})"
        else:
            self.zones[name] = ZoneMap(name, axis, axes)
            row = [text for i, text in enumerate(index) if i != axis]
            found = f"ag_zone_range(p.zones_{name}, p.zone_count_{name}, {row[0] if row else 0}, p.size{axis}_{name}, {index[axis]}, {entry})"
            for i, text in enumerate(index):  # a row that is not there
                arg = node.args[i]
                if i != axis and not (arg.op == "sym" and _SAFE_INDEX["cuda"].get(axes[i]) == arg.attr):
                    found = f"((uint32_t)({text}) < (uint32_t)p.size{i}_{name} ? {found} : Interval(0))"
        return f"ag_nonzero({found})" if node.dtype == BOOL else found


def cost(node: Node) -> int:
    """ALU operations to compute ``node`` from symbols and parameters; a tensor read counts 4."""
    return sum(4 if n.op == "load" else OPS[n.op].cost if n.op in OPS else 0 for n in walk(node))


def literal(node: Node) -> str:
    """A constant as C text."""
    if node.dtype == BOOL:
        return "true" if node.attr else "false"
    if node.dtype == I32:
        return str(node.attr) if node.attr >= 0 else f"({node.attr})" if node.attr > -(2**31) else "(-2147483647 - 1)"
    if node.attr != node.attr:
        return "NAN"
    if node.attr in (float("inf"), -float("inf")):
        return "INFINITY" if node.attr > 0 else "(-INFINITY)"
    text = f"{node.attr:.9g}"
    text = text if any(ch in text for ch in ".e") else text + ".0"
    return f"{text}f" if node.attr >= 0 and not text.startswith("-") else f"({text}f)"


def _guarded(guard: str, text: str, otherwise: str) -> str:
    return f"({guard} ? {text} : {otherwise})" if guard else text


