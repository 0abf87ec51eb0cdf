# SPDX-License-Identifier: Apache-2.0
"""The library of CUDA C++ kernels `pemt_fast/_cuda.so`: its loading, and why it cannot run.

`csrc/build_cuda.py` compiles it with nvcc, or leaves the reason in `_cuda_missing.txt`. The
extension calls it (`csrc/decode_mixture.cpp`); it brings a CUDA runtime of its own, so that only
the driver has to be new enough for it. `PEMT_FAST_CUDA_LIBRARY` names another file in its place, as
the tests do with kernels that are emulated on the host.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from pemt_fast.ops import extension

FILE = Path(__file__).parents[1] / "_cuda.so"
NOTE = Path(__file__).parents[1] / "_cuda_missing.txt"


def path() -> Path:
    """The file that is, or would be, loaded."""
    return Path(os.environ.get("PEMT_FAST_CUDA_LIBRARY") or FILE)


@functools.lru_cache(maxsize=1)
def missing_reason() -> str | None:
    """Why there is no library, and what to do about it; None where one is loaded."""
    module, file = extension.load(), path()
    if module is None:
        return extension.missing_reason()
    if not file.is_file():
        reason = f"there is no file {file}" if file != FILE else "it has not been built"
        if file == FILE and NOTE.is_file():
            reason = NOTE.read_text(encoding="utf-8").strip()
        return f"the library {file.name} of CUDA kernels is missing: {reason}; {extension.REBUILD}"
    if error := module.load_cuda_library(str(file)):
        return (
            f"the library {file.name} of CUDA kernels does not load: {error}; {extension.REBUILD}"
        )
    return None


def is_emulated() -> bool:
    """Whether its kernels run on the host, for CPU tensors."""
    return missing_reason() is None and bool(_facts()["emulated"])


def facts() -> dict[str, str | bool | None]:
    """What compiled it and for which devices, or why it is missing; for `pemt-fast info`."""
    return {"why_not": missing_reason(), **(_facts() if missing_reason() is None else {})}


def _facts() -> dict[str, str | bool]:
    module = extension.load()
    assert module is not None
    toolkit, architectures, emulated = module.cuda_library()
    names = architectures.replace("+", ", ")
    return {"toolkit": toolkit, "architectures": names, "emulated": emulated}


def reasons(device: torch.device) -> list[str]:
    """Every reason why its kernels cannot run on a device; they are loaded there."""
    wanted = "cpu" if is_emulated() else "cuda"
    found = []
    if device.type != wanted:
        found.append(f"it runs on {wanted} tensors, x is on {device}")
    if wanted == "cuda" and not torch.cuda.is_available():
        found.append("torch sees no CUDA device")
    if missing := missing_reason():
        found.append(missing)
    elif not found:
        found += _obstacle(device)
    return found


# A traced call takes the answer for a constant, see `verified.py`.
reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _obstacle(device: torch.device) -> tuple[str, ...]:
    module = extension.load()
    assert module is not None
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
    error = module.cuda_device_obstacle(index)
    found = _facts()
    built = f"CUDA {found['toolkit']} for {found['architectures']}"
    return (f"its kernels, built with {built}, do not load on {device}: {error}",) if error else ()
