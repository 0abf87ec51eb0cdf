"""`benchmarks/bench_fuse_adapterhub.py`: both forms are compared before they are timed."""

import argparse
import dataclasses
import sys

import pytest
from cuda_sources import ROOT

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import bench_fuse_adapterhub as bench  # noqa: E402
import fuse_measure  # noqa: E402
from t5_cases import Shape  # noqa: E402

sys.path.remove(str(FOLDER))

OPTIONS = argparse.Namespace(device="cpu", layers=1, rounds=2)
STAMP = {"gpu": None, "cpu": "C", "threads": 1, "torch": "", "commit": "abc", "date": ""}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny = Shape("tiny", H=32, D=48, heads=4, d_kv=8, layers=1, vocabulary=40)
    monkeypatch.setattr(bench, "SHAPES", (tiny, tiny))


def small(case):
    return dataclasses.replace(case, B=2, source=6, target=3)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_compared_and_timed(case):
    cells = [(dtype, mode) for dtype in case.dtypes for mode in case.modes]
    rows = [bench.measure(small(case), *cell, OPTIONS) for cell in cells]
    assert not [row for row in rows if "error" in row]
    assert all(row["speedup"] > 0 and set(row["ms"]) == {"adapters", "fused"} for row in rows)
    made = {"environment": STAMP, "peer": "adapters", "layers": 1, "rounds": 2, "rows": rows}
    page = fuse_measure.page(made)
    assert page.startswith("# `fuse(model)` on AdapterHub's adapters")
    assert page.count(f"| {case.name} |") == len(rows) and "of the library's speed" in page


def test_a_wrong_result_is_refused(monkeypatch):
    from pemt_fast.fusing import protocol

    right = protocol.StackedCall.run
    monkeypatch.setattr(protocol.StackedCall, "run", lambda self, impl: right(self, impl) * 1.01)
    row = bench.measure(small(bench.CASES[1]), "fp32", "step", OPTIONS)
    assert "from float64, the library's" in row["error"] and "ms" not in row
