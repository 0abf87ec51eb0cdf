# SPDX-License-Identifier: Apache-2.0
"""`PemlModel`: a model with LoRA and a searched prefix, and the way through the search.

model = pemt_fast.get_model(t5, pemt_fast.PemlConfig())    # searched while it is trained
SearchTrainer(model, …).train()                            # or a loop that calls search_at
model.discretise()                                         # one operator per cell: train on,
fresh = pemt_fast.get_model(other_t5, model.adapter_config)  # or train anew
model.materialise()                                        # keys and values instead of networks
model.merge()                                              # LoRA into the weights
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pemt_fast.linear_model import LinearAdapterModel
from pemt_fast.nn.prefix_attention import AttentionPrefix
from pemt_fast.nn.prefix_network import (
    ConstantPrefix,
    Logits,
    PrefixNetwork,
    SearchedPrefix,
    SearchSchedule,
)
from pemt_fast.nn.routing import RoutingState
from pemt_fast.sharding import any_sharded

if TYPE_CHECKING:
    from pemt_fast.methods.peml import PemlConfig


class PemlModel(LinearAdapterModel):
    """A model with LoRA and a prefix of keys and values. Built by `get_model`.

    Attributes:
        base_model, adapter_config: See `AttachedModel`.
        schedule: Where the search is: temperature, entropy weight, share of `none`.
    """

    adapter_config: PemlConfig

    def __init__(self, *args: Any) -> None:
        *others, schedule = args
        super().__init__(*others)
        self.schedule: SearchSchedule = schedule

    def _more_loss(self, state: RoutingState) -> Tensor | None:
        # In a search, while training: the entropy of the softmax over operators but `none`.
        logits = self.logits() if self.training and self.routing.enabled else []
        if not logits:
            return None
        entropy = torch.stack([own.entropy() for own in logits]).mean()
        return self.schedule.entropy_weight * entropy

    def _prepare(self, state: RoutingState, rows: int) -> None:
        super()._prepare(state, rows)
        for name, prefix in self.prefixes().items():
            if not any_sharded(prefix.parameters()):
                state.prepared[name] = prefix()

    def prefixes(self) -> dict[str, AttentionPrefix]:
        """The prefixes by the name of their attention layer."""
        found = [m for m in self.base_model.modules() if isinstance(m, AttentionPrefix)]
        return {prefix.name: prefix for prefix in found}

    def networks(self) -> list[PrefixNetwork]:
        """The networks in the order of their layers, shared ones once."""
        return [m for m in self.base_model.modules() if isinstance(m, PrefixNetwork)]

    def logits(self) -> list[Logits]:
        """The logits of the search, shared ones once; empty when it is over."""
        return [m for m in self.base_model.modules() if isinstance(m, Logits)]

    def router_parameters(self) -> list[nn.Parameter]:
        """The parameters of the architecture, which have a learning rate of their own."""
        return [own.alpha for own in self.logits() if own.alpha.requires_grad]

    def search_at(self, progress: float) -> None:
        """Set temperature, entropy weight and the share of `none` for a part of the search.

        Args:
            progress: 0 at the start, 1 at the end.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be from 0 to 1, got {progress}")
        self.schedule.at(progress)

    @torch.no_grad()
    def architecture(self) -> tuple[tuple[str, ...], ...]:
        """The operator of each cell of each network: in a search the ones with the largest weight.

        One network if it is shared, or if its architecture is.
        """
        if not self.adapter_config.searches:
            return tuple(map(tuple, self.adapter_config.architecture or ()))
        return tuple(own.decided() for own in self.logits())

    @torch.no_grad()
    def architecture_weights(self) -> list[Tensor]:
        """`Logits.weights()`, `[L, operators]`, of each network, or of what they share."""
        return [own.weights() for own in self.logits()]

    def discretise(self) -> None:
        """End the search: keep the operators with the largest weights, with their values.

        Optimizers have to be made anew. To train anew from the start, build another model with
        `adapter_config`, which has the architecture from here on.

        Raises:
            RuntimeError: there is no search to end.
        """
        config = self.adapter_config
        if not config.searches:
            raise RuntimeError("the architecture is fixed already")
        self.adapter_config = config = replace(config, architecture=self.architecture())
        made: dict[int, PrefixNetwork] = {}
        for searched in self.networks():
            assert searched.logits is not None
            cells = searched.logits.decided()
            network = config.network(searched.out.shape[0], cells, None)
            network.to(device=searched.out.device, dtype=searched.out.dtype)
            network.take(searched, cells)
            made[id(searched)] = network
        for prefix in self.prefixes().values():
            source = prefix.source
            assert isinstance(source, SearchedPrefix)
            source.network = made[id(source.network)]

    @torch.no_grad()
    def materialise(self) -> None:
        """Put the keys and values that the networks make in the networks' places.

        What remains is a plain prefix (`prefix_depth=0`): the same outputs, nothing to compute, and
        no search any more.

        Raises:
            RuntimeError: the architecture is still searched.
        """
        config = self.adapter_config
        if config.searches:
            raise RuntimeError("the architecture is still searched: discretise() first")
        if config.prefix_depth == 0:
            return
        self.adapter_config = replace(config, prefix_depth=0, architecture=None)
        for prefix in self.prefixes().values():
            both = prefix.source()
            length, out_features = both.shape
            constant = ConstantPrefix(length, out_features, 0.0).to(both.device, both.dtype)
            constant.both.copy_(both)
            prefix.source = constant
