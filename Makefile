# Every target bootstraps what it needs into .venv; ARGS is passed on to the program it runs.
#   make test ARGS="-k t5 -x"      make demo ARGS="--help"

# The first interpreter that is new enough and can make environments; PYTHON=/path decides otherwise.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
READY := .venv/.pemt_fast-ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test check format bench report test-gpu bench-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(READY)  ## create .venv and install torch, then this package with its development tools

# torch comes before the package, so that the build below sees the torch it will run with.
$(READY): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with its venv module found (Debian, Ubuntu: apt install python3-venv)." \
	  "Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c '$(USABLE)' || { echo "$(PYTHON) is not Python 3.11 or newer with its venv module:" \
	  "$$("$(PYTHON)" --version 2>&1)" >&2; exit 1; }
	@echo "==> Python environment in .venv ($(PYTHON))"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
	@echo "==> $(TORCH) (the largest download; skipped when it is there)"
	@$(PIP) install "$(TORCH)"
	@echo "==> pemt_fast and its development tools"
	@$(PIP) install "setuptools>=77" wheel
	@$(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY)  ## train a tiny mixture and show which adapters its gate picks
	@echo "==> demo"
	@$(BIN)/pemt-fast demo $(ARGS)

test: $(READY)  ## run the tests; those that need a GPU skip themselves where there is none
	@echo "==> tests"
	@$(BIN)/pytest $(ARGS)

check: $(READY)  ## lint, formatting and types
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@sources=$$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'); \
	if [ -n "$$sources" ]; then echo "==> clang-format"; PATH="$(BIN):$$PATH" clang-format --dry-run -Werror $$sources; fi

format: $(READY)  ## rewrite the Python files the way `check` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A script path, not `python -m benchmarks.…`: -m would put the root, and with it the folder
# kernels/, on sys.path, where Hugging Face's package of that name is looked for.
bench: $(READY)  ## time the operator against its baselines
	@echo "==> benchmark"
	@$(BIN)/python benchmarks/bench_adapter_mixture.py $(ARGS)

report: $(READY)  ## make the tables and plots from benchmarks/results
	@echo "==> report"
	@$(BIN)/python benchmarks/report.py $(ARGS)

test-gpu: $(READY)  ## run only the tests that need a GPU
	@echo "==> GPU tests"
	@$(BIN)/pytest -m gpu $(ARGS)

bench-gpu: $(READY)  ## the same benchmark on the GPU
	@echo "==> benchmark on cuda"
	@$(BIN)/python benchmarks/bench_adapter_mixture.py --device cuda $(ARGS)

clean:  ## remove build products and caches; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
