# `make demo` and `make test` do all their own set-up; `make` alone lists the targets.
# PYTHON=…     interpreter for the virtual environment (3.10 to 3.13; the first suitable one is taken)
# DEMO_OUT=…   run folder of the demo

find-python = for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(find-python))
DEMO_OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# OpenMP threads that spin while they wait make a busy machine very slow.
export GOMP_SPINCOUNT ?= 0

.PHONY: help setup demo test test-slow lint types unit clean

help:
	@echo "make demo       convert the model that ships with the repository; ends with the path of report.html"
	@echo "make test       lint, type check and all tests"
	@echo "make test-slow  the tests that take longer than a minute each"
	@echo "make setup      only create $(VENV)"
	@echo "make clean      remove $(VENV), build folders and caches (runs/ stays)"

setup: $(STAMP)

# torch comes first and alone: whichever build of the pinned version is configured or at hand
# (a CPU wheel, for instance) is then in place before anything else can ask for torch.
$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fissile run demo/moe-nested --model recipes/demo/model --out $(DEMO_OUT) --overwrite

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -q --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q --durations=15 -m slow

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
