# make quickstart   a rising reward in about a minute on a laptop: no GPU, no model hub, no account
# make test         what CI runs first
# make bench        our speed and memory on this machine, with its floors; bench-peers: beside other projects
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test parity lint types light bench bench-peers bench-install clean

quickstart: $(VENV)/installed
	$(BIN)/grpo-jax train configs/quickstart.yaml directory=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -q tests/models/parity_live.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

light: $(VENV)/installed
	$(BIN)/python benchmarks/imports.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers

bench-peers: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers --peers all

bench-install: $(VENV)/installed
	$(BIN)/python -m benchmarks.peers.install

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "grpo_jax needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

$(VENV)/installed-parity: $(VENV)/installed-test
	$(BIN)/python -m pip install -q torch==2.13.0
	@touch $@
