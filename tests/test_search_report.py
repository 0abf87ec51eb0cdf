"""Files of a search: numbers as in model and history, pictures with something in them."""

import dataclasses
import json

import pytest
import torch
from linear_models import tiny_model
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

import pemt_fast
from pemt_fast.methods.peml import SHARING
from pemt_fast.nn.prefix_operators import OPERATORS
from pemt_fast.training import search_pictures
from pemt_fast.training.search_pictures import (
    STYLES,
    entropies,
    layer_label,
    save_architecture,
    save_weights,
)
from pemt_fast.training.search_report import describe, markdown, networks, write_search

OPERATOR_NAMES = ("skip", "gated", "conv3", "none")
DEPTH = 2
T5_LAYERS = [
    *(f"encoder.block.{i}.layer.0.SelfAttention" for i in range(12)),
    *(
        f"decoder.block.{i}.layer.{j}.{kind}"
        for i in range(12)
        for j, kind in enumerate(("SelfAttention", "EncDecAttention"))
    ),
]


def searched(sharing="none", kind="t5", **changes):
    """In the middle of a search, every cell with weights of its own, and its history."""
    config = pemt_fast.PemlConfig(
        target_modules=(), prefix_depth=DEPTH, operators=OPERATOR_NAMES, sharing=sharing,
        prefix_length=3, prefix_width=4, **changes,
    )  # fmt: skip
    model = pemt_fast.get_model(tiny_model(kind), config)
    history = []
    for step in range(1, 5):
        with torch.no_grad():
            for own in model.logits():
                own.alpha.add_(torch.randn_like(own.alpha))
        model.search_at(step / 8)
        weights = [own.tolist() for own in model.architecture_weights()]
        history.append({"step": 10 * step, "weights": weights})
    return model, history


def course(count, depth, operators=tuple(OPERATORS), steps=5):
    logits = torch.randn(count, depth, len(operators))
    return [
        {"step": 10 * i, "weights": (logits * i / 2).softmax(-1).tolist()} for i in range(steps)
    ]


def found_by(history, operators=tuple(OPERATORS), layers=T5_LAYERS):
    """As `networks` returns it, of the last step."""
    last = torch.tensor(history[-1]["weights"])
    return [
        {
            "layers": layers if len(last) == 1 else [layers[n]],
            "cells": [
                {
                    "operator": operators[int(weights.argmax())],
                    "weight": float(weights.max()),
                    "next": operators[int(weights.argsort()[-2])],
                    "weights": dict(zip(operators, weights.tolist(), strict=True)),
                }
                for weights in own
            ],
        }
        for n, own in enumerate(last)
    ]


def pixels(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    return torch.from_numpy(imread(path))[..., :3]


def shows(image, color):
    """Whether some pixels have the colour, but for what rounding to bytes does."""
    return bool(((image - torch.tensor(to_rgb(color))).abs().amax(-1) < 0.01).sum() > 20)


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are before they are saved, by the name of their file."""
    saved, save = {}, search_pictures._save
    monkeypatch.setattr(
        search_pictures,
        "_save",
        lambda figure, path: (saved.__setitem__(str(path), figure), save(figure, path)),
    )
    return lambda path: saved[str(path)]


def texts(figure: Figure):
    return [text for axis in figure.axes for text in axis.texts if text.get_text()]


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARING)
def test_the_files_are_those_of_the_search(sharing, tmp_path):
    model, history = searched(sharing)
    out = tmp_path / "new" / "folder"
    search = write_search(model, history, out, seconds=12.345)
    names = {"search.json", "search.md", "architecture.png", "weights.png"}
    assert {path.name for path in out.iterdir()} == names
    read = json.loads((out / "search.json").read_text())
    assert read == json.loads(json.dumps(search))
    assert read["history"] == history and read["seconds"] == 12.345
    assert read["config"] == json.loads(json.dumps(model.adapter_config.to_dict()))
    assert tuple(map(tuple, read["architecture"])) == model.architecture()
    assert read["schedule"]["temperature"]["first"] == 1.0
    assert read["schedule"]["temperature"]["last"] == 0.1
    assert read["schedule"]["temperature"]["reached"] == pytest.approx(0.1**0.5)
    assert read["schedule"]["entropy_weight"] == pytest.approx(
        {"first": 0.0, "last": 0.1, "reached": 0.05}
    )
    layers = list(model.prefixes())
    assert len(layers) == 6
    expected = [[name] for name in layers] if sharing == "none" else [layers]
    assert [own["layers"] for own in read["networks"]] == expected
    for own, weights, cells in zip(
        read["networks"], model.architecture_weights(), model.architecture(), strict=True
    ):
        assert [tuple(c["weights"]) for c in own["cells"]] == [OPERATOR_NAMES] * DEPTH
        assert [list(c["weights"].values()) for c in own["cells"]] == weights.tolist()
        assert tuple(c["operator"] for c in own["cells"]) == cells
        assert all(c["weight"] == c["weights"][c["operator"]] for c in own["cells"])
        for cell in own["cells"]:
            others = {n: w for n, w in cell["weights"].items() if n != cell["operator"]}
            assert others[cell["next"]] == max(others.values())
    assert (out / "search.md").read_text() == markdown(search)
    for name in ("architecture.png", "weights.png"):
        image = pixels(out / name)
        assert image.std() > 0.05
        assert any(shows(image, STYLES[n][0]) for cells in model.architecture() for n in cells)


def test_another_model_names_its_layers(tmp_path):
    model, history = searched(kind="llama")
    found = describe(model, history, seconds=1)["networks"]
    assert [own["layers"] for own in found] == [[f"model.layers.{i}.self_attn"] for i in range(2)]
    assert "model.layers." in markdown(describe(model, history, seconds=1))


def test_the_table_counts_operators_and_names_the_extremes():
    model, history = searched()
    with torch.no_grad():
        for n, own in enumerate(model.logits()):
            own.alpha.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))
            if n == 3:  # none has more than the one that is chosen
                own.alpha[0] = torch.tensor([0.0, 1.0, 0.5, 3.0])
            if n == 4:
                own.alpha[1] = torch.tensor([0.5, 4.0, 0.0, 0.0])
    model.schedule.at(0.0)
    lines = markdown(describe(model, history, seconds=61.28)).splitlines()
    assert lines[:5] == [
        "| operator | cell 1 | cell 2 | all |",
        "| --- | ---: | ---: | ---: |",
        "| skip | 0 | 5 | 5 |",
        "| gated | 1 | 1 | 2 |",
        "| conv3 | 5 | 0 | 5 |",
    ]
    one, other = (torch.tensor(a).softmax(0) for a in ([0.0, 1.0, 0.5, 3.0], [0.5, 4.0, 0.0, 0.0]))
    assert "| networks | 6 for 6 attention layers |" in lines
    assert f"| most decided | decoder 1 self, cell 2: gated {other[1]:.3f}, next skip " in "".join(
        line for line in lines if "most decided" in line
    )
    least = f"decoder 0 cross, cell 1: gated {one[1]:.3f}, next none {one[3]:.3f}"
    assert f"| least decided | {least} |" in lines
    entropy = torch.stack([own.entropy() for own in model.logits()]).mean()
    assert f"| mean entropy | {entropy:.3f} |" in lines
    assert "| seconds | 61.3 |" in lines


def test_after_the_search_the_weights_are_those_of_the_last_step():
    model, history = searched()
    during = describe(model, history, seconds=1)
    model.discretise()
    after = describe(model, history, seconds=1)
    assert after["networks"] == during["networks"]
    assert (during["weights_of"], after["weights_of"]) == ("the model", "step 40")
    other = describe(model, history[:2], seconds=1)
    assert [list(c["weights"].values()) for own in other["networks"] for c in own["cells"]] == [
        row for own in history[1]["weights"] for row in own
    ]
    assert other["architecture"] == after["architecture"]


def test_one_operator_has_no_rival(tmp_path):
    model, history = searched("network")
    config = dataclasses.replace(model.adapter_config, operators=("conv3",))
    model = pemt_fast.get_model(tiny_model("t5"), config)
    history = [{"step": 1, "weights": [own.tolist() for own in model.architecture_weights()]}]
    search = write_search(model, history, tmp_path, seconds=0)
    assert search["networks"][0]["cells"][0]["next"] is None
    assert "cell 2: conv3 1.000 |" in (tmp_path / "search.md").read_text()


def test_entropy_is_that_of_the_search():
    model, _ = searched()
    for own in model.logits():
        torch.testing.assert_close(entropies(own.weights(), own.operators).mean(), own.entropy())


def test_layer_labels():
    assert layer_label(T5_LAYERS[11]) == "encoder 11 self"
    assert layer_label(T5_LAYERS[13]) == "decoder 0 cross"
    assert layer_label("model.layers.3.self_attn") == "model.layers.3.self_attn"


def test_what_cannot_be_reported(tmp_path):
    model, history = searched()
    with pytest.raises(ValueError, match="history must have an entry for one step at least"):
        write_search(model, [], tmp_path / "out", seconds=1)
    with pytest.raises(ValueError, match="history must have an entry for one step at least"):
        save_weights([], OPERATOR_NAMES, tmp_path / "weights.png")
    with pytest.raises(ValueError, match=r"weights \[N, L, O = 12\], got \[6, 2, 4\]"):
        save_weights(history, tuple(OPERATORS), tmp_path / "weights.png")
    model.discretise()
    shared = [{"step": 1, "weights": history[0]["weights"][:1]}]
    with pytest.raises(ValueError, match=r"\[N, L, O\] = \[6, 2, 4\], got \[1, 2, 4\]"):
        write_search(model, shared, tmp_path / "out", seconds=1)
    model.materialise()
    with pytest.raises(ValueError, match="got one with a plain prefix"):
        write_search(model, history, tmp_path / "out", seconds=1)
    assert not list(tmp_path.iterdir())


# --- pictures ------------------------------------------------------------------------------------


def test_every_operator_has_a_colour_of_its_own():
    assert STYLES.keys() == OPERATORS.keys()
    assert len({color for color, _ in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("operators", [tuple(OPERATORS), ("none", "conv5", "linear")], ids=len)
@pytest.mark.parametrize("count", [1, 3])
def test_courses_are_those_of_the_history(count, operators, tmp_path, figures):
    history, path = course(count, 2, operators), tmp_path / "weights.png"
    save_weights(history, operators, path)
    weights = torch.tensor([entry["weights"] for entry in history], dtype=torch.float64)
    axes = figures(path).axes
    assert len(axes) == 4
    for cell, (above, below) in enumerate(zip(axes[:2], axes[2:], strict=True)):
        assert [line.get_label() for line in above.lines] == list(operators)
        for o, line in enumerate(above.lines):
            color, style = STYLES[operators[o]]
            assert (line.get_color(), line.get_linestyle()) == (color, style)
            assert line.get_xdata().tolist() == [0, 10, 20, 30, 40]
            expected = weights[:, :, cell, o].mean(1)
            torch.testing.assert_close(torch.from_numpy(line.get_ydata()), expected)
        entropy = torch.from_numpy(below.lines[0].get_ydata())
        torch.testing.assert_close(entropy, entropies(weights[:, :, cell], operators).mean(1))
        banded = weights[-1, :, cell].mean(0).topk(3).indices.tolist() if count > 1 else []
        bands = {tuple(b.get_facecolor()[0, :3]): b for b in above.collections}
        assert bands.keys() == {to_rgb(STYLES[operators[o]][0]) for o in banded}
        for o in banded:
            found = bands[to_rgb(STYLES[operators[o]][0])].get_datalim(above.transData)
            assert found.y0 == pytest.approx(float(weights[:, :, cell, o].min()))
            assert found.y1 == pytest.approx(float(weights[:, :, cell, o].max()))
    (legend,) = figures(path).legends
    assert [text.get_text() for text in legend.get_texts()] == list(operators)
    handles = [line for line in legend.legend_handles if isinstance(line, Line2D)]
    assert [line.get_color() for line in handles] == [STYLES[name][0] for name in operators]
    image = pixels(path)
    assert all(shows(image, STYLES[name][0]) for name in operators)
    grey = {"identity", "skip", "none"}  # as axes and text
    absent = STYLES.keys() - set(operators) - grey
    assert not any(shows(image, STYLES[name][0]) for name in absent)


def test_one_step_is_a_point(tmp_path, figures):
    path = tmp_path / "weights.png"
    save_weights(course(1, 1, steps=1), tuple(OPERATORS), path)
    above, below = figures(path).axes
    assert {line.get_marker() for line in (*above.lines, *below.lines)} == {"o"}
    assert below.get_xticks().tolist() == [0]


@pytest.mark.parametrize(("count", "depth"), [(1, 1), (1, 4), (36, 4)])
def test_an_architecture_fits_its_picture(count, depth, tmp_path, figures):
    found, path = found_by(course(count, depth)), tmp_path / "architecture.png"
    save_architecture(found, path)
    image, figure = pixels(path), figures(path)
    height, width = image.shape[:2]
    assert width <= 2000 and height <= 2000
    assert image.std() > 0.05
    chosen = {cell["operator"] for own in found for cell in own["cells"]}
    assert all(shows(image, STYLES[name][0]) for name in chosen)
    written = {text.get_text() for text in texts(figure)}
    expected = {f"{c['operator']}  {c['weight']:.2f}" for own in found for c in own["cells"]}
    labels = {"all 36 layers"} if count == 1 else set(map(layer_label, T5_LAYERS))
    assert expected | labels <= written
    # No text leaves the picture or lies on another one.
    boxes = torch.tensor(
        [text.get_window_extent().extents.tolist() for text in texts(figure)]
    )  # [T, 4]
    low, high = boxes[:, :2], boxes[:, 2:]
    assert (low >= 0).all() and (high <= torch.tensor([width, height])).all()
    overlaps = ((low[:, None] < high) & (low < high[:, None])).all(-1)  # [T, T]
    assert overlaps.sum() == len(boxes)  # each with itself


def test_the_filled_part_is_the_weight(tmp_path, figures):
    found, path = found_by(course(1, 3)), tmp_path / "architecture.png"
    save_architecture(found, path)
    patches = figures(path).axes[0].patches
    filled = {p for p in patches if p.get_alpha() == 0.3}
    widest = max(p.get_width() for p in patches)
    parts = sorted(p.get_width() / widest for p in filled)
    assert parts == pytest.approx(sorted(cell["weight"] for cell in found[0]["cells"]))


def test_an_architecture_that_was_never_searched(tmp_path, figures):
    config = pemt_fast.PemlConfig(
        target_modules=(), architecture=[["mlp_gelu", "none"]], sharing="network"
    )
    model, path = pemt_fast.get_model(tiny_model("t5"), config), tmp_path / "architecture.png"
    save_architecture(networks(model), path)
    written = [text.get_text() for text in texts(figures(path))]
    assert "mlp_gelu" in written and "none" in written and "all 6 layers" in written
    assert not any("filled" in text for text in written)
