"""Source to artifact: flags, tools, environment, failures."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from pathlib import Path

import pytest
import toy

from attngen import build
from attngen.build import Recipe, compile_kernel
from attngen.errors import BuildError


def compile_toy(folder: Path, source: str = toy.SOURCE, recipe: Recipe = toy.RECIPE, **options: object):
    folder.mkdir(parents=True, exist_ok=True)
    return compile_kernel({"kernel.cpp": source}, recipe, folder, **options)


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_leaves_sources_artifact_and_log(tmp_path):
    result = compile_toy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["build.log", "build.ninja", "kernel.cpp", "kernel.so"]
    assert result.artifact == tmp_path / "kernel.so"
    assert "kernel.cpp" in result.log and result.seconds > 0 and result.compiler


@pytest.mark.parametrize("flags", [("-O2",), ("-O2", "-g")], ids=["plain", "debug"])
def test_artifact_is_deterministic_and_knows_no_path(tmp_path, flags):
    recipe = Recipe("cpu", ("kernel.cpp",), (*flags, "-fopenmp"), ("-fopenmp",))
    one = compile_toy(tmp_path / "one", recipe=recipe).artifact.read_bytes()
    time.sleep(1.1)  # a timestamp in it would differ
    two = compile_toy(tmp_path / "another folder", recipe=recipe).artifact.read_bytes()
    assert one == two
    assert os.fsencode(tmp_path) not in one


def test_two_sources_are_compiled_apart_and_linked(tmp_path):
    whole, half = 'int half(); extern "C" int whole() { return 2 * half(); }\n', "int half() { return 21; }\n"
    files = {"kernel.cpp": whole, "half.cpp": half}
    recipe = Recipe("cpu", ("kernel.cpp", "half.cpp"), ("-O2",))
    assert ctypes.CDLL(str(compile_kernel(files, recipe, tmp_path).artifact)).whole() == 42


def test_fast_math_never_reaches_the_linker(tmp_path):
    with pytest.raises(ValueError, match="denormals"):
        Recipe("cpu", ("kernel.cpp",), (), ("-ffast-math",))
    recipe = Recipe("cpu", ("kernel.cpp",), ("-O3", "-ffast-math"))
    artifact = compile_toy(tmp_path, 'extern "C" void f() {}\n', recipe).artifact
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); x = 5e-311; assert x * 0.5 > 0, 'denormals are off'"
    toy.finish(toy.python(program, artifact))


def test_compile_error_shows_message_source_and_hook(tmp_path):
    kept = tmp_path / "failed" / "key"
    with pytest.raises(BuildError) as caught:
        compile_toy(
            tmp_path / "private", toy.SOURCE + "int y = undeclared;\n", keep_failed=kept,
            locate=lambda file, line: f"user.py:{line + 100}" if file == "kernel.cpp" else None,
        )  # fmt: skip
    message, line = str(caught.value), toy.SOURCE.count("\n") + 1
    assert "'undeclared' was not declared" in message
    assert f"hook: user.py:{line + 100}" in message
    assert f"{kept / 'kernel.cpp'}:{line}" in message
    assert "int y = undeclared" in (kept / "kernel.cpp").read_text()
    assert not (tmp_path / "private").exists()


def test_kept_failures_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "KEPT_FAILURES", 2)
    for i in range(4):
        with pytest.raises(BuildError):
            compile_toy(tmp_path / "private", "broken", keep_failed=tmp_path / "failed" / str(i))
        os.utime(tmp_path / "failed" / str(i), (i, i))
    assert sorted(os.listdir(tmp_path / "failed")) == ["2", "3"]


def test_link_error_is_reported(tmp_path):
    recipe = Recipe("cpu", ("kernel.cpp",), ("-O2", "-fopenmp"), ("-lattngen_has_no_such_library",))
    with pytest.raises(BuildError, match="attngen_has_no_such_library"):
        compile_toy(tmp_path, recipe=recipe)


def test_file_names_are_plain(tmp_path):
    with pytest.raises(ValueError, match="plain name"):
        compile_kernel({"../kernel.cpp": ""}, toy.RECIPE, tmp_path)


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="(?s)g\\+\\+, clang\\+\\+ and c\\+\\+.*apt install g\\+\\+"):
        compile_toy(tmp_path / "private")


def test_cxx_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(BuildError, match="CXX='/nowhere/g\\+\\+ -m64'"):
        compile_toy(tmp_path)


def test_cxx_that_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", "echo out of licences >&2; exit 3")))
    with pytest.raises(BuildError, match="(?s)exit status 3: out of licences"):
        compile_toy(tmp_path)


def test_cxx_may_have_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    assert compile_toy(tmp_path / "with a space").artifact.is_file()


def test_no_ninja(tmp_path, monkeypatch):
    import ninja

    monkeypatch.setattr(ninja, "BIN_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="(?s)no ninja.*pip install ninja"):
        compile_toy(tmp_path)


def test_no_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "cuda_roots", lambda: [tmp_path])
    with pytest.raises(BuildError, match="(?s)no CUDA compiler.*pip install nvidia-cuda-nvcc.*CUDA_HOME"):
        compile_kernel({"kernel.cu": ""}, Recipe("cubin", ("kernel.cu",), (), artifact="kernel.cubin"), tmp_path)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_cubin(tmp_path):
    root = Path(build.find_nvcc().path).parent.parent
    assert (root / "nvvm").is_dir(), "the toolkit's root, not that of a wrapper script"
    recipe = Recipe("cubin", ("kernel.cu",), ("-arch=sm_80", "-O3", "-Xptxas", "-v"), artifact="kernel.cubin")
    source = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] += 1; }\n'
    bytes_of = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        result = compile_kernel({"kernel.cu": source}, recipe, tmp_path / name)
        assert "registers" in result.log
        bytes_of.append(result.artifact.read_bytes())
    assert bytes_of[0] == bytes_of[1]
    with pytest.raises(BuildError, match="(?s)hook: user.py:1.*undeclared"):
        compile_kernel(
            {"kernel.cu": source.replace("+= 1", "+= undeclared")}, recipe, tmp_path, locate=lambda f, n: f"user.py:{n}"
        )


def test_compilers_see_a_clean_environment(tmp_path, monkeypatch):
    script(tmp_path / "cxx", f'env > "{tmp_path}/seen"\nexec g++ "$@"\n')
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_APPEND_FLAGS", "GCC_COMPARE_DEBUG", "CXXFLAGS"):
        monkeypatch.setenv(name, "/nowhere")
    private = tmp_path / "private"
    compile_toy(private)
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    shell_makes = {"PWD", "OLDPWD", "SHLVL", "_"}
    assert set(seen) - shell_makes <= {"PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LC_ALL", "SOURCE_DATE_EPOCH"}
    assert seen["TMPDIR"] == str(private)


def test_a_timeout_kills_the_whole_group(tmp_path, monkeypatch):
    cxx = f'case "$1" in --version) echo slow 1.0; exit;; esac\nsleep 1000 & echo $! > "{tmp_path}/pid"; wait\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "cxx", cxx)))
    with pytest.raises(BuildError, match="no end after 2 s"):
        compile_toy(tmp_path / "private", timeout=2)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 30
    while status.exists() and status.read_text().split(") ")[1][0] != "Z":  # a zombie waits for init, and is dead
        assert time.monotonic() < deadline, "the compiler's child still runs"
        time.sleep(0.05)
