# SPDX-License-Identifier: Apache-2.0
"""Whether an eager call may leave torch's dispatcher out.

The way through `torch.ops` tells profilers, tracers, transforms, tensor subclasses and dispatch
modes about a call. It costs more than the rest of the host's work; where nobody listens the
operator is called without it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def _included() -> int:
    """The dispatch keys that this thread adds to every call."""
    return torch._C._dispatch_tls_local_include_set().raw_repr()


with torch.inference_mode(False):
    _OUTSIDE = _included()
with torch.inference_mode():
    _INFERENCE = _included()


def nobody_watches(*tensors: Tensor | None) -> bool:
    """True if the arguments are plain tensors with data and only autograd wants to see the call."""
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    if _included() not in (_OUTSIDE, _INFERENCE) or forward_ad._current_level >= 0:
        return False
    return all(
        t is None or (type(t) in _PLAIN and not t.is_meta and not t.is_neg()) for t in tensors
    )
