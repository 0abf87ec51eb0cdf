# Every target bootstraps what it needs into .venv; ARGS is passed on to the program it runs.
#   make test ARGS="-k t5 -x"      make demo ARGS="--help"

# The first interpreter that is new enough and can make environments; PYTHON=/path decides otherwise.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)
TORCH ?= torch==2.13.0
ARGS ?=
# Processes of `make test`; files are handed out whole.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# 1: an extension that does not build is an error; 0: work without it (no C++ compiler needed).
PEMT_FAST_BUILD ?= 1

BIN := .venv/bin
READY := .venv/.pemt_fast-ready
BUILT := .venv/.pemt_fast-built
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := $(sort $(wildcard $(foreach kind,cpp h cu cuh,csrc/*.$(kind) csrc/*/*.$(kind))))
FORMATTED := $(SOURCES) $(wildcard tests/helpers/cuda/*)
SANITIZED := build/sanitizers
# AdapterHub's library, with the older transformers that it needs; first on the path it hides that
# of .venv. ADAPTERHUB=0: test without it.
LIBRARY := build/adapterhub
ADAPTERHUB ?= 1
SMALL_CASES := every_form_of_the_grid or finite or unequal_ranks or one_launch or not_aligned
KERNEL_TESTS := $(wildcard $(foreach name,extension cpu_kernels adapter_mixture edge_cases sparsity_rows skill_mixture skill_linear linear_mixture,tests/test_$(name).py))

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-adapterhub test-sanitizers check format bench report triton-resources test-gpu bench-gpu bench-check bench-t5 bench-poly bench-decode bench-fuse bench-adapterhub sanitize-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(BUILT)  ## create .venv: torch, then this package with its development tools

# torch comes before the package: the extension is compiled against the torch it will run with.
$(READY): pyproject.toml
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
	@PEMT_FAST_BUILD=0 $(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@

build: $(BUILT)  ## compile the C++ extension again if its sources have changed

# Apart from the installation above, where pip would compile everything anew in a temporary folder
# (and which removes the extension). Another torch changes its version.py, and its headers, which
# ninja follows.
$(BUILT): $(READY) setup.py csrc/build_cuda.py $(SOURCES) $(wildcard .venv/lib/python3*/site-packages/torch/version.py)
	@echo "==> extension pemt_fast._C"
	@PEMT_FAST_BUILD=$(PEMT_FAST_BUILD) $(BIN)/python setup.py build_ext --inplace
	@touch $@

demo: $(BUILT)  ## train a tiny mixture and show which adapters its gate picks
	@echo "==> demo"
	@$(BIN)/pemt-fast demo $(ARGS)

test: $(BUILT) $(if $(filter-out 0,$(ADAPTERHUB)),$(LIBRARY)/.ready)  ## run the tests; those that need a GPU skip themselves where there is none
	@echo "==> tests"
	@$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

# Beside .venv and without dependencies, whose place .venv takes: torch is not installed twice.
$(LIBRARY)/.ready: tests/adapterhub/requirements.txt $(READY)
	@echo "==> the library adapters in $(LIBRARY)"
	@rm -rf $(LIBRARY) $(LIBRARY).part
	@$(PIP) install --no-deps --target $(LIBRARY).part -r $< || { rm -rf $(LIBRARY).part; \
	  echo "The library adapters, with which the tests compare, could not be installed (see above)." \
	  "ADAPTERHUB=0 tests without it: make test ADAPTERHUB=0" >&2; exit 1; }
	@mv $(LIBRARY).part $(LIBRARY)
	@touch $@

test-adapterhub: $(BUILT) $(LIBRARY)/.ready  ## run the tests that need AdapterHub's library
	@echo "==> tests with the library adapters"
	@PYTHONPATH=$(LIBRARY)$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/pytest tests/adapterhub $(ARGS)
	@$(BIN)/pytest tests/test_adapterhub_library.py -k files

# A copy of the package below build/, whose extension can only be loaded after its sanitizers;
# libstdc++ comes along so that they see exceptions. A report names no test: ARGS=-v shows which it was.
test-sanitizers: $(READY)  ## run the tests of the C++ kernels with AddressSanitizer and UBSan
	@echo "==> extension with sanitizers in $(SANITIZED)"
	@rm -rf $(SANITIZED)/lib; mkdir -p $(SANITIZED)
	@PEMT_FAST_BUILD=1 PEMT_FAST_CUDA=0 PEMT_FAST_SANITIZE=address,undefined $(BIN)/python setup.py --quiet \
	  egg_info --egg-base $(SANITIZED) build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@echo "==> tests with sanitizers"
	@for library in libasan.so libubsan.so libstdc++.so.6; do \
	  preload="$$preload $$($${CXX:-c++} -print-file-name=$$library)"; done; \
	export PYTHONPATH=$(SANITIZED)/lib LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1; \
	$(BIN)/python -P -c "import torch, pemt_fast._C as C; assert '$(SANITIZED)' in C.__file__, C" && \
	$(BIN)/pytest -n $(JOBS) --capture=sys -k "cpu or extension" $(KERNEL_TESTS) $(ARGS)

check: $(BUILT)  ## lint, formatting and types
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> clang-format"
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(READY)  ## rewrite the Python and C++ files the way `check` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(FORMATTED)

# A script path, not `python -m benchmarks.…`: -m would put the root, and with it the folder
# kernels/, on sys.path, where Hugging Face's package of that name is looked for.
bench: $(BUILT)  ## time the operator against its baselines
	@echo "==> benchmark"
	@$(BIN)/python benchmarks/bench_adapter_mixture.py $(ARGS)

triton-resources: $(READY)  ## compile every Triton launch without a GPU; table in docs/
	@echo "==> Triton kernels, compiled"
	@$(BIN)/python tests/helpers/triton_offline.py --page docs/triton_resources.md

report: $(READY)  ## make the tables and plots from benchmarks/results
	@echo "==> report"
	@$(BIN)/python benchmarks/report.py $(ARGS)

test-gpu: $(BUILT)  ## run only the tests that need a GPU
	@echo "==> GPU tests"
	@$(BIN)/pytest -m gpu $(ARGS)

bench-gpu: $(BUILT)  ## time the GPU kernels over their grid, in at most 9 minutes
	@echo "==> grid of the GPU kernels"
	@$(BIN)/python benchmarks/bench_adapter_mixture.py --suite grid --device cuda $(ARGS)

bench-check: $(BUILT)  ## compare a few cells of the operator with the committed ratios, in a minute
	@echo "==> regression gate"
	@$(BIN)/python benchmarks/bench_check.py $(ARGS)

bench-t5: $(BUILT)  ## time PEMT's second stage on T5, and its feed-forward tail alone
	@echo "==> T5 benchmark"
	@$(BIN)/python benchmarks/bench_t5_step.py $(ARGS)

bench-poly: $(BUILT)  ## time Poly and MHR against peft, on layers and on T5-base
	@echo "==> Poly benchmark"
	@$(BIN)/python benchmarks/bench_poly.py $(ARGS)

bench-fuse: $(BUILT)  ## time fuse(model) on peft's adapters
	@echo "==> fuse benchmark"
	@$(BIN)/python benchmarks/bench_fuse.py $(ARGS)

bench-adapterhub: $(BUILT) $(LIBRARY)/.ready  ## time fuse(model) on AdapterHub's adapters
	@echo "==> fuse benchmark, AdapterHub"
	@PYTHONPATH=$(LIBRARY)$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python benchmarks/bench_fuse_adapterhub.py $(ARGS)

bench-decode: $(BUILT)  ## time calls of few tokens and generation, on a GPU
	@echo "==> generation benchmark"
	@$(BIN)/python benchmarks/bench_decode.py --device cuda $(ARGS)

# CUDA's checker of addresses and of races between threads, on the decode kernel's small cases.
sanitize-gpu: $(BUILT)  ## run the decode kernel's tests on a GPU under compute-sanitizer
	@for tool in memcheck racecheck; do echo "==> $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all \
	    --kernel-regex kns=pemt_fast --error-exitcode 1 \
	    $(BIN)/python -m pytest -q -m gpu tests/test_cuda_calls.py -k "$(SMALL_CASES)" || exit 1; done

clean:  ## remove build products and caches; .venv stays
	rm -rf build dist *.egg-info pemt_fast/_C[._]* pemt_fast/_cuda[._]* $(BUILT) .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
