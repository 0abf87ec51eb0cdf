# SPDX-License-Identifier: Apache-2.0
"""Targets that were trained one by one, put together into one model of several targets.

They must share what is frozen: the sources, bit by bit. Everything that was trained is kept per
target (`nn/targets.py`), so that each sequence of a batch gets what its own model would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from pemt_fast.methods.pemt_config import PemtConfig

# What each target has of its own, and what is no matter of the weights; all others must agree.
_OWN_FIELDS = {"target", "description", "prompt_length", "recompute", "impl"}


def _transposed(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.t() for t in tensors])


# End of the name in a model of one target -> end of the name in a model of several, and how the
# tensors of all targets become one.
_JOINED: dict[str, tuple[str, Callable[[list[Tensor]], Tensor]]] = {
    "gate.w_gate": ("gate.w_gate", torch.stack),
    "target_adapter.down.weight": ("target_adapter.w_down", torch.cat),
    "target_adapter.up.weight": ("target_adapter.w_up", _transposed),
    "target_adapter.down.bias": ("target_adapter.b_down", torch.cat),
    "target_adapter.up.bias": ("target_adapter.b_up", torch.stack),
    "layer_norm.weight": ("layer_norm.weights", torch.stack),
}


def join(
    directories: Sequence[str],
    configs: Sequence[PemtConfig],
    weights: Sequence[Mapping[str, Tensor]],
) -> tuple[PemtConfig, dict[str, Tensor]]:
    """Config and tensors of one model with the targets of all.

    Args:
        directories: Where they come from, for messages.
        configs: Of one target each, as saved.
        weights: The tensors saved beside them.

    Raises:
        ValueError: they differ in a choice or in a frozen source; the message names both sides.
    """
    for directory, config in zip(directories, configs, strict=True):
        if config.stage != 2 or len(config.tasks) != 1:
            raise ValueError(f"{directory}: expected one target trained in stage 2 of PEMT")
        for name in (f.name for f in fields(PemtConfig) if f.name not in _OWN_FIELDS):
            ours, first = getattr(config, name), getattr(configs[0], name)
            if ours != first:
                raise ValueError(
                    f"{directory}: {name} is {ours!r}, but {first!r} in {directories[0]}; targets "
                    "of one model must share it"
                )
    config = replace(
        configs[0],
        target=[c.tasks[0] for c in configs],
        description=[c.per_target("description")[0] for c in configs],
        prompt_length=[c.per_target("prompt_length")[0] for c in configs],
    )
    return config, _join_weights(directories, weights)


def _join_weights(
    directories: Sequence[str], weights: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, first in weights[0].items():
        for directory, tensors in zip(directories, weights, strict=True):
            if name not in tensors:
                raise ValueError(f"{directory}: {name} is missing, {directories[0]} has it")
        tensors_of_all = [tensors[name] for tensors in weights]
        if name == "prompt.prompt":
            joined |= {f"prompt.prompts.{k}": t for k, t in enumerate(tensors_of_all)}
            continue
        rule = next(((old, *new) for old, new in _JOINED.items() if name.endswith(old)), None)
        if rule is None:
            _check_shared(name, directories, tensors_of_all)
            joined[name] = first
            continue
        old, new, how = rule
        joined[name.removesuffix(old) + new] = how(tensors_of_all)
    return joined


def _check_shared(name: str, directories: Sequence[str], tensors: Sequence[Tensor]) -> None:
    for directory, tensor in zip(directories, tensors, strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise ValueError(
                f"{directory}: the frozen {name} differs from that of {directories[0]}; targets of "
                "one model must share their sources"
            )
