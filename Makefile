# Everything a fresh machine needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data

.PHONY: demo test check bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.core

# Draws a data set, trains a detector from random weights (at most five minutes), evaluates it and predicts.
demo: $(VENV)/.core
	$(BIN)/finedetr demo --out runs/demo

# All tests, on two processes of one thread each.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# What has to be green before a commit.
check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# The numbers: a training step and the losses beside their peers, and the data path on real pictures (DATA=folder).
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.objective
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m benchmarks.teaching_step
	if [ -d $(DATA)/coco128 ]; then $(BIN)/python -m benchmarks.data_pipeline $(DATA)/coco128; fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
