# SPDX-License-Identifier: Apache-2.0
"""What the configs of all adapters on linear layers share, and how they attach.

A method's config says which `AdaptedLinear` stands in the place of a layer (`wrap`); finding the
layers, freezing the model and undoing it is the same for all. Works for any model of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pemt_fast.methods.task_config import ADAPTER_DTYPES, TaskConfig
from pemt_fast.nn.adapted_linear import AdaptedLinear
from pemt_fast.nn.routing import Routing
from pemt_fast.t5 import Attachment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.linear_model import LinearAdapterModel

ALL_LINEAR = "all-linear"

# Architecture -> names of the query and value projections, the usual target.
_DEFAULT_TARGETS = {
    "t5": ("q", "v"), "mt5": ("q", "v"), "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "qwen3": ("q_proj", "v_proj"),
    "gemma": ("q_proj", "v_proj"), "gemma2": ("q_proj", "v_proj"), "opt": ("q_proj", "v_proj"),
    "bart": ("q_proj", "v_proj"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LinearConfig(TaskConfig):
    """Adapters beside linear layers.

    Attributes:
        r: Rank of an adapter.
        alpha: The adapters' sum is multiplied by alpha / r.
        dropout: On the adapters' input, in training.
        target_modules: Last parts of the names of the layers, `("q", "v")`; a regular expression
            for whole names; or `all-linear` for all but the language head. None: query and value
            projections of known architectures.
        num_tasks, task_names: As in `TaskConfig`.
        adapter_dtype: Dtype of the adapters; None: the model's.
        impl: Implementation of the operator, see `adapter_mixture`.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    adapter_dtype: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("r", 1)
        self.require_probability("dropout")
        self.require_one_of("adapter_dtype", (None, *ADAPTER_DTYPES))

    @property
    def scale(self) -> float:
        """Factor of the adapters' sum, alpha / r."""
        return self.alpha / self.r

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """What stands in the place of `layer`, with fresh adapters."""
        raise NotImplementedError

    def attach(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> LinearAdapterModel:
        """Build the method on `model`; called by `get_model` and `load`."""
        from pemt_fast.linear_model import LinearAdapterModel

        # Complete: a saved config must find the same layers.
        config = replace(self, target_modules=self.target_names(model))
        routing = Routing()
        replaced = config.replacements(model, routing)
        for _, module in replaced:
            self._move(module, model)
        attachment = Attachment(model)
        config.put(replaced, model, attachment)
        return LinearAdapterModel(model, config, routing, attachment).train(model.training)

    def target_names(self, model: Any) -> str | tuple[str, ...]:
        """`target_modules`, with those of known architectures for None."""
        return _names(model, self.target_modules)

    def put(
        self, replaced: Sequence[tuple[str, nn.Module]], model: Any, attachment: Attachment
    ) -> None:
        """Put the replacements in their places."""
        for name, module in replaced:
            owner, _, last = name.rpartition(".")
            attachment.replace_module(model.get_submodule(owner), last, module)

    def replacements(self, model: Any, routing: Routing) -> list[tuple[str, nn.Module]]:
        """What takes whose place, by name and in this order; nothing is changed yet."""
        found: list[tuple[str, nn.Module]] = []
        for name, layer in target_layers(model, self.target_modules):
            try:
                found.append((name, self.wrap(layer, routing)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found

    def _move(self, module: Any, model: Any) -> None:
        """Bring what is new in `module` to the device and the dtype it will have."""
        base, module.base = module.base, nn.Identity()
        self._move_beside(next(base.parameters()), module, model)
        module.base = base

    def _move_beside(self, weight: Tensor, module: nn.Module, model: Any) -> None:
        if self.adapter_dtype:
            dtype = getattr(torch, self.adapter_dtype)
        else:
            dtype = weight.dtype if weight.is_floating_point() else model.dtype
        module.to(device=weight.device, dtype=dtype)


def target_layers(model: Any, targets: str | Sequence[str] | None) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the layers that `target_modules` means, in the model's order.

    Raises:
        ValueError: none are meant, or one is not an `nn.Linear`.
    """
    targets = _names(model, targets)
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        return [(name, module) for name, module in linear if module is not head]
    found = [(name, m) for name, m in model.named_modules() if name and is_meant(name, targets)]
    others = [name for name, module in found if not isinstance(module, nn.Linear)]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        raise ValueError(f"target_modules must name nn.Linear layers, {others[0]} is a {kind}")
    if not found:
        last = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(f"target_modules {targets!r} name no layer; there are {sorted(last)}")
    return found


def _names(model: Any, targets: str | Sequence[str] | None) -> str | tuple[str, ...]:
    if targets is not None:
        return targets if isinstance(targets, str) else tuple(targets)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules must be given for {kind!r}; known are {sorted(_DEFAULT_TARGETS)}"
        )
    return _DEFAULT_TARGETS[kind]


def is_meant(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets`, last parts of names or a regular expression, mean the module `name`."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
