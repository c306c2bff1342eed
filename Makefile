# `make demo` and `make test` set everything up by themselves: Python 3.11, gcc and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
EXAMPLES := $(filter-out __init__ shared,$(basename $(notdir $(wildcard examples/*.py))))
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-full examples lint docs lock clean

demo: $(VENV)/ready
	$(BIN)/attlas compare softmax,sigmoid,linear,lightning,aaren,pool --task text --store runs/demo

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-full: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "full or not full"

# Each in under two minutes, and the pictures of docs/pages/examples.md.
examples: $(addprefix example-,$(EXAMPLES))

example-%: $(VENV)/ready
	$(BIN)/python -m examples.$* --out docs/pages/figures

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/ready
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/figures/masks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Written from pyproject.toml; `make test` installs exactly these versions.
lock: $(VENV)/bin/uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--no-header --no-emit-index-url --no-annotate --output-file requirements.lock

$(VENV)/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Attlas needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/ready: requirements.lock pyproject.toml | $(VENV)/bin/uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
