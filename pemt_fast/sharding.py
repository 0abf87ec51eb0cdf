# SPDX-License-Identifier: Apache-2.0
"""FSDP2: a model with adapters sharded over processes, whole parameters for files and back.

`torch.distributed.fsdp.fully_shard` replaces parameters by `DTensor`s, which hold this process's
part. Files hold whole tensors, so that they fit any number of processes, and one alone. What
gathers or cuts is collective: every process must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, mesh: Any = None, **options: Any) -> Model:
    """Shard a model with adapters over the processes of a `torchrun`, in place, and return it.

    `fully_shard` (FSDP2) of every block and of the rest together: T5's embeddings are tied, so they
    must be in one group. Adapters are sharded with the block they are in. `forward`, `generate`,
    `save_pretrained`, `load` before it and `AdapterTrainer` work as without, called by every
    process; `merge` and `disabled` do not.

    Args:
        model: From `get_model` or `load`, the same in every process, not yet merged.
        mesh: A `DeviceMesh`; None: all processes, on the device of the model.
        **options: Of `fully_shard`, such as `mp_policy` and `reshard_after_forward`.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        ValueError: the model does not say what its blocks are.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "torch.distributed must be initialised to shard a model: run under torchrun and call "
            "torch.distributed.init_process_group first"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"model must have blocks of a class in its _no_split_modules, which is {list(names)}"
        )
    if mesh is None:
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    # Mixed into the class by fully_shard; gathers around calls that are not `forward`.
    register_fsdp_forward_method(model, "generate")
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; looked up by what it can do, as its import is slow."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is."""
    return any(is_sharded(tensor) for tensor in tensors)


def require_values(name: str, parameter: Tensor) -> None:
    """Raise if DeepSpeed's ZeRO-3 has taken a parameter's values away.

    Raises:
        RuntimeError: it has.
    """
    if hasattr(parameter, "ds_shape") and parameter.numel() == 0:
        raise RuntimeError(
            f"{name} is partitioned by DeepSpeed ZeRO-3: save inside deepspeed.zero."
            "GatheredParameters(parameters), on every process, or use FSDP2, ZeRO-1 or ZeRO-2"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Collective if it is sharded."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as `other` is: cut over the same processes, or as it is. Collective."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    return distribute_tensor(tensor.to(other.device), sharded.device_mesh, sharded.placements)


def is_writer() -> bool:
    """Whether this process is the one that writes files."""
    distributed = torch.distributed
    return not distributed.is_initialized() or distributed.get_rank() == 0


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors: that of one process without sharding."""
    state = optimizer.state_dict()
    entries = {
        number: {name: _map(whole, value) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Inverse of `whole_optimizer_state`, for the shards that `optimizer` has now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        number: {
            # What has not its parameter's shape, the step, is the same in all processes.
            name: _map(
                lambda t, p=parameters[number]: shard_like(t, p) if t.shape == p.shape else t, value
            )
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _map(change: Any, value: Any) -> Any:
    return change(value) if isinstance(value, Tensor) else value
