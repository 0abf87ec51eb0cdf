"""The Triton kernels without a GPU: every shipped choice of blocks interpreted and compiled.

What holds for all implementations is in `test_adapter_mixture.py` and `test_edge_cases.py`, where
`triton` runs in the interpreter; that runs few tokens, so the rows for many are forced here.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementations import INTERPRETED

from pemt_fast.testing import adapter_mixture_loop, assert_within_budget, make_inputs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

GPUS = []
if importlib.util.find_spec("triton") is not None:
    from triton_offline import GPUS

    from pemt_fast.kernels import adapter_mixture as launcher
    from pemt_fast.kernels import configs, plans, walk, weight_gradients

HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture(autouse=True)
def _plans_of_their_own():
    """Tests here replace what plans are made from."""
    launcher.PLANS.clear()
    yield
    launcher.PLANS.clear()


# --- values --------------------------------------------------------------------------------------


def choices():
    """Every different choice of the table, with the dtype and the direction it is for."""
    seen = {}
    for (_, element, backward), rows in configs.TABLE.items():
        for row in rows:
            key = (element, backward, row.choice)
            seen[key] = pytest.param(*key, id=f"{'backward' if backward else 'forward'}{len(seen)}")
    return list(seen.values())


@pytest.mark.skipif(not INTERPRETED, reason="only in the interpreter; tests/test_gpu.py runs them")
@pytest.mark.parametrize(("element", "backward", "choice"), choices())
def test_every_choice_of_blocks(monkeypatch, element, backward, choice):
    # Two tiles of tokens at least and a tail, units in several blocks and a tail, odd widths.
    pick = launcher.choose

    def forced(kind, size, way, N, T):
        return configs.narrowed(choice, N) if way == backward else pick(kind, size, way, N, T)

    monkeypatch.setattr(launcher, "choose", forced)
    dtype = {2: torch.float16, 4: torch.float32}[element]
    inputs = make_inputs(3, 47, E=5, D=75, R=40, H=141, activation="silu", dtype=dtype)
    actual = inputs.gradients(impl="triton")
    exact = inputs.to(torch.float64).gradients(impl="reference")
    eager = inputs.gradients(adapter_mixture_loop)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


@pytest.mark.skipif(not INTERPRETED, reason="only in the interpreter; tests/test_gpu.py runs them")
@pytest.mark.parametrize("down", [True, False], ids=["down", "frozen-down"])
@pytest.mark.parametrize("up", [True, False], ids=["up", "frozen-up"])
def test_weight_gradients_in_parts(monkeypatch, down, up):
    tile = configs.Tile(64, 128, 32)
    monkeypatch.setattr(weight_gradients, "choose_weight_gradient", lambda *_: tile)
    generator = torch.Generator().manual_seed(0)
    d_z, gated, x, d_out = (
        torch.randn(700, width, generator=generator) for width in (70, 70, 45, 150)
    )
    found = weight_gradients.weight_gradients(
        d_z if down else None, x, gated if up else None, d_out
    )
    for result, left, right in zip(found, (d_z if down else None, gated if up else None),
                                   (x, d_out), strict=True):  # fmt: skip
        if left is None:
            assert result is None
            continue
        exact = left.double().T @ right.double()
        assert_within_budget("d_w", result, exact, (left.T @ right))


def test_precision_follows_the_setting_of_torch():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            settings.fp32_precision = setting
            assert walk.precision_of(torch.float32) == expected
    finally:
        settings.fp32_precision = before


def test_constants_come_last():
    # `Launcher` hands a compiled kernel its arguments by place: those of the call, then these.
    kernels = [getattr(plans, name) for name in vars(plans) if name.endswith("_kernel")]
    assert len(kernels) == 4
    for kernel in kernels:
        annotations = kernel.fn.__annotations__
        constant = [name in annotations for name in kernel.arg_names]
        assert constant == sorted(constant) and any(constant), kernel.fn.__name__


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 64, 65, 4096, 16384, 1 << 22], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("N", [1, 8, 63, 64, 65, 384, 1000, 5000], ids=lambda N: f"N{N}")
def test_every_call_has_a_choice(N, T):
    for kind, element, backward in configs.TABLE:
        choice = configs.choose(kind, element, backward, N, T)
        pair = configs.choose_pair(kind, element, backward, N, T)
        assert isinstance(pair, configs.Pair)
        if isinstance(choice, configs.Fused):
            assert choice.BN * -(-N // choice.BN) < 2 * max(N, 16)


@pytest.mark.parametrize("T", [1, 100, 5000, 40000], ids=lambda T: f"T{T}")
def test_spans_cover_the_output_and_fill_the_gpu(T):
    choice = configs.Fused(32, 64)
    span = configs.columns_of_span(choice, T, 770, 132)
    programs = -(-T // choice.BM) * -(-770 // span)
    assert span % choice.BH == 0
    assert span >= 770 if T >= 32 * 132 else programs <= 2 * 132


# --- the compiler --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capability", "limit", "instruction"), GPUS, ids=str)
def test_what_the_compiler_makes_of_every_launch(kind, capability, limit, instruction):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Of GPUs whose launches are those of another one or few, a third; TRITON_CASES=all for all.
    every = 3 if capability in (86, 100) and os.environ.get("TRITON_CASES") != "all" else 1
    command = [
        sys.executable, HELPERS / "triton_offline.py", kind, str(capability), "--every", str(every)
    ]  # fmt: skip
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    kernels = json.loads(finished.stdout)["kernels"]
    assert len(kernels) > 20 // every
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= limit, kernel
        large = min(kernel.get("BM", 0), kernel.get("BN", 64)) >= 64
        if large and kernel["PRECISION"] == "ieee" and kernel["dtype"] == "bfloat16":
            assert instruction in kernel["tensor_cores"], kernel
