"""`benchmarks/bench_decode.py` runs everywhere, checks before it times, and writes its page."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from cuda_kernels import emulated_library
from cuda_sources import ROOT
from implementations import needs_extension

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import bench_decode  # noqa: E402
from decode_cases import select  # noqa: E402

sys.path.remove(str(FOLDER))


def run(out, *options, **environment):
    program = [sys.executable, ROOT / "benchmarks" / "bench_decode.py", "--quick", "--rounds", "2"]
    done = subprocess.run(
        [*map(str, program), "--out", str(out), "--commit", "abc", *options],
        capture_output=True, text=True, env={**os.environ, **environment}, cwd=out,
    )  # fmt: skip
    (written,) = out.glob("decode/*.json")
    return done, json.loads(written.read_text()), written.with_suffix(".md").read_text()


@needs_extension
@pytest.mark.slow
def test_all_contenders_are_checked_and_timed(tmp_path, tmp_path_factory):
    library = emulated_library(tmp_path_factory)
    named = {"PEMT_FAST_CUDA_LIBRARY": str(library), "TRITON_INTERPRET": "1"}
    done, found, page = run(tmp_path, "--only", "T1 + target", "--no-models", **named)
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in ("fp32", "bf16"):
        rows = {r["contender"]: r for r in found["calls"] if r["dtype"] == dtype}
        assert set(rows) == {"stacked", "ours-torch", "ours-triton", "ours-cuda"}
        assert all(row["us"] > 0 and row["host_us"] > 0 for row in rows.values())
    assert "| small T1 + target | bf16 | ours-cuda |" in page


@pytest.mark.slow
def test_generation_of_all_contenders(tmp_path):
    done, found, page = run(tmp_path, "--only", "T1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    generated = {r["contender"]: r["tokens_per_s"] for r in found["generation"]}
    assert set(generated) == {"plain", "stacked", "ours-torch"}
    assert "| t5-small, 1 sequences | dynamic | plain | " in page


def test_a_wrong_contender_is_refused_and_not_timed(monkeypatch):
    right = bench_decode.contenders

    def wrong(*args, **options):
        found = right(*args, **options)
        run = found["ours-torch"]
        return found | {"ours-torch": lambda: run() * 1.1}

    monkeypatch.setattr(bench_decode, "contenders", wrong)
    options = argparse.Namespace(device="cpu", rounds=1, cell_s=0.01)
    rows = bench_decode.measure(select(quick=True)[1], "fp32", options)
    ours, stacked = (
        next(r for r in rows if r["contender"] == name) for name in ("ours-torch", "stacked")
    )
    assert "exceeds the budget" in ours["error"] and "us" not in ours
    assert stacked["us"] > 0
    stamp = {"gpu": None, "cpu": "", "torch": "", "commit": "", "date": ""}
    page = bench_decode.page({"environment": stamp, "calls": rows, "generation": []})
    assert ours["error"] in page


def test_the_page_names_the_fastest_grid():
    row = {"case": "a", "dtype": "bf16", "contender": "stacked", "us": 2.0, "host_us": 1.0}
    grids = {"1x1": 4.0, "8x1 plan": 3.0, "8x2": 2.5}
    found = {
        "environment": {"gpu": "G", "cpu": "", "torch": "", "commit": "", "date": ""},
        "calls": [row, {**row, "contender": "ours-cuda", "us": 1.0, "grids": grids}],
        "generation": [],
    }
    page = bench_decode.page(found)
    assert "| a | bf16 | ours-cuda | 1.0 | 2.00 | – | – | 1.0 |" in page
    assert "| a | 8x1 | 3.00 | 8x2 | 2.50 |" in page
