"""Where the CUDA kernels and their emulation are, and what compiles them."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HELPERS = ROOT / "tests" / "helpers" / "cuda"
PLAN = SOURCES / "decode_plan.cpp"
COMPILER = shutil.which("c++")
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed here")
