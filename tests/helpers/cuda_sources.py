"""Where the CUDA kernels and their emulation are, and what compiles them."""

import fcntl
import os
import shutil
import subprocess
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


def compiled(factory: pytest.TempPathFactory, source: str, name: str, *flags: str) -> Path:
    """A program or library of `tests/helpers/cuda`, compiled by the first process that asks."""
    if COMPILER is None:
        pytest.skip("no C++ compiler here")
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all processes of this run
    result = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            beside = result.with_suffix(".new")
            subprocess.run(
                [COMPILER, "-std=c++17", "-w", *flags, "-o", beside, HELPERS / source, PLAN],
                check=True,
            )
            beside.rename(result)
    return result
