"""Choice of the CUDA kernels' configurations: listed candidates, listed rules, one printable record a kernel."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .errors import UnsupportedError
from .records import record

if TYPE_CHECKING:
    from .choose import Preference
    from .emit import Hooks
    from .spec import Problem


@record
class Arch:
    """What the choice needs to know of a GPU generation. Shared memory in bytes; a block costs 1 KB of the SM's besides."""

    name: str  # as nvcc spells it: "90a" is sm_90a
    smem_per_block: int
    smem_per_sm: int
    dependent_launch: bool  # programmatic dependent launch


_KB = 1024
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("80", 163 * _KB, 164 * _KB, False),
        Arch("86", 99 * _KB, 100 * _KB, False),
        Arch("89", 99 * _KB, 100 * _KB, False),
        Arch("90a", 227 * _KB, 228 * _KB, True),
        Arch("100", 227 * _KB, 228 * _KB, True),
        Arch("120", 99 * _KB, 100 * _KB, True),
    )
}
MOST_REQUESTS = 1024  # of a batch in which shared prefixes are looked for
MERGE_KEYS, NODE_KEYS = 64, 512  # what a row's part in a shared prefix costs beside its keys, and the prefix; in keys of one KV head
SMEM_RESERVED = 1024  # of the SM's shared memory, for each block
_OTHER_REGISTERS = 145  # of a decode thread, beside O and Q: scores, two cursors, addresses


def arch(name: str) -> Arch:
    """The Arch for a name in ARCHS; raises UnsupportedError for others."""
    if name not in ARCHS:
        raise UnsupportedError(
            f"GPU architecture sm_{name} has no CUDA kernels, use the CPU backend (device='cpu') instead; required "
            f"{', '.join(f'sm_{a}' for a in ARCHS)}"  # a line: sets go on with the CPUs' names
        )
    return ARCHS[name]


def arch_named(name: str) -> Arch:
    """The Arch for a user's "sm_90a", "sm_90", "90a" or, as sets spell it, "9.0a": of compute capability 9.0."""
    found = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)[af]?", name)
    if found is None:
        raise UnsupportedError(
            f"arch {name!r}: required the name of a GPU architecture, {', '.join(f'sm_{a}' for a in ARCHS)}, or its compute "
            'capability such as "9.0"'
        )
    return arch_of(int(found[1]), int(found[2]))


def arch_of(major: int, minor: int) -> Arch:
    """The Arch whose cubins run on a device of compute capability ``major.minor``."""
    exact = f"{major}{minor}{'a' if major == 9 else ''}"
    if exact in ARCHS:
        return ARCHS[exact]
    same_major = [a for a in ARCHS.values() if a.name.rstrip("a")[:-1] == str(major) and int(a.name.rstrip("a")[-1]) <= minor]
    return same_major[-1] if same_major else arch(exact)


def cuda_flags(arch_name: str) -> list[str]:
    """nvcc flags of a cubin for one of ARCHS."""
    name = arch(arch_name).name
    return ["-std=c++17", "-O3", f"-gencode=arch=compute_{name},code=sm_{name}", "-Xptxas", "-v", "-diag-suppress", "177"]


class Printed:
    """A record that prints as ``name=value`` of each field; of those in ``quiet`` where they are not at their default."""

    quiet: tuple[str, ...] = ()

    def __str__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return " ".join(f"{name}={value}" for name, value in values if name not in self.quiet or value != getattr(type(self), name))


Config, Candidate = TypeVar("Config"), TypeVar("Candidate")


@record
class CudaChoice(Generic[Config, Candidate]):
    """The chosen configuration, every candidate, in the order of preference, and what chose: "rule", or what was measured."""

    config: Config
    candidates: tuple[Candidate, ...]
    by: str = "rule"


class _WarpConfig(Printed):
    """What the records of kernels share that count their warps."""

    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


@record
class DecodeConfig(_WarpConfig):
    """A decode kernel, beside its hooks and problem."""

    arch: str
    paged: bool
    block_m: int  # packed rows of a tile: 16, or 32 in pairs of warps
    warps: int  # each takes 16 keys of a block, and 16 rows
    stages: int  # of a warp's ring
    blocks_per_sm: int
    q_in_smem: bool  # else in registers
    unit_cost: int  # fixed cost of a unit, in blocks of keys
    split: int  # keys of a fixed piece (batch_invariant); 0: pieces end where the workers' shares end
    smem_bytes: int
    joins: int = 0  # rows have parts in shared prefixes, too: packed rows of a tile there

    template, kind, quiet = "decode", "slices", ("joins",)
    head_major = True  # workers a head apart read neighbouring rows of a page together

    @property
    def block_n(self) -> int:
        """Keys of a block."""
        return 256 * self.warps // self.block_m


@record
class DecodeCandidate:
    """A shape that was considered; ``lost`` says why it was not taken, and is empty for the winner."""

    warps: int
    stages: int
    blocks_per_sm: int
    q_in_smem: bool
    smem_bytes: int
    lost: str


# Best first, as measured on an H100 at head_dim 128: two blocks an SM beat one with more stages and three with fewer. More than
# 128 KB in flight an SM queue up in front of HBM: 1% slower. Wide heads go down the list until they fit.
_IN_FLIGHT = 128 * _KB
_DECODE_SHAPES = tuple(
    (warps, stages, blocks) for blocks in (2, 1) for warps in (4, 2) for stages in (6, 5, 4, 3, 2)
)  # fmt: skip
# Two blocks of pairs, 7% faster than one of twice as many: they do not wait at their units' ends together.
_PAIRED_SHAPES = tuple((warps, stages, blocks) for warps, blocks in ((4, 2), (8, 1), (4, 1)) for stages in (8, 6, 5, 4, 3, 2))


def choose_decode(
    problem: Problem, arch_name: str, hooks: Hooks, block_m: int = 16, paged: bool = True, split: int = 0,
    prefer: Preference | None = None, joins: int = 0,
) -> CudaChoice[DecodeConfig, DecodeCandidate]:  # fmt: skip
    """The decode kernel for ``problem`` on ``arch_name`` with tiles of ``block_m`` (16 or 32) rows. ``split``: keys of a fixed
    piece, 0 for none; ``prefer``: a candidate to take if it fits; ``joins``: with what shared prefixes give in tiles of
    so many rows."""
    from .choose import settle

    gpu = arch(arch_name)
    d, dv = problem.head_dim, problem.head_dim_v
    check_head_dims(d, dv)
    kinds = len(hooks.rope.q_positions) if hooks.rope else 1
    candidates: list[DecodeCandidate] = []
    possible: list[DecodeCandidate] = []
    won: DecodeCandidate | None = None
    for warps, stages, blocks in _DECODE_SHAPES if block_m == 16 else _PAIRED_SHAPES:
        q_in_smem = hooks.rope is not None or dv // 2 + d // 4 + _OTHER_REGISTERS > 255
        smem = decode_smem_bytes(d, dv, block_m, warps, stages, kinds if q_in_smem else 0, hooks.softmax)
        lost = ""
        if smem > gpu.smem_per_block:
            lost = f"needs {smem} bytes of shared memory, a block has {gpu.smem_per_block}"
        elif blocks * (smem + SMEM_RESERVED) > gpu.smem_per_sm:
            lost = f"{blocks} blocks need {blocks * (smem + SMEM_RESERVED)} bytes of shared memory, an SM has {gpu.smem_per_sm}"
        fits = not lost
        if fits and stages > 2 and (in_flight := blocks * warps * 16 // block_m * stages * 32 * (d + dv)) > _IN_FLIGHT:
            lost = f"{in_flight} bytes in flight an SM queue up in front of memory, {_IN_FLIGHT} suffice"
        elif fits and won is not None:
            lost = f"{won.warps} warps, {won.stages} stages, {won.blocks_per_sm} blocks an SM come first"
        candidate = DecodeCandidate(warps, stages, blocks, q_in_smem, smem, lost)
        won = won if lost else candidate
        candidates.append(candidate)
        possible += [candidate] if fits else []
    if won is None:  # only with tiles of 32 rows
        raise UnsupportedError(
            f"decode with tiles of {block_m} rows at head_dim {d}/{dv} on sm_{arch_name}: no shape fits its shared memory.\n"
            f"  required: at most {gpu.smem_per_block} bytes\n  found: {candidates[-1].smem_bytes}\n"
            f"  do: launch tiles of 64 rows instead"
        )
    listed, won, by = settle(candidates, possible, won, prefer)
    config = DecodeConfig(arch_name, paged, block_m, won.warps, won.stages, won.blocks_per_sm, won.q_in_smem, 2, split, won.smem_bytes, joins)
    return CudaChoice(config, listed, by)


def decode_smem_bytes(d: int, dv: int, block_m: int, warps: int, stages: int, staged_queries: int, softmax: bool) -> int:
    """No less than the size of ``Shared`` in decode.cu: ring, staged queries, where the warps' results meet, the worker."""
    ring = warps * 16 // block_m * stages * 32 * (d + dv)
    queries = staged_queries * 2 * block_m * d
    meet = warps * 8 * (4 * dv + (8 if softmax else 0))
    return -(-(ring + queries + meet + 128 + 112 + 32 + 48) // 128) * 128


def most_blocks(config: Any) -> int:
    """No fewer blocks of a kernel than fit an SM at once, known before it is built."""
    if config.kind == "queue":  # persistent, with all of the SM's registers
        return config.blocks_per_sm
    return min(arch(config.arch).smem_per_sm // (config.smem_bytes + SMEM_RESERVED), 2048 // config.threads)


def check_head_dims(d: int, dv: int) -> None:
    """Raises UnsupportedError unless both head dims are multiples of 16 in 32 ... 256."""
    for name, size in (("head_dim", d), ("head_dim_v", dv)):
        if size % 16 or not 32 <= size <= 256:
            raise UnsupportedError(
                f"{name} {size} on CUDA.\n  required: a multiple of 16 from 32 to 256\n  found: {size}\n"
                f"  do: pad the heads with zeros, or use the CPU backend (multiples of 8)"
            )


# ---- attention: row tiles of 64 and 128 ---------------------------------------------------------------------------------


@record
class AttentionConfig(_WarpConfig):
    """An attention kernel (attention_sm80.cu), beside its hooks and problem."""

    arch: str
    paged: bool
    block_m: int  # packed rows of a tile
    block_n: int  # keys of a block
    warps: int  # each has block_m / warps rows
    stages: int  # buffers of keys and of values
    blocks_per_sm: int
    unit_cost: int  # fixed cost of a unit, in blocks of keys
    split: int  # keys of a fixed piece (batch_invariant), a multiple of block_n; 0: none
    smem_bytes: int
    halves: int = 1  # 2: two warps have the same rows, each half of a block's keys and half of the output's columns

    template, kind, quiet = "attention_sm80", "slices", ("halves",)
    head_major = False  # workers share the keys of a head in L2


@record
class AttentionCandidate:
    """A shape that was considered; ``lost`` says why it was not taken, and is empty for the winner."""

    block_n: int
    warps: int
    stages: int
    blocks_per_sm: int
    halves: int
    smem_bytes: int
    lost: str


# (block_n, warps, stages, blocks an SM, halves), best first, as measured on an H100. Four warps of 32 rows read keys and values
# from shared memory half as often as eight of 16, but hold twice the output: up to head_dim_v 128 it fits in registers.
_NARROW = ((96, 4, 2, 2, 1), (64, 4, 2, 2, 1), (64, 4, 1, 2, 1), (64, 4, 1, 1, 1))
_USUAL = ((64, 4, 2, 2, 1), (64, 4, 1, 2, 1), (64, 4, 2, 1, 1), (64, 4, 1, 1, 1), (32, 4, 1, 1, 1), (16, 4, 1, 1, 1))
_ROWS_OF_16 = ((64, 8, 2, 1, 1), (64, 8, 1, 1, 1), (32, 8, 1, 1, 1), (16, 8, 1, 1, 1))
_SMALL = ((64, 4, 2, 3, 1), (64, 4, 2, 2, 1), (64, 4, 1, 2, 1), (64, 4, 2, 1, 1), (64, 4, 1, 1, 1), (32, 4, 1, 1, 1), (16, 4, 1, 1, 1))
# Hooks on every score, and wide keys, need registers or space beside 32 rows: fewer keys at a time. A hook that reads a
# tensor for every score needs still more: warps of 16 rows.
_FEW_KEYS = ((32, 4, 2, 2, 1), (32, 4, 1, 2, 1), (32, 4, 2, 1, 1), (32, 4, 1, 1, 1), (16, 4, 1, 1, 1))
# Wider values: pairs of warps with 32 rows (halves), which hold as much as warps of 16, where hooks leave them the registers. By count of
# instructions, not measured yet.
_PAIRS = ((64, 8, 2, 1, 2), (64, 8, 1, 1, 2), (32, 8, 1, 1, 2))


def _attention_shapes(block_m: int, d: int, dv: int, hooks: Hooks) -> tuple[tuple[int, int, int, int, int], ...]:
    functions = [fn for fn in (hooks.logits, hooks.weight, hooks.mask) if fn]
    reads = any("ag_load" in text for fn in functions for text in (fn.result, *(line.expr for line in fn.lines)))
    rotates = hooks.rope is not None and hooks.rope.rotate_keys
    if block_m == 64:
        return _SMALL
    if dv > 128 and dv % 32 == 0 and (hooks.bounds.exact or hooks.bounds.either) and not reads:
        return (*_PAIRS, *_ROWS_OF_16)
    if dv > 128 or reads:
        return _ROWS_OF_16
    if d > 128 or hooks.logits or hooks.weight or hooks.query_scale or rotates or not hooks.bounds.exact:
        return _FEW_KEYS
    if len(hooks.row) > 1:  # values of rows beside their position
        return (48, 4, 2, 2, 1), *_FEW_KEYS
    return _NARROW if max(d, dv) <= 64 else _USUAL


def choose_attention(
    problem: Problem, arch_name: str, hooks: Hooks, block_m: int = 128, paged: bool = True, split: int = 0,
    prefer: Preference | None = None,
) -> CudaChoice[AttentionConfig, AttentionCandidate]:  # fmt: skip
    """The attention kernel for ``problem`` on ``arch_name`` with tiles of ``block_m`` (64 or 128) rows. ``split``: keys of
    a fixed piece, 0 for none; ``prefer``: a candidate to take if it fits."""
    from .choose import settle

    gpu = arch(arch_name)
    d, dv = problem.head_dim, problem.head_dim_v
    check_head_dims(d, dv)
    candidates: list[AttentionCandidate] = []
    possible: list[AttentionCandidate] = []
    won: AttentionCandidate | None = None
    for block_n, warps, stages, blocks, halves in _attention_shapes(block_m, d, dv, hooks):
        smem = attention_smem_bytes(d, dv, block_m, block_n, stages, halves, hooks, paged)
        lost = ""
        if split % block_n:
            lost = f"pieces of {split} keys are not made of blocks of {block_n}"
        elif smem > gpu.smem_per_block:
            lost = f"needs {smem} bytes of shared memory, a block has {gpu.smem_per_block}"
        elif blocks * (smem + SMEM_RESERVED) > gpu.smem_per_sm:
            needed = blocks * (smem + SMEM_RESERVED)
            lost = f"{blocks} blocks need {needed} bytes of shared memory, an SM has {gpu.smem_per_sm}"
        fits = not lost
        if fits and won is not None:
            lost = f"{won.block_n} keys, {won.warps} warps, {won.stages} stages, {won.blocks_per_sm} blocks come first"
        candidate = AttentionCandidate(block_n, warps, stages, blocks, halves, smem, lost)
        won = won if lost else candidate
        candidates.append(candidate)
        possible += [candidate] if fits else []
    if won is None:
        raise UnsupportedError(
            f"attention with tiles of {block_m} rows at head_dim {d}/{dv} on sm_{arch_name}: "
            f"no tile shape fits its shared memory.\n  required: at most {gpu.smem_per_block} bytes\n"
            f"  found: {candidates[-1].smem_bytes}\n  do: launch tiles of 64 rows instead"
        )
    listed, won, by = settle(candidates, possible, won, prefer)
    config = AttentionConfig(
        arch_name, paged, block_m, won.block_n, won.warps, won.stages, won.blocks_per_sm, 4, split, won.smem_bytes, won.halves
    )
    return CudaChoice(config, listed, by)


def attention_smem_bytes(d: int, dv: int, block_m: int, block_n: int, stages: int, halves: int, hooks: Hooks, paged: bool) -> int:
    """No less than the size of ``Shared`` in attention_sm80.cu, which asserts it: queries once per kind of rotation, keys
    and values, what is computed once per row, column and tile, the work list's records, and what warps that share rows (``halves``) give each other."""
    kinds = len(hooks.rope.q_positions) if hooks.rope else 1
    pitch, pitch_v = 2 * d + 16, 2 * dv + 16
    tiles = kinds * block_m * max(pitch, pitch_v) + stages * block_n * (pitch + pitch_v)
    values = 4 * block_m * (4 + len(hooks.row)) + 8 * block_n * (2 + len(hooks.col))
    values += 8 * (len(hooks.call) + len(hooks.tile))
    if halves == 2:
        values += 2 * block_m * block_n + 8 * block_m * hooks.softmax
    places = 40 * block_n if paged else 0
    if hooks.classes is not None:
        places += 256 + 72 * hooks.classes.rows.size
    return -(-(tiles + values + places + 896) // 128) * 128


# ---- plan, append, merge ---------------------------------------------------------------------------------------------


@record
class TileClass:
    """A row-tile class as the planner sees it. Those of kind "slices" are planned as work.cuh says, those of kind "queue" as
    queue.cuh says."""

    bm: int  # packed rows of a tile
    bn: int  # keys of a block
    unit_cost: int  # in blocks
    split: int = 0  # keys of a fixed piece, a multiple of bn; 0: none
    kind: str = "slices"
    head_major: bool = False  # slices' order of units: all tiles of a KV head, then of the next; else all KV heads of a tile
    # Of kind "queue" alone:
    groups: int = 1  # warpgroups that finish their rows of a tile by themselves
    row_bytes: int = 0  # of a key and its value
    l2_bytes: int = 64 << 20  # what keys and values of a section may take: more than an H100's L2, see docs/perf-log.md
    min_piece: int = 4  # blocks of a piece, at least
    mixed: bool = False  # its requests are nodes: keys that several share (shared.py)

    def __str__(self) -> str:
        text = f"{self.bm}x{self.bn}+{self.unit_cost}" + (f"/{self.split}" if self.split else "") + ("h" if self.head_major else "")
        return text if self.kind == "slices" else f"{text}:{self.kind},groups={self.groups},row_bytes={self.row_bytes}" + (",mixed" if self.mixed else "")


def tile_class(config: Any, problem: Problem) -> TileClass:
    """The class of an attention kernel, by its configuration."""
    shape = (config.block_m, config.block_n, config.unit_cost, config.split)
    if config.kind == "slices":
        return TileClass(*shape, head_major=config.head_major)
    row_bytes = 2 * (problem.head_dim + problem.head_dim_v)
    return TileClass(*shape, "queue", groups=config.groups, row_bytes=row_bytes, mixed=config.mixed)


@record
class ZoneMap:
    """Of a tensor that a mask reads along ``axis``: least and largest of 32, and of 1024, neighbouring entries (zones.cuh)."""

    name: str
    axis: int
    axes: tuple[str | int, ...]

    def counts(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows of the map of a tensor of this shape, and zones of 32 entries in each."""
        return math.prod(n for i, n in enumerate(shape) if i != self.axis), -(-shape[self.axis] // 32)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of the map of a tensor of this shape."""
        rows, count = self.counts(shape)
        return 8 * rows * (count + -(-count // 32))


@record
class PlanConfig:
    """A planner: the classes of the kernels that it plans for, smallest tile first, and the zone maps that it builds."""

    arch: str
    classes: tuple[TileClass, ...]
    zones: tuple[ZoneMap, ...] = ()

    threads = 512  # of a block; one block a class. A thread reads a request: batches of more go in chunks

    def __str__(self) -> str:
        return " ".join((f"arch={self.arch}", *map(str, self.classes), *(f"zones:{z.name}" for z in self.zones)))


class _GridConfig(Printed):
    """What the records of kernels share that give each thread one of ``columns`` of a row, and use no shared memory."""

    columns: int
    threads: int

    def blocks(self, rows: int) -> int:
        """The grid."""
        return -(-rows * self.columns // self.threads)


@record
class AppendConfig(_GridConfig):
    """The kernel that writes new keys and values into pages, keys rotated in their first ``rotary_dim`` elements (0: none).

    Every thread takes one of ``columns`` of a token through all heads.
    """

    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    rotary_dim: int = 0
    interleaved: bool = False
    threads: int = 256

    @property
    def columns(self) -> int:
        """Columns of a token: 16 bytes of keys or values, 16 elements that are rotated, or one pair where the rotated
        part is no multiple of 16."""
        pairs = self.rotary_dim // 16 if self.rotary_dim % 16 == 0 else self.rotary_dim // 2
        return pairs + (self.head_dim - self.rotary_dim + self.head_dim_v) // 8


@record
class ShareConfig(Printed):
    """The kernel that finds shared prefixes: one cluster of ``blocks``. Costs as in shared.py."""

    arch: str
    requests: int = MOST_REQUESTS  # of a batch: each has a thread
    blocks: int = 8
    merge_keys: int = MERGE_KEYS
    node_keys: int = NODE_KEYS

    threads = 1024  # of a block: page tables are compared by all warps of all blocks

    @property
    def smem_bytes(self) -> int:
        """No less than the size of ``Shared`` in share.cu."""
        return 180 * self.requests + 1536


@record
class MaskConfig(_GridConfig):
    """The kernel that looks at the rows of a packed mask. A warp takes a row."""

    arch: str
    threads: int = 256

    columns = 32  # lanes


@record
class MergeConfig(_GridConfig):
    """The kernel that merges attention states. Every thread takes eight elements of a row (token and head) through all
    states."""

    arch: str
    dtype: str
    out_dtype: str
    head_dim_v: int
    threads: int = 256

    @property
    def columns(self) -> int:
        """Eights of a row."""
        return self.head_dim_v // 8
