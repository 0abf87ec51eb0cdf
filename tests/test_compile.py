"""The operator under `opcheck`, `torch.compile`, `torch.export` and activation checkpointing."""

import copy
import shutil

import pytest
import torch
from implementations import IMPLS, WIDEST, needs_extension
from torch._dynamo.testing import CompileCounterWithBackend

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden, dispatch, extension
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, make_inputs

# What runs eagerly and compiled is the same operator, and its results are the same bits.
BITWISE = {"rtol": 0, "atol": 0}
OPS = torch.ops.pemt_fast


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def small(tokens=7, *, impl="torch", **changes):
    sizes = {"E": 3, "D": 6, "R": 4, "H": 5, "dtype": WIDEST[impl]}
    return make_inputs(2, tokens, **{**sizes, **changes})


# --- registration --------------------------------------------------------------------------------


def operator(impl, suffix=""):
    """The registered operator of `impl`, and what its schema has between activation and flags."""
    if impl == "cpu":
        return getattr(OPS, f"adapter_mixture_native{suffix}").default, ()
    return getattr(OPS, f"adapter_mixture{suffix}").default, (impl,)


def op_arguments(inputs, impl_argument, *, with_hidden, recompute=False):
    """Arguments of the registered operator."""
    ranks = list(inputs.ranks or (inputs.w_down.shape[1],) * inputs.w_down.shape[0])
    return (
        inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, inputs.base,
        ranks, inputs.activation, *impl_argument, recompute, with_hidden,
    )  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("with_hidden", [False, True], ids=["out", "out-hidden"])
@pytest.mark.parametrize(
    "requires_grad", [False, True, ("x", "gate")], ids=["frozen", "all", "x-gate"]
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_operator_is_well_registered(impl, activation, requires_grad, with_hidden, recompute):
    op, named = operator(impl)
    inputs = small(impl=impl, activation=activation, requires_grad=requires_grad)
    arguments = op_arguments(inputs, named, with_hidden=with_hidden, recompute=recompute)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_the_bare_operator_is_well_registered(impl, form):
    op, named = operator(impl)
    others = {"bias": False, "base": False, "R": (1, 3, 2), "param_dtype": torch.float32}
    inputs = small(impl=impl, gate=form, **others)
    torch.library.opcheck(op, op_arguments(inputs, named, with_hidden=False))


@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("with_hidden", [False, True], ids=["out", "out-hidden"])
def test_the_forward_operator_is_well_registered(impl, with_hidden, save):
    op, named = operator(impl, "_forward")
    inputs = small(impl=impl, requires_grad=False)
    torch.library.opcheck(op, (*op_arguments(inputs, named, with_hidden=with_hidden), save))


NEEDS = {
    "all": [True] * 6,
    "frozen": [True, True, False, False, False, False],
    "weights": [False, False, True, True, True, True],
}


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_the_backward_operator_is_well_registered(impl, needs):
    op, named = operator(impl, "_backward")
    inputs = small(impl=impl, requires_grad=False)
    saved, grad_hidden = torch.randn(2, 2 * 7, 12, dtype=inputs.x.dtype)
    arguments = (
        inputs.grad_out, grad_hidden.view(2, 7, 12), inputs.x, inputs.gate,
        inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, saved,
        [4, 4, 4], inputs.activation, *named, needs,
    )  # fmt: skip
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_meta_tensors_have_the_right_shapes(impl, form):
    op, named = operator(impl)
    inputs = small(gate=form, dtype=torch.bfloat16, param_dtype=torch.float32)
    meta = inputs.replace(
        **{name: t.detach().to("meta").requires_grad_() for name, t in inputs.tensors().items()},
        grad_out=inputs.grad_out.to("meta"),
    )

    def gradients(inputs):
        # The operator itself: by name, the kernels of a device refuse tensors of another.
        out, hidden = op(*op_arguments(inputs, named, with_hidden=True))
        loss = (out * inputs.grad_out).sum() + hidden.sum()
        return out, hidden, *torch.autograd.grad(loss, tuple(inputs.tensors().values()))

    for result, fake in zip(gradients(inputs), gradients(meta), strict=True):
        assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
        assert fake.stride() == result.stride()


# --- torch.compile -------------------------------------------------------------------------------


def compiled(backend, function=adapter_mixture):
    """`function` compiled without graph breaks."""
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("ranks", [4, (1, 3, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_values_and_gradients(impl, activation, recompute, ranks):
    inputs = small(impl=impl, activation=activation, R=ranks)
    actual = inputs.gradients(compiled("aot_eager"), impl=impl, recompute=recompute)
    expected = inputs.gradients(impl=impl, recompute=recompute)
    torch.testing.assert_close(actual, expected, **BITWISE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_compiled_auto_is_what_eager_auto_is(dtype):
    inputs = small(dtype=dtype)
    actual = inputs.gradients(compiled("aot_eager"))
    torch.testing.assert_close(actual, inputs.gradients(), **BITWISE)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("form", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
def test_one_compilation_for_every_number_of_tokens(form, impl):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(counter)
    for tokens in (7, 9, 33, 128):
        inputs = small(tokens, gate=form, dtype=WIDEST.get(impl, torch.float32))
        for tensor in (inputs.x, inputs.base, *([inputs.gate] if form == "[B, S, E]" else [])):
            torch._dynamo.mark_dynamic(tensor, 1)
        actual = inputs.gradients(function, impl=impl)
        torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)
    assert counter.frame_count == 1


def test_compiled_hidden_units(impl):
    inputs = small(impl=impl, requires_grad=True)
    function = compiled("aot_eager", adapter_mixture_with_hidden)

    def run(call):
        out, hidden = inputs.call(call, impl=impl)
        loss = (out * inputs.grad_out).sum() + hidden.square().sum()
        return out, hidden, *torch.autograd.grad(loss, tuple(inputs.tensors().values()))

    torch.testing.assert_close(run(function), run(adapter_mixture_with_hidden), **BITWISE)


def test_compiled_inference_with_a_zero_gate(impl):
    inputs = small(20, impl=impl, requires_grad=False)
    inputs.gate[:, 1] = 0
    inputs.w_up[1] = float("nan")
    actual = inputs.call(compiled("aot_eager"), impl=impl)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, inputs.call(adapter_mixture, impl=impl), **BITWISE)


def test_compiled_under_autocast(impl):
    inputs = small(dtype=torch.float32)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inputs.call(function, impl=impl)

    actual = run(compiled("aot_eager"))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, run(adapter_mixture), **BITWISE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, g++")
def test_compiled_by_inductor(impl):
    inputs = small(dtype=torch.float32)
    actual = inputs.gradients(compiled("inductor"), impl=impl)
    torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)


@needs_extension
def test_compiled_training_packs_no_trained_weight():
    # What is trained has changed before it is seen again: its packed form would be waste.
    kernels = extension.load()
    kernels.clear_packed_weights()
    inputs = small(20, impl="cpu")
    inputs.gradients(compiled("aot_eager"), impl="cpu")
    assert kernels.packed_weights_size() == (0, 0)


# --- checkpointing, export -----------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_inside_activation_checkpointing(impl, reentrant, recompute):
    inputs = small(impl=impl)

    def function(*args, **keywords):
        def call(*tensors):
            return adapter_mixture(*tensors, impl=impl, recompute=recompute, **keywords)

        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=reentrant)

    # The reentrant form hands gradients to its own arguments only, and not through autograd.grad.
    leaves = {name: t for name, t in inputs.tensors().items() if name != "base"}
    inputs.call(function).backward(inputs.grad_out)
    expected = inputs.gradients(impl=impl)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"d_{name}"], **BITWISE)


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
    suffix = "_native" if dispatch.auto_impl(x.device, x.dtype) == "cpu" else ""
    assert targets.count(f"pemt_fast.adapter_mixture{suffix}.default") == 1


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
