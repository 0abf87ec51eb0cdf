# SPDX-License-Identifier: Apache-2.0
"""What the commands share: where they print, and lists in options."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

console = Console()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table with its title; floats to one digit."""
    console.print(title, style="bold", soft_wrap=True)
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


def split_names(names: str) -> list[str]:
    """What a comma-separated option holds."""
    return [name.strip() for name in names.split(",") if name.strip()]
