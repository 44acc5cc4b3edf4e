# Everything starts from a fresh clone: each target makes its own virtual environment first, once.
#
#   make train                          train the tiny model on this machine's CPU cores (configs/tiny-cpu.yaml)
#   make train ARGS="run.steps=50"      ... with overrides, as nsa-dist takes them
#   make train CONFIG=configs/x.yaml    ... another run
#   make test | test-all | lint | clean
#
# PYTHON       a Python 3.11 or newer; it is only used to make .venv
# TORCH_INDEX  where to take torch from, e.g. https://download.pytorch.org/whl/cpu for the small build without CUDA
# PIP_ARGS     more arguments for every pip install, e.g. --index-url https://mirror.example/simple

PYTHON      ?= python3
TORCH_INDEX ?=
PIP_ARGS    ?=
CONFIG      ?= configs/tiny-cpu.yaml
OUTPUT_DIR  ?= runs/$(basename $(notdir $(CONFIG)))-$(shell date -u +%Y%m%d-%H%M%S)
ARGS        ?=
PYTEST_ARGS ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help install train test test-all lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); nsa-dist needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; the packages are large, a few minutes)"
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) "$(TORCH)",true)
	@$(PIP) --editable ".[dev]"
	@touch $@

train: $(STAMP)
	@$(BIN)/nsa-dist train $(CONFIG) output_dir=$(OUTPUT_DIR) $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -p no:cacheprovider -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)
	@$(BIN)/python -m pytest -p no:cacheprovider $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --diff .
	@$(BIN)/mypy

clean:
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept runs/: your training runs"
