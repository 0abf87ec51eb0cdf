"""Searches that have to find a planted operator: a problem with a known answer for PEML's search.

A teacher of one cell makes 64 rows of 16 numbers out of fixed seeds; a student with the same seeds
learns them while it searches. Losses are parts of the target's mean square. Used by
`tests/test_prefix_network.py` and `peml_ablation.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pemt_fast.nn.prefix_network import Logits, PrefixNetwork, SearchSchedule
from pemt_fast.nn.prefix_operators import OPERATORS

STEPS, POSITIONS, WIDTH, TARGETS = 400, 64, 8, 16
SEEDS = (0, 1, 2)
# The operator planted, and those that are searched among. Among their like there is no one answer
# for the last two: on 64 rows they learn each other's values.
PLANTED: dict[str, tuple[str, ...]] = {
    "conv3": tuple(OPERATORS),
    "conv5": tuple(OPERATORS),
    "gated": ("identity", "linear", "low_rank", "gated", "conv3", "none"),
    "mlp_tanh": ("identity", "linear", "low_rank", "mlp_tanh", "conv3", "none"),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How it is searched.

    Attributes:
        temperature, entropy_weight: As in `PemlConfig`.
        bilevel: Every other row trains the architecture, the others everything else.
        none_fades: `none` loses its weight over the search.
    """

    temperature: tuple[float, float] = (1.0, 0.1)
    entropy_weight: float = 0.1
    bilevel: bool = False
    none_fades: bool = True


@dataclasses.dataclass(frozen=True)
class Found:
    """A search that is over.

    Attributes:
        seeds, target: The problem.
        network: The student, with its mixture.
        operators: The operator of its one cell.
        loss: Of the mixture.
    """

    seeds: Tensor
    target: Tensor
    network: PrefixNetwork
    operators: tuple[str, ...]
    loss: float


def network_of(
    architecture: Sequence[str] | None, operators: Sequence[str] = (), logits: Logits | None = None
) -> PrefixNetwork:
    """Of the size of these problems."""
    sizes = 1, WIDTH, 4, TARGETS
    return PrefixNetwork(operators, architecture, *sizes, out_std=1.0, logits=logits)


def loss_of(network: PrefixNetwork, seeds: Tensor, target: Tensor, rows: slice) -> Tensor:
    """A part of the target's mean square."""
    return (network(seeds) - target)[rows].square().mean() / target.square().mean()


def learn(network: PrefixNetwork, seeds: Tensor, target: Tensor, form: Form | None = None) -> float:
    """Train, and search where the network does; the loss on all rows afterwards."""
    form = form or Form()
    logits = network.logits
    own = [] if logits is None else [logits.alpha]
    others = [p for p in network.parameters() if not any(p is alpha for alpha in own)]
    groups = [{"params": others, "lr": 1e-2}, {"params": own, "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    divided = form.bilevel and logits is not None
    training, validation = (slice(0, None, 2), slice(1, None, 2)) if divided else (slice(None),) * 2
    for step in range(STEPS):
        entropy = torch.tensor(0.0)
        if logits is not None:
            logits.schedule.at(step / (STEPS - 1))
            if not form.none_fades:
                logits.schedule.none_share.fill_(1.0)
            entropy = logits.schedule.entropy_weight * logits.entropy()
        optimizer.zero_grad()
        (loss_of(network, seeds, target, training) + entropy).backward()
        if divided:
            total = loss_of(network, seeds, target, validation)
            total = total + logits.schedule.entropy_weight * logits.entropy()
            (logits.alpha.grad,) = torch.autograd.grad(total, own)
        optimizer.step()
    with torch.no_grad():
        return float(loss_of(network, seeds, target, slice(None)))


def search(planted: str, seed: int, form: Form | None = None) -> Found:
    """Search for a planted operator."""
    form = form or Form()
    torch.manual_seed(1000 + seed)
    seeds = torch.randn(POSITIONS, WIDTH)
    with torch.no_grad():
        target = network_of((planted,))(seeds)
    torch.manual_seed(seed)
    operators = PLANTED[planted]
    schedule = SearchSchedule(form.temperature, form.entropy_weight)
    network = network_of(None, operators, logits := Logits(1, operators, schedule))
    loss = learn(network, seeds, target, form)
    return Found(seeds, target, network, logits.decided(), loss)


def taken(found: Found) -> PrefixNetwork:
    """The operator found, with the values it has learned in the mixture."""
    network = network_of(found.operators)
    network.take(found.network, found.operators)
    return network
