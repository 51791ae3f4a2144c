"""Choice of the Hopper attention kernel's configuration: candidates for a head size and kind of hooks, the first that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .choose import Preference, settle
from .choose_cuda import SMEM_RESERVED, CudaChoice, Printed, arch
from .errors import UnsupportedError
from .records import record

if TYPE_CHECKING:
    from .emit import Hooks
    from .spec import Problem


@record
class HopperConfig(Printed):
    """An attention kernel of attention_sm90.cu, beside its hooks and problem."""

    arch: str
    paged: bool
    groups: int  # computing warpgroups, 64 packed rows each
    block_n: int  # keys of a block
    stages: int  # buffers of keys and of values
    q_buffers: int  # of queries: with two, the next unit's are there when this one ends
    ping_pong: bool  # groups take turns at the tensor cores
    feeding_registers: int  # of a thread of the feeding warpgroup
    computing_registers: int
    unit_cost: int  # fixed cost of a unit, in blocks of keys
    split: int  # keys of a fixed piece (batch_invariant), a multiple of block_n; 0: none
    smem_bytes: int
    blocks_per_sm: int
    mixed: bool = False  # rows are of several requests, which share the keys
    gather: bool = False  # keys and values come row by row, by cp.async: pages that no box of the copy engine fits
    rotating_registers: int = 0  # of a thread of the warpgroup that turns keys; 0: there is none

    template, kind, head_major = "attention_sm90", "queue", False
    quiet = ("mixed", "gather", "rotating_registers")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the configuration may ask."""
        gather = "gather: pages are no multiples of 8, so that no box of the copy engine fits them: rows come by cp.async"
        rotating = "rotating_registers: a warpgroup turns queries and keys where they land, before the others multiply them"
        return (gather,) * self.gather + (rotating,) * (self.rotating_registers > 0)

    @property
    def block_m(self) -> int:
        """Packed rows of a tile."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Threads of a block: the computing warpgroups, the feeding one, and one that turns keys."""
        return 128 * (self.groups + (2 if self.rotating_registers else 1))


@record
class HopperCandidate:
    """A shape that was considered; ``lost`` says why it was not taken, and is empty for the winner."""

    groups: int
    block_n: int
    stages: int
    q_buffers: int
    ping_pong: bool
    blocks_per_sm: int
    smem_bytes: int
    lost: str


# Registers of a thread, feeding and computing, by computing warpgroups: the sums over an SM are 64 K or less. Of one there are two
# blocks an SM.
_REGISTERS = {1: (56, 200), 2: (48, 224), 3: (32, 160)}
_REGISTERS_GATHER = {1: (56, 200), 2: (56, 224), 3: (32, 160)}

# (stages, q_buffers), best first: two of queries let a unit begin while the one before ends, more stages bring its keys by then.
_BUFFERS = ((4, 2), (3, 2), (2, 2), (2, 1))

# (groups, block_n), best first, by the larger of head_dim and head_dim_v up to a bound; measured on an H100, see
# docs/perf-log.md. Blocks longer than these gain at 16k keys what they lose at 1k: a sequence's last block is emptier. Those after
# the first are for `attngen tune`, and for hooks that need much of each key.
_SHAPES = {64: ((3, 128), (2, 128), (2, 192)), 96: ((2, 128), (2, 96)), 128: ((2, 128), (2, 176), (2, 96)), 192: ((2, 112), (2, 96)), 256: ((2, 80), (2, 64))}
# The same for tiles of 64 rows. Above 128 attention_sm80 serves them.
_SHAPES_OF_64 = {64: ((1, 64), (1, 128), (1, 96)), 96: ((1, 64), (1, 96), (1, 80)), 128: ((1, 64), (1, 96), (1, 80))}

# With a warpgroup that turns keys, whose registers are the third of these, there are two that compute. A block of 512 threads starts with
# 128 registers each, and no product's output may be larger: head sizes up to 128. Longer blocks would spill.
_SHAPES_ROTATING = {64: ((2, 128), (2, 96)), 128: ((2, 80), (2, 64))}
_REGISTERS_ROTATING = {64: (56, 192, 72), 128: (32, 208, 64)}


def choose_hopper(
    problem: Problem, arch_name: str, hooks: Hooks, page_size: int | None = None, split: int = 0, prefer: Preference | None = None,
    most_rows: int = 0, mixed: bool = False,
) -> CudaChoice[HopperConfig, HopperCandidate]:
    """The Hopper kernel for ``problem``. ``page_size``: of the KV cache, None without pages; multiples of 8 give one kernel, all others
    another, which gathers rows. ``split``: keys of a fixed piece, 0 for none; ``prefer``: a candidate to take if it fits; ``most_rows``: of
    a tile, if it is to be 64; ``mixed``: its rows are of several requests.

    Raises UnsupportedError where another kernel serves: see ``unserved``.
    """
    gpu, d, dv = arch(arch_name), problem.head_dim, problem.head_dim_v
    if why := unserved(problem, arch_name, hooks):
        raise UnsupportedError(f"the Hopper kernel: {why}.\n  do: use attention_sm80, which serves it")
    wide = max(d, dv)
    alone = most_rows == 64
    rotates, gather = hooks.rope is not None and hooks.rope.rotate_keys, page_size is not None and page_size % 8 != 0
    if alone and rotates:
        raise UnsupportedError("the Hopper kernel with tiles of 64 rows: turning keys for so few takes longer.\n  do: use attention_sm80")
    shapes = next((shapes for bound, shapes in (_SHAPES_OF_64 if alone else _SHAPES_ROTATING if rotates else _SHAPES).items() if wide <= bound), ())
    if not shapes:
        raise UnsupportedError(f"the Hopper kernel with tiles of 64 rows: head_dim {d}/{dv} is above 128.\n  do: use attention_sm80")
    if not alone and d == 192 and dv <= 128:
        shapes = ((2, 128), *shapes)
    blocks = 2 if alone else 1
    most_smem = min(gpu.smem_per_block, gpu.smem_per_sm // blocks - SMEM_RESERVED)
    candidates: list[HopperCandidate] = []
    possible: list[HopperCandidate] = []
    won: HopperCandidate | None = None
    for groups, block_n in shapes:
        ping_pong = wide <= 128 and groups > 1
        sizes = [(*buffers, hopper_smem_bytes(d, dv, groups, block_n, *buffers, hooks)) for buffers in _BUFFERS]
        stages, q_buffers, smem = next((s for s in sizes if s[2] <= most_smem), sizes[-1])
        lost = ""
        if split % block_n:
            lost = f"pieces of {split} keys are not made of blocks of {block_n}"
        elif smem > most_smem:
            lost = f"needs {smem} bytes of shared memory, a block has {most_smem}"
        fits = not lost
        if fits and won is not None:
            lost = f"{64 * won.groups} rows, {won.block_n} keys come first"
        candidate = HopperCandidate(groups, block_n, stages, q_buffers, ping_pong, blocks, smem, lost)
        won = won if lost else candidate
        candidates.append(candidate)
        possible += [candidate] if fits else []
    if won is None:
        raise UnsupportedError(
            f"the Hopper kernel at head_dim {d}/{dv}: no tile shape fits.\n  found: "
            + "; ".join(f"{c.groups * 64}x{c.block_n}: {c.lost}" for c in candidates) + "\n  do: use attention_sm80"
        )  # fmt: skip
    listed, won, by = settle(candidates, possible, won, prefer)
    registers = next(r for bound, r in _REGISTERS_ROTATING.items() if wide <= bound) if rotates else (_REGISTERS_GATHER if gather else _REGISTERS)[won.groups]
    config = HopperConfig(
        arch_name, page_size is not None, won.groups, won.block_n, won.stages, won.q_buffers, won.ping_pong, *registers[:2], 2, split,
        won.smem_bytes, blocks, mixed, gather, *registers[2:],
    )  # fmt: skip
    return CudaChoice(config, listed, by)


def unserved(problem: Problem, arch_name: str, hooks: Hooks) -> str:
    """Why the Hopper kernel does not serve; empty where it does."""
    d, dv, rope = problem.head_dim, problem.head_dim_v, hooks.rope
    if arch_name != "90a":
        return f"sm_{arch_name} has no wgmma"
    if d % 32 or dv % 32:
        return f"head_dim {d}/{dv} is no multiple of 32"
    if rope and len(rope.q_positions) > 1:
        return "queries are rotated in several ways, and each key asks for one of them"
    if rope and rope.rotate_keys and rope.rotary_dim % 16:
        return f"keys are rotated in {rope.rotary_dim} elements, no multiple of 16: a thread turns eight pairs"
    if rope and rope.rotate_keys and max(d, dv) > 128:
        return f"keys are rotated and head_dim {d}/{dv} is above 128: a block with a warpgroup for it has too few registers"
    return ""


def hopper_smem_bytes(d: int, dv: int, groups: int, block_n: int, stages: int, q_buffers: int, hooks: Hooks) -> int:
    """No less than the size of ``Shared`` in attention_sm90.cu, which asserts it: tiles of queries, keys and values, what hooks
    need of each key, two units, barriers."""
    tiles = 128 * groups * q_buffers * max(d, dv) + 2 * stages * block_n * (d + dv)
    values = [value for value in hooks.col if value.name not in ("kv", "kv_token")]
    cols = 4 * stages * block_n * (2 + len(values) + hooks.distance) if hooks.reads_columns else 0
    classes = hooks.classes
    ranges = 0 if classes is None else 272 + 8 * (groups + 1) * classes.rows.size
    units = 2 * (144 + 128 * groups + 8 * len(hooks.tile) + ranges)
    landed = 8 * (stages + q_buffers * groups) if hooks.rope and hooks.rope.rotate_keys else 0
    return -(-(tiles + cols + units + landed + 8 * len(hooks.call) + 384) // 1024) * 1024
