"""What the Triton kernels load and store is what `docs/derivation.md` says, byte for byte.

Letters as there: M tiles of BM tokens, C blocks of BN units, Q blocks of BH columns, s spans, g
groups of units, b bytes of an element.
"""

import importlib.util

import pytest
import torch
from implementations import INTERPRETED

from pemt_fast import adapter_mixture
from pemt_fast.testing import make_inputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counted in Triton's interpreter only")

if importlib.util.find_spec("triton") is not None:
    from triton_traffic import counted

    from pemt_fast.kernels import adapter_mixture as launcher
    from pemt_fast.kernels import plans, weight_gradients
    from pemt_fast.kernels.configs import Fused, Pair, Tile

B, S, D, H, E = 2, 35, 40, 72, 3
T, FLOAT = B * S, 4


@pytest.fixture(autouse=True)
def _plans_of_their_own():
    """Tests here replace what plans are made from."""
    launcher.PLANS.clear()
    yield
    launcher.PLANS.clear()


def up(a, b):
    """⌈a / b⌉."""
    return -(-a // b)


def run(monkeypatch, choice, *, ranks, bias, gate, dtype=torch.float32, columns=None):
    """Traffic of forward and of backward with everything trained, by kernel."""
    monkeypatch.setattr(launcher, "choose", lambda *_: choice)
    monkeypatch.setattr(launcher, "choose_pair", lambda *_: choice)
    if columns is not None:
        monkeypatch.setattr(plans, "columns_of_span", lambda *_: columns)
    inputs = make_inputs(
        B, S, E=E, D=D, R=ranks, H=H, gate=gate, bias=bias, activation="relu", dtype=dtype,
    )  # fmt: skip
    with counted() as forward:
        out = inputs.call(adapter_mixture, impl="triton")
    with counted() as backward:
        out.backward(inputs.grad_out)
    return forward, backward


def assert_traffic(traffic, grid, loaded, stored):
    assert traffic.grid == grid
    assert len(traffic.programs) == torch.tensor(grid).prod()
    assert dict(traffic.loaded) == {name: count for name, count in loaded.items() if count}
    assert dict(traffic.stored) == stored


def units_traffic(programs, first_programs, *, bm, width, b, g, bias, backward):
    """What making all N units of BM tokens moves: `make_units` and its gates, without weights.

    `programs` make them, the first of each tile writes what is kept.
    """
    N = g["N"]
    loaded = {"gate": programs * bm * g["groups"] * FLOAT}
    if backward:
        loaded["saved"] = programs * bm * N * b
        stored = {"d_z": T * N * b, "gated": T * N * b}
        stored["gate_sums"] = T * (g["groups"] + (E if bias else 0)) * FLOAT
        if bias:  # the part of b_up in the gradient of the gate
            loaded["b_up"] = first_programs * 16 * width * b
    else:
        loaded["b_down"] = programs * N * b * bias
        stored = {"saved": T * N * b}
    return loaded, stored


def second_traffic(tiles, blocks, *, bm, width, b, N, bias, backward, base):
    """What the product with the second weight moves, without the units."""
    loaded = {"second": tiles * N * width * b, "base": T * width * b * base}
    if bias and not backward:
        loaded["b_up"] = tiles * E * width * b
        loaded["gate"] = tiles * blocks * bm * E * FLOAT
    return loaded, {"out": T * width * b}


def total(*parts):
    names = {name: 0 for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


LAYOUTS = {
    # ranks, with blocks of 16 units: units, groups
    "equal": ((24, 24, 24), {"N": 72, "groups": 9}),
    "unequal": ((8, 24, 32), {"N": 64, "groups": 8}),
}


@pytest.mark.parametrize("columns", [16, 32, H], ids=["many-spans", "spans", "one-span"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused(monkeypatch, layout, bias, columns):
    ranks, g = LAYOUTS[layout]
    N, b = g["N"], 4
    choice = Fused(BM=32, BN=16, BK=16, BH=16)
    M, C = up(T, choice.BM), up(N, choice.BN)
    columns = up(columns, choice.BH) * choice.BH
    found = run(monkeypatch, choice, ranks=ranks, bias=bias, gate="[B, S, E]", columns=columns)
    for traffic, backward, width_in, width_out in zip(found, (False, True), (D, H), (H, D),
                                                      strict=True):  # fmt: skip
        s = up(width_out, columns)
        common = {"bm": choice.BM, "b": b, "bias": bias, "backward": backward}
        loaded, stored = units_traffic(M * s, M, width=width_in, g=g, **common)
        after, out = second_traffic(
            M, up(width_out, choice.BH), width=width_out, N=N, base=not backward, **common
        )
        sums = M * choice.BM * width_in * b * (bias and backward)
        first = {
            "x": M * s * C * choice.BM * width_in * b + sums,
            "first": M * s * C * choice.BN * width_in * b,
            "gate": M * s * choice.BM * E * FLOAT,
        }
        assert_traffic(traffic["fused_kernel"], (M, s), total(first, loaded, after), stored | out)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pair(monkeypatch, layout, bias):
    ranks, g = LAYOUTS[layout]
    N, b = g["N"], 4
    one, two = Tile(32, 16, 16), Tile(16, 32, 16)
    found = run(monkeypatch, Pair(one, two), ranks=ranks, bias=bias, gate="[B, E]")
    for traffic, backward, width_in, width_out in zip(found, (False, True), (D, H), (H, D),
                                                      strict=True):  # fmt: skip
        common = {"b": b, "bias": bias, "backward": backward}
        M, C = up(T, one.rows), up(N, one.columns)
        loaded, stored = units_traffic(M, M, bm=one.rows, width=width_in, g=g, **common)
        stored.setdefault("gated", T * N * b)
        extra = bias and backward  # one more tile, for the part of b_up
        first = {
            "x": M * (C + extra) * one.rows * width_in * b,
            "first": M * C * one.columns * width_in * b,
            "gate": M * C * one.rows * E * FLOAT,
        }
        assert_traffic(traffic["first_kernel"], (M * (C + extra),), total(first, loaded), stored)

        M, Q = up(T, two.rows), up(width_out, two.columns)
        loaded, stored = second_traffic(
            M, Q, bm=two.rows, width=width_out, N=N, base=not backward, **common
        )
        units = {"units": M * Q * two.rows * N * b, "gate": M * Q * two.rows * E * FLOAT}
        assert_traffic(traffic["second_kernel"], (M * Q,), total(units, loaded), stored)


@pytest.mark.parametrize("gate", ["[E]", "[B, E]", "[B, S, E]"])
def test_end_of_the_gate_gradient(monkeypatch, gate):
    ranks, g = LAYOUTS["equal"]
    _, backward = run(monkeypatch, Fused(32, 16, 16, 16), ranks=ranks, bias=True, gate=gate)
    G = {"[E]": 1, "[B, E]": B, "[B, S, E]": T}[gate]
    loaded = {"gate_sums": G * (g["groups"] + E) * FLOAT, "gate": G * E * FLOAT}
    assert_traffic(backward["gate_gradient_kernel"], (up(G, 64),), loaded, {"d_gate": G * E * 4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_gradients(monkeypatch, dtype):
    tile = Tile(16, 32, 16)
    monkeypatch.setattr(weight_gradients, "choose_weight_gradient", lambda *_: tile)
    monkeypatch.setattr(weight_gradients, "device_facts", lambda _: ("hopper", 16))
    N, b = 40, dtype.itemsize
    d_z, gated, x, d_out = (torch.ones(T, width, dtype=dtype) for width in (N, N, D, H))
    with counted() as found:
        weight_gradients.weight_gradients(d_z, x, gated, d_out)
    down, back, rows = up(D, tile.columns), up(H, tile.columns), up(N, tile.rows)
    tiles = rows * (down + back)
    splits = up(T, up(up(T, 2 * 16 // tiles), tile.terms) * tile.terms)
    assert splits > 1
    loaded = {
        "d_z": down * T * N * b, "gated": back * T * N * b,
        "x": rows * T * D * b, "d_out": rows * T * H * b,
    }  # fmt: skip
    partial = {"partial": splits * N * (D + H) * FLOAT}
    assert_traffic(found["weight_gradient_kernel"], (tiles, splits), loaded, partial)
    result = {"d_w_down": N * D * b, "d_w_up": N * H * b}
    assert_traffic(found["add_partials_kernel"], (N, 1), partial, result)
