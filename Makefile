# Every target works on a bare machine: a python ≥ 3.11 with venv, and a package index.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
LOCK := --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header -p 3.11

# Tests wait more than they work, so there are more at a time than cores; each has servers of its own.
WORKERS ?= 3
# One worker has all tests of a module, which share what it makes. In order: test_chaos takes longest.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ROLLING := $(OLD:%=--old %) $(EVENTS:%=--events %) $(SEED:%=--seed %)
CHAOS := $(EVENTS:%=--events %) $(KILLS:%=--kills %) $(SEED:%=--seed %)

.DEFAULT_GOAL := help
.PHONY: help run check quick test chaos rolling bench train lock fmt clean

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/.installed: requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "No python >= 3.11 with venv is on PATH: install one, or say make PYTHON=/path/to/python3"; exit 1; }
	@echo "environment  .venv with $$($(PYTHON) --version) ($(PYTHON)), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

run: .venv/.installed ## Start what is missing and serve; ARGS="--port 8001 --rate 50"
	@$(BIN)/python -m cerberus run $(ARGS)

check: .venv/.installed ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

quick: check ## The same, and the tests that need no server, within a minute
	$(PYTEST) -m "not servers"

test: check ## Everything that must hold, within ten minutes; WORKERS=1
	$(PYTEST)

chaos: .venv/.installed ## Exactness under fire, about five minutes; EVENTS=1000000 KILLS=30 SEED=7
	$(BIN)/python -m chaos $(CHAOS)

rolling: .venv/.installed ## A rolling update from an older commit, and back; OLD=5bac5f3 EVENTS=20000 SEED=7
	$(BIN)/python -m chaos.rolling $(ROLLING)

bench: .venv/.installed ## Requests, look-ups, replay, backlog and memory, as ratios within one run
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/lookups.py
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/backlog.py
	$(BIN)/python benchmarks/memory.py

train: .venv/.installed ## Train models/fraud_model.json anew
	$(BIN)/python models/train_model.py $(ARGS)

docs: .venv/.installed ## Write docs/settings.md from the settings' declarations
	$(BIN)/python -m cerberus settings --write docs/settings.md

lock: ## Pin all requirements anew, hashed and without addresses; wants uv on PATH
	uv pip compile $(LOCK) pyproject.toml -o requirements.txt
	uv pip compile $(LOCK) --group stack --group dev pyproject.toml -o requirements-dev.txt

fmt: .venv/.installed ## Format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the environment and all local data
	@test ! -x $(BIN)/python || $(BIN)/python -m cerberus clean
	rm -rf .venv .cerberus
