"""The benchmark harness: right providers are timed, wrong ones refused, reports follow the data."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pemt_fast import adapter_mixture
from pemt_fast.testing import GATE_FORMS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"

# The modules of benchmarks/ import one another by name, as scripts beside each other do.
sys.path.insert(0, str(FOLDER))
import bench_adapter_mixture as bench  # noqa: E402
import cases  # noqa: E402
import checking  # noqa: E402
import grid  # noqa: E402
import grid_records  # noqa: E402
import grid_report  # noqa: E402
import grid_run  # noqa: E402
import grid_targets  # noqa: E402
import measure  # noqa: E402
import plots  # noqa: E402, F401  (report imports it when it draws)
import providers  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402

sys.path.remove(str(FOLDER))

TINY = cases.Case(
    "tiny", "grid", 2, 5, 3, 4, 12, 10, "[B, E]", "relu", True, tuple(cases.MODES), quick=True
)
CPU = torch.device("cpu")
EAGER = [p for p in providers.PROVIDERS if p.name != "compiled" and p.missing(CPU) is None]


# --- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATE_FORMS[1:])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("provider", EAGER, ids=lambda p: p.name)
def test_a_provider_agrees_with_the_oracle_in_every_mode(provider, dtype, activation, gate):
    bias = activation != "identity"
    case = dataclasses.replace(TINY, activation=activation, gate=gate, bias=bias, base=bias)
    oracle = checking.Oracle(case, dtype, "cpu")
    for mode in cases.MODES:
        oracle.check(provider.build(), mode, exempt=provider.exempt)


@pytest.mark.slow
def test_the_compiled_provider_agrees_with_the_oracle():
    provider = next(p for p in providers.PROVIDERS if p.name == "compiled")
    if reason := provider.missing(CPU):
        pytest.skip(reason)
    checking.Oracle(TINY, "fp32", "cpu").check(provider.build(), cases.FROZEN)


def slightly_wrong(*arguments, **options):
    return 1.001 * adapter_mixture(*arguments, **options)


def wrong_gate_gradient(x, gate, *arguments, **options):
    half = gate / 2
    return adapter_mixture(x, half + half.detach(), *arguments, **options)


@pytest.mark.parametrize("exempt", [False, True], ids=["budget", "exempt"])
@pytest.mark.parametrize("wrong", [slightly_wrong, wrong_gate_gradient], ids=lambda f: f.__name__)
def test_a_wrong_provider_is_refused_and_the_others_are_timed(wrong, exempt):
    oracle = checking.Oracle(TINY, "fp32", "cpu")
    contenders = [providers.Provider("ours-wrong", lambda: wrong, exempt=exempt), *EAGER]
    rows = bench.measure_cell(oracle, cases.FROZEN, contenders, rounds=2)
    refused, *timed = rows
    expected = "out" if wrong is slightly_wrong else "d_gate"
    assert refused.error.startswith(f"AssertionError: {expected}")
    assert refused.median_ms is None and refused.speedup == {}
    assert [row.error for row in timed] == [None] * len(timed)
    assert all(row.median_ms > 0 for row in timed)
    assert tables.row_cells(refused)[1].startswith("refused")


def test_a_provider_that_raises_is_refused():
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    oracle = checking.Oracle(TINY, "fp32", "cpu")
    contenders = [providers.Provider("ours-broken", lambda: broken)]
    row, bound = bench.measure_cell(oracle, cases.FORWARD, contenders, rounds=2)
    assert row.error == "RuntimeError: no such kernel"
    assert bound.median_ms > 0


def test_baselines_have_one_order_everywhere():
    assert tuple(p.name for p in providers.BASELINES) == records.BASELINES


# --- cases and measures --------------------------------------------------------------------------


def test_cases_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases.CASES if device in case.devices]
        assert len(names) == len(set(names))


def test_quick_is_a_part_and_only_selects_by_name():
    everything, quick = cases.select("cpu"), cases.select("cpu", quick=True)
    assert 0 < len(quick) < len(everything) / 3
    assert set(quick) <= set(everything)
    assert {case.name for case, _, _ in cases.select("cpu", only="decoder")} == {"t5-base decoder"}


@pytest.mark.parametrize("mode", cases.MODES)
def test_flop_is_what_the_bare_matmuls_do(mode):
    run = providers.bare_matmuls(TINY.inputs(torch.float32, "cpu"), mode)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == TINY.flop(mode)


def test_peak_memory_sees_what_is_freed_within_the_call():
    def run():
        return torch.ones(8 * 2**20).sum()  # 32 MiB

    peak = measure.peak_memory_mib(run, "cpu")
    if peak is None:
        pytest.skip("the system does not report the high-water mark of the resident set")
    assert 31 < peak < 48


# --- results and report --------------------------------------------------------------------------


def synthetic(*, date="2031-01-02T03:04:05+00:00", partial=False, factor=2.0):
    """A result as a run leaves it, with `ours-torch` `factor` times as fast as every baseline."""
    stamp = records.environment(2) | {"date": date, "commit": "0123abcd", "dirty": False}
    rows = []
    names = (*records.BASELINES, "ours-torch", "matmuls")
    for case, dtype, mode in cases.select("cpu", only="T"):
        for provider in names:
            row = bench.new_row(case, dtype, mode, provider)
            row.set_times([0.1, 0.2, 0.3] if provider == "ours-torch" else [0.4])
            row.speedup = dict.fromkeys(records.BASELINES, factor)
            rows.append(row)
    for dtype, provider in itertools.product(cases.DTYPES, names):
        for case in (cases.PEMT[0], cases.HOST[0]):
            row = bench.new_row(case, dtype, cases.FORWARD, provider)
            row.set_times([0.002])
            row.speedup = dict.fromkeys(records.BASELINES, 8.0 * factor)
            rows.append(row)
    return records.Result("cpu", stamp, partial, "ours-torch", {"ours-cuda": "no GPU"}, rows)


def test_a_result_survives_the_file(tmp_path):
    result = synthetic()
    path = result.save(tmp_path)
    assert path.name == "cpu-2031-01-02-0123abcd.json"
    assert records.load(path) == result
    assert len(path.with_suffix(".csv").read_text().splitlines()) == len(result.rows) + 1


def test_the_newest_complete_result_counts(tmp_path):
    synthetic(date="2031-01-02T00:00:00+00:00").save(tmp_path)
    synthetic(date="2031-02-02T00:00:00+00:00", factor=3.0).save(tmp_path)
    synthetic(date="2031-03-02T00:00:00+00:00", partial=True).save(tmp_path)
    found = records.newest(tmp_path)
    assert [str(r.environment["date"])[:7] for r in found.values()] == ["2031-02"]


def test_geometric_means_keep_what_is_lost_and_leave_out_the_host_overhead():
    result = synthetic(factor=0.5)
    fwd = [s for s in records.summaries(result) if (s.dtype, s.mode) == ("bf16", cases.FORWARD)]
    ours = {s.baseline: s for s in fwd}
    assert set(ours) == set(records.BASELINES)
    cells = ours["stacked"].cells
    assert ours["stacked"].lost == cells - 1  # all but the PEMT row, which is 8 times as fast
    assert ours["stacked"].mean == pytest.approx(0.5 * 8 ** (1 / cells))
    assert (ours["stacked"].worst, ours["stacked"].best) == (0.5, 4.0)


def test_median_and_spread_in_milliseconds():
    row = bench.new_row(TINY, "fp32", cases.FORWARD, "loop")
    row.set_times([0.005, 0.001, 0.002, 0.004, 0.003, 0.006])
    assert (row.median_ms, row.p20_ms, row.p80_ms) == pytest.approx((3.5, 2.0, 5.0))
    assert row.min_ms == pytest.approx(1.0)


def test_the_report_follows_the_results(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.OPEN}\nold\n{report.CLOSE}\nafter\n")
    folder = tmp_path / "results"
    synthetic().save(folder)
    results = records.newest(folder)
    assert len(report.stale(results, folder, readme)) == 2
    report.write(results, folder, readme)
    assert report.stale(results, folder, readme) == []
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == set(report.plot_names(results["cpu"]))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "commit 0123abcd; 2031-01-02" in text
    synthetic(factor=0.5).save(folder)
    assert len(report.stale(records.newest(folder), folder, readme)) == 2
    assert tables.LOST in report.block(records.newest(folder)).split("Geometric mean")[0]


def test_a_readme_without_markers_is_left_alone():
    assert report.with_block("no markers", "new") is None
    assert report.with_block(f"only {report.OPEN}", "new") is None


def test_the_readme_of_this_repository_is_fresh():
    results = records.newest(report.RESULTS)
    if not results:
        pytest.skip("no complete result is committed in benchmarks/results")
    if report.with_block(report.README.read_text(), "") is None:
        pytest.skip("README.md has no benchmark markers")
    assert report.stale(results, report.RESULTS, report.README) == []


def test_the_script_runs_end_to_end(tmp_path):
    script = FOLDER / "bench_adapter_mixture.py"
    arguments = ["--quick", "--only", "host", "--rounds", "2", "--threads", "1"]
    # Without compilers on the path, which leaves out the slow provider.
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--out", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "skipped compiled: no C++ compiler" in done.stdout
    assert "Host time of a call" in done.stdout
    (path,) = tmp_path.glob("cpu-*-partial.json")
    result = records.load(path)
    assert {row.provider for row in result.rows} == {*(p.name for p in EAGER), providers.BOUND}
    assert all(row.error is None and row.median_ms > 0 for row in result.rows)
    assert json.loads(path.read_text())["environment"]["threads"] == 1


# --- checks and rounds of the grid ---------------------------------------------------------------

LONG = dataclasses.replace(TINY, B=3, S=17, bias=False, activation="identity")
PER_TOKEN = dataclasses.replace(TINY, B=1, S=50, gate="[B, S, E]")
SAMPLED = pytest.mark.parametrize("case", [LONG, PER_TOKEN], ids=["[B, E]", "[B, S, E]"])
FEW = 10  # tokens that are compared


@SAMPLED
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_some_tokens_are_compared_as_a_problem_of_their_own(case, dtype):
    oracle = checking.Oracle(case, dtype, "cpu", most_tokens=FEW)
    for mode in cases.MODES:
        oracle.check(adapter_mixture, mode)
        oracle.check(providers.stacked, mode, exempt=True)


@SAMPLED
def test_inputs_that_are_timed_are_whole(case):
    inputs = checking.Oracle(case, "fp32", "cpu", most_tokens=FEW).inputs(cases.FROZEN)
    assert inputs.x.shape == (case.B, case.S, case.D)
    assert bool(inputs.grad_out.ne(0).any(-1).all())


def not_finite_between(x, *arguments, **options):
    out = adapter_mixture(x, *arguments, **options)
    out[:, 1] = float("nan")  # the first and the last position are compared, the second is not
    return out


def neighbour_gets_the_gradient(x, *arguments, **options):
    return adapter_mixture(
        x - 0.5 * x.roll(1, 1) + 0.5 * x.roll(1, 1).detach(), *arguments, **options
    )


@SAMPLED
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (slightly_wrong, "out: error"),
        (wrong_gate_gradient, "d_gate: error"),
        (not_finite_between, "out is not finite"),
        (neighbour_gets_the_gradient, "d_x is not zero"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_shows_in_some_of_the_tokens(case, wrong, message):
    oracle = checking.Oracle(case, "fp32", "cpu", most_tokens=FEW)
    with pytest.raises(AssertionError, match=message):
        oracle.check(wrong, cases.FROZEN)


def test_a_baseline_may_round_worse_and_may_not_be_wrong():
    def rounds_worse(*arguments, **options):
        return (1 + 3e-6) * adapter_mixture(*arguments, **options)

    oracle = checking.Oracle(TINY, "fp32", "cpu")
    with pytest.raises(AssertionError, match="exceeds the budget"):
        oracle.check(rounds_worse, cases.FORWARD)
    oracle.check(rounds_worse, cases.FORWARD, slack=checking.BASELINE_SLACK)
    with pytest.raises(AssertionError, match="times"):
        oracle.check(slightly_wrong, cases.FORWARD, slack=checking.BASELINE_SLACK)


def test_every_round_runs_everyone_once_in_an_order_of_its_own():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "abc"}
    seconds = measure.time_briefly(runs, rounds=8, cell_s=0.0)
    assert {name: len(all_rounds) for name, all_rounds in seconds.items()} == dict(a=8, b=8, c=8)
    rounds = list(zip(*[iter(calls)] * 3, strict=True))
    assert all(set(one) == set("abc") for one in rounds)
    assert len(set(rounds)) > 1


def test_the_fewest_rounds_remain_however_long_they_take():
    runs = {"slow": functools.partial(time.sleep, 0.002)}
    fewest = measure.time_briefly(runs, rounds=None, cell_s=0.003)
    assert len(fewest["slow"]) == measure.FEWEST_GRID_ROUNDS
    more = measure.time_briefly(runs, rounds=None, cell_s=0.05)
    assert len(more["slow"]) > measure.FEWEST_GRID_ROUNDS


# --- the grid ------------------------------------------------------------------------------------


def test_the_grid_has_names_of_its_own_and_the_modes_of_its_tokens():
    names = [case.name for case in grid.GRID]
    assert len(names) == len(set(names)) == 7 * 5 * 5 * 2
    assert len(grid.CELLS) == 1700
    assert {case.modes for case in grid.GRID if case.T == 1} == {(cases.FORWARD,)}
    assert {case.modes for case in grid.GRID if case.T == 32} == {(cases.FORWARD, cases.FROZEN)}
    assert {case.modes for case in grid.GRID if case.T == 128} == {tuple(cases.MODES)}
    assert {case.S for case in grid.GRID if case.T > 128 and case.gate == "[B, E]"} == {128}


def test_a_family_is_one_shape_and_begins_with_the_most_tokens():
    families = grid.families(grid.CELLS)
    assert sorted(map(len, families)) == [17] * 100
    for family in families:
        assert len({(c.D, c.H, c.E, c.R, c.activation, dtype) for c, dtype, _ in family}) == 1
    modes = {mode: [c.T for c, _, m in families[0] if m == mode] for mode in cases.MODES}
    assert modes[cases.FORWARD] == sorted(grid.TOKENS, reverse=True)
    assert list(modes) == [mode for mode, _ in itertools.groupby(m for _, _, m in families[0])]


def test_the_whole_grid_is_estimated_at_forty_minutes():
    estimate = grid.estimated_s(
        grid.CELLS, cell_s=measure.GRID_CELL_S, fewest_rounds=measure.FEWEST_GRID_ROUNDS
    )
    assert 20 * 60 < estimate < 40 * 60


def small_cells(activations=grid.ACTIVATIONS, tokens=(1, 8), dtypes=("bf16",)):
    """A grid of its own, of two families if nothing else is asked for."""
    among = [grid.grid_case(T, 12, 10, 3, 4, name) for name in activations for T in tokens]
    return [cell for cell in cases.select("cpu", among=tuple(among)) if cell[1] in dtypes]


def rivals(names=grid.CONTENDERS):
    """The contenders without the compiler, and without kernels of their own."""
    kernels = functools.partial(adapter_mixture, impl="torch")
    known = {p.name: p for p in providers.BASELINES if p.name != "compiled"}
    known[grid.OURS] = providers.Provider(grid.OURS, lambda: kernels)
    return [known[name] for name in names if name in known]


def test_a_family_has_our_ratios_to_every_rival():
    cells = small_cells(("identity",), tokens=(8, 256))
    rows = grid_run.measure_family(cells, rivals(), rounds=2, cell_s=0.0)
    assert {row.cell for row in rows} == {(case.name, *kind) for case, *kind in cells}
    assert all(row.error is None and row.median_ms > 0 for row in rows)
    ours = [row for row in rows if row.provider == grid.OURS]
    assert [set(row.speedup) for row in ours] == [{"loop", "stacked"}] * len(cells)
    assert all(row.share_of_matmuls > 0 for row in ours)
    assert not any(row.speedup for row in rows if row.provider != grid.OURS)


def test_a_wrong_kernel_is_refused_and_its_rivals_are_timed():
    wrong = providers.Provider(grid.OURS, lambda: slightly_wrong)
    contenders = [*rivals(("loop", "stacked")), wrong]
    cells = small_cells(("relu",), tokens=(1,), dtypes=("fp32",))
    rows = grid_run.measure_family(cells, contenders, rounds=2, cell_s=0.0)
    assert {row.provider: row.error is None for row in rows} == {
        "loop": True, "stacked": True, grid.OURS: False, providers.BOUND: True,
    }  # fmt: skip


def test_contenders_are_left_out_where_it_is_said():
    one, many = (small_cells(("relu",), tokens=(T,))[0] for T in (1, 4096))
    assert [name for name in grid.CONTENDERS if grid.left_out(name, one[0])] == ["compiled"]
    assert [name for name in grid.CONTENDERS if grid.left_out(name, many[0])] == ["loop"]
    rows = grid_run.measure_family([many], rivals(), rounds=2, cell_s=0.0)
    assert [row.provider for row in rows] == ["stacked", grid.OURS, providers.BOUND]


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "compilations"), [("relu", 1), ("identity", 2)])
def test_a_family_compiles_once_per_mode_and_kind_of_batch(activation, compilations):
    compiled = next(p for p in providers.PROVIDERS if p.name == "compiled")
    if reason := compiled.missing(CPU):
        pytest.skip(reason)
    # With a gate per sequence, 256 tokens and more are several sequences.
    cells = small_cells((activation,), tokens=(8, 32, 256, 512))
    cells = [cell for cell in cells if cell[2] == cases.FORWARD]
    counters = torch._dynamo.utils.counters
    counters.clear()
    rows = grid_run.measure_family(cells, grid_run.contenders([compiled]), rounds=2, cell_s=0.0)
    assert [row.error for row in rows] == [None] * len(rows)
    assert counters["stats"]["unique_graphs"] == compilations


# --- results of the grid -------------------------------------------------------------------------

STAMP = records.environment(2) | {
    "commit": "0123abcd",
    "dirty": False,
    "cell_s": 0.2,
    "rounds": None,
}


def grid_result(cells=grid.CELLS, *, factor=2.0, partial=False, date="2031-01-02T03:04:05+00:00"):
    """A run of the grid with `ours-cpu` `factor` times as fast as everyone, the bound included."""
    rows = []
    for case, dtype, mode in cells:
        for provider in (*grid.CONTENDERS, providers.BOUND):
            if grid.left_out(provider, case):
                continue
            row = records.new_row(case, dtype, mode, provider)
            row.rounds, row.p20_ms, row.median_ms, row.p80_ms = 5, 1.001, 1.234, 1.5
            if provider == grid.OURS:
                rivals = [b for b in ("loop", "stacked", "compiled") if not grid.left_out(b, case)]
                row.speedup, row.share_of_matmuls = dict.fromkeys(rivals, factor), factor
            rows.append(row)
    stamp = STAMP | {"date": date}
    return records.Result("cpu", stamp, partial, grid.OURS, {}, rows, suite=grid.SUITE)


def test_a_run_of_the_grid_survives_its_files(tmp_path):
    result = grid_result()
    result.rows[2] = dataclasses.replace(
        records.new_row(*grid.CELLS[0], grid.OURS), error="AssertionError: d_x"
    )
    path = grid_records.save(result, tmp_path)
    assert path.name == "cpu-grid-2031-01-02-0123abcd.json"
    assert grid_records.load(path) == result
    assert len(path.with_suffix(".csv").read_text().splitlines()) == len(grid.CELLS) + 1
    # What .pre-commit-config.yaml allows.
    assert all(file.stat().st_size < 500_000 for file in tmp_path.iterdir())


def test_the_suites_do_not_see_each_other(tmp_path):
    grid_records.save(grid_result(small_cells()), tmp_path)
    grid_records.save(grid_result(small_cells(), partial=True, date="2031-05-02"), tmp_path)
    assert records.newest(tmp_path) == {}
    synthetic().save(tmp_path)
    assert [r.suite for r in records.newest(tmp_path).values()] == [records.OPERATOR]
    (found,) = grid_records.newest_grid(tmp_path).values()
    assert found.suite == grid.SUITE and str(found.environment["date"]) < "2031-05"


def options(folder, cells, **changes):
    """What the command line gives to `grid_run.run`."""
    given = dict(device="cpu", quick=False, rounds=None, resume=None, out=folder, cells=cells)
    return argparse.Namespace(**given | changes)


@pytest.fixture
def small_grid(monkeypatch):
    """The whole grid has two families, and a cell takes no longer than its rounds."""
    cells = small_cells()
    monkeypatch.setattr(grid_records, "CELLS", tuple(cells))
    monkeypatch.setattr(grid_run, "GRID_CELL_S", 0.0)
    return cells


def run_grid(given, stamp=STAMP):
    stamp = stamp | {"date": "2031-01-02T03:04:05+00:00"}
    console = tables.Console(quiet=True)
    return grid_run.run(given, stamp, rivals(), {"compiled": "no compiler"}, console)


def test_an_interrupted_run_keeps_what_it_has_and_is_completed(tmp_path, monkeypatch, small_grid):
    measured = []

    def interrupted_at_the_second(family, *arguments, **named):
        measured.append(family)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure_family(family, *arguments, **named)

    measure_family = grid_run.measure_family
    monkeypatch.setattr(grid_run, "measure_family", interrupted_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_grid(options(tmp_path, small_grid))
    partial = tmp_path / "cpu-grid-2031-01-02-0123abcd-partial.json"
    kept = grid_records.load(partial)
    assert grid_records.cells_of(kept) == {(c.name, *kind) for c, *kind in measured[0]}

    with pytest.raises(grid_run.CannotResume, match="exists: go on with --resume"):
        run_grid(options(tmp_path, small_grid))
    result, path = run_grid(options(tmp_path, small_grid, resume=partial))
    assert measured[2:] == measured[1:2]
    assert path.name == "cpu-grid-2031-01-02-0123abcd.json" and not result.partial
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.stem}.csv"}
    assert grid_records.load(path).rows[: len(kept.rows)] == kept.rows
    assert run_grid(options(tmp_path, small_grid, resume=path))[1].is_file()


def test_parts_are_merged_and_refused_cells_measured_again(tmp_path, small_grid):
    _, partial = run_grid(options(tmp_path, small_grid[:1]))
    part = grid_records.load(partial)
    part.rows[0].error = "AssertionError: out"
    grid_records.save(part, tmp_path)
    result, _ = run_grid(options(tmp_path, small_grid[:2], resume=partial))
    assert result.partial
    assert [row.error for row in result.rows] == [None] * len(result.rows)
    assert len(grid_records.cells_of(result)) == len(result.cells()) == 2


@pytest.mark.parametrize("changed", [{"commit": "other"}, {"threads": 1}, {"cell_s": 0.1}], ids=str)
def test_what_was_measured_otherwise_is_not_resumed(tmp_path, small_grid, changed):
    _, partial = run_grid(options(tmp_path, small_grid[:1]))
    values = json.loads(partial.read_text())
    values["environment"] |= changed
    partial.write_text(json.dumps(values))
    with pytest.raises(grid_run.CannotResume, match=next(iter(changed))):
        run_grid(options(tmp_path, small_grid, resume=partial))


def test_a_shortened_run_is_none_of_the_real_ones(tmp_path, small_grid):
    for given in (dict(rounds=2), dict(quick=True)):
        result, path = run_grid(options(tmp_path, small_grid, **given))
        assert result.partial and path.name.startswith("cpu-grid-quick-")
    assert grid_records.newest_grid(tmp_path) == {}


# --- targets and report of the grid --------------------------------------------------------------


def verdicts(result):
    return [line[-1] for line in grid_report.target_cells(result)]


def test_targets_are_reached_or_not():
    assert set(verdicts(grid_result(factor=2.0))) == {"yes"}
    assert set(verdicts(grid_result(factor=0.5))) == {"**no**"}
    assert set(verdicts(grid_result(cells=[]))) == {"not measured"}


def test_a_mean_does_not_hide_a_lost_cell():
    result = grid_result()
    lost = next(
        row for row in result.rows
        if row.provider == grid.OURS and (row.T, row.dtype, row.mode) == (512, "fp32", "fwd")
    )  # fmt: skip
    lost.speedup |= {"compiled": 0.98}
    found = {tuple(line[:2]): line for line in grid_report.target_cells(result)}
    assert found["fp32 fwd, T ≥ 128", "× faster, mean"][-1] == "yes"
    every = found["fp32, all modes and tokens", "× faster, every cell"]
    assert every[-1] == "**no**" and every[-2] == f"0.98 {lost.case}, fwd"
    assert f"{lost.case} (0.98)" in "\n".join(grid_report.section(result))
    assert f"0.98 {tables.LOST}" in grid_report.page(result)


def test_a_refused_cell_misses_its_targets():
    result = grid_result()
    row = next(r for r in result.rows if r.provider == grid.OURS and r.T == 1 and r.dtype == "bf16")
    row.error, row.speedup, row.median_ms = "AssertionError: out", {}, None
    missed = [line[0] for line in grid_report.target_cells(result) if line[-1] != "yes"]
    assert missed == ["bf16 fwd, T ≤ 32"]
    assert "AssertionError: out" in "\n".join(grid_report.section(result))


def test_the_faster_baseline_is_the_smaller_ratio():
    row = records.new_row(*grid.CELLS[0], grid.OURS)
    assert grid_targets.speedup(row) is None
    row.speedup = {"loop": 0.5, "stacked": 1.2, "compiled": 1.1}
    assert grid_targets.speedup(row) == 1.1 and not grid_targets.loses(row)


def test_the_report_shows_the_grid(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    folder = tmp_path / "results"
    synthetic().save(folder)
    grid_records.save(grid_result(factor=0.9), folder)
    results = records.newest(folder)
    assert len(report.stale(results, folder, readme)) == 2
    report.write(results, folder, readme)
    assert report.stale(results, folder, readme) == []
    assert (folder / "cpu-grid-heatmap.png").is_file()
    assert "the grid of the kernels' targets" in (folder / "README.md").read_text()
    page = (folder / "cpu-grid.md").read_text()
    assert page.count(f"0.90 {tables.LOST}") == len(grid.CELLS)


def test_without_kernels_the_report_says_why(tmp_path):
    result = grid_result(small_cells())
    result.rows = [row for row in result.rows if row.provider != grid.OURS]
    result.skipped = {grid.OURS: "no kernels here"}
    grid_records.save(result, tmp_path)
    written = report.write({}, tmp_path, tmp_path / "README-elsewhere.md")
    assert [path.name for path in written] == ["README.md"]
    assert "`ours-cpu` was not measured: no kernels here." in written[0].read_text()


def test_the_grid_runs_end_to_end(tmp_path):
    script = FOLDER / "bench_adapter_mixture.py"
    arguments = ["--suite", "grid", "--only", "T1 D512 H512 E1 ", "--rounds", "2", "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--out", str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("cpu-grid-quick-*-partial.json")
    result = grid_records.load(path)
    refused = [row for row in result.rows if row.error]
    assert done.returncode == (1 if refused else 0), done.stderr
    assert {row.provider for row in refused} <= {grid.OURS}
    assert len(result.cells()) == 4
    assert {"loop", "stacked", providers.BOUND} <= {row.provider for row in result.rows}
    assert "4 cells in 4 families" in done.stdout
