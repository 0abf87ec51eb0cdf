"""`label_style` and `prefix`: the texts they give, what scores them, where runs record them."""

import dataclasses
import json

import pytest
from tiny_data import run_cli, write_tiny_data

from pemt_fast.data import TASKS, LabelStyle, load_splits, with_prefix
from pemt_fast.training import peml_tune, run
from pemt_fast.training.metrics import compute
from pemt_fast.training.multi_task_data import encode_tasks, load_task
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.run import TrainRequest

COLA = {"sentence": "They left.", "label": 1, "idx": 0}
RECORD = {"passage": "P.", "query": "Q @placeholder", "entities": ["A"], "answers": ["A"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("style"))


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "prefix", "source"),
    [
        ("cola", COLA, "none", "sentence: They left."),
        ("cola", COLA, "name", "cola sentence: They left."),
        ("cola", COLA, "colon", "cola: sentence: They left."),
        # ReCoRD's first marker begins with the name: published prefixes stand in front of it too.
        ("record", RECORD, "name", "record record query: Q @placeholder entities: A passage: P."),
    ],
)
def test_prefix_stands_in_front_of_the_source(task, row, prefix, source):
    assert TASKS[task].format(row, prefix=prefix).source == source
    assert TASKS[task].format_for_training(row, prefix=prefix)[0].source == source


def test_both_reach_every_part(folder):
    splits = load_splits("sst2", folder, label_style="index", prefix="name")
    for part in (splits.train, splits.validation, splits.test):
        assert {e.target for e in part} <= {"0", "1"}
        assert {e.source[:15] for e in part} == {"sst2 sentence: "}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_style": "digit"}, "label_style must be 'name' or 'index', got 'digit'"),
        ({"prefix": "task"}, "prefix must be 'none', 'name' or 'colon', got 'task'"),
        ({"prefix": True}, "prefix must be 'none', 'name' or 'colon', got True"),
    ],
)
def test_unknown_styles_are_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_splits("sst2", tmp_path / "missing", **options)


def test_with_prefix_refuses_unknown_ones():
    with pytest.raises(ValueError, match="prefix must be"):
        with_prefix("a", "b", "c")


# --- scores --------------------------------------------------------------------------------------

PREMISES = {"premise": "P.", "hypothesis": "H."}


def scores(task, rows, guesses, style: LabelStyle):
    examples = [TASKS[task].format(row, style) for row in rows]
    names, numbers = TASKS[task].label_texts(), TASKS[task].label_texts("index")
    written = dict(zip(numbers, names, strict=True)) if style == "name" else {}
    return compute(task, [written.get(guess, guess) for guess in guesses], examples)


@pytest.mark.parametrize(
    ("task", "rows", "guesses", "expected"),
    [
        # Accuracy 2/4; entailment 1/1 of 2, contradiction 1/2 of 1, neutral 0 of 1.
        (
            "cb",
            [{**PREMISES, "label": label} for label in (0, 0, 1, 2)],
            ["0", "1", "1", "no"],
            {"accuracy": 50.0, "macro_f1": 100 * (2 / 3 + 2 / 3 + 0) / 3},
        ),
        # True positives 1, false positives 1 (a stray text is the opposite), none missed.
        (
            "qqp",
            [{"question1": "a", "question2": "b", "label": label} for label in (0, 0, 1)],
            ["stray", "0", "1"],
            {"accuracy": 200 / 3, "f1": 200 / 3},
        ),
        # tp 1, tn 1, fn 1, fp 0.
        (
            "cola",
            [{"sentence": "s", "label": label} for label in (0, 1, 1)],
            ["0", "1", "0"],
            {"matthews": 100 * 1 / (1 * 2 * 1 * 2) ** 0.5},
        ),
    ],
)
@pytest.mark.parametrize("style", ["name", "index"])
def test_a_style_is_judged_by_its_own_labels(task, rows, guesses, expected, style):
    found = scores(task, rows, guesses, style)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("style", "guess"), [("index", "duplicate"), ("name", "1")])
def test_an_answer_in_the_other_style_is_wrong(style, guess):
    row = {"question1": "a", "question2": "b", "label": 1}
    found = compute("qqp", [guess], [TASKS["qqp"].format(row, style)])
    assert (found["accuracy"], found["f1"]) == (0.0, 0.0)


# --- runs ----------------------------------------------------------------------------------------


def train(folder, out, *extra):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--sources": "sst2",
        "--source-steps": 2, "--source-rank": 4, "--batch-size": 4,
    }  # fmt: skip
    return run_cli("train", *(word for pair in options.items() for word in pair), *extra)


def multitask(folder, out, *extra):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--tasks": "sst2,mrpc",
        "--methods": "lora", "--units": 4, "--seeds": 1, "--steps": 2, "--batch-size": 4,
    }  # fmt: skip
    return run_cli("multitask", *(word for pair in options.items() for word in pair), *extra)


STYLE = ("--label-style", "index", "--prefix", "name")


@pytest.mark.parametrize(
    ("command", "place", "default"),
    [(train, "sources/sst2", "none"), (multitask, "lora/seed1", "colon")],
)
def test_runs_record_their_style_and_refuse_another(
    folder, tmp_path, capsys, command, place, default
):
    results = tmp_path / place / "results.json"
    assert command(folder, tmp_path) == 0
    written = json.loads(results.read_text())
    assert (written["request"]["label_style"], written["request"]["prefix"]) == ("name", default)
    for other in (STYLE[:2], STYLE[2:]):
        assert command(folder, tmp_path, *other) == 1
        assert "holds a finished run with other settings" in capsys.readouterr().err
    # Runs of earlier versions say nothing: they are those of the default, and of no other style.
    for key in ("label_style", "prefix", "data"):
        del written["request"][key]
    results.write_text(json.dumps(written))
    assert command(folder, tmp_path) == 0
    assert "label_style" not in json.loads(results.read_text())["request"]  # was not trained again
    assert command(folder, tmp_path, *STYLE) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["label_style"], summary["prefix"]) == ("name", default)


@pytest.mark.parametrize(("command", "place"), [(train, "sources/sst2"), (multitask, "lora/seed1")])
def test_adapters_are_evaluated_in_the_style_of_their_run(
    folder, tmp_path, monkeypatch, command, place
):
    assert command(folder, tmp_path, *STYLE) == 0
    request = json.loads((tmp_path / place / "results.json").read_text())["request"]
    assert (request["label_style"], request["prefix"]) == ("index", "name")
    seen = []

    def judge(task, texts, examples):
        seen.append((examples[0].source.split(" sentence:")[0], examples[0].target in ("0", "1")))
        return {"average": 0.0}

    monkeypatch.setattr(run, "compute", judge)
    words = ["evaluate", "--model", folder / "t5", "--adapters", tmp_path / place,
             "--task", "sst2", "--data", folder]  # fmt: skip
    assert run_cli(*words) == 0
    assert run_cli(*words, "--label-style", "name", "--prefix", "colon") == 0
    assert seen == [("sst2", True), ("sst2:", False)]


def test_old_runs_of_several_tasks_had_the_prefix_with_a_colon(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"request": {"tasks": {"sst2": 4}}}))
    assert run._recorded_style(tmp_path, "sst2") == ("name", "colon")
    (tmp_path / "results.json").write_text(json.dumps({"request": {"task": "sst2"}}))
    assert run._recorded_style(tmp_path, "sst2") == ("name", "none")
    assert run._recorded_style(tmp_path / "none", "sst2") == ("name", "none")


def test_an_unknown_style_ends_the_command_before_anything_is_written(folder, tmp_path, capsys):
    for command in (train, multitask):
        assert command(folder, tmp_path / "out", "--label-style", "digit") != 0
        assert command(folder, tmp_path / "out", "--prefix", "task") != 0
    assert "digit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_request_loads_its_style(folder):
    request = TrainRequest("", ["sst2"], data_dir=folder, label_style="index", prefix="colon")
    task = run.load_task("sst2", request, few_shot=2, limit_train=None)
    assert (task.label_style, task.prefix) == ("index", "colon")
    assert {e.target for e in task.splits.train} == {"0", "1"}
    assert all(e.source.startswith("sst2: sentence: ") for e in task.splits.train)


def test_several_tasks_take_no_second_prefix(folder):
    tasks = {"sst2": load_task("sst2", folder, seed=1, prefix="name")}
    with pytest.raises(ValueError, match="'sst2': its sources must have no prefix yet"):
        encode_tasks(tasks, None, TrainOptions())


@pytest.mark.parametrize(("change", "message"), [
    ({"label_style": "index"}, "another value of label_style: name, not index"),
    ({"prefix": "none"}, "another value of prefix: colon, not none"),
])  # fmt: skip
def test_a_study_is_of_one_style(tmp_path, change, message):
    request = peml_tune.PemlTuneRequest(model="", tasks=["sst2"])
    peml_tune._claim(tmp_path, request, ["sst2"])
    path = tmp_path / peml_tune.REQUEST_FILE
    own = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in own.items() if k not in change}))
    peml_tune._claim(tmp_path, request, ["sst2"])  # as an earlier version left it
    with pytest.raises(ValueError, match=message):
        peml_tune._claim(tmp_path, dataclasses.replace(request, **change), ["sst2"])
