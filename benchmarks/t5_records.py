# SPDX-License-Identifier: Apache-2.0
"""What a run of the T5 suite leaves behind: rows and files of `records.py`, with more columns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from records import Result, Row, newest
from t5_cases import OURS, T5Case

SUITE = "t5"
MODEL, TAIL = "t5", "tail"  # groups of rows


@dataclasses.dataclass
class T5Row(Row):
    """One contender in one cell: a mode of the model, or a step of the tail alone.

    `S` and `T` are those of the encoder, prompt included. `added` is the time beyond plain T5 over
    the time of plain T5, `flop_share` and `adapters_share` the same of the operations.
    """

    layers: int = 0
    source: int = 0
    target: int = 0
    impl: str | None = None  # what `auto` meant
    deviation: float | None = None
    added: float | None = None
    flop_share: float | None = None
    adapters_share: float | None = None

    def loses_to(self, baseline: str) -> bool:
        """Whether this is ours and, to the two digits shown, slower than the baseline."""
        known = self.provider == OURS and baseline in self.speedup
        return known and round(self.speedup[baseline], 2) < 1

    def over_share(self, *, all_adapters: bool = False) -> float | None:
        """Added time over the mixture's share of the operations, or over that of all adapters."""
        share = self.adapters_share if all_adapters else self.flop_share
        return None if self.added is None or not share else self.added / share


def t5_row(
    case: T5Case, dtype: str, mode: str, provider: str, *, group: str = MODEL, name: str = ""
) -> T5Row:
    """A row without numbers."""
    shape = case.shape
    return T5Row(
        name or case.name, group, dtype, mode, provider, B=case.B, S=case.encoded,
        T=case.B * case.encoded, N=case.E * case.R, E=case.E, R=case.R, D=shape.D, H=shape.H,
        gate="[B, E]", activation="identity", layers=case.layers, source=case.source,
        target=case.target,
    )  # fmt: skip


def load(path: Path) -> Result:
    """The inverse of `Result.save`."""
    values = json.loads(path.read_text())
    return Result(**{**values, "rows": [T5Row(**row) for row in values["rows"]]})


def newest_t5(folder: Path) -> dict[str, Result]:
    """The latest complete run of the suite on each device, by device."""
    return newest(folder, SUITE, load)
