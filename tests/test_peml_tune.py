"""`pemt-fast tune-peml`: trials on validation scores, the best values trained and tested."""

import json

import pytest
from tiny_data import run_cli, write_tiny_data
from transformers import AutoModelForSeq2SeqLM

import pemt_fast
from pemt_fast.training import multi_task_data, peml_tune

pytest.importorskip("optuna", reason="optuna is in the extra search")
FIXED = {
    "prefix_depth": [1], "prefix_width": [8], "sharing": ["network"], "operator_rank": [2],
    "architecture_learning_rate": [0.05],
}  # fmt: skip
SPACE = {**FIXED, "prefix_length": [2, 4], "r": [2, 4], "learning_rate": [1e-3, 1e-1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("real"))


def command(folder, out, space=SPACE, **changes):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--tasks": "sst2,mrpc",
        "--space": json.dumps(space), "--trials": 3, "--seeds": "1,2", "--steps": 2,
        "--batch-size": 4, **changes,
    }  # fmt: skip
    return ["tune-peml", *(word for pair in options.items() for word in pair)]


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run_cli(*command(folder, out)) == 0
    return out


def read(out):
    return json.loads((out / "tuning.json").read_text())


def test_the_best_values_are_trained_and_tested(tuned):
    found = read(tuned)
    trials = found["study"]["trials"]
    assert len(trials) == 3 and {t["state"] for t in trials} <= {"complete", "pruned"}
    best = max((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
    assert (found["study"]["value"], found["study"]["values"]) == (best["value"], best["values"])
    assert len(found["runs"]) == len(found["means"]) == 2
    for seed, run in zip((1, 2), found["runs"], strict=True):
        saved = json.loads((tuned / "best" / f"seed{seed}" / "results.json").read_text())
        assert run == saved and run["seed"] == seed and "search" in run
        config = run["request"]["config"]
        for name in ("prefix_length", "r", "prefix_depth", "sharing"):
            assert config[name] == best["values"][name]
        assert config["alpha"] == config["r"]
        rate = run["request"]["options"]["learning_rate"]
        assert rate == best["values"]["learning_rate"]
        assert set(run["scores"]) == {"sst2", "mrpc"}


def test_the_same_command_goes_on(folder, tuned):
    before = read(tuned)
    assert run_cli(*command(folder, tuned, **{"--trials": 4})) == 0
    after = read(tuned)
    assert after["study"]["trials"][:3] == before["study"]["trials"]
    assert len(after["study"]["trials"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--steps": 3}, "another value of options"),
        ({"--tasks": "mrpc,sst2"}, "another value of tasks: ['sst2', 'mrpc'], not"),
        ({"--targets": "q"}, "another value of target_modules: all-linear, not ['q']"),
        ({"--seeds": "2,1"}, "another value of seed: 1, not 2"),
        ({"space": {**SPACE, "r": [8]}}, "space must be that of study 'peml', where r is [2, 4]"),
    ],
)
def test_scores_of_something_else_do_not_join_a_study(folder, tuned, capsys, changes, message):
    space = changes.pop("space", SPACE)
    assert run_cli(*command(folder, tuned, space, **changes)) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_trials_see_the_validation_part_and_end_early(folder, tmp_path, monkeypatch):
    """Reported in the search, returned after the training anew: all on validation rows."""
    parts, searched = [], []

    def score_tasks(model, tokenizer, tasks, rows, *, part, **options):
        for name, own in rows.items():
            assert len(own) == len(getattr(tasks[name].splits, part))
        parts.append(part)
        searched.append(model.adapter_config.searches)
        # Ever worse: from the sixth on trials are worse than the median after their search.
        return {name: {"average": 50.0 - len(parts)} for name in rows}

    monkeypatch.setattr(peml_tune, "score_tasks", score_tasks)
    words = [*command(folder, tmp_path, **{"--trials": 8}), "--only-trials"]
    assert run_cli(*words) == 0
    assert set(parts) == {"validation"}
    assert not (tmp_path / "best").exists() and not (tmp_path / "tuning.json").exists()
    # Twice in each search; only the first five, before which nothing is pruned, train anew.
    assert (searched.count(True), searched.count(False)) == (16, 5)


def test_no_network_needs_no_search(folder, tmp_path):
    space = {**SPACE, "prefix_depth": [0]}
    assert run_cli(*command(folder, tmp_path, space, **{"--trials": 1, "--seeds": 1})) == 0
    (run,) = read(tmp_path)["runs"]
    assert "search" not in run and run["request"]["config"]["prefix_depth"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--space": "{"}, "--space must be a JSON object or a file of one"),
        ({"--space": "nowhere.json"}, "nowhere.json"),
        ({"--space": '{"ranks": [2]}'}, "unknown HyperSpace keys ['ranks']"),
        ({"--tasks": ""}, "tasks must hold at least one value, all different, got []"),
        ({"--tasks": "sst"}, "unknown task 'sst'"),
        ({"--seeds": "1,1"}, "seeds must hold at least one value, all different"),
    ],
)
def test_bad_requests_end_before_anything_is_written(folder, tmp_path, capsys, changes, message):
    assert run_cli(*command(folder, tmp_path / "out", **changes)) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_the_space_may_be_a_file(folder, tmp_path):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(SPACE))
    changes = {"--space": path, "--trials": 1, "--seeds": 1}
    assert run_cli(*command(folder, tmp_path / "out", **changes)) == 0
    assert read(tmp_path / "out")["space"]["prefix_length"] == [2, 4]
    t5 = AutoModelForSeq2SeqLM.from_pretrained(folder / "t5")
    model = pemt_fast.load(t5, tmp_path / "out" / "best" / "seed1")
    assert model.adapter_config.prefix_length in (2, 4)


def test_a_part_without_examples_is_refused(folder):
    task = multi_task_data.load_task("sst2", folder, seed=42)
    task.splits.validation.clear()
    with pytest.raises(ValueError, match="task 'sst2': the validation part is empty"):
        multi_task_data.encode_tasks({"sst2": task}, None, None, "validation")
