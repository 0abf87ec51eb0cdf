# SPDX-License-Identifier: Apache-2.0
"""The seams of Hugging Face T5: find the places where adapters attach, attach, and undo it all.

Works on instances, never on classes, and copies no forward: modules are replaced inside T5's
sub-layers, so output recorders, caches and checkpointing keep working. Fits T5 v1.0, v1.1, FLAN-T5,
mT5 and byT5, which share these attribute names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# A T5ForConditionalGeneration or one of its relatives. Its sub-modules have no static types.
T5Model: TypeAlias = Any

# T5 has relative positions and no hard limit; it is pretrained on sequences of this length.
DEFAULT_MAX_POSITIONS = 512


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward layer.

    Attributes:
        name: `encoder.i` or `decoder.i`.
        path: Dotted path of the feed-forward sub-layer, `encoder.block.i.layer.1`.
        feed_forward: The module that holds `wi` (or `wi_0`, `wi_1`) and `wo`.
    """

    name: str
    path: str
    feed_forward: Any

    @property
    def wo_path(self) -> str:
        """Dotted path of `wo`."""
        return f"{self.path}.DenseReluDense.wo"


def check_t5(model: T5Model) -> None:
    """Raise unless `model` is an encoder-decoder with T5's module names and a language head."""
    missing = [
        name for name in ("shared", "encoder", "decoder", "lm_head") if not hasattr(model, name)
    ]
    if missing or not hasattr(model, "generate"):
        raise TypeError(
            "model must be a T5ForConditionalGeneration (or MT5ForConditionalGeneration), got "
            f"{type(model).__name__}, which has no {', '.join(missing) or 'generate'}"
        )
    for stack in ("encoder", "decoder"):
        blocks = getattr(getattr(model, stack), "block", None)
        if not blocks or not hasattr(blocks[0].layer[-1], "DenseReluDense"):
            raise TypeError(
                f"model.{stack} must hold T5 blocks with a DenseReluDense layer, got "
                f"{type(getattr(model, stack)).__name__}"
            )


def feed_forward_sites(model: T5Model) -> list[FeedForwardSite]:
    """The feed-forward layers, encoder first."""
    sites = []
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            path = f"{stack}.block.{i}.layer.{len(block.layer) - 1}"
            sites.append(FeedForwardSite(f"{stack}.{i}", path, block.layer[-1].DenseReluDense))
    return sites


def self_attention_paths(model: T5Model) -> list[str]:
    """Dotted paths of the self-attention sub-layers, `encoder.block.i.layer.0`, encoder first."""
    return [
        f"{stack}.block.{i}.layer.0"
        for stack in ("encoder", "decoder")
        for i in range(len(getattr(model, stack).block))
    ]


def cross_attention_paths(model: T5Model) -> list[str]:
    """Dotted paths of the cross-attention sub-layers, `decoder.block.i.layer.1`."""
    return [f"decoder.block.{i}.layer.1" for i in range(len(model.decoder.block))]


def block_number(model: T5Model, path: str) -> int:
    """Number of the block that `path` lies in; the decoder's follow those of the encoder."""
    stack, _, number, *_ = path.split(".")
    return int(number) + (len(model.encoder.block) if stack == "decoder" else 0)


def layer_norm_sites(model: T5Model) -> list[tuple[nn.Module, str]]:
    """Owner and attribute of all layer norms of both stacks, the final ones included."""
    sites: list[tuple[nn.Module, str]] = []
    for stack in (model.encoder, model.decoder):
        sites += [(layer, "layer_norm") for block in stack.block for layer in block.layer]
        sites.append((stack, "final_layer_norm"))
    return sites


def max_positions(model: T5Model) -> int:
    """Longest sequence the model was made for: `config.n_positions`, else 512."""
    return int(getattr(model.config, "n_positions", None) or DEFAULT_MAX_POSITIONS)


class Attachment:
    """Everything that was changed on one model, so that it can be undone exactly."""

    def __init__(self, model: T5Model) -> None:
        self.model = model
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self._modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._added: list[tuple[nn.Module, str]] = []
        self._parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._original_ids = {id(t) for t in model.state_dict(keep_vars=True).values()}
        self._untouched: frozenset[str] = frozenset()
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def replace_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Put `module` in place of `parent.name`."""
        self._modules.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    def add_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Give `parent` a child that it does not have."""
        self._added.append((parent, name))
        parent.add_module(name, module)

    def train_copies(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put trainable copies in the places of `parameters`; the originals stay untouched.

        Tied weights stay tied: places that share a parameter share its copy.
        """
        copies = {id(p): nn.Parameter(p.detach().clone()) for p in parameters}
        for module in self.model.modules():
            own = list(module.named_parameters(recurse=False, remove_duplicate=False))
            for name, original in own:
                if id(original) in copies:
                    self._parameters.append((module, name, original))
                    setattr(module, name, copies[id(original)])

    def add_hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        """Remember a hook for removal."""
        self._hooks.append(handle)

    def seal(self) -> None:
        """Note, once everything is attached, which entries of the state dict are T5's own."""
        entries = self.model.state_dict(keep_vars=True).items()
        self._untouched = frozenset(name for name, t in entries if id(t) in self._original_ids)

    def untouched_names(self) -> frozenset[str]:
        """State-dict names, as they are while attached, of the model's own tensors."""
        return self._untouched

    def swap_parameters(self) -> None:
        """Exchange the trained copies with the originals; twice is the identity."""
        for i, (module, name, other) in enumerate(self._parameters):
            current = getattr(module, name)
            _follow(other, current)
            setattr(module, name, other)
            self._parameters[i] = (module, name, current)

    def undo(self) -> None:
        """Restore modules, parameters, hooks and `requires_grad` as they were."""
        for handle in self._hooks:
            handle.remove()
        for parent, name, module in reversed(self._modules):
            setattr(parent, name, module)
        for parent, name in self._added:
            delattr(parent, name)
        for module, name, original in self._parameters:
            _follow(original, getattr(module, name))
            setattr(module, name, original)
        self._hooks, self._modules, self._parameters, self._added = [], [], [], []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable[name])


@torch.no_grad()
def _follow(parameter: nn.Parameter, leader: Tensor) -> None:
    """Move a parameter that is outside the module tree to where the model has gone since."""
    if parameter.device != leader.device or parameter.dtype != leader.dtype:
        parameter.data = parameter.data.to(leader.device, leader.dtype)
