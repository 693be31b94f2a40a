# Everything runs in .venv, which `setup` makes once; each target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One compile worker: a pool of processes costs memory and start-up, and tests compile small graphs.
TEST_ENV := TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

NO_TRITON := --ignore=tests/triton --ignore=tests/kernels_compile
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1

.PHONY: help setup demo test test-cpu test-triton test-slow bench accuracy lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install fxquant and its tools into it

$(STAMP): pyproject.toml constraints-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev,transformers]' -c constraints-dev.txt
	touch $@

demo: $(STAMP)  ## quantize a trained sentence encoder; print speed, size and quality beside float
	$(BIN)/python -m demo $(ARGS)

lint: $(STAMP)  ## ruff, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, then all tests that take seconds
	$(MAKE) -j2 --output-sync=target test-cpu test-triton

# The two halves run side by side: neither keeps two cores busy.
test-cpu: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" --durations=15 $(NO_TRITON) $(ARGS)

# Two processes: a kernel that was decorated for the interpreter can't be compiled.
test-triton: $(STAMP)
	$(TEST_ENV) $(INTERPRETED) $(BIN)/python -m pytest tests/triton -m "not slow" --durations=8 $(ARGS)
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels_compile -m "not slow" --durations=8 $(ARGS)

test-slow: $(STAMP)  ## the tests that take longer
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 1200 --durations=15 $(NO_TRITON) $(ARGS)
	$(TEST_ENV) $(INTERPRETED) $(BIN)/python -m pytest tests/triton -m slow --timeout 1200 --durations=8 $(ARGS)
	$(TEST_ENV) $(BIN)/python -m pytest tests/kernels_compile -m slow --timeout 1200 --durations=8 $(ARGS)

bench: $(STAMP)  ## measure against float and oneDNN on this machine
	$(BIN)/python -m benchmarks $(ARGS)

accuracy: $(STAMP)  ## three trained models in every preset; renews docs/accuracy.md and its plot
	$(BIN)/python -m benchmarks.accuracy --write docs $(ARGS)
	$(BIN)/python -m benchmarks.accuracy.doors --write docs

clean:  ## remove .venv and what tools leave behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache fxquant-dump
