"""Nothing to do, gates that are exactly zero and numbers that are not finite, on a CUDA device."""

import pytest
import torch
from gpu_cases import BITWISE, DEVICE, FORM_IDS, IMPLS, SIZES, WIDTHS, gpu_inputs

from pemt_fast import adapter_mixture
from pemt_fast.testing import GATE_FORMS, poisoned_empty

pytestmark = [
    pytest.mark.gpu,
    # Poisoned memory comes with deterministic algorithms, of which cuBLAS says it has none.
    pytest.mark.filterwarnings("ignore:.*CuBLAS"),
]


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


# --- zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_no_tokens(impl, lead, recompute):
    inputs = gpu_inputs("few-units", *lead)
    results = inputs.gradients(impl=impl, recompute=recompute)
    assert results.pop("out").shape == (*lead, WIDTHS["H"])
    for name, tensor in inputs.tensors().items():
        torch.testing.assert_close(results[f"d_{name}"], torch.zeros_like(tensor), **BITWISE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
def test_all_gates_zero_leaves_the_base(impl, size, gate):
    inputs = gpu_inputs(size, 3, 43, gate=gate)
    inputs.gate.data.zero_()
    results = inputs.gradients(impl=impl)
    assert torch.equal(results["out"], inputs.base)
    for name in ("d_x", "d_w_down", "d_w_up", "d_b_down", "d_b_up"):
        assert not results[name].any(), name
    with torch.no_grad():
        assert torch.equal(inputs.call(adapter_mixture, impl=impl), inputs.base)


# --- numbers that are not finite -----------------------------------------------------------------

# Where adapter 1 is not used, and the forms of the gate that can say so.
ZEROS = [
    ("call", "[E]"), ("call", "[B, E]"), ("call", "[B, S, E]"),
    ("sequence", "[B, E]"), ("sequence", "[B, S, E]"), ("token", "[B, S, E]"),
]  # fmt: skip


def zeroed(inputs, where):
    """Zeroes the gate of adapter 1 for the call, for sequence 0, or for token 0 of sequence 0.

    Returns a mask `[B, S]` of the tokens that do not use adapter 1.
    """
    mask = torch.zeros(inputs.x.shape[:-1], dtype=torch.bool, device=DEVICE)
    index = {"call": (), "sequence": (0,), "token": (0, 0)}[where]
    inputs.gate.data[(*index, ..., 1)] = 0
    mask[index] = True
    return mask


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("broken", ["w_down", "w_up", "b_down", "b_up"])
@pytest.mark.parametrize("mode", ["inference", "saved", "recompute"])
@pytest.mark.parametrize(("where", "form"), ZEROS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_broken_adapter_reaches_only_who_uses_it(impl, size, where, form, mode, broken, value):
    inputs = gpu_inputs(size, 2, 65, gate=form)
    unused = zeroed(inputs, where)
    intact = inputs.gradients(impl=impl)
    getattr(inputs, broken).data[1, ..., -1] = value
    if mode == "inference":
        with torch.no_grad():
            results = {"out": inputs.call(adapter_mixture, impl=impl)}
    else:
        results = inputs.gradients(impl=impl, recompute=mode == "recompute")
    for name in results.keys() & {"out", "d_x"}:
        torch.testing.assert_close(results[name][unused], intact[name][unused])
    assert not results["out"][~unused].isfinite().all(-1).any()
    if where == "call" and mode != "inference":
        # The gate could learn from the intact adapter; from the broken one it learns nothing.
        for gradients in (results, intact):
            assert gradients["d_gate"].isfinite().all()
            gradients["d_gate"][..., 1] = 0
        torch.testing.assert_close(results, intact)


# Of float16 only the units that are kept overflow, of bfloat16 the sums already.
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(("where", "form"), ZEROS, ids=str)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [("few-units", torch.float16), ("many-units", torch.bfloat16)],
    ids=["few-units-f16", "many-units-bf16"],
)
def test_hidden_units_that_overflow_behind_a_zero_gate(impl, size, dtype, where, form, recompute):
    inputs = gpu_inputs(size, 2, 65, gate=form, dtype=dtype)
    unused = zeroed(inputs, where)
    intact = inputs.gradients(impl=impl)
    most = torch.finfo(dtype).max
    inputs.w_down.data[1] = 0.9 * most * inputs.w_down[1].sign()
    overflow = (inputs.x.double() @ inputs.w_down[1].double().t()).abs()
    assert (overflow > most).any(), "else the case says nothing"
    results = inputs.gradients(impl=impl, recompute=recompute)
    torch.testing.assert_close(results["out"][unused], intact["out"][unused])
    torch.testing.assert_close(results["d_x"][unused], intact["d_x"][unused])
