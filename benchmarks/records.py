# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: rows that know their machine and commit, as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib
import importlib.util
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from cases import Case

import pemt_fast

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
BASELINES = ("published", "loop", "stacked", "compiled")
HEAT_MAP_BASELINES = ("published", "stacked")
OURS_PREFIX = "ours-"
GRAPH = " graph"  # behind a baseline's name: the ratio of both in CUDA graphs
OPERATOR = "operator"  # the suite of `cases.py`; that of `grid.py` has a file format of its own


@dataclasses.dataclass
class Row:
    """One provider in one cell. `error` is set, and the numbers are not, where it was refused."""

    case: str
    group: str
    dtype: str
    mode: str
    provider: str
    B: int
    S: int
    T: int
    N: int
    E: int
    R: int
    D: int
    H: int
    gate: str
    activation: str
    error: str | None = None
    rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    tflop_s: float | None = None
    bandwidth_gb_s: float | None = None
    share_of_matmuls: float | None = None
    peak_memory_mib: float | None = None
    first_call_s: float | None = None
    graph_ms: float | None = None
    host_us: float | None = None
    floor_us: float | None = None
    speedup: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def cell(self) -> tuple[str, str, str]:
        """What the providers of one cell have in common."""
        return self.case, self.dtype, self.mode

    def loses_to(self, baseline: str) -> bool:
        """Whether this is ours and, to the two digits shown, slower than the baseline."""
        ours = self.provider.startswith(OURS_PREFIX)
        return ours and baseline in self.speedup and round(self.speedup[baseline], 2) < 1

    def set_times(self, seconds: list[float]) -> None:
        """Median, spread and minimum."""
        cuts = statistics.quantiles(seconds, n=5, method="inclusive") if seconds[1:] else None
        self.rounds = len(seconds)
        self.median_ms = 1e3 * statistics.median(seconds)
        self.p20_ms, self.p80_ms = (1e3 * cuts[0], 1e3 * cuts[3]) if cuts else (None, None)
        self.min_ms = 1e3 * min(seconds)


def first_line(error: Exception) -> str:
    """Whatever a provider raises, as its row shows it."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def new_row(case: Case, dtype: str, mode: str, provider: str) -> Row:
    """A row without numbers."""
    return Row(
        case.name, case.group, dtype, mode, provider, B=case.B, S=case.S, T=case.T, N=case.N,
        E=case.E, R=case.R, D=case.D, H=case.H, gate=case.gate, activation=case.activation,
    )  # fmt: skip


@dataclasses.dataclass
class Result:
    """One run of one suite on one device."""

    device: str
    environment: dict[str, object]
    partial: bool
    preferred: str
    skipped: dict[str, str]
    rows: list[Row]
    suite: str = OPERATOR
    # Of a run with a budget: case, dtype, mode, provider ("" for all of them), reason.
    not_measured: list[list[str]] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the files, without suffix."""
        subject = self.device if self.suite == OPERATOR else f"{self.device}-{self.suite}"
        date, commit = str(self.environment["date"])[:10], self.environment["commit"] or "nogit"
        dirty = "-dirty" if self.environment["dirty"] else ""
        return f"{subject}-{date}-{commit}{dirty}{'-partial' if self.partial else ''}"

    def cells(self) -> list[list[Row]]:
        """The rows of each cell, in the order of measurement."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.cell, []).append(row)
        return list(found.values())

    def save(self, folder: Path) -> Path:
        """Write `<name>.json` and `<name>.csv`; returns the first."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(_flat(self, self.rows[0])))
            writer.writeheader()
            writer.writerows(_flat(self, row) for row in self.rows)
        return path

    def complete(self, folder: Path) -> Path:
        """Save what is complete now, in place of the partial files; returns the first."""
        partial = folder / f"{self.name}.json"
        self.partial = False
        path = self.save(folder)
        for leftover in (partial, partial.with_suffix(".csv")):
            leftover.unlink()
        return path


def _flat(result: Result, row: Row) -> dict[str, object]:
    values = dataclasses.asdict(row)
    ratios = values.pop("speedup")
    stamp = {key: result.environment[key] for key in ("date", "commit", "cpu", "gpu", "torch")}
    return {"device": result.device} | values | {f"x_{b}": ratios.get(b) for b in BASELINES} | stamp


def load(path: Path) -> Result:
    """The inverse of `Result.save`."""
    values = json.loads(path.read_text())
    return Result(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def newest(
    folder: Path, suite: str = OPERATOR, read: Callable[[Path], Result] = load
) -> dict[str, Result]:
    """The latest complete result of each device, by device; `read` knows the files of the suite."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        head = json.loads(path.read_text())
        if head["partial"] or head.get("suite", OPERATOR) != suite:
            continue
        known = found.get(head["device"])
        if known is None or str(known.environment["date"]) < head["environment"]["date"]:
            found[head["device"]] = read(path)
    return dict(sorted(found.items()))


def geometric_mean(values: Iterable[float]) -> float:
    """NaN without values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclasses.dataclass
class Summary:
    """One provider of ours against one baseline over all cells of a dtype and mode."""

    dtype: str
    mode: str
    provider: str
    baseline: str
    cells: int
    mean: float
    worst: float
    best: float
    lost: int


def summaries(
    result: Result, keep: Callable[[Row], bool] = lambda row: row.group != "host"
) -> list[Summary]:
    """Geometric means of the ratios, for the rows `keep` accepts."""
    pools: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in result.rows:
        if row.provider.startswith(OURS_PREFIX) and keep(row):
            for baseline in row.speedup:
                key = (row.dtype, row.mode, row.provider, baseline)
                pools.setdefault(key, []).append(row)
    found = []
    for (dtype, mode, provider, baseline), rows in pools.items():
        ratios = [row.speedup[baseline] for row in rows]
        found.append(
            Summary(
                dtype,
                mode,
                provider,
                baseline,
                len(rows),
                geometric_mean(ratios),
                min(ratios),
                max(ratios),
                sum(row.loses_to(baseline) for row in rows),
            )  # fmt: skip
        )
    return found


def environment(threads: int, commit: str | None = None) -> dict[str, object]:
    """Machine, versions, commit and date; `commit` is used where git does not know it."""
    gpu = torch.cuda.is_available()
    commit = _git("rev-parse", "--short=8", "HEAD") or commit
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(commit and _git("status", "--porcelain", "--", *_SOURCES)),
        "cpu": _cpu_model(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "driver": nvidia_smi("driver_version") if gpu else None,
        "triton": _triton_version() if gpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "pemt_fast": pemt_fast.__version__,
    }


# What a change of may change the numbers.
_SOURCES = ("pemt_fast", "kernels", "csrc", "setup.py", "benchmarks/*.py")


def nvidia_smi(fields: str) -> str | None:
    """The first GPU's values of the fields, None where the program does not tell."""
    return _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("triton").__version__


def _git(*arguments: str) -> str | None:
    return _output_of("git", *arguments)


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
