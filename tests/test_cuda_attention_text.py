"""The portable attention kernel without a GPU: it renders for every variant and head size, nvcc takes it for every
architecture, and ptxas reports what the configurations promise."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import attngen as ag
import pytest
from attngen import Variant, compose, variants
from attngen.abi import Layout, parameter_fields
from attngen.abi_cuda import ATTENTION_FIELDS, zone_fields
from attngen.choose_cuda import ARCHS, AttentionConfig, choose_attention, cuda_flags
from attngen.emit import Hooks, emit
from attngen.errors import UnsupportedError
from attngen.ops import BOOL, F32, I32
from attngen.render_cuda import render_cuda
from attngen.spec import Problem
from toolchain import NVCC, needs_nvcc

STORED = {F32: "float32", I32: "int32", BOOL: "bool"}
REGISTERS_PER_SM = 65536

LIBRARY = {
    "full": variants.Full(),
    "causal": variants.Causal(),
    "window": variants.SlidingWindow(256),
    "gemma2": variants.Gemma2(),
    "alibi": variants.ALiBi(),
    "t5": variants.T5Bias(),
    "sinks": variants.Sinks(),
    "gpt_oss": variants.GptOss(),
    "sigmoid": variants.Sigmoid(),
    "document": compose(variants.Document(), variants.Causal()),
    "streaming_llm": variants.StreamingLLM(),
    "llama3_rope": compose(variants.Llama3RoPE(), variants.Causal()),
    "llama4_temperature": compose(variants.Llama4Temperature(), variants.Causal()),
}


def render(
    variant: Variant, arch: str = "90a", d: int = 128, dv: int | None = None, dtype: str = "bfloat16",
    block_m: int = 128, paged: bool = True, split: int = 0,
) -> tuple[dict[str, str], AttentionConfig]:  # fmt: skip
    """Files of the kernel in its default configuration."""
    used = variant.trace.used()
    storage = {name: STORED[f.dtype] for name, f in used.items() if f.kind == "tensor"}
    hooks: Hooks = emit(variant.trace, storage, d, "cuda", device_scalars=True)
    problem = Problem("cuda", arch, dtype, dtype, dtype, d, dv or d, tuple(storage.items()))
    config = choose_attention(problem, arch, hooks, block_m, paged, split).config
    zones = zone_fields(tuple(zone.name for zone in hooks.zones), writes=False)
    layout = Layout(ATTENTION_FIELDS + parameter_fields(used, storage, device_scalars=True) + zones)
    return render_cuda("attention_sm80", hooks, config, layout, problem, variant.name), config


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("paged", [False, True])
def test_renders_every_variant(name: str, paged: bool) -> None:
    files, _ = render(LIBRARY[name], paged=paged)
    source = files["attention_sm80.cu"]
    assert {"math.cuh", "ptx.cuh", "work.cuh"} < files.keys()
    assert "{{" not in source and "{%" not in source


def test_full_blocks_carry_no_mask() -> None:
    """The mask enters the body of masked blocks only, and a variant without hooks on scores has none in full ones."""
    source = render(LIBRARY["causal"])[0]["attention_sm80.cu"]
    assert "if (masked) apply_hooks(" in source
    assert "if (masked) apply_hooks(" not in render(LIBRARY["gemma2"])[0]["attention_sm80.cu"]
    assert "hook_mask" not in render(LIBRARY["full"])[0]["attention_sm80.cu"]


def test_a_layout_is_compiled_in() -> None:
    assert "page_table" not in render(LIBRARY["full"], paged=False)[0]["attention_sm80.cu"].split("struct Call")[1]
    assert "page_table" in render(LIBRARY["full"], paged=True)[0]["attention_sm80.cu"].split("struct Call")[1]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("d", [32, 64, 80, 96, 112, 128, 192, 256])
def test_a_configuration_fits(arch: str, block_m: int, d: int) -> None:
    _, config = render(LIBRARY["causal"], arch, d, block_m=block_m)
    gpu = ARCHS[arch]
    assert config.smem_bytes <= gpu.smem_per_block
    assert config.blocks_per_sm * (config.smem_bytes + 1024) <= gpu.smem_per_sm
    assert config.block_m * config.halves % (16 * config.warps) == 0


def test_a_tile_that_cannot_fit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="sm_86.*shared memory"):
        render(LIBRARY["streaming_llm"], "86", 256)


# One kernel per row: each adds something that the rows before lack.
COMPILED = [
    ("90a", "causal", {}),
    ("90a", "causal", {"paged": False, "dtype": "float16"}),
    ("90a", "gemma2", {"split": 4096}),
    ("90a", "full", {"d": 64, "paged": False}),
    ("90a", "alibi", {"d": 256}),
    ("90a", "window", {"d": 192, "dv": 128}),
    ("90a", "sinks", {"d": 80, "dv": 112, "dtype": "float16"}),
    ("90a", "gpt_oss", {}),
    ("90a", "document", {"block_m": 64}),
    ("90a", "sigmoid", {}),
    ("90a", "t5", {}),
    ("90a", "llama3_rope", {}),
    ("90a", "llama4_temperature", {"d": 96}),
    ("90a", "streaming_llm", {}),
    ("90a", "causal", {"d": 256, "block_m": 64}),
    ("80", "causal", {}),
    ("80", "full", {"d": 64}),
    ("80", "gemma2", {"d": 256}),
    ("80", "sinks", {"block_m": 64}),
    ("86", "causal", {}),
    ("86", "causal", {"d": 256}),
    ("89", "causal", {"d": 64}),
    ("100", "causal", {}),
    ("120", "causal", {}),
]  # fmt: skip


def compile_cubin(files: dict[str, str], arch: str, folder: Path) -> str:
    """The ptxas report of a cubin built in ``folder``."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    command = [*NVCC, *cuda_flags(arch), "-cubin", "-o", "kernel.cubin", "attention_sm80.cu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@needs_nvcc
@pytest.mark.parametrize(("arch", "name", "options"), COMPILED)
def test_compiles(arch: str, name: str, options: dict[str, object], tmp_path: Path) -> None:
    files, config = render(LIBRARY[name], arch, **options)  # type: ignore[arg-type]
    report = compile_cubin(files, arch, tmp_path)
    assert "warning" not in report, report
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert spills
    if arch in ("80", "90a"):
        assert not any(spills), report
    registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    assert registers * config.threads * config.blocks_per_sm <= REGISTERS_PER_SM


class LongValues(Variant):
    """A row's and a column's value, each with a part that is used twice and too long to be repeated."""

    def logits(self, s, at):
        row, col = at.q * 1.0, at.kv * 1.0
        for i in range(8):
            row, col = ag.sigmoid(row * (0.5 + i) + at.head), ag.sigmoid(col * (0.25 + i))
        return s + (row * ag.tanh(row)) * (col * ag.tanh(col))


@needs_nvcc
def test_long_values_of_rows_and_columns_compile(tmp_path: Path) -> None:
    files, _ = render(LongValues())
    source = files["attention_sm80.cu"]
    assert "row.row1 = " in source and "col.col1 = " in source  # they have names
    compile_cubin(files, "90a", tmp_path)


@needs_nvcc
def test_shared_memory_is_asserted(tmp_path: Path) -> None:
    """The size that the launcher asks for is checked by the compiler, so it cannot drift from the struct."""
    files, config = render(LIBRARY["causal"])
    source = files["attention_sm80.cu"]
    files["attention_sm80.cu"] = source.replace(f"<= {config.smem_bytes}", f"<= {config.smem_bytes - 4096}")
    assert files["attention_sm80.cu"] != source
    with pytest.raises(AssertionError, match="config.smem_bytes"):
        compile_cubin(files, "90a", tmp_path)
    assert replace(config, smem_bytes=0) != config
