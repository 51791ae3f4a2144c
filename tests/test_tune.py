"""Measured choices: what `attngen tune` keeps, where it applies, and where it must not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import attngen as ag
import hopper_on_host
import pytest
import torch
from attngen import cache, engine, pins, run, show, tune, tuned, units
from attngen.choose import Preference, choose_cpu
from attngen.choose_cuda import choose_attention, choose_decode
from attngen.choose_hopper import choose_hopper
from attngen.isa import host_isa
from attngen.emit import emit
from attngen.sets import VariantSet
from attngen.spec import Problem
from attngen.variants import Causal, SlidingWindow

F32 = torch.float32
WORKLOAD = {"attention": tune.Workload(1, 40, 70, 2, 1)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTNGEN_TUNED", raising=False)
    monkeypatch.setattr(run, "_kernels", {})


def cpu_problem(d: int = 32) -> Problem:
    return run.problem_for(F32, d, d, {})


def others(problem: Problem) -> list[dict[str, Any]]:
    """The candidates that the rule does not take."""
    return [{k: v for k, v in vars(c).items() if k != "lost"} for c in choose_cpu(problem, problem.isa).candidates if c.lost]


def record_of(variant: ag.Variant, problem: Problem, phase: str = "attention", layout: str = "any") -> str:
    from attngen.cuda import compiler_digest

    digest = run.compiler_digest() if problem.backend == "cpu" else compiler_digest()
    return tuned.identity(variant.trace.key(problem.head_dim), problem, phase, layout, digest)


def test_the_fastest_is_kept_and_serves(monkeypatch):
    """One candidate is made the fastest; it is what the next call gets, its results are the rule's but for rounding."""
    problem, variant = cpu_problem(), Causal()
    favoured = others(problem)[-1]
    right = tune._Call.prepared

    def prepared(self: Any) -> Any:
        call = right(self)
        slow = dict(tuned.state()[0][1]) != favoured
        return lambda: (time.sleep(0.01 if slow else 0.0), call())[1]

    monkeypatch.setattr(tune._Call, "prepared", prepared)
    q, k, v = torch.randn(1, 50, 2, 32), *torch.randn(2, 1, 90, 1, 32)
    before, rule = ag.attention(q, k, v, variant), run.specialise(variant, problem)
    (result,) = tune.tune(variant, dtype=F32, head_dim=32, head_dim_v=32, page_size=None, device="cpu", workloads=WORKLOAD)
    assert dict(result.measured[result.best].shape) == favoured and result.best != result.by_rule and result.ratio < 0.9
    assert all(m.ms for m in result.measured)

    now = run.specialise(variant, problem)
    assert now[1].by.startswith("measured on") and now[1].config.block_m == favoured["block_m"] and now[-1] != rule[-1]
    assert [c.lost for c in now[1].candidates].count("") == 1
    monkeypatch.setattr(run, "_kernels", {})
    assert run.kernel_for(variant, problem).choice == now[1]
    after = ag.BatchAttention(variant, num_heads=2, num_kv_heads=1, head_dim=32, max_requests=1, max_q_tokens=50, max_kv_tokens=90, dtype=F32, device="cpu")
    after.plan([0, 50], [0, 90])
    torch.testing.assert_close(after.run(q[0], (k[0], v[0])), before[0], rtol=1e-5, atol=1e-6)

    for elsewhere in (cpu_problem(40), run.problem_for(torch.float16, 32, 32, {})):
        assert run.specialise(variant, elsewhere)[1].by == "rule"
    assert run.specialise(SlidingWindow(), problem)[1].by == "rule"
    monkeypatch.setenv("ATTNGEN_TUNED", "off")
    assert run.specialise(variant, problem)[1] == rule[1] and run.kernel_for(variant, problem).spec_hash == rule[-1]
    monkeypatch.setenv("ATTNGEN_TUNED", "perhaps")
    with pytest.raises(ag.ParameterError, match="ATTNGEN_TUNED=perhaps: required on or off"):
        run.specialise(variant, problem)


def test_a_record_selects_and_does_not_invent(monkeypatch):
    problem, variant = cpu_problem(), Causal()
    rule, name = run.specialise(variant, problem)[1], record_of(variant, problem)
    path = cache.default().base / "tuned" / f"{name}.json"
    tuned.keep(name, {"shape": others(problem)[0], "why": "measured"})
    assert run.specialise(variant, problem)[1].by == "measured"
    for shape in ({"block_m": 4096}, {"nr": 3}, {"mr": 99, "vectors": 2}):
        tuned.keep(name, {"shape": shape, "why": "measured"})
        assert run.specialise(variant, problem)[1] == rule
    for text in ("", "[]", "{}", '{"shape": 3, "why": "x"}', "\xff"):
        path.write_text(text, encoding="latin-1")
        assert run.specialise(variant, problem)[1] == rule
    tuned.keep(name, {"shape": others(problem)[0], "why": "measured"})
    monkeypatch.setattr(tuned, "_cpu_name", lambda: "another")
    assert run.specialise(variant, problem)[1] == rule
    monkeypatch.undo()


def test_what_differs_is_left_out(monkeypatch):
    """A candidate whose output is not the rule's is not timed; neither is one that cannot be built."""
    listed = others(cpu_problem())
    right = tune._Call.prepared

    def prepared(self: Any) -> Any:
        shape = dict(tuned.state()[0][1])
        if shape == listed[0]:
            raise ag.BuildError("no compiler today\nlog")
        call = right(self)
        return lambda: call() * 1.001 if shape == listed[1] else call()

    monkeypatch.setattr(tune._Call, "prepared", prepared)
    (result,) = tune.tune(Causal(), dtype=F32, head_dim=32, head_dim_v=32, page_size=None, device="cpu", workloads=WORKLOAD)
    found = {str(dict(m.shape)): m for m in result.measured}
    assert found[str(listed[0])].left_out == "no compiler today" and found[str(listed[1])].left_out == "its result is another one"
    assert sum(m.ms is None for m in result.measured) == 2 and result.measured[result.best].ms


def test_sets_are_built_by_rule(tmp_path):
    """Wherever a set is built its keys are the same; what it pins goes before what was measured."""
    problem, variant = cpu_problem(), Causal()
    rule = run.specialise(variant, problem)[-1]
    tuned.keep(record_of(variant, problem), {"shape": others(problem)[0], "why": "measured"})
    file = tmp_path / "mine.toml"
    file.write_text('[[kernels]]\nvariants = ["Causal"]\nhead_dims = [32]\ndtypes = ["float32"]\narchs = ["cpu"]\nphases = ["decode", "prefill"]\n')
    (unit,) = [u for u in units.units_of(VariantSet(file)) if u.facts["backend"] == "cpu"]
    assert [job.key for job in unit.jobs] == [rule] and unit.jobs[0].build()[0].key == rule
    measured = run.specialise(variant, problem)[-1]
    assert measured != rule
    ag.load_set(str(file), jit=True)
    try:
        assert run.kernel_for(variant, problem).spec_hash == rule
    finally:
        pins.unpin_all()


# ---------------------------------------------------------------- CUDA, without a GPU


def cuda_problem(d: int = 128) -> Problem:
    return Problem("cuda", "90a", "bfloat16", "bfloat16", "bfloat16", d, d, ())


@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_any_candidate_that_fits_can_be_taken(d):
    problem = cuda_problem(d)
    hooks = emit(Causal().trace, {}, d, "cuda", device_scalars=True)
    chooses = {
        "decode": lambda p: choose_decode(problem, "90a", hooks, prefer=p), "paired": lambda p: choose_decode(problem, "90a", hooks, 32, prefer=p),
        "64": lambda p: choose_attention(problem, "90a", hooks, 64, prefer=p), "128": lambda p: choose_attention(problem, "90a", hooks, prefer=p),
        "hopper": lambda p: choose_hopper(problem, "90a", hooks, 16, prefer=p),
    }  # fmt: skip
    for name, choose in chooses.items():
        rule = choose(None)
        assert rule.by == "rule"
        taken = 0
        for c in rule.candidates:
            shape = {k: v for k, v in vars(c).items() if k != "lost"}
            found = choose(Preference(shape, "measured"))
            if "shared memory" in c.lost:
                assert found == rule, (name, c)
                continue
            taken += 1
            assert found.by == "measured" and {k: v for k, v in vars(found.config).items() if k in shape} == {
                k: v for k, v in shape.items() if hasattr(found.config, k)
            }
            (chosen,) = [x for x in found.candidates if not x.lost]
            assert vars(chosen) == {**shape, "lost": ""}
            assert (found.config == rule.config) == (not c.lost)
        assert taken >= 1


def test_a_class_is_tuned_by_itself(monkeypatch, capsys):
    """Its kernel and the planner change; other classes, layouts and batch-invariant kernels do not."""
    monkeypatch.setattr(tuned, "machine", lambda problem: "NVIDIA H100 80GB HBM3")
    problem, variant = cuda_problem(), Causal()
    rule = {page_size: engine.kernels_of(variant, problem, page_size=page_size) for page_size in (16, None)}
    hooks = emit(variant.trace, {}, 128, "cuda", device_scalars=True)
    shape = {k: v for k, v in vars(choose_decode(problem, "90a", hooks).candidates[3]).items() if k != "lost"}
    tuned.keep(record_of(variant, problem, "16 rows", "pages"), {"shape": shape, "why": "measured on a whim"})
    now = engine.kernels_of(variant, problem, page_size=16)
    assert now.classes[0].config.stages == shape["stages"] != rule[16].classes[0].config.stages
    assert now.classes[0].key != rule[16].classes[0].key and [s.key for s in now.classes[1:]] == [s.key for s in rule[16].classes[1:]]
    assert [s.key for s in engine.kernels_of(variant, problem, page_size=None).classes] == [s.key for s in rule[None].classes]
    with tuned.ignored():
        assert engine.kernels_of(variant, problem, page_size=16).classes[0].key == rule[16].classes[0].key
    invariant = [engine.kernels_of(variant, problem, page_size=16, batch_invariant=True, most_rows=n).classes[0] for n in (16, 64)]
    assert [s.config.split for s in invariant] == [2048, 2048]
    show.show_cuda(variant, "config", "sm_90a", "bfloat16", 128, 128, 16, "decode", False)
    assert "chosen as measured on a whim" in capsys.readouterr().out


def test_measuring_through_the_gpu_engine(monkeypatch):
    """The Hopper kernel on this host (hopper_on_host.py): its candidates are built, agree, and are timed."""
    hopper_on_host.install(monkeypatch)
    problem, workload = cuda_problem(64), tune.Workload(1, 40, 100, 2, 1)
    hooks = emit(Causal().trace, {}, 64, "cuda", device_scalars=True)
    choice = choose_hopper(problem, "90a", hooks, 16)
    shapes = [{k: v for k, v in vars(c).items() if k != "lost"} for c in choice.candidates]
    monkeypatch.setattr(tune, "ROUNDS", 1)
    found = tune._measure(Causal(), problem, 16, "prefill", workload, torch.device("cpu"), shapes, 0, lambda text: None)
    assert len(found) >= 2 and all(m.ms for m in found), found


@pytest.mark.parametrize("heads, kv_heads, rows", [(32, 8, [1, 8, 16]), (8, 8, [1, 32, 64]), (32, 1, [None, 1, 2]), (71, 1, [None] * 3), (24, 1, [None, 1, 2])])
def test_workloads_fill_their_tiles(heads, kv_heads, rows):
    found = [tune.workload_of(phase, heads, kv_heads) for phase in engine.PHASES[:3]]
    assert [w and w.q_len for w in found] == rows


@pytest.mark.gpu
def test_tuning_on_a_gpu():
    workloads = {p: tune.workload_of(p, 8, 2, batch=4, kv_len=512) for p in engine.PHASES}
    results = list(tune.tune(Causal(), dtype=torch.bfloat16, head_dim=64, head_dim_v=64, page_size=16, device="cuda:0", workloads=workloads))
    assert [r.phase for r in results] == list(engine.PHASES) and all(r.measured[r.best].ms for r in results)
    assert all(not m.left_out or m.left_out == "does not fit" for r in results for m in r.measured)
    kernels = engine.kernels_of(Causal(), cuda_problem(64), page_size=16)
    for r, special in zip(results, kernels.classes):
        shape = r.measured[r.best].shape
        assert {k: v for k, v in shape.items() if hasattr(special.config, k)}.items() <= vars(special.config).items() | shape.items()


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    from attngen import cli

    def attngen(*argv: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["attngen", *argv])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return str(stop.value.code or 0), out.out + out.err

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    common = ("Causal", "--head-dim", "32", "--heads", "2", "--kv-heads", "1", "--kv-len", "64")
    code, text = attngen("tune", *common, "--json")
    report = json.loads(text)
    assert code == "0" and report["device"] == "cpu" and report["phases"][0]["measured"]
    (record,) = Path(cache.default().base / "tuned").iterdir()
    assert json.loads(record.read_text())["variant"] == "Causal"
    _, text = attngen("show", "Causal", "--head-dim", "32", "--stage", "config")
    assert "chosen as measured on" in " ".join(text.split())
    _, text = attngen("show", "Causal", "--head-dim", "32", "--stage", "config", "--no-tuned")
    assert "chosen by rule" in text and tuned.in_use()
    assert attngen("tune", *common, "--device", "cuda")[0] == "2"
    code, text = attngen("tune", *common, "--phase", "64 rows")
    assert code == "2" and "phase '64 rows': required 'attention' on cpu" in " ".join(text.split())
    cache.default().clear()
    assert not record.exists()
    assert host_isa()
