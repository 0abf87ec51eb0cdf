"""`pemt-fast multitask`: several tasks, several methods, files, budgets, errors."""

import itertools
import json

import pytest
import torch
from tiny_data import run_cli, write_tiny_data
from transformers import AutoModelForSeq2SeqLM

import pemt_fast
from pemt_fast.training.multi_task import (
    MultiTaskRequest,
    _encode,
    _load,
    allocation,
    config_of,
    load_backbone,
)
from pemt_fast.training.multi_task_report import majority
from pemt_fast.training.options import TrainOptions

TASKS = ("sst2", "mrpc")
METHODS = ("lora", "moe_lora", "poly", "mhr", "c_poly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("real"))


def command(folder, out, **changes):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--tasks": "sst2,mrpc",
        "--units": 20, "--seeds": "1,2", "--steps": 3, "--batch-size": 4, **changes,
    }  # fmt: skip
    return ["multitask", *(word for pair in options.items() for word in pair)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run_cli(*command(folder, out)) == 0
    return out


def test_every_method_and_seed_is_trained_and_scored(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert tuple(summary["runs"]) == METHODS
    assert summary["tasks"]["sst2"] == {"train": 36, "test": 12, "majority": 50.0}
    for method, seed in itertools.product(METHODS, (1, 2)):
        run = summary["runs"][method][seed - 1]
        assert run["seed"] == seed and run["steps"] == 3
        assert run == json.loads((finished / method / f"seed{seed}" / "results.json").read_text())
        assert set(run["scores"]) == set(TASKS)
        assert 0 <= run["scores"]["mrpc"]["average"] <= 100
        assert len(run["allocation"]) == (0 if method == "lora" else 6)
    text = (finished / "summary.md").read_text()
    assert "| task | train | test | majority | lora | moe_lora | poly | mhr | c_poly |" in text
    assert "trained parameters" in text
    assert (finished / "allocation.png").read_bytes().startswith(b"\x89PNG")


def test_the_budgets_are_equal(finished):
    """Up to the routers: of six layers, on tasks and skills of a handful."""
    runs = json.loads((finished / "summary.json").read_text())["runs"]
    counts = {method: found[0]["trainable_parameters"] for method, found in runs.items()}
    assert max(counts.values()) <= counts["lora"] * 1.09, counts


def test_seeds_differ_and_the_saved_adapters_are_the_tested_ones(folder, finished):
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = pemt_fast.load(t5, finished / "c_poly" / "seed1")
    assert model.tasks == TASKS
    saved = json.loads((finished / "c_poly" / "seed1" / "results.json").read_text())
    other = json.loads((finished / "c_poly" / "seed2" / "results.json").read_text())
    assert allocation(model) == saved["allocation"] != other["allocation"]
    table = torch.tensor(next(iter(saved["allocation"].values())))
    assert table.shape == (2, 5)
    torch.testing.assert_close(table[:, :3].sum(1), torch.ones(2))
    assert torch.equal(table[:, 3:], torch.eye(2))


def test_a_finished_run_is_skipped_and_another_one_refused(folder, finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("results.json")}
    assert run_cli(*command(folder, finished, **{"--methods": "lora,c_poly"})) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("results.json")} == before
    assert run_cli(*command(folder, finished, **{"--steps": 2})) == 1
    assert "holds a finished run with other settings" in capsys.readouterr().err.replace("\n", " ")


def test_rows_carry_their_task(folder):
    request = MultiTaskRequest(str(folder / "t5"), TASKS, data_dir=folder, limit_train=10)
    _, tokenizer = load_backbone(request.model)
    tasks = {name: _load(name, request) for name in TASKS}
    train, test = _encode(tasks, tokenizer, TrainOptions())
    assert [row["task_ids"] for row in train] == [0] * 10 + [1] * 10
    assert {row["task_ids"] for row in test["mrpc"]} == {1}
    assert majority(tasks["sst2"]) == 50.0


def test_all_linear_layers_and_one_seed(folder, tmp_path):
    changes = {"--targets": "all-linear", "--methods": "c_poly", "--seeds": 3, "--units": 10}
    assert run_cli(*command(folder, tmp_path, **changes)) == 0
    (run,) = json.loads((tmp_path / "summary.json").read_text())["runs"]["c_poly"]
    assert any(name.endswith("wo") for name in run["allocation"])
    assert "over 1 seeds" not in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_is_one_for_all(method):
    config = config_of(method, TASKS, 40)
    assert config.scale == 1.0 and config.tasks == TASKS


def test_c_poly_has_its_published_sizes():
    config = config_of("c_poly", [str(i) for i in range(9)], 24)
    assert (config.num_common, config.num_specific, config.r) == (3, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tasks": "sst"}, "unknown task 'sst'"),
        ({"--tasks": ""}, "tasks must hold at least one value, all different, got []"),
        ({"--tasks": "sst2,sst2"}, "tasks must hold at least one value, all different"),
        ({"--methods": "adapters"}, "methods must be among lora, moe_lora, poly, mhr, c_poly"),
        ({"--units": 6}, "units must be a multiple of 4 for moe_lora, got 6"),
        ({"--units": 8}, "units must be a multiple of 5 for c_poly, got 8"),
        ({"--targets": "k_proj"}, "target_modules ('k_proj',) name no layer"),
        ({"--lr": 0}, "learning_rate must be positive, got 0"),
        ({"--data": "nowhere"}, "nowhere"),
    ],
)
def test_bad_requests_end_before_anything_is_written(folder, tmp_path, capsys, changes, message):
    assert run_cli(*command(folder, tmp_path / "out", **changes)) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
