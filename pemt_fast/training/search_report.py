# SPDX-License-Identifier: Apache-2.0
"""What the search of a `PemlModel` found: its numbers, and a table; pictures: `search_pictures.py`.

N networks (one if they are shared), L cells, O operators.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt_fast.checkpoint import replace_file
from pemt_fast.peml_model import PemlModel
from pemt_fast.training.fit import environment, write_json
from pemt_fast.training.search_pictures import (
    entropies,
    network_label,
    save_architecture,
    save_weights,
    stacked,
)

SEARCH_FILE = "search.json"
TABLE_FILE = "search.md"
ARCHITECTURE_FILE = "architecture.png"
WEIGHTS_FILE = "weights.png"


# --- numbers -------------------------------------------------------------------------------------


def networks(model: PemlModel, weights: Tensor | None = None) -> list[dict[str, Any]]:
    """What each network has become: its layers, and of each cell the operator and the weights.

    Args:
        model: During or after the search.
        weights: `[N, L, O]`; by default the model's own, which there are during the search only.

    Raises:
        ValueError: the model has no networks, or weights of other ones are given.
    """
    config = model.adapter_config
    architecture = model.architecture()
    if not architecture:
        raise ValueError("model must have prefix networks, got one with a plain prefix")
    if weights is None and config.searches:
        weights = torch.stack([own.cpu() for own in model.architecture_weights()])
    expected = (len(architecture), config.prefix_depth, len(config.operators))
    if weights is not None and tuple(weights.shape) != expected:
        raise ValueError(f"weights must be [N, L, O] = {list(expected)}, got {list(weights.shape)}")
    names = list(model.prefixes())
    layers = [names] if len(architecture) == 1 else [[name] for name in names]
    return [
        {
            "layers": own,
            "cells": [
                _cell(operator, None if weights is None else weights[n, cell], config.operators)
                for cell, operator in enumerate(cells)
            ],
        }
        for n, (own, cells) in enumerate(zip(layers, architecture, strict=True))
    ]


def _cell(operator: str, weights: Tensor | None, operators: Sequence[str]) -> dict[str, Any]:
    """`next` is the largest of the others: it may be larger, see `Logits.decided`."""
    if weights is None:
        return {"operator": operator, "weight": None, "next": None, "weights": None}
    by_name = dict(zip(operators, weights.tolist(), strict=True))
    others = [name for name in operators if name != operator]
    return {
        "operator": operator,
        "weight": by_name[operator],
        "next": max(others, key=by_name.__getitem__, default=None),
        "weights": by_name,
    }


def describe(
    model: PemlModel, history: Sequence[Mapping[str, Any]], *, seconds: float
) -> dict[str, Any]:
    """All there is to say of a search, ready for JSON; see `write_search`."""
    config = model.adapter_config
    last = stacked(history, config.operators)[-1]
    schedule = model.schedule
    return {
        "architecture": [list(cells) for cells in model.architecture()],
        # After the search the model has no weights any more.
        "weights_of": "the model" if config.searches else f"step {history[-1]['step']}",
        "networks": networks(model, None if config.searches else last),
        "schedule": {
            "temperature": {
                "first": config.temperature[0],
                "last": config.temperature[1],
                "reached": schedule.temperature.item(),
            },
            "entropy_weight": {
                "first": 0.0,
                "last": config.entropy_weight,
                "reached": schedule.entropy_weight.item(),
            },
        },
        "seconds": seconds,
        "config": config.to_dict(),
        "environment": environment(),
        "history": [dict(entry) for entry in history],
    }


# --- table ---------------------------------------------------------------------------------------


def _described(network: Mapping[str, Any], index: int) -> str:
    cell = network["cells"][index]
    rival = cell["next"]
    after = "" if rival is None else f", next {rival} {cell['weights'][rival]:.3f}"
    where = f"{network_label(network)}, cell {index + 1}"
    return f"{where}: {cell['operator']} {cell['weight']:.3f}{after}"


def markdown(search: Mapping[str, Any]) -> str:
    """How often each operator was chosen, what was decided most and least, and the cost."""
    found, depth = search["networks"], search["config"]["prefix_depth"]
    counts = {
        name: [sum(own["cells"][i]["operator"] == name for own in found) for i in range(depth)]
        for name in search["config"]["operators"]
    }
    rows: list[tuple[object, ...]] = [
        ("operator", *(f"cell {i + 1}" for i in range(depth)), "all"),
        ("---", *["---:"] * (depth + 1)),
        *((name, *own, sum(own)) for name, own in counts.items() if any(own)),
    ]
    cells = [(own, i) for own in found for i in range(depth)]
    cells.sort(key=lambda at: at[0]["cells"][at[1]]["weight"])
    weights = torch.tensor(
        [list(own["cells"][i]["weights"].values()) for own, i in cells], dtype=torch.float64
    )
    layers = sum(len(own["layers"]) for own in found)
    facts: list[tuple[object, ...]] = [
        ("", "search"),
        ("---", "---"),
        ("networks", f"{len(found)} for {layers} attention layers"),
        ("most decided", _described(*cells[-1])),
        ("least decided", _described(*cells[0])),
        ("mean entropy", f"{entropies(weights, search['config']['operators']).mean().item():.3f}"),
        ("seconds", f"{search['seconds']:.1f}"),
    ]
    counted, told = (
        "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
        for table in (rows, facts)
    )
    versions = ", ".join(f"{k} {v}" for k, v in search["environment"].items() if v)
    return (
        f"{counted}\n\n{told}\n\nWeights of {len(counts)} operators, of "
        f"{search['weights_of']}; entropy as a part of its largest value.\n\n_{versions}_\n"
    )


# --- all of it -----------------------------------------------------------------------------------


def write_search(
    model: PemlModel,
    history: Sequence[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Write `search.json`, `search.md`, `architecture.png` and `weights.png`.

    Args:
        model: After its search, before or after `discretise()`. Before, the weights of the result
            are the model's own, afterwards those of the history's last step.
        history: As `SearchTrainer` has it.
        directory: Made where it is missing.
        seconds: That the search took.

    Returns:
        What is in `search.json`.

    Raises:
        ValueError: the history is empty or of another search, or the model has a plain prefix.
    """
    search = describe(model, history, seconds=seconds)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(search["networks"], folder / ARCHITECTURE_FILE)
    save_weights(history, model.adapter_config.operators, folder / WEIGHTS_FILE)
    text = markdown(search)
    replace_file(folder / TABLE_FILE, lambda temporary: temporary.write_text(text))
    write_json(folder / SEARCH_FILE, search)  # last: where it is, the others are
    return search
