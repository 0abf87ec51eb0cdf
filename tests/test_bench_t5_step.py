"""The T5 benchmark: its contenders compute the same, its operations are counted, reports follow."""

import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks"

# The modules of benchmarks/ import one another by name, as scripts beside each other do.
sys.path.insert(0, str(FOLDER))
import bench_t5_step as bench  # noqa: E402
import measure  # noqa: E402
import records  # noqa: E402
import report  # noqa: E402
import t5_cases  # noqa: E402
import t5_checking  # noqa: E402
import t5_models  # noqa: E402
import t5_records  # noqa: E402
import t5_report  # noqa: E402
import t5_run  # noqa: E402
import tail_forms  # noqa: E402
from t5_cases import FORWARD, GENERATE, OURS, PLAIN, STEP  # noqa: E402

sys.path.remove(str(FOLDER))

SHAPE = t5_cases.Shape("t5-tiny", H=32, D=64, heads=2, d_kv=16, layers=2, vocabulary=80)
TINY = t5_cases.T5Case(SHAPE, 2, source=12, target=5, B=3, E=3, R=4, prompt=5, reduction=4)


@pytest.fixture(autouse=True)
def _one_thread_and_few_tokens(monkeypatch):
    """Threads that wait for one another take longer than anything here."""
    monkeypatch.setattr(t5_models, "GENERATED", 4)
    with measure.one_thread():
        yield


@pytest.fixture(scope="module")
def models():
    return t5_models.Models(TINY, torch.float32, "cpu")


# --- contenders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", [*tail_forms.FORMS, OURS])
def test_every_contender_computes_the_published_formulation(contender, models):
    exact = t5_models.Models(TINY, torch.float64, "cpu")
    found, expected = models.results(contender), exact.results("published")
    assert {"logits", "loss", "aux_loss", "d_prompt.prompt"} < found.keys()
    for part in ("w_gate", "target_adapter.up.weight", "layer_norm.weight"):
        assert any(name.endswith(part) for name in found)
    error, name = t5_checking.deviation(found, expected)
    assert error < 2e-5, name


@pytest.mark.parametrize("contender", [*tail_forms.FORMS, OURS])
def test_bfloat16_has_the_same_weights(contender):
    exact = t5_models.Models(TINY, torch.float64, "cpu").results("published")
    low = t5_models.Models(TINY, torch.bfloat16, "cpu")
    assert low.trained.keys() == {n[2:] for n in exact if n.startswith("d_")}
    assert t5_checking.check(low.results(contender), exact, "bf16") > 0


def test_contenders_generate_the_same_tokens_and_logits(models):
    tokens = {name: models.generate(name) for name in t5_models.CONTENDERS}
    assert {tuple(t.shape) for t in tokens.values()} == {(TINY.B, 5)}
    logits = models.forward("published")
    for name in (*tail_forms.FORMS, OURS):
        t5_checking.check_tokens(tokens[name], tokens["published"])
        torch.testing.assert_close(models.forward(name), logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(models.forward(PLAIN), logits, atol=1e-2)


def test_a_step_leaves_no_gradients_and_plain_t5_has_no_adapters(models):
    out = models.step(PLAIN)
    assert not hasattr(out, "aux_loss") and models.prompt.grad is None
    models.step(OURS)
    assert all(p.grad is None for p in models.adapted.parameters())


def test_the_tail_alone_computes_the_published_formulation():
    expected = t5_run.TailRun(torch.float64, "cpu", TINY).results("published")
    tail = t5_run.TailRun(torch.float32, "cpu", TINY)
    for name in (*tail_forms.FORMS, OURS):
        error, tensor = t5_checking.deviation(tail.results(name), expected)
        assert error < 2e-5, tensor
    z, dx, *_ = tail.run(t5_run.MATMULS)()
    assert (z.shape, dx.shape) == (tail.grad.flatten(0, 1).shape, tail.h.flatten(0, 1).shape)


def test_a_wrong_contender_is_refused_and_the_others_are_timed(models, monkeypatch):
    def wrong(*arguments):
        z, loss = tail_forms.stacked(*arguments)
        return z, None if loss is None else 1.01 * loss

    tails = [tail_forms.FormTail(tail, wrong) for tail in models.tails[OURS]]
    monkeypatch.setitem(models.tails, "stacked", tails)
    right = t5_run.checked(models, t5_run.reference(TINY, "cpu"), "fp32")
    assert right["stacked"].startswith("AssertionError: ") and right[OURS] < 1e-4
    monkeypatch.setattr(t5_run, "peak_memory_mib", lambda run, device: None)
    settings = dict(device="cpu", rounds=2, cell_s=0.01)
    rows = t5_run.measure_mode(TINY, models, STEP, "fp32", right, **settings)
    refused = {row.provider: row for row in rows}.pop("stacked")
    assert refused.error == right["stacked"] and refused.median_ms is None
    assert t5_report.row_cells(refused)[3].startswith("refused: AssertionError: ")
    assert all(row.median_ms > 0 and row.flop_share > 0 for row in rows if row is not refused)
    plain, published = rows[:2]
    assert plain.added is None and published.added is not None
    assert "stacked" not in published.speedup and published.speedup["published"] == 1


def test_other_tokens_are_refused():
    tokens = torch.zeros(2, 5)
    t5_checking.check_tokens(tokens, tokens.clone())
    other = tokens.index_fill(1, torch.tensor([3]), 1.0)
    with pytest.raises(AssertionError, match="2 of 2 sequences"):
        t5_checking.check_tokens(other, tokens)


# --- operations ----------------------------------------------------------------------------------


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.fixture
def counted_models(models):
    """With attention written out: the counter takes a fused one's recomputation for work."""
    for t5 in (models._plain, models.adapted.base_model):
        t5.set_attn_implementation("eager")
    yield models
    for t5 in (models._plain, models.adapted.base_model):
        t5.set_attn_implementation("sdpa")


def extras(mode):
    """What the formula of the adapters leaves out: gates, prompt, the first self-attention."""
    case, shape = TINY, SHAPE
    gates = 2 * case.layers * case.B * (shape.D + shape.H) * case.E
    prompt = 2 * 2 * case.E * case.prompt**2 * shape.H
    if mode == FORWARD:
        return gates + prompt
    width = shape.heads * shape.d_kv
    # The trained layer norm before it needs its gradient, plain T5 nothing.
    first = case.target * (10 * shape.H + 8 * case.target + 2 * case.encoded) * width
    return 3 * gates + 2 * prompt + case.B * first


@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_operations_are_what_is_computed(mode, counted_models):
    call = {FORWARD: counted_models.forward, STEP: counted_models.step}[mode]
    plain = counted(call, PLAIN)
    assert plain == TINY.t5_flop(mode)
    assert counted(call, "stacked") - plain == TINY.adapters_flop(mode) + extras(mode)
    assert TINY.share(mode) == TINY.mixture_flop(mode) / plain
    assert TINY.share(mode) < TINY.share(mode, all_adapters=True)


def test_the_share_of_the_mixture_on_the_published_shapes():
    for case in t5_cases.select("cuda"):
        assert 0.1 < case.share(FORWARD) < 0.3 and case.share(GENERATE) is None
    base = next(c for c in t5_cases.select("cuda") if c.name == "t5-base 8 × 128 → 16")
    assert 0.16 < base.share(FORWARD) < 0.22 and 0.16 < base.share(STEP) < 0.22


# --- results and report --------------------------------------------------------------------------

STAMP = records.environment(2) | {
    "date": "2031-01-02T03:04:05+00:00", "commit": "0123abcd", "dirty": False,
}  # fmt: skip


def synthetic(*, partial=False, ours_s=0.09, device="cpu"):
    """A result as a run leaves it: plain T5 takes 0.085 s, the baselines 0.3 s."""
    rows = []
    for case in t5_cases.select("cpu"):
        for dtype in ("fp32", "bf16"):
            for mode in t5_cases.MODES:
                for name in t5_models.CONTENDERS:
                    rows.append(filled(t5_records.t5_row(case, dtype, mode, name), ours_s))
                    rows[-1].flop_share = case.share(mode)
    for dtype in ("fp32", "bf16"):
        for name in (*tail_forms.FORMS, OURS, t5_run.MATMULS):
            tail = {"group": t5_records.TAIL, "name": t5_cases.TAIL_NAME}
            row = t5_records.t5_row(t5_cases.TAIL, dtype, STEP, name, **tail)
            rows.append(filled(row, ours_s))
            rows[-1].share_of_matmuls = 0.5
    return records.Result(device, STAMP, partial, OURS, {}, rows, suite=t5_records.SUITE)


def filled(row, ours_s):
    seconds = {PLAIN: 0.085, OURS: ours_s, t5_run.MATMULS: 0.09}.get(row.provider, 0.3)
    row.set_times([seconds] * 3)
    row.speedup = {name: 0.3 / seconds for name in tail_forms.FORMS}
    row.peak_memory_mib = 1000 * seconds**2
    if row.group == t5_records.MODEL and row.provider != PLAIN:
        row.added = seconds / 0.085 - 1
    return row


def test_a_run_survives_its_files(tmp_path):
    result = synthetic()
    result.rows[1] = dataclasses.replace(result.rows[1], error="AssertionError: loss")
    path = result.save(tmp_path)
    assert path.name == "cpu-t5-2031-01-02-0123abcd.json"
    assert t5_records.load(path) == result
    assert len(path.with_suffix(".csv").read_text().splitlines()) == len(result.rows) + 1
    assert t5_records.newest_t5(tmp_path) == {"cpu": result}
    assert records.newest(tmp_path) == {}


def test_targets_are_reached_or_not():
    reached = [line[-1] for line in t5_report.target_cells(synthetic())]
    assert reached == ["yes"] * 7
    # As fast as published: the ratios are 1, the added time is 2.5 times that of T5.
    lost = [line[-1] for line in t5_report.target_cells(synthetic(ours_s=0.3))]
    assert lost == ["**no**"] * 7
    empty = dataclasses.replace(synthetic(), rows=[])
    assert {line[-1] for line in t5_report.target_cells(empty)} == {"not measured"}
    (line,) = t5_report.target_cells(synthetic(device="cuda"))
    assert line[-1] == "yes"


def test_a_refused_cell_misses_its_target():
    result = synthetic()
    for row in result.rows:
        if row.provider == OURS and row.case.startswith("t5-base") and row.dtype == "bf16":
            row.error = "AssertionError: d_prompt"
    reached = [line[-1] for line in t5_report.target_cells(result)]
    assert reached == ["yes", "**no**", "**no**", "**no**", "yes", "yes", "yes"]


def test_the_report_shows_the_newest_run_and_nothing_where_there_is_none(tmp_path):
    before = report.texts({}, tmp_path)
    synthetic(partial=True).save(tmp_path)
    assert report.texts({}, tmp_path) == before
    synthetic(ours_s=0.35).save(tmp_path)
    text = report.texts({}, tmp_path)[tmp_path / "README.md"]
    assert "## cpu: PEMT's second stage on T5" in text and "commit 0123abcd" in text
    assert text.count("| t5-base 8 × 128 → 16 |") == 2 * len(t5_cases.MODES) * 4
    assert "3 layers of encoder and decoder each" in text and f"0.86 {t5_report.LOST}" in text


# --- the run and its command line ----------------------------------------------------------------


def run_tiny(tmp_path, monkeypatch, **changes):
    monkeypatch.setattr(t5_run, "TAIL_CASE", TINY)
    monkeypatch.setattr(t5_run, "peak_memory_mib", lambda run, device: 1.0)  # it takes a second
    given = dict(
        device="cpu", quick=False, only="", rounds=None, layers=None, profile=False,
        out=tmp_path, cases=[TINY], tail=True,
    )  # fmt: skip
    monkeypatch.setattr(bench, "CELL_S", 0.01)
    return bench.run(argparse.Namespace(**given | changes), STAMP)


def test_a_run_end_to_end(tmp_path, monkeypatch, capsys):
    result, path = run_tiny(tmp_path, monkeypatch, rounds=2, profile=True)
    assert path.name == "cpu-t5-2031-01-02-0123abcd-partial.json"
    assert t5_records.load(path) == result
    assert [row.error for row in result.rows] == [None] * (2 * 3 * 4 + 2 * 4)
    assert all(row.median_ms > 0 for row in result.rows)
    ours = [row for row in result.rows if row.provider == OURS]
    assert all(row.impl and row.deviation < 0.25 for row in ours)
    assert all(row.peak_memory_mib is None for row in result.rows if row.mode == GENERATE)
    t5_report.print_t5(result, bench.console)
    shown = capsys.readouterr().out
    assert "one step of ours" in shown and "not measured" in shown


def test_a_whole_run_leaves_no_partial_files(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(bench, "MODES", (FORWARD,))
    result, path = run_tiny(tmp_path, monkeypatch)
    assert not result.partial and {file.name for file in tmp_path.iterdir()} == {
        path.name, path.with_suffix(".csv").name,
    }  # fmt: skip


def test_without_a_reference_every_row_says_why(tmp_path, monkeypatch):
    def fails(*arguments):
        raise MemoryError("too large")

    monkeypatch.setattr(bench, "reference", fails)
    result, _ = run_tiny(tmp_path, monkeypatch, tail=False)
    assert {row.error for row in result.rows} == {"no reference: MemoryError: too large"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers 0", "--layers must be at least 1, got 0"),
        ("--layers 7", "--layers must be at most 6 for t5-small"),
        ("--rounds 0", "--rounds must be at least 1, got 0"),
        ("--only t5-huge", "'t5-huge' is in none of: tail of t5-base"),
        ("--device tpu", "invalid choice: 'tpu'"),
    ],
)
def test_errors_of_the_command_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_t5_step.py", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        bench.arguments()
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_t5_step.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        bench.arguments()
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_quick_and_only_choose_cases(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_t5_step.py", "--quick"])
    quick = bench.arguments()
    assert [c.layers for c in quick.cases] == [1] and quick.tail and quick.rounds == 3
    monkeypatch.setattr(
        sys, "argv", ["bench_t5_step.py", "--only", "t5-base 8 × 512", "--layers=4"]
    )
    (case,) = bench.arguments().cases
    assert (case.name, case.layers) == ("t5-base 8 × 512 → 64", 4)
    assert {c.layers for c in t5_cases.select("cuda")} == {6, 12, 24}
