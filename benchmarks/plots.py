# SPDX-License-Identifier: Apache-2.0
"""Pictures of one result: where the operator is faster, and PEMT's feed-forward tail in bars."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display

import matplotlib.pyplot as plt  # noqa: E402
from cases import MODES  # noqa: E402
from grid_report import VIEWS, grid_plot_name  # noqa: E402
from grid_targets import ours, speedup  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from records import HEAT_MAP_BASELINES, Result, Row, geometric_mean  # noqa: E402

_OURS_COLOUR, _OTHER_COLOUR, _BOUND_COLOUR = "#1f6f8b", "#b8b8b8", "#e0c070"


def plot(result: Result, folder: Path) -> list[Path]:
    """Write all pictures that the result has rows for; returns their paths."""
    paths = [_heat_maps(result, baseline, folder) for baseline in HEAT_MAP_BASELINES]
    return [path for path in (*paths, _bars(result, folder)) if path is not None]


def _kinds(rows: list[Row]) -> tuple[list[str], list[str]]:
    modes = list(dict.fromkeys(row.mode for row in rows))
    return modes, list(dict.fromkeys(row.dtype for row in rows))


def _heat_maps(result: Result, baseline: str, folder: Path) -> Path | None:
    rows = [
        row
        for row in result.rows
        if row.group == "grid" and row.provider == result.preferred and baseline in row.speedup
    ]
    if not rows:
        return None
    modes, dtypes = _kinds(rows)
    size = (3.6 * len(modes) + 1, 2.9 * len(dtypes) + 0.6)
    figure, axes = plt.subplots(len(dtypes), len(modes), figsize=size, squeeze=False)
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            kept = [row for row in rows if (row.dtype, row.mode) == (dtype, mode)]
            _heat_map(axes[i][j], kept, baseline, title=f"{dtype}, {mode}")
    title = f"{result.preferred}: times faster than {baseline} ({_device(result)})"
    return _save(figure, title, folder / f"{result.device}-heatmap-{baseline}.png")


def plot_grid(result: Result, folder: Path) -> list[Path]:
    """The same over the grid of a device: means over widths and activations, and the worst."""
    rows = ours(result)
    if not rows:
        return []
    modes, dtypes = (
        [mode for mode in MODES if any(row.mode == mode for row in rows)],
        _kinds(rows)[1],
    )
    size = (4.0 * len(modes) + 1, 3.6 * len(dtypes) + 0.6)
    figure, axes = plt.subplots(len(dtypes), len(modes), figsize=size, squeeze=False)
    for (i, dtype), (j, mode) in itertools.product(enumerate(dtypes), enumerate(modes)):
        pools: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if (row.dtype, row.mode) == (dtype, mode):
                pools.setdefault((row.T, row.N), []).append(speedup(row))
        ratios = {place: geometric_mean(pool) for place, pool in pools.items()}
        texts = {place: _worst(ratios[place], min(pool)) for place, pool in pools.items()}
        _panel(axes[i][j], ratios, texts, title=f"{dtype}, {mode}")
    title = (
        f"{result.preferred}: times faster than the faster of stacked and compiled, "
        f"{VIEWS[result.device].title}, the worst below ({_device(result)})"
    )
    return [_save(figure, title, folder / grid_plot_name(result))]


def _worst(mean: float, worst: float) -> str:
    return f"{mean:.2f}\n{worst:.2f}{' ▼' if round(worst, 2) < 1 else ''}"


def _heat_map(axis: Axes, rows: list[Row], baseline: str, *, title: str) -> None:
    ratios = {(row.T, row.N): row.speedup[baseline] for row in rows}
    lost = {(row.T, row.N) for row in rows if row.loses_to(baseline)}
    texts = {place: f"{r:.2f}{' ▼' if place in lost else ''}" for place, r in ratios.items()}
    _panel(axis, ratios, texts, title=title)


def _panel(
    axis: Axes,
    ratios: dict[tuple[int, int], float],
    texts: dict[tuple[int, int], str],
    *,
    title: str,
) -> None:
    """Colours and texts at their places (T, N)."""
    axis.set_title(title, fontsize=10)
    if not ratios:
        axis.axis("off")
        return
    tokens = sorted({T for T, _ in ratios})
    units = sorted({N for _, N in ratios})
    grid = [[float("nan")] * len(units) for _ in tokens]
    for (T, N), ratio in ratios.items():
        y, x = tokens.index(T), units.index(N)
        grid[y][x] = math.log2(ratio)
        axis.text(x, y, texts[T, N], ha="center", va="center", fontsize=9)
    # Twice as slow is as far from white as twice as fast; beyond 4 the colour saturates.
    axis.imshow(grid, cmap="PuOr_r", vmin=-2, vmax=2, alpha=0.7, aspect="auto")
    axis.set_xticks(range(len(units)), [str(n) for n in units])
    axis.set_yticks(range(len(tokens)), [str(t) for t in tokens])
    axis.set_xlabel("N, total bottleneck")
    axis.set_ylabel("T, tokens")


def _bars(result: Result, folder: Path) -> Path | None:
    cells = [
        [row for row in rows if row.median_ms is not None]
        for rows in result.cells()
        if rows[0].group == "pemt"
    ]
    if not cells:
        return None
    columns = min(4, len(cells))
    lines = -(-len(cells) // columns)
    size = (3.9 * columns, 2.5 * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, rows in zip(axes.flat, cells, strict=False):
        axis.axis("on")
        _bar_chart(axis, rows, preferred=result.preferred)
    title = f"PEMT's mixture beside wo: median ms, 20–80 % ({_device(result)})"
    return _save(figure, title, folder / f"{result.device}-pemt.png")


def _bar_chart(axis: Axes, rows: list[Row], *, preferred: str) -> None:
    names = [row.provider for row in rows]
    times = [row.median_ms for row in rows]
    spread = [
        [row.median_ms - (row.p20_ms or row.median_ms) for row in rows],
        [(row.p80_ms or row.median_ms) - row.median_ms for row in rows],
    ]
    colours = [
        _OURS_COLOUR if n == preferred else _BOUND_COLOUR if n == "matmuls" else _OTHER_COLOUR
        for n in names
    ]
    bars = axis.barh(names, times, xerr=spread, color=colours, ecolor="#555555")
    axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=4)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.set_title(f"{rows[0].case}\n{rows[0].dtype}, {rows[0].mode}", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _device(result: Result) -> str:
    e = result.environment
    return str(e["gpu"]) if result.device == "cuda" else f"{e['cpu']}, {e['threads']} threads"


def _save(figure: plt.Figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
    return path
