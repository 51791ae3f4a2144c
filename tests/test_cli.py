"""The command line, in this process: each command, its JSON, its exit status and its errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen import check as checking
from attngen import cli, doctor
from attngen.isa import CPU_ISAS
from attngen.paths import PACKAGE
from attngen.variants import library

MINE = '''
import attngen as ag

class Mine(ag.Variant):
    """A bias and a window of mine."""
    gain: ag.Scalar = 0.5
    window: ag.Scalar[int]
    bias: ag.Tensor("heads", "buckets")
    bucket: ag.Tensor("requests", "positions", dtype=int)

    def logits(self, s, at):
        return s + self.gain * self.bias[at.head, self.bucket[at.request, at.kv]]

    def mask(self, at):
        return (at.kv <= at.q) & (at.q - at.kv < self.window)
'''
TWO = "import attngen as ag\nclass A(ag.Variant): pass\nclass B(ag.Variant): pass\nboth = ag.compose(A(), B())\n"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attngen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(*argv: object) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        monkeypatch.setattr(sys, "argv", ["attngen", *map(str, argv)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_version(attngen):
    assert attngen("--version") == (0, f"attngen {ag.__version__}\n", "")



def read_json(result: tuple[int, str, str], status: int = 0) -> Any:
    assert result[0] == status, result
    return json.loads(result[1])


def test_list(attngen):
    rows = read_json(attngen("list", "--json"))
    assert [row["name"] for row in rows] == list(library())
    assert all(row["doc"] for row in rows)
    gemma = next(row for row in rows if row["name"] == "Gemma2")
    assert gemma["fields"] == {"cap": "scalar f32 = 50.0", "window": "scalar i32 = 4096"} and gemma["hooks"] == [
        "logits",
        "mask",
    ]
    status, out, _ = attngen("list")
    assert status == 0 and all(name in out for name in library())


def test_show_trace(attngen):
    status, out, _ = attngen("show", "Gemma2")
    assert status == 0 and "logits = (self.cap * tanh((s / self.cap)))" in out and "bounds: q - kv >= 0" in out
    facts = read_json(attngen("show", "Gemma2", "--json"))
    assert facts["hooks"]["mask"] and len(facts["bounds"]["closed"]) == 2 and facts["bounds"]["evaluated"] == []
    assert read_json(attngen("show", "Document", "--json"))["bounds"]["evaluated"]


def test_show_bounds(attngen, tmp_path):
    sizes = ("--q-len", 96, "--kv-len", 128, "--block-q", 32, "--block-kv", 32)
    facts = read_json(attngen("show", "Streaming", "--stage", "bounds", "--set", "sinks=4", "--set", "window=32", *sizes, "--json"))
    assert facts["closed"] == ["q - kv >= 0"] and len(facts["evaluated"]) == 1 and len(facts["terms"]) == 2
    assert facts["either"] == [["-q + kv + self.window - 1 >= 0"], ["-kv + self.sinks - 1 >= 0"]] and facts["stops"] == {}
    assert facts["tiles"] == {"EMPTY": 4, "PARTIAL": 8, "FULL": 0}  # the last query is at the last key
    assert facts["terms"][0] == {"term": "(at.kv <= at.q)", "EMPTY": 3, "PARTIAL": 3, "FULL": 6}
    picture = tmp_path / "mask.png"
    status, out, _ = attngen("show", "Document", "--stage", "bounds", *sizes, "--plot", picture)
    assert status == 0 and "classed by intervals" in out and f"drawn to {picture}" in out and picture.read_bytes().startswith(b"\x89PNG")
    assert read_json(attngen("show", "Full", "--stage", "bounds", *sizes, "--json"))["tiles"] == {"EMPTY": 0, "PARTIAL": 0, "FULL": 12}
    status, _, err = attngen("show", "Causal", "--stage", "bounds", "--block-q", 0)
    assert status == 2 and "--block-q 0: required 1 or more" in err
    status, _, err = attngen("show", "Causal", "--stage", "bounds", "--plot", tmp_path / "no" / "mask.png")
    assert status == 2 and "can be written" in err


def test_show_config_lists_candidates(attngen):
    facts = read_json(
        attngen("show", "Causal", "--stage", "config", "--dtype", "bfloat16", "--head-dim", "128", "--json")
    )
    assert (
        facts["problem"]["q_dtype"] == "bfloat16" and facts["problem"]["head_dim_v"] == 128 and len(facts["key"]) == 64
    )
    assert sum(not c["lost"] for c in facts["candidates"]) == 1
    status, out, _ = attngen("show", "Causal", "--stage", "config")
    assert status == 0 and "chosen" in out and "block_n" in out


def test_show_source_compiles_nothing(attngen, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    status, out, _ = attngen("show", "SoftCap", "--stage", "source", "--head-dim", "64")
    assert status == 0 and "ag_tanh" in out and "soft_cap.py" in out and not (tmp_path / "cache").exists()
    files = read_json(attngen("show", "SoftCap", "--stage", "source", "--isa", "avx2", "--json"))
    assert files["files"][files["main"]] and "functions.h" in files["files"]


def test_show_for_a_gpu(attngen):
    """Every row-tile class with its losers, the planner, and why Hopper's own kernel does not serve."""
    shown = read_json(attngen("show", "Causal", "--stage", "config", "--arch", "sm_90a", "--head-dim", "128", "--json"))
    assert [k["kernel"] for k in shown["kernels"]] == ["decode", "decode", "attention_sm90", "attention_sm90", "plan"]
    assert shown["not_hopper"] == "" and all(sum(not c["lost"] for c in k["candidates"]) == 1 for k in shown["kernels"][:-1])
    status, out, _ = attngen("show", "StreamingLLM", "--stage", "config", "--arch", "9.0a", "--kernel", "attention_sm80")
    assert status == 0 and "no attention_sm90: queries are rotated in several ways" in out and "decode" not in out
    status, out, _ = attngen("show", "Llama3RoPE", "--stage", "config", "--arch", "9.0a", "--head-dim", "128", "--page-size", "5", "--kernel", "attention_sm90")
    assert status == 0 and "gather: pages are no multiples of 8" in out and "rotating_registers: a warpgroup turns" in out
    status, out, _ = attngen("show", "Causal", "--stage", "source", "--arch", "sm_80", "--page-size", "0", "--kernel", "decode")
    assert status == 0 and "__global__" in out and "page_table[" not in out


def test_check_a_users_file(attngen, mine):
    report = read_json(attngen("check", mine, "--dtype", "float32", "--json"))
    assert report["passed"] and len(report["results"]) == len(checking.CASES)
    assert all(0 <= row["error"] < 1e-5 and row["ok"] and row["compile_seconds"] > 0 for row in report["results"])
    assert report["invented"] == [
        "window: a third of kv_len",
        "bias[heads, buckets]: random floats",
        "bucket[requests, positions]: random ints 0 to 3",
    ]
    status, out, _ = attngen("check", f"{mine}:Mine", "--dtype", "float32", "--set", "window=9", "--set", "gain=2")
    assert status == 0 and "Mine(gain=2.0, window=9) against the float64 oracle" in out
    assert "(cached)" in out and "Mine: 5 checks, passed" in out and "window: a third" not in out


def test_check_fails_where_a_kernel_is_wrong(attngen, monkeypatch):
    right = checking.run.attention

    def wrong(*args: Any, **options: Any) -> Any:
        out, lse = right(*args, **options)
        return out + 1e-3, lse

    monkeypatch.setattr(checking.run, "attention", wrong)
    status, out, _ = attngen("check", "Causal", "--dtype", "float32")
    assert status == 1 and "5 FAILED" in out and "required" in out
    report = read_json(attngen("check", "Causal", "--dtype", "float32", "--json"), status=1)
    assert not report["passed"] and all("elements differ" in row["reason"] for row in report["results"])


@pytest.mark.parametrize("name", library())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_torch_the_yardstick_is_near_the_oracle(name, dtype):
    """No kernel: the yardstick itself must mean what the oracle means, or a wrong kernel could hide behind it."""
    variant = library()[name]()
    for case in checking.CASES:
        q, k, v = checking.inputs(case, dtype, 64)
        params, _ = checking.invent(variant, case)
        plain = checking.plain_torch(variant, q, k, v, case.kv_lens, params)
        oracle = checking.run.reference(q, k, v, variant, kv_lens=case.kv_lens, **params)
        assert plain.dtype == dtype and plain.shape == oracle.shape
        assert (plain.double() - oracle).abs().max() < (1e-5 if dtype == torch.float32 else 2**-6) * (1 + oracle.abs().max())


@pytest.mark.parametrize("command", ["check", "run"])
def test_devices(attngen, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = attngen(command, "Causal", "--device", "cuda")
    assert status == 2 and "no CUDA device here" in err
    status, _, err = attngen(command, "Causal", "--device", "tpu")
    assert status == 2 and "device 'tpu': required" in err


@pytest.mark.gpu
def test_check_and_run_on_a_gpu(attngen):
    report = read_json(attngen("check", "Gemma2", "--device", "cuda", "--json"))
    assert report["passed"] and report["device"] == "cuda:0" and len(report["results"]) == 2 * len(checking.CASES)
    assert attngen("check", "ALiBiSlopes", "--device", "cuda", "--dtype", "float16")[0] == 0
    facts = read_json(attngen("run", "Causal", "--device", "cuda", "--json"))
    assert facts["dtype"] == "bfloat16" and facts["ms"] > 0 and len(facts["keys"]) > 1


class Biased(ag.Variant):
    """A bias whose rounding to bfloat16 is an error of 0.5 at position 300."""

    slope: ag.Scalar = 0.5

    def logits(self, s, at):
        return s + self.slope * at.kv

    def mask(self, at):
        return at.kv <= at.q


def test_check_does_not_forgive_what_bfloat16_positions_would(monkeypatch):
    right = checking.run.attention
    monkeypatch.setattr(checking.run, "attention", lambda q, k, v, variant, **given: right(q, k, v, variant, **given, slope=0.485))
    results = list(checking.check(Biased(), ["bfloat16"], cases=checking.CASES[:2]))
    assert not any(r.ok for r in results), results


def test_bound_tensors_that_fit_the_grid_are_kept(tmp_path):
    file = tmp_path / "bound.py"
    file.write_text(
        "import torch, attngen as ag\nclass V(ag.Variant):\n    table: ag.Tensor('n')\n    slopes: ag.Tensor('heads')\n"
        "    def logits(self, s, at): return s + self.table[0] + self.slopes[at.head]\n"
        "mine = V(table=torch.ones(5), slopes=torch.ones(32).bfloat16())\n"
    )
    variant = cli.load_variant(f"{file}:mine")
    params, notes = checking.invent(variant, checking.CASES[0])
    assert list(params) == ["slopes"] and params["slopes"].shape == (4,) and params["slopes"].dtype == torch.bfloat16
    assert notes == ["slopes[heads]: random floats: the bound one does not fit the grid"]


def test_run(attngen):
    argv = ("run", "Causal", "--q-len", 40, "--heads", 4, "--kv-heads", 2, "--repeat", 2)
    facts = read_json(attngen(*argv, "--json"))
    assert facts["sizes"] == "b=1 h=4/2 q=40 kv=40" and facts["gflops"] > 0 and facts["ms"] > 0
    status, out, _ = attngen(*argv)
    assert status == 0 and "GFLOP/s" in out and "Causal b=1 h=4/2 q=40 kv=40 d=64 float32" in out


def test_cache_commands(attngen, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    assert attngen("cache", "path") == (0, f"{tmp_path / 'cache'}\n", "")
    assert read_json(attngen("cache", "ls", "--json")) == {"path": str(tmp_path / "cache"), "bytes": 0, "kernels": []}
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    assert read_json(attngen("cache", "clear", "--json"))["removed"] == 0
    monkeypatch.undo()


def test_cache_ls_names_kernels(attngen):
    key = read_json(attngen("run", "Causal", "--q-len", 8, "--repeat", 1, "--json"))["key"]
    rows = {row["key"]: row for row in read_json(attngen("cache", "ls", "--json"))["kernels"]}
    # The name is that of the first variant of this structure: another test may have built it.
    assert rows[key]["variant"] and rows[key]["head_dim"] == 64 and rows[key]["compile_s"] > 0
    status, out, _ = attngen("cache", "ls")
    assert status == 0 and key[:12] in out and "kernels," in out


def test_doctor(attngen, monkeypatch):
    report = read_json(attngen("doctor", "--json"))
    assert report["cpu_backend"] and all(f["ok"] for f in report["findings"] if f["required"])
    status, out, _ = attngen("doctor")
    assert status == 0 and "the CPU backend works here" in out and "C++ compiler" in out
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    status, out, _ = attngen("doctor")
    assert status == 1 and "missing" in out and "apt install g++" in out and "cannot work" in out


def test_doctor_names_an_unusable_cache_folder(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(blocked / "cache"))
    finding = doctor._cache()
    assert not finding.ok and finding.required and "ATTNGEN_CACHE_DIR" in finding.remedy


ERRORS = {
    "unknown name": (["show", "gemma"], "VariantError", ["no variant 'gemma'", "Did you mean Gemma2?"]),
    "no such file": (["check", "nowhere.py"], "VariantError", ["no file nowhere.py"]),
    "two classes": (["show", "{two}"], "VariantError", ["defines 2 subclasses", "{two}:A", "{two}:B"]),
    "no such class": (["show", "{two}:C"], "VariantError", ["{two}:C", "has no such name"]),
    "no variant": (["show", "{two}:ag"], "VariantError", ["a module of that name"]),
    "an instance with --set": (["show", "{two}:both", "--set", "x=1"], "VariantError", ["an instance: give its class"]),
    "a file that fails": (["show", "{broken}"], "VariantError", ["{broken}:2:", "ZeroDivisionError", "__main__"]),
    "a file that does not parse": (["show", "{syntax}"], "VariantError", ["{syntax}:2:", "SyntaxError"]),
    "a bad hook": (["show", "{hook}"], "VariantError", ["{hook}:4:", "branches on a symbol", "ag.where"]),
    "stage": (["show", "Causal", "--stage", "ptx"], "ParameterError", ["--stage ptx", "trace, config, source or bounds"]),
    "kernel": (["show", "Causal", "--stage", "config", "--arch", "sm_90", "--kernel", "x"], "ParameterError", ["--kernel x", "attention_sm90, plan"]),
    "arch": (["show", "Causal", "--stage", "config", "--arch", "sm_70"], "UnsupportedError", ["sm_70"]),
    "no arch": (["show", "Causal", "--stage", "config", "--arch", "9.0.1"], "UnsupportedError", ["arch '9.0.1'", "sm_90a", '"9.0"']),
    "dtype": (["check", "Causal", "--dtype", "fp8"], "ParameterError", ["--dtype fp8", "float32, bfloat16, float16"]),
    "head_dim": (["show", "Causal", "--stage", "config", "--head-dim", "12"], "UnsupportedError", ["head_dim 12"]),
    "isa": (["show", "Causal", "--stage", "config", "--isa", "mmx"], "UnsupportedError", ["'mmx'"]),
    "--plot alone": (["show", "Causal", "--plot", "x.png"], "ParameterError", ["--plot says something only with --stage bounds"]),
    "--q-len alone": (["show", "Causal", "--q-len", "7"], "ParameterError", ["--q-len says something only with --stage bounds"]),
    "--page-size alone": (["show", "Causal", "--page-size", "8"], "ParameterError", ["--page-size says something only with --arch"]),
    "--isa of a GPU": (["show", "Causal", "--arch", "9.0", "--isa", "avx2"], "ParameterError", ["--isa says something only without --arch"]),
    "a Const without --set": (["show", "{const}"], "ParameterError", ["its Const gain: --set gain=..."]),
    "--set of no field": (["show", "SoftCap", "--set", "cup=1"], "ParameterError", ["--set cup=1", "(cap)"]),
    "--set of no number": (["show", "SoftCap", "--set", "cap=big"], "ParameterError", ["--set cap=big", "f32"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_message_and_status_2(attngen, tmp_path, name, monkeypatch):
    monkeypatch.delenv("ATTNGEN_DEBUG", raising=False)
    files = {
        "two": TWO,
        "broken": "import attngen as ag\n1 / 0\n",
        "syntax": "import attngen as ag\nclass (:\n",
        "const": "import attngen as ag\nclass V(ag.Variant):\n    gain: ag.Const\n",
        "hook": "import attngen as ag\nclass V(ag.Variant):\n    def logits(self, s, at):\n"
        "        return s if s > 0 else -s\n",
    }
    paths = {stem: tmp_path / f"{stem}.py" for stem in files}
    for stem, text in files.items():
        paths[stem].write_text(text)
    argv, kind, parts = ERRORS[name]
    argv = [arg.format(**paths) for arg in argv]
    status, out, err = attngen(*argv)
    assert (status, out) == (2, "") and err.startswith(f"{kind}: ") and "Traceback" not in err
    assert all(part.format(**paths) in err for part in parts), err
    error = read_json(attngen(*argv, "--json"), status=2)["error"]
    assert error["type"] == kind and all(part.format(**paths) in error["message"] for part in parts)


def test_debug_shows_the_traceback(attngen, monkeypatch):
    monkeypatch.setenv("ATTNGEN_DEBUG", "1")
    status, _, err = attngen("show", "nothing")
    assert status == 2 and "Traceback" in err and "VariantError" in err


def test_usage_errors_and_help(attngen):
    status, out, _ = attngen("-h")
    assert status == 0 and out == attngen("--help")[1]
    table = (PACKAGE.parent / "docs" / "build.md").read_text().partition("## Environment variables")[2]
    assert [name for name in re.findall(r"ATTNGEN_\w+|\bC[A-Z_]+\b", table) if name not in out] == []
    assert "Exit status: 0 well, 1 a check failed, 2 an error" in out
    assert out.index(" list ") < out.index(" check ") < out.index(" precompile ")
    assert "on the CPU 'attention'" in " ".join(attngen("tune", "-h")[1].replace("│", "").split())
    assert all(isa in attngen("show", "-h")[1] for isa in CPU_ISAS)
    assert attngen("frobnicate")[0] == 2
    assert attngen("run", "Causal", "--q-len", "0")[0] == 2
    for command in (
        ["list"],
        ["show"],
        ["check"],
        ["run"],
        ["doctor"],
        ["cache", "ls"],
        ["cache", "clear"],
        ["cache", "path"],
    ):
        status, out, _ = attngen(*command, "--help")
        assert status == 0 and "--json" in out


def test_a_file_may_import_its_neighbours(attngen, tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("GAIN = 2.5\n")
    file = tmp_path / "user.py"
    file.write_text(
        "import attngen as ag\nfrom neighbour_of_mine import GAIN\n"
        "class V(ag.Variant):\n    def logits(self, s, at): return s * GAIN\n"
    )
    assert read_json(attngen("show", file, "--json"))["hooks"] == {"logits": "(s * 2.5)"}


def test_python_m_attngen():
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-m", "attngen", "show", "Causal"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "mask = (at.kv <= at.q)" in done.stdout
