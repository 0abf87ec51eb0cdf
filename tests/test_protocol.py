"""`pemt-fast protocol`: published settings, the plan in its file, the tables, errors."""

import csv
import json
import shutil

import pytest
import torch
from tiny_data import run_cli, write_tiny_data

from pemt_fast.data import SOURCE_TASKS, TARGET_TASKS
from pemt_fast.training import protocol_report, protocol_run
from pemt_fast.training.protocol_methods import METHODS
from pemt_fast.training.protocol_plan import ProtocolRequest, make_runs
from pemt_fast.training.protocol_report import by_benchmark, cell_text

SETTINGS = {
    "--sources": "sst2,cola", "--targets": "mrpc", "--methods": "pemt,plain", "--seeds": "1,2",
    "--few-shot": "4", "--source-steps": 2, "--target-steps": 2, "--source-rank": 4,
    "--source-batch-size": 8, "--target-batch-size": 4, "--eval-every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def run_protocol(folder, out, *more, **changes):
    options = {"--model": folder / "t5", "--data": folder, "--out": out, **SETTINGS}
    options |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return run_cli("protocol", *(word for pair in options.items() for word in pair), *more)


def files(out):
    return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent.name.startswith("seed")}


# --- published settings --------------------------------------------------------------------------


def runs_of(**changes):
    return {run.name: run for run in make_runs(ProtocolRequest(**{"model": "t5", **changes}))}


def options_of(name, **changes):
    return runs_of(**changes)[name].request["options"]


def test_default_plan_is_the_published_one():
    runs = runs_of()
    assert list(runs)[:6] == [f"sources/{name}" for name in SOURCE_TASKS]
    # 17 targets, 3 seeds, 3 shot numbers, two trained methods; the plain model once per target.
    assert len(runs) == 6 + 17 + 17 * 3 * 3 * 2
    assert runs["pemt/16-shot/cola/seed2"].needs == tuple(f"sources/{n}" for n in SOURCE_TASKS)
    assert runs["single/4-shot/rte/seed3"].needs == () == runs["plain/paws"].needs
    assert runs["sources/mnli"].needs == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sources/mnli", {"learning_rate": 5e-4, "epochs": 5, "warmup_steps": 500,
                          "batch_size": 128, "seed": 42}),
        ("sources/squad", {"batch_size": 256}),
        ("sources/record", {"batch_size": 256, "warmup_steps": 500}),
        ("pemt/all/cb/seed1", {"learning_rate": 3e-4, "epochs": 20, "warmup_steps": 0,
                               "batch_size": 32, "seed": 1}),
        ("pemt/all/wsc/seed1", {"batch_size": 32}),
        ("pemt/all/multirc/seed1", {"batch_size": 64, "epochs": 10}),
        ("pemt/all/boolq/seed1", {"batch_size": 64}),
        ("pemt/all/rte/seed1", {"batch_size": 64, "epochs": 20}),
        ("pemt/all/hotpotqa/seed1", {"batch_size": 32, "epochs": 5}),
        ("pemt/all/yelp_polarity/seed1", {"batch_size": 100, "epochs": 20}),
        ("pemt/8-shot/cb/seed1", {"learning_rate": 3e-4, "batch_size": 8, "epochs": 20,
                                  "max_source_length": 256}),
        ("pemt/8-shot/multirc/seed1", {"batch_size": 8, "epochs": 20, "max_source_length": 256}),
        ("adapter/8-shot/cb/seed1", {"learning_rate": 1e-3}),
        ("lora/8-shot/cb/seed1", {"learning_rate": 6e-4}),
        ("prompt_tuning/8-shot/cb/seed1", {"learning_rate": 0.3}),
        ("single/8-shot/cb/seed1", {"learning_rate": 3e-4}),
    ],
)  # fmt: skip
def test_published_settings(name, expected):
    options = options_of(name, methods=tuple(METHODS), shots=(None, 8))
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"source_steps": 40}, "sources/mnli", {"steps": 40, "warmup_steps": 4}),
        ({"source_steps": 40, "source_warmup": 7}, "sources/mnli", {"warmup_steps": 7}),
        ({"source_steps": 9000}, "sources/mnli", {"warmup_steps": 500}),
        ({"source_lr": 0.1}, "sources/mnli", {"learning_rate": 0.1}),
        ({"target_lr": 0.1}, "pemt/4-shot/cb/seed1", {"learning_rate": 0.1}),
        ({"rates": {"pemt": 0.2}}, "pemt/4-shot/cb/seed1", {"learning_rate": 0.2}),
        ({"rates": {"pemt": 0.2}}, "single/4-shot/cb/seed1", {"learning_rate": 3e-4}),
        ({"target_batch_size": 5}, "pemt/4-shot/cb/seed1", {"batch_size": 5}),
        ({"max_source_length": 99}, "pemt/4-shot/cb/seed1", {"max_source_length": 99}),
    ],
)
def test_settings_can_be_changed(changes, name, expected):
    options = options_of(name, **changes)
    assert {key: options[key] for key in expected} == expected


def test_columns_are_grouped_by_benchmark():
    assert by_benchmark(TARGET_TASKS) == list(TARGET_TASKS)
    assert by_benchmark(["paws", "nq", "cb", "rte"]) == ["rte", "cb", "nq", "paws"]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A directory of a plan that was worked off; copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_protocol(folder, out) == 0
    return out


@pytest.fixture
def done(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def test_tables(finished):
    results = json.loads((finished / "results.json").read_text())
    row = results["tables"]["4-shot"]["pemt"]
    runs = [finished / f"pemt/4-shot/mrpc/seed{seed}" for seed in (1, 2)]
    scores = [json.loads((run / "results.json").read_text()) for run in runs]
    assert row["cells"]["mrpc"]["scores"] == {
        str(s): r["test"]["average"] for s, r in zip((1, 2), scores, strict=True)
    }
    assert row["trainable_parameters"] == scores[0]["trainable_parameters"]
    assert row["metrics"]["mrpc"]["1"] == scores[0]["test"]
    text = (finished / "results.md").read_text()
    assert "| method | GLUE<br>mrpc | average | trained parameters | seconds |" in text
    assert "| PEMT | " in text and "| plain model | " in text and "| sst2 | 36 | 12 |" in text
    with (finished / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(r["method"], r["target"], r["seeds"]) for r in rows] == [
        ("pemt", "mrpc", "2"), ("pemt", "average", "2"),
        ("plain", "mrpc", "1"), ("plain", "average", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "planned", "text"),
    [
        ({}, 3, "–"),
        ({1: 50.0}, 3, "50.0 (1 of 3 seeds)"),
        ({1: 50.0, 2: 52.0}, 3, "51.0 ± 1.4 (2 of 3 seeds)"),
        ({1: 50.0, 2: 52.0, 3: 54.0}, 3, "52.0 ± 2.0"),
        ({None: 50.0}, 1, "50.0"),
    ],
)
def test_cells(scores, planned, text):
    assert cell_text(protocol_report._cell(scores, planned)) == text


def test_average_needs_all_targets_of_a_seed():
    def run(score):
        return {"test": {"average": score}, "trainable_parameters": 10, "seconds": 1.0}

    found = {"cb": {1: run(50), 2: run(60)}, "rte": {1: run(70)}}
    row = protocol_report._row(found, [1, 2])
    assert row["average"]["scores"] == {"1": 60}
    assert protocol_report._row({"cb": {1: run(50)}, "rte": {}}, [1])["average"]["mean"] is None


def test_partial_table_of_what_is_finished(done, capsys):
    shutil.rmtree(done / "pemt/4-shot/mrpc/seed2")
    assert run_cli("protocol", "--out", done, "--report") == 0
    shown = capsys.readouterr().out
    assert "(1 of 2 seeds)" in shown and "1 of 5 runs are not done" in shown
    shutil.rmtree(done / "pemt")
    assert run_cli("protocol", "--out", done, "--report") == 0
    assert "| PEMT | – | – | – | – |" in capsys.readouterr().out


def test_the_same_command_trains_nothing_again(folder, done, monkeypatch, capsys):
    before = files(done)
    assert before
    monkeypatch.setattr(protocol_run, "load_backbone", lambda name: pytest.fail("model was loaded"))
    assert run_protocol(folder, done) == 0
    assert run_cli("protocol", "--out", done) == 0
    assert files(done) == before
    assert "| PEMT |" in capsys.readouterr().out


def test_a_plan_can_be_extended(folder, done):
    before = files(done)
    assert run_protocol(folder, done, targets="rte,mrpc", seeds="1,2", few_shot="4,all") == 0
    assert {p: t for p, t in files(done).items() if p in before} == before
    results = json.loads((done / "results.json").read_text())
    assert list(results["tables"]) == ["4-shot", "all"]
    assert list(results["tables"]["all"]["pemt"]["cells"]) == ["rte", "mrpc"]
    assert {run["state"] for run in results["runs"].values()} == {"done"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_lr": 0.1}, "source_lr is 0.0005 there, got 0.1"),
        ({"sources": "sst2"}, "sources is ['sst2', 'cola'] there, got ['sst2']"),
        ({"targets": "rte"}, "targets has ['mrpc'] there, which are not asked for"),
        ({"seeds": "2,3"}, "seeds has [1] there, which are not asked for"),
    ],
)
def test_another_plan_is_refused(folder, finished, capsys, changes, message):
    plan = (finished / "plan.json").read_text()
    assert run_protocol(folder, finished, **changes) == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert "holds another plan" in error and message in error
    assert (finished / "plan.json").read_text() == plan


def test_plan_shows_states_and_writes_nothing(folder, done, tmp_path, capsys):
    assert run_protocol(folder, tmp_path / "new", "--plan") == 0
    assert "5 runs: 5 waiting; 8 updates" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    shutil.rmtree(done / "pemt/4-shot/mrpc/seed2")
    assert run_cli("protocol", "--out", done, "--plan") == 0
    shown = capsys.readouterr().out
    assert "4 done, 1 waiting; 8 updates; about 0 min of one worker left" in shown


def test_a_failed_run_is_reported_and_tried_again(folder, tmp_path, monkeypatch, capsys):
    train, out = protocol_run.train_run, tmp_path / "out"

    def fail(place, plan, run, **options):
        if run.name == "sources/cola":
            raise ValueError("a broken disk")
        return train(place, plan, run, **options)

    monkeypatch.setattr(protocol_run, "train_run", fail)
    assert run_protocol(folder, out, seeds="1") == 1
    shown = capsys.readouterr()
    assert "2 runs are not done: sources/cola, pemt/4-shot/mrpc/seed1" in shown.err
    assert "* sources/cola failed: ValueError: a broken disk" in shown.out
    assert "* pemt/4-shot/mrpc/seed1: not run, a run that it needs has failed" in shown.out
    states = json.loads((out / "results.json").read_text())["runs"]
    assert states["plain/mrpc"]["state"] == states["sources/sst2"]["state"] == "done"
    monkeypatch.setattr(protocol_run, "train_run", train)
    # A worker that joins leaves it, the command itself tries again.
    assert run_cli("protocol", "--out", out, "--join") == 1
    assert run_protocol(folder, out, seeds="1") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": "sst"}, "unknown task 'sst'"),
        ({"methods": "pmt"}, "methods must be among pemt, "),
        ({"model": "no/such/model"}, "'no/such/model' is neither a directory with a T5"),
        ({"targets": "cb,wic"}, "wic: no data of task 'wic'"),
        ({"targets": "cb,wic"}, "cb: no data of task 'cb'"),
        ({"few_shot": "999"}, "999"),
        ({"few_shot": "0"}, "shots must be at least 1, or None for all data, got 0"),
        ({"source_rank": "0"}, "source_rank must be at least 1, got 0"),
        ({"source_lr": "-1"}, "learning_rate must be positive"),
        ({"seeds": "1,1"}, "seeds must name different ones"),
        ({"rate": "pemt"}, "--rate must be method=value, got 'pemt'"),
        ({"rate": "nothing=1"}, "methods must be among"),
        ({"workers": "0"}, "workers must be at least 1, got 0"),
        ({"limit_eval": "0"}, "limit_eval must be at least 1, got 0"),
    ],
)
def test_bad_requests_end_before_anything_is_written(folder, tmp_path, capsys, changes, message):
    out = tmp_path / "out"
    assert run_protocol(folder, out, **changes) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 0, []), (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-1f,GPU-2", 1, ["GPU-1f"])],
)
def test_each_gpu_has_a_name_for_a_worker(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert protocol_run._gpus() == expected


def test_joining_takes_no_settings(finished, tmp_path, capsys):
    assert run_cli("protocol", "--out", finished, "--join", "--seeds", "1") == 1
    assert "--seeds belongs to a new plan" in capsys.readouterr().err
    assert run_cli("protocol", "--out", tmp_path / "none", "--join") == 1
    assert "plan.json" in capsys.readouterr().err
    assert run_cli("protocol", "--out", tmp_path / "none", "--report") == 1
    assert "holds no plan.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_all_methods_train(folder, tmp_path):
    methods = ",".join(METHODS)
    assert run_protocol(folder, tmp_path, methods=methods, seeds="1", limit_eval=4) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["tables"]["4-shot"]
    trained = {name: row["trainable_parameters"] for name, row in rows.items()}
    assert list(trained) == list(METHODS) and trained["plain"] == 0
    assert trained["pemt_frozen_norms"] < trained["pemt"] == trained["pemt_no_sparsity"]
    assert max(trained, key=trained.get) == "full"
    config = json.loads((tmp_path / "pemt_no_sparsity/4-shot/mrpc/seed1/results.json").read_text())
    assert config["config"]["aux_weight"] == 0
    config = json.loads(
        (tmp_path / "pemt_random_prompt/4-shot/mrpc/seed1/results.json").read_text()
    )
    assert config["config"]["prompt_init"] == "normal"
