# `make help` lists the targets. Everything lives in .venv; a target that finds it complete installs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
# Where PyTorch publishes its CPU builds; only asked when the usual index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: demo
demo: $(VENV)/.ready ## train dense, STEP and the default (2:4) on text that ships with Python, export, load back (about 4 minutes)
	@$(BIN)/python examples/demo.py

.PHONY: test
test: $(VENV)/.ready ## the whole test suite
	@$(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: lint
lint: $(VENV)/.ready ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: format
format: $(VENV)/.ready ## let ruff lay the code out
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: compare
compare: $(VENV)/.ready ## every recipe on the demo task, tuned, three seeds (about an hour)
	@$(BIN)/python examples/benchmarks/compare.py

# Where the data of the tasks are, and more arguments of bench.py: make bench DATA=../data BENCH="--budget-minutes 110"
DATA ?= data
BENCH ?=

.PHONY: bench-quick
bench-quick: $(VENV)/.ready ## the benchmark harness on two small tasks that need no files (minutes)
	@$(BIN)/python examples/benchmarks/bench.py quick --out out/bench-quick --data $(DATA) $(BENCH)

.PHONY: bench
bench: $(VENV)/.ready ## every task, recipe and pattern, tuned, three seeds (hours; interrupt it, and call it again to go on)
	@$(BIN)/python examples/benchmarks/bench.py main --data $(DATA) $(BENCH)

SPEED ?=

.PHONY: bench-speed
bench-speed: $(VENV)/.ready ## time and memory as ratios, one thread (minutes; SPEED="--only masks --largest 300")
	@OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python examples/benchmarks/speed/bench_speed.py $(SPEED)

.PHONY: gpu
gpu: ## the checks that need a CUDA device, with the Python and torch that are there (no installs)
	@$(PYTHON) -m pytest -m gpu -p no:cacheprovider tests/gpu
	@PYTHONPATH=. $(PYTHON) examples/benchmarks/speed/bench_speed.py --device cuda --out out/speed-cuda $(SPEED)

# What a CUDA machine is lent for may end: each call runs what fits into nine minutes, and the next one goes on.
.PHONY: gpu-bench
gpu-bench: ## recipes compared on ResNet-18 and GPT-2 small, on a CUDA device that is there (no installs; call it again to go on)
	@$(PYTHON) examples/benchmarks/bench.py gpu --data $(DATA) --budget-minutes 9 $(BENCH)

.PHONY: coverage
coverage: $(VENV)/.ready ## branch coverage of the package
	@$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered

# Not --quiet, under which mkdocs overlooks warnings even if it is strict. The notice that is turned off is about another
# major version of mkdocs than the one pinned.
.PHONY: docs
docs: $(VENV)/.ready ## the documentation site, in build/site (open index.html there)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "built build/site/index.html"

.PHONY: docs-serve
docs-serve: $(VENV)/.ready ## the same at http://127.0.0.1:8000, built anew when a page changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

.PHONY: build
build: $(VENV)/.ready ## the wheel and the source archive, in dist/
	@$(BIN)/python -m build

.PHONY: clean
clean: ## remove what the other targets made
	rm -rf $(VENV) build dist out lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by itself: a bare `torch`, asked for by another package, would bring gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Expected Python 3.10 or newer, but got {sys.version}")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing torch $(TORCH) (CPU)"; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check 'torch==$(TORCH)' --index-url $(TORCH_CPU_INDEX) \
	  || $(BIN)/python -m pip install -q --disable-pip-version-check 'torch==$(TORCH)'; }
	@echo "installing lightning-step and its tools"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[cli,plots]' --group dev
	@touch $@
