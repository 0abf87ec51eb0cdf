# SPDX-License-Identifier: Apache-2.0
"""Which implementation of `adapter_mixture` runs, and why another one cannot.

A named implementation works or raises with every reason; `auto` follows `AUTO_TABLE`, which
`pemt-fast info` prints. Nothing is ever replaced silently. The environment variable
`PEMT_FAST_IMPL` names the implementation that `auto` means, for debugging; its use is logged once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from pemt_fast.ops import cuda_library, extension
from pemt_fast.ops.verified import VERIFIED, is_verified

logger = logging.getLogger("pemt_fast")

IMPLS = ("auto", "reference", "torch", "cpu", "triton", "cuda")

# Device type -> what impl="auto" takes, if it can run, before "torch", which can run anywhere.
# Kernels for GPUs also have to be verified on the one at hand, see `verified.py`. "cuda" joins the
# table when it has been measured on hardware.
AUTO_TABLE = {"cpu": "cpu", "cuda": "triton"}

# Implementation -> module with the pair forward / backward of `stacked.py`.
_BACKENDS = {
    "torch": "pemt_fast.ops.stacked",
    "triton": "pemt_fast.ops.triton_backend",
    "cuda": "pemt_fast.ops.cuda_backend",
}

# Under Triton's interpreter its kernels run on any device, slowly: for tests.
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Constants, so that no call asks again.
_TRITON_MISSING = importlib.util.find_spec("triton") is None
_EXTENSION = extension.load()
_EXTENSION_MISSING = extension.missing_reason()

# Without vector instructions our products are slower than those of torch; impl="cpu" still runs.
CPU_KERNELS_ARE_FAST = _EXTENSION is not None and _EXTENSION.cpu_isa() != "plain"


def unavailable_reasons(
    impl: str, device: torch.device, dtype: torch.dtype | None = None
) -> list[str]:
    """Every reason why `impl` cannot run on `device`, with `x` of `dtype`; empty when it can."""
    reasons = cuda_library.reasons(device) if impl == "cuda" else []
    wanted = {"cpu": "cpu", "triton": "cuda"}.get(impl)
    if impl == "triton" and _TRITON_INTERPRETED:
        wanted = None
    if wanted is not None and device.type != wanted:
        reasons.append(f"it runs on {wanted} tensors, x is on {device}")
    if wanted == "cuda" and not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    if impl in ("triton", "cuda") and _TRITON_MISSING:
        also = ", whose kernels take what these do not" if impl == "cuda" else ""
        reasons.append(f"the package triton is not installed{also}")
    if impl == "cpu" and _EXTENSION_MISSING is not None:
        reasons.append(_EXTENSION_MISSING)
    if impl in ("cpu", "triton", "cuda") and dtype == torch.float64:
        reasons.append("it computes in float32, bfloat16 or float16, x is float64")
    return reasons


def auto_impl(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """What `impl="auto"` means for `x` of `dtype` on `device`."""
    impl = AUTO_TABLE.get(device.type, "torch")
    if impl == "cpu" and not CPU_KERNELS_ARE_FAST:
        return "torch"
    if unavailable_reasons(impl, device, dtype):
        return "torch"
    return "torch" if impl in VERIFIED and not is_verified(impl, device, dtype) else impl


def means_torch(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `impl` stands for `torch` there; says so of what cannot run as well."""
    if impl == "auto":
        impl = os.environ.get("PEMT_FAST_IMPL") or "auto"
    return (auto_impl(device, dtype) if impl == "auto" else impl) == "torch"


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The implementation to run for `x` of `dtype` on `device`.

    Raises:
        ValueError: `impl` is not one of `IMPLS`.
        RuntimeError: a named implementation cannot run; the message lists every reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        forced = os.environ.get("PEMT_FAST_IMPL")
        if not forced or forced == "auto":
            return auto_impl(device, dtype)
        if forced not in IMPLS:
            raise ValueError(f"PEMT_FAST_IMPL must be one of {', '.join(IMPLS)}, got {forced!r}")
        _log_forced(forced)
        impl = forced
    reasons = unavailable_reasons(impl, device, dtype)
    if reasons:
        others = _say_others(impl, device, dtype)
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}\n{others}")
    return impl


def _say_others(impl: str, device: torch.device, dtype: torch.dtype | None) -> str:
    """Of the implementations but `impl` which run, and why the rest do not."""
    reasons = {
        name: unavailable_reasons(name, device, dtype)
        for name in IMPLS
        if name not in ("auto", impl)
    }
    taken = auto_impl(device, dtype)
    runs = [f"{name} (what auto takes)" if name == taken else name for name, why in reasons.items()
            if not why]  # fmt: skip
    rest = [f"{name} does not run: {'; '.join(why)}" for name, why in reasons.items() if why]
    return "\n".join([f"here run: {', '.join(runs)}", *rest])


def _log_forced(impl: str) -> None:
    _log_forced_once(impl)


# The compiler calls it while it traces, instead of tracing it: logging would break the graph.
_log_forced._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _log_forced_once(impl: str) -> None:
    logger.warning("impl='auto' means %r because PEMT_FAST_IMPL is set", impl)


def kernels_beside(impl: str) -> str:
    """What computes where the CUDA C++ kernels do not, for the same `impl`."""
    return "triton" if impl == "cuda" else impl


@functools.lru_cache(maxsize=8)
def backend(impl: str) -> ModuleType:
    """The module that implements `impl`, imported on first use."""
    return importlib.import_module(_BACKENDS[impl])
