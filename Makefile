# Everything runs in a virtual environment that make builds on first use and keeps up to date.
# `make` alone lists the targets. Settings, given as `make TARGET NAME=VALUE`:
#   PYTHON       the Python to build the environment with (3.11 or newer)
#   TORCH_INDEX  the package index to take torch from; empty: the default one (on Linux: with CUDA)
#   ARGS         more arguments for the program that the target runs, as in `make test ARGS="-k kivi -x"`
#   BENCH        the benchmarks that `make bench` runs, of those that `kvloom bench --help` lists
#   WORKERS      test processes
#   VENV, CONSTRAINTS  another environment with other versions, as CI does for the oldest transformers

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/newest.txt
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); [ $$n -le 8 ] || n=8; echo $$n)
BENCH ?= prefill decode kernels memory
ARGS ?=

BIN := $(VENV)/bin
PINS := constraints/base.txt $(CONSTRAINTS)
KERNELS := CMakeLists.txt $(wildcard kvloom/kernels/native/*)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all fuzz soak bench lint types clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.run ## compare the recipes on the bundled model, in a minute or two, without a download
	$(BIN)/kvloom demo $(ARGS)

test: $(VENV)/.test ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(VENV)/.test ## run all tests
	$(BIN)/python -m pytest -n $(WORKERS) -m "not bench" $(ARGS)

fuzz: $(VENV)/.test ## damage stored chunks a million times at random (ARGS="60s 7": for a minute, seed 7)
	PYTHONPATH=. $(BIN)/python scripts/fuzz.py $(or $(ARGS),1000000)

soak: $(VENV)/.test ## twenty minutes of load on the server: does its memory stay flat? (ARGS=60: one minute)
	PYTHONPATH=. $(BIN)/python scripts/soak.py $(ARGS)

bench: $(VENV)/.run ## run the benchmarks and print their tables (BENCH=NAME for one)
	@for name in $(BENCH); do $(BIN)/kvloom bench $$name $(ARGS) || exit 1; done

lint: types ## check types, style, formatting, imports between rooms and the length of files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/check_file_length.py

types: $(VENV)/.lint ## check types
	$(BIN)/mypy

clean: ## remove the environments, caches and built packages
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find kvloom tests scripts -name __pycache__ -prune -exec rm -rf {} +

# One torch thread per test process: the processes share the cores. Nothing is to be looked up on a model hub.
test test-all: export OMP_NUM_THREADS := 1
test test-all: export TOKENIZERS_PARALLELISM := false
test test-all bench demo: export HF_HUB_OFFLINE := 1

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "kvloom needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null | grep Python || echo no Python):" \
	    "name one with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created constraints/base.txt scripts/install_torch.py
	$(BIN)/python scripts/install_torch.py constraints/base.txt
	@touch $@

# Each installs what the one before does, and more, so one pip run is enough whichever comes first.
$(VENV)/.run: $(VENV)/.torch pyproject.toml $(PINS) $(KERNELS)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml $(PINS) $(KERNELS)
	$(PIP_INSTALL) --editable ".[test]"
	@touch $(VENV)/.run $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml $(PINS) $(KERNELS)
	$(PIP_INSTALL) --editable ".[test,lint]"
	@touch $(VENV)/.run $(VENV)/.test $@
