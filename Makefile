# One environment in .venv, and what is run in it. `make` alone lists the targets.
#   make demo PYTHON=python3.12                    another interpreter
#   make demo PIP_ARGS="--index-url <address>"     another package index, e.g. PyTorch's one with CPU-only builds

PYTHON ?= python3
PIP_ARGS ?=
PIP := .venv/bin/python -m pip --disable-pip-version-check -q install $(PIP_ARGS)

.PHONY: help env demo test test-all lint docs reference clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

env: .venv/.ready  ## make the environment in .venv, or bring it up to date

.venv/.ready: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dopsd needs Python 3.11 or newer; name one with: make $(or $(MAKECMDGOALS),env) PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment in .venv (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) "$$(grep '^torch==' constraints-cpu.txt)"
	@$(PIP) -c constraints-cpu.txt -e ".[dev]"
	@touch $@

demo: env  ## tune the pocket model on a thing it never saw, by plain fine-tuning and with retention
	@.venv/bin/dopsd demo

test: env  ## the fast tests
	@.venv/bin/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-all: env  ## all tests
	@.venv/bin/python -m pytest -q -n auto --dist worksteal

lint: env  ## ruff and pyright
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet . || { echo "Run: .venv/bin/ruff format ." >&2; exit 1; }
	@.venv/bin/pyright

docs: env  ## build the documentation into build/site; a broken link or anchor is an error
	@.venv/bin/zensical build --strict
	@echo "Open build/site/index.html, or: .venv/bin/python -m http.server -d build/site"

reference: env  ## write docs/reference/*.md anew from the recipe schema, the commands and the Python API
	@.venv/bin/python docs/reference/generate.py

clean:  ## remove the environment and caches, not the runs
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
