"""Loading and launching, the host extension's own build, and OpenMP after a fork."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

import attngen
from attngen import doctor, load
from attngen.abi import LAUNCH_ABI
from attngen.cache import Cache
from attngen.errors import BuildError, LoadError
from attngen.pack import Pack, write_pack

HOST_FILE = load.host().__file__


@pytest.fixture
def store(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def toy_kernel(tmp_path_factory) -> load.LoadedKernel:
    entry, _ = Cache(tmp_path_factory.mktemp("cache")).get_or_build(toy.KEY, toy.builder())
    return load.load_kernel(entry)


def packed(x: torch.Tensor, n: int | None = None, threads: int = 2) -> bytes:
    return toy.PARAMS.pack(x.data_ptr(), x.numel() if n is None else n, threads)


def test_launch(toy_kernel):
    x = torch.zeros(1000)
    for buffer in (packed(x), bytearray(packed(x)), memoryview(packed(x))):
        toy_kernel.launch(buffer)
    assert torch.equal(x, torch.full((1000,), 3.0))


def test_a_status_becomes_an_exception(toy_kernel):
    with pytest.raises(RuntimeError, match="returned status 7"):
        toy_kernel.launch(packed(torch.zeros(1), n=-1))


def test_launch_takes_buffers_only(toy_kernel):
    with pytest.raises(TypeError, match="bytes-like"):
        toy_kernel.launch(3)


def test_the_gil_is_released_while_a_kernel_runs(store):
    source = toy.SOURCE.replace("if (p->n < 0) return 7;", "while (!((volatile float*)p->x)[0]) {}")
    entry, _ = store.get_or_build(toy.KEY, toy.builder(source))
    x = torch.zeros(1)
    thread = threading.Thread(target=load.load_kernel(entry).launch, args=(packed(x, 0),))
    thread.start()
    time.sleep(0.1)
    x[0] = 1  # never reached, were the GIL held
    thread.join(60)
    assert not thread.is_alive()


def test_a_thousand_kernels_of_a_pack_keep_no_file_open(store, tmp_path):
    """Each is opened under a descriptor that served another before, and is its own library all the same."""
    keys = [f"{i:064x}" for i in range(1100)]
    built = [store.get_or_build(key, toy.builder(toy.SOURCE.replace("+= 1", f"+= {i + 1}")))[0] for i, key in enumerate(keys[:3])]
    entries = [replace(built[i % 3], key=key, manifest={**built[i % 3].manifest, "key": key}) for i, key in enumerate(keys)]
    write_pack(tmp_path / "many.attnpack", "many", entries)
    pack = Pack(tmp_path / "many.attnpack")

    def serve() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        for i, key in enumerate(keys):
            x = torch.zeros(10)
            load.load_kernel(pack.lookup(key, "pack")).launch(packed(x, threads=1))
            assert x.eq(i % 3 + 1).all(), (i, x)
        return "all served"

    assert toy.in_child(serve, timeout=120) == "all served"


# ---- libraries that do not belong here -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source,found",
    [
        (toy.SOURCE.replace(LAUNCH_ABI, "attngen-cpu-0"), "launch ABI attngen-cpu-0"),
        (toy.SOURCE.replace("attngen_abi", "abi"), "no symbol attngen_abi"),
        (toy.SOURCE.replace("attngen_attention", "attention"), "no symbol attngen_attention"),
        (toy.SOURCE + "void missing(); void* p = (void*)missing;", "undefined symbol: _Z7missingv"),
    ],
    ids=["other ABI", "no ABI", "no entry point", "does not link"],
)
def test_a_library_of_another_abi(store, source, found):
    entry, _ = store.get_or_build(toy.KEY, toy.builder(source))
    with pytest.raises(LoadError) as caught:
        load.load_kernel(entry)
    message = str(caught.value)
    assert f"required: a library of launch ABI {LAUNCH_ABI}" in message and found in message
    assert str(entry.artifact) in message and "attngen cache clear" in message


@pytest.mark.parametrize("more", [{"abi": "attngen-cpu-0"}, {"kind": "cubin"}], ids=["abi", "kind"])
def test_a_manifest_of_another_abi(store, more):
    entry, _ = store.get_or_build(toy.KEY, toy.builder(**more))
    with pytest.raises(LoadError, match=f"required: kind cpu, launch ABI {LAUNCH_ABI}"):
        load.load_kernel(entry)


def test_a_file_that_is_no_library(store, monkeypatch):
    monkeypatch.setattr(load, "_cpu_kernels", {})  # as in a process that has not loaded it
    entry, _ = store.get_or_build(toy.KEY, toy.builder())
    entry.artifact.write_bytes(b"not ELF")
    with pytest.raises(LoadError, match="kernel.so"):
        load.load_kernel(entry)


def test_a_cache_that_is_mounted_noexec(store, tmp_path, monkeypatch):
    """Building anew would help nothing there: the error and the doctor say what does."""
    store.root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec,mode=700", "none", store.root], capture_output=True).returncode:
        pytest.skip("no right to mount")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(store.root))

    def work() -> str:  # in a child: glibc keeps a page of a library that it could not load mapped
        entry, _ = store.get_or_build(toy.KEY[::-1], toy.builder())
        with pytest.raises(LoadError, match="(?s)mounted noexec.*do: mount it without noexec, set ATTNGEN_CACHE_DIR") as caught:
            load.load_kernel(entry)
        assert "cache clear" not in str(caught.value)
        found = doctor._cache()
        assert not found.ok and "noexec" in found.found and "ATTNGEN_CACHE_DIR" in found.remedy
        write_pack(tmp_path / "toy.attnpack", "toy", [entry])
        x = torch.zeros(3)
        load.load_kernel(Pack(tmp_path / "toy.attnpack").lookup(entry.key, "pack")).launch(packed(x))
        return f"the pack serves {x.tolist()}"

    try:
        assert toy.in_child(work) == "the pack serves [1.0, 1.0, 1.0]"
    finally:
        subprocess.run(["umount", store.root], check=True)


# ---- fork ------------------------------------------------------------------------------------------------------------


def use_openmp(kernel: load.LoadedKernel) -> None:
    """Makes sure that this thread owns a pool of OpenMP threads, torch's and the kernel's."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(2_000_000).exp_().sum()
        x = torch.zeros(1000)
        kernel.launch(packed(x))
    finally:
        torch.set_num_threads(before)


def test_a_forked_child_runs_and_builds_kernels(toy_kernel, store):
    use_openmp(toy_kernel)

    def work() -> float:
        x = torch.zeros(1000)
        for _ in range(3):
            toy_kernel.launch(packed(x))
        entry, _ = store.get_or_build(toy.KEY, toy.builder())
        load.load_kernel(entry).launch(packed(x))
        thread = threading.Thread(target=toy_kernel.launch, args=(packed(x),))  # a thread born in the child
        thread.start()
        thread.join()
        assert x.min() == x.max()
        grandchild = toy.in_child(lambda: toy_kernel.launch(packed(x)) or "ran")
        return f"{x[0].item()} {grandchild}"

    assert toy.in_child(work) == "5.0 ran"
    x = torch.zeros(1000)
    toy_kernel.launch(packed(x))  # the parent is as it was
    assert x[0] == 1


def test_a_child_reports_a_kernels_status_too(toy_kernel):
    use_openmp(toy_kernel)
    answer = toy.in_child(lambda: toy_kernel.launch(packed(torch.zeros(1), n=-1)))
    assert answer == "RuntimeError: a CPU kernel returned status 7"


# ---- the host extension ----------------------------------------------------------------------------------------------

HOST = """
import sys
from attngen import doctor, load
builders = {"ninja", "jinja2", "filelock", "torch.utils.cpp_extension", "pybind11"}
print(load.host().__file__, sorted(builders & set(sys.modules)))
"""


def bare_checkout(folder: Path) -> Path:
    """attngen's modules as in a checkout that was never installed: no built extension beside them."""
    shutil.copytree(
        Path(attngen.__file__).parent, folder / "attngen", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    return folder


def run_bare(checkout: Path, cache: Path, **env: str) -> subprocess.Popen[str]:
    """HOST in that checkout, without .pth files (-S): an editable install would lend it a built extension."""
    path = os.pathsep.join([str(checkout), sysconfig.get_path("purelib")])
    return subprocess.Popen(
        [sys.executable, "-S", "-c", HOST], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=checkout,
        env={**os.environ, "PYTHONPATH": path, "ATTNGEN_CACHE_DIR": str(cache), **env},
    )  # fmt: skip


def test_a_bare_checkout_builds_the_host_extension_once(tmp_path):
    checkout, cache = bare_checkout(tmp_path), tmp_path / "cache"
    both = [run_bare(checkout, cache, CXX="env g++") for _ in range(2)]
    paths = {toy.finish(process).splitlines()[-1].split()[0] for process in both}  # the waiter says that it waits
    assert len(paths) == 1 and paths.pop().startswith(str(cache))
    assert len(list(cache.glob("v1/host/*/*"))) == 1
    # Warm: no compiler, and none of the modules that build.
    path, imported = toy.finish(run_bare(checkout, cache, PATH="/nowhere")).split(maxsplit=1)
    assert path.startswith(str(cache)) and imported.strip() == "[]"


def test_a_host_extension_that_does_not_build_shows_the_compilers_message(tmp_path, monkeypatch):
    (tmp_path / "host.cpp").write_text("int x = undeclared;\n")
    monkeypatch.setattr(load, "HOST_SOURCES", [tmp_path / "host.cpp"])
    build = lambda folder: load._build_host("0", folder)  # noqa: E731
    for _ in range(2):  # and again: cpp_extension alone hides the message on a second try
        with pytest.raises(BuildError, match="(?s)host extension does not build.*'undeclared' was not declared"):
            Cache(tmp_path / "cache").get_or_build(toy.KEY, build, shelf="host")


def test_without_pythons_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match="(?s)no Python headers.*Python.h.*apt install python3-dev"):
        load._build_host("0", tmp_path)


def test_a_stale_packaged_extension_is_not_used(tmp_path, monkeypatch):
    """An editable install whose host.cpp was changed since builds the new one."""
    built = []
    packaged = type(sys)("attngen._host")
    packaged.digest, packaged.__file__ = "of an older source", "attngen/_host.so"
    monkeypatch.setitem(sys.modules, "attngen._host", packaged)
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "_host", None)

    def build(digest: str, folder: Path):
        built.append(digest)
        shutil.copy(HOST_FILE, folder / "_host.so")
        return {"kind": "host", "artifact": "_host.so"}

    monkeypatch.setattr(load, "_build_host", build)
    assert load.host().__spec__.origin.startswith(str(tmp_path))
    assert len(built) == 1
