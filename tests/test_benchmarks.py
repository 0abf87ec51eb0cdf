"""The benchmark harness: right providers are timed, wrong ones refused, reports follow the data."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
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
