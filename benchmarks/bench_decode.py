# SPDX-License-Identifier: Apache-2.0
"""Measure generation: calls of few tokens eager and in CUDA graphs, grids, tokens per second of T5.

    python benchmarks/bench_decode.py --device cuda [--quick] [--only "T4"]

Run it as a path, not with `-m`. Who computes what: `decode_cases.py`. Every contender is compared
with float64 before it is timed. Writes JSON and a page of tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from command_line import check_options, chosen, new_parser, say
from decode_cases import STACKED, DecodeCase, contenders, select
from gpu_measure import Stopwatch, captured, host_us
from measure import GPU_CELL_S, QUICK_GPU_CELL_S, pin_threads, time_briefly
from records import environment, first_line
from t5_cases import GENERATED, LENGTHS, SHAPES, T5Case
from t5_models import Models

from pemt_fast.ops import extension
from pemt_fast.ops.dispatch import unavailable_reasons
from pemt_fast.testing import assert_within_budget

GRIDS = [(cluster, slices) for cluster in (1, 2, 4, 8) for slices in (1, 2, 3, 4, 6, 8, 12, 16, 24)]
SEQUENCES = (1, 8, 32)
PLAIN = "plain"


def measure(case: DecodeCase, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender: microseconds on the device, in a graph, of the host."""
    inputs = case.inputs(DTYPES[dtype], options.device)
    target = case.target_of(DTYPES[dtype], options.device) if case.target else None
    wide = case.inputs(DTYPES[dtype], options.device).to(torch.float64)
    wide_target = target and target._replace(
        **{k: v.double() for k, v in target._asdict().items() if isinstance(v, torch.Tensor)}
    )
    exact = contenders(wide, wide_target, compiles=False)[STACKED]()
    runs = contenders(inputs, target, compiles=options.device == "cuda")
    eager = runs[STACKED]()
    rows = {name: {"case": case.name, "dtype": dtype, "contender": name} for name in runs}
    for name in list(runs):
        try:
            assert_within_budget("out", runs[name](), exact, eager)
        except Exception as error:  # whatever a contender raises belongs into its row
            rows[name]["error"] = first_line(error)
            del runs[name]
    seconds = _time(runs, options)
    for name, found in seconds.items():
        rows[name]["us"] = 1e6 * statistics.median(found)
        rows[name]["min_us"] = 1e6 * min(found)
        rows[name]["host_us"] = host_us(runs[name], options.device)
    if options.device == "cuda":
        for name, found in _time(_graphs(runs, rows), options).items():
            rows[name]["graph_us"] = 1e6 * statistics.median(found)
        if dtype == "bf16" and "ours-cuda" in runs:
            rows["ours-cuda"]["grids"] = _grids(case, inputs, runs["ours-cuda"], options)
    return list(rows.values())


def _time(
    runs: dict[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, list[float]]:
    clock = Stopwatch().clock(runs) if options.device == "cuda" and runs else None
    return time_briefly(runs, rounds=options.rounds, cell_s=options.cell_s, clock=clock)


def _graphs(
    runs: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> dict[str, Callable[[], object]]:
    found = {}
    for name, run in runs.items():
        try:
            found[name] = captured(run)
        except Exception as error:
            rows[name]["graph_error"] = first_line(error)
    return found


def _grids(
    case: DecodeCase, inputs: Any, run: Callable[[], object], options: argparse.Namespace
) -> dict[str, float]:
    """Microseconds in a graph of every form of the grid; `plan` names the one that is taken."""
    module = extension.load()
    assert module is not None
    plan = module.decode_grid(
        inputs.x.get_device(), case.T, case.D, case.H, case.E * case.R, case.target, inputs.x
    )
    graphs: dict[str, Callable[[], object]] = {}
    try:
        for cluster, slices in sorted({*GRIDS, tuple(plan)}):
            module.use_decode_grid(cluster, slices)
            mark = " plan" if (cluster, slices) == tuple(plan) else ""
            graphs[f"{cluster}x{slices}{mark}"] = captured(run)
    finally:
        module.use_decode_grid(0, 0)
    seconds = _time(graphs, options)
    return {name: 1e6 * statistics.median(found) for name, found in seconds.items()}


def generate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of a T5, plain and with PEMT, with growing and with static caches."""
    rows = []
    shape, (source, target) = SHAPES[0 if options.quick else 1], LENGTHS[0]
    impls = [i for i in ("torch", "triton", "cuda")
             if not unavailable_reasons(i, torch.device(options.device))]  # fmt: skip
    for sequences in SEQUENCES[: 1 if options.quick else None]:
        layers = 1 if options.quick else shape.layers
        case = T5Case(shape, layers, source, target, B=sequences)
        models = Models(case, torch.bfloat16, options.device)
        models.adapted.eval()
        for cache in ("dynamic", "static")[: 1 if options.device == "cpu" else None]:
            runs: dict[str, Callable[[], object]] = {}
            for name in (PLAIN, "stacked", *(f"ours-{impl}" for impl in impls)):
                runs[name] = _generation(models, name, cache)
            for name, run in runs.items():
                row: dict[str, Any] = {"model": shape.name, "sequences": sequences, "cache": cache,
                                       "contender": name}  # fmt: skip
                rows.append(row)
                try:
                    run()
                    run()
                    row["seconds"] = statistics.median(_seconds(run) for _ in range(3))
                    row["tokens_per_s"] = sequences * GENERATED / row["seconds"]
                except Exception as error:
                    row["error"] = first_line(error)
            say(f"{case.name}, {cache} cache")
    return rows


def _generation(models: Models, name: str, cache: str) -> Callable[[], object]:
    contender = "ours" if name.startswith("ours-") else name

    def run() -> object:
        if contender == "ours":
            for tail in models.tails["ours"]:
                for module in tail.modules():
                    if hasattr(module, "impl"):
                        module.impl = name.removeprefix("ours-")
        return models.generate(contender, cache_implementation=cache)

    return run


def _seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    stamp = found["environment"]
    lines = [
        "# Generation: calls of few tokens\n",
        f"{stamp['gpu'] or stamp['cpu']}; torch {stamp['torch']}; commit {stamp['commit']}; "
        f"{stamp['date'][:10]}. Microseconds, medians; `×` against the stacked torch form.\n",
        "| case | dtype | contender | device | × | graph | × | host |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    stacked = {(r["case"], r["dtype"]): r for r in found["calls"] if r["contender"] == STACKED}
    for row in found["calls"]:
        cells = [row["case"], row["dtype"], row["contender"]]
        if "error" in row:
            lines.append(f"| {' | '.join(cells)} | {row['error']} | | | | |")
            continue
        base = stacked[row["case"], row["dtype"]]
        for key in ("us", "graph_us"):
            known = key in row and key in base
            cells += [f"{row[key]:.1f}" if key in row else "–",
                      f"{base[key] / row[key]:.2f}" if known else "–"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} | {row['host_us']:.1f} |")
    lines += [
        "\n| generation | cache | contender | tokens/s | of plain T5 |",
        "|---|---|---|---:|---:|",
    ]
    plain = {(r["sequences"], r["cache"]): r.get("tokens_per_s") for r in found["generation"]
             if r["contender"] == PLAIN}  # fmt: skip
    for row in found["generation"]:
        named = (
            f"{row['model']}, {row['sequences']} sequences | {row['cache']} | {row['contender']}"
        )
        if "error" in row:
            lines.append(f"| {named} | {row['error']} | |")
            continue
        base = plain[row["sequences"], row["cache"]]
        share = f"{row['tokens_per_s'] / base:.2f}" if base else "–"
        lines.append(f"| {named} | {row['tokens_per_s']:.0f} | {share} |")
    return "\n".join([*lines, *_grid_lines(found["calls"])]) + "\n"


def _grid_lines(calls: list[dict[str, Any]]) -> list[str]:
    """The fastest form of the grid beside the one that the plan takes."""
    lines = ["\n| case | plan (cluster × slices) | µs | fastest | µs |", "|---|---|---:|---|---:|"]
    for row in calls:
        if grids := row.get("grids"):
            plan = next(name for name in grids if name.endswith("plan"))
            best = min(grids, key=grids.__getitem__)
            lines.append(f"| {row['case']} | {plan.split()[0]} | {grids[plan]:.2f} "
                         f"| {best.split()[0]} | {grids[best]:.2f} |")  # fmt: skip
    return lines if len(lines) > 2 else []


def arguments() -> argparse.Namespace:
    """What the command line says, with the cases to measure."""
    parser = new_parser(
        "Time generation with mixtures of adapters.", quick="tiny shapes, one layer"
    )
    parser.add_argument("--no-models", action="store_true", help="calls only")
    options = parser.parse_args()
    check_options(parser, options)
    options.cell_s = QUICK_GPU_CELL_S if options.quick else GPU_CELL_S
    options.cases = chosen(parser, options.only, select(quick=options.quick))
    return options


def main() -> int:
    """Returns the exit status: 1 if a contender was refused."""
    options = arguments()
    stamp = environment(pin_threads(options.threads), options.commit)
    found: dict[str, Any] = {"environment": stamp, "calls": [], "generation": []}
    name = f"{options.device}-decode-{str(stamp['date'])[:10]}-{stamp['commit'] or 'nogit'}"
    # A folder of its own below the results of the suites that report.py reads.
    path = Path(options.out) / "decode" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(found), encoding="utf-8")

    for case in options.cases:
        for dtype in DTYPES:
            found["calls"] += measure(case, dtype, options)
        save()
        say(case.name)
    if not options.no_models:
        found["generation"] = generate(options)
    save()
    say(page(found))
    say(f"written: {path}")
    return int(any("error" in row for row in (*found["calls"], *found["generation"])))


if __name__ == "__main__":
    sys.exit(main())
