"""The library of CUDA kernels with its threads emulated, for CPU tensors."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cuda_sources import compiled

from pemt_fast.ops import cuda_door, cuda_library


def emulated_library(factory: pytest.TempPathFactory) -> Path:
    """Compile it, once for all processes of a run."""
    return compiled(factory, "emulated_library.cpp", "emulated.so", "-O2", "-shared", "-fPIC")


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
