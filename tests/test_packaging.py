"""The package from a wheel, an editable install and a bare checkout: each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_faults import one_pack, serve_strictly

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("attngen", "templates", "variants", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

# What every kind of install must give. Prints where it found things.
USE = """
import importlib.metadata, pkgutil, sys
import attngen
from attngen import load, paths
import attngen.variants
names = [name for _, name, _ in pkgutil.iter_modules(attngen.variants.__path__)]
assert names, attngen.variants.__path__
for name in names:
    __import__(f"attngen.variants.{name}")
    assert sys.modules[f"attngen.variants.{name}"].__name__ == f"attngen.variants.{name}"
assert list((paths.templates_dir() / "cpu").glob("*.jinja")), paths.templates_dir()
assert paths.variants_dir().joinpath("__init__.py").samefile(attngen.variants.__file__)
assert all(path.is_file() for path in load.HOST_SOURCES)
print(attngen.__file__, paths.templates_dir(), load.host().__spec__.origin, sep="|")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is shipped: building in the checkout would leave things in it."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SHIPPED:
        path = ROOT / name
        shutil.copytree(path, folder / name, ignore=ignore) if path.is_dir() else shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache: the editable install and the bare checkout, of one source, share one host extension."""
    return tmp_path_factory.mktemp("shared") / "cache"


def run(*argv: object, cwd: Path | None = None, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [*map(str, argv)], cwd=cwd, env={**clean, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """A virtual environment without attngen, which borrows torch and the others from ours: returns its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A folder named in a .pth file serves imports; .pth files inside it, as our own editable install's, do not run.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-c", "from importlib.util import find_spec as f; assert f('torch') and not f('attngen')", cwd=folder)
    return python


def install(python: Path, *what: object, **env: str) -> None:
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps", *what, **env)


def found(python: Path, cache: Path, **env: str) -> list[Path]:
    output = run(python, "-c", USE, cwd=cache.parent, ATTNGEN_CACHE_DIR=str(cache), **env)
    return [Path(part) for part in output.strip().splitlines()[-1].split("|")]


def test_wheel(source, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    wheel = next(tmp_path.glob("attngen-*.whl"))
    packed = set(zipfile.ZipFile(wheel).namelist())
    for top, inside in (("attngen", "attngen"), ("templates", "attngen/templates"), ("variants", "attngen/variants")):
        for path in (source / top).rglob("*"):
            if path.is_file():
                assert f"{inside}/{path.relative_to(source / top).as_posix()}" in packed
    python = fresh_environment(tmp_path / "env")
    install(python, wheel)
    package, templates, host = found(python, tmp_path / "cache", PATH="/nowhere")  # no compiler is needed any more
    assert package.is_relative_to(tmp_path / "env")
    assert templates == package.parent / "templates"
    assert host.parent == package.parent
    assert (tmp_path / "env" / "bin" / "attngen").is_file()
    serve_strictly(str(python), one_pack(tmp_path))  # the wheel and a pack are all that a server needs


def test_sdist_holds_all_that_a_wheel_needs(source, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source)
    (tmp_path / "unpacked").mkdir()
    run("tar", "-xzf", next(tmp_path.glob("*.tar.gz")), cwd=tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    for name in SHIPPED:
        for path in [source / name, *(source / name).rglob("*")]:
            if path.is_file() and "egg-info" not in str(path):
                assert (unpacked / path.relative_to(source)).is_file(), path


def test_editable_and_without_a_compiler(source, cache, tmp_path):
    """pip goes on where the extension cannot be built; a machine that has a compiler later builds it at first use."""
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    python = fresh_environment(tmp_path / "env")
    install(python, "--no-build-isolation", "-e", checkout, CXX="/nowhere/g++", CC="/nowhere/gcc")
    assert not list((checkout / "attngen").glob("_host*.so"))
    package, templates, host = found(python, cache)
    assert package == checkout / "attngen" / "__init__.py"
    assert templates == checkout / "templates"
    assert host.is_relative_to(cache)


def test_bare_checkout(source, cache, tmp_path):
    python = fresh_environment(tmp_path / "env")
    package, templates, host = found(python, cache, PYTHONPATH=str(source))
    assert package == source / "attngen" / "__init__.py"
    assert templates == source / "templates"
    assert host.is_relative_to(cache)


# Blocks what the extras bring (argv[1]), then does what README's "Install" promises.
WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
from pathlib import Path

for name in sys.argv[1].split(","):
    sys.modules[name] = None
import torch
import attngen as ag
from attngen.cli import app

for module in pkgutil.walk_packages(ag.__path__, "attngen."):
    if module.name != "attngen.__main__" and not module.name.startswith("attngen.integrations."):
        importlib.import_module(module.name)

Path("llama.toml").write_text('[[kernels]]\\nvariants = ["Causal"]\\nhead_dims = [32]')
Path("gpu.toml").write_text('[[kernels]]\\nvariants = ["Causal"]\\nphases = ["decode", "append", "merge", "mask"]\\narchs = ["9.0a"]')
for command in ("precompile gpu.toml --dry-run", "precompile llama.toml", "cache export llama.toml -o llama.attnpack",
                "check Causal --head-dim 32 --dtype float32", "run Causal --head-dim 32 --q-len 8", "show Causal --stage bounds"):
    app(command.split(), standalone_mode=False)
ag.warmup(ag.load_set("llama.attnpack", jit=False))

q, k, v = torch.randn(3, 1, 64, 2, 32)
keep = torch.rand(1, 64, 64) < 0.5
ag.attention(q, k, v, ag.variants.CustomMask(), **ag.custom_mask(keep))
sparse = ag.BlockSparseAttention(ag.variants.Causal(), num_heads=2, num_kv_heads=2, head_dim=32, R=16, C=16, max_q_tokens=64,
                                 max_kv_tokens=64, masked=True, dtype=torch.float32, device="cpu")
sparse.plan([0, 1, 3, 5, 7], [0, 0, 1, 1, 2, 2, 3], mask=torch.ones(7, 16, 16, dtype=torch.bool))
sparse.run(q[0], k[0], v[0])
exec(compile(sys.argv[2], "README.md", "exec"), {"__name__": "readme"})
"""


def test_nothing_of_the_extras_is_needed(tmp_path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"\W", word)[0] for words in extras.values() for word in words} - {"setuptools", "pydantic"}  # torch and typer import them
    assert {"numpy", "matplotlib", "cryptography"} <= names
    examples = "".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S))
    run(sys.executable, "-c", WITHOUT_EXTRAS, ",".join(sorted(names)), examples, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_constraints_pin_every_dependency():
    """`make setup` is repeatable: nothing that is installed beside attngen floats."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["demo"]]
    names = {word.split(">")[0].split("=")[0].strip().lower() for word in wanted}
    assert names <= pinned
