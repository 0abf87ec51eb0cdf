# SPDX-License-Identifier: Apache-2.0
"""A linear's weight and the down-projections beside it as one `[H + N, D]` matrix.

`linear_mixture` with `impl="torch"` then needs one matmul for both. The parameters stay the same
objects, their data become views of one storage, so what is written into either is seen at once.
Nothing depends on it but speed: the operator looks at the tensors in every call, and what gives a
parameter new data (`.to(dtype)`, `deepcopy`, `load_state_dict(assign=True)`) merely ends it;
`is_stacked` says so and `stack_weights` may be called again. The look is `one_matrix` in
`ops/stacked.py`.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.ops.stacked import one_matrix

logger = logging.getLogger("pemt_fast")


@torch.no_grad()
def stack_weights(linear: nn.Module, mixture: AdapterMixture) -> bool:
    """Lay `mixture.w_down` behind `linear.weight` in one new storage; True if they lie so then.

    Values, dtypes, `requires_grad` and the parameters themselves stay. NOTE: `torch.save` writes
    whole storages, so a file with the linear alone then also holds the bytes of `w_down`;
    safetensors writes each parameter by itself.

    Args:
        linear: An `nn.Linear`. For anything else, a weight of another dtype or device than
            `w_down`, or one that shares its memory with other tensors, nothing changes; the reason
            is logged once.
        mixture: The adapters beside it, of the same input width.
    """
    if is_stacked(linear, mixture):
        return True
    reason = _obstacle(linear, mixture)
    if reason is None:
        weight, w_down = linear.weight, mixture.w_down
        assert isinstance(weight, nn.Parameter)
        with torch.inference_mode(False):
            both = torch.cat([weight.detach(), w_down.detach()])
            if type(both) is Tensor:
                weight.data, w_down.data = both.split([len(weight), len(w_down)])
                return True
        reason = "a mode makes tensors that are not plain ones"
    _log_once(f"the base and its adapters stay two matrices: {reason}")
    return False


@torch.no_grad()
def unstack_weights(linear: nn.Module, mixture: AdapterMixture) -> None:
    """Give both parameters storages of their own again, with the same bits."""
    if is_stacked(linear, mixture):
        for parameter in (linear.weight, mixture.w_down):
            assert isinstance(parameter, nn.Parameter)
            parameter.data = parameter.data.clone()


def is_stacked(linear: nn.Module, mixture: AdapterMixture) -> bool:
    """Whether the two are one matrix in memory. Cheap; False for bases without such a weight."""
    weight, w_down = getattr(linear, "weight", None), mixture.w_down
    if type(weight) is not nn.Parameter or type(w_down) is not nn.Parameter or weight.is_meta:
        return False
    return one_matrix(weight, w_down) is not None


def _obstacle(linear: nn.Module, mixture: AdapterMixture) -> str | None:
    """Why the two cannot become one matrix; None if they can."""
    if type(linear) is not nn.Linear:
        return f"the base is a {type(linear).__name__}, not a plain nn.Linear"
    weight, w_down = linear.weight, mixture.w_down
    for name, parameter in (("weight", weight), ("w_down", w_down)):
        if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
            return f"{name} is a {type(parameter).__name__} of layout {parameter.layout}"
        if parameter.is_meta or parameter.is_inference():
            return f"{name} is a {'meta' if parameter.is_meta else 'inference'} tensor"
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
    if not weight.is_floating_point() or weight.dtype != w_down.dtype:
        return f"weight is {weight.dtype}, w_down {w_down.dtype}"
    if weight.device != w_down.device:
        return f"weight is on {weight.device}, w_down on {w_down.device}"
    if weight.shape[1] != w_down.shape[1]:
        return f"weight has {weight.shape[1]} columns, w_down {w_down.shape[1]}"
    return _sharing(weight, w_down)


def _sharing(weight: Tensor, w_down: Tensor) -> str | None:
    """Who else would be left behind in the old memory: another tensor, or another process."""
    for name, parameter in (("weight", weight), ("w_down", w_down)):
        storage = parameter.untyped_storage()
        if parameter.device.type == "cpu" and storage.is_shared():
            return f"{name} is shared between processes"
        both = weight.untyped_storage()._cdata == w_down.untyped_storage()._cdata
        # One of the users is `storage` itself.
        if torch._C._storage_Use_Count(storage._cdata) - 1 > 1 + both:
            return f"{name} shares its storage with another tensor"
    return None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)
