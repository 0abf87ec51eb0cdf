"""Both stages end to end on a tiny T5 and made-up rows: files, resume, errors before training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import run_cli, write_tiny_data
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

from pemt_fast import load
from pemt_fast.data import SYNTHETIC_TASKS, Splits, make_examples, synthetic_tokenizer
from pemt_fast.ops import extension
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.stages import Backbone, TaskData, train_source, train_target
from pemt_fast.training.trainer import AdapterTrainer, last_complete_checkpoint
from pemt_fast.variables import VARIABLES

OPTIONS = TrainOptions(
    learning_rate=1e-2, steps=6, eval_every=2, batch_size=8, eval_batch_size=16, progress=False
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    tokenizer = synthetic_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1,
        num_decoder_layers=1, decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config)
    return Backbone(lambda: t5, tokenizer, "tiny")


def data(name, train=24):
    task = SYNTHETIC_TASKS[name]
    parts = (make_examples(name, train, 0, split="train"),)
    parts += tuple(make_examples(name, 16, 0, split=s) for s in ("validation", "test"))
    return TaskData(name, task.description, Splits(*parts), task.metrics)


def sources(backbone, folder):
    paths = [folder / name for name in ("reverse", "shift")]
    for path in paths:
        train_source(backbone, data(path.name), OPTIONS, path, rank=4)
    return paths


def test_two_stages(backbone, tmp_path):
    paths = sources(backbone, tmp_path)
    results = train_target(backbone, data("reverse"), paths, OPTIONS, tmp_path / "target")
    assert sorted(p.name for p in (tmp_path / "target").iterdir()) == [
        "gates.png", "pemt_fast_config.json", "pemt_fast_model.safetensors", "results.json",
    ]  # fmt: skip
    assert results == json.loads((tmp_path / "target" / "results.json").read_text())
    assert set(results["gate"]) == {"reverse", "shift"}
    assert sum(results["gate"].values()) == pytest.approx(1)
    assert list(results["gates"]) == ["encoder.0", "decoder.0"]
    assert results["steps"] == 6 and results["best_step"] in (2, 4, 6)
    assert set(results["test"]) >= {"token_accuracy", "accuracy", "average"}
    loss = [entry["loss"] for entry in results["loss"]]
    assert loss[-1] < loss[0]
    # The backbone is as it was, and the saved adapters attach to it again.
    t5 = backbone.make()
    assert not hasattr(t5, "_pemt_fast_attached")
    adapted = load(t5, tmp_path / "target")
    assert adapted.adapter_config.sources == ("reverse", "shift")
    adapted.unload()


def test_finished_runs_are_skipped_and_other_settings_refused(backbone, tmp_path):
    first = train_source(backbone, data("sort"), OPTIONS, tmp_path / "s", rank=4)
    assert train_source(backbone, data("sort"), OPTIONS, tmp_path / "s", rank=4) == first
    with pytest.raises(ValueError, match="holds a finished run with other settings"):
        train_source(backbone, data("sort"), OPTIONS, tmp_path / "s", rank=5)


class Killed(Exception):
    pass


def test_resume_after_a_kill_gives_the_same_weights(backbone, tmp_path, monkeypatch):
    # The best checkpoint may be older than the kill: compare the weights of the last step instead.
    monkeypatch.setattr(AdapterTrainer, "_load_best_model", lambda self: None)
    whole = train_source(backbone, data("sort"), OPTIONS, tmp_path / "whole", rank=4)

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    original = AdapterTrainer.__init__

    def with_kill(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "__init__", with_kill)
        with pytest.raises(Killed):
            train_source(backbone, data("sort"), OPTIONS, tmp_path / "killed", rank=4)
    checkpoints = tmp_path / "killed" / "checkpoints"
    saved = checkpoints / "checkpoint-4"
    names = load_file(saved / "pemt_fast_model.safetensors").keys()
    assert names and not any("shared" in n or ".base." in n for n in names)
    assert not (saved / "model.safetensors").exists()
    # What a kill during saving leaves behind is not resumed from.
    shutil.copytree(saved, checkpoints / "checkpoint-5")
    (checkpoints / "checkpoint-5" / "trainer_state.json").unlink()

    with pytest.raises(ValueError, match="holds an interrupted run with other settings"):
        train_source(backbone, data("sort"), OPTIONS, tmp_path / "killed", rank=5)
    again = train_source(backbone, data("sort"), OPTIONS, tmp_path / "killed", rank=4)
    assert again["resumed"] and not whole["resumed"]
    assert not checkpoints.exists()
    expected = load_file(tmp_path / "whole" / "pemt_fast_model.safetensors")
    for name, tensor in load_file(tmp_path / "killed" / "pemt_fast_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert again["test"] == whole["test"]


PARTS = [
    "pemt_fast_config.json", "pemt_fast_model.safetensors", "trainer_state.json", "optimizer.pt",
    "scheduler.pt", "rng_state.pth",
]  # fmt: skip


@pytest.mark.parametrize("missing", [*PARTS, "end of the state"])
def test_last_complete_checkpoint(tmp_path, missing):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for part in PARTS:
            (folder / part).write_text("{}")
    if missing in PARTS:
        (folder / missing).unlink()
    else:
        (folder / "trainer_state.json").write_text('{"best_metric": 0.')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not folder.exists()


def test_checkpointed_training_runs(backbone, tmp_path):
    from dataclasses import replace

    options = replace(OPTIONS, gradient_checkpointing=True, steps=2)
    paths = sources(backbone, tmp_path)
    assert train_target(backbone, data("reverse"), paths, options, tmp_path / "t")["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


def test_empty_part_writes_nothing(backbone, tmp_path):
    empty = data("sort")
    empty.splits.validation.clear()
    with pytest.raises(ValueError, match="the validation part is empty"):
        train_source(backbone, empty, OPTIONS, tmp_path / "s", rank=4)
    assert not (tmp_path / "s").exists()


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("real"))


def train_arguments(folder, out, **changes):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--sources": "sst2",
        "--target": "mrpc", "--few-shot": 4, "--source-steps": 3, "--target-steps": 3,
        "--source-rank": 4, "--batch-size": 4, **changes,
    }  # fmt: skip
    return ["train", *(word for pair in options.items() for word in pair)]


def test_train_and_evaluate_commands(real_shape, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_cli(*train_arguments(real_shape, out), "--baseline") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["targets"]["mrpc"]["scores"]) == {
        "PEMT",
        "single adapter",
        "untouched model",
    }
    assert "| PEMT |" in (out / "summary.md").read_text()
    assert (out / "single" / "mrpc" / "results.json").is_file()
    assert "gate weight per source" in capsys.readouterr().out
    scored = ["--model", real_shape / "t5", "--data", real_shape, "--task", "mrpc"]
    assert run_cli("evaluate", "--adapters", out / "targets" / "mrpc", *scored) == 0
    expected = summary["targets"]["mrpc"]["scores"]["PEMT"]["accuracy"]
    assert f"{expected:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--sources": "sst"}, "unknown task 'sst'"),
        ({"--model": "no/such/model"}, "'no/such/model' is neither a directory with a T5"),
        ({"--data": "no-such-folder"}, "no-such-folder"),
        ({"--target": "cb"}, "super_glue__cb"),
        ({"--few-shot": 999}, "999"),
        ({"--source-rank": 0}, "source_rank must be at least 1, got 0"),
        ({"--source-lr": -1}, "learning_rate must be positive"),
    ],
)
def test_bad_requests_end_before_anything_is_written(
    real_shape, tmp_path, capsys, changes, message
):
    out = tmp_path / "out"
    assert run_cli(*train_arguments(real_shape, out, **changes)) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"sentence1": "a", "sentence2": "b", "label": 7, "idx": 0}\n', "7"),
        ('{"sentence1": "a", "label": 0, "idx": 0}\n', "sentence2"),
        ("{not json}\n", "train.jsonl"),
        ("", "train.jsonl"),
    ],
    ids=["unknown-label", "missing-column", "bad-json", "empty"],
)
def test_bad_rows_end_before_anything_is_written(real_shape, tmp_path, capsys, row, message):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(real_shape, folder)
    (folder / "glue__mrpc" / "train.jsonl").write_text(row)
    assert run_cli(*train_arguments(folder, out)) == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert message in error and "mrpc" in error
    assert not out.exists()


def test_info_lists_reasons(capsys):
    assert run_cli("info", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    taken = "cpu" if values["extension"]["built"] else "torch"
    assert set(values["auto"]["cpu"].values()) == {taken}
    assert values["unavailable"]["cpu"]["torch"] == []
    assert any("x is on cpu" in why for why in values["unavailable"]["cpu"]["cuda"])


def test_info_shows_every_variable(capsys, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", "torch")
    monkeypatch.setenv("PEMT_FAST_COLOUR", "red")
    assert run_cli("info", "--json") == 0
    shown = json.loads(capsys.readouterr().out)["variables"]
    assert shown["PEMT_FAST_IMPL"]["value"] == "torch"
    assert shown["PEMT_FAST_DEBUG"]["value"] is None
    assert "unknown" in shown["PEMT_FAST_COLOUR"]["meaning"]
    # Nothing reads a variable that is not listed.
    root = Path(__file__).parents[1]
    files = [root / "setup.py"]
    for folder in ("pemt_fast", "kernels", "csrc"):
        files += [p for p in (root / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    read = {
        name
        for path in files
        if path.name != "variables.py"
        for name in re.findall(r'(?:environ[^\n]*|getenv\()"(PEMT_FAST_[A-Z_]+)"', path.read_text())
    }
    assert read == set(VARIABLES)


def test_info_shows_the_extension_or_why_there_is_none(capsys):
    assert run_cli("info", "--json") == 0
    shown = json.loads(capsys.readouterr().out)["extension"]
    assert shown["built"] == (shown["why_not"] is None)
    assert shown["why_not"] == extension.missing_reason()
    if shown["built"]:
        assert shown["instruction_set"] in shown["instruction_sets"]
