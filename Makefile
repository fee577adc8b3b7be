# Set-up, tests and demo. `make demo` and `make test` do everything a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On a machine without a GPU the pinned versions keep pip from fetching gigabytes of CUDA packages.
CONSTRAINTS := $(shell nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")
BUILD_INPUTS := pyproject.toml setup.py setup_cuda.py CMakeLists.txt $(wildcard constraints/*.txt) $(wildcard csrc/* kernels/*)

.PHONY: help demo test test-all lint types docs bench gpu-check clean

help:
	@echo "make demo    install into $(VENV), then distil the digits teacher (5 minutes on 2 cores): runs/digits/report.html"
	@echo "make test    install into $(VENV), then run the tests but those that take minutes by nature"
	@echo "make test-all  as make test, and those too"
	@echo "make lint    ruff check and format check; the workflows against their schema, and zizmor on them"
	@echo "make types   mypy"
	@echo "make docs    the manual as a site: build/site/index.html"
	@echo "make bench   the benchmarks"
	@echo "make gpu-check  on a machine with a GPU, into the environment of PYTHON: tests, memory checks, benchmarks"
	@echo "make clean   remove $(VENV) and build products"

$(STAMP): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: make needs Python 3.11 or newer (the pinned versions do); set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) ".[dev,peers]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m ddfast.train --recipe digits --method dd1

# A process per core, a file of tests in one process: tests of one file share what they trained; tests/conftest.py puts the
# longest files first and says what was left out.
PYTEST := $(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not slow and not full"

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet --no-progress .github

types: $(STAMP)
	$(BIN)/mypy

# The theme's authors announce their next project in every build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu-check:
	STEPS="$(STEPS)" $(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build *.egg-info
