# SPDX-License-Identifier: Apache-2.0
"""What a target is, and the table of those of a suite: for the terminal and for `report.py`.

The targets themselves: `grid_targets.py`, `gpu_targets.py`, `t5_report.py`, `poly_report.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from records import Result, Row, geometric_mean
from rich.table import Table
from tables import rich_table

TARGET_COLUMNS = ("where", "what", "target", "cells", "worst found", "in", "reached")


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on the geometric mean of `value` over the cells that `keep` accepts.

    With `every_cell` on the worst of them. The value should be at least `bound`, or `at_most` that.
    """

    where: str
    what: str
    bound: float
    keep: Callable[[Row], bool]
    value: Callable[[Row], float]
    every_cell: bool = False
    at_most: bool = False

    def worst(self, rows: Sequence[Row]) -> Row:
        """The cell that is farthest on the wrong side."""
        return (max if self.at_most else min)(rows, key=self.value)

    def found(self, rows: Sequence[Row]) -> float:
        """What the bound is for."""
        if self.every_cell:
            return self.value(self.worst(rows))
        return geometric_mean(self.value(row) for row in rows)

    def reached(self, rows: Sequence[Row]) -> bool:
        """Whether the bound holds, to the two digits shown."""
        found = round(self.found(rows), 2)
        return found <= self.bound if self.at_most else found >= self.bound


def target_line(
    target: Target, rows: Sequence[Row], refused: Sequence[Row], name: Callable[[Row], str]
) -> list[str]:
    """A text per column of `TARGET_COLUMNS`; with a refused cell it is not reached."""
    found = where = "–"
    if rows:
        found, where = f"{target.found(rows):.2f}", name(target.worst(rows))
    fails = refused or (rows and not target.reached(rows))
    reached = "**no**" if fails else "yes" if rows else "not measured"
    count = f"{len(rows)}, {len(refused)} refused" if refused else str(len(rows))
    bound = f"{'≤' if target.at_most else '≥'} {target.bound:.2f}"
    return [target.where, target.what, bound, count, found, where, reached]


def target_lines(
    targets: Iterable[Target], result: Result, name: Callable[[Row], str]
) -> list[list[str]]:
    """One for each target; cells whose value is NaN, as it is not known, do not count."""
    lines = []
    for target in targets:
        rows = [row for row in result.rows if row.provider == result.preferred and target.keep(row)]
        refused = [row for row in rows if row.error]
        known = [row for row in rows if not row.error and not math.isnan(target.value(row))]
        lines.append(target_line(target, known, refused, name))
    return lines


def target_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """The lines for the terminal."""
    table = rich_table("Targets", columns, text_columns=2)
    for line in lines:
        table.add_row(*(cell.replace("**", "") for cell in line))
    return table
