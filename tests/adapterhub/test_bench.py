"""`benchmarks/bench_fuse_adapterhub.py`: both forms are compared before they are timed."""

import pytest
from fuse_cases import OPTIONS, STAMP, benchmark, small, use_tiny_model

bench, fuse_measure = benchmark("bench_fuse_adapterhub"), benchmark("fuse_measure")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny_model(bench, monkeypatch)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_compared_and_timed(case):
    cells = [(dtype, mode) for dtype in case.dtypes for mode in case.modes]
    rows = [bench.measure(small(case, rows=2), *cell, OPTIONS) for cell in cells]
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
    row = bench.measure(small(bench.CASES[1], rows=2), "fp32", "step", OPTIONS)
    assert "from float64, the library's" in row["error"] and "ms" not in row
