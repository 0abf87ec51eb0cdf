"""Tasks from JSON files in the form of NaturalInstructions: texts by hand, options, bad files."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import run_cli, write_tiny_data

from pemt_fast.data import load_natural_instructions, load_splits
from pemt_fast.training.metrics import compute
from pemt_fast.training.rouge import rouge_1, rouge_l


def content(**changes):
    return {
        "Contributors": ["Ann"],
        "Definition": ["Say the opposite\nof the word."],
        "Positive Examples": [
            {"input": "hot", "output": "cold", "explanation": "They are opposites."},
            {"input": "Is it big?", "output": "small!", "explanation": ""},
        ],
        "Negative Examples": [],
        "Instances": [
            {"id": f"task9-{i}", "input": f" word {i} ", "output": [f"out {i}", f"also {i}"]}
            for i in range(20)
        ],
        **changes,
    }


def write(folder, name="task9_opposites", **changes):
    folder.mkdir(exist_ok=True)
    text = json.dumps(content(**changes), ensure_ascii=False)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


PLAIN = "Now complete the following example -\nInput: word 0.\nOutput:"
DEFINED = "Definition: Say the opposite of the word.\n\n"
FIRST = " Positive Example 1 -\nInput: hot.\n Output: cold.\n\n"
SECOND = " Positive Example 2 -\nInput: Is it big?\n Output: small!\n\n"


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ({}, DEFINED + PLAIN),
        ({"positive_examples": 1}, DEFINED + FIRST + PLAIN),
        ({"positive_examples": 9}, DEFINED + FIRST + SECOND + PLAIN),
        ({"definition": False}, PLAIN),
        ({"definition": False, "positive_examples": 1}, FIRST.lstrip() + PLAIN),
    ],
)
def test_the_text_by_hand(tmp_path, options, source):
    (task,), rows = load_natural_instructions(write(tmp_path), **options)
    example = task.format(rows[task.name]["train"][0])
    assert (example.source, example.target) == (source, "out 0")
    assert example.references == ("out 0", "also 0")
    assert not example.is_label
    assert (task.description, task.max_source_length) == ("Say the opposite of the word.", 1024)


def test_older_files_with_plain_texts_are_read(tmp_path):
    changes = {
        "Definition": "Answer.",
        "Positive Examples": [{"input": "a", "output": ["b", "c"]}],
        "Instances": [{"id": "1", "input": "x", "output": "y"}] * 3,
    }
    (task,), rows = load_natural_instructions(write(tmp_path, **changes), positive_examples=1)
    example = task.format(rows[task.name]["train"][0])
    assert " Output: b.\n" in example.source and example.references == ("y",)


def test_the_only_part_is_cut_and_names_choose(tmp_path):
    write(write(tmp_path), "task1_other")
    tasks, rows = load_natural_instructions(tmp_path)
    assert [task.name for task in tasks] == ["task1_other", "task9_opposites"] == list(rows)
    (task,), rows = load_natural_instructions(tmp_path, ["task9_opposites"])
    splits = load_splits(task, rows[task.name], prefix="colon")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 2, 2]
    assert splits.test[0].source.startswith("task9_opposites: Definition: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Instances": []}, r"task9_opposites\.json: 'Instances' must be a list that is not empty"),
        ({"Instances": [{"input": 3, "output": ["a"]}]}, r"instance 0 \(from 0\) needs text under"),
        ({"Instances": [{"input": "a"}]}, r"instance 0 \(from 0\) needs text under"),
        ({"Definition": []}, "'Definition' must be text or a list of it"),
        ({"Positive Examples": [{"input": "a"}]}, r"positive example 0 \(from 0\) needs texts"),
        ({"Positive Examples": "a"}, r"positive example 0 \(from 0\) needs texts"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_natural_instructions(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "it lacks a JSON object"),
        ("{", "not valid JSON"),
        ('{"Definition": "a"}', "it lacks 'Positive Examples'"),
    ],
)
def test_files_that_are_no_task_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_natural_instructions(tmp_path)


def test_folders_and_names_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no JSON files"):
        load_natural_instructions(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be an existing folder"):
        load_natural_instructions(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no file task2\.json"):
        load_natural_instructions(write(tmp_path), ["task2"])
    with pytest.raises(ValueError, match="positive_examples must not be negative, got -1"):
        load_natural_instructions(tmp_path, positive_examples=-1)


def test_a_row_without_outputs_is_named(tmp_path):
    rows = [{"id": "1", "input": "x", "output": []}] * 3
    (task,), found = load_natural_instructions(write(tmp_path, Instances=rows))
    with pytest.raises(ValueError, match="row .* no answer in column 'output'"):
        load_splits(task, found[task.name])


# --- from the command line -----------------------------------------------------------------------


def test_beside_a_known_task_in_one_model(tmp_path, capsys):
    data, folder = write_tiny_data(tmp_path / "data"), write(tmp_path / "ni")
    words = ["multitask", "--model", data / "t5", "--data", data, "--tasks", "task9_opposites,sst2",
             "--natural-instructions", folder, "--methods", "lora", "--units", 4, "--seeds", 1,
             "--steps", 2, "--batch-size", 4, "--out", tmp_path / "out"]  # fmt: skip
    assert run_cli(*words) == 0
    results = json.loads((tmp_path / "out" / "lora" / "seed1" / "results.json").read_text())
    assert set(results["scores"]["task9_opposites"]) == {"rouge1", "rougeL", "average"}
    lengths = {"task9_opposites": 1024, "sst2": 256}
    assert results["request"]["options"]["max_source_length"] == lengths
    assert run_cli(*words) == 0
    words[words.index("task9_opposites,sst2")] = "task10,sst2"
    assert run_cli(*words) == 1
    assert "unknown task 'task10'" in capsys.readouterr().err


# --- ROUGE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "one", "longest"),
    [
        ("the cat sat", "the cat sat", 1.0, 1.0),
        # Three of four words, two in order: 2·3/8 and 2·2/8.
        ("a b c d", "b a c e", 6 / 8, 4 / 8),
        # A word counts as often as both have it.
        ("a a a", "a a", 4 / 5, 4 / 5),
        ("police killed the gunman", "police kill the gunman", 6 / 8, 6 / 8),
        ("the gunman kill police", "police killed the gunman", 6 / 8, 4 / 8),
        # Case, punctuation and hyphens are no words.
        ("It's  a-b!", "it s a b", 1.0, 1.0),
        ("", "a", 0.0, 0.0),
        ("è", "è", 0.0, 0.0),
        ("x", "y", 0.0, 0.0),
    ],
)
def test_rouge_by_hand(prediction, reference, one, longest):
    assert rouge_1(prediction, reference) == pytest.approx(one)
    assert rouge_l(prediction, reference) == pytest.approx(longest)


def test_the_best_reference_counts_and_texts_are_averaged():
    scores = compute(["rouge1", "rougeL"], ["a b", "c"], [("b a", "a x b"), ("d",)])
    # 100 and 0 for rouge1; for rougeL max(2·1/4, 2·2/5) = 0.8 and 0.
    assert scores == {
        "rouge1": pytest.approx(50.0),
        "rougeL": pytest.approx(40.0),
        "average": pytest.approx(45.0),
    }


words = st.lists(st.sampled_from("abc"), max_size=6)


def longest_by_search(first, second):
    """Every subsequence of the first, longest first."""
    for size in range(len(first), 0, -1):
        for chosen in itertools.combinations(first, size):
            rest = iter(second)
            if all(word in rest for word in chosen):
                return size
    return 0


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(first, second):
    matched = longest_by_search(first, second)
    expected = 2 * matched / (len(first) + len(second)) if matched else 0.0
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)
    assert rouge_l(" ".join(first), " ".join(second)) <= rouge_1(" ".join(first), " ".join(second))
