"""Every CUDA template renders and compiles for every architecture, with configurations that fit, without spills."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import attngen as ag
from attngen import cuda
from attngen.abi_cuda import APPEND_FIELDS, MASK_FIELDS, MERGE_FIELDS
from attngen.choose_cuda import (
    ARCHS,
    AppendConfig,
    MaskConfig,
    MergeConfig,
    PlanConfig,
    TileClass,
    arch_named,
    arch_of,
    choose_attention,
    choose_decode,
    cuda_flags,
)
from attngen.emit import emit
from attngen.errors import UnsupportedError
from attngen.render_cuda import render_cuda
from attngen.spec import Problem
from attngen.variants import ALiBi, Causal, Gemma2, GptOss, Llama3RoPE, PrefixLM, Sigmoid, StreamingLLM
from toolchain import NVCC, needs_nvcc


HEADS = [(32, 32), (64, 64), (128, 128), (192, 128), (256, 256)]


class PerHead(ag.Variant):
    """KV heads see windows of 10, 20, 30 ..."""

    def mask(self, at):
        return (at.kv <= at.q) & (at.q - at.kv < 10 * (at.kv_head + 1))


def problem(arch: str, d: int = 128, dv: int = 128, dtype: str = "bfloat16", storage: tuple = ()) -> Problem:
    return Problem("cuda", arch, dtype, dtype, dtype, d, dv, storage)


def storage(variant: ag.Variant) -> tuple[tuple[str, str], ...]:
    stored = {"f32": "float32", "i32": "int32", "bool": "bool"}
    return tuple((n, stored[f.dtype]) for n, f in sorted(variant.trace.fields.items()) if f.kind == "tensor")


def configured(name: str, variant: ag.Variant, p: Problem, **options):
    """The chosen configuration of kernel ``name``: decode, attention_sm80 (with block_m=) or plan (with queue= for its split)."""
    hooks = emit(variant.trace, dict(p.storage), p.head_dim, dialect="cuda", device_scalars=True)
    if name == "decode":
        return choose_decode(p, p.isa, hooks, **options).config
    if name == "attention_sm80":
        return choose_attention(p, p.isa, hooks, **options).config
    if (split := options.get("queue")) is not None:
        queue = TileClass(128, 128, 2, split, "queue", groups=2, row_bytes=512)
        return PlanConfig(p.isa, (queue,) if split else (TileClass(16, 64, 2), TileClass(64, 64, 4), queue))
    return PlanConfig(p.isa, (TileClass(16, 64, 2), TileClass(64, 64, 4), TileClass(128, 64, 4)))


def files_of(name: str, variant: ag.Variant, p: Problem, **options) -> dict[str, str]:
    config = configured(name, variant, p, **options)
    special = cuda.specialise(name, variant.name, variant.trace, p, config, p.isa)
    return render_cuda(name, special.hooks, config, special.layout, special.problem, special.title)


def compile_cubin(files: dict[str, str], name: str, arch: str, folder: Path) -> str:
    """ptxas' report of the kernel; fails with the compiler's message."""
    for file, text in files.items():
        (folder / file).write_text(text)
    command = [*NVCC, "-cubin", *cuda_flags(arch), f"{name}.cu", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# What is compiled: (test id, arch, template, files). One rotation of variants over architectures, and each template's
# default configurations where spills count.
def _jobs() -> dict[str, tuple[str, str, dict[str, str], bool]]:
    jobs = {}

    def add(name, variant, arch, d=128, dv=128, dtype="bfloat16", no_spill=False, **options):
        p = problem(arch, d, dv, dtype, storage(variant))
        more = "".join(f"-{k}{v}" for k, v in options.items())
        jobs[f"{name}-{variant.name}-{arch}-{d}x{dv}{more}"] = (name, arch, files_of(name, variant, p, **options), no_spill)

    others = [Gemma2(), Sigmoid(), GptOss(), StreamingLLM(), ALiBi(), PrefixLM()]
    for arch, variant in zip(ARCHS, others):
        add("decode", variant, arch, 64, 64, "float16")
        add("attention_sm80", variant, arch, 64, 64, "float16", block_m=64)
        add("plan", variant, arch, **({"queue": 0} if arch in ("80", "100", "120") else {}))
    for arch in ("80", "90a"):
        for d, dv in HEADS:
            add("decode", Causal(), arch, d, dv, no_spill=True)
        add("decode", Causal(), arch, no_spill=True, block_m=32)
        add("attention_sm80", Causal(), arch, no_spill=True, block_m=128)
        add("attention_sm80", Causal(), arch, no_spill=True, block_m=64)
    add("plan", Causal(), "90a", queue=0)
    add("plan", PerHead(), "90a", queue=2048)
    add("decode", Llama3RoPE(), "90a", no_spill=True)
    add("decode", Llama3RoPE(), "90a", block_m=32, no_spill=True)
    add("decode", Causal(), "90a", paged=False, no_spill=True)
    add("decode", Causal(), "90a", split=256, no_spill=True)
    for arch in ARCHS:
        rotary = {"80": 0, "86": 40, "89": 64}.get(arch, 128)
        dtypes = ("float32", "bfloat16", "float16")
        plain = [("append", AppendConfig(arch, "bfloat16", 128, 128, rotary, arch == "89"), APPEND_FIELDS)]
        plain.append(("mask_rows", MaskConfig(arch), MASK_FIELDS))
        if arch in ("80", "90a"):
            plain += [("merge", MergeConfig(arch, a, b, 128), MERGE_FIELDS) for a in dtypes for b in dtypes]
        for name, config, fields in plain:
            special = cuda.specialise_plain(name, name, config, fields)
            jobs[f"{name}-{config}"] = (name, arch, render_cuda(name, None, config, special.layout, None, name), True)
    return jobs


JOBS = _jobs() if NVCC else {}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Future[str]]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return {
            key: pool.submit(compile_cubin, files, name, arch, tmp_path_factory.mktemp("cubin"))
            for key, (name, arch, files, _) in JOBS.items()
        }


@needs_nvcc
@pytest.mark.parametrize("key", JOBS)
def test_compiles(key, reports):
    report = reports[key].result()
    assert "warning" not in report, report
    registers = re.search(r"Used (\d+) registers", report)
    assert registers and int(registers[1]) <= 255
    if JOBS[key][3]:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("d", "dv"), [*HEADS, (48, 80), (160, 160), (256, 32), (32, 256), (128, 256)])
def test_configurations_fit(arch, d, dv):
    gpu = ARCHS[arch]
    for variant in (Causal(), StreamingLLM()):
        p = problem(arch, d, dv)
        hooks = emit(variant.trace, {}, d, dialect="cuda")
        choice = choose_decode(p, arch, hooks)
        assert choice.config.smem_bytes <= gpu.smem_per_block
        assert choice.config.blocks_per_sm * (choice.config.smem_bytes + 1024) <= gpu.smem_per_sm
        assert [c for c in choice.candidates if not c.lost] != [] and all(c.lost for c in choice.candidates[1:] if c.lost)
        attention = choose_attention(p, arch, hooks, 64).config
        assert attention.smem_bytes <= gpu.smem_per_block


def test_each_head_dim_renders():
    for d in range(32, 257, 16):
        assert "attngen_decode" in files_of("decode", Causal(), problem("90a", d, 288 - d))["decode.cu"]


@pytest.mark.parametrize(("d", "dv"), [(24, 64), (64, 272), (40, 40), (512, 512)])
def test_other_head_dims_refuse(d, dv):
    with pytest.raises(UnsupportedError, match="multiple of 16 from 32 to 256"):
        choose_decode(problem("90a", d, dv), "90a", emit(Causal().trace, {}, d, dialect="cuda"))


def test_architectures():
    assert arch_of(8, 0).name == "80" and arch_of(8, 7).name == "86" and arch_of(8, 9).name == "89"
    assert arch_of(9, 0).name == "90a" and arch_of(10, 3).name == "100" and arch_of(12, 1).name == "120"
    for old in ((7, 5), (6, 1), (11, 0)):
        with pytest.raises(UnsupportedError, match="no CUDA kernels"):
            arch_of(*old)
    for name in ("9.0a", "9.0", "90", "90a", "sm_90", "sm_90a", "sm_9.0a"):  # tables, sets, nvcc and people
        assert arch_named(name).name == "90a"
    assert arch_named("12.0").name == arch_named("120").name == "120" and arch_named("10.3f").name == "100"
    for name in ("9", "9.0.1", ".90", "90b", "hopper", ""):
        with pytest.raises(UnsupportedError, match='required the name of a GPU architecture, .*or its compute capability such as "9.0"'):
            arch_named(name)
