"""`benchmarks/bench_fuse.py`: both forms are compared before they are timed, and its page."""

import json

import pytest
import torch
from fuse_cases import FOLDER, OPTIONS, STAMP, benchmark, small, use_tiny_model

pytest.importorskip("peft", reason="peft is a development dependency")
bench_fuse, fuse_measure = benchmark("bench_fuse"), benchmark("fuse_measure")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use_tiny_model(bench_fuse, monkeypatch)


@pytest.mark.parametrize("case", bench_fuse.CASES, ids=lambda case: case.name)
def test_every_case_is_compared_and_timed(case):
    rows = [
        bench_fuse.measure(small(case), dtype, mode, OPTIONS)
        for dtype in ("fp32", "bf16")
        for mode in case.modes
    ]
    assert not [row for row in rows if "error" in row]
    assert all(row["speedup"] > 0 and set(row["ms"]) == {"peft", "fused"} for row in rows)
    page = fuse_measure.page({"environment": STAMP, "layers": 1, "rounds": 2, "rows": rows})
    assert page.count(f"| {case.name} |") == len(rows)


def test_a_wrong_result_is_refused(monkeypatch):
    from pemt_fast.fusing import protocol

    right = protocol.StackedCall.run
    monkeypatch.setattr(protocol.StackedCall, "run", lambda self, impl: right(self, impl) * 1.01)
    row = bench_fuse.measure(small(bench_fuse.CASES[1]), "fp32", "step", OPTIONS)
    assert "from float64, peft's" in row["error"] and "ms" not in row
    page = fuse_measure.page({"environment": STAMP, "layers": 1, "rounds": 2, "rows": [row]})
    assert row["error"] in page


def test_committed_pages_are_those_of_their_results():
    found = sorted((FOLDER / "results" / "fuse").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == fuse_measure.page(result), path
    folder = found[0].parent
    assert (folder / fuse_measure.OVERVIEW).read_text() == fuse_measure.overview(folder)


def test_the_overview_takes_the_newest_result_and_shows_what_is_missing(tmp_path):
    row = {"case": "c", "dtype": "fp32", "mode": "forward", "ms": {}, "speedup": 0.5}
    for day, speedup in ((1, 0.5), (3, 2.0), (2, 0.7)):
        stamp = STAMP | {"date": f"2026-11-0{day}T00"}
        result = {"environment": stamp, "peer": "adapters", "rows": [row | {"speedup": speedup}]}
        (tmp_path / f"{day}.json").write_text(json.dumps(result))
    text = fuse_measure.overview(tmp_path)
    assert "| adapters | c | fp32 | 2.00 | – | – | – |" in text
    assert "0.50" not in text and "0.70" not in text


def test_a_gradient_of_zero_is_not_compared():
    """Such as that of AdapterFusion's key bias: what is left of it is rounding."""
    exact = {"logits": torch.ones(4), "small": torch.full((2,), 1e-8), "zero": torch.tensor(1e-17)}
    found = {"logits": torch.ones(4), "small": torch.full((2,), 2e-8), "zero": torch.tensor(1e-9)}
    assert fuse_measure._errors(found, exact) == {"logits": 0.0, "small": pytest.approx(1.0)}


def test_the_summary_counts_the_slower_cells():
    rows = [{"mode": "step", "ms": {}, "speedup": speedup} for speedup in (0.994, 0.996, 1.5)]
    rows.append({"mode": "step", "error": "wrong"})
    assert fuse_measure.summary(rows, "peft") == [
        "* step: 0.99 to 1.50 of peft's speed, 1 of 3 cells slower."
    ]
