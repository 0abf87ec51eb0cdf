"""`adapter_mixture` against the float64 oracle, and its promises about memory and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from implementations import IMPLS, INTERPRETED, TRITON, WIDEST, needs_extension
from rounding import assert_equals_reference, assert_within, rounding_bounds

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import (
    GATE_FORMS,
    LAYOUTS,
    TENSOR_NAMES,
    LargestTensor,
    adapter_mixture_loop,
    assert_matches_oracle,
    lay_out,
    make_inputs,
    poisoned_empty,
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
BITWISE = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    # Nearly all sizes here are below what is worth a second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


# --- values: the output and every gradient -------------------------------------------------------

# T = 1 is decoding, 63 below one block, 128 exactly full blocks, 257 a tail of one token. R = 1 is
# the least there is, 24 no multiple of a block, 64 the published rank. E = 1 and 2 are degenerate
# mixtures, 6 the published one, 17 more than fit a register tile. D and H (33, 60, 96) differ and
# are multiples of 32 at most. Gates: [B, E] of a flat x is one row per token; one row per sequence
# includes B = 1 and S = 1.
ALL, BARE, BIAS, BASE = (True, True), (False, False), (True, False), (False, True)
CASES = [
    # lead, E, D, R, H, gate, (bias, base), activation, layout
    ((1,), 1, 33, 1, 60, "[E]", ALL, "gelu", "contiguous"),
    ((1,), 6, 96, 64, 60, "[B, E]", BARE, "relu", "sliced"),
    ((1, 1), 17, 60, 24, 33, "[B, S, E]", BIAS, "silu", "contiguous"),
    ((1, 1), 2, 33, 64, 96, "[B, E]", BASE, "identity", "transposed"),
    ((63,), 6, 60, 24, 96, "[B, E]", ALL, "gelu_tanh", "sliced"),
    ((63,), 17, 33, 1, 60, "[E]", BARE, "identity", "transposed"),
    ((1, 63), 1, 96, 64, 33, "[B, E]", BIAS, "silu", "sliced"),
    ((63, 1), 2, 60, 24, 33, "[B, E]", ALL, "relu", "transposed"),
    ((3, 21), 6, 96, 64, 60, "[B, S, E]", BASE, "gelu", "transposed"),
    ((2, 63), 6, 60, 24, 96, "[B, S, E]", ALL, "relu", "contiguous"),
    ((2, 63), 17, 96, 1, 33, "[B, E]", BASE, "silu", "sliced"),
    ((128,), 2, 96, 1, 33, "[E]", ALL, "gelu", "sliced"),
    ((128,), 1, 60, 24, 96, "[B, E]", BARE, "silu", "transposed"),
    ((2, 64), 6, 33, 64, 96, "[B, E]", ALL, "identity", "contiguous"),
    ((128, 1), 17, 60, 24, 33, "[B, S, E]", BASE, "gelu_tanh", "contiguous"),
    ((4, 32), 2, 96, 24, 60, "[B, E]", BIAS, "relu", "transposed"),
    ((257,), 6, 33, 24, 60, "[B, E]", BIAS, "gelu", "contiguous"),
    ((257,), 17, 96, 64, 33, "[E]", ALL, "relu", "contiguous"),
    ((1, 257), 6, 60, 64, 96, "[B, E]", ALL, "gelu", "transposed"),
    ((257, 1), 1, 60, 1, 33, "[B, S, E]", ALL, "gelu_tanh", "sliced"),
    ((1, 257), 2, 33, 24, 96, "[E]", BASE, "silu", "sliced"),
]


def case_id(case):
    lead, e, d, r, h, gate, (bias, base), activation, layout = case
    gate_rows = math.prod(lead[: GATE_FORMS.index(gate)])
    form = {1: "percall", math.prod(lead): "pertoken"}.get(gate_rows, "persequence")
    sizes = f"T{lead[0]}" if len(lead) == 1 else f"B{lead[0]}-S{lead[1]}"
    extras = "-bias" * bias + "-base" * base
    return f"{sizes}-E{e}-D{d}-R{r}-H{h}-{form}{extras}-{activation}-{layout}"


def inputs_of(case, **changes):
    lead, e, d, r, h, gate, (bias, base), activation, layout = case
    chosen = {
        "E": e, "D": d, "R": r, "H": h, "gate": gate, "bias": bias, "base": base,
        "activation": activation, "layout": layout,
    }  # fmt: skip
    return make_inputs(*lead, **{**chosen, **changes})


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_within_the_error_budget(impl, dtype, case):
    assert_matches_oracle(lambda seed: inputs_of(case, dtype=dtype, seed=seed), impl=impl)


def test_sums_over_many_tokens_on_two_threads(impl):
    """With several threads BLAS sums a product with few rows, such as d_b_up, in one long chain."""
    torch.set_num_threads(2)
    sizes = {"E": 6, "D": 96, "R": 24, "H": 512, "gate": "[B, E]", "activation": "gelu_tanh"}
    assert_matches_oracle(lambda seed: make_inputs(2048, **sizes, seed=seed), impl=impl)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference_in_its_widest_dtype(impl, case):
    assert_equals_reference(inputs_of(case, dtype=WIDEST[impl]), impl=impl)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_reference_in_float64(case):
    inputs = inputs_of(case, dtype=torch.float64)
    actual, exact = inputs.gradients(impl="torch"), inputs.gradients(impl="reference")
    torch.testing.assert_close(actual, exact, **FLOAT64)


# Differences need float64, which the kernels of impl="cpu" do not compute in.
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_finite_differences(activation):
    inputs = make_inputs(2, 2, E=2, D=3, R=2, H=4, dtype=torch.float64, activation=activation)

    def function(*tensors):
        named = dict(zip(TENSOR_NAMES, tensors, strict=True))
        return inputs.replace(**named).call(adapter_mixture_with_hidden, impl="torch")

    assert torch.autograd.gradcheck(function, tuple(inputs.tensors().values()))


@needs_extension
def test_float64_is_for_torch():
    inputs = make_inputs(2, 5, dtype=torch.float64)
    message = "^impl='cpu' cannot run: it computes in float32, bfloat16 or float16, x is float64\n"
    for function in (adapter_mixture, adapter_mixture_with_hidden):
        with pytest.raises(RuntimeError, match=message):
            inputs.call(function, impl="cpu")
    torch.testing.assert_close(inputs.gradients(), inputs.gradients(impl="torch"), **BITWISE)


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_weights_of_any_strides(impl, gate, param_layout):
    inputs = make_inputs(2, 63, dtype=WIDEST[impl], gate=gate, param_layout=param_layout)
    assert_equals_reference(inputs, impl=impl)


# fp32 adapters over a bf16 model and a router in float32 are normal; the reverse comes with
# evaluation; an fp32 residual stream over bf16 layers with T5's float32 `wo`.
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("bf16", {"param_dtype": torch.float32}),
        ("bf16", {"param_dtype": torch.float32, "gate_dtype": torch.float32}),
        ("bf16", {"base_dtype": torch.float32}),
        ("f32", {"param_dtype": torch.bfloat16}),
        ("f32", {"gate_dtype": torch.bfloat16, "base_dtype": torch.float16}),
        ("f16", {"param_dtype": torch.bfloat16, "gate_dtype": torch.float64}),
    ],
    ids=["fp32-params", "fp32-params-gate", "fp32-base", "bf16-params", "half-gate-base", "odd"],
)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_mixed_dtypes(impl, dtype, others, gate):
    assert_matches_oracle(
        lambda seed: make_inputs(3, 21, gate=gate, dtype=DTYPES[dtype], seed=seed, **others),
        impl=impl,
    )


# The budget cannot see a gate that is rounded to bfloat16: the eager loop rounds it too. A gate
# halfway between two bfloat16 numbers can: rounding it would move all products by 0.3 % to the same
# side, whereas the roundings of the products cancel.
@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("name", ["out", "d_x", "d_w_down", "d_w_up"])
def test_the_gate_is_applied_in_float32(impl, name, form):
    if impl == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    inputs = make_inputs(
        4, 32, dtype=torch.bfloat16, param_dtype=torch.float32, gate_dtype=torch.float32,
        gate=form, bias=False, base=False, activation="identity",
    )  # fmt: skip
    positive = {key: t.detach().abs().requires_grad_() for key, t in inputs.tensors().items()}
    positive["gate"] = torch.full_like(inputs.gate, 1 + 41 / 128 + 1 / 256)
    inputs = inputs.replace(**positive, grad_out=inputs.grad_out.abs())
    actual = inputs.gradients(impl=impl)[name].double().sum()
    exact = inputs.to(torch.float64).gradients(impl="reference")[name].sum()
    torch.testing.assert_close(actual, exact, rtol=5e-4, atol=0)


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_the_gate_meets_the_output_bias_in_float32(impl, form):
    # Gates 1 + 2^-10 and -1 on equal biases leave 2^-10, or nothing when rounded to bfloat16.
    inputs = make_inputs(2, 5, E=2, dtype=torch.bfloat16, gate=form, base=False)
    gate = torch.tensor([1 + 2**-10, -1.0]).expand_as(inputs.gate)
    ones, nothing = torch.ones_like(inputs.b_up), torch.zeros_like(inputs.w_up)
    out = inputs.replace(gate=gate, b_up=ones, w_up=nothing).call(adapter_mixture, impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 2**-10), **BITWISE)


@pytest.mark.parametrize("form", GATE_FORMS[:2], ids=["percall", "persequence"])
def test_the_gradient_of_the_gate_is_summed_in_float32(impl, form):
    # Every token adds 1, and bfloat16 does not know the number 257.
    inputs = make_inputs(
        1, 257, E=2, D=1, R=1, H=1, dtype=torch.bfloat16, gate_dtype=torch.float32, gate=form,
        bias=False, base=False, activation="identity",
    )  # fmt: skip
    ones = {name: torch.ones_like(t, requires_grad=True) for name, t in inputs.tensors().items()}
    inputs = inputs.replace(**ones, grad_out=torch.ones_like(inputs.grad_out))
    d_gate = inputs.gradients(impl=impl)["d_gate"]
    torch.testing.assert_close(d_gate, torch.full_like(d_gate, 257), **BITWISE)


@pytest.mark.parametrize(
    "ranks", [(5,), (1, 24, 64), (7, 7, 7), (3,) * 16 + (40,)], ids=["E1", "E3", "equal", "E17"]
)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unequal_ranks(impl, dtype, gate, ranks):
    assert_matches_oracle(
        lambda seed: make_inputs(2, 63, R=ranks, dtype=dtype, gate=gate, seed=seed), impl=impl
    )


def test_packed_weights_are_the_stacked_ones(impl):
    stacked = make_inputs(2, 63, E=3, R=8)
    packed = stacked.replace(
        ranks=(8, 8, 8),
        w_down=stacked.w_down.detach().flatten(0, 1).requires_grad_(),
        w_up=stacked.w_up.detach().flatten(0, 1).requires_grad_(),
        b_down=stacked.b_down.detach().flatten().requires_grad_(),
    )
    expected, actual = stacked.gradients(impl=impl), packed.gradients(impl=impl)
    for name in expected:
        torch.testing.assert_close(actual[name].flatten(), expected[name].flatten(), **BITWISE)


def test_deeper_leading_sizes(impl):
    inputs = make_inputs(2, 3, 4, dtype=WIDEST[impl], gate="[B, S, E]")
    assert_equals_reference(inputs, impl=impl)


@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_a_gradient_without_strides(impl, gate):
    # `out.sum().backward()` sends one number, expanded.
    inputs = make_inputs(2, 63, dtype=WIDEST[impl], gate=gate)
    one = torch.ones((), dtype=WIDEST[impl])
    assert_equals_reference(inputs.replace(grad_out=one.expand(2, 63, 96)), impl=impl)


# --- hidden units --------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("used", ["out", "hidden", "both"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_units_and_their_gradients(impl, activation, used, recompute):
    def run(inputs, **options):
        out, hidden = inputs.call(adapter_mixture_with_hidden, **options)
        grad_hidden = inputs.grad_out[..., :8].flip(-1)
        pairs = {"out": (out, inputs.grad_out), "hidden": (hidden, grad_hidden)}
        chosen = pairs.values() if used == "both" else [pairs[used]]
        grads = torch.autograd.grad(
            [tensor for tensor, _ in chosen], tuple(inputs.tensors().values()),
            [grad for _, grad in chosen], allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        named = {f"d_{name}": grad for name, grad in zip(inputs.tensors(), grads, strict=True)}
        return {"out": out.detach(), "hidden": hidden.detach(), **named}

    inputs = make_inputs(2, 7, R=(3, 5), dtype=WIDEST[impl], activation=activation)
    assert_equals_reference(inputs, run, impl=impl, recompute=recompute)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_asking_for_hidden_units_changes_nothing_else(impl, dtype, requires_grad, activation):
    inputs = make_inputs(2, 63, dtype=dtype, activation=activation, requires_grad=requires_grad)
    out, hidden = inputs.call(adapter_mixture_with_hidden, impl=impl)
    assert torch.equal(out, inputs.call(adapter_mixture, impl=impl))
    assert hidden.shape == (2, 63, 6 * 24)
    assert hidden.dtype == dtype


# --- which gradients -----------------------------------------------------------------------------

SUBSETS = [
    subset
    for count in range(len(TENSOR_NAMES) + 1)
    for subset in itertools.combinations(TENSOR_NAMES, count)
]


def tiny(activation, dtype, requires_grad):
    return make_inputs(
        2, 3, E=3, D=5, R=2, H=4, dtype=dtype, activation=activation, requires_grad=requires_grad
    )


@pytest.fixture(scope="module")
def all_gradients():
    """By activation and dtype: the gradients of everything in float64, and how far they may be."""
    found = {}
    for activation, dtype in itertools.product(("gelu", "relu"), set(WIDEST.values())):
        inputs = tiny(activation, dtype, True)
        exact = inputs.to(torch.float64).gradients(impl="reference")
        found[activation, dtype] = exact, rounding_bounds(inputs)
    return found


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "nothing")
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_each_gradient_on_its_own(impl, activation, recompute, subset, all_gradients):
    inputs = tiny(activation, WIDEST[impl], subset)
    exact, bounds = all_gradients[activation, WIDEST[impl]]
    out = inputs.call(adapter_mixture, impl=impl, recompute=recompute)
    assert out.requires_grad == bool(subset)
    if subset:
        out.backward(inputs.grad_out)
    grads = {f"d_{name}": t.grad for name, t in inputs.tensors().items() if t.grad is not None}
    assert grads.keys() == {f"d_{name}" for name in subset}
    for name, grad in grads.items():
        assert_within(name, grad, exact[name], bounds[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_recomputing_gives_the_same_bits(impl, dtype, activation):
    inputs = make_inputs(2, 63, dtype=dtype, activation=activation)
    saved = inputs.gradients(impl=impl, recompute=False)
    again = inputs.gradients(impl=impl, recompute=True)
    torch.testing.assert_close(again, saved, **BITWISE)


def test_no_second_derivatives(impl):
    inputs = make_inputs(1, 3)
    out = inputs.call(adapter_mixture, impl=impl)
    (d_x,) = torch.autograd.grad(out.square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_no_grad_leaves_no_graph(impl):
    inputs = make_inputs(1, 3)
    with torch.no_grad():
        out, hidden = inputs.call(adapter_mixture_with_hidden, impl=impl)
    assert not out.requires_grad and not hidden.requires_grad


# --- memory --------------------------------------------------------------------------------------

B, S, E, D, R, H = 2, 9, 3, 20, 4, 11
HIDDEN, X = B * S * E * R, B * S * D


def saved_elements(inputs, function=adapter_mixture, **options):
    """Elements of everything that is kept for backward, but for parameters and gate."""
    known = {t.data_ptr(): name for name, t in inputs.tensors().items()}
    kept = {}

    def pack(tensor):
        name = known.get(tensor.data_ptr(), "hidden units")
        if tensor.numel() and name in ("x", "base", "hidden units"):
            assert tensor.dtype == inputs.x.dtype
            kept[name] = kept.get(name, 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = inputs.call(function, **options)
    return kept, results  # the results stay alive: their memory must not be taken for another


WEIGHTS = ("w_down", "w_up", "b_down", "b_up")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("requires_grad", "recompute", "expected"),
    [
        (("x", "gate"), False, {"hidden units": HIDDEN}),
        (("gate",), False, {"hidden units": HIDDEN}),
        (("x", "gate", "base", "w_up", "b_down", "b_up"), False, {"hidden units": HIDDEN}),
        (("w_down",), False, {"hidden units": HIDDEN, "x": X}),
        (("x", "gate", "base", *WEIGHTS), False, {"hidden units": HIDDEN, "x": X}),
        (("x", "gate"), True, {"x": X}),
        (("x", "gate", "base", *WEIGHTS), True, {"x": X}),
        (("base", "b_up"), False, {}),
        (("base",), True, {}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value).replace("'", ""),
)
def test_kept_for_backward(impl, activation, requires_grad, recompute, expected):
    inputs = make_inputs(
        B, S, E=E, D=D, R=R, H=H, dtype=torch.bfloat16, param_dtype=torch.float32,
        activation=activation, requires_grad=requires_grad,
    )  # fmt: skip
    kept, _ = saved_elements(inputs, impl=impl, recompute=recompute)
    assert kept == expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_units_that_are_returned_are_kept_once(impl, activation):
    inputs = make_inputs(B, S, E=E, D=D, R=R, H=H, activation=activation, requires_grad=("x",))
    kept, (_, hidden) = saved_elements(inputs, adapter_mixture_with_hidden, impl=impl)
    assert kept == {"hidden units": hidden.numel()}


@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_tensor_holds_the_output_of_every_adapter(impl, dtype, gate):
    if impl == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter looks at tensors as bytes")
    tokens, experts, width = 2 * 16, 64, 48
    inputs = make_inputs(2, 16, E=experts, D=width, R=2, H=width, dtype=dtype, gate=gate)
    with LargestTensor() as largest:
        inputs.gradients(impl=impl)
    # The largest there is: the weights, and the hidden units of all tokens.
    assert largest.elements == experts * 2 * width
    assert largest.elements < tokens * experts * width / 10


def test_the_loop_does_hold_more():
    # The recorder sees what it should see: [T, E, H] through autograd's stack of expert outputs.
    inputs = make_inputs(2, 16, E=3, requires_grad=False)
    with LargestTensor() as largest:
        torch.stack([inputs.call(adapter_mixture_loop) for _ in range(3)])
    assert largest.elements == 3 * 32 * 96


# --- inputs and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("zero", [False, True], ids=["dense", "zero-gates"])
def test_inputs_are_not_modified(impl, activation, zero):
    inputs = make_inputs(2, 63, activation=activation)
    if zero:
        inputs.gate.data[0, :2] = 0
    before = {name: t.detach().clone() for name, t in inputs.tensors().items()}
    grad_out = inputs.grad_out.clone()
    inputs.gradients(impl=impl)
    inputs.gradients(impl=impl, recompute=True)
    with torch.no_grad():
        inputs.call(adapter_mixture, impl=impl)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(inputs.grad_out, grad_out)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_results_alias_neither_inputs_nor_one_another(impl, activation, requires_grad):
    inputs = make_inputs(2, 5, D=8, H=8, activation=activation, requires_grad=requires_grad)
    out, hidden = inputs.call(adapter_mixture_with_hidden, impl=impl)
    tensors = {**inputs.tensors(), "out": out, "hidden": hidden}
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert len(storages) == len(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lead", [(), (7,), (2, 5), (0, 5)], ids=str)
def test_the_output_is_contiguous(impl, lead, layout):
    inputs = make_inputs(*lead, gate="[E]", requires_grad=False)
    inputs = inputs.replace(x=lay_out(inputs.x, layout), base=lay_out(inputs.base, layout))
    out = inputs.call(adapter_mixture, impl=impl)
    assert out.shape == (*lead, 96)
    assert out.is_contiguous()


@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bits(impl, threads, dtype, gate):
    torch.set_num_threads(threads)
    inputs = make_inputs(2, 256, D=96, R=64, dtype=dtype, gate=gate)
    first, second = inputs.gradients(impl=impl), inputs.gradients(impl=impl)
    torch.testing.assert_close(second, first, **BITWISE)


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_is_a_cast_of_x(impl, dtype, gate):
    inputs = make_inputs(2, 63, gate=gate)
    cast = inputs.replace(x=inputs.x.detach().to(dtype), grad_out=inputs.grad_out.to(dtype))
    expected = cast.replace(x=cast.x.requires_grad_()).gradients(impl=impl)
    with torch.autocast("cpu", dtype=dtype):
        out = inputs.call(adapter_mixture, impl=impl)
    grads = torch.autograd.grad(out, tuple(inputs.tensors().values()), cast.grad_out)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected["out"], **BITWISE)
    for (name, tensor), grad in zip(inputs.tensors().items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad, expected[f"d_{name}"].to(grad.dtype), **BITWISE)


def test_autocast_around_backward_too(impl):
    inputs = make_inputs(2, 63)
    cast = inputs.replace(x=inputs.x.detach().bfloat16(), grad_out=inputs.grad_out.bfloat16())
    expected = cast.replace(x=cast.x.requires_grad_()).gradients(impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = inputs.replace(grad_out=cast.grad_out).gradients(impl=impl)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name].to(result.dtype), **BITWISE)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_autocast_leaves_float64_alone(impl):
    inputs = make_inputs(2, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = inputs.gradients(impl=impl)
    torch.testing.assert_close(actual, inputs.gradients(impl="torch"), **BITWISE)


# --- anything ------------------------------------------------------------------------------------


@st.composite
def any_call(draw):
    """A call of any shape, form, strides and dtypes, as keywords of `make_inputs`."""
    dtypes = st.sampled_from([*DTYPES.values(), torch.float64])
    maybe_dtype = st.none() | st.sampled_from(list(DTYPES.values()))
    lead = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    ranks = st.integers(1, 9) | st.lists(st.integers(1, 9), min_size=1, max_size=5)
    return lead, {
        "E": draw(st.integers(1, 7)),
        "D": draw(st.integers(1, 40)),
        "R": draw(ranks),
        "H": draw(st.integers(1, 40)),
        "dtype": draw(dtypes),
        "param_dtype": draw(maybe_dtype),
        "gate_dtype": draw(maybe_dtype),
        "base_dtype": draw(maybe_dtype),
        "gate": draw(st.sampled_from(GATE_FORMS[: len(lead) + 1])),
        "bias": draw(st.booleans()),
        "base": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "param_layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=40)
@given(call=any_call(), recompute=st.booleans())
@pytest.mark.parametrize("implementation", IMPLS)
def test_any_call_equals_the_reference(implementation, call, recompute):
    # Values in the widest dtype, where no rounding can hide a wrong index; dtypes as drawn.
    lead, keywords = call
    widest = WIDEST[implementation]
    assume(keywords["dtype"].itemsize <= widest.itemsize)
    inputs = make_inputs(*lead, **keywords)
    results = inputs.gradients(impl=implementation, recompute=recompute)
    for name, tensor in inputs.tensors().items():
        assert results[f"d_{name}"].dtype == tensor.dtype
        assert results[f"d_{name}"].shape == tensor.shape
    assert results["out"].dtype == inputs.x.dtype
    assert all(bool(result.isfinite().all()) for result in results.values())
    assert_equals_reference(inputs.to(widest), impl=implementation, recompute=recompute)


@settings(max_examples=30)
@given(call=any_call())
# Thousands of tokens at a time: too many for Triton's interpreter.
@pytest.mark.parametrize("implementation", [impl for impl in IMPLS if impl is not TRITON])
def test_any_call_is_within_the_error_budget(implementation, call):
    # Wide enough for the eager error to be more than luck: see `assert_matches_oracle`.
    lead, keywords = call
    keywords = {**keywords, "D": keywords["D"] + 20, "H": keywords["H"] + 20, "E": 6}
    assume(keywords["dtype"] != torch.float64)  # the oracle's own dtype
    assert_matches_oracle(
        lambda seed: make_inputs(*lead, 9, **{**keywords, "seed": seed}), impl=implementation
    )
