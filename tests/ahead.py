"""Builds the kernels that GPU tests ask for, on a machine without a GPU, so that a GPU's time goes into the tests alone:

    ATTNGEN_TEST_CACHE_DIR=/tmp/kernels PYTHONPATH=tests python -m pytest -p ahead -m gpu -n logical

Tests run as far as they get with CPU tensors in the place of CUDA tensors. Kernels are built for sm_90a and write nothing, and what judges
results does nothing. A test that fails is shown as skipped: it stops where it needs a real GPU, and what it has asked for until then is built.
A kernel that does not build fails its test.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

build: Any = None  # cuda.build


class OnCpu(TorchFunctionMode):
    """Where torch is asked for CUDA, it gives CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def on_cpu(x: Any) -> Any:
    cuda = isinstance(x, torch.device) and x.type == "cuda" or isinstance(x, str) and x.split(":")[0] == "cuda"
    return torch.device("cpu") if cuda else x


class Nothing:
    """What a loaded kernel is to its caller."""

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, *_: Any, **__: Any) -> None:
        pass


def load(kernel: Any, *_: Any) -> Nothing:
    """In place of ``cuda.load``."""
    build(kernel)
    return Nothing()


def pytest_configure(config: pytest.Config) -> None:
    """Before test modules are imported, which take names from others."""
    import batches
    import compare
    from attngen import cuda

    global build
    build = cuda.build
    compare.compare = batches.compare = batches.judge = lambda *_, **__: None


@pytest.fixture(autouse=True, scope="session")
def without_a_gpu() -> Any:
    """Tests and fixtures run on the CPU."""
    import stand_in
    from attngen import batch, boxes, cuda, engine_cpu

    as_device = batch.as_device
    with pytest.MonkeyPatch.context() as patch, OnCpu():
        stand_in.install(patch, "90a", load)
        patch.setattr(cuda, "build", build)
        patch.setattr(engine_cpu, "CpuEngine", stand_in.Engine)
        patch.setattr(boxes, "host", lambda: SimpleNamespace(tensor_map=lambda *_: bytes(128)))
        patch.setattr(batch, "as_device", lambda given: on_cpu(as_device(given)))
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        for name, value in (("synchronize", None), ("is_available", True), ("device_count", 1), ("current_device", 0), ("get_device_capability", (9, 0))):
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """conftest.py skips tests that need a GPU."""
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.kwargs.get("reason") != "no CUDA device"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    from attngen.errors import BuildError

    outcome = yield
    report = outcome.get_result()
    if report.failed and call.excinfo is not None and not call.excinfo.errisinstance(BuildError):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"stopped: {call.excinfo.exconly()[:200]}")
