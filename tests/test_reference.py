"""The specification itself: `impl="reference"` against a literal loop and against differences."""

import math

import pytest
import torch

from pemt_fast.ops import adapter_mixture, adapter_mixture_with_hidden
from pemt_fast.ops.reference import ACTIVATION_FUNCTIONS
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, TENSOR_NAMES, make_inputs

SCALAR_ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "silu": lambda z: z / (1 + math.exp(-z)),
}


def literal_loops(inputs, b, s):
    """Output and hidden units of one token, one number at a time."""
    gate = inputs.gate[(b, s)[: inputs.gate.dim() - 1]].tolist()
    x = inputs.x[b, s].tolist()
    h = inputs.w_up.shape[-1]
    ranks = inputs.ranks or (inputs.w_down.shape[1],) * len(gate)
    downs = inputs.w_down.reshape(-1, len(x)).tolist()
    ups = inputs.w_up.reshape(-1, h).tolist()
    b_down = [0.0] * sum(ranks) if inputs.b_down is None else inputs.b_down.flatten().tolist()
    out = [0.0] * h if inputs.base is None else inputs.base[b, s].tolist()
    hidden, n = [], 0
    for e, rank in enumerate(ranks):
        y = [0.0] * h if inputs.b_up is None else inputs.b_up[e].tolist()
        for _ in range(rank):
            z = sum(x_d * w_d for x_d, w_d in zip(x, downs[n], strict=True)) + b_down[n]
            hidden.append(SCALAR_ACTIVATIONS[inputs.activation](z))
            y = [y_h + hidden[-1] * w_h for y_h, w_h in zip(y, ups[n], strict=True)]
            n += 1
        out = [out_h + gate[e] * y_h for out_h, y_h in zip(out, y, strict=True)]
    return out, hidden


@pytest.mark.parametrize("ranks", [3, (1, 4, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("extras", [True, False], ids=["bias-base", "bare"])
@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_three_literal_loops(activation, gate, extras, ranks):
    inputs = make_inputs(
        2, 3, E=3, D=5, R=ranks, H=4, dtype=torch.float64, gate=gate, bias=extras, base=extras,
        activation=activation, requires_grad=False,
    )  # fmt: skip
    out, hidden = inputs.call(adapter_mixture_with_hidden, impl="reference")
    tokens = [[literal_loops(inputs, b, s) for s in range(3)] for b in range(2)]
    expected_out = torch.tensor([[o for o, _ in row] for row in tokens], dtype=torch.float64)
    expected_hidden = torch.tensor([[h for _, h in row] for row in tokens], dtype=torch.float64)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-12, atol=1e-12)


def test_every_activation_has_a_scalar_form():
    assert set(SCALAR_ACTIVATIONS) == set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)


def positional(inputs, **options):
    """The operator as a function of its tensors alone, for `gradcheck`."""

    def function(*tensors):
        return inputs.replace(**dict(zip(TENSOR_NAMES, tensors, strict=True))).call(
            adapter_mixture_with_hidden, **options
        )

    return function, tuple(getattr(inputs, name) for name in TENSOR_NAMES)


@pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_finite_differences(activation, gate):
    inputs = make_inputs(
        2, 2, D=3, R=(1, 2), H=4, dtype=torch.float64, gate=gate, activation=activation
    )
    assert torch.autograd.gradcheck(*positional(inputs, impl="reference"))


def test_second_derivatives_are_finite_differences():
    inputs = make_inputs(1, 2, D=3, R=(1, 2), H=2, dtype=torch.float64, activation="gelu")
    assert torch.autograd.gradgradcheck(*positional(inputs, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_low_precision_is_float32_rounded_once(dtype):
    inputs = make_inputs(2, 63, dtype=dtype, requires_grad=False)
    out = inputs.call(adapter_mixture, impl="reference")
    assert torch.equal(
        out, inputs.to(torch.float32).call(adapter_mixture, impl="reference").to(dtype)
    )
