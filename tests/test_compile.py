"""The operator under `opcheck`, `torch.compile`, `torch.export` and activation checkpointing."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, make_inputs

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
OPS = torch.ops.pemt_fast


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(tokens=7, **changes):
    sizes = {"E": 3, "D": 6, "R": 4, "H": 5, "dtype": torch.float64}
    return make_inputs(2, tokens, **{**sizes, **changes})


def op_arguments(inputs, *, with_hidden, recompute=False):
    """Arguments of the registered operator."""
    ranks = list(inputs.ranks or (inputs.w_down.shape[1],) * inputs.w_down.shape[0])
    return (
        inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, inputs.base,
        ranks, inputs.activation, "torch", recompute, with_hidden,
    )  # fmt: skip


# --- registration --------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("with_hidden", [False, True], ids=["out", "out-hidden"])
@pytest.mark.parametrize(
    "requires_grad", [False, True, ("x", "gate")], ids=["frozen", "all", "x-gate"]
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_operator_is_well_registered(activation, requires_grad, with_hidden, recompute):
    inputs = small(activation=activation, requires_grad=requires_grad)
    arguments = op_arguments(inputs, with_hidden=with_hidden, recompute=recompute)
    torch.library.opcheck(OPS.adapter_mixture.default, arguments)


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_the_bare_operator_is_well_registered(form):
    inputs = small(gate=form, bias=False, base=False, R=(1, 3, 2), param_dtype=torch.float32)
    torch.library.opcheck(OPS.adapter_mixture.default, op_arguments(inputs, with_hidden=False))


@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("with_hidden", [False, True], ids=["out", "out-hidden"])
def test_the_forward_operator_is_well_registered(with_hidden, save):
    arguments = op_arguments(small(requires_grad=False), with_hidden=with_hidden)
    torch.library.opcheck(OPS.adapter_mixture_forward.default, (*arguments, save))


NEEDS = {
    "all": [True] * 6,
    "frozen": [True, True, False, False, False, False],
    "weights": [False, False, True, True, True, True],
}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_the_backward_operator_is_well_registered(needs):
    inputs = small(requires_grad=False)
    saved = torch.randn(14, 12, dtype=torch.float64)
    arguments = (
        inputs.grad_out, torch.randn(2, 7, 12, dtype=torch.float64), inputs.x, inputs.gate,
        inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, saved,
        [4, 4, 4], inputs.activation, "torch", needs,
    )  # fmt: skip
    torch.library.opcheck(OPS.adapter_mixture_backward.default, arguments)


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_meta_tensors_have_the_right_shapes(form):
    inputs = small(gate=form, dtype=torch.bfloat16, param_dtype=torch.float32)
    meta = inputs.replace(
        **{name: t.detach().to("meta").requires_grad_() for name, t in inputs.tensors().items()},
        grad_out=inputs.grad_out.to("meta"),
    )
    for name, result in inputs.gradients(impl="torch").items():
        fake = meta.gradients(impl="torch")[name]
        assert (fake.shape, fake.dtype) == (result.shape, result.dtype), name


# --- torch.compile -------------------------------------------------------------------------------


def compiled(backend, function=adapter_mixture):
    """`function` compiled without graph breaks."""
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("ranks", [4, (1, 3, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_values_and_gradients(activation, recompute, ranks):
    inputs = small(activation=activation, R=ranks)
    function = compiled("aot_eager")
    actual = inputs.gradients(function, recompute=recompute)
    torch.testing.assert_close(actual, inputs.gradients(recompute=recompute), **CLOSE)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_one_compilation_for_every_number_of_tokens(form, impl):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(counter)
    for tokens in (7, 9, 33, 128):
        inputs = small(tokens, gate=form)
        for tensor in (inputs.x, inputs.base, *([inputs.gate] if form == "[B, S, E]" else [])):
            torch._dynamo.mark_dynamic(tensor, 1)
        actual = inputs.gradients(function, impl=impl)
        torch.testing.assert_close(actual, inputs.gradients(), **CLOSE)
    assert counter.frame_count == 1


def test_compiled_hidden_units():
    inputs = small(requires_grad=True)
    function = compiled("aot_eager", adapter_mixture_with_hidden)

    def run(call):
        out, hidden = inputs.call(call)
        loss = (out * inputs.grad_out).sum() + hidden.square().sum()
        return out, hidden, *torch.autograd.grad(loss, tuple(inputs.tensors().values()))

    torch.testing.assert_close(run(function), run(adapter_mixture_with_hidden), **CLOSE)


def test_compiled_inference_with_a_zero_gate():
    inputs = small(20, requires_grad=False)
    inputs.gate[:, 1] = 0
    inputs.w_up[1] = float("nan")
    function = compiled("aot_eager")
    torch.testing.assert_close(inputs.call(function), inputs.call(adapter_mixture), **CLOSE)


def test_compiled_under_autocast():
    inputs = small(dtype=torch.float32)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inputs.call(function)

    actual = run(compiled("aot_eager"))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, run(adapter_mixture))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, g++")
def test_compiled_by_inductor():
    inputs = small(dtype=torch.float32)
    actual = inputs.gradients(compiled("inductor"))
    torch.testing.assert_close(actual, inputs.gradients())


# --- checkpointing, export -----------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_inside_activation_checkpointing(recompute):
    inputs = small()

    def function(*args, **keywords):
        return torch.utils.checkpoint.checkpoint(
            adapter_mixture, *args, use_reentrant=False, recompute=recompute, **keywords
        )

    torch.testing.assert_close(inputs.gradients(function), inputs.gradients(), rtol=0, atol=0)


class Layer(torch.nn.Module):
    """A projection with a mixture beside it, gated per sequence."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(6, 5)
        self.router = torch.nn.Linear(6, 3)
        self.w_down = torch.nn.Parameter(torch.randn(3, 4, 6))
        self.w_up = torch.nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        gate = self.router(x.mean(1)).softmax(-1)
        base = self.projection(x)
        return adapter_mixture(x, gate, self.w_down, self.w_up, activation="relu", base=base)


def test_exported_module():
    layer = Layer().eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(
        layer, (torch.randn(2, 7, 6),), dynamic_shapes=({1: tokens},), strict=True
    )
    x = torch.randn(2, 12, 6)
    torch.testing.assert_close(program.module()(x), layer(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("pemt_fast.adapter_mixture.default") == 1


def test_a_module_survives_deepcopy_and_training_steps():
    layer = Layer()
    twin = copy.deepcopy(layer)
    twin.forward = torch.compile(twin.forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 6)
    for module in (layer, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())
