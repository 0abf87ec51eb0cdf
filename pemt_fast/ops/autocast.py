# SPDX-License-Identifier: Apache-2.0
"""The autocast region around a call: its dtype, and a block that is outside of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region around the call, None outside of one."""
    # Asking a device type without autocast, such as meta, raises.
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A block whose matmuls are not autocast once more: the caller has cast `x`."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
