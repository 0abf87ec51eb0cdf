"""From a task's name to token ids: templates, splits, few-shot draws, ids, synthetic tasks."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pemt_fast.data import (
    COMMONSENSE_TASKS,
    SOURCE_TASKS,
    SYNTHETIC_TASKS,
    TARGET_TASKS,
    TASKS,
    Example,
    available_splits,
    get_task,
    load_rows,
    load_splits,
    make_examples,
    synthetic_tokenizer,
    tokenize,
)
from pemt_fast.data.rewrite import pad_punctuation
from pemt_fast.data.synthetic import (
    ALPHABET,
    BACKBONE_TASKS,
    SYNTHETIC_SOURCES,
    SYNTHETIC_TARGETS,
    split_of,
)

PAIR = {"sentence1": "A b.", "sentence2": "C d."}
IN_PAIR = "sentence1: A b. sentence2: C d."
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}
IN_NLI = "premise: It rains. hypothesis: It is wet."
SQUAD = {
    "question": "Who won?",
    "context": "Ann's team won.",
    "answers": {"text": ["Ann's team", "Ann"], "answer_start": [0, 0]},
}
RECORD = {
    "passage": "Ann met Bo.\n@highlight\nThey spoke\n@highlight\nof rain",
    "query": "@placeholder spoke",
    "entities": ["Ann", "Bo"],
    "answers": ["Ann", "Bo"],
}
WSC = {
    "text": "Ann told Bo that she won.",
    "span1_text": "Ann",
    "span1_index": 0,
    "span2_text": "she",
    "span2_index": 4,
    "label": 1,
}
MULTIRC = {
    "paragraph": "<b>Sent 1: </b>Ann won.<br>Bo lost.",
    "question": "Who won?",
    "answer": "Ann",
    "idx": {"paragraph": 3, "question": 7, "answer": 1},
    "label": 1,
}
WINOGRANDE = {"sentence": "_ won.", "option1": "Ann", "option2": "Bo", "answer": "2"}


# ------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("task", "row", "source", "target"),
    [
        ("sst2", {"sentence": "good . ", "label": 1}, "sentence: good .", "positive"),
        ("cola", {"sentence": "Good.", "label": 0}, "sentence: Good.", "unacceptable"),
        ("mnli", {**NLI, "label": 1}, IN_NLI, "neutral"),
        ("snli", {**NLI, "label": 2}, IN_NLI, "contradiction"),
        ("cb", {**NLI, "label": 1}, IN_NLI, "contradiction"),
        (
            "qnli",
            {"question": "Q?", "sentence": "S.", "label": 1},
            "question: Q? sentence: S.",
            "not_entailment",
        ),
        (
            "qqp",
            {"question1": "Q?", "question2": "R?", "label": 1},
            "question1: Q? question2: R?",
            "duplicate",
        ),
        ("rte", {**PAIR, "label": 0}, IN_PAIR, "entailment"),
        ("wnli", {**PAIR, "label": 0}, IN_PAIR, "not_entailment"),
        ("mrpc", {**PAIR, "label": 1}, IN_PAIR, "equivalent"),
        ("paws", {**PAIR, "label": 1}, IN_PAIR, "1"),
        ("stsb", {**PAIR, "label": 2.75}, IN_PAIR, "2.8"),
        ("stsb", {**PAIR, "label": 3}, IN_PAIR, "3.0"),
        ("scitail", {**PAIR, "gold_label": "neutral"}, "premise: A b. hypothesis: C d.", "neutral"),
        (
            "boolq",
            {"question": "is it", "passage": "It is.", "label": True},
            "question: is it passage: It is.",
            "True",
        ),
        (
            "copa",
            {"premise": "P.", "choice1": "C.", "choice2": "D.", "label": 1},
            "premise: P. choice1: C. choice2: D.",
            "choice2",
        ),
        ("wic", {**PAIR, "word": "w", "label": 0}, f"{IN_PAIR} word: w", "False"),
        ("yelp_polarity", {"text": "Fine.", "label": 0}, "sentence: Fine.", "0"),
        ("ag_news", {"text": "Rates rise.", "label": 2}, "text: Rates rise.", "Business"),
        ("trec", {"text": "Where?", "coarse_label": 4, "fine_label": 30}, "text: Where?", "LOC"),
        ("subj", {"text": "He dies.", "label": 0}, "text: He dies.", "objective"),
        ("wsc", WSC, "text: * Ann * told Bo that # she # won.", "True"),
        ("wsc", {**WSC, "span2_index": 3}, "text: * Ann * told Bo that she won.", "True"),
        (
            "wsc",
            {**WSC, "span1_text": "she won", "span1_index": 4},
            "text: Ann told Bo that * she won *.",
            "True",
        ),
        (
            "multirc",
            MULTIRC,
            "question: Who won? answer: Ann paragraph: Sent 1: Ann won. Bo lost.",
            "True",
        ),
        (
            "record",
            RECORD,
            "record query: @placeholder spoke entities: Ann, Bo "
            "passage: Ann met Bo. They spoke. of rain",
            "Ann",
        ),
        ("squad", SQUAD, "question: Who won ? context: Ann ' s team won .", "Ann ' s team"),
        (
            "nq",
            {**SQUAD, "answers": ["B."]},
            "question: Who won ? context: Ann ' s team won .",
            "B .",
        ),
        ("winogrande", WINOGRANDE, "sentence: _ won. option1: Ann option2: Bo", "Bo"),
    ],
)
def test_format_writes_markers_and_label_text(task, row, source, target):
    example = get_task(task).format(row)
    assert (example.source, example.target) == (source, target)
    assert example.references[0] == target
    assert example.task == task


def test_every_pemt_task_is_known_and_described_in_its_own_sentence():
    assert len(SOURCE_TASKS) == 6
    assert len(TARGET_TASKS) == 17
    assert set(SOURCE_TASKS) | set(TARGET_TASKS) <= set(TASKS)
    sentences = Counter(task.description for task in TASKS.values())
    assert [count for count in sentences.values() if count > 1] == [5]  # the reading tasks
    assert all(sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize("label_style", ["name", "index"])
def test_label_style_index_writes_class_numbers(label_style):
    row = {**PAIR, "gold_label": "neutral"}
    expected = {"name": ("neutral", "Bo"), "index": ("1", "1")}[label_style]
    assert get_task("scitail").format(row, label_style).target == expected[0]
    assert get_task("winogrande").format(WINOGRANDE, label_style).target == expected[1]
    assert get_task("stsb").format({**PAIR, "label": 5.0}, label_style).target == "5.0"


def test_string_label_that_is_a_known_text_is_accepted():
    assert get_task("mnli").format({**NLI, "label": "contradiction"}).target == "contradiction"


def test_answers_are_all_references_and_are_padded_like_the_target():
    assert get_task("squad").format(SQUAD).references == ("Ann ' s team", "Ann")


def test_record_trains_on_every_answer_and_is_evaluated_once():
    examples = get_task("record").format_for_training({**RECORD, "answers": ["Ann", "Bo", "Ann"]})
    assert [e.target for e in examples] == ["Ann", "Bo"]
    assert all("Bo" in e.references for e in examples)


def test_multirc_rows_of_one_question_share_a_group():
    task = get_task("multirc")
    other = {**MULTIRC, "idx": {"paragraph": 3, "question": 8, "answer": 1}}
    assert task.format(MULTIRC).group == task.format(dict(MULTIRC)).group
    assert task.format(MULTIRC).group != task.format(other).group


@pytest.mark.parametrize(
    ("text", "padded"),
    [("U.S.", "U . S ."), ("a_b  c", "a_b c"), ("naïve (re\u0301el)", "naïve ( re\u0301el )")],
)
def test_punctuation_is_padded_but_letters_and_accents_stay(text, padded):
    assert pad_punctuation(text) == padded


@given(st.floats(0, 5))
def test_score_target_is_the_nearest_tenth(score):
    target = get_task("stsb").format({**PAIR, "label": score}).target
    assert abs(float(target) - score) <= 0.05 + 1e-9
    assert len(target) == 3


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("mnli", {**NLI, "label": 3}, "'mnli': unknown label 3 .*0 entailment, 1 neutral, 2 con"),
        ("mnli", {**NLI, "label": "yes"}, "unknown label 'yes'"),
        ("mnli", {**NLI, "label": True}, "unknown label True"),
        ("mnli", {**NLI, "label": -1}, "'mnli': this row has a hidden label"),
        ("winogrande", {**WINOGRANDE, "answer": ""}, "hidden label"),
        ("winogrande", {**WINOGRANDE, "answer": 0}, "unknown label '0'"),
        ("stsb", {**PAIR, "label": -1.0}, "hidden label"),
        ("stsb", {**PAIR, "label": 5.5}, "score from 0 to 5, got 5.5"),
        ("stsb", {**PAIR, "label": "high"}, "score from 0 to 5, got 'high'"),
        ("squad", {**SQUAD, "answers": {"text": []}}, "no answer in column 'answers'"),
        ("squad", {**SQUAD, "answers": 4}, "must be a list of texts"),
        ("mnli", {"premise": "It rains.", "label": 0}, "column 'hypothesis'; .*label, premise"),
        ("mnli", NLI, "needs the column 'label'"),
        ("mnli", {**NLI, "premise": None, "label": 0}, "'premise' must be text, got NoneType"),
        ("wsc", {**WSC, "span1_index": "0"}, "span1_index an integer"),
        ("multirc", {**MULTIRC, "idx": 4}, "'idx' must hold paragraph, question, got 4"),
    ],
)
def test_rows_that_do_not_fit_are_refused(task, row, message):
    with pytest.raises(ValueError, match=message):
        get_task(task).format(row)


def test_unknown_label_style_is_refused():
    with pytest.raises(ValueError, match="label_style must be 'name' or 'index', got 'digit'"):
        get_task("mnli").format({**NLI, "label": 0}, "digit")


def test_names_of_the_published_scripts_find_the_task():
    assert get_task("superglue-wsc-fixed") is TASKS["wsc"]
    assert get_task(" SST2 ") is TASKS["sst2"]


def test_unknown_task_names_the_closest():
    with pytest.raises(ValueError, match="unknown task 'sciteil'; close matches: scitail"):
        get_task("sciteil")


# ------------------------------------------------------------------------------- reading rows


def write(folder: Path, **splits: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def sentences(count: int, start: int = 0) -> list[dict]:
    return [{"sentence": f"s{i}", "label": i % 2} for i in range(start, start + count)]


@pytest.mark.parametrize("folder", ["glue__cola", "cola", "."])
def test_rows_are_found_in_each_folder_layout(tmp_path, folder):
    write(tmp_path / folder, train=sentences(3))
    assert load_rows("cola", tmp_path) == sentences(3)
    assert available_splits("cola", tmp_path) == ("train",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sentence": "a"}\n\n{"sentence": \n', r"train\.jsonl, line 3: not valid JSON"),
        ('{"sentence": "a"}\n[1]\n', r"train\.jsonl, line 2: expected a JSON object, got list"),
        ("\n", r"train\.jsonl: the file holds no rows"),
    ],
)
def test_broken_files_are_refused_with_their_line(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_rows("cola", tmp_path)


def test_text_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"sentence": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.jsonl: must be UTF-8 text"):
        load_rows("cola", tmp_path)


def test_missing_folders_and_files_say_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir must be an existing folder, got .*none"):
        load_rows("cola", tmp_path / "none")
    write(tmp_path / "glue__rte", train=sentences(1))
    with pytest.raises(FileNotFoundError, match="'glue__cola' or 'cola'.*found: glue__rte"):
        load_rows("cola", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file test.jsonl in .*found: train.jsonl"):
        load_rows("rte", tmp_path, "test")


class FakeHub:
    """Stands for `datasets.load_dataset`; remembers what it was asked for."""

    def __init__(self, **splits: list[dict]) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, dataset: str, config: str | None) -> dict[str, SimpleNamespace]:
        self.asked.append((dataset, config))
        if not self.splits:
            raise ConnectionError("no network")
        return {s: SimpleNamespace(to_list=lambda r=r: r) for s, r in self.splits.items()}


def test_without_a_folder_the_hub_is_asked(monkeypatch):
    hub = FakeHub(train=sentences(4), validation=[])
    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_rows("cola") == sentences(4)
    assert hub.asked == [("nyu-mll/glue", "cola")]
    with pytest.raises(FileNotFoundError, match="no split 'dev'; it has: train, validation"):
        load_rows("cola", split="dev")
    with pytest.raises(ValueError, match="split 'validation' of data set 'nyu-mll/glue' is empty"):
        load_rows("cola", split="validation")


def test_a_task_that_the_hub_lacks_asks_for_a_folder():
    with pytest.raises(FileNotFoundError, match="'mpqa' has no data set .* data_dir with mpqa/tra"):
        load_rows("mpqa")


def test_unreachable_hub_points_to_the_local_folder(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", FakeHub())
    with pytest.raises(FileNotFoundError, match="no network; .* data_dir with glue__cola/train"):
        load_rows("cola")


# ------------------------------------------------------------------------------- splits


def sources(examples: list[Example]) -> list[str]:
    return [e.source for e in examples]


def test_small_sets_cut_the_validation_part_in_half(tmp_path):
    held_out = sentences(7, start=100)
    write(tmp_path, train=sentences(5), validation=held_out, test=sentences(9, start=500))
    splits = load_splits("cola", tmp_path)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(42)).tolist()
    assert sources(splits.train) == [f"sentence: s{i}" for i in range(5)]
    assert sources(splits.validation) == [f"sentence: s{100 + i}" for i in order[:3]]
    assert sources(splits.test) == [f"sentence: s{100 + i}" for i in order[3:]]


@pytest.mark.parametrize(("rows", "held"), [(2, 1), (90, 9), (10_500, 1000)])
def test_large_sets_hold_out_training_rows(tmp_path, rows, held):
    write(tmp_path, train=sentences(rows), validation=sentences(6, start=20_000))
    splits = load_splits("sst2", tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (rows - held, held, 6)
    assert not set(sources(splits.train)) & set(sources(splits.validation))
    assert sources(splits.test)[0] == "sentence: s20000"


def test_mnli_validates_on_mismatched_and_tests_on_matched(tmp_path):
    rows = {
        split: [{"premise": split, "hypothesis": "h", "label": 0}]
        for split in ("train", "validation_matched", "validation_mismatched")
    }
    splits = load_splits("mnli", write(tmp_path, **rows))
    assert sources(splits.validation) == ["premise: validation_mismatched hypothesis: h"]
    assert sources(splits.test) == ["premise: validation_matched hypothesis: h"]


def test_paws_keeps_its_own_parts(tmp_path):
    parts = {s: [{**PAIR, "sentence1": s, "label": 0}] for s in ("train", "validation", "test")}
    splits = load_splits("paws", write(tmp_path, **parts))
    for split in parts:
        assert sources(getattr(splits, split)) == [f"sentence1: {split} sentence2: C d."]


def yelp(count: int, text: str) -> list[dict]:
    return [{"text": f"{text}{i}", "label": i % 2} for i in range(count)]


def test_yelp_tests_on_its_test_part_and_caps_training(tmp_path):
    write(tmp_path, train=yelp(40, "a"), validation=yelp(3, "b"), test=yelp(5, "c"))
    splits = load_splits(replace(TASKS["yelp_polarity"], train_cap=30), tmp_path)
    assert (len(splits.train), len(splits.validation)) == (30, 4)
    assert sources(splits.test) == [f"sentence: c{i}" for i in range(5)]


def test_yelp_cap_is_the_published_one():
    assert TASKS["yelp_polarity"].train_cap == 100_000
    assert [task.name for task in TASKS.values() if task.train_cap] == ["yelp_polarity"]


def test_snli_leaves_out_rows_without_gold_label(tmp_path):
    rows = [{**NLI, "premise": f"p{i}", "label": i % 4 - 1} for i in range(40)]
    splits = load_splits("snli", write(tmp_path, train=rows, test=rows))
    assert len(splits.train) + len(splits.validation) == 30
    assert len(splits.test) == 30


def test_limits_draw_with_the_seed(tmp_path):
    write(tmp_path, train=sentences(50), validation=sentences(40))
    whole = load_splits("cola", tmp_path)
    one = load_splits("cola", tmp_path, limit_train=7, limit_eval=5)
    assert [len(one.train), len(one.validation), len(one.test)] == [7, 5, 5]
    assert set(sources(one.validation)) <= set(sources(whole.validation))
    assert one == load_splits("cola", tmp_path, limit_train=7, limit_eval=5)
    assert one.train != load_splits("cola", tmp_path, limit_train=7, seed=1).train
    assert len(load_splits("cola", tmp_path, limit_train=99).train) == 50


def test_limit_counts_examples_where_a_row_gives_several(tmp_path):
    write(tmp_path, train=[RECORD] * 20, validation=[RECORD])
    assert len(load_splits("record", tmp_path).train) == 36
    assert len(load_splits("record", tmp_path, limit_train=3).train) == 3


@given(shots=st.integers(1, 5), seed=st.integers(0, 50))
def test_few_shot_draws_k_rows_of_every_class(tmp_path_factory, shots, seed):
    folder = tmp_path_factory.mktemp("cb")
    rows = [{**NLI, "premise": f"p{i}", "label": (0, 0, 1, 2)[i % 4]} for i in range(24)]
    write(folder, train=rows, validation=rows[:4])
    splits = load_splits("cb", folder, few_shot=shots, seed=seed)
    assert Counter(e.target for e in splits.train) == dict.fromkeys(TASKS["cb"].labels, shots)
    assert len(set(sources(splits.train))) == 3 * shots
    assert splits == load_splits("cb", folder, few_shot=shots, seed=seed)
    assert (len(splits.validation), len(splits.test)) == (2, 2)


def test_few_shot_depends_on_the_seed(tmp_path):
    write(tmp_path, train=sentences(200), validation=sentences(4))
    draws = {
        tuple(sources(load_splits("cola", tmp_path, few_shot=4, seed=s).train)) for s in (1, 2)
    }
    assert len(draws) == 2


def test_few_shot_rows_of_large_sets_avoid_validation(tmp_path):
    write(tmp_path, train=sentences(40), validation=sentences(2, start=100))
    splits = load_splits("sst2", tmp_path, few_shot=17)
    assert len(splits.train) == 34
    assert not set(sources(splits.train)) & set(sources(splits.validation))


def test_few_shot_is_a_total_where_there_are_no_classes(tmp_path):
    rows = [{**PAIR, "label": i / 10} for i in range(50)]
    write(tmp_path, train=rows, validation=rows)
    assert len(load_splits("stsb", tmp_path, few_shot=6).train) == 6


def test_few_shot_counts_winogrande_by_option(tmp_path):
    rows = [{**WINOGRANDE, "answer": str(1 + i % 2)} for i in range(40)]
    write(tmp_path, train=rows, validation=rows)
    train = load_splits("winogrande", tmp_path, few_shot=4).train
    assert Counter(e.target for e in train) == {"Ann": 4, "Bo": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"few_shot": 0}, "few_shot must be at least 1 or None, got 0"),
        ({"limit_train": -1}, "limit_train must be at least 1 or None, got -1"),
        ({"limit_eval": 0}, "limit_eval must be at least 1 or None, got 0"),
        ({"few_shot": 1, "limit_train": 1}, "few_shot or limit_train, not both"),
        ({"few_shot": 3}, "few_shot=3 but class 'acceptable' has only 2 training rows"),
    ],
)
def test_impossible_counts_are_refused(tmp_path, arguments, message):
    write(tmp_path, train=sentences(5), validation=sentences(4))
    with pytest.raises(ValueError, match=message):
        load_splits("cola", tmp_path, **arguments)


def test_few_shot_total_beyond_the_rows_is_refused(tmp_path):
    rows = [{**PAIR, "label": 1.0}] * 3
    with pytest.raises(ValueError, match="few_shot=4 but there are only 3 rows"):
        load_splits("stsb", write(tmp_path, train=rows, validation=rows), few_shot=4)


@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_one_row_cannot_be_cut(tmp_path, task):
    write(tmp_path, train=sentences(1), validation=sentences(1))
    with pytest.raises(ValueError, match="at least 2 rows to be cut into two parts, got 1"):
        load_splits(task, tmp_path)


def test_bad_row_is_named_by_split_and_number(tmp_path):
    bad = [*sentences(2), {"sentence": "s", "label": 7}]
    write(tmp_path, train=bad, validation=sentences(4))
    with pytest.raises(ValueError, match="split 'train', row 2 .*unknown label 7"):
        load_splits("cola", tmp_path)


# ------------------------------------------------------------------------------- real rows

MISSING = {"paws", "nq", "hotpotqa", "newsqa", "searchqa", "mmlu", *COMMONSENSE_TASKS} - {"boolq"}
REAL = sorted(set(TASKS) - MISSING)


@pytest.mark.parametrize("task", REAL)
def test_real_rows_make_splits(shared_data, task):
    splits = load_splits(task, shared_data, limit_train=200, limit_eval=50)
    assert splits.train and splits.validation and splits.test
    for example in (*splits.train, *splits.validation, *splits.test):
        markers = [marker for marker, _ in TASKS[task].source_fields]
        assert example.source.startswith(f"{markers[0]}: ")
        assert all(f" {marker}: " in example.source for marker in markers[1:])
        assert example.target in example.references
    if TASKS[task].labels:
        assert {e.target for e in splits.train} == set(TASKS[task].labels)


def test_label_orders_hold_on_known_rows(shared_data):
    cb = load_rows("cb", shared_data)[0]
    assert cb["premise"].startswith("It was a complex language")
    assert get_task("cb").format(cb).target == "entailment"
    mnli = load_rows("mnli", shared_data)[0]
    assert mnli["hypothesis"] == "There are none at all."
    assert get_task("mnli").format(mnli).target == "contradiction"
    rte = load_rows("rte", shared_data)[0]
    assert get_task("rte").format(rte).target == "not_entailment"


def test_real_cb_and_rte_parts_have_the_published_sizes(shared_data):
    for task, sizes in {"cb": (250, 28, 28), "rte": (2490, 138, 139)}.items():
        splits = load_splits(task, shared_data)
        assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    shots = load_splits("cb", shared_data, few_shot=16).train
    assert Counter(e.target for e in shots) == dict.fromkeys(TASKS["cb"].labels, 16)
    with pytest.raises(ValueError, match="class 'neutral' has only 16 training rows"):
        load_splits("cb", shared_data, few_shot=17)


def test_real_wsc_rows_have_both_spans_marked(shared_data):
    rows = load_rows("wsc", shared_data) + load_rows("wsc", shared_data, "validation")
    texts = [get_task("wsc").format(row).source for row in rows]
    unmarked = [
        t for t in texts if not re.search(r"\* \w.* \*", t) or not re.search(r"# \w.* #", t)
    ]
    assert len(texts) == 658
    assert len(unmarked) == 2


# ------------------------------------------------------------------------------- token ids


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic_tokenizer()


def label(text: str, source: str = "a b") -> Example:
    return Example(source, text, (text,), task="demo", is_label=True)


def test_source_and_target_end_once_with_eos(tokenizer):
    (row,) = tokenize([Example("a b c", "c b", ("c b",))], tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    assert row["input_ids"] == [*ids(["a", "b", "c"]), 1]
    assert row["labels"] == [*ids(["c", "b"]), 1]
    assert row["attention_mask"] == [1, 1, 1, 1]


def test_eos_is_added_for_a_tokenizer_that_does_not(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bare = synthetic_tokenizer()
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    assert bare("a b")["input_ids"] == tokenizer("a b")["input_ids"][:-1]
    examples = [Example("a b c d", "a", ("a",))]
    for length in (3, 256):
        expected = tokenize(examples, tokenizer, max_source_length=length)
        assert tokenize(examples, bare, max_source_length=length) == expected


@given(words=st.integers(0, 20), length=st.integers(2, 12))
def test_long_sources_are_cut_before_their_eos(tokenizer, words, length):
    example = Example(" ".join(["a"] * words), "b", ("b",))
    (row,) = tokenize([example], tokenizer, max_source_length=length)
    assert row["input_ids"] == [tokenizer.convert_tokens_to_ids("a")] * min(words, length - 1) + [1]


def test_cut_texts_are_counted_in_one_warning(tokenizer, caplog):
    long = Example("a " * 9, "b " * 9, ("b",))
    exact = Example("a a a a", "b", ("b",))
    with caplog.at_level("WARNING", logger="pemt_fast"):
        rows = tokenize([long, exact, long], tokenizer, max_source_length=5, max_target_length=4)
    assert [len(row["labels"]) for row in rows] == [4, 2, 4]
    assert caplog.messages == ["cut 2 of 3 sources to 5 tokens and 2 targets"]


def test_texts_that_fit_are_not_reported(tokenizer, caplog):
    with caplog.at_level("WARNING", logger="pemt_fast"):
        tokenize([Example("a a a a", "b", ("b",))], tokenizer, max_source_length=5)
    assert caplog.messages == []


def test_label_text_is_never_cut(tokenizer):
    assert len(tokenize([label("a b c d e f g")], tokenizer)[0]["labels"]) == 8
    with pytest.raises(ValueError, match="'demo': label text 'a b c d e f g h' takes 9 tokens"):
        tokenize([label("a b c d e f g h")], tokenizer)
    assert len(tokenize([label("a b c d e f g h")], tokenizer, max_target_length=9)) == 1
    free = Example("a", " ".join("a" * 200), ("a",))
    assert len(tokenize([free], tokenizer)[0]["labels"]) == 128


def test_label_and_free_tasks_are_told_apart():
    assert get_task("stsb").format({**PAIR, "label": 1.0}).is_label
    assert get_task("mnli").format({**NLI, "label": 1}).is_label
    assert not get_task("squad").format(SQUAD).is_label
    assert not get_task("record").format_for_training(RECORD)[1].is_label


def test_ids_are_padded_by_the_collator_of_transformers(tokenizer):
    from transformers import DataCollatorForSeq2Seq

    rows = tokenize([label("a"), label("a b", source="a")], tokenizer)
    batch = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")(rows)
    assert batch["labels"].tolist()[0][-1] == -100
    assert batch["input_ids"].tolist()[1][-1] == tokenizer.pad_token_id == 0
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_no_examples_give_no_rows(tokenizer):
    assert tokenize([], tokenizer) == []


def test_impossible_lengths_and_tokenizers_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_source_length must be at least 2 .* got 1"):
        tokenize([label("a")], tokenizer, max_source_length=1)
    with pytest.raises(ValueError, match="max_target_length must be at least 2 .* got 0"):
        tokenize([label("a")], tokenizer, max_target_length=0)
    mute = SimpleNamespace(eos_token_id=None)
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        tokenize([label("a")], mute)


# ------------------------------------------------------------------------------- synthetic tasks

EXPECTED = {
    "copy": "a c b p a a d e",
    "rotate": "c b p a a d e a",
    "evenodd": "a b a d c p a e",
    "shift": "b d c a b b e f",
    "reverse": "e d a a p b c a",
    "sort": "a a a b c d e p",
    "reverse_shift": "f e b b a c d b",
    "sort_descending": "p e d c b a a a",
}


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_synthetic_rules_by_hand(name):
    rule = SYNTHETIC_TASKS[name]
    assert " ".join(rule.transform("acbpaade")) == EXPECTED[name.removeprefix("pretrain_")]


@pytest.mark.parametrize("name", SYNTHETIC_TASKS)
def test_synthetic_examples_have_a_tag_only_for_the_backbone(name):
    (example,) = make_examples(name, 1)
    words = example.source.split()
    tagged = words[0] == f"{name.removeprefix('pretrain_')}:"
    assert tagged == (name in BACKBONE_TASKS)
    letters = "".join(words[tagged:])
    assert len(letters) == 8 and set(letters) <= set(ALPHABET)
    assert example.target == " ".join(SYNTHETIC_TASKS[name].transform(letters))
    assert example.references == (example.target,)


def test_composition_is_reverse_then_shift():
    reverse, shift = SYNTHETIC_TASKS["reverse"].transform, SYNTHETIC_TASKS["shift"].transform
    for example in make_examples("reverse_shift", 20):
        letters = example.source.replace(" ", "")
        assert example.target.replace(" ", "") == shift(reverse(letters))
    assert set(SYNTHETIC_SOURCES) | set(SYNTHETIC_TARGETS) | set(BACKBONE_TASKS) == set(
        SYNTHETIC_TASKS
    )


@given(seed=st.integers(0, 1000), other=st.integers(0, 1000))
def test_synthetic_splits_never_share_a_string(seed, other):
    def strings(task, split, seed):
        examples = make_examples(task, 60, seed, split=split)
        assert {split_of(e.source.replace(" ", "")) for e in examples} == {split}
        return {e.source for e in examples}

    train = strings("sort", "train", seed)
    assert len(train) == 60
    assert not train & strings("sort", "test", other)
    assert not train & strings("sort", "validation", other)
    assert not train & strings("reverse", "test", other)


def test_one_tenth_of_the_strings_is_for_test_and_one_for_validation():
    strings = ["".join(letters) for letters in itertools.product(ALPHABET, repeat=3)]
    shares = Counter(split_of(letters) for letters in strings)
    assert shares["test"] / len(strings) == pytest.approx(0.1, abs=0.02)
    assert shares["validation"] / len(strings) == pytest.approx(0.1, abs=0.02)


def test_synthetic_examples_repeat_with_their_seed_also_in_another_process():
    assert make_examples("sort", 30, 5) == make_examples("sort", 30, 5)
    assert make_examples("sort", 30, 5) != make_examples("sort", 30, 6)
    assert make_examples("sort", 1)[0].source == "b c h e j o f i"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sorting", 3), "unknown synthetic task 'sorting'; known tasks: pretrain_copy"),
        (("sort", 0), "count must be at least 1, got 0"),
    ],
)
def test_impossible_synthetic_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_examples(*arguments)


def test_unknown_synthetic_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        make_examples("sort", 1, split="dev")


def test_every_word_of_the_synthetic_tasks_is_in_the_vocabulary(tokenizer):
    assert len(tokenizer) <= 64
    texts = [task.description for task in SYNTHETIC_TASKS.values()]
    texts += [make_examples(name, 1)[0].source for name in SYNTHETIC_TASKS]
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer("zebra")["input_ids"] == [2, 1]


def test_synthetic_tokenizer_round_trip_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in SYNTHETIC_TASKS:
        text = make_examples(name, 1, split="test")[0].source
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id == 1
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode([0, *ids, 0, 0], skip_special_tokens=True) == text


# ------------------------------------------------------------------------------- imports


def test_importing_data_loads_nothing_heavy():
    code = (
        "import sys, pemt_fast, pemt_fast.training; before = set(sys.modules)\n"
        "import pemt_fast.data, pemt_fast.training.metrics\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'torch', 'transformers', 'datasets', 'sklearn', 'scipy'}))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
