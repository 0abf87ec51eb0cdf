"""`pemt-fast multitask`: several tasks, several methods, files, budgets, errors."""

import dataclasses
import itertools
import json

import pytest
import torch
from tiny_data import run_cli, write_tiny_data
from transformers import AutoModelForSeq2SeqLM

import pemt_fast
from pemt_fast.data.load import Splits
from pemt_fast.data.template import Example
from pemt_fast.training import multi_task, multi_task_data, peml_run, trainer
from pemt_fast.training.multi_task import (
    load_backbone,
    train_mixture,
)
from pemt_fast.training.multi_task_data import encode_tasks, load_task
from pemt_fast.training.multi_task_methods import METHODS as ALL_METHODS
from pemt_fast.training.multi_task_methods import config_of, sized, trained
from pemt_fast.training.multi_task_report import allocation, majority, most_decided, table
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.search import SearchTrainer
from pemt_fast.training.stages import Backbone, TaskData

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
    for change in ({"--steps": 2}, {"--temperature": 3}, {"--lr": 1}, {"--limit-train": 8}):
        assert run_cli(*command(folder, finished, **change)) == 1
        error = capsys.readouterr().err.replace("\n", " ")
        assert "holds a finished run with other settings" in error


def test_a_seed_repeats_its_run_with_the_sampling_asked_for(
    folder, finished, tmp_path, monkeypatch
):
    temperatures = []

    class Sampler(trainer.TaskSampler):
        def __init__(self, task_ids, **options):
            temperatures.append(options["temperature"])
            super().__init__(task_ids, **options)

    monkeypatch.setattr(trainer, "TaskSampler", Sampler)
    changes = {"--methods": "c_poly", "--seeds": 2, "--temperature": 2.0}
    assert run_cli(*command(folder, tmp_path, **changes)) == 0
    again, before = (
        json.loads((out / "c_poly" / "seed2" / "results.json").read_text())
        for out in (tmp_path, finished)
    )
    assert again["allocation"] == before["allocation"] and again["scores"] == before["scores"]
    assert temperatures and set(temperatures) == {2.0}


def test_without_units_the_size_is_that_of_c_poly(folder, tmp_path, monkeypatch, capsys):
    def stop(backbone, tasks, config, *_, **options):
        raise ValueError(f"r = {config.r}, temperature = {options['temperature']}")

    monkeypatch.setattr(multi_task, "train_mixture", stop)
    changes = {"--methods": "lora", "--temperature": 7}
    words = command(folder, tmp_path / "out", **changes)
    at = words.index("--units")
    assert run_cli(*words[:at], *words[at + 2 :]) == 1
    # Three common skills and one per task, of rank 2.
    assert "r = 10, temperature = 7.0" in capsys.readouterr().err


def test_rows_carry_their_task(folder):
    _, tokenizer = load_backbone(str(folder / "t5"))
    tasks = {name: load_task(name, folder, seed=42, limit_train=10, limit_eval=5) for name in TASKS}
    train, test = encode_tasks(tasks, tokenizer, TrainOptions())
    assert [row["task_ids"] for row in train] == [0] * 10 + [1] * 10
    assert [row["task_ids"] for row in test["mrpc"]] == [1] * 5
    for row, example in zip(test["mrpc"], tasks["mrpc"].splits.test, strict=True):
        assert row["input_ids"] == tokenizer(f"mrpc: {example.source}")["input_ids"]


def test_the_seed_of_the_data_chooses_the_examples(folder):
    first, second = (load_task("sst2", folder, seed=seed).splits for seed in (1, 2))
    assert first.train != second.train


def example(target):
    return Example("the film was good", target, (target,))


def test_the_majority_is_that_of_the_training_part(folder):
    positive, negative = example("positive"), example("negative")
    splits = Splits([positive, negative, negative], [], [positive, positive, positive, negative])
    task = dataclasses.replace(load_task("sst2", folder, seed=42), splits=splits)
    assert majority(task) == 25.0


def test_generation_has_room_for_the_longest_target(folder, tmp_path, monkeypatch):
    splits = Splits([example("good")] * 4, [], [example("good bad fine")])
    task = TaskData("words", "", splits, ["accuracy"])
    lengths = []

    def predict(*_, max_length, **__):
        lengths.append(max_length)
        return [""]

    monkeypatch.setattr(multi_task_data, "predict", predict)
    train_mixture(
        Backbone(*load_backbone(str(folder / "t5")), "tiny"),
        {"words": task}, config_of("lora", ["words"], 2),
        TrainOptions(steps=1, batch_size=2, progress=False), tmp_path, temperature=1.0, label="",
    )  # fmt: skip
    assert lengths == [5]  # with the start and the end token


def test_a_part_without_examples_is_refused(folder):
    task = load_task("sst2", folder, seed=42)
    empty = dataclasses.replace(task, splits=Splits(task.splits.train, [], []))
    _, tokenizer = load_backbone(str(folder / "t5"))
    with pytest.raises(ValueError, match="task 'sst2': the test part is empty"):
        encode_tasks({"sst2": empty}, tokenizer, TrainOptions())


def test_the_table_by_hand():
    def run(a, b, seconds):
        scores = {"a": {"average": a}, "b": {"average": b}}
        return {"scores": scores, "trainable_parameters": 1234, "seconds": seconds}

    summary = {
        "tasks": {
            "a": {"train": 10, "test": 5, "majority": 50.0},
            "b": {"train": 20, "test": 6, "majority": 80.0},
        },
        "runs": {"lora": [run(10.0, 30.0, 1), run(20.0, 60.0, 3)], "poly": [run(40.0, 45.0, 7)]},
    }
    columns, rows = table(summary)
    assert columns == ("task", "train", "test", "majority", "lora", "poly")
    assert rows == [
        ("a", 10, 5, "50.0", "15.0 ± 7.1", "40.0"),
        ("b", 20, 6, "80.0", "45.0 ± 21.2", "45.0"),
        ("mean", "", "", "65.0", "30.0 ± 14.1", "42.5"),
        ("trained parameters", "", "", "", "1,234", "1,234"),
        ("seconds", "", "", "", "2", "7"),
    ]


def test_the_picture_is_of_the_layer_whose_tasks_differ_most():
    """Not of one that chooses its skills for all tasks alike."""
    layers = {
        "even": [[0.5, 0.5]] * 2,
        "alike": [[1.0, 0.0]] * 2,
        "apart": [[1.0, 0.0], [0.0, 1.0]],
    }
    assert most_decided(layers)[0] == "apart"


def test_all_linear_layers_and_one_seed(folder, tmp_path):
    changes = {"--targets": "all-linear", "--methods": "c_poly", "--seeds": 3, "--units": 10}
    assert run_cli(*command(folder, tmp_path, **changes)) == 0
    (run,) = json.loads((tmp_path / "summary.json").read_text())["runs"]["c_poly"]
    assert any(name.endswith("wo") for name in run["allocation"])
    assert "over 1 seeds" not in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m != "prompt_tuning"])
def test_the_scale_is_one_for_all(method):
    config = config_of(method, TASKS, 40)
    assert config.scale == 1.0 and config.tasks == TASKS


def test_only_mhr_has_splits():
    sizes = {name: config_of(name, TASKS, 40) for name in ("poly", "mhr")}
    assert {name: (c.num_skills, c.num_splits, c.r) for name, c in sizes.items()} == {
        "poly": (4, 1, 10),
        "mhr": (4, 4, 10),
    }


def test_the_allocation_is_the_mean_over_splits(folder, finished):
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = pemt_fast.load(t5, finished / "mhr" / "seed1")
    saved = json.loads((finished / "mhr" / "seed1" / "results.json").read_text())["allocation"]
    for name, layer in model.adapted_layers().items():
        weights = torch.sigmoid(layer.router.logits.detach())  # [T, P, K]
        expected = (weights / weights.sum(-1, keepdim=True)).sum(1) / 4
        torch.testing.assert_close(torch.tensor(saved[name]), expected)


BESIDE = ("mtl_lora", "multi_lora", "prompt_tuning", "lora_prefix", "peml")


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    changes = {"--methods": ",".join(("lora", *BESIDE)), "--units": 100, "--seeds": 1, "--steps": 4}
    assert run_cli(*command(folder, out, **changes)) == 0
    return out


def test_what_peml_is_compared_with_has_the_size_of_lora(folder, compared):
    runs = json.loads((compared / "summary.json").read_text())["runs"]
    counts = {method: found[0]["trainable_parameters"] for method, found in runs.items()}
    prompt = counts.pop("prompt_tuning")
    assert all(abs(count / counts["lora"] - 1) < 0.02 for count in counts.values()), counts
    assert prompt == 100 * 32 < counts["lora"]  # positions times d_model: as published
    for method in BESIDE:
        saved = pemt_fast.load(
            AutoModelForSeq2SeqLM.from_pretrained(folder / "t5"), compared / method / "seed1"
        )
        assert saved.count_parameters()[0] == runs[method][0]["trainable_parameters"]
        config = saved.adapter_config
        assert method == "prompt_tuning" or config.alpha == config.r
    rates = {m: found[0]["request"]["options"]["learning_rate"] for m, found in runs.items()}
    assert rates.pop("prompt_tuning") == 0.3 and set(rates.values()) == {1e-3}


def test_peml_is_searched_and_then_trained_anew(folder, compared):
    run = json.loads((compared / "peml" / "seed1" / "results.json").read_text())
    search = run["search"]
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = pemt_fast.load(t5, compared / "peml" / "seed1")
    assert [list(cells) for cells in model.architecture()] == search["architecture"]
    assert not model.adapter_config.searches and run["request"]["config"]["architecture"] is None
    assert search["steps"] == run["steps"] == 4 and search["seconds"] > 0
    assert search["trainable_parameters"] > run["trainable_parameters"]
    report = json.loads((compared / "peml" / "seed1" / "search" / "search.json").read_text())
    assert report["architecture"] == search["architecture"]
    text = (compared / "summary.md").read_text()
    assert "| seconds of the search |  |  |  | – | – | – | – | – | " in text


def test_settings_and_a_bi_level_search(folder, tmp_path, monkeypatch):
    rows = []

    def trainer_of(*args, train_dataset, architecture_dataset, **kwargs):
        rows.append((train_dataset, architecture_dataset))
        return SearchTrainer(
            *args, train_dataset=train_dataset, architecture_dataset=architecture_dataset, **kwargs
        )

    monkeypatch.setattr(peml_run, "SearchTrainer", trainer_of)
    changes = {"--methods": "peml", "--units": 100, "--seeds": 1, "--steps": 2}
    settings = ["--set", "sharing=architecture", "--set", "temperature=[2, 0.5]"]
    words = [*command(folder, tmp_path, **changes, **{"--architecture-share": 0.25}), *settings]
    assert run_cli(*words) == 0
    run = json.loads((tmp_path / "peml" / "seed1" / "results.json").read_text())
    assert run["request"]["config"]["sharing"] == "architecture"
    assert run["request"]["config"]["temperature"] == [2, 0.5]
    assert run["request"]["architecture_share"] == 0.25
    assert len(run["search"]["architecture"]) == 1
    ((training, architecture),) = rows
    for task, own in enumerate(run["request"]["tasks"].values()):
        counts = [sum(row["task_ids"] == task for row in part) for part in (training, architecture)]
        assert sum(counts) == own and abs(counts[1] - own / 4) < 1  # a quarter of each task
    # Another request is not taken for this one.
    assert run_cli(*words[:-2]) == 1


def test_a_fixed_architecture_is_not_searched(folder, tmp_path):
    changes = {"--methods": "peml", "--units": 100, "--seeds": 1, "--steps": 2}
    settings = ["--set", "sharing=architecture", "--set", 'architecture=[["conv3", "gated"]]']
    assert run_cli(*command(folder, tmp_path, **changes), *settings) == 0
    run = json.loads((tmp_path / "peml" / "seed1" / "results.json").read_text())
    assert "search" not in run
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = pemt_fast.load(t5, tmp_path / "peml" / "seed1")
    assert model.architecture() == (("conv3", "gated"),)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_share_of_the_rows_is_spread_over_them(share):
    rest, part = peml_run.divided(range(1000), share)
    assert sorted([*rest, *part]) == list(range(1000)) and len(part) == round(1000 * share)
    gaps = [b - a for a, b in itertools.pairwise(part)]
    assert max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match="architecture_share 0.1 of 3 rows leaves a part empty"):
        peml_run.divided(range(3), 0.1)


def test_a_size_that_no_rank_reaches(folder, tmp_path, capsys):
    changes = {"--methods": "peml", "--units": 10}
    assert run_cli(*command(folder, tmp_path, **changes)) == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert "units must be larger for peml: rank 1 trains" in error


@pytest.mark.parametrize("budget", [3000, 3300, 9000])
def test_the_rank_is_the_nearest(folder, budget):
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    config = config_of("multi_lora", TASKS, 4)
    found = sized(config, t5, budget)
    sizes = {r: trained(dataclasses.replace(config, r=r, alpha=r), t5) for r in range(1, 40)}
    assert abs(sizes[found.r] - budget) == min(abs(size - budget) for size in sizes.values())
    assert found.alpha == found.r


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
        ({"--architecture-share": 1}, "architecture_share must be from 0 to below 1, got 1.0"),
        ({"--set": "sharing"}, "--set must be name=value, got 'sharing'"),
        ({"--set": "sharing=network"}, "for lora, got 'sharing'"),
        ({"--set": "r=4"}, "['adapter_dtype', 'dropout', 'impl'] for lora, got 'r'"),
        ({"--set": "dropout=2"}, "dropout must be"),
    ],
)
def test_bad_requests_end_before_anything_is_written(folder, tmp_path, capsys, changes, message):
    assert run_cli(*command(folder, tmp_path / "out", **changes)) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
