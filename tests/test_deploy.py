"""docs/deploy.md is true: its set, its variants and its Dockerfile, step by step, with a folder for each stage instead of an
image. Only what an index would send is there already."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from test_packaging import ROOT, fresh_environment, source  # noqa: F401

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
FOLDERS = "src wheels set srv".split()  # at the root of the images


def block(first: str) -> str:
    """The indented block of the page that begins with the line ``first``, up to one that begins another file."""
    found: list[str] = []
    for line in PAGE[PAGE.index(f"\n    {first}\n") + 1 :].splitlines():
        if line and not line.startswith("    ") or (found and re.fullmatch(r"    # \w+\.(py|toml)", line)):
            break
        found.append(line)
    return textwrap.dedent("\n".join(found)).strip() + "\n"


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, arguments) of each stage of the Dockerfile."""
    found: list[list[tuple[str, str]]] = []
    for line in block("FROM python:3.12 AS build").replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word:
            found[-1].append((word, rest.strip()))
    return found


class Stage:
    """An image under construction: folders below ``root`` stand for those at an image's root, and pip is the environment's."""

    def __init__(self, root: Path, context: Path, built: Path | None) -> None:
        self.root, self.context, self.built = root, context, built
        self.python = fresh_environment(root / "env")
        pip = root / "env" / "bin" / "pip"
        pip.write_text(f'#!/bin/sh\nexec {self.python} -m pip --disable-pip-version-check "$@"\n')
        pip.chmod(0o755)
        self.env = {
            "PATH": f"{root / 'env' / 'bin'}:{os.environ['PATH']}", "HOME": str(root / "home"), "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # which means: without
            **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "CUDA_HOME", "CXX") if name in os.environ},
        }  # fmt: skip

    def here(self, text: str, root: Path | None = None) -> str:
        return re.sub(rf"(?<![\w./])/({'|'.join(FOLDERS)})\b", rf"{root or self.root}/\1", text)

    def do(self, word: str, rest: str) -> None:
        if word == "RUN":
            for command in rest.split(" && "):
                self.run(command)
        elif word == "COPY":
            words = shlex.split(rest)
            origin = self.built if words[0] == "--from=build" else self.context
            *sources, target = [w for w in words if not w.startswith("--")]
            into = Path(self.here(target))
            for name in sources:
                path = Path(self.here(name, self.built)) if origin is self.built else self.context / name
                into.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, into, dirs_exist_ok=True)
                else:
                    into.mkdir(exist_ok=True)
                    shutil.copy(path, into)
        elif word == "ENV":
            name, _, value = rest.partition("=")
            self.env[name] = value
        else:
            assert word in ("FROM", "USER"), word

    def run(self, command: str) -> str:
        if "nvidia-cuda-nvcc" in command:  # 100 MB; the set of this test is for a CPU
            from attngen import build

            named = next(line for line in Path(build.__file__).read_text().splitlines() if "do: pip install nvidia-cuda-nvcc" in line)
            assert set(re.findall(r"nvidia-[\w-]+", command)) == set(re.findall(r"nvidia-[\w-]+", named))
            return ""
        done = subprocess.run(["/bin/sh", "-c", self.here(command)], env=self.env, capture_output=True, text=True, cwd=self.root)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def served(source, tmp_path_factory) -> tuple[Stage, str]:  # noqa: F811
    """The serving stage after all steps, and its command."""
    folder = tmp_path_factory.mktemp("images")
    context = folder / "context"
    context.mkdir()
    shutil.copytree(source, context / "attngen")
    set_of_page = block("# llama.toml")
    for_a_cpu = re.sub(r"archs = \[.*?\]", 'archs = ["cpu"]', re.sub(r"head_dims = \[.*?\]", "head_dims = [32]", set_of_page))
    assert for_a_cpu != set_of_page
    (context / "llama.toml").write_text(for_a_cpu)
    for name in ("mine.py", "serve.py"):
        (context / name).write_text(block(f"# {name}"))
    building, serving = stages()
    build = Stage(folder / "build", context, None)
    for step in building:
        build.do(*step)
    serve, command = Stage(folder / "serve", context, folder / "build"), ""
    for word, rest in serving:
        if word == "CMD":
            command = shlex.join(json.loads(rest))
        else:
            serve.do(word, rest)
    return serve, command


def test_the_dockerfile_builds_and_serves(served):
    serve, command = served
    for path in (serve.root / "srv").rglob("*.py"):  # the image has /srv at its root
        path.write_text(serve.here(path.read_text()))
    serve.env |= {"PATH": str(serve.root / "env" / "bin"), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    before = {p: p.lstat().st_mtime_ns for p in serve.root.rglob("*")}
    output = serve.run(command)
    assert re.search(r"set llama: [1-9]\d* kernels in [\d.]+ ms \(\d+ from pack:llama; host extension", output), output
    assert {p: p.lstat().st_mtime_ns for p in serve.root.rglob("*")} == before
    # Where the file of a variant is forgotten, warm-up says which.
    (serve.root / "srv" / "mine.py").rename(serve.root / "mine.py")
    program = f"import attngen as ag; ag.warmup(ag.load_set('{serve.root}/srv/llama.attnpack', jit=False))"
    done = subprocess.run([serve.python, "-c", program], env=serve.env, capture_output=True, text=True)
    assert done.returncode and f"do: copy mine.py to {serve.root}/srv" in done.stderr, done.stderr


def test_the_set_of_the_page_is_for_its_gpus(tmp_path):
    """Traced, not built: every kernel of the page's own set, for the GPUs that it names."""
    from attngen.sets import VariantSet
    from attngen.units import units_of

    (tmp_path / "llama.toml").write_text(block("# llama.toml"))
    (tmp_path / "mine.py").write_text(block("# mine.py"))
    units = units_of(VariantSet(tmp_path / "llama.toml"))
    assert {u.facts["arch"] for u in units} == {"90a", "80"}
    assert {u.facts["variant"] for u in units} == {"Causal", "Gemma2", "mine.py:Mine", "mine.py:Chunks", "append_kv"}
    assert {(u.facts["head_dim"], u.facts["head_dim_v"]) for u in units} == {(128, 128), (192, 128)}
