"""One kernel cache for the whole run, so that each spec is compiled once, whatever test or worker asks first."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before collection, and before xdist starts its workers, which inherit the variable.

    ``ATTNGEN_TEST_CACHE_DIR`` names a folder to keep between runs instead.
    """
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    kept = os.environ.get("ATTNGEN_TEST_CACHE_DIR")
    folder = kept or tempfile.mkdtemp(prefix="attngen-test-cache-")
    os.environ["ATTNGEN_CACHE_DIR"] = folder
    if not kept:
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def kernels(request: pytest.FixtureRequest) -> None:
    """Compiles what the selected tests name in their parameter ``kernel`` (a ``grid.KernelCase``), on all cores."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return  # the workers are parallel already
    params = [getattr(item, "callspec", None) for item in request.session.items]
    cases = dict.fromkeys(p.params["kernel"] for p in params if p and "kernel" in p.params)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: case.compile(), cases))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where torch has a CUDA device, and say so where it has none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif os.environ.get("PYTEST_XDIST_WORKER"):
            torch.set_num_threads(1)  # of the oracle: workers times cores of them would wait for each other
