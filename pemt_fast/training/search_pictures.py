# SPDX-License-Identifier: Apache-2.0
"""The pictures of a PEML search: the architecture, and the weights of the operators over time.

Letters as in `search_report.py`, which makes the tables.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
# Inches. The axes of the drawing are measured in them.
_ROW, _BOX, _CELL, _END, _GAP, _EDGE = 0.30, 0.22, 2.05, 0.45, 0.24, 0.12
_CHARACTER = 0.078  # of 9 points, about
_BANDS = 3
_DPI = 150


def layer_label(name: str) -> str:
    """`decoder 3 cross` for T5's dotted names, others as they are."""
    found = _T5_LAYER.fullmatch(name)
    if found is None:
        return name
    stack, block, kind = found.groups()
    return f"{stack} {block} {'cross' if kind == 'EncDecAttention' else 'self'}"


def network_label(network: Mapping[str, Any]) -> str:
    """The layer of a network, or how many it has."""
    layers = network["layers"]
    return layer_label(layers[0]) if len(layers) == 1 else f"all {len(layers)} layers"


def entropies(weights: Tensor, operators: Sequence[str]) -> Tensor:
    """Entropy of `[…, O]` over all operators but `none`, as a part of its largest value."""
    others = [o for o, name in enumerate(operators) if name != "none"] or [0]
    shares = weights[..., others]
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / math.log(max(len(others), 2))


def stacked(history: Sequence[Mapping[str, Any]], operators: Sequence[str]) -> Tensor:
    """`[steps, N, L, O]`."""
    if not history:
        raise ValueError("history must have an entry for one step at least, got none")
    weights = torch.tensor([entry["weights"] for entry in history], dtype=torch.float64)
    if weights.ndim != 4 or weights.shape[-1] != len(operators):
        raise ValueError(
            f"history must have weights [N, L, O = {len(operators)}], got {list(weights.shape[1:])}"
        )
    return weights


def save_architecture(found: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write a PNG: a row per network, from its seed through its cells to keys and values.

    Args:
        found: As `networks` returns them. Of a box as large a part is filled as its operator has of
            the weights; the operator with the largest weight of the others is to the right.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    labels = [network_label(own) for own in found]
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

    weights = stacked(history, operators)
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
        entropy = entropies(weights[:, :, cell], operators)
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
