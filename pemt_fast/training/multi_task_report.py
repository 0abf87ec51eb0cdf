# SPDX-License-Identifier: Apache-2.0
"""What `multi_task.py` found: a table of scores, and a picture of the learned allocation."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pemt_fast.attached import AttachedModel
from pemt_fast.checkpoint import replace_file
from pemt_fast.training.metrics import compute
from pemt_fast.training.stages import TaskData

SCORE = "average"  # of a task's metrics


def majority(task: TaskData) -> float:
    """Score in % of always answering the most frequent training target."""
    most = Counter(example.target for example in task.splits.train).most_common(1)[0][0]
    test = list(task.splits.test)
    return compute(task.metrics, [most] * len(test), test)[SCORE]


@torch.no_grad()
def allocation(model: AttachedModel) -> dict[str, list[list[float]]]:
    """Weight of every skill for every task by layer, mean over splits; empty without routers."""
    found = {}
    for name, layer in model.base_model.named_modules():
        if (router := getattr(layer, "router", None)) is not None:
            table = router.table()
            found[name] = (table.mean(1) if table.dim() == 3 else table).tolist()
    return found


def task_scores(runs: Sequence[Mapping], task: str) -> list[float]:
    """Of one method on one task, a value per seed."""
    return [run["scores"][task][SCORE] for run in runs]


def means(runs: Sequence[Mapping]) -> list[float]:
    """Of one method over all tasks, a value per seed."""
    return [statistics.mean(scores[SCORE] for scores in run["scores"].values()) for run in runs]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(summary: Mapping) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Columns and rows: a row per task, a column per method."""
    runs = summary["runs"]
    rows: list[tuple[object, ...]] = []
    for name, task in summary["tasks"].items():
        scores = [_cell(task_scores(found, name)) for found in runs.values()]
        rows.append((name, task["train"], task["test"], f"{task['majority']:.1f}", *scores))
    majorities = statistics.mean(task["majority"] for task in summary["tasks"].values())
    rows += [
        ("mean", "", "", f"{majorities:.1f}", *(_cell(means(found)) for found in runs.values())),
        ("trained parameters", "", "", "",
         *(f"{found[0]['trainable_parameters']:,}" for found in runs.values())),
        ("seconds", "", "", "",
         *(f"{statistics.mean(run['seconds'] for run in found):.0f}" for found in runs.values())),
    ]  # fmt: skip
    costs = [
        [run["search"]["seconds"] for run in found if run.get("search")] for found in runs.values()
    ]
    if any(costs):
        cells = (f"{statistics.mean(own):.0f}" if own else "–" for own in costs)
        rows.append(("seconds of the search", "", "", "", *cells))
    return ("task", "train", "test", "majority", *runs), rows


def markdown(summary: Mapping) -> str:
    """The table as Markdown, and what it was made with."""
    columns, rows = table(summary)
    rule = ("---", *["---:"] * (len(columns) - 1))
    lines = ("| " + " | ".join(map(str, row)) + " |" for row in (columns, rule, *rows))
    text = "\n".join(lines)
    seeds = max(len(found) for found in summary["runs"].values())
    over = f"; mean and standard deviation over {seeds} seeds of training" if seeds > 1 else ""
    environment = ", ".join(f"{k} {v}" for k, v in summary["environment"].items() if v)
    return (
        f"{text}\n\nScores in %, the mean of a task's metrics{over}. `majority`: the most frequent "
        "training target.\n\n"
        f"_{environment}_\n"
    )


def write_summary(summary: Mapping, path: Path) -> None:
    """The Markdown as a file."""
    text = markdown(summary)
    replace_file(path, lambda temporary: temporary.write_text(text))


def most_decided(allocation: Mapping[str, list]) -> tuple[str, torch.Tensor]:
    """The layer whose tasks differ most in their weights, and its table `[T, K]`."""
    tables = {name: torch.tensor(table) for name, table in allocation.items()}
    name = max(tables, key=lambda name: float(tables[name].std(0, correction=0).mean()))
    return name, tables[name]


def save_allocation(
    runs: Mapping[str, Sequence[Mapping]], tasks: Sequence[str], path: Path
) -> None:
    """Write a PNG: the weight of every skill for every task.

    Of one layer of the first seed, the most decided one: skills have no order, so that means over
    layers or seeds are uniform whatever was learned.
    """
    from matplotlib.figure import Figure

    tables = {
        method: most_decided(found[0]["allocation"])
        for method, found in runs.items()
        if found[0]["allocation"]
    }
    if not tables:
        return
    widths = [table.shape[1] for _, table in tables.values()]
    figure = Figure(
        figsize=(2 + 1.8 * len(tables) + 0.35 * sum(widths), 1.8 + 0.35 * len(tasks)),
        layout="constrained",
    )
    axes = figure.subplots(1, len(tables), squeeze=False, width_ratios=[w + 4 for w in widths])[0]
    for axis, (method, (layer, table)) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        stack, _, rest = layer.partition(".block.")
        axis.set_title(f"{method}\n{stack} {rest.split('.')[0]}, {layer.rpartition('.')[2]}")
        axis.set_xlabel("skill")
        axis.set_xticks(range(table.shape[1]))
        axis.set_yticks(range(len(tasks)), list(tasks) if axis is axes[0] else [""] * len(tasks))
    figure.colorbar(image, ax=list(axes), label="weight")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
