# Every target does the set-up it needs: a virtual environment in .venv, the pinned versions of constraints.txt, and
# this package. A second run installs nothing. Override with, for instance: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 4 ] && echo 4 || echo $$n)
PIP_ARGS ?=
DEMO_ARGS ?=
PEERS ?=
BENCH_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
# Errors only: warnings of pip say nothing to who types `make demo`. No byte-compiling: of the thousands of files
# installed, few are ever imported.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt $(PIP_ARGS)
# What is imported is compiled once and kept, whatever the shell says: without, a process imports three times as long.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-cuda test-all check bench bench-accuracy clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      watch a language model become W4A8, compile, answer, and be reported on"
	@echo "make test      the tests, without those marked slow"
	@echo "make test-cuda the tests of the CUDA kernels, which need Triton and no GPU"
	@echo "make test-all  all tests"
	@echo "make check     ruff, mypy --strict, layering, packaging, file sizes"
	@echo "make bench     the benchmarks, each next to what it is compared with"
	@echo "make bench-accuracy MODEL=DIR TEXTS=DIR   KL of every way to quantize a checkpoint"
	@echo "make clean     remove what these made"

demo: $(VENV)/.demo
	$(BIN)/qpass demo $(DEMO_ARGS)

test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-cuda: $(VENV)/.test-all
	$(PYTEST) -m "not slow" tests/kernels/cuda tests/lowering/test_fusion_on_cuda.py $(TEST_ARGS)

test-all: $(VENV)/.test-all
	$(PYTEST) $(TEST_ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python tests/check_types.py
	$(BIN)/pytest -q -m "not slow" tests/test_layering.py tests/test_packaging.py tests/test_repository.py tests/test_import.py

bench: $(VENV)/.test
	$(BIN)/python tests/bench/run.py $(if $(PEERS),--peers $(PEERS)) $(BENCH_ARGS)

bench-accuracy: $(VENV)/.test
	$(BIN)/python tests/bench/accuracy.py --model $(MODEL) --texts $(TEXTS) $(if $(PEERS),--peers $(PEERS)) \
	  --json tests/bench/results/$$($(BIN)/python tests/bench/machine.py)/accuracy.json $(BENCH_ARGS)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(None if ok else \
	  "qpass needs Python 3.11, 3.12 or 3.13; $(PYTHON) is " + sys.version.split()[0] + ". Give another: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV): PyTorch and the rest are downloaded once, which takes minutes on a slow line"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) pip setuptools
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@$(INSTALL) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt
	@$(INSTALL) --no-build-isolation -e '.[test,demo]'
	@touch $@ $(VENV)/.demo

# Triton is 600 MB, and only the tests of the CUDA kernels need it.
$(VENV)/.test-all: $(VENV)/.test
	@$(INSTALL) --no-build-isolation -e '.[test,demo,triton]'
	@touch $@

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
