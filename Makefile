# make train   from nothing to a trained tiny model and its report
# make check   lint, types and the fast tests: before every commit
# make test    lint, types and all tests
# make docs    the documentation as a site, into site/
# All need Python 3.11 or newer and, the first time, a package index.

PYTHON ?= python3
CONFIG ?= configs/tiny_shapes.yaml
BIN := .venv/bin

# The DeepSpeed launcher would give its one CPU process one thread.
export OMP_NUM_THREADS ?= $(shell nproc)
export HF_HUB_OFFLINE ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: train check test lint docs clean

train: .venv/installed
	$(BIN)/deepspeed fastgrpo/train.py --config $(CONFIG)

# Two processes, a file's tests in one of them, as they share what is slow to make; one thread each. Files are begun in
# the order of tests/conftest.py: xdist's own, by the number of tests, would end with the longest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/installed lint
	$(PYTEST) -m "not slow and not processes"

test: .venv/installed lint
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python docs/print_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastgrpo needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,docs]'
	touch $@

clean:
	rm -rf .venv runs
