"""The demo with fewer steps: the gate must find the related source, and PEMT must win."""

import json

import pytest
import torch

from pemt_fast.training.demo import DemoConfig, run_demo, time_operator

SHORT = DemoConfig(
    backbone_steps=700,
    source_steps=250,
    target_steps=120,
    test_examples=128,
    targets=("reverse",),
    seeds=(1,),
    timing_rounds=2,
    progress=False,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(folder, SHORT), folder


@pytest.mark.slow
def test_the_gate_finds_the_related_source(demo):
    results, _ = demo
    target = results["targets"]["reverse"]
    assert max(target["gate"], key=target["gate"].get) == "reverse"
    assert target["gate"]["reverse"] > 0.5
    for layer, weights in target["gates"].items():
        assert len(weights) == 4 and sum(weights) == pytest.approx(1, abs=1e-4), layer


@pytest.mark.slow
def test_pemt_beats_a_single_adapter_and_the_untouched_model(demo):
    scores = demo[0]["targets"]["reverse"]["scores"]
    letters = {method: s["token_accuracy"] for method, s in scores.items()}
    assert letters["PEMT"] > letters["single adapter"] + 5
    assert letters["PEMT"] > letters["untouched model"] + 20


@pytest.mark.slow
def test_results_are_written(demo):
    results, folder = demo
    assert json.loads((folder / "demo.json").read_text()) == results
    assert (folder / results["targets"]["reverse"]["image"]).read_bytes()[:4] == b"\x89PNG"
    assert set(results["sources"]) == {"reverse", "sort", "shift", "evenodd"}


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not from an earlier demo"):
        run_demo(tmp_path, SHORT)
    assert (tmp_path / "thesis.txt").is_file()


def test_operator_timing_checks_the_result_first(monkeypatch):
    times = time_operator(1, torch.float32)
    assert times["loop_ms"] > 0 and times["ours_ms"] > 0
    monkeypatch.setattr(
        "pemt_fast.training.demo.adapter_mixture",
        lambda x, gate, w_down, w_up, *, activation, base: base + 0 * x[..., :768] * gate.sum(),
    )
    with pytest.raises(RuntimeError, match="the operator disagrees with the loop"):
        time_operator(1, torch.float32)
