# SPDX-License-Identifier: Apache-2.0
"""The regression gate: a few cells of the operator against the committed ratios ours / stacked.

    python benchmarks/bench_check.py            # compare, exit status 1 where one has fallen
    python benchmarks/bench_check.py --update   # measure and keep the ratios

Both sides of a ratio are timed in turns in one process, so it moves far less than a time does. The
ratios kept are medians of three measurements, per instruction set and number of threads; on a
machine that none were kept for the gate is that no cell is slower than stacked torch, within the
margin. A cell that falls below is measured again, twice at most, and its best ratio counts: noise
makes a cell slow, hardly ever fast.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench_adapter_mixture import measure_cell
from cases import CASES, FORWARD, FROZEN, Case
from checking import Oracle
from command_line import check_options, new_parser, say
from measure import pin_threads
from providers import PROVIDERS, preferred
from records import RESULTS, environment

from pemt_fast.checkpoint import replace_file
from pemt_fast.ops import extension

KEPT = RESULTS / "check" / "ratios.json"
MARGIN = 0.2  # of a kept ratio; see benchmarks/README.md for how far ratios move by themselves
TRIES = 3
CELL_S = 1.0
BASELINE = "stacked"

DTYPES = ("fp32", "bf16")
# Case -> modes: few and many tokens, small and large N, with and without the matmuls in charge.
CELLS: dict[str, tuple[str, ...]] = {
    "t5-base encoder": (FORWARD, FROZEN),
    "t5-base decoder": (FORWARD,),
    "T1 N384": (FORWARD,),
    "T32 N64": (FORWARD,),
    "T512 N64": (FORWARD, FROZEN),
    "T512 N384": (FORWARD, FROZEN),
    "T2048 N1024": (FORWARD,),
}
# There the mat-vecs of stacked torch leave the error budget: nothing to compare with.
LEFT_OUT = {("T1 N384", "fp32")}


@dataclasses.dataclass
class Verdict:
    """One cell.

    Attributes:
        name: Case, dtype and mode.
        ratio: Times as fast as stacked torch, the best of the tries.
        kept: What it was; None on a machine without kept ratios.
        error: Why ours was not timed.
    """

    name: str
    ratio: float
    kept: float | None
    error: str | None = None

    @property
    def least(self) -> float:
        """What it must reach."""
        return (1.0 if self.kept is None else self.kept) * (1 - MARGIN)

    @property
    def passed(self) -> bool:
        """Whether it does."""
        return self.error is None and self.ratio >= self.least


def machine_key(threads: int) -> str:
    """Machines on which ratios are alike."""
    module = extension.load()
    isa = module.cpu_isa() if module else torch.backends.cpu.get_cpu_capability().lower()
    return f"{isa}, {threads} threads"


def read_kept(path: Path) -> dict[str, Any]:
    """All kept ratios; empty if there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def cells(only: str = "") -> list[tuple[Case, str, str]]:
    """The cells `(case, dtype, mode)`."""
    named = {case.name: case for case in CASES if "cpu" in case.devices}
    return [
        (named[name], dtype, mode)
        for name, modes in CELLS.items()
        for dtype in DTYPES
        for mode in modes
        if only in name and (name, dtype) not in LEFT_OUT
    ]


def judge(
    cell: tuple[Case, str, str], kept: float | None, rounds: int | None, *, update: bool = False
) -> Verdict:
    """Measure a cell until it passes, three times at most; to `update` three times, the median."""
    case, dtype, mode = cell
    ours = preferred("cpu")
    wanted = [provider for provider in PROVIDERS if provider.name in (BASELINE, ours)]
    oracle = Oracle(case, dtype, "cpu")
    verdict = Verdict(f"{case.name}, {dtype}, {mode}", 0.0, kept)
    found: list[float] = []
    for _ in range(TRIES):
        rows = {row.provider: row for row in measure_cell(
            oracle, mode, wanted, rounds=rounds, cell_s=CELL_S
        )}  # fmt: skip
        if errors := [f"{name}: {row.error}" for name, row in rows.items() if row.error]:
            verdict.error = errors[0]
            return verdict
        found.append(rows[ours].speedup[BASELINE])
        verdict.ratio = statistics.median(found) if update else max(found)
        if verdict.passed and not update:
            break
    return verdict


def table(verdicts: list[Verdict]) -> str:
    """The cells as Markdown, the failed ones marked."""
    lines = ["| cell | × stacked | kept | at least | |", "|---|---:|---:|---:|---|"]
    for v in verdicts:
        kept = "–" if v.kept is None else f"{v.kept:.2f}"
        mark = "" if v.passed else v.error or "slower"
        lines.append(f"| {v.name} | {v.ratio:.2f} | {kept} | {v.least:.2f} | {mark} |")
    return "\n".join(lines)


def main() -> int:
    """Returns the exit status: 1 if a cell has fallen or was refused."""
    parser = new_parser("Compare a few cells with committed ratios.", quick="not used here")
    parser.add_argument("--update", action="store_true", help="keep what is measured")
    options = parser.parse_args()
    check_options(parser, options)
    if options.device != "cpu":
        parser.error("--device: the gate is for CPUs")
    chosen = cells(options.only)
    if not chosen:
        parser.error(f"--only {options.only!r} is in none of: {', '.join(CELLS)}")
    threads = pin_threads(options.threads)
    key, kept = machine_key(threads), read_kept(KEPT)
    known = {} if options.update else kept.get(key, {}).get("ratios", {})
    if not known and not options.update:
        say(f"no ratios are kept for {key!r}: no cell may be slower than {BASELINE} torch")
    verdicts = []
    for cell in chosen:
        case, dtype, mode = cell
        name = f"{case.name}, {dtype}, {mode}"
        verdicts.append(judge(cell, known.get(name), options.rounds, update=options.update))
        say(f"{name}: {verdicts[-1].ratio:.2f}")
    say(table(verdicts))
    if options.update:
        ratios = {v.name: round(v.ratio, 3) for v in verdicts if v.error is None}
        old = kept.get(key, {}).get("ratios", {})
        kept[key] = {"environment": environment(threads, options.commit), "ratios": old | ratios}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
        replace_file(KEPT, lambda path: path.write_text(text, encoding="utf-8"))
        say(f"written: {KEPT}")
    return int(not all(v.passed for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
