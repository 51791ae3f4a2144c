"""Which compilers this machine has, for tests that need them."""

from __future__ import annotations

import pytest

from attngen.build import find_nvcc
from attngen.errors import BuildError

try:
    NVCC: tuple[str, ...] = find_nvcc().argv
except BuildError:
    NVCC = ()
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc: the CUDA compiler comes with PyPI's nvidia-cuda-nvcc or the toolkit")
