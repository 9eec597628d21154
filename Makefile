# compactor-vllm. `make run` and `make test` need Python 3.10 or newer and make, nothing else; `make help` lists the rest.
#
# What is chosen where:
#   PYTHON=python3.12        the interpreter of a new environment        VENV=.venv   where it is made
#   TORCH_INDEX=URL          the package index that torch comes from     TORCH_VERSION=2.13.0
#   ARGS="--ratio 0.1"       more arguments of `demo`                    PYTEST_ARGS="-k cache"   of pytest

SHELL = /bin/sh
.DEFAULT_GOAL = help

PYTHON ?=
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
ARGS ?=
PYTEST_ARGS ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest -q

.PHONY: help run test test-all test-gpu check format docs wheel clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make run        install, fetch the built-in model, answer a question about a long document (demo)'
	@echo 'make test       install, run the tests that need no GPU, no browser and no Ray'
	@echo 'make test-all   the same and everything slow; what needs a missing program is skipped with the reason'
	@echo 'make test-gpu   the tests that need an NVIDIA GPU'
	@echo 'make check      format, lint, types, direction of imports, documentation'
	@echo 'make format     let ruff format and mend what it can'
	@echo 'make docs       build the documentation into site/'
	@echo 'make wheel      build the wheel into dist/'
	@echo 'make clean      remove what was built; `make distclean` removes $(VENV), too'

run: $(VENV)/.base
	$(BIN)/compactor-vllm demo $(ARGS)

# Two processes of one thread each are done sooner than one process of two threads.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not browser and not ray and not gpu" -n 2 $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) -m "not gpu" -n 2 $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PYTEST) -m gpu -n 8 --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.dev
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The environment, one stamp a step, so that a second run starts at once. Each step leaves what it finds installed.

$(VENV)/.made:
	@if [ ! -x $(BIN)/python ]; then \
	    found=; \
	    for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	            found="$$candidate"; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo 'No Python 3.10 or newer was found. Install one, or name it: make run PYTHON=/path/to/python3' >&2; exit 1; \
	    fi; \
	    echo "making $(VENV) with $$found"; \
	    if ! "$$found" -m venv $(VENV); then \
	        rm -rf $(VENV); \
	        echo 'This Python cannot make environments. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; \
	    fi; \
	fi
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@set -e; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; then \
	    echo 'torch: the installed one is kept'; \
	elif [ -n "$(TORCH_INDEX)" ]; then \
	    echo 'torch: from $(TORCH_INDEX)'; \
	    $(PIP) install --index-url "$(TORCH_INDEX)" "torch==$(TORCH_VERSION)"; \
	elif [ "$$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then \
	    echo 'torch: from the default index'; \
	    $(PIP) install -c constraints.txt "torch==$(TORCH_VERSION)"; \
	elif $(PIP) install --quiet -c constraints.txt --only-binary :all: "torch==$(TORCH_VERSION)+cpu" 2>/dev/null; then \
	    echo 'torch: a CPU build from the configured index'; \
	elif echo 'torch: the CPU build of $(TORCH_CPU_INDEX)'; \
	    $(PIP) install --retries 1 --no-deps --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)+cpu"; then :; \
	else \
	    echo 'torch: that index cannot be reached; the default index has a build with CUDA, which takes several GB'; \
	    $(PIP) install -c constraints.txt "torch==$(TORCH_VERSION)"; \
	fi; \
	if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
	    $(PIP) install --quiet 'triton>=3.6,<3.8'; \
	fi
	@touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.base $@
