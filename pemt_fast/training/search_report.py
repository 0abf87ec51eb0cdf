# SPDX-License-Identifier: Apache-2.0
"""What the search of a `PemlModel` found: its numbers, a table, and two pictures.

N networks (one if they are shared), L cells, O operators.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pemt_fast.checkpoint import replace_file
from pemt_fast.peml_model import PemlModel
from pemt_fast.training.fit import environment, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SEARCH_FILE = "search.json"
TABLE_FILE = "search.md"
ARCHITECTURE_FILE = "architecture.png"
WEIGHTS_FILE = "weights.png"

# Colour and line of an operator in every picture; a hue for each kind.
STYLES = {
    "identity": ("#111111", "-"),
    "skip": ("#8a8a8a", "--"),
    "linear": ("#0b5fa5", "-"),
    "low_rank": ("#56b4e9", "-"),
    "gated": ("#a63d8f", "-"),
    "mlp_relu": ("#8c2d04", "-"),
    "mlp_gelu": ("#d55e00", "-"),
    "mlp_silu": ("#e69f00", "-"),
    "mlp_tanh": ("#c9302c", "--"),
    "conv3": ("#00755e", "-"),
    "conv5": ("#6dbd45", "-"),
    "none": ("#b5b5b5", ":"),
}
_GREY = "#5f5f5f"
_T5_LAYER = re.compile(r"(\w+)\.block\.(\d+)\.layer\.\d+\.(SelfAttention|EncDecAttention)")


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


def entropies(weights: Tensor) -> Tensor:
    """Entropy of `[…, O]` over the operators, as a part of its largest value."""
    return torch.special.entr(weights).sum(-1) / math.log(max(weights.shape[-1], 2))


def _stacked(history: Sequence[Mapping[str, Any]], operators: Sequence[str]) -> Tensor:
    """`[steps, N, L, O]`."""
    if not history:
        raise ValueError("history must have an entry for one step at least, got none")
    weights = torch.tensor([entry["weights"] for entry in history], dtype=torch.float64)
    if weights.ndim != 4 or weights.shape[-1] != len(operators):
        raise ValueError(
            f"history must have weights [N, L, O = {len(operators)}], got {list(weights.shape[1:])}"
        )
    return weights


def describe(
    model: PemlModel, history: Sequence[Mapping[str, Any]], *, seconds: float
) -> dict[str, Any]:
    """All there is to say of a search, ready for JSON; see `write_search`."""
    config = model.adapter_config
    last = _stacked(history, config.operators)[-1]
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


def layer_label(name: str) -> str:
    """`decoder 3 cross` for T5's dotted names, others as they are."""
    found = _T5_LAYER.fullmatch(name)
    if found is None:
        return name
    stack, block, kind = found.groups()
    return f"{stack} {block} {'cross' if kind == 'EncDecAttention' else 'self'}"


def _label(network: Mapping[str, Any]) -> str:
    layers = network["layers"]
    return layer_label(layers[0]) if len(layers) == 1 else f"all {len(layers)} layers"


def _described(network: Mapping[str, Any], index: int) -> str:
    cell = network["cells"][index]
    rival = cell["next"]
    after = "" if rival is None else f", next {rival} {cell['weights'][rival]:.3f}"
    where = f"{_label(network)}, cell {index + 1}"
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
        ("mean entropy", f"{entropies(weights).mean().item():.3f}"),
        ("seconds", f"{search['seconds']:.1f}"),
    ]
    counted, told = (
        "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)
        for table in (rows, facts)
    )
    versions = ", ".join(f"{k} {v}" for k, v in search["environment"].items() if v)
    return (
        f"{counted}\n\n{told}\n\nWeights of the softmax over {len(counts)} operators, of "
        f"{search['weights_of']}; entropy as a part of its largest value.\n\n_{versions}_\n"
    )


# --- pictures ------------------------------------------------------------------------------------

# Inches. The axes of the drawing are measured in them.
_ROW, _BOX, _CELL, _END, _GAP, _EDGE = 0.30, 0.22, 2.05, 0.45, 0.24, 0.12
_CHARACTER = 0.078  # of 9 points, about
_BANDS = 3
_DPI = 150


def save_architecture(found: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a PNG: a row per network, from its seed through its cells to keys and values.

    Args:
        found: As `networks` returns them. Of a box as large a part is filled as its operator has of
            the softmax; the operator with the largest weight of the others is to the right.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    labels = [_label(own) for own in found]
    depth = len(found[0]["cells"])
    name_width = _CHARACTER * max(map(len, [*labels, "attention layer"]))
    first = _EDGE + name_width + 0.15
    # Left edges of the seed, the cells, and keys and values.
    lefts = [first + _END + _GAP + i * (_CELL + _GAP) for i in range(depth)]
    last = lefts[-1] + _CELL + _GAP
    width, height = last + _END + _EDGE, 2 * _EDGE + _ROW * (len(found) + 2)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    top = _EDGE + _ROW / 2
    axes.text(_EDGE, top, "attention layer", fontsize=9, va="center", color=_GREY)
    for i, left in enumerate(lefts, 1):
        middle = left + _CELL / 2
        axes.text(middle, top, f"cell {i}", fontsize=9, ha="center", va="center", color=_GREY)
    for row, (label, own) in enumerate(zip(labels, found, strict=True), 1):
        y = top + row * _ROW
        axes.text(_EDGE, y, label, fontsize=9, va="center")
        _draw_end(axes, first, y, "seed")
        _draw_end(axes, last, y, "K, V")
        for left, cell in zip(lefts, own["cells"], strict=True):
            _draw_cell(axes, left, y, cell)
    ends = [left for left in [*lefts, last] for _ in found]
    rows = [top + row * _ROW for row in range(1, len(found) + 1)] * (depth + 1)
    axes.hlines(rows, [end - _GAP for end in ends], ends, color=_GREY, lw=0.8)
    axes.scatter([end - 0.04 for end in ends], rows, marker=">", s=9, color=_GREY, lw=0)
    if any(cell["weight"] is not None for own in found for cell in own["cells"]):
        note = "filled: weight of the operator chosen; right: largest of the others"
        axes.text(_EDGE, height - top, note, fontsize=7.5, va="center", color=_GREY)
    _save(figure, path)


def _draw_end(axes: Axes, left: float, y: float, text: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((left, y - _BOX / 2), _END, _BOX, facecolor="#f2f2f2", edgecolor=_GREY, lw=0.8)
    )
    axes.text(left + _END / 2, y, text, fontsize=7.5, ha="center", va="center", color=_GREY)


def _draw_cell(axes: Axes, left: float, y: float, cell: Mapping[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    color, _ = STYLES[cell["operator"]]
    weight, rival = cell["weight"], cell["next"]
    corner, part = (left, y - _BOX / 2), 1.0 if weight is None else weight
    axes.add_patch(Rectangle(corner, _CELL * part, _BOX, facecolor=color, alpha=0.3, lw=0))
    axes.add_patch(Rectangle(corner, _CELL, _BOX, fill=False, edgecolor=color, lw=1.1))
    own = cell["operator"] if weight is None else f"{cell['operator']}  {weight:.2f}"
    axes.text(left + 0.07, y, own, fontsize=9, va="center", weight="bold")
    if rival is not None and cell["weights"][rival] >= 0.005:
        other = f"{rival}  {cell['weights'][rival]:.2f}"
        right = left + _CELL - 0.07
        axes.text(right, y, other, fontsize=7, va="center", ha="right", color="#333333")


def save_weights(
    history: Sequence[Mapping[str, Any]],
    operators: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Write a PNG: the weights of the operators over the steps, a column per cell.

    Of several networks the mean, and of the operators with the three largest ones a band from the
    smallest to the largest network; more bands would hide each other. Beneath it the entropy.

    Args:
        history: As `SearchTrainer` has it.
        operators: Of the config.
        path: Of the PNG.

    Raises:
        ValueError: the history is empty, or of other operators.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    weights = _stacked(history, operators)
    steps = [entry["step"] for entry in history]
    count, depth = weights.shape[1:3]
    figure = Figure(figsize=(2.2 + max(2.6 * depth, 3.6), 4.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots(
        2, depth, squeeze=False, sharex=True, sharey="row", height_ratios=[2.4, 1]
    )
    for cell, (above, below) in enumerate(axes.T):
        banded = weights[-1, :, cell].mean(0).argsort(descending=True)[:_BANDS].tolist()
        lines = []
        for o, name in enumerate(operators):
            line = _draw_mean(above, steps, weights[:, :, cell, o], *STYLES[name])
            line.set_label(name)
            lines.append(line)
            if count > 1 and o in banded:
                _draw_band(above, steps, weights[:, :, cell, o], STYLES[name][0])
        entropy = entropies(weights[:, :, cell])
        _draw_mean(below, steps, entropy, "#111111", "-")
        if count > 1:
            _draw_band(below, steps, entropy, "#111111")
        above.set_title(f"cell {cell + 1}", fontsize=10)
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in (above, below):
            axis.set_ylim(-0.03, 1.03)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e3e3e3", lw=0.6)
            axis.set_axisbelow(True)
    if len(steps) == 1:
        axes[1, 0].set_xticks(steps)
    axes[0, 0].set_ylabel("weight")
    axes[1, 0].set_ylabel("entropy")
    title = (
        None
        if count == 1
        else f"mean of {count} networks\n(band: min to max,\nof the {_BANDS} largest)"
    )
    figure.legend(
        handles=lines, loc="outside right upper", fontsize=8.5, frameon=False, handlelength=2.4,
        title=title, title_fontsize=8,
    )  # fmt: skip
    _save(figure, path)


def _draw_mean(axis: Axes, steps: Sequence[int], values: Tensor, color: str, line: str) -> Line2D:
    """Of `[steps, N]`; a point where there is one step."""
    marker = "o" if len(steps) == 1 else None
    return axis.plot(steps, values.mean(1).numpy(), color=color, ls=line, lw=1.6, marker=marker)[0]


def _draw_band(axis: Axes, steps: Sequence[int], values: Tensor, color: str) -> None:
    low, high = values.amin(1).numpy(), values.amax(1).numpy()
    axis.fill_between(steps, low, high, color=color, alpha=0.1, lw=0)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    replace_file(
        Path(path),
        lambda temporary: figure.savefig(temporary, dpi="figure", format="png", facecolor="white"),
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
