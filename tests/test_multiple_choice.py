"""Options with letters: which rows fit, few-shot draws, lengths, scores, splits."""

from collections import Counter
from dataclasses import replace

import pytest
from tiny_data import write_tiny_data
from transformers import AutoTokenizer

from pemt_fast.data import COMMONSENSE_TASKS, TASKS, get_task, load_splits, tokenize
from pemt_fast.training.metrics import compute

ARC = TASKS["arc_easy"]
MMLU = TASKS["mmlu"]


def arc_row(answer, labels="ABCD", number=0):
    choices = {"text": [f"t{label}" for label in labels], "label": list(labels)}
    return {"question": f"Q{number}?", "choices": choices, "answerKey": answer}


def mmlu_rows(count):
    return [
        {"question": f"Q{i}?", "choices": [f"{i}a", f"{i}b", f"{i}c", f"{i}d"], "answer": i % 4}
        for i in range(count)
    ]


def test_the_commonsense_sets_are_known():
    assert len(COMMONSENSE_TASKS) == 8 and set(COMMONSENSE_TASKS) <= set(TASKS)
    assert get_task("social_i_qa") is TASKS["siqa"] and get_task("ARC-Easy") is ARC


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (ARC, arc_row("F"), "'arc_easy': unknown label 'F' .*known labels: 0 A, 1 B, 2 C, 3 D"),
        (ARC, arc_row(""), "hidden label"),
        (ARC, {**arc_row("A"), "choices": {"text": ["a"], "label": []}}, "1 options for 0 labels"),
        (ARC, {**arc_row("A"), "choices": {"text": ["a"]}}, "lists under 'text' and 'label'"),
        (ARC, {"question": "Q", "answerKey": "A"}, "needs the column 'choices'"),
        (MMLU, {"question": "Q", "choices": list("abcde"), "answer": 1}, "5 options for 4 labels"),
        (MMLU, {"question": "Q", "choices": list("abc"), "answer": 3}, "unknown label '3'"),
        (MMLU, {"question": "Q", "choices": "abcd", "answer": 1}, "must be a list of texts"),
        (
            MMLU,
            {"question": "Q", "choices": ["a", 2, "c", "d"], "answer": 1},
            "must be text, got i",
        ),
        (MMLU, {"question": "Q", "choices": list("abcd"), "answer": -1}, "hidden label"),
        (MMLU, {"question": "Q", "choices": list("abcd"), "answer": True}, "unknown label True"),
    ],
)
def test_rows_that_do_not_fit_are_refused(task, row, message):
    with pytest.raises(ValueError, match=message):
        task.format(row)


@pytest.mark.parametrize(
    ("columns", "keys"), [(("a", "b"), ("1",)), (("a",), ()), (("a",), tuple(map(str, range(27))))]
)
def test_options_need_their_names(columns, keys):
    with pytest.raises(ValueError, match="option_keys must name the options"):
        replace(ARC, option_columns=columns, option_keys=keys)


def test_few_shot_draws_by_letter_and_leaves_surplus_letters_out():
    rows = [arc_row("ABCD"[i % 4], number=i) for i in range(24)]
    rows += [arc_row("E", "ABCDE", number=100 + i) for i in range(5)]
    # Digits and letters are the same class: it is the place that counts.
    rows += [arc_row("2", "1234", number=200 + i) for i in range(5)]
    data = {"train": rows, "validation": rows[:2], "test": rows[:2]}
    splits = load_splits(ARC, data, few_shot=3, label_style="index")
    assert Counter(e.target for e in splits.train) == dict.fromkeys("ABCD", 3)
    assert ARC.class_of(rows[-1]) == "B" and ARC.class_of(rows[24]) is None


def test_mmlu_trains_on_its_auxiliary_part():
    parts = {"auxiliary_train": mmlu_rows(8), "validation": mmlu_rows(3), "test": mmlu_rows(2)}
    splits = load_splits("mmlu", parts)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 3, 2]
    with pytest.raises(FileNotFoundError, match="no split 'auxiliary_train'; it has: train"):
        load_splits("mmlu", {"train": mmlu_rows(8)})


def test_mmlu_is_read_from_files(tmp_path):
    import json

    for split in ("auxiliary_train", "validation", "test"):
        text = "".join(json.dumps(row) + "\n" for row in mmlu_rows(4))
        (tmp_path / f"{split}.jsonl").write_text(text)
    assert len(load_splits("mmlu", tmp_path).train) == 4


def test_texts_of_options_may_be_long_and_letters_are_labels(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_data(tmp_path) / "t5")
    row = {"goal": "g", "sol1": "good " * 20, "sol2": "bad", "label": 0}
    example = TASKS["piqa"].format(row)
    assert not example.is_label
    assert len(tokenize([example], tokenizer)[0]["labels"]) == 21  # and its end, none cut
    assert TASKS["piqa"].format(row, "index").is_label


@pytest.mark.parametrize(("style", "guesses"), [("name", ["1b", "2b"]), ("index", ["B", "B"])])
def test_only_the_own_style_is_right(style, guesses):
    examples = [MMLU.format(row, style) for row in mmlu_rows(3)[1:]]
    assert compute("mmlu", guesses, examples)["accuracy"] == 50.0
    assert compute("mmlu", ["1", "2"], examples)["accuracy"] == 0.0


def test_winogrande_keeps_its_published_form():
    row = {"sentence": "_ won.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    example = TASKS["winogrande"].format(row)
    assert (example.source, example.target) == ("sentence: _ won. option1: Ann option2: Bo", "Bo")


def test_a_task_of_one_part_is_cut_in_three():
    own = replace(ARC, split_rule="single")
    rows = [arc_row("ABCD"[i % 4], number=i) for i in range(40)]
    splits = load_splits(own, {"train": rows})
    sources = [{e.source for e in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in sources] == [32, 4, 4]
    assert len(set.union(*sources)) == 40
    assert splits == load_splits(own, {"train": rows})
    assert splits.test != load_splits(own, {"train": rows}, seed=1).test
    assert [len(p) for p in vars(load_splits(own, {"train": rows[:3]})).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="at least 3 rows to be cut into three parts, got 2"):
        load_splits(own, {"train": rows[:2]})
