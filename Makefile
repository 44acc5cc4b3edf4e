# Everything starts from a fresh clone: each target makes its own virtual environment first, once.
#
#   make train                          train the tiny model on this machine's CPU cores (configs/tiny-cpu.yaml)
#   make train ARGS="run.steps=50"      ... with overrides, as nsa-dist takes them
#   make train CONFIG=configs/x.yaml    ... another run
#   make test | test-all | lint | clean
#   make docs                           build the documentation into build/docs; warnings are errors
#   make constraints                    write constraints.txt anew from the newest packages that fit
#
# SAMPLE       of make train: the tiny model goes on with this text at the end; empty: it does not
# PYTHON       a Python 3.11 or newer; it is only used to make VENV
# VENV         the virtual environment, .venv unless named here
# CONSTRAINTS  exact versions to install, constraints.txt unless named here; empty: whatever pyproject.toml allows
# PYTHONS      of make constraints: every Python that it is for; the oldest first
# TORCH_TO     of make constraints: another torch. Without it torch stays: a newer one may bring gigabytes along
# TORCH_INDEX  where to take torch from, e.g. https://download.pytorch.org/whl/cpu for the small build without CUDA
# TEST_JOBS    processes of `make test`; a GPU is shared by all of them. 0: in one process, as PYTEST_ARGS=--pdb wants it
# PIP_ARGS     more arguments for every pip install, e.g. --index-url https://mirror.example/simple

PYTHON      ?= python3
PYTHONS     ?= python3.11 python3.12 python3.13
TORCH_TO    ?=
TORCH_INDEX ?=
PIP_ARGS    ?=
CONFIG      ?= configs/tiny-cpu.yaml
OUTPUT_DIR  ?= runs/$(basename $(notdir $(CONFIG)))-$(shell date -u +%Y%m%d-%H%M%S)
ARGS        ?=
SAMPLE      ?= $(if $(filter configs/tiny-cpu.yaml,$(CONFIG)),$(if $(findstring output_dir=,$(ARGS)),,import os))
PYTEST_ARGS ?=
TEST_JOBS   ?= 2

VENV        := .venv
CONSTRAINTS := constraints.txt

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
TORCH := $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help install train test test-all lint docs constraints clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); nsa-dist needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; the packages are large, a few minutes)"
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) "$(TORCH)",true)
	@$(PIP) --editable ".[dev]"
	@touch $@

train: $(STAMP)
	@folder=$(OUTPUT_DIR) && $(BIN)/nsa-dist train $(CONFIG) output_dir=$$folder $(ARGS) $(if $(SAMPLE),&& \
	  echo "what it has learnt to write (nsa-dist generate $$folder --prompt ...):" && \
	  $(BIN)/nsa-dist generate $$folder --max-new-tokens 240 --prompt '$(SAMPLE)')

# Tests of a file stay together: some share processes that take seconds to start.
PYTEST = $(BIN)/python -m pytest -p no:cacheprovider -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)
	@$(PYTEST) $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --diff .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory docs

# The theme's word about MkDocs 2.0 is no warning of the build; pyproject.toml stays below 2.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints:
	@mkdir -p build && $(if $(TORCH_TO),echo 'torch==$(TORCH_TO)',grep -E '^(torch|triton)==' constraints.txt) > build/kept.txt
	@for python in $(PYTHONS); do \
	  rm -rf build/venv-$$python && \
	  $(MAKE) --no-print-directory install PYTHON=$$python VENV=build/venv-$$python CONSTRAINTS=build/kept.txt || exit; done
	@$(firstword $(PYTHONS)) .ci/constraints.py $(PYTHONS:%=build/venv-%) > build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf $(PYTHONS:%=build/venv-%) build/kept.txt

clean:
	@rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept runs/: your training runs"
