# SPDX-License-Identifier: Apache-2.0
"""Turn the newest complete result of each device into tables and plots; no number is typed by hand.

    python benchmarks/report.py [--check]
    python benchmarks/report.py --show FILE

Writes `results/README.md` and its plots, and the short tables, of the operator and of Poly, between
the two `benchmark` markers of the repository's README; for the grid also `results/<device>-grid.md`
with its cells. `--check` writes nothing and exits 1 if one of the texts is stale. `--show` prints a
run of a grid, of T5 or of Poly, also a partial one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from grid_records import load as load_grid
from grid_records import newest_grid
from grid_report import page, page_name, print_grid, section
from grid_targets import ours
from poly_records import SUITE as POLY_SUITE
from poly_records import load as load_poly
from poly_records import newest_poly
from poly_report import SUMMARY_COLUMNS as POLY_COLUMNS
from poly_report import print_poly
from poly_report import section as poly_section
from poly_report import summary_cells as poly_summary_cells
from records import BENCHMARKS, HEAT_MAP_BASELINES, RESULTS, Result, newest
from rich.console import Console
from t5_records import SUITE as T5_SUITE
from t5_records import load as load_t5
from t5_records import newest_t5
from t5_report import print_t5
from t5_report import section as t5_section
from tables import (
    COLUMNS,
    LOST,
    SUMMARY_COLUMNS,
    cell_title,
    host_table,
    machine,
    markdown,
    row_cells,
    summary_cells,
)

README = BENCHMARKS.parent / "README.md"
OPEN, CLOSE = "<!-- benchmark -->", "<!-- /benchmark -->"
READING = (
    f"Geometric mean of the ratios, in brackets the range over the cells, and how many of them are "
    f"slower than the baseline ({LOST}). Above 1 is faster."
)
POLY = (
    "Poly and MHR against peft, the frozen layer or model included (`make bench-poly`); refused: "
    "failed the check against peft in float64, hence not timed."
)


def block(
    results: dict[str, Result],
    polys: Iterable[Result] = (),
    link: str = "benchmarks/results/README.md",
) -> str:
    """The short tables for the repository's README, without the markers."""
    parts = []
    for result in results.values():
        table = markdown(SUMMARY_COLUMNS, summary_cells(result), text_columns=3)
        parts.append(f"`{result.device}`: {machine(result)}\n\n{table}")
    for poly in polys:
        table = markdown(POLY_COLUMNS, poly_summary_cells(poly), text_columns=3)
        parts.append(f"{POLY}\n\n`{poly.device}`: {machine(poly)}\n\n{table}")
    tables = "\n\n".join(parts)
    return f"{tables}\n\n{READING} [All cells, with plots]({link})."


def long_report(
    results: dict[str, Result],
    plots: dict[str, list[str]],
    grids: Iterable[Result] = (),
    t5s: Iterable[Result] = (),
    polys: Iterable[Result] = (),
) -> str:
    """`results/README.md`: T5, Poly, summaries of the grids, every cell of the operator."""
    parts = [
        "# Results",
        "Written by `make report` from the newest complete run of each device; what the columns "
        "mean is in [../README.md](../README.md).",
    ]
    for t5 in t5s:
        parts += t5_section(t5)
    for poly in polys:
        parts += poly_section(poly)
    for grid in grids:
        parts += section(grid)
    for result in results.values():
        parts += [f"## {result.device}", machine(result), "### Geometric means", READING]
        parts.append(markdown(SUMMARY_COLUMNS, summary_cells(result), text_columns=3))
        parts += [f"![{Path(name).stem}]({name})" for name in plots.get(result.device, [])]
        parts += _host(result)
        parts.append("### Every cell")
        for rows in result.cells():
            if rows[0].group != "host":
                parts.append(f"**{cell_title(rows[0])}**")
                parts.append(markdown(COLUMNS, [row_cells(row) for row in rows]))
        if result.skipped:
            parts.append("### Not measured")
            reasons = (f"* `{name}`: {reason}" for name, reason in result.skipped.items())
            parts.append("\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _host(result: Result) -> list[str]:
    columns, rows = host_table(result)
    return ["### Host time of a call with next to no work", markdown(columns, rows)] if rows else []


def plot_names(result: Result) -> list[str]:
    """The pictures that `plots.plot` writes for this result, without drawing them."""
    grid = any(row.group == "grid" and row.provider == result.preferred for row in result.rows)
    names = [f"{result.device}-heatmap-{b}.png" for b in HEAT_MAP_BASELINES if grid]
    pemt = any(row.group == "pemt" for row in result.rows)
    return [*names, *([f"{result.device}-pemt.png"] if pemt else [])]


def with_block(text: str, new: str) -> str | None:
    """The text with the part between the markers replaced, None if there are no markers."""
    before, opening, rest = text.partition(OPEN)
    _, closing, after = rest.partition(CLOSE)
    if not opening or not closing:
        return None
    return f"{before}{OPEN}\n{new}\n{CLOSE}{after}"


def texts(results: dict[str, Result], folder: Path) -> dict[Path, str]:
    """The files of the report in the folder of the results."""
    grids, t5s = newest_grid(folder).values(), newest_t5(folder).values()
    polys = newest_poly(folder).values()
    plots = {device: plot_names(result) for device, result in results.items()}
    pages = {folder / page_name(grid): page(grid) for grid in grids if ours(grid)}
    return {folder / "README.md": long_report(results, plots, grids, t5s, polys)} | pages


def stale(results: dict[str, Result], folder: Path, readme: Path) -> list[str]:
    """What would change if the report were written now."""
    found = [
        str(path)
        for path, text in texts(results, folder).items()
        if not path.is_file() or path.read_text() != text
    ]
    text = readme.read_text() if readme.is_file() else ""
    if with_block(text, block(results, newest_poly(folder).values())) not in (None, text):
        found.append(f"{readme} between {OPEN} and {CLOSE}")
    return found


def write(results: dict[str, Result], folder: Path, readme: Path) -> list[Path]:
    """Write tables and plots; returns the files written."""
    from plots import plot, plot_grid  # matplotlib is slow to import, and --check draws nothing

    written = [path for result in results.values() for path in plot(result, folder)]
    written += [path for grid in newest_grid(folder).values() for path in plot_grid(grid, folder)]
    for path, text in texts(results, folder).items():
        path.write_text(text)
        written.append(path)
    text = readme.read_text() if readme.is_file() else ""
    changed = with_block(text, block(results, newest_poly(folder).values()))
    if changed is None:
        print(f"{readme} has no markers {OPEN} and {CLOSE}: left as it is")
    else:
        readme.write_text(changed)
        written.append(readme)
    return written


def main() -> int:
    """Returns the exit status: 1 if `--check` finds something stale."""
    parser = argparse.ArgumentParser(description="Tables and plots of the benchmark's results.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print a run that is not of the operator"
    )
    options = parser.parse_args()
    if options.show is not None:
        suite = json.loads(options.show.read_text()).get("suite")
        if suite == T5_SUITE:
            print_t5(load_t5(options.show), Console())
        elif suite == POLY_SUITE:
            print_poly(load_poly(options.show), Console())
        else:
            print_grid(load_grid(options.show), Console())
        return 0
    results = newest(options.results)
    others = (newest_grid, newest_t5, newest_poly)
    if not (results or any(find(options.results) for find in others)):
        print(f"no complete result in {options.results}; `make bench` makes one")
        return 0 if options.check else 1
    if options.check:
        outdated = stale(results, options.results, options.readme)
        for name in outdated:
            print(f"stale: {name}; run `make report`")
        return 1 if outdated else 0
    for path in write(results, options.results, options.readme):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
