# Everything from a fresh clone: each target first makes the virtual environment it needs.
#   make quickstart   install, then train a small sparse LLaMA on this machine
#   make test         the tests, two files at a time; make test-all, one by one, adds the slow ones (and those for a GPU, where there is one)
#   make lint         style, types, and the project's own conventions
# PYTHON chooses the interpreter (3.11 to 3.13): make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.PHONY: quickstart test test-all lint

quickstart: $(VENV)/run.stamp
	$(BIN)/llm-cht train configs/quickstart.yaml

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_project.py

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP_INSTALL) --editable '.[dev,deepspeed,eval]'
	@touch $@
