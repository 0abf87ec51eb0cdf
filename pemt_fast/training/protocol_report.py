# SPDX-License-Identifier: Apache-2.0
"""The tables of `pemt-fast protocol`: methods by targets, mean ± standard deviation over seeds.

Written after each run as `results.json`, `results.md` and `results.csv`, so a table exists while
others still train. A cell without a finished run is "–"; one with fewer seeds than planned says how
many. An average is over seeds that have all targets, and counts each target once.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from pemt_fast.checkpoint import replace_file
from pemt_fast.data import get_task
from pemt_fast.training.fit import environment, read_results, write_json
from pemt_fast.training.options import MRQA
from pemt_fast.training.protocol_methods import PLAIN, get_method
from pemt_fast.training.protocol_plan import (
    Plan,
    require_plan,
    shots_name,
    source_name,
    target_name,
)
from pemt_fast.training.run_queue import QUEUE, RunQueue, State

SCORE = "average"  # of a task's metrics
NOTHING = "–"
BENCHMARKS = ("GLUE", "SuperGLUE", "MRQA 2019", "others")
_OF_DATASET = {"nyu-mll/glue": "GLUE", "aps/super_glue": "SuperGLUE"}


def benchmark(task: str) -> str:
    """The benchmark under which a target is shown."""
    return "MRQA 2019" if task in MRQA else _OF_DATASET.get(get_task(task).dataset or "", "others")


def by_benchmark(targets: Sequence[str]) -> list[str]:
    """Targets in the order of the columns."""
    return sorted(targets, key=lambda task: BENCHMARKS.index(benchmark(task)))


def collect(folder: Path, plan: Plan) -> dict[str, Any]:
    """What is finished, and what is not.

    Returns:
        `sources`: results of stage 1 by task, None where there are none; `tables`: by shots and
        method the `cells` by target and the `average`, each with `scores` by seed, `mean`, `std`
        (sample; None for one seed) and `planned` seeds; `runs`: states and errors.
    """
    request = plan.request
    targets = by_benchmark(request.targets)
    tables: dict[str, dict[str, Any]] = {}
    for shots in request.shots:
        rows = tables.setdefault(shots_name(shots), {})
        for method in request.methods:
            seeds = [None] if method == PLAIN else list(request.seeds)
            found = {
                task: {
                    seed: results
                    for seed in seeds
                    if (results := read_results(folder / target_name(method, task, shots, seed)))
                }
                for task in targets
            }
            rows[method] = _row(found, seeds)
    queue = RunQueue(folder, lambda: plan.runs)
    return {
        "request": asdict(request),
        "sources": {n: _source(read_results(folder / source_name(n))) for n in request.sources},
        "tables": tables,
        "runs": {name: _standing(queue, name, state) for name, state in queue.states().items()},
        "environment": environment(),
    }  # fmt: skip


def _standing(queue: RunQueue, name: str, state: State) -> dict[str, Any]:
    error = {"error": queue.record(name).get("error")} if state is State.failed else {}
    return {"state": state, **error}


def _source(results: Mapping | None) -> dict | None:
    if results is None:
        return None
    keys = ("examples", "test", "seconds", "trainable_parameters", "steps")
    return {key: results[key] for key in keys}


def _row(found: Mapping[str, Mapping], seeds: Sequence[int | None]) -> dict[str, Any]:
    cells = {
        task: _cell({seed: r["test"][SCORE] for seed, r in runs.items()}, len(seeds))
        for task, runs in found.items()
    }
    complete = [seed for seed in seeds if all(seed in runs for runs in found.values())]
    averages = {
        seed: statistics.mean(runs[seed]["test"][SCORE] for runs in found.values())
        for seed in complete
    }
    runs = [results for runs in found.values() for results in runs.values()]
    return {
        "cells": cells,
        "average": _cell(averages, len(seeds)),
        "trainable_parameters": _mean([r["trainable_parameters"] for r in runs]),
        "seconds": _mean([r["seconds"] for r in runs]),
        "metrics": {t: {str(s): r["test"] for s, r in own.items()} for t, own in found.items()},
    }  # fmt: skip


def _cell(scores: Mapping[int | None, float], planned: int) -> dict[str, Any]:
    values = list(scores.values())
    return {
        "scores": {str(seed): score for seed, score in scores.items()},
        "mean": _mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "planned": planned,
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def cell_text(cell: Mapping[str, Any]) -> str:
    """A cell as it is shown."""
    if cell["mean"] is None:
        return NOTHING
    spread = "" if cell["std"] is None else f" ± {cell['std']:.1f}"
    count = len(cell["scores"])
    few = f" ({count} of {cell['planned']} seeds)" if count < cell["planned"] else ""
    return f"{cell['mean']:.1f}{spread}{few}"


def _number(value: float | None, form: str = ",.0f") -> str:
    return NOTHING if value is None else f"{value:{form}}"


def markdown(results: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    lines = []
    for shots, rows in results["tables"].items():
        targets = list(next(iter(rows.values()))["cells"])
        titles = [f"{benchmark(task)}<br>{task}" for task in targets]
        columns = ["method", *titles, "average", "trained parameters", "seconds"]
        named = "all training examples" if shots == shots_name(None) else shots
        lines += ["", f"Targets, {named}:", "", *_lines(columns, [
            [
                get_method(name).title,
                *(cell_text(row["cells"][task]) for task in targets),
                cell_text(row["average"]),
                _number(row["trainable_parameters"]), _number(row["seconds"]),
            ]
            for name, row in rows.items()
        ])]  # fmt: skip
    rows = []
    for name, source in results["sources"].items():
        if source is None:
            rows.append([name, *[NOTHING] * 5])
            continue
        count, score = source["examples"], source["test"][SCORE]
        rows.append([
            name, f"{count['train']:,}", f"{count['test']:,}", f"{score:.1f}",
            _number(source["trainable_parameters"]), _number(source["seconds"]),
        ])  # fmt: skip
    columns = ["source", "train", "test", "score", "trained parameters", "seconds"]
    lines += ["", "Sources:", "", *_lines(columns, rows), ""]
    seeds = results["request"]["seeds"]
    lines.append(
        "Scores in % of the test part, the mean of a task's metrics; mean and sample standard "
        f"deviation over the seeds {', '.join(map(str, seeds))} of training. Trained parameters "
        "and seconds (training and validation) are means over the runs of the row. Label style "
        f"{results['request']['label_style']}, prefix {results['request']['prefix']}."
    )
    if left := [n for n, run in results["runs"].items() if run["state"] != State.done]:
        lines += ["", f"{len(left)} of {len(results['runs'])} runs are not done."]
    for name, run in results["runs"].items():
        if run["state"] == State.failed:
            lines.append(f"* {name} failed: {run['error']}")
        elif run["state"] == State.blocked:
            lines.append(f"* {name}: not run, a run that it needs has failed")
    machine = ", ".join(f"{k} {v}" for k, v in results["environment"].items() if v)
    return "\n".join([*lines[1:], "", f"_{machine}_", ""])


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (columns, rule, *rows)]


def comma_separated(results: Mapping[str, Any]) -> str:
    """One line per cell, empty where there is nothing; for programs."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["shots", "method", "benchmark", "target", "mean", "std", "seeds", "planned_seeds"]
    )
    for shots, rows in results["tables"].items():
        for method, row in rows.items():
            for task, cell in [*row["cells"].items(), ("average", row["average"])]:
                group = "" if task == "average" else benchmark(task)
                lines.writerow([
                    shots, method, group, task, cell["mean"], cell["std"], len(cell["scores"]),
                    cell["planned"],
                ])  # fmt: skip
    return text.getvalue()


def write_report(folder: Path) -> dict[str, Any]:
    """Write the three files of what is finished; returns what `results.json` holds."""
    # Else an older view of another worker could be written last.
    with FileLock(folder / QUEUE / "report.lock"):
        results = json.loads(json.dumps(collect(folder, require_plan(folder))))
        write_json(folder / "results.json", results)
        texts = {"results.md": markdown(results), "results.csv": comma_separated(results)}
        for name, text in texts.items():
            replace_file(folder / name, partial(_write, text=text))
    return results


def _write(path: Path, text: str) -> None:
    path.write_text(text)


# --- the plan and how far it is ------------------------------------------------------------------


def progress(folder: Path, plan: Plan) -> tuple[list[tuple[str, ...]], str]:
    """A row per run, (run, state, needs, updates, seconds), and a sentence on all of them.

    Runs that are not done are estimated by the seconds per update of done ones of their kind and
    method, else of any that were trained.
    """
    queue = RunQueue(folder, lambda: plan.runs)
    states = queue.states()
    spent = {run.name: read_results(folder / run.name) for run in plan.runs}
    rates: dict[str, list[float]] = {}
    for run in plan.runs:
        results, updates = spent[run.name], plan.updates[run.name]
        if results is not None:
            for key in (_sort(run.name), "any" if updates else "none"):
                rates.setdefault(key, []).append(results["seconds"] / max(updates, 1))
    rows: list[tuple[str, ...]] = []
    left, unknown = 0.0, 0
    for run in plan.runs:
        results, updates = spent[run.name], plan.updates[run.name]
        known = rates.get(_sort(run.name)) or rates.get("any" if updates else "none")
        if results is not None:
            seconds = f"{results['seconds']:.0f}"
        elif known:
            estimate = statistics.mean(known) * max(updates, 1)
            seconds, left = f"about {estimate:.0f}", left + estimate
        else:
            seconds, unknown = NOTHING, unknown + 1
        needs = f"{len(run.needs)} sources" if run.needs else ""
        rows.append((run.name, states[run.name].value, needs, f"{updates:,}", seconds))
    counts = ", ".join(
        f"{count} {state}" for state in State if (count := list(states.values()).count(state))
    )
    total = f"{len(rows)} runs: {counts}; {sum(plan.updates.values()):,} updates"
    if left:
        hours = f"{left / 3600:.1f} h" if left > 7200 else f"{left / 60:.0f} min"
        total += f"; about {hours} of one worker left"
    if unknown:
        total += f"; {unknown} runs cannot be estimated before one like them is done"
    return rows, total


def _sort(name: str) -> str:
    """Runs of the same sort take about the same time per update: sources, or a method's."""
    return name.partition("/")[0]
