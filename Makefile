# Set-up is part of every command: each does what is missing and nothing twice.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for the command that runs, as in: make train ARGS="--seed 1"
ARGS ?=

TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
CPP := $(shell find csrc bindings -name '*.h' -o -name '*.cpp')
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Stamps: a target inside .venv is as new as the last time its step succeeded.
CREATED := $(VENV)/.created
TORCH_INSTALLED := $(VENV)/.installed-$(TORCH)
INSTALLED := $(VENV)/.installed

.PHONY: help setup train test bench clean

help:
	@echo 'make setup   create .venv, install the pinned packages and build the extension in place'
	@echo 'make train   train on DM Control walker-walk with A-PARL; ARGS="--seed 1" adds arguments'
	@echo 'make test    lint, types, formatting, tests'
	@echo 'make bench   benchmarks'
	@echo 'make clean   remove .venv and what was built'

$(CREATED):
	$(PYTHON) -m venv $(VENV)
	touch $@

# By itself and first: together with other packages pip may choose another build of it.
$(TORCH_INSTALLED): | $(CREATED)
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	touch $@

# A changed kernel rebuilds the extension only; new requirements install everything. Without build isolation, so
# that the pinned build tools are used and the build needs no environment of its own.
$(INSTALLED): $(TORCH_INSTALLED) constraints.txt pyproject.toml setup.py CMakeLists.txt $(CPP)
ifneq ($(wildcard $(INSTALLED)),)
	@echo 'changed: $?'
endif
	if [ -n '$(filter $(TORCH_INSTALLED) constraints.txt pyproject.toml,$?)' ]; then \
	    $(INSTALL) setuptools scikit-build-core pybind11 cmake ninja; \
	    $(INSTALL) --no-build-isolation -e '.[all,bench,dev]'; \
	else \
	    $(INSTALL) --no-build-isolation --no-deps -e .; \
	fi
	touch $@

setup: $(INSTALLED)

train: setup
	$(BIN)/parl train --env dm_control/walker-walk --algorithm a-parl --preset cpu --steps 80000 $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m pytest $(ARGS)

bench: setup
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build
	rm -f parl_core/_native*.so
