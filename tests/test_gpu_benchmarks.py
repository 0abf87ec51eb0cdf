"""The GPU's grid without a GPU: its order, its budget, what goes wrong, its files, its report."""

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pemt_fast import adapter_mixture

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"

# The modules of benchmarks/ import one another by name, as scripts beside each other do.
sys.path.insert(0, str(FOLDER))
import bench_adapter_mixture as bench  # noqa: E402
import cases  # noqa: E402
import checking  # noqa: E402
import compile_ahead  # noqa: E402
import gpu_cell  # noqa: E402
import gpu_grid  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_report  # noqa: E402
import gpu_run  # noqa: E402
import gpu_targets  # noqa: E402
import grid  # noqa: E402
import grid_records  # noqa: E402
import grid_report  # noqa: E402
import plots  # noqa: E402, F401  (report imports it when it draws)
import providers  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import tables  # noqa: E402

sys.path.remove(str(FOLDER))

H200 = "NVIDIA H200"
STAMP = records.environment(2, "0123abcd") | {
    "date": "2031-01-02T03:04:05+00:00",
    "commit": "0123abcd",
    "dirty": False,
    "gpu": H200,
    "driver": "580.1",
    "cuda": "13.0",
    "triton": "3.6.0",
}
TINY = gpu_grid.Plan(
    tokens=(1, 16, 600),
    widths=((16, 16), (24, 16)),
    adapters=(1, 2),
    R=8,
    sparse=((600, 16, 16, 4, 2),),
)


# --- the grid ------------------------------------------------------------------------------------


def test_the_grid_has_every_shape_once_in_the_modes_of_its_tokens():
    cells = gpu_grid.FULL.cells()
    dense = [(case.name, mode) for case, _, mode in cells if not case.top_k]
    assert len(dense) == len(set(dense)) == 6 * 6 * (1 + 2 * 2 + 4 * 3)
    assert sum(case.compiles for case, _, _ in cells) == 2 * 2 * 4 * 3
    assert sum(bool(case.top_k) for case, _, _ in cells) == 8
    quick, whole = ({c.name for c, _, _ in gpu_grid.select(quick=q)} for q in (True, False))
    assert quick <= whole
    assert len(gpu_grid.select(quick=True)) < 40
    assert {c.name for c, _, _ in gpu_grid.select(only="T16 D768 H768 E6 ")} == {
        "T16 D768 H768 E6 R64"
    }


def test_a_run_that_ends_early_has_seen_every_pair_of_sizes():
    first, *rest = gpu_grid.FULL.rounds()
    for one, other in itertools.combinations(
        (lambda case: case.T, lambda case: (case.D, case.H), lambda case: case.E), 2
    ):
        everything = {(one(case), other(case)) for r in rest for case in r}
        assert {(one(case), other(case)) for case in first} == everything
    cells = gpu_grid.FULL.cells()
    start = next(i for i, (case, _, _) in enumerate(cells) if case.compiles)
    assert [mode for case, _, mode in cells if case.compiles] == [
        mode for mode in cases.MODES for _ in range(16)
    ]
    assert start < len(first) * len(cases.MODES)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_inputs_are_drawn_with_the_gate_that_is_asked_for(top_k):
    group = f"{gpu_grid.SPARSE}{top_k}" if top_k else grid.GROUP
    case = gpu_grid.device_case(32, 24, 16, 6, 8, group)
    inputs = case.inputs(torch.bfloat16, "cpu", seed=3)
    usual = cases.Case.inputs(case, torch.bfloat16, "cpu")
    for name, tensor in usual.tensors().items():
        assert getattr(inputs, name).shape == tensor.shape
        assert getattr(inputs, name).dtype == tensor.dtype
    assert set(inputs.gate.count_nonzero(-1).flatten().tolist()) == {top_k or 6}
    assert torch.equal(inputs.gate, case.inputs(torch.bfloat16, "cpu", seed=3).gate)
    assert case.flop("fwd") == 2 * 32 * (top_k or 6) * 8 * (24 + 16)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_grouped_matmuls_agree_with_the_oracle(top_k, dtype):
    if reason := providers.grouped_mm_missing(torch.device("cpu")):
        pytest.skip(reason)
    case = gpu_grid.device_case(100, 32, 16, 4, 8, f"{gpu_grid.SPARSE}{top_k}")
    oracle = checking.Oracle(case, dtype, "cpu", most_tokens=64)
    inputs = oracle.inputs(cases.FORWARD)
    routing = providers.routing_of(inputs.gate, top_k)

    def function(*arguments, **named):
        return providers.grouped(*arguments, top_k=top_k, **named)

    oracle.check(function, cases.FORWARD, slack=checking.BASELINE_SLACK)
    again = inputs.call(providers.grouped, top_k=top_k, routing=routing)
    assert torch.equal(again, inputs.call(function))


def test_the_floor_is_the_larger_of_operations_and_bytes():
    wide, narrow = (gpu_grid.device_case(16384, 768, 768, E, 64) for E in (16, 1))
    compute_us = 4 * 16384 * 768 * 1024 / 790e6
    assert roofline.floor_us(wide, "bf16", "fwd", H200) == pytest.approx(compute_us)
    memory_us = narrow.traffic_bytes("fwd", torch.bfloat16) / 4.3e6
    assert roofline.floor_us(narrow, "bf16", "fwd", H200) == pytest.approx(memory_us)
    assert roofline.floor_us(narrow, "bf16", "fwd", "NVIDIA Z1") is None
    assert roofline.floor_us(narrow, "fp32", "fwd", H200) is None


def test_kernels_are_compiled_ahead_once_per_adapters_mode_and_tokens():
    jobs = compile_ahead.jobs(TINY.cells())
    assert len(jobs) == 2 * 3 + 1
    assert {(case.D, case.H) for job in jobs for case, _, _ in job} == {(16, 16)}
    assert all(len({(case.E, mode) for case, _, mode in job}) == 1 for job in jobs)
    assert compile_ahead.call_each(jobs[0], "ours-torch", "cpu") == len(jobs[0])


# --- timing, with a device that only counts ------------------------------------------------------


class Event:
    """A device's event that knows how much had been queued before it."""

    queued = 0

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.queued

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stopwatch(monkeypatch):
    """A stopwatch whose unit is one call, and whose flushes count nothing."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_measure.Stopwatch.__new__(gpu_measure.Stopwatch)
    found._cache, found.flush_s = torch.empty(1), 1e-3
    return found


def test_each_call_is_timed_between_its_own_events(stopwatch):
    def calls(count):
        def run():
            Event.queued += count

        return run

    clock = stopwatch.clock({"three": calls(3), "five": calls(5)})
    assert clock(["five", "three"]) == {"five": 5, "three": 3}


def test_the_caches_are_flushed_until_the_host_has_queued_the_call(stopwatch):
    def slow():
        time.sleep(0.01)

    assert stopwatch._flushes(lambda: None) == 1
    assert 15 <= stopwatch._flushes(slow) <= 60


# --- a run ---------------------------------------------------------------------------------------


def options(folder, **changes):
    """What the command line gives to `gpu_run.run`, for a run on the CPU."""
    given = dict(
        device="cuda", dry_run=True, quick=False, rounds=2, resume=None, out=folder, only="",
        cells=TINY.cells(), budget_s=None, restarts=0,
    )  # fmt: skip
    return argparse.Namespace(**given | changes)


def rivals(**replaced):
    """The contenders without the compiler; the kernels are those of torch."""
    functions = {"stacked": providers.stacked, gpu_grid.OURS: adapter_mixture} | replaced
    return [providers.Provider(name, lambda f=f: f) for name, f in functions.items()]


def run_grid(given, found=None, console=None):
    console = console or tables.Console(quiet=True)
    return gpu_run.run(given, STAMP, found or rivals(), {"compiled": "no compiler"}, console)


def test_a_run_measures_everything_and_survives_its_files(tmp_path):
    result, path = run_grid(options(tmp_path))
    assert path.name == "cuda-grid-dry-2031-01-02-0123abcd-partial.json"
    assert [row for row in result.rows if row.error] == [] and result.not_measured == []
    assert {row.cell for row in result.rows} == {(c.name, *rest) for c, *rest in TINY.cells()}
    ours = [row for row in result.rows if row.provider == gpu_grid.OURS]
    assert all(row.median_ms > 0 and row.floor_us > 0 and row.speedup["stacked"] for row in ours)
    assert {row.T for row in ours if row.host_us} == {gpu_grid.HOST_TOKENS}
    assert [row.cell for row in ours if "grouped" in row.speedup] == [
        ("T600 D16 H16 E4 R8 top2", "bf16", "fwd")
    ]
    loaded = grid_records.load(path)
    assert loaded.environment == result.environment
    for before, after in zip(
        sorted(result.rows, key=lambda row: (row.cell, row.provider)),
        sorted(loaded.rows, key=lambda row: (row.cell, row.provider)),
        strict=True,
    ):
        assert before.cell == after.cell and before.group == after.group
        assert before.median_ms == pytest.approx(after.median_ms, rel=1e-3)
        assert (before.host_us or 0) == pytest.approx(after.host_us or 0, rel=1e-3)
        assert before.speedup == pytest.approx(after.speedup, rel=1e-3)
    header = path.with_suffix(".csv").read_text().splitlines()[0].split(",")
    assert {"floor µs", f"{gpu_grid.OURS} host µs", "gpu", "driver", "commit"} <= set(header)


def test_a_provider_that_raises_spoils_only_its_row(tmp_path):
    def broken(x, *arguments, **named):
        if x.shape[1] == 16:
            raise RuntimeError("out of memory\nand so on")
        return adapter_mixture(x, *arguments, **named)

    result, path = run_grid(options(tmp_path), rivals(**{gpu_grid.OURS: broken}))
    refused = [row for row in result.rows if row.error]
    assert {(row.T, row.provider, row.error) for row in refused} == {
        (16, gpu_grid.OURS, "RuntimeError: out of memory")
    }
    stacked = [row for row in result.rows if row.provider == "stacked"]
    assert len(stacked) == len(TINY.cells()) and all(row.median_ms > 0 for row in stacked)
    assert "out of memory" in "\n".join(grid_report.section(grid_records.load(path)))


def test_what_the_budget_does_not_reach_is_listed_and_can_be_resumed(tmp_path, monkeypatch):
    left = iter([100.0] * 12 + [0.0])
    with monkeypatch.context() as patched:
        patched.setattr(gpu_run.Budget, "left_s", lambda self: next(left, 0.0))
        result, path = run_grid(options(tmp_path))
    reached = {row.cell for row in result.rows}
    missed = {tuple(note[:3]) for note in result.not_measured}
    assert reached and missed and not reached & missed
    assert reached | missed == {(c.name, *rest) for c, *rest in TINY.cells()}
    assert {note[4] for note in grid_records.load(path).not_measured} == {
        "not reached within the budget"
    }
    assert "not reached within the budget" in gpu_report.unreached(result)
    result, again = run_grid(options(tmp_path, resume=path))
    assert again == path and result.not_measured == []
    assert len(result.cells()) == len(TINY.cells())


def test_without_seconds_for_the_compiler_the_others_are_timed(tmp_path, monkeypatch):
    plan = dataclasses.replace(
        TINY, compiled_tokens=(600,), compiled_widths=((16, 16),), compiled_adapters=(1,)
    )
    monkeypatch.setattr(gpu_cell, "COMPILATION_SHARE", 0.0)
    given = options(tmp_path, cells=[cell for cell in plan.cells() if cell[0].compiles])
    result, path = run_grid(given, rivals(compiled=providers.stacked))
    assert [note[2:4] for note in result.not_measured] == [[m, "compiled"] for m in cases.MODES]
    assert all(row.median_ms > 0 for row in result.rows)
    # Another run takes the compiler up where this one has left it out.
    lacking = gpu_run._take_up(result, options(tmp_path, resume=path))
    assert lacking.rows == [] and lacking.not_measured == []


def test_who_loses_the_device_is_followed_by_another_process(tmp_path, monkeypatch):
    def breaks(x, *arguments, **named):
        if x.shape[1] == 16:
            monkeypatch.setattr(gpu_cell, "is_lost", lambda device: True)
            raise RuntimeError("illegal memory access")
        return adapter_mixture(x, *arguments, **named)

    with pytest.raises(gpu_run.Restart) as caught:
        run_grid(options(tmp_path), rivals(**{gpu_grid.OURS: breaks}))
    monkeypatch.setattr(gpu_cell, "is_lost", lambda device: False)
    restart = caught.value
    kept = grid_records.load(restart.path)
    broken = [row.cell for row in kept.rows if row.error]
    assert len(broken) == 1 and "T16 " in broken[0][0]

    started = []
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda"])
    monkeypatch.setattr(
        bench.subprocess, "run",
        lambda command: started.append(command) or argparse.Namespace(returncode=7),
    )  # fmt: skip
    assert bench.go_on(restart, options(tmp_path)) == 7
    arguments = bench.parser().parse_args(started[0][2:])
    assert arguments.restarts == 1 and arguments.resume == restart.path

    result, _ = run_grid(options(tmp_path, resume=restart.path, restarts=1))
    assert [row.cell for row in result.rows if row.error] == broken
    assert len(result.cells()) == len(TINY.cells())


def test_graphs_are_timed_and_who_cannot_be_captured_is_noted(tmp_path, monkeypatch):
    class Clock:
        def clock(self, runs):
            return lambda order: {name: 1e-3 * (1 + (name == "stacked")) for name in order}

    def captured(run):
        if run.__qualname__.startswith("bare_matmuls"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    monkeypatch.setattr(gpu_cell, "captured", captured)
    found, _ = gpu_cell.contenders(rivals(), "cpu")
    budget = gpu_cell.Budget(100.0)
    measured = gpu_cell.Bench(found, "cpu", H200, budget, rounds=2, cell_s=0.0)
    measured._stopwatch = Clock()
    rows = measured.unit([cell for cell in TINY.cells() if cell[0].T == 1][:1])
    by_name = {row.provider: row for row in rows}
    assert by_name["stacked"].graph_ms == 2.0 and by_name[gpu_grid.OURS].graph_ms == 1.0
    assert by_name[gpu_grid.OURS].speedup["stacked graph"] == 2.0
    assert by_name["matmuls"].graph_ms is None and by_name["matmuls"].median_ms == 1.0
    assert [note[3] for note in measured.notes] == ["matmuls in a graph"]
    assert grid_report.speedup(by_name[gpu_grid.OURS]) == 2.0


# --- report --------------------------------------------------------------------------------------


def full_result(*, factor=4.0, share=0.8):
    """A whole run with ours `factor` times as fast as everyone, at `share` of the floor."""
    rows = []
    for case, dtype, mode in gpu_grid.FULL.cells():
        floor = roofline.floor_us(case, dtype, mode, H200)
        for provider in (*gpu_grid.CONTENDERS, providers.BOUND):
            if gpu_grid.left_out(provider, case):
                continue
            row = records.new_row(case, dtype, mode, provider)
            is_ours = provider == gpu_grid.OURS
            row.rounds, row.floor_us = 9, floor
            row.median_ms = floor / 1e3 / share * (1 if is_ours else factor)
            row.p20_ms, row.p80_ms, row.first_call_s = 0.9 * row.median_ms, 1.1 * row.median_ms, 1.5
            row.graph_ms = row.median_ms if case.T <= gpu_grid.GRAPH_TOKENS else None
            row.host_us = 20.0 if case.T == gpu_grid.HOST_TOKENS else None
            row.peak_memory_mib = 8.0 if case.T == gpu_grid.MEMORY_TOKENS else None
            if is_ours:
                known = [b for b in ("loop", "stacked", "compiled", "grouped")]
                known = [b for b in known if not gpu_grid.left_out(b, case)]
                known += ["stacked graph"] if row.graph_ms else []
                row.speedup, row.share_of_matmuls = dict.fromkeys(known, factor), 1.5
            rows.append(row)
    stamp = STAMP | {"cell_s": 0.08, "rounds": None, "measured": {"copy_tb_s": 4.2}}
    missed = [["T1 D1", "bf16", "fwd", "", "not reached within the budget"]]
    return records.Result(
        "cuda", stamp, False, gpu_grid.OURS, {}, rows, suite=grid.SUITE, not_measured=missed
    )


def verdicts(result):
    return [line[-1] for line in grid_report.target_cells(result)]


def test_targets_are_reached_or_not():
    assert set(verdicts(full_result())) == {"yes"}
    assert set(verdicts(full_result(factor=0.9, share=0.5))) == {"**no**"}
    slow = full_result()
    lost = next(r for r in slow.rows if r.provider == gpu_grid.OURS and r.T == 1 and r.N == 512)
    lost.speedup["stacked graph"] = 0.98
    assert verdicts(slow).count("**no**") == 1
    assert gpu_targets.share_of_floor(lost) == pytest.approx(0.8)


def test_the_report_shows_the_newest_run_of_the_gpu(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    path = grid_records.save(full_result(factor=0.9), tmp_path)
    # What .pre-commit-config.yaml allows.
    assert all(file.stat().st_size < 500_000 for file in (path, path.with_suffix(".csv")))
    written = report.write({}, tmp_path, readme)
    assert {p.name for p in written} == {"README.md", "cuda-grid.md", "cuda-grid-heatmap.png"}
    assert report.stale({}, tmp_path, readme) == []
    text = (tmp_path / "README.md").read_text()
    for part in ("driver 580.1", "× stacked in graphs", "Host and memory", "Few adapters",
                 "cells 1: not reached within the budget", "4.2 TB/s of a copy"):  # fmt: skip
        assert part in text
    page = (tmp_path / "cuda-grid.md").read_text()
    dense = 6 * 6 * (1 + 2 * 2 + 4 * 3)
    assert page.count(f"0.90 {tables.LOST} · 80 %") == dense


def test_the_dry_run_runs_end_to_end(tmp_path):
    script = FOLDER / "bench_adapter_mixture.py"
    arguments = ["--suite", "grid", "--device", "cuda", "--dry-run", "--only", "D32 H32 E1"]
    arguments += ["--rounds", "2", "--threads", "1", "--commit", "89abcdef", "--out", str(tmp_path)]
    # Without compilers and Triton's interpreter, which leaves out slow providers, and without git.
    left_out = ("CXX", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment["PATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("cuda-grid-dry-*-89abcdef-partial.json")
    result = grid_records.load(path)
    assert len(result.cells()) == 1 + 2 + 3 + 3
    assert all(row.error is None and row.median_ms > 0 for row in result.rows)
    assert grid_records.newest_grid(tmp_path) == {}
