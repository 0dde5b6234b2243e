# Everything a newcomer or CI needs. Only packages from the package registries are fetched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=

.PHONY: demo test lint bench clean

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

bench: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.needles

clean:
	rm -rf $(VENV) build src/*.egg-info
