"""The Poly benchmark: its contenders compute the same, wrong ones are refused, reports follow."""

import argparse
import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is a development dependency")
FOLDER = Path(__file__).parents[1] / "benchmarks"

# The modules of benchmarks/ import one another by name, as scripts beside each other do.
sys.path.insert(0, str(FOLDER))
import bench_poly as bench  # noqa: E402
import command_line  # noqa: E402
import measure  # noqa: E402
import poly_cases  # noqa: E402
import poly_models  # noqa: E402
import poly_records  # noqa: E402
import poly_report  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import t5_cases  # noqa: E402
from poly_cases import COMPILED, FORWARD, GENERATE, OURS, PEFT, PLAIN, STEP, PolyCase  # noqa: E402

sys.path.remove(str(FOLDER))

LAYER = PolyCase("tiny", 3, 5, 4, P=2, R=2, M=4, D=16, H=24)
MANY = PolyCase("tiny, 40 skills", 3, 1, 40, R=2, M=4, D=16, H=24)
MODEL = PolyCase("tiny T5", 2, 6, 3, P=2, R=2, M=4, target=4, layers=1)
SHAPE = t5_cases.Shape("t5-tiny", H=32, D=64, heads=2, d_kv=16, layers=1, vocabulary=80)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Threads that wait for one another take longer than anything here."""
    monkeypatch.setattr(poly_models, "BASE", SHAPE)
    monkeypatch.setattr(poly_models, "GENERATED", 4)
    with measure.one_thread():
        yield


def options(tmp_path=None):
    return argparse.Namespace(device="cpu", rounds=2, cell_s=0.01, out=tmp_path)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "noise"])
@pytest.mark.parametrize(("kind", "case"), [("Layers", LAYER), ("Models", MODEL)])
def test_ours_computes_what_peft_computes(kind, case, training):
    subject = getattr(poly_models, kind)(case, torch.float32, "cpu")
    found = {name: subject.results(name, training=training) for name in (PEFT, OURS)}
    assert found[OURS].keys() == found[PEFT].keys()
    for name, expected in found[PEFT].items():
        torch.testing.assert_close(found[OURS][name], expected, rtol=1e-4, atol=1e-5)


def test_the_compiled_contender_computes_what_peft_computes():
    layers = poly_models.Layers(LAYER, torch.float32, "cpu")
    layers.compiled = poly_models._peft_arithmetic  # the function that is compiled
    for name, expected in layers.results(PEFT).items():
        torch.testing.assert_close(layers.results(COMPILED)[name], expected)


def test_a_wrong_contender_is_refused_and_not_timed(monkeypatch):
    right = poly_models.Layers.results

    def wrong(self, contender, **arguments):
        found = right(self, contender, **arguments)
        return {**found, "d_b": -found["d_b"]} if contender == OURS else found

    monkeypatch.setattr(poly_models.Layers, "results", wrong)
    rows = bench.measure_case(LAYER, options())
    assert {row.provider for row in rows if row.error} == {OURS}
    assert all("d_b: off by 2" in row.error for row in rows if row.provider == OURS)
    assert all(row.median_ms is None for row in rows if row.error)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(poly_models, "BASE", SHAPE)
    patch.setattr(poly_models, "GENERATED", 4)
    rows = [row for case in (LAYER, MANY, MODEL) for row in bench.measure_case(case, options())]
    patch.undo()
    stamp = {**records.environment(1), "commit": "abcdef12", "dirty": False}
    found = records.Result("cpu", stamp, False, OURS, {}, rows, suite=poly_records.SUITE)
    return found, found.save(tmp_path_factory.mktemp("results"))


def test_every_cell_has_its_contenders(result):
    found, _ = result
    layer_cells = {(c, d, m) for c in ("tiny", "tiny, 40 skills") for d in ("fp32", "bf16")
                   for m in (FORWARD, STEP)}  # fmt: skip
    model_cells = {("tiny T5", d, m) for d in ("fp32", "bf16") for m in (FORWARD, STEP, GENERATE)}
    cells = {rows[0].cell: rows for rows in found.cells()}
    assert cells.keys() == layer_cells | model_cells
    for rows in cells.values():
        assert [row.provider for row in rows] == [PLAIN, PEFT, OURS]
        assert not any(row.error for row in rows)
        assert all(row.rounds == 2 for row in rows)
        own = rows[-1]
        assert own.speedup[PEFT] > 0 and own.deviation < 0.25
        assert rows[0].added == 0.0 and rows[0].deviation is None
        assert (own.E, own.R) == ({"tiny": 4, "tiny T5": 3}.get(own.case, 40), 2)


def test_a_saved_result_is_read_again(result):
    found, path = result
    assert poly_records.load(path) == found
    assert poly_records.newest_poly(path.parent) == {"cpu": found}
    assert records.newest(path.parent) == {}  # another suite


def test_targets_follow_the_rows(result):
    found = copy.deepcopy(result[0])
    lines = {(line[0], line[1]): line for line in poly_report.target_cells(found)}
    assert lines["T5-base, generate", "× peft"][3] == "2"
    assert lines["32 skills or more", "× peft"][3] == "4"
    for row in found.rows:
        row.peak_memory_mib = {PEFT: 2.0, OURS: 1.0}.get(row.provider)
        if row.provider == OURS:
            row.speedup[PEFT] = 1.5
    lines = {(line[0], line[1]): line for line in poly_report.target_cells(found)}
    assert lines["one layer, step", "× peft"][4:] == ["1.50", "tiny, fp32, step", "yes"]
    assert lines["32 skills or more", "× peft"][-1] == "**no**"
    assert lines["everywhere", "peak memory / peft's"][2:6:2] == ["≤ 1.00", "0.50"]


def test_the_report_holds_every_row(result, tmp_path, capsys):
    found, path = result
    text = "\n\n".join(poly_report.section(found))
    assert text.count("\n| tiny |") == 12 and text.count("\n| tiny T5 |") == 18
    assert "× peft" in text and text.count("| ours (") == 14
    texts = report.texts({}, path.parent)
    assert text in texts[path.parent / "README.md"]
    losing = copy.deepcopy(next(row for row in found.rows if row.provider == OURS))
    losing.speedup[PEFT] = 0.5
    assert "0.50 ▼" in poly_report.row_cells(losing)


def test_the_readme_follows_the_newest_run(result, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # `write` imports the plots when they are needed
    found = copy.deepcopy(result[0])
    for row in found.rows:
        if row.provider == OURS and row.group == poly_records.LAYER:
            row.speedup[PEFT] = {"tiny": 0.9, "tiny, 40 skills": 1.6}[row.case]
        if row.group == poly_records.MODEL and row.provider in (PEFT, OURS) and row.mode == STEP:
            row.error, row.speedup = "AssertionError: d_a", {}
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    found.save(folder)
    readme.write_text(f"before\n{report.OPEN}\nold\n{report.CLOSE}\nafter\n")
    assert any(str(readme) in name for name in report.stale({}, folder, readme))
    report.write({}, folder, readme)
    assert report.stale({}, folder, readme) == []
    text = readme.read_text()
    assert "commit abcdef12" in text and text.count("| One layer of T5-base |") == 4
    assert "| One layer of T5-base | fp32 | forward | 2 | 1.20 (0.90–1.60, 1 ▼) |" in text
    assert "| bf16 | step | 0; refused: peft 1, ours 1 | – |" in text
    found.rows = [row for row in found.rows if row.group == poly_records.LAYER]
    found.save(folder)
    assert any(str(readme) in name for name in report.stale({}, folder, readme))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--only dozen", "'dozen' is in none of: one token, one token, MHR, beams"),
    ],
)
def test_errors_of_the_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_poly.py", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        bench.arguments()
    assert message in capsys.readouterr().err


def test_a_run_ends_with_what_was_refused(result, monkeypatch, capsys):
    found, path = copy.deepcopy(result)
    assert command_line.conclude(found, path) == 0
    assert capsys.readouterr().out == f"written: {path}\n"
    monkeypatch.setattr(command_line, "MOST_REFUSALS", 1)
    for row in found.rows[:3]:
        row.error = "AssertionError: [d_a] is off"
    assert command_line.conclude(found, path) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "tiny, fp32, forward: plain was refused: AssertionError: [d_a] is off", "and 2 more",
    ]  # fmt: skip


def test_the_cases_are_of_t5_base():
    names = [case.name for case in (*poly_cases.LAYERS, *poly_cases.models(3))]
    assert len(set(names)) == len(names)
    widths = {(case.D, case.H) for case in poly_cases.LAYERS}
    assert widths == {(768, 768), (768, 3072), (3072, 768)}
    assert {case.P for case in poly_cases.LAYERS} == {1, 4}
