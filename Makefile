# Every target works on a bare machine: a python ≥ 3.11 with venv, and a package index.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
LOCK := --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header -p 3.11

# Tests wait more than they compute, so there are more workers than cores; each has its own servers.
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(WORKERS)
# One worker runs all tests of a module, which share fixtures; in order, as test_chaos takes longest.
TOGETHER = --dist loadfile --no-loadscope-reorder
ROLLING := $(OLD:%=--old %) $(EVENTS:%=--events %) $(SEED:%=--seed %)
CHAOS := $(EVENTS:%=--events %) $(KILLS:%=--kills %) $(SEED:%=--seed %)

.DEFAULT_GOAL := help
.PHONY: help run check quick test chaos rolling bench train docs lock fmt clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.installed: requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "No python >= 3.11 with venv is on PATH: install one, or say make PYTHON=/path/to/python3"; exit 1; }
	@echo "environment  .venv with $$($(PYTHON) --version) ($(PYTHON)), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

run: .venv/.installed ## Start what is missing and serve; ARGS="--port 8001 --rate 50"
	@$(BIN)/python -m cerberus run $(ARGS)

check: .venv/.installed ## Check format, lint, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

quick: check ## check, and the tests that need no server; a minute
	$(PYTEST) --dist worksteal -m "not servers"

test: check ## check, and all tests on real servers; ten minutes; WORKERS=1
	$(PYTEST) $(TOGETHER)

chaos: .venv/.installed ## Compare every value while servers and instances fail; five minutes; EVENTS=1000000 KILLS=30 SEED=7
	$(BIN)/python -m chaos $(CHAOS)

rolling: .venv/.installed ## Update a running group from an older commit, and roll back; three minutes; OLD=5bac5f3 EVENTS=20000 SEED=7
	$(BIN)/python -m chaos.rolling $(ROLLING)

bench: .venv/.installed ## Measure requests, look-ups, replay, backlog and memory
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/lookups.py
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/backlog.py
	$(BIN)/python benchmarks/memory.py

train: .venv/.installed ## Train models/fraud_model.json
	$(BIN)/python models/train_model.py $(ARGS)

docs: .venv/.installed ## Write docs/settings.md from the settings' declarations
	$(BIN)/python -m cerberus settings --write docs/settings.md

lock: ## Lock all requirements with hashes and no addresses; needs uv on PATH
	uv pip compile $(LOCK) pyproject.toml -o requirements.txt
	uv pip compile $(LOCK) --group stack --group dev pyproject.toml -o requirements-dev.txt

fmt: .venv/.installed ## Format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the environment and all local data
	@test ! -x $(BIN)/python || $(BIN)/python -m cerberus clean
	rm -rf .venv .cerberus
