# SPDX-License-Identifier: Apache-2.0
"""Whether kernels were compared with the reference on this GPU (`pemt-fast doctor`).

Until then `impl="auto"` does not take them, and says so once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from pemt_fast.kernels import cache
from pemt_fast.ops import cuda_library

logger = logging.getLogger("pemt_fast")

VERIFIED = ("triton", "cuda")


def _name(impl: str) -> str:
    """The cache's file about it; of the library that is loaded, which the cache does not know."""
    if impl == "triton":
        return "verified"
    return f"verified_cuda_{hashlib.sha256(cuda_library.path().read_bytes()).hexdigest()[:8]}"


@functools.cache
def verified_dtypes(impl: str, device: torch.device) -> frozenset[str]:
    """The dtypes, as torch prints them, in which the kernels passed on this GPU."""
    return frozenset(cache.load(_name(impl), device) or ())


def is_verified(impl: str, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether the kernels passed on this GPU in this dtype (None: in any); if not, says so once."""
    found = verified_dtypes(impl, device)
    if found if dtype is None else str(dtype) in found:
        return True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _log_once(impl, name)
    return False


# A traced call takes the answer for a constant. torch.compiler.assume_constant_result sets the same
# attribute, and imports the compiler to do it.
is_verified._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _log_once(impl: str, gpu: str) -> None:
    logger.warning(
        "impl='auto' means 'torch' on %s: with these versions the kernels of impl=%r have not been "
        "compared with the reference there. `pemt-fast doctor` does that and enables them",
        gpu, impl,
    )  # fmt: skip


def remember(impl: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> Path:
    """Keep that these dtypes, and no others, passed on this GPU; returns the file."""
    path = cache.save(_name(impl), device, sorted(map(str, dtypes)))
    verified_dtypes.cache_clear()
    return path
