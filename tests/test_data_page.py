"""docs/data.md: its table is the one of the tasks, its code runs, its examples are true."""

import re
from pathlib import Path

import pytest
from tiny_data import run_cli

from pemt_fast.data import TASKS
from pemt_fast.training.task_table import COLUMNS, markdown_table, task_rows

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
BEGIN, END = "<!-- tasks -->\n", "<!-- /tasks -->"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def test_the_table_is_the_current_one(page):
    table = page.partition(BEGIN)[2].partition(END)[0]
    assert table == markdown_table(), (
        "docs/data.md is stale: put what `pemt-fast tasks --markdown` prints between its markers"
    )


def test_every_task_has_a_row_and_no_cell_breaks_the_table():
    rows = task_rows()
    assert [row[0] for row in rows] == list(TASKS)
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert not [cell for row in rows for cell in row if not cell or "|" in cell or "\n" in cell]


# By hand, a row of each kind.
@pytest.mark.parametrize(
    "row",
    [
        "| mnli | source | nyu-mll/glue, mnli | premise: hypothesis: | entailment, neutral, "
        "contradiction | accuracy | validation_mismatched / validation_matched | 256 / 8 | 128 | 5 "
        "|",
        "| multirc | target | aps/super_glue, multirc | question: answer: paragraph: | False, True "
        "| f1, group_em | halves of validation | 348 / 8 | 64 | 10 |",
        "| nq | target | lucadiliello/naturalquestionsshortqa | question: context: | first answer "
        "| squad_em, squad_f1 | 1000 of train / validation | 512 / 128 | 32 | 5 |",
        "| yelp_polarity | target | fancyzhx/yelp_polarity | sentence: | 0, 1 | accuracy | 1000 of "
        "train / test or validation, 100000 of train | 256 / 8 | 100 | 20 |",
        "| mpqa | – | – (local files) | text: | negative, positive | accuracy | 1000 of train / "
        "test or validation | 256 / 8 | 100 | 20 |",
        "| mmlu | – | cais/mmlu, all | question: A: B: … | text of the option; index: its letter | "
        "accuracy | validation / test, train auxiliary_train | 512 / 128 | 100 | 20 |",
    ],
)
def test_rows_by_hand(row):
    assert row in markdown_table().splitlines()


def test_the_command_prints_the_tasks(capsys):
    assert run_cli("tasks", "--markdown") == 0
    assert capsys.readouterr().out == markdown_table()
    assert run_cli("tasks") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)


def test_the_code_of_the_page_runs(page, capsys):
    """Its blocks one after the other; a comment behind `print` says what is printed."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised != []


def test_the_examples_of_the_page_are_true(page):
    cola = {"sentence": "They left.", "label": 1}
    for prefix in ("none", "name", "colon"):
        source = TASKS["cola"].format(cola, prefix=prefix).source
        assert f"| `{prefix}` | `{source}` |" in page
    ice = {"question": "What melts?", "answerKey": "C",
           "choices": {"text": ["rock", "sand", "ice", "air"], "label": list("ABCD")}}  # fmt: skip
    written = [TASKS["arc_easy"].format(ice, style) for style in ("name", "index")]
    line = "{}    ->    {}   (--label-style index: {})"
    assert line.format(written[0].source, written[0].target, written[1].target) in page
