# make setup | demo | test | test-all | test-instructions | mutants | gpu | bench | lint | docs. Each target sets up what it needs.
#
# PYTHON may name the interpreter; the default is the first of these that runs and is 3.11 to 3.13.
CANDIDATES := python3 python3.12 python3.11 python3.13 python
SUPPORTED := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-all test-instructions mutants gpu bench lint docs base clean

setup: $(VENV)/.installed

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; install one or run make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: requirements.txt $(VENV)/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-mutants: requirements-mutants.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-mutants.txt
	@touch $@

$(VENV)/.installed-bench: requirements-bench.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

# The three scripts in order on the embedded example, then the table; the report is example/DPO/demo_output/run/report.html.
demo: setup
	$(BIN)/python example/DPO/demo.py

# One process for each core, at most as many as fit in memory, each on one thread.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.installed-dev
	$(TESTS)

# Includes the slow tests.
test-all: $(VENV)/.installed-dev
	$(TESTS) -m "slow or not slow"

# The tests again with each instruction set below this processor's own, as on older ones; says so if there is none.
test-instructions: $(VENV)/.installed-dev
	@lower=$$($(BIN)/python -m tests.instructions) || exit; for name in $$lower; do \
	  echo "$(TESTS) --instructions $$name"; $(TESTS) --instructions "$$name" || exit; done

# Mutation testing: puts small faults into the code and lists those that no test finds; hours (docs/mutants.md). ONLY="FILE ..." tries
# these files.
mutants: $(VENV)/.installed-mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(ONLY)

# On a machine with an NVIDIA GPU: checks and measures everything that depends on it, some eight minutes. ONLY="NAME ..." runs a part.
# A Python that has the packages is used directly.
GPU_IMPORTS := import bitsandbytes, deepspeed, hypothesis, ninja, pandas, pytest, pytorch_lightning, rich, safetensors, tokenizers
gpu:
	@if "$(PYTHON)" -c '$(GPU_IMPORTS)' >/dev/null 2>&1; then python="$(PYTHON)"; \
	  else $(MAKE) --no-print-directory $(VENV)/.installed-dev && python=$(BIN)/python; fi || exit; \
	  "$$python" benchmarks/gpu/checks.py --only $(ONLY)

# Every benchmark, half an hour on 2 cores; the results are in benchmarks/results.
bench: $(VENV)/.installed-bench
	for script in benchmarks/*.py; do $(BIN)/python "$$script" || exit; done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# Generate docs/flags.md from the flags.
docs: setup
	$(BIN)/python -m src.cli.document

# Train the embedded base model again (about an hour on 2 cores).
base: setup
	$(BIN)/python example/DPO/train_base.py

clean:
	rm -rf $(VENV) example/DPO/demo_output
