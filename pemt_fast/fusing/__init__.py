# SPDX-License-Identifier: Apache-2.0
"""`fuse(model)`: adapters of other libraries in a live model, computed by this library's operators.

Modules stay where and what they are: same parameters, same `state_dict`, same class but for a
subclass with another `forward`, which `unfuse` takes away again. What is known: peft's LoRA with
one, several or mixed adapters and its Poly (`peft_lora.py`, `peft_poly.py`), bottleneck adapters of
AdapterHub's `adapters` on T5 and their compositions (`adapterhub.py`); other modules through
`FusedKind` (`protocol.py`).
"""

from __future__ import annotations

from pemt_fast.fusing.fuse import FuseReport, Site, default_kinds, fuse, unfuse
from pemt_fast.fusing.protocol import FusedKind, StackedCall

__all__ = ["FuseReport", "FusedKind", "Site", "StackedCall", "default_kinds", "fuse", "unfuse"]
