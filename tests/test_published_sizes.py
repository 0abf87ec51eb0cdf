"""Lengths, batch sizes and epochs of the published scripts, taken where the user names none."""

import json
from dataclasses import replace

import pytest
from tiny_data import run_cli, write_tiny_data

from pemt_fast.data import TASKS
from pemt_fast.training import multi_task_data, peml_tune, run
from pemt_fast.training.multi_task_data import encode_tasks, load_task
from pemt_fast.training.options import STAGE_ONE, STAGE_TWO, TrainOptions
from pemt_fast.training.run import TrainRequest, load_backbone, run_training
from pemt_fast.training.stages import Backbone, train_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("sizes"))


MRQA = ("nq", "hotpotqa", "newsqa", "searchqa")


def test_source_lengths_are_the_published_ones():
    longer = {task.name: task.max_source_length for task in TASKS.values()
              if task.max_source_length != 256}  # fmt: skip
    assert longer.items() >= {"multirc": 348, **dict.fromkeys(MRQA, 512)}.items()
    assert {"squad", "record"} <= set(longer)  # inferred


# By hand from the published scripts; what they leave out has 100 sequences and 20 epochs.
@pytest.mark.parametrize(
    ("task", "batch_size", "epochs", "length"),
    [
        ("cb", 32, 20, 256),
        ("wsc", 32, 20, 256),
        ("boolq", 64, 20, 256),
        ("rte", 64, 20, 256),
        ("multirc", 64, 10, 348),
        *((name, 32, 5, 512) for name in MRQA),
        ("cola", 100, 20, 256),
        ("paws", 100, 20, 256),
    ],
)
def test_targets_have_the_published_sizes(task, batch_size, epochs, length):
    found = STAGE_TWO.for_task(TASKS[task], stage=2)
    assert (found.batch_size, found.epochs, found.max_source_length) == (batch_size, epochs, length)
    assert STAGE_TWO.for_task(TASKS[task], stage=2, few_shot=8).batch_size == 8


@pytest.mark.parametrize(
    ("task", "batch_size", "length"), [("mnli", 128, 256), ("squad", 256, 512), ("cb", 128, 256)]
)
def test_sources_have_the_published_sizes(task, batch_size, length):
    found = STAGE_ONE.for_task(TASKS[task], stage=1)
    assert (found.batch_size, found.epochs, found.max_source_length) == (batch_size, 5, length)
    assert (found.warmup_steps, found.learning_rate) == (500, 5e-4)


def test_what_is_set_stays():
    own = TrainOptions(batch_size=3, epochs=1.5, max_source_length=77)
    assert own.for_task(TASKS["multirc"], stage=2, few_shot=4) == own


def test_examples_of_no_known_task_have_the_values_of_most():
    found = STAGE_TWO.for_task(["accuracy"], stage=2)
    assert (found.batch_size, found.epochs, found.max_source_length) == (100, 20, 256)


def test_sizes_left_to_no_task_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size and epochs must be set"):
        STAGE_TWO.arguments(tmp_path, 8)


@pytest.mark.parametrize("name", ["batch_size", "epochs", "max_source_length"])
def test_zero_is_not_taken_for_none(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        TrainOptions(**{name: 0})


def test_runs_record_what_they_took(folder, tmp_path):
    options = replace(STAGE_ONE, steps=1, progress=False)
    request = TrainRequest(
        str(folder / "t5"), ["sst2"], ["mrpc"], folder, few_shot=3, source_rank=4,
        source_options=options, target_options=replace(STAGE_TWO, steps=1, progress=False),
    )  # fmt: skip
    run_training(request, tmp_path)
    for place, batch_size in (("sources/sst2", 128), ("targets/mrpc", 3)):
        results = json.loads((tmp_path / place / "results.json").read_text())
        for recorded in (results["request"]["options"], results["options"]):
            assert recorded["max_source_length"] == 256
            assert recorded["batch_size"] == batch_size
    # The same sizes by name are the same request.
    explicit = replace(options, max_source_length=256, batch_size=128, epochs=5.0)
    again = run_training(replace(request, targets=[], source_options=explicit), tmp_path)
    assert again["sources"]["sst2"]["steps"] == 1


@pytest.fixture
def short_mrpc(monkeypatch):
    """MRPC's own length is six tokens: its texts have more."""
    monkeypatch.setitem(TASKS, "mrpc", replace(TASKS["mrpc"], max_source_length=6))


def test_each_task_of_several_is_cut_to_its_own_length(folder, tmp_path, short_mrpc):
    _, tokenizer = load_backbone(str(folder / "t5"))
    tasks = {name: load_task(name, folder, seed=1) for name in ("sst2", "mrpc")}
    _, test = encode_tasks(tasks, tokenizer, TrainOptions())
    assert max(len(row["input_ids"]) for row in test["mrpc"]) == 6
    assert min(len(row["input_ids"]) for row in test["sst2"]) > 6
    _, test = encode_tasks(tasks, tokenizer, TrainOptions(max_source_length=5))
    assert max(len(row["input_ids"]) for rows in test.values() for row in rows) == 5
    assert multi_task_data.common({"a": 256, "b": 256}) == 256

    words = ["--model", folder / "t5", "--data", folder, "--out", tmp_path, "--tasks", "sst2,mrpc"]
    sizes = ("--methods", "lora", "--units", 4, "--seeds", 1, "--steps", 1)
    assert run_cli("multitask", *words, *sizes) == 0
    results = json.loads((tmp_path / "lora" / "seed1" / "results.json").read_text())
    lengths = {"sst2": 256, "mrpc": 6}
    assert results["request"]["options"]["max_source_length"] == lengths


def test_a_study_records_the_lengths(tmp_path, short_mrpc):
    for names, length in ((["sst2"], 256), (["sst2", "mrpc"], {"sst2": 256, "mrpc": 6})):
        place = tmp_path / str(len(names))
        peml_tune._claim(place, peml_tune.PemlTuneRequest(model="", tasks=names), names)
        written = json.loads((place / peml_tune.REQUEST_FILE).read_text())
        assert written["options"]["max_source_length"] == length


def test_train_and_evaluate_take_the_length_of_the_task(
    folder, tmp_path, short_mrpc, monkeypatch
):  # fmt: skip
    words = ["--model", folder / "t5", "--data", folder]
    assert run_cli("train", *words, "--out", tmp_path, "--sources", "mrpc", "--source-steps", 1,
                   "--source-rank", 4, "--batch-size", 4) == 0  # fmt: skip
    results = json.loads((tmp_path / "sources" / "mrpc" / "results.json").read_text())
    assert results["request"]["options"]["max_source_length"] == 6
    assert results["request"]["options"]["batch_size"] == 4
    lengths = []

    def predict(model, tokenizer, rows, **options):
        lengths.append(max(len(row["input_ids"]) for row in rows))
        return [""] * len(rows)

    monkeypatch.setattr(run, "predict", predict)
    evaluate = ["evaluate", *words, "--adapters", tmp_path / "sources" / "mrpc", "--task", "mrpc"]
    assert run_cli(*evaluate) == 0
    assert run_cli(*evaluate, "--max-source-length", 4) == 0
    assert lengths == [6, 4]


def test_a_stage_called_by_itself_takes_the_length_of_the_task(folder, tmp_path, short_mrpc):
    backbone = Backbone(*load_backbone(str(folder / "t5")), "tiny")
    options = TrainOptions(steps=1, batch_size=4, progress=False)
    task = load_task("mrpc", folder, seed=1)
    results = train_source(backbone, task, options, tmp_path / "mrpc", rank=4)
    assert results["request"]["options"]["max_source_length"] == 6
