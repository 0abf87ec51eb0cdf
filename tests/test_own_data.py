"""Rows in memory and tasks of one's own: wherever a folder or a name goes."""

import json
from dataclasses import replace

import pytest
from tiny_data import write_tiny_data

from pemt_fast.data import TASKS, Task, available_splits, get_task, load_rows, load_splits
from pemt_fast.training.metrics import compute
from pemt_fast.training.multi_task import MultiTaskRequest, run_multi_task
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.peml_tune import PemlTuneRequest, tune_peml
from pemt_fast.training.pretrain_files import load_task as load_pretraining_task
from pemt_fast.training.run import TrainRequest, evaluate_adapters, run_training

# Words of the tiny tokenizer, so that the texts have ids.
MINE = Task(
    "mine",
    "the film was good",
    dataset=None,
    folder="mine",
    source_fields=(("sentence", "text"),),
    labels=("dull", "bright"),
    label_column="mood",
    split_rule="official",
    metrics=("accuracy", "f1"),
)


def rows(count, start=0):
    words = "good bad fine film plot".split()
    return [
        {"text": f"the {words[i % 5]} was {words[(i // 5) % 5]}", "mood": i % 2}
        for i in range(start, start + count)
    ]


OWN = {"train": rows(12), "validation": rows(4, 20), "test": rows(6, 30)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("own"))


# --- rows in memory ------------------------------------------------------------------------------


def test_a_mapping_of_lists_makes_splits():
    splits = load_splits(MINE, OWN)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [12, 4, 6]
    assert (splits.train[1].source, splits.train[1].target) == (
        "sentence: the bad was good",
        "bright",
    )
    assert available_splits(MINE, OWN) == ("train", "validation", "test")
    assert len(load_splits(MINE, OWN, few_shot=2).train) == 4


def test_a_known_task_takes_rows_in_memory_by_its_own_rule():
    held = [{"sentence": f"s{i}", "label": i % 2} for i in range(10)]
    splits = load_splits("cola", {"train": held[:4], "validation": held[4:]})
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 3, 3]


def test_a_dataset_dict_gives_the_same_as_its_lists():
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    names = datasets.ClassLabel(names=["dull", "bright"])
    features = datasets.Features({"text": datasets.Value("string"), "mood": names})
    parts = {
        split: datasets.Dataset.from_list(part, features=features) for split, part in OWN.items()
    }
    assert load_splits(MINE, datasets.DatasetDict(parts)) == load_splits(MINE, OWN)
    assert load_splits(MINE, parts) == load_splits(MINE, OWN)
    assert load_rows(MINE, datasets.DatasetDict(parts), "test") == OWN["test"]


def test_any_other_sequence_of_mappings_does(tmp_path):
    assert load_rows(MINE, {"train": tuple(OWN["train"])}) == OWN["train"]


@pytest.mark.parametrize(
    ("data_dir", "error", "message"),
    [
        ({"dev": OWN["train"]}, FileNotFoundError, "task 'mine' has no split 'train'; it has: dev"),
        ({"train": []}, ValueError, "split 'train' of data_dir of task 'mine' is empty"),
        ({"train": ["a text"]}, ValueError, r"row 0 \(from 0\): expected a mapping .* got str"),
        (OWN["train"], TypeError, "must be a folder, a mapping from split to rows .* got list"),
    ],
)
def test_what_is_no_split_of_rows_is_refused(data_dir, error, message):
    with pytest.raises(error, match=message):
        load_rows(MINE, data_dir)


def test_a_row_that_does_not_fit_is_named():
    bad = {**OWN, "train": [*rows(3), {"text": "a", "mood": 5}]}
    with pytest.raises(ValueError, match="split 'train', row 3 .*unknown label 5 in column 'mood'"):
        load_splits(MINE, bad)


# --- tasks of one's own --------------------------------------------------------------------------


def test_a_task_stands_for_itself():
    assert get_task(MINE) is MINE
    assert compute(MINE, ["1"], [MINE.format(OWN["train"][1], "index")])["f1"] == 100.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "must be the name of a folder, got 'a/b'"),
        ({"name": ""}, "must be the name of a folder, got ''"),
        ({"kind": "ranking"}, "kind must be one of classification, .*, got 'ranking'"),
        ({"split_rule": "own"}, "split_rule must be one of small, .*, got 'own'"),
        ({"labels": None}, "classification needs labels or option_columns"),
        ({"labels": ("a", "a")}, r"labels must all differ, got \('a', 'a'\)"),
    ],
)
def test_tasks_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MINE, **changes)


def test_own_task_and_rows_through_both_stages(folder, tmp_path):
    options = TrainOptions(steps=2, batch_size=4, progress=False)
    request = TrainRequest(
        str(folder / "t5"), ["sst2"], [MINE], {"sst2": folder, "mine": OWN}, few_shot=2,
        source_rank=4, source_options=options, target_options=options,
    )  # fmt: skip
    summary = run_training(request, tmp_path)
    assert summary["targets"]["mine"]["examples"] == 4
    results = json.loads((tmp_path / "targets" / "mine" / "results.json").read_text())
    assert results["request"]["task"] == "mine" and "f1" in results["test"]
    again = evaluate_adapters(request.model, tmp_path / "targets" / "mine", MINE, {"mine": OWN})
    assert again["accuracy"] == results["test"]["accuracy"]


def test_own_task_beside_a_known_one(folder, tmp_path):
    request = MultiTaskRequest(
        str(folder / "t5"), [MINE, "sst2"], ["lora"], {"sst2": folder, "mine": OWN}, 4, seeds=[1],
        options=TrainOptions(steps=2, batch_size=4, epochs=1, progress=False),
    )  # fmt: skip
    summary = run_multi_task(request, tmp_path)
    assert list(summary["tasks"]) == ["mine", "sst2"]
    assert "f1" in summary["runs"]["lora"][0]["scores"]["mine"]


def test_own_task_in_a_study_and_in_pretraining(folder, tmp_path, monkeypatch):
    def stop(run, *_, **__):
        raise RuntimeError("the tasks were loaded")

    monkeypatch.setattr("pemt_fast.training.peml_tune.search_hyper_parameters", stop)
    request = PemlTuneRequest(
        model=str(folder / "t5"), tasks=[MINE], data_dir={"mine": OWN},
        options=TrainOptions(steps=2, batch_size=4, epochs=1, progress=False),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the tasks were loaded"):
        tune_peml(request, tmp_path)
    assert json.loads((tmp_path / "request.json").read_text())["tasks"] == ["mine"]
    examples = load_pretraining_task(MINE, {"mine": OWN})
    assert examples[0].source == "mine: sentence: the good was good"


def test_rows_of_several_tasks_are_found_by_name(folder, tmp_path):
    request = TrainRequest(str(folder / "t5"), ["sst2"], data_dir={"mine": OWN})
    with pytest.raises(ValueError, match="no entry for the task 'sst2'; it has: mine"):
        run_training(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_task_by_two_names_is_refused(folder, tmp_path):
    request = MultiTaskRequest(str(folder / "t5"), ["sst2", "sst-2"], ["lora"], folder, 4)
    with pytest.raises(ValueError, match="tasks must hold at least one value, all different"):
        run_multi_task(request, tmp_path / "out")


def test_aliases_of_a_source_count_as_the_source(folder, tmp_path):
    options = TrainOptions(steps=1, batch_size=4, progress=False)
    request = TrainRequest(
        str(folder / "t5"), ["sst-2"], data_dir=folder, source_rank=4, source_options=options,
        target_options=replace(options, max_target_length=1),
    )  # fmt: skip
    # Options of targets would be refused: no label fits into one token.
    assert list(run_training(request, tmp_path)["sources"]) == ["sst2"]
    assert TASKS["sst2"] is get_task("sst-2")


def test_a_directory_is_of_its_data(folder, tmp_path):
    options = TrainOptions(steps=1, batch_size=4, epochs=1, progress=False)
    single = TrainRequest(str(folder / "t5"), [MINE], data_dir={"mine": OWN}, source_rank=4,
                          source_options=options)  # fmt: skip
    several = MultiTaskRequest(str(folder / "t5"), [MINE], ["lora"], {"mine": OWN}, 4, seeds=[1],
                               options=options)  # fmt: skip
    # As many rows, one of them with another label; of the test part alone, too.
    for split in ("train", "test"):
        rows = [*OWN[split][:-1], {**OWN[split][-1], "mood": 0}]
        other = {"mine": {**OWN, split: rows}}
        for run, request in ((run_training, single), (run_multi_task, several)):
            place = tmp_path / run.__name__
            run(request, place)
            with pytest.raises(ValueError, match="holds a finished run with other settings"):
                run(replace(request, data_dir=other), place)


def test_the_digest_is_of_every_text():
    whole = load_splits(MINE, OWN)
    assert whole.digest() == load_splits(MINE, OWN).digest()
    changed = [
        load_splits(MINE, OWN, label_style="index"),
        load_splits(MINE, OWN, prefix="name"),
        load_splits(MINE, OWN, limit_eval=2),
        replace(whole, train=whole.train[::-1]),
        replace(whole, test=[replace(e, references=("x",)) for e in whole.test]),
    ]
    digests = {splits.digest() for splits in (whole, *changed)}
    assert len(digests) == 6 and all(len(digest) == 16 for digest in digests)
