# SPDX-License-Identifier: Apache-2.0
"""What the gates chose: mean weight per layer and source, as numbers and as a heat map."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from pemt_fast.checkpoint import replace_file
from pemt_fast.model import AdapterModel


@torch.no_grad()
def mean_gates(
    model: AdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    *,
    batch_size: int = 64,
) -> dict[str, list[float]]:
    """Mean gate weight of every source, by layer, over encoded rows."""
    collator = DataCollatorForSeq2Seq(tokenizer)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with model.watch_gates() as seen:
        for start in range(0, len(rows), batch_size):
            model(**collator(rows[start : start + batch_size]).to(device))
    model.train(was_training)
    return seen.means()


def mean_over_layers(gates: dict[str, list[float]]) -> list[float]:
    """Mean weight of every source over all layers."""
    return torch.tensor(list(gates.values())).mean(0).tolist()


def save_gate_map(
    gates: dict[str, list[float]], sources: list[str], title: str, path: str | Path
) -> None:
    """Write a PNG: one row per layer, one column per source."""
    from matplotlib.figure import Figure

    weights = torch.tensor(list(gates.values())).numpy()
    figure = Figure(
        figsize=(1.4 + 0.9 * len(sources), 1.2 + 0.35 * len(gates)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(sources)), sources, rotation=30, ha="right")
    axes.set_yticks(range(len(gates)), list(gates))
    for row, layer in enumerate(weights):
        for column, weight in enumerate(layer):
            color = "white" if weight < 0.6 else "black"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=color)
    axes.set_xlabel("source adapter")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="mean gate weight")
    replace_file(Path(path), lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
