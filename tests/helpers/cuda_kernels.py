"""The library of CUDA kernels with its threads emulated, for CPU tensors."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cuda_sources import COMPILER, HELPERS, PLAN

from pemt_fast.ops import cuda_door, cuda_library


def build_emulated(folder: Path) -> Path:
    """Compile it."""
    library = folder / "emulated.so"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-o", library,
         HELPERS / "emulated_library.cpp", PLAN], check=True,
    )  # fmt: skip
    return library


def forget() -> None:
    """What is known about the library."""
    for cached in (cuda_library.missing_reason, cuda_library._obstacle, cuda_door.can_run):
        cached.cache_clear()


@contextmanager
def loaded(library: Path) -> Iterator[None]:
    """`impl="cuda"` takes its kernels from this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEMT_FAST_CUDA_LIBRARY", str(library))
        forget()
        yield
    forget()
    cuda_library.missing_reason()  # loads what was there before


def launches(library: Path) -> int:
    """How many kernels the emulated library has run."""
    count = ctypes.CDLL(str(library)).pemt_fast_emulated_launches
    count.restype = ctypes.c_long
    return count()
