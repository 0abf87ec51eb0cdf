"""Nothing to do, one of everything, gates that are exactly zero, numbers that are not finite."""

import pytest
import torch
from implementations import IMPLS, WIDEST
from rounding import assert_equals_reference, assert_within, rounding_bounds

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, make_inputs, poisoned_empty

BITWISE = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(params=[*IMPLS, "reference"])
def impl(request):
    return request.param


# --- sizes ---------------------------------------------------------------------------------------

NO_TOKENS = [
    ((0,), "[E]"), ((0,), "[B, E]"),
    ((2, 0), "[E]"), ((2, 0), "[B, E]"), ((2, 0), "[B, S, E]"),
    ((0, 5), "[E]"), ((0, 5), "[B, E]"), ((0, 5), "[B, S, E]"),
]  # fmt: skip


@pytest.mark.parametrize("ranks", [4, (1, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(("lead", "gate"), NO_TOKENS, ids=str)
def test_no_tokens(impl, lead, gate, recompute, ranks):
    inputs = make_inputs(*lead, E=2, D=6, R=ranks, H=3, gate=gate)
    results = inputs.gradients(impl=impl, recompute=recompute)
    assert results.pop("out").shape == (*lead, 3)
    for name, tensor in inputs.tensors().items():
        torch.testing.assert_close(results[f"d_{name}"], torch.zeros_like(tensor))
    with torch.no_grad():
        out, hidden = inputs.call(adapter_mixture_with_hidden, impl=impl)
    assert out.shape == (*lead, 3)
    assert hidden.shape == (*lead, sum(ranks) if isinstance(ranks, tuple) else 2 * ranks)


@pytest.mark.parametrize(
    ("lead", "gate"),
    [
        ((), "[E]"), ((1,), "[E]"), ((1,), "[B, E]"), ((1, 1), "[E]"), ((1, 1), "[B, E]"),
        ((1, 1), "[B, S, E]"), ((1, 7), "[B, E]"), ((7, 1), "[B, E]"), ((7, 1), "[B, S, E]"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (2, 1)], ids=["E1-R1", "E1-R3", "E2-R1"])
def test_one_of_everything_keeps_its_dimension(impl, lead, gate, sizes):
    e, r = sizes
    inputs = make_inputs(*lead, E=e, D=5, R=r, H=1, gate=gate, dtype=WIDEST[impl])
    assert_equals_reference(inputs, impl=impl)
    assert inputs.call(adapter_mixture, impl=impl).shape == (*lead, 1)


def test_a_single_token_equals_a_batch_of_one(impl):
    inputs = make_inputs(dtype=WIDEST[impl], gate="[E]", requires_grad=False)
    batch = inputs.replace(x=inputs.x[None], base=inputs.base[None])
    out = inputs.call(adapter_mixture, impl=impl)
    torch.testing.assert_close(out, batch.call(adapter_mixture, impl=impl)[0], **BITWISE)


# --- gates that are exactly zero -----------------------------------------------------------------


def zeroed(inputs, where):
    """Gate of adapter 1 zero for the whole call, for sequence 0, or for token 0 of sequence 0.

    Returns the inputs and a mask `[B, S]` of the tokens that do not use adapter 1.
    """
    gate = inputs.gate.detach().clone()
    mask = torch.zeros(inputs.x.shape[:-1], dtype=torch.bool)
    index = {"call": (), "sequence": (0,), "token": (0, 0)}[where]
    gate[(*index, ..., 1)] = 0
    mask[index] = True
    return inputs.replace(gate=gate.requires_grad_(inputs.gate.requires_grad)), mask


# Where adapter 1 of 3 is not used, and the forms of the gate that can say so.
ZEROS = [
    ("call", "[E]"), ("call", "[B, E]"), ("call", "[B, S, E]"),
    ("sequence", "[B, E]"), ("sequence", "[B, S, E]"), ("token", "[B, S, E]"),
]  # fmt: skip


def three_adapters(gate, dtype, **changes):
    return make_inputs(2, 5, E=3, D=6, R=4, H=7, dtype=dtype, gate=gate, **changes)


def expected(inputs):
    """Results of the reference in float64, and how far rounding may take others from them."""
    return inputs.to(torch.float64).gradients(impl="reference"), rounding_bounds(inputs)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("where", "form"), ZEROS, ids=str)
def test_the_gradient_of_a_zero_gate_is_the_derivative(impl, where, form, activation, recompute):
    # d_gate[t, e] = ⟨grad_out[t], y[t, e]⟩ whatever the gate is: a closed gate can open again.
    inputs, _ = zeroed(three_adapters(form, WIDEST[impl], activation=activation), where)
    d_gate = inputs.gradients(impl=impl, recompute=recompute)["d_gate"]
    exact = inputs.to(torch.float64)
    ones = exact.replace(base=None, gate=torch.eye(3, dtype=torch.float64)[1])
    y = ones.call(adapter_mixture, impl="reference").detach()
    derivative = (exact.grad_out * y).sum(-1).view(*d_gate.shape[:-1], -1).sum(-1)
    bound = rounding_bounds(inputs)["d_gate"]
    assert_within("d_gate", d_gate[..., 1], derivative, bound[..., 1])


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_all_gates_zero_leaves_the_base(impl, form):
    inputs = three_adapters(form, dtype=torch.float32)
    inputs = inputs.replace(gate=torch.zeros_like(inputs.gate))
    results = inputs.replace(gate=inputs.gate.requires_grad_()).gradients(impl=impl)
    assert torch.equal(results["out"], inputs.base)
    for name in ("d_x", "d_w_down", "d_w_up", "d_b_down", "d_b_up"):
        assert not results[name].any(), name
    with torch.no_grad():
        assert torch.equal(inputs.call(adapter_mixture, impl=impl), inputs.base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("broken", ["w_down", "w_up", "b_down", "b_up"])
@pytest.mark.parametrize("mode", ["inference", "saved", "recompute"])
@pytest.mark.parametrize(("where", "form"), ZEROS, ids=str)
def test_a_broken_adapter_reaches_only_who_uses_it(impl, where, form, mode, broken, value):
    inputs, unused = zeroed(three_adapters(form, WIDEST[impl]), where)
    intact, bounds = expected(inputs)
    weight = getattr(inputs, broken).detach().clone()
    weight[1, ..., -1] = value
    inputs = inputs.replace(**{broken: weight.requires_grad_()})
    if mode == "inference":
        with torch.no_grad():
            results = {"out": inputs.call(adapter_mixture, impl=impl)}
    else:
        results = inputs.gradients(impl=impl, recompute=mode == "recompute")
    # As if the adapter were not there, its weights intact being the same as absent.
    for name in results.keys() & {"out", "d_x"}:
        assert_within(name, results[name][unused], intact[name][unused], bounds[name][unused])
    assert not results["out"][~unused].isfinite().all(-1).any()


@pytest.mark.parametrize("broken", ["w_down", "w_up", "b_down", "b_up"])
@pytest.mark.parametrize(("where", "form"), ZEROS[:3], ids=str)
def test_a_broken_adapter_that_nobody_uses_leaves_all_gradients(impl, where, form, broken):
    inputs, _ = zeroed(three_adapters(form, WIDEST[impl]), where)
    intact, bounds = expected(inputs)
    weight = getattr(inputs, broken).detach().clone()
    weight[1] = float("nan")
    results = inputs.replace(**{broken: weight.requires_grad_()}).gradients(impl=impl)
    assert not results["d_gate"][..., 1].isnan().any()
    # By adapter: the gate's last dimension is theirs, the first one of weights and biases.
    rows = {"d_gate": lambda t: t.movedim(-1, 0)}
    for name in ("d_gate", "d_w_down", "d_w_up", "d_b_down", "d_b_up"):
        by_adapter = rows.get(name, lambda t: t)
        actual, exact, bound = (by_adapter(t[name]) for t in (results, intact, bounds))
        assert_within(name, actual[[0, 2]], exact[[0, 2]], bound[[0, 2]])
        assert name == "d_gate" or not actual[1].any(), name


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("where", "form"), ZEROS, ids=str)
@pytest.mark.parametrize("implementation", IMPLS)
def test_hidden_units_that_overflow_behind_a_zero_gate(
    implementation, where, form, activation, recompute
):
    # Finite weights, but x·w_down leaves the range of float16 in adapter 1.
    inputs, unused = zeroed(three_adapters(form, torch.float16, activation=activation), where)
    intact = inputs.gradients(impl=implementation)
    w_down = inputs.w_down.detach().clone()
    w_down[1] = 6e4 * w_down[1].sign()
    inputs = inputs.replace(w_down=w_down.requires_grad_())
    overflow = inputs.call(adapter_mixture_with_hidden, impl=implementation)[1].detach()
    assert not overflow.isfinite().all(), "the case must overflow to say anything"
    results = inputs.gradients(impl=implementation, recompute=recompute)
    torch.testing.assert_close(results["out"][unused], intact["out"][unused])
    torch.testing.assert_close(results["d_x"][unused], intact["d_x"][unused])


# With so many units or fewer a kernel may keep them to itself, above it writes them to memory.
@pytest.mark.parametrize("rank", [8, 200], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("implementation", IMPLS)
def test_weights_of_an_unused_adapter_beside_a_frozen_gate(implementation, dtype, rank):
    # Nothing needs its hidden units, yet its weights have a gradient: exactly zero.
    inputs = make_inputs(
        2, 40, E=3, D=20, R=rank, H=24, gate="[B, E]", dtype=dtype,
        requires_grad=("x", "w_down", "w_up", "b_down"),
    )  # fmt: skip
    gate = inputs.gate.detach().clone()
    gate[:, 1] = 0
    results = inputs.replace(gate=gate).gradients(impl=implementation)
    for name in ("d_w_down", "d_w_up", "d_b_down"):
        assert results[name].isfinite().all(), name
        assert not results[name][1].any(), name
        assert results[name][0].any(), name


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("where", ["call", "token"])
def test_a_broken_adapter_among_unequal_ranks(impl, where, recompute):
    inputs = make_inputs(2, 5, D=6, R=(2, 3, 1), H=7, dtype=WIDEST[impl], gate="[B, S, E]")
    inputs, unused = zeroed(inputs, where)
    intact, bounds = expected(inputs)
    w_up = inputs.w_up.detach().clone()
    w_up[2:5] = float("nan")
    results = inputs.replace(w_up=w_up.requires_grad_()).gradients(impl=impl, recompute=recompute)
    for name in ("out", "d_x"):
        assert_within(name, results[name][unused], intact[name][unused], bounds[name][unused])
    assert results["out"][~unused].isnan().all()


@pytest.mark.parametrize("where", ["sequence", "call"])
def test_the_gate_of_a_broken_adapter_learns_nan_where_it_is_used(impl, where):
    inputs, _ = zeroed(three_adapters("[B, E]", WIDEST[impl]), where)
    w_up = inputs.w_up.detach().clone()
    w_up[1] = float("nan")
    d_gate = inputs.replace(w_up=w_up.requires_grad_()).gradients(impl=impl)["d_gate"]
    assert not d_gate[0, 1].isnan()
    assert d_gate[1, 1].isnan() == (where == "sequence")


# --- adapters that inference skips ---------------------------------------------------------------


# 15 and 16 tokens: around the number from which skipping is worth a copy.
@pytest.mark.parametrize("tokens", [1, 15, 16, 63], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("unused", [(), (0,), (1, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("ranks", [4, (1, 5, 2, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("form", GATE_FORMS[:2], ids=["percall", "pertoken"])
@pytest.mark.parametrize("implementation", IMPLS)
def test_inference_and_training_equal_the_reference(implementation, form, ranks, unused, tokens):
    dtype = WIDEST[implementation]
    inputs = make_inputs(tokens, E=4, D=6, R=ranks, H=7, dtype=dtype, gate=form)
    inputs.gate.data[..., list(unused)] = 0
    exact, bounds = expected(inputs)
    with torch.no_grad():
        inference = inputs.call(adapter_mixture, impl=implementation)
    training = inputs.call(adapter_mixture, impl=implementation)
    for out in (inference, training):
        assert_within("out", out, exact["out"], bounds["out"])


def test_hidden_units_of_unused_adapters_are_returned_in_inference(impl):
    inputs = make_inputs(32, E=3, dtype=WIDEST[impl], requires_grad=False)
    used = inputs.call(adapter_mixture_with_hidden, impl=impl)[1]
    inputs.gate[:, 1] = 0
    unused = inputs.call(adapter_mixture_with_hidden, impl=impl)[1]
    torch.testing.assert_close(unused, used, **BITWISE)
