"""Which implementations of `adapter_mixture` the tests run, and the widest dtype of each."""

import importlib.util
import os

import pytest
import torch

from pemt_fast.ops import extension

needs_extension = pytest.mark.skipif(
    extension.load() is None, reason=extension.missing_reason() or ""
)
CPU = pytest.param("cpu", marks=needs_extension)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# On CPU tensors only in its interpreter, which the session does not use where there is a GPU.
TRITON = pytest.param(
    "triton",
    marks=[
        needs_triton,
        pytest.mark.skipif(not INTERPRETED, reason="the tests marked gpu run these kernels"),
    ],
)

# A new implementation joins here first, and is watched to fail.
IMPLS = ["torch", CPU, TRITON]

# The widest dtype of each: there an error of the order of its rounding step is no wrong index.
WIDEST = {
    "torch": torch.float64,
    "reference": torch.float64,
    "cpu": torch.float32,
    "triton": torch.float32,
}
