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
SOURCES = $(shell find $(1) -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPP := $(call SOURCES,csrc bindings)
EMULATION := $(call SOURCES,tests/csrc/emulation)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BUILD := $(INSTALL) --no-build-isolation -C cmake.define.PARL_WERROR=ON

# Stamps: a target inside .venv is as new as the last time its step succeeded.
CREATED := $(VENV)/.created
TORCH_INSTALLED := $(VENV)/.installed-$(TORCH)
INSTALLED := $(VENV)/.installed
PEERS_INSTALLED := $(VENV)/.installed-peers

# The CUDA kernels, compiled for the host: what tests without a GPU run.
EMULATED := build/emulated
EMULATED_BUILT := $(EMULATED)/.built

SANITIZED := build/sanitized
# What calls the extension.
SANITIZED_TESTS := $(wildcard tests/ops tests/csrc tests/hypergrad/test_linearize.py tests/*/test_native*.py tests/test_optim.py)

.PHONY: help setup train test emulated bench sanitize clean

help:
	@echo 'make setup   create .venv, install the pinned packages and build the extension in place'
	@echo 'make train   train on DM Control walker-walk with A-PARL; ARGS="--seed 1" adds arguments'
	@echo 'make test    lint, types, formatting, tests'
	@echo 'make bench   benchmarks; ARGS="hvp h256" runs those with both in their names, ARGS=--help tells more'
	@echo 'make sanitize  the tests of the kernels, built to stop at address errors and undefined behaviour'
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
	    $(BUILD) -e '.[all,dev]'; \
	else \
	    $(BUILD) --no-deps -e .; \
	fi
	touch $@

setup: $(INSTALLED)

train: setup
	$(BIN)/parl train --env dm_control/walker-walk --algorithm a-parl --preset cpu --steps 80000 $(ARGS)

$(EMULATED_BUILT): $(INSTALLED) tests/csrc/emulation/CMakeLists.txt $(CPP) $(EMULATION)
	PATH="$$PWD/$(BIN):$$PATH" cmake -G Ninja -S tests/csrc/emulation -B $(EMULATED) \
	    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$$PWD/$(BIN)/python"
	PATH="$$PWD/$(BIN):$$PATH" cmake --build $(EMULATED)
	touch $@

emulated: $(EMULATED_BUILT)

test: setup emulated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(EMULATION)
	$(BIN)/python -m pytest $(ARGS)

# Peers that cannot be installed here are listed as such beside the times of the others.
PEERS := "from importlib.metadata import requires; print(*(r.split(';')[0] for r in requires('parl-core') if 'bench' in r))"
$(PEERS_INSTALLED): constraints.txt pyproject.toml | $(INSTALLED)
	$(INSTALL) $$($(BIN)/python -c $(PEERS)) || echo 'Not all peers could be installed; the benchmarks name those missing.'
	touch $@

bench: setup $(PEERS_INSTALLED)
	$(BIN)/parl bench $(ARGS)

# A build of its own, beside the one that is installed. Python itself is not sanitized, so the sanitizer comes first by
# LD_PRELOAD, and libstdc++ with it, whose exceptions it must find; what Python and torch never free is no leak of ours. It
# writes to file descriptor 2, which pytest must leave alone. Compilers started by torch.compile would be slow.
sanitize: setup
	PATH="$$PWD/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED) -DPARL_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$$PWD/$(BIN)/python"
	PATH="$$PWD/$(BIN):$$PATH" cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 PARL_NATIVE="$$(ls $(SANITIZED)/_native*.so)" \
	    $(BIN)/python -m pytest -p tests.sanitized --capture=sys -k 'not compile' $(SANITIZED_TESTS) $(ARGS)

clean:
	rm -rf $(VENV) build
	rm -f parl_core/_native*.so
