# One command each; `make help` lists them. Everything is installed into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-extras demo demo-convert test test-fast test-long lint format bench experiments clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --no-loadscope-reorder
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## create .venv and install everything; does nothing when up to date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"error: Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	$(PIP) torch numpy
	$(PIP) --editable '.[dev]'
	@touch $@

setup-extras: $(VENV)/.installed-extras ## what evals=tasks, evals=code, filters and fast BPE need as well; their tests skip without

$(VENV)/.installed-extras: $(STAMP)
	$(PIP) --editable '.[dev,eval,code,filters,tiktoken]'
	@touch $@

demo: setup ## prepare text, train a small TiDAR model with 2 processes, measure decoding (about 12 minutes)
	@BIN=$(BIN) bash scripts/demo.sh

demo-convert: setup ## a real model of 135M parameters learns to draft, its base frozen (15 to 30 minutes; needs pip's index)
	@BIN=$(BIN) STEPS=240 PROMPTS=10 TOKENS=32 SEQUENCES=8 bash scripts/convert_smollm2.sh

test: setup ## run the tests
	$(BIN)/python -m pytest -m "not long" $(SIDE_BY_SIDE)

test-fast: setup ## what most changes break: a case of each test of the parts below training (3 to 4 minutes)
	$(BIN)/python -m pytest --fast -m "not long" $(SIDE_BY_SIDE) tests/tidar_common tests/data_prep tests/docs \
	  $(addprefix tests/pipeline/,data model objective decoding) \
	  --ignore-glob='*/test_interruption.py' --ignore-glob='*/test_prepare_tasks.py'

test-long: setup ## run the tests that take long, such as many kills of one run
	$(BIN)/python -m pytest -m long

lint: setup ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure and write bench/results/*.json
	$(BIN)/python -m bench

experiments: setup ## train and score the recipes that docs/results.md compares (about two hours of one core)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.experiments

clean: ## remove what the demos wrote (not .venv)
	rm -rf runs/demo data/demo runs/smollm2
