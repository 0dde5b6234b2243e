# Everything a newcomer or CI needs. Only packages from the package registries are fetched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LLAMA := .venv-llama
DEMO_ARGS ?=

.PHONY: demo test lint bench report answers llama clean

$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	touch $@

$(VENV)/.%: $(VENV)/.base pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

demo: $(VENV)/.demo  ## find facts in documents twice as long as the model's window
	HF_HUB_OFFLINE=1 $(BIN)/tokenselect demo $(DEMO_ARGS)

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench llama  ## all measurements of speed, their figures and docs/performance.md: hours, on a quiet machine
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ops --resume
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.block_attention
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end latency
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end within-budget
	$(MAKE) report

report: $(VENV)/.bench  ## figures and docs/performance.md from results/*.csv
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.performance

answers: $(VENV)/.demo  ## is the far context read?
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.needles

llama: $(LLAMA)/.installed  ## llama.cpp to compare with, compiled for this machine in a venv of its own

$(LLAMA)/.installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

clean:
	rm -rf $(VENV) $(LLAMA) build src/*.egg-info
