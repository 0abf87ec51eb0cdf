# SPDX-License-Identifier: Apache-2.0
"""PEML (Chowdhury et al., 2026): a searched prefix of keys and values beside LoRA, for all tasks.

From the paper's description: prefix vectors for keys and values only, made by an architecture that
a differentiable search fixes by argmax; LoRA on all projections trained at the same time and merged
afterwards; no task ids. There is no published code. The search space (`nn/prefix_operators.py`),
its sharing and its schedule are this library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pemt_fast.methods.linear_config import ALL_LINEAR
from pemt_fast.methods.lora import LoraConfig
from pemt_fast.nn.prefix_attention import AttentionPrefix, PrefixedConfig, uses_interface
from pemt_fast.nn.prefix_network import (
    ConstantPrefix,
    Logits,
    PrefixNetwork,
    SearchedPrefix,
    SearchSchedule,
)
from pemt_fast.nn.prefix_operators import OPERATORS
from pemt_fast.nn.prefix_sites import PLACES, AttentionSite, attention_sites
from pemt_fast.nn.routing import Routing
from pemt_fast.t5 import Attachment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.peml_model import PemlModel

SHARING = ("none", "architecture", "network")


@dataclass(frozen=True, kw_only=True)
class PemlConfig(LoraConfig):
    """A prefix network per attention layer and LoRA on the linear layers; `task_ids` are ignored.

    Without an `architecture` the network is searched while it is trained: `PemlModel` says what to
    do then. With `prefix_depth=0` there is no network: a plain trained prefix, the form also of a
    finished one.

    Attributes:
        r, alpha, dropout, impl: Of LoRA, as in `LoraConfig`.
        target_modules: As in `LoraConfig`; all linear layers by default, `()` for no LoRA.
        prefix_length: P positions.
        prefix_places: Which attention layers: of `encoder`, `decoder` and `cross`, those there are
            by default.
        prefix_depth: L cells of a network.
        prefix_width: C features inside a network.
        operators: Names to search among.
        operator_rank: Of the operator `low_rank`.
        sharing: What attention layers have in common besides their form: `none`; the `architecture`
            that is searched; or one `network`. Each has a seed of its own in any case.
        architecture: The operators of each cell, for each network (one if shared, else one per
            attention layer in the model's order). None: they are searched.
        prefix_std: Standard deviation of keys and values at the start, about.
        temperature: Of the softmax over operators at the start and at the end of the search.
        entropy_weight: Of its entropy without `none`, a part of its largest value, in the loss at
            the end of the search; it rises from 0.
        architecture_learning_rate: Of the logits of the softmax.
    """

    method: ClassVar[str] = "peml"

    target_modules: str | Sequence[str] | None = ALL_LINEAR
    prefix_length: int = 16
    prefix_places: Sequence[str] | None = None
    prefix_depth: int = 2
    prefix_width: int = 32
    operators: Sequence[str] = tuple(OPERATORS)
    operator_rank: int = 4
    sharing: str = "none"
    architecture: Sequence[Sequence[str]] | None = None
    prefix_std: float = 0.1
    temperature: Sequence[float] = (1.0, 0.1)
    entropy_weight: float = 0.1
    architecture_learning_rate: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("prefix_length", 1)
        self.require_at_least("prefix_depth", 0)
        self.require_at_least("prefix_width", 1)
        self.require_at_least("operator_rank", 1)
        self.require_one_of("sharing", SHARING)
        _require_known("operators", self.operators, tuple(OPERATORS))
        if self.prefix_places is not None:
            _require_known("prefix_places", self.prefix_places, PLACES)
        if len(self.temperature) != 2 or min(self.temperature) <= 0:
            raise ValueError(
                f"temperature must be two positive numbers, got {list(self.temperature)}"
            )
        if self.entropy_weight < 0:
            raise ValueError(f"entropy_weight must be at least 0, got {self.entropy_weight}")
        if self.architecture is not None:
            found = tuple(tuple(cells) for cells in self.architecture)
            object.__setattr__(self, "architecture", found)
            for cells in found:
                _require_known("architecture", cells, tuple(OPERATORS), repeats=True)
                if len(cells) != self.prefix_depth:
                    raise ValueError(
                        f"architecture must have prefix_depth = {self.prefix_depth} operators in "
                        f"each network, got {list(cells)}"
                    )

    @property
    def searches(self) -> bool:
        """Whether the architecture is still open."""
        return self.architecture is None and self.prefix_depth > 0

    @property
    def router_learning_rate(self) -> float | None:
        """What `AdapterTrainer` trains `router_parameters` with: the architecture."""
        return self.architecture_learning_rate if self.searches else None

    def attach(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> PemlModel:
        """Build the method on `model`; called by `get_model` and `load`."""
        from pemt_fast.peml_model import PemlModel

        sites = attention_sites(model, self.prefix_places)
        for site in sites:
            if not uses_interface(site.attention):
                raise ValueError(
                    f"{site.name} must be an attention layer that looks up its function in "
                    f"transformers' AttentionInterface (T5: transformers 5.15 or newer), got "
                    f"{type(site.attention).__name__}"
                )
        config = replace(
            self,
            target_modules=self.target_names(model),
            prefix_places=tuple(dict.fromkeys(site.place for site in sites)),
        )
        routing = Routing()
        schedule = SearchSchedule(tuple(self.temperature), self.entropy_weight)  # type: ignore[arg-type]
        prefixes = config.prefixes(sites, routing, schedule)
        linears = config.replacements(model, routing) if config.target_modules != () else []
        for site, prefix in zip(sites, prefixes, strict=True):
            self._move_beside(site.weight, prefix, model)
        for _, module in linears:
            self._move(module, model)
        attachment = Attachment(model)
        for site, prefix in zip(sites, prefixes, strict=True):
            view = PrefixedConfig(site.attention.config)
            attachment.replace_module(site.attention, "config", view)  # type: ignore[arg-type]
            attachment.add_module(site.attention, "prefix", prefix)
        config.put(linears, model, attachment)
        return PemlModel(model, config, routing, attachment, schedule).train(model.training)

    def prefixes(
        self, sites: Sequence[AttentionSite], routing: Routing, schedule: SearchSchedule
    ) -> list[AttentionPrefix]:
        """The prefix of each attention layer."""
        sources = self._sources([site.out_features for site in sites], schedule)
        return [
            AttentionPrefix(source, site.attention, routing, site.name, site.heads, site.width)
            for site, source in zip(sites, sources, strict=True)
        ]

    def _sources(self, widths: Sequence[int], schedule: SearchSchedule) -> list[nn.Module]:
        if self.prefix_depth == 0:
            return [ConstantPrefix(self.prefix_length, n, self.prefix_std) for n in widths]
        if self.sharing == "network" and len(set(widths)) > 1:
            raise ValueError(
                "sharing='network' needs keys and values of one width in all attention layers, "
                f"got {sorted(set(widths))}"
            )
        count = 1 if self.sharing == "network" else len(widths)
        architectures: Sequence[Sequence[str] | None] = [None] * count
        if self.architecture is not None:
            architectures = list(self.architecture)
            if self.sharing == "architecture" and len(architectures) == 1:
                architectures = architectures * count
            if len(architectures) != count:
                raise ValueError(
                    f"architecture must have one list of operators per network ({count}), "
                    f"got {len(architectures)}"
                )
        shared = self._logits(schedule) if self.sharing == "architecture" else None
        networks = [
            self.network(width, cells, shared or self._logits(schedule))
            for width, cells in zip(widths[:count], architectures, strict=True)
        ]
        if count == 1:
            networks = networks * len(widths)
        return [SearchedPrefix(n, self.prefix_length, self.prefix_width) for n in networks]

    def network(
        self, out_features: int, architecture: Sequence[str] | None, logits: Logits | None
    ) -> PrefixNetwork:
        """One network of this config."""
        return PrefixNetwork(
            self.operators, architecture, self.prefix_depth, self.prefix_width, self.operator_rank,
            out_features, out_std=self.prefix_std, logits=logits,
        )  # fmt: skip

    def _logits(self, schedule: SearchSchedule) -> Logits | None:
        if not self.searches:
            return None
        return Logits(self.prefix_depth, self.operators, schedule)


def _require_known(
    name: str, values: Sequence[str], known: Sequence[str], *, repeats: bool = False
) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values or (not repeats and len(set(values)) != len(values)):
        once = "" if repeats else ", each once"
        raise ValueError(f"{name} must be of {list(known)}{once}, got {list(values)}")
