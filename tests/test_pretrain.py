"""Pretraining from plain text: the objective, the tokenizer, the run and the folder it leaves."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5ForConditionalGeneration

from pemt_fast.data.span_corruption import (
    EOS_ID,
    MIN_VOCAB_SIZE,
    SENTINELS,
    TaskBatches,
    TextBatches,
    block_length,
    corrupted_lengths,
    span_corruption,
    train_tokenizer,
)
from pemt_fast.training import pretrain_files, pretrain_run
from pemt_fast.training.pretrain import PretrainConfig, pretrain

FIRST_TOKEN = 1000  # far from the sentinels 900 … 999
SENTINEL_IDS = range(999, 899, -1)
TINY = PretrainConfig(
    d_model=32,
    d_ff=64,
    num_heads=2,
    layers=1,
    decoder_layers=1,
    vocab_size=500,
    steps=30,
    batch_size=8,
    sequence_length=32,
    precision="fp32",
    lr=1e-2,
    checkpoint_every=10,
)

lengths = st.integers(2, 300)
densities = st.floats(0.02, 0.9)
mean_spans = st.floats(1.0, 8.0)
seeds = st.integers(0, 2**32 - 1)


def corrupt(length, seed=0, **options):
    ids = list(range(FIRST_TOKEN, FIRST_TOKEN + length))
    options.setdefault("sentinels", list(range(999, 599, -1)))
    return ids, *span_corruption(ids, np.random.default_rng(seed), **options)


def sentinels_in(ids):
    return [i for i in ids if EOS_ID < i < FIRST_TOKEN]


# --- the objective -------------------------------------------------------------------------------


@settings(max_examples=80)
@given(lengths, densities, mean_spans, seeds)
def test_filling_the_sentinels_gives_the_text_back(length, density, mean_span, seed):
    ids, inputs, targets = corrupt(length, seed, density=density, mean_span=mean_span)
    hidden, sentinel = {}, None
    for token in targets[:-1]:
        if token < FIRST_TOKEN:
            sentinel = token
            hidden[sentinel] = []
        else:
            hidden[sentinel].append(token)
    filled = [t for token in inputs[:-1] for t in hidden.get(token, [token])]
    assert filled == ids
    assert all(hidden.values())


@settings(max_examples=80)
@given(lengths, densities, mean_spans, seeds)
def test_sentinels_come_in_order_and_never_side_by_side(length, density, mean_span, seed):
    _, inputs, targets = corrupt(length, seed, density=density, mean_span=mean_span)
    used = sentinels_in(inputs)
    assert used == sentinels_in(targets) == list(range(999, 999 - len(used), -1))
    assert not any(a < FIRST_TOKEN and b < FIRST_TOKEN for a, b in zip(inputs, inputs[1:-1]))  # noqa: B905


@settings(max_examples=80)
@given(lengths, densities, mean_spans, seeds)
def test_lengths_depend_on_the_length_alone(length, density, mean_span, seed):
    options = {"density": density, "mean_span": mean_span}
    _, inputs, targets = corrupt(length, seed, **options)
    assert (len(inputs), len(targets)) == corrupted_lengths(length, **options)
    assert inputs[-1] == targets[-1] == EOS_ID


@settings(max_examples=80)
@given(lengths, densities, mean_spans)
def test_density_and_span_length_are_met_to_rounding(length, density, mean_span):
    _, _, targets = corrupt(length, density=density, mean_span=mean_span)
    spans = len(sentinels_in(targets))
    hidden = len(targets) - 1 - spans
    assert abs(hidden - length * density) <= 0.5 or hidden in (1, length - 1)
    assert abs(spans - hidden / mean_span) <= 0.5 or spans in (1, length - hidden)


def test_published_numbers_of_t5():
    # 568 tokens fill 512 inputs and 114 targets in T5's own configuration.
    assert block_length(512) == 568
    assert corrupted_lengths(568) == (512, 114)


@pytest.mark.parametrize("sequence_length", [8, 31, 128])
def test_block_length_is_the_longest_that_fits(sequence_length):
    length = block_length(sequence_length)
    assert corrupted_lengths(length)[0] <= sequence_length < corrupted_lengths(length + 1)[0]


def test_every_place_but_the_first_is_hidden_sometimes():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        inputs, _ = span_corruption(
            range(FIRST_TOKEN, FIRST_TOKEN + 20), rng, sentinels=SENTINEL_IDS, density=0.3
        )
        seen |= set(range(FIRST_TOKEN, FIRST_TOKEN + 20)) - set(inputs)
    assert seen == set(range(FIRST_TOKEN + 1, FIRST_TOKEN + 20))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {}, "ids must hold at least 2 tokens, got 1"),
        (9, {"density": 0.0}, "density must be between 0 and 1, both excluded, got 0.0"),
        (9, {"density": 1.0}, "density must be between 0 and 1, both excluded, got 1.0"),
        (9, {"mean_span": 0.5}, "mean_span must be at least 1, got 0.5"),
        (100, {"sentinels": [7, 6]}, "100 tokens give 5 spans, got 2 sentinels"),
    ],
)
def test_span_corruption_refuses(length, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(length, **options)


# --- batches -------------------------------------------------------------------------------------


def text_batches(blocks=23, batch_size=5, **options):
    length = block_length(16)
    ids = np.arange(FIRST_TOKEN, FIRST_TOKEN + blocks * length + 3)
    return length, TextBatches(
        ids, SENTINEL_IDS, **{"batch_size": batch_size, "sequence_length": 16, "seed": 0, **options}
    )


def blocks_of(batch, length):
    return [(min(row[row >= FIRST_TOKEN]) - FIRST_TOKEN) // length for row in batch["input_ids"]]


def test_every_block_comes_once_per_epoch_and_held_out_ones_never():
    length, text = text_batches(blocks=23)  # one is held out, 22 blocks are 4.4 batches
    drawn = [block for number in range(22) for block in blocks_of(text.batch(number), length)]
    (held_out,) = [block for batch in text.held_out() for block in blocks_of(batch, length)]
    expected = sorted(set(range(23)) - {held_out})
    epochs = [drawn[i : i + 22] for i in range(0, len(drawn), 22)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 5
    assert epochs[0] != epochs[1]


def test_batch_number_decides_what_is_in_it():
    _, text = text_batches()
    again = text_batches()[1].batch(7)
    assert all((text.batch(7)[name] == again[name]).all() for name in again)
    other = text_batches(seed=1)[1].batch(7)
    assert not (other["input_ids"] == again["input_ids"]).all()


def test_text_batches_need_no_padding():
    _, text = text_batches()
    batch = text.batch(0)
    assert batch["input_ids"].shape == (5, 16)
    assert batch["attention_mask"].min() == 1 and batch["labels"].min() >= EOS_ID


def test_task_batches_pad_only_at_the_end_and_draw_every_row():
    rows = [
        {"input_ids": [n + 3] * n + [1], "attention_mask": [1] * (n + 1), "labels": [n + 3, 1]}
        for n in range(1, 31)
    ]
    task = TaskBatches(rows, batch_size=4, seed=0)
    drawn, padding = set(), 0
    for number in range(60):
        batch = task.batch(number)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = rows[ids[0] - 4]
            assert ids.tolist() == row["input_ids"] + [0] * (len(ids) - len(row["input_ids"]))
            assert mask.tolist() == (ids != 0).tolist()
            drawn.add(int(ids[0]))
            padding += int((ids == 0).sum())
    assert drawn == {row["input_ids"][0] for row in rows}
    assert padding < 60 * 4 * 3  # random batches would have about 8 per row


def test_task_labels_are_ignored_where_padded():
    rows = [{"input_ids": [5, 1], "attention_mask": [1, 1], "labels": [9] * n} for n in (1, 3)]
    labels = TaskBatches(rows, batch_size=8, seed=0).batch(0)["labels"]
    assert {tuple(row) for row in labels.tolist()} <= {(9, -100, -100), (9, 9, 9)}


# --- the tokenizer -------------------------------------------------------------------------------

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "She said: \"It's 3.5 km, isn't it?\" -- and left  (two spaces).",
    "Café, naïve, 10 €, 日本",
    "positive",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "house", "river"], ["sees", "likes", "follows"]
    return [
        f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} today ."
        for _ in range(400)
    ]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 480).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_special_ids_are_those_of_t5(tokenizer):
    names = ["<pad>", "</s>", "<unk>", "<extra_id_99>", "<extra_id_0>"]
    size = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, size - 100, size - 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_vocabulary_has_the_size_asked_for(texts):
    assert len(train_tokenizer([*texts, *ENGLISH * 9], 400)) == 400


@pytest.mark.parametrize("text", ENGLISH)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids.count(EOS_ID) == 1 and ids[-1] == EOS_ID
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_word_has_the_same_ids_at_the_start_and_inside(tokenizer):
    alone = tokenizer("follows", add_special_tokens=False)["input_ids"]
    inside = tokenizer("the dog follows", add_special_tokens=False)["input_ids"]
    assert inside[-len(alone) :] == alone


def test_sentinels_are_single_tokens(tokenizer):
    ids = tokenizer("".join(SENTINELS), add_special_tokens=False)["input_ids"]
    assert ids == list(range(len(tokenizer) - 1, len(tokenizer) - 101, -1))


def test_tokenizer_refuses_a_vocabulary_without_room():
    with pytest.raises(ValueError, match=f"vocab_size must be at least {MIN_VOCAB_SIZE}, got 300"):
        train_tokenizer(["a"], 300)


# --- the run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n".join(texts) + "\n\n")
    return path


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    """An uninterrupted run: its folder and its record."""
    folder = tmp_path_factory.mktemp("run") / "t5"
    return folder, pretrain([text_file], folder, TINY, progress=False)


def weights(folder):
    return T5ForConditionalGeneration.from_pretrained(folder).state_dict()


def run_until(step, monkeypatch, *args, **kwargs):
    """Start a pretraining that is interrupted just before `step`."""
    real = pretrain_run.PretrainRun._step

    def interrupted(self, number):
        if number == step:
            raise KeyboardInterrupt
        return real(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain_run.PretrainRun, "_step", interrupted)
        pretrain(*args, progress=False, **kwargs)


def test_loss_falls(finished):
    curve = finished[1]["loss_curve"]
    assert [point["step"] for point in curve] == list(range(1, 31))
    first, last = (np.mean([p["text_loss"] for p in part]) for part in (curve[:3], curve[-3:]))
    assert last < first - 1.0
    assert abs(finished[1]["held_out_loss"] - last) < 0.5


def test_finished_folder_is_complete(finished):
    folder, record = finished
    assert json.loads((folder / "pretrain.json").read_text()) == record
    assert record["files"] == sorted(path.name for path in folder.iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} < set(record["files"])
    assert record["seconds"] > 0 and record["config"]["steps"] == 30
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_finished_folder_loads_and_generates(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    model = T5ForConditionalGeneration.from_pretrained(finished[0]).eval()
    assert model.config.decoder_start_token_id == 0
    assert model.config.dropout_rate == 0.1
    assert model.config.vocab_size == len(tokenizer) == finished[1]["vocab_size"]
    batch = tokenizer("the dog <extra_id_0> the cat", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=5).shape[1] > 1


def test_loaded_model_has_the_loss_of_the_record(finished, text_file):
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    model = T5ForConditionalGeneration.from_pretrained(finished[0]).eval()
    stream = tokenizer(text_file.read_text().split("\n"), add_special_tokens=False)["input_ids"]
    sentinels = tokenizer.convert_tokens_to_ids(list(SENTINELS))
    ids = np.array([i for line in stream for i in line])
    (batch,) = TextBatches(
        ids, sentinels, batch_size=8, sequence_length=32, seed=TINY.seed
    ).held_out()
    with torch.no_grad():
        loss = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).loss
    assert loss.item() == pytest.approx(finished[1]["held_out_loss"], rel=1e-5)


@pytest.mark.parametrize("step", [5, 17], ids=["before-a-checkpoint", "after-one"])
def test_resumed_run_equals_an_uninterrupted_one(step, finished, text_file, tmp_path, monkeypatch):
    folder = tmp_path / "t5"
    run_until(step, monkeypatch, text_file, folder, TINY)
    assert not (folder / "pretrain.json").exists()
    assert (folder / ".partial" / "checkpoint.pt").is_file() == (step > 10)

    steps_taken = []
    real = pretrain_run.PretrainRun._step
    monkeypatch.setattr(
        pretrain_run.PretrainRun, "_step", lambda self, n: steps_taken.append(n) or real(self, n)
    )
    record = pretrain(text_file, folder, TINY, progress=False)
    assert steps_taken == list(range(10 if step > 10 else 0, 30))
    assert record["loss_curve"] == finished[1]["loss_curve"]
    expected = weights(finished[0])
    assert all(torch.equal(tensor, expected[n]) for n, tensor in weights(folder).items())
    assert not (folder / ".partial").exists()


def test_unfinished_run_of_other_settings_is_refused(text_file, tmp_path, monkeypatch):
    folder = tmp_path / "t5"
    run_until(11, monkeypatch, text_file, folder, TINY)
    with pytest.raises(ValueError, match=r"other settings: lr was 0.01 and is 0.5\. "):
        pretrain(text_file, folder, replace(TINY, lr=0.5), progress=False)


def test_start_without_a_checkpoint_is_forgotten(text_file, tmp_path, monkeypatch):
    run_until(1, monkeypatch, text_file, tmp_path / "t5", TINY)
    config = replace(TINY, vocab_size=400, steps=1)
    assert pretrain(text_file, tmp_path / "t5", config, progress=False)["vocab_size"] == 400


def test_finished_run_of_same_settings_is_left_alone(finished, text_file, monkeypatch):
    folder, record = finished
    monkeypatch.setattr(
        pretrain_run.PretrainRun, "_step", lambda self, step: pytest.fail("trained again")
    )
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(text_file, folder, TINY, progress=False) == record
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_finished_run_of_other_settings_is_replaced_at_the_end(text_file, tmp_path, monkeypatch):
    folder = tmp_path / "t5"
    config = replace(TINY, steps=2)
    first = pretrain(text_file, folder, config, progress=False)
    other = replace(config, gated=True)
    run_until(1, monkeypatch, text_file, folder, other)
    assert json.loads((folder / "pretrain.json").read_text()) == first
    assert pretrain(text_file, folder, other, progress=False)["config"]["gated"] is True
    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert model.config.is_gated_act and not (folder / ".partial").exists()


def test_interrupted_replacement_is_repaired(text_file, tmp_path, finished):
    # As after a kill between the two renames: the old folder under its other name only.
    (tmp_path / ".t5.replaced").mkdir()
    (tmp_path / ".t5.replaced" / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds keep.txt"):
        pretrain(text_file, tmp_path / "t5", TINY, progress=False)
    assert (tmp_path / "t5" / "keep.txt").read_text() == "mine"


def test_global_random_state_is_untouched(text_file, tmp_path):
    before = torch.get_rng_state()
    pretrain(text_file, tmp_path / "t5", replace(TINY, steps=1), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_bar_shows_the_loss(text_file, tmp_path, capfd):
    pretrain(text_file, tmp_path / "t5", replace(TINY, steps=2), progress=True)
    shown = capfd.readouterr().err
    assert "pretrain" in shown and "2/2" in shown and "loss=" in shown


# --- tasks in the mixture ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """SST-2 in the hub's schema, a few rows."""
    folder = tmp_path_factory.mktemp("data") / "glue__sst2"
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 10)):
        rows = [
            {"sentence": ("good" if n % 2 else "bad") + f" film {split} {n}", "label": n % 2}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder.parent


def test_tasks_take_their_share_of_the_steps(text_file, task_folder, tmp_path, monkeypatch):
    seen = []
    real = pretrain_run.PretrainRun._loss
    monkeypatch.setattr(
        pretrain_run.PretrainRun, "_loss", lambda self, b: seen.append(b) or real(self, b)
    )
    config = replace(TINY, steps=10, task_share=0.3)
    record = pretrain(
        text_file, tmp_path / "t5", config, tasks=["sst2"], data_dir=task_folder, progress=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t5")
    sources = [tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) for batch in seen]
    of_tasks = [source.startswith("sst2: sentence: ") for source in sources[:10]]
    assert sum(of_tasks) == 3
    assert ["task_loss" in point for point in record["loss_curve"]] == of_tasks
    batch = seen[of_tasks.index(True)]
    target = tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0], skip_special_tokens=True)
    source = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert target == ("positive" if "good" in source else "negative")


def test_only_training_rows_are_used(task_folder):
    sources = [example.source for example in pretrain_files.load_task("sst2", task_folder)]
    assert sources and not [s for s in sources if "validation" in s]


def test_tasks_are_part_of_the_settings(text_file, task_folder, tmp_path, monkeypatch):
    run_until(11, monkeypatch, text_file, tmp_path / "t5", TINY)
    with pytest.raises(ValueError, match=r"tasks was \[\] and is \['sst2'\]"):
        pretrain(
            text_file, tmp_path / "t5", TINY, tasks=["sst2"], data_dir=task_folder, progress=False
        )


# --- errors --------------------------------------------------------------------------------------


def test_missing_files_are_named_before_anything_is_written(text_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such text file: .*one\.txt, .*two\.txt"):
        pretrain([tmp_path / "one.txt", text_file, tmp_path / "two.txt"], tmp_path / "t5", TINY)
    assert not (tmp_path / "t5").exists()


def test_empty_file_is_named(text_file, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"text file without text: .*blank\.txt"):
        pretrain([text_file, tmp_path / "blank.txt"], tmp_path / "t5", TINY)


def test_binary_file_is_named(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt: must be UTF-8 text"):
        pretrain(tmp_path / "binary.txt", tmp_path / "t5", TINY)


def test_no_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="text_files must name at least one file"):
        pretrain([], tmp_path / "t5", TINY)


def test_short_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(ValueError, match="the text must have at least 68 tokens"):
        pretrain(tmp_path / "short.txt", tmp_path / "t5", TINY, progress=False)


def test_folder_with_other_files_is_refused_and_kept(text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds thesis\.tex"):
        pretrain(text_file, tmp_path, TINY, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_files_beside_a_finished_pretraining_are_refused(text_file, tmp_path):
    pretrain(text_file, tmp_path / "t5", replace(TINY, steps=1), progress=False)
    (tmp_path / "t5" / "adapters.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds adapters\.safetensors"):
        pretrain(text_file, tmp_path / "t5", replace(TINY, steps=2), progress=False)


def test_unknown_task_is_refused(text_file, tmp_path):
    with pytest.raises(ValueError, match="sst3"):
        pretrain(text_file, tmp_path / "t5", TINY, tasks=["sst3"])


def test_diverged_loss_is_an_error(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain_run.PretrainRun, "_loss", lambda self, batch: torch.tensor(float("nan"))
    )
    with pytest.raises(FloatingPointError, match=r"nan at step 0; try an lr below 0\.01"):
        pretrain(text_file, tmp_path / "t5", TINY, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 30, "num_heads": 4}, "num_heads must divide d_model = 30, got 4"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"vocab_size": 128}, f"vocab_size must be at least {MIN_VOCAB_SIZE}, got 128"),
        ({"task_share": 1.0}, "task_share must be between 0 and 1, got 1.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"precision": "fp8"}, "precision must be auto, fp32 or bf16, got 'fp8'"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
