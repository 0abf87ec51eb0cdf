# SPDX-License-Identifier: Apache-2.0
"""What a run of the Poly suite leaves behind: rows and files of `records.py`, with more columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from poly_cases import OURS, PolyCase
from records import Result, Row, newest

SUITE = "poly"
LAYER, MODEL = "layer", "model"  # groups of rows


@dataclasses.dataclass
class PolyRow(Row):
    """One contender in one cell. `E` are the skills, `N` the hidden units of one task.

    `added` is the time beyond the frozen layer or model; its quotient to peft's is in `speedup`
    under `peft added`.
    """

    splits: int = 1
    tasks: int = 1
    impl: str | None = None  # what `auto` meant
    deviation: float | None = None
    added: float | None = None

    def loses_to(self, baseline: str) -> bool:
        """Whether this is ours and, to the two digits shown, slower than the baseline."""
        known = self.provider == OURS and baseline in self.speedup
        return known and round(self.speedup[baseline], 2) < 1


def poly_row(case: PolyCase, dtype: str, mode: str, provider: str) -> PolyRow:
    """A row without numbers."""
    return PolyRow(
        case.name, MODEL if case.target else LAYER, dtype, mode, provider, B=case.B, S=case.S,
        T=case.B * case.S, N=case.R, E=case.K, R=case.R, D=case.D, H=case.H, gate="[B, K]",
        activation="identity", splits=case.P, tasks=case.M,
    )  # fmt: skip


def load(path: Path) -> Result:
    """The inverse of `Result.save`."""
    values = json.loads(path.read_text())
    return Result(**{**values, "rows": [PolyRow(**row) for row in values["rows"]]})


def newest_poly(folder: Path) -> dict[str, Result]:
    """The latest complete run of the suite on each device, by device."""
    return newest(folder, SUITE, load)
