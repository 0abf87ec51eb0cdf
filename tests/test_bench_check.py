"""`benchmarks/bench_check.py`: what passes the gate, what does not, and what it keeps."""

import json
import sys
from types import SimpleNamespace

import pytest
from cuda_sources import ROOT

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import bench_check  # noqa: E402

sys.path.remove(str(FOLDER))

CELL = bench_check.cells()[0]
OURS = bench_check.preferred("cpu")


@pytest.fixture
def measured(monkeypatch):
    """Ratios that the next measurements find, in order; the last one from then on."""
    found: list[float | str] = []

    def measure_cell(oracle, mode, providers, *, rounds, cell_s):
        assert {provider.name for provider in providers} == {OURS, "stacked"}
        value = found.pop(0) if len(found) > 1 else found[0]
        error = value if isinstance(value, str) else None
        return [
            SimpleNamespace(provider=OURS, error=error, speedup={"stacked": value}),
            SimpleNamespace(provider="stacked", error=None, speedup={"stacked": 1.0}),
        ]

    monkeypatch.setattr(bench_check, "measure_cell", measure_cell)
    monkeypatch.setattr(bench_check, "Oracle", lambda *cell: None)
    return found


@pytest.mark.parametrize(
    ("ratios", "kept", "best", "passes"),
    [
        ([1.5], 1.5, 1.5, True),
        ([1.21], 1.5, 1.21, True),
        ([1.19], 1.5, 1.19, False),
        ([1.0, 1.1, 1.3], 1.5, 1.3, True),
        ([1.0, 1.1, 0.9, 9.0], 1.5, 1.1, False),  # a fourth try is not made
        ([0.81], None, 0.81, True),
        ([0.79], None, 0.79, False),
    ],
)
def test_a_cell_passes_if_its_best_ratio_has_not_fallen(measured, ratios, kept, best, passes):
    measured += ratios
    verdict = bench_check.judge(CELL, kept, None)
    assert (verdict.ratio, verdict.passed) == (best, passes)
    assert ("slower" in bench_check.table([verdict])) == (not passes)


def test_what_is_kept_is_the_median_of_three(measured):
    measured += [9.0, 1.2, 1.4, 5.0]
    assert bench_check.judge(CELL, None, None, update=True).ratio == 1.4


def test_a_wrong_kernel_does_not_pass(measured):
    measured.append("out is off by 3")
    verdict = bench_check.judge(CELL, 0.1, None)
    assert not verdict.passed
    assert "out is off by 3" in bench_check.table([verdict])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_check.py", *arguments])
    monkeypatch.setattr(bench_check, "pin_threads", lambda threads: 3)
    return bench_check.main()


def test_ratios_are_kept_by_machine_and_compared(measured, monkeypatch, tmp_path, capsys):
    kept = tmp_path / "check" / "ratios.json"
    monkeypatch.setattr(bench_check, "KEPT", kept)
    measured.append(2.0)
    assert run(monkeypatch) == 0
    assert "no ratios are kept for" in capsys.readouterr().out
    assert not kept.exists()
    assert run(monkeypatch, "--update", "--only", "t5-base") == 0
    (entry,) = json.loads(kept.read_text()).values()
    assert set(entry["ratios"].values()) == {2.0}
    assert all(name.startswith("t5-base") for name in entry["ratios"])
    assert run(monkeypatch, "--update") == 0
    (entry,) = json.loads(kept.read_text()).values()
    assert len(entry["ratios"]) == len(bench_check.cells())
    measured[:] = [1.5]
    assert run(monkeypatch) == 1
    assert "slower" in capsys.readouterr().out
    measured[:] = [1.7]
    assert run(monkeypatch) == 0


def test_what_cannot_be_asked_for(monkeypatch):
    for arguments in (("--device", "cuda"), ("--only", "nothing"), ("--rounds", "0")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)


def test_committed_ratios_are_of_these_cells():
    names = {f"{case.name}, {dtype}, {mode}" for case, dtype, mode in bench_check.cells()}
    kept = bench_check.read_kept(bench_check.KEPT)
    assert kept
    for entry in kept.values():
        assert set(entry["ratios"]) == names
        assert all(ratio > 0.5 for ratio in entry["ratios"].values())
