"""The spec hash: what must change it changes it, what must not does not, in every process."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attngen as ag
import pytest
import torch
from attngen import choose, run
from attngen.isa import host_isa
from attngen.paths import PACKAGE, templates_dir

SOURCE = """
import attngen as ag

class {name}(ag.Variant):
    \"\"\"{comment}\"\"\"
    {fields}

    def logits(self, {s}, at):
        {local} = {s} * self.cap  # {comment}
        return {local} + self.slopes[at.head]{extra}

    def mask(self, at):
        return at.q - at.kv < self.window
"""
FIELDS = ("cap: ag.Scalar = {cap}", "window: ag.Scalar[int] = 7", 'slopes: ag.Tensor("heads")')


def declare(
    name: str = "V",
    cap: float = 2.0,
    local: str = "x",
    s: str = "s",
    extra: str = "",
    comment: str = "A variant.",
    fields: tuple[str, ...] = FIELDS,
    file: str = "user.py",
) -> ag.Variant:
    """A variant made from source: what a key must not see can be varied."""
    text = SOURCE.format(
        name=name, fields="\n    ".join(fields).format(cap=cap), local=local, s=s, extra=extra, comment=comment
    )
    scope = {"__name__": __name__}
    exec(compile(text, file, "exec", dont_inherit=True), scope)
    return scope[name]()


def key(
    variant: ag.Variant | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    slopes: str = "float32",
    isa: str | None = None,
) -> str:
    problem = run.problem_for(dtype, head_dim, head_dim_v or head_dim, {"slopes": slopes}, isa)
    return run.specialise(variant or declare(), problem)[-1]


def test_a_key_is_a_sha256():
    assert len(key()) == 64 and int(key(), 16) >= 0 and key() == key()


CHANGES = {
    "an operation": lambda: key(declare(extra=" + 0.5")),
    "a constant": lambda: key(declare(extra=" + 0.25")),
    "another symbol": lambda: key(declare(extra=" + at.q")),
    "q's dtype": lambda: key(dtype=torch.bfloat16),
    "another dtype": lambda: key(dtype=torch.float16),
    "head_dim": lambda: key(head_dim=72),
    "head_dim_v": lambda: key(head_dim_v=72),
    "both head dims": lambda: key(head_dim=72, head_dim_v=64),
    "storage": lambda: key(slopes="bfloat16"),
    "the type of a scalar": lambda: key(declare(fields=("cap: ag.Scalar[int] = 2", *FIELDS[1:]))),
    "the axis of a tensor": lambda: key(declare(fields=(*FIELDS[:2], 'slopes: ag.Tensor("rows")'))),
    "instruction set": lambda: key(isa="avx2" if host_isa() != "avx2" else "generic"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_input_changes_the_key(change):
    others = {name: make() for name, make in CHANGES.items() if name != change}
    assert CHANGES[change]() not in {key(), *others.values()}


SAME = {
    "class name": lambda: declare(name="Another"),
    "file": lambda: declare(file="/elsewhere/deep/model.py"),
    "default of a scalar": lambda: declare(cap=30.0),
    "local variable": lambda: declare(local="scaled_logit"),
    "argument name": lambda: declare(s="score"),
    "comments": lambda: declare(comment="Other words."),
    "order of fields": lambda: declare(fields=FIELDS[::-1]),
    "an unused field": lambda: declare(fields=(*FIELDS, "spare: ag.Scalar = 1.0")),
    "value of a scalar": lambda: type(declare())(cap=9.0, window=100),
    "value of a tensor": lambda: type(declare())(slopes=torch.rand(8)),
    "written otherwise": lambda: declare(extra=" * 1.0"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_is_no_input_changes_nothing(change):
    variant = SAME[change]()
    assert key(variant) == key()
    # One key is one artifact: its parameter struct must be the same too.
    problem = run.problem_for(torch.float32, 64, 64, {"slopes": "float32"})
    assert run.specialise(variant, problem)[2].fields == run.specialise(declare(), problem)[2].fields


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler's sources and templates, copied where a test may edit them."""
    shutil.copytree(PACKAGE, tmp_path / "attngen", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(templates_dir(), tmp_path / "templates")
    monkeypatch.setattr(run, "PACKAGE", tmp_path / "attngen")
    monkeypatch.setattr(run, "templates_dir", lambda: tmp_path / "templates")
    run.compiler_digest.cache_clear()
    yield tmp_path
    run.compiler_digest.cache_clear()


def test_a_copy_elsewhere_with_other_times_has_the_same_key(copied):
    os.utime(copied / "attngen" / "emit.py", (1, 1))
    found = key()
    run.compiler_digest.cache_clear()
    shutil.rmtree(copied / "templates" / "cpu" / "__pycache__", ignore_errors=True)
    assert found == key()


@pytest.mark.parametrize(
    "file",
    [
        *(
            f"attngen/{room}.py"
            for room in ("ops", "expr", "bounds", "trace", "rope", "spec", "abi", "choose", "emit", "render", "build")
        ),
        "templates/cpu/attention.cpp.jinja",
        "templates/cpu/functions.h",
        "templates/cpu/simd.h",
    ],
)
def test_the_text_of_each_compiler_room_and_template_is_part_of_the_key(copied, file):
    before = key()
    with open(copied / file, "a") as text:
        text.write("\n")
    run.compiler_digest.cache_clear()
    assert key() != before


def test_a_new_header_changes_the_key(copied):
    before = key()
    (copied / "templates" / "cpu" / "more.h").write_text("// more\n")
    run.compiler_digest.cache_clear()
    assert key() != before


def test_rooms_that_decide_no_source_are_no_part_of_the_key(copied):
    before = key()
    for room in ("cli", "check", "cache", "load", "interp", "run", "errors"):
        (copied / "attngen" / f"{room}.py").write_text("")
    run.compiler_digest.cache_clear()
    assert key() == before


def test_flags_format_and_launch_abi_are_part_of_the_key(monkeypatch):
    found = {key()}
    for room, name, value in ((choose, "cpu_flags", lambda isa: ["-O2"]), (run, "FORMAT", 99), (run, "LAUNCH_ABI", "attngen-cpu-99")):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, value)
            found.add(key())
    assert len(found) == 4


def test_every_field_of_the_config_is_part_of_the_key(monkeypatch):
    choose_cpu = choose.choose_cpu
    config = choose_cpu(run.problem_for(torch.float32, 64, 64, {}), host_isa()).config
    found = {key()}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        other = value + "x" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1

        def changed(*args: object, name: str = field.name, to: object = other) -> object:
            choice = choose_cpu(*args)
            return dataclasses.replace(choice, config=dataclasses.replace(choice.config, **{name: to}))

        monkeypatch.setattr(choose, "choose_cpu", changed)
        found.add(key())
    assert len(found) == 1 + len(dataclasses.fields(config))


def test_keys_are_the_same_in_every_process():
    program = (
        "import torch\nfrom attngen import run\nfrom attngen.variants import library\n"
        "from attngen.fields import STORAGE\n"
        "for name, cls in library().items():\n"
        "    v = cls()\n"
        "    storage = {n: str(STORAGE[f.dtype][0])[6:] for n, f in v.trace.used().items() if f.kind == 'tensor'}\n"
        "    print(name, run.specialise(v, run.problem_for(torch.float32, 64, 64, storage))[-1])\n"
    )

    def keys(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(PACKAGE.parent)}
        return subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout

    first = keys("0")
    assert first == keys("12345")
    found = [line.split()[1] for line in first.splitlines()]
    assert len(set(found)) == len(found) > 15  # and each variant of the library has its own
