# make demo   the whole method on the built-in data: result table, report, bundle in runs/demo
# make check  format, lint, types, import order, and the tests that are quick: under 3 minutes
# make test   everything that must hold: format, lint, types, import order, documentation, tests
# Another Python than python3: make PYTHON=python3.12 venv (remove .venv first to change it later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.NOTPARALLEL:
.PHONY: help venv demo check test lint format docs unit clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo 'also: make venv, lint, format, docs, unit (pytest alone), clean'

venv: $(VENV)/installed

# An install that was cut short leaves `installing` behind: then the environment is made anew, because pip takes a
# half-unpacked package for a whole one.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"modeclip needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 venv")'
	@if [ -e $(VENV)/installing ] || ! $(BIN)/python -c pass 2>/dev/null; then $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/installing
	@echo 'installing into $(VENV): some minutes and gigabytes, once'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[demo,dev]"
	@mv $(VENV)/installing $@ && touch $@

demo: venv
	$(BIN)/modeclip demo --out runs/demo

# The checks, each defined once: pre-commit and .ci/run call these same targets. pytest comes last, so that its closing
# line closes the whole run.
test: lint docs unit

check: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal --quiet -m "not slow"

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/hooks.py

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: venv
	$(BIN)/pytest --numprocesses 2 --dist worksteal

# What is made here and can be made again; never the environment, never a run.
clean:
	rm -rf site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
