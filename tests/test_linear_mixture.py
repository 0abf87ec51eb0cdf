"""`linear_mixture` against the float64 oracle: a linear and the mixture beside it, one operator."""

import itertools
import re

import pytest
import torch
from implementations import IMPLS, INTERPRETED, TRITON, WIDEST, needs_extension
from linear_inputs import LINEAR_NAMES, beside, make_linear_inputs
from rounding import assert_equals_reference, assert_within, rounding_bounds
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pemt_fast.ops import linear_mixture, native, stacked
from pemt_fast.ops.gated_units import Weights
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, assert_matches_oracle, poisoned_empty

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITWISE = {"rtol": 0, "atol": 0}
OPS = torch.ops.pemt_fast
gates = pytest.mark.parametrize("gate", GATE_FORMS, ids=["percall", "persequence", "pertoken"])
layouts = pytest.mark.parametrize("stacked_weights", [False, True], ids=["apart", "stacked"])


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def tiny(**changes):
    return make_linear_inputs(2, 3, **{"E": 3, "D": 5, "R": 2, "H": 4, **changes})


# --- values: the output and every gradient -------------------------------------------------------

# One token is decoding; 257 leaves a tail of one; unequal ranks, R = 1 and E = 17 as in the tests
# of `adapter_mixture`.
CASES = [
    ((1,), {"E": 6, "D": 96, "R": 64, "H": 60, "gate": "[B, E]"}),
    ((1, 1), {"E": 17, "D": 60, "R": 24, "H": 33, "gate": "[B, S, E]"}),
    ((63,), {"E": 6, "D": 60, "R": 24, "H": 96, "gate": "[E]"}),
    ((2, 63), {"E": 6, "D": 33, "R": 1, "H": 60, "gate": "[B, E]"}),
    ((3, 21), {"R": (1, 24, 64), "D": 60, "H": 33, "gate": "[B, S, E]"}),
    ((257,), {"E": 2, "D": 96, "R": 64, "H": 60, "gate": "[B, E]"}),
]
cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0]))}-{case[1]['gate']}"
)


@layouts
@cases
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_within_the_error_budget(impl, dtype, activation, case, stacked_weights):
    lead, sizes = case
    keywords = {**sizes, "dtype": dtype, "activation": activation, "stacked": stacked_weights}
    assert_matches_oracle(
        lambda seed: make_linear_inputs(*lead, **keywords, seed=seed), linear_mixture, impl=impl
    )


@layouts
@cases
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
def test_equals_the_reference_in_its_widest_dtype(impl, bias, case, stacked_weights):
    lead, sizes = case
    inputs = make_linear_inputs(
        *lead, **sizes, bias=bias, dtype=WIDEST[impl], stacked=stacked_weights
    )
    assert_equals_reference(inputs, impl=impl)


@layouts
@pytest.mark.parametrize("which", ["bias", "b_down"])
def test_one_bias_without_the_other(impl, which, stacked_weights):
    inputs = make_linear_inputs(2, 9, dtype=WIDEST[impl], stacked=stacked_weights)
    missing = {"bias": ("b_down", "b_up"), "b_down": ("bias",)}[which]
    assert_equals_reference(inputs.replace(**dict.fromkeys(missing)), impl=impl)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_inputs_of_any_strides(impl, layout):
    inputs = make_linear_inputs(2, 9, dtype=WIDEST[impl], layout=layout, param_layout=layout)
    weight = inputs.weight.detach().t().contiguous().t().requires_grad_()
    assert_equals_reference(inputs.replace(weight=weight), impl=impl)


@pytest.mark.parametrize("lead", [(), (2, 3, 4)], ids=["token", "deeper"])
def test_other_leading_sizes(impl, lead):
    inputs = make_linear_inputs(*lead, gate="[E]", dtype=WIDEST[impl], stacked=True)
    assert_equals_reference(inputs, impl=impl)


@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("bf16", {"linear_dtype": torch.float32}),
        ("bf16", {"param_dtype": torch.float32, "linear_dtype": torch.bfloat16}),
        ("f32", {"linear_dtype": torch.bfloat16}),
        ("f16", {"param_dtype": torch.float32, "gate_dtype": torch.float32}),
    ],
    ids=["fp32-linear", "fp32-params", "bf16-linear", "f16"],
)
def test_mixed_dtypes(impl, dtype, others):
    if impl == "triton" and INTERPRETED and dtype == "bf16":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    keywords = {"dtype": DTYPES[dtype], **others}
    assert_matches_oracle(
        lambda seed: make_linear_inputs(3, 21, **keywords, seed=seed), linear_mixture, impl=impl
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_finite_differences(activation):
    inputs = tiny(dtype=torch.float64, activation=activation, stacked=True)

    def function(*tensors):
        named = dict(zip(LINEAR_NAMES, tensors, strict=True))
        return inputs.replace(**named).call(impl="torch", with_hidden=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.tensors().values()))


@layouts
@pytest.mark.parametrize("used", ["out", "hidden", "both"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_units_and_their_gradients(impl, activation, used, stacked_weights):
    def run(inputs, **options):
        out, hidden = inputs.call(with_hidden=True, **options)
        pairs = {"out": (out, inputs.grad_out), "hidden": (hidden, inputs.grad_out[..., :8])}
        chosen = pairs.values() if used == "both" else [pairs[used]]
        grads = torch.autograd.grad(
            [tensor for tensor, _ in chosen], tuple(inputs.tensors().values()),
            [grad for _, grad in chosen], allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        named = {f"d_{name}": grad for name, grad in zip(inputs.tensors(), grads, strict=True)}
        return {"out": out.detach(), "hidden": hidden.detach(), **named}

    inputs = make_linear_inputs(
        2, 7, R=(3, 5), dtype=WIDEST[impl], activation=activation, stacked=stacked_weights
    )
    assert_equals_reference(inputs, run, impl=impl)


@layouts
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_asking_for_hidden_units_changes_nothing_else(impl, requires_grad, stacked_weights):
    inputs = make_linear_inputs(
        2, 63, dtype=WIDEST[impl], requires_grad=requires_grad, stacked=stacked_weights
    )
    out, hidden = inputs.call(impl=impl, with_hidden=True)
    torch.testing.assert_close(out, inputs.call(impl=impl), **BITWISE)
    assert hidden.shape == (2, 63, 6 * 24) and hidden.is_contiguous()


@layouts
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_nothing_else_is_written_to(impl, requires_grad, stacked_weights):
    """The linear's output and d_x may be added to in place: they are nobody else's."""
    inputs = make_linear_inputs(
        2, 63, dtype=WIDEST[impl], requires_grad=requires_grad, stacked=stacked_weights
    )
    named = {**inputs.tensors(), "grad_out": inputs.grad_out}
    before = {name: t.detach().clone() for name, t in named.items()}
    out = inputs.call(impl=impl)
    assert out.is_contiguous() and not out._is_view()
    assert out.untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in named.values()
    }
    if requires_grad:
        out.backward(inputs.grad_out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named.items())


# --- which gradients, what is kept ---------------------------------------------------------------

PARTS = ("x", "weight", "bias", "gate", "w_down", "b_up")
SUBSETS = [c for count in range(len(PARTS) + 1) for c in itertools.combinations(PARTS, count)]


@pytest.fixture(scope="module")
def all_gradients():
    found = {}
    for activation, dtype in itertools.product(("gelu", "relu"), set(WIDEST.values())):
        inputs = tiny(activation=activation, dtype=dtype)
        exact = inputs.to(torch.float64).gradients(impl="reference")
        found[activation, dtype] = exact, rounding_bounds(inputs)
    return found


@layouts
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "nothing")
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_each_gradient_on_its_own(impl, activation, subset, stacked_weights, all_gradients):
    exact, bounds = all_gradients[activation, WIDEST[impl]]
    inputs = tiny(
        activation=activation, dtype=WIDEST[impl], requires_grad=subset, stacked=stacked_weights
    )
    out = inputs.call(impl=impl)
    assert out.requires_grad == bool(subset)
    if subset:
        out.backward(inputs.grad_out)
    grads = {f"d_{name}": t.grad for name, t in inputs.tensors().items() if t.grad is not None}
    assert grads.keys() == {f"d_{name}" for name in subset}
    for name, grad in grads.items():
        assert_within(name, grad, exact[name], bounds[name])


@pytest.mark.parametrize(
    ("requires_grad", "expected"),
    [
        (("x", "gate"), {"saved", "weight", "gate", "w_down", "w_up", "b_down", "b_up"}),
        (("gate",), {"saved", "gate", "w_down", "w_up", "b_down", "b_up"}),
        (("weight",), {"x", "gate", "w_down", "w_up", "b_down", "b_up"}),
        (("bias",), {"gate", "w_down", "w_up", "b_down", "b_up"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_kept_for_backward(impl, requires_grad, expected):
    inputs = make_linear_inputs(2, 9, dtype=torch.bfloat16, requires_grad=requires_grad)
    known = {t.data_ptr(): name for name, t in inputs.tensors().items()}
    kept = []

    def pack(tensor):
        kept.append((known.get(tensor.data_ptr(), "saved"), tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = inputs.call(impl=impl)
    assert {name for name, tensor in kept if tensor.numel()} == expected
    sizes = {t.untyped_storage().nbytes() for name, t in kept if name == "saved" and t.numel()}
    assert sizes <= {out[..., 0].numel() * 6 * 24 * 2}  # T·N elements, not a piece of more


def test_the_cast_weight_is_kept_for_backward(impl):
    # As torch's own linear does under autocast: casting [H, D] again would cost more than a token.
    inputs = make_linear_inputs(2, 9, requires_grad=("x",), dtype=torch.float32)
    kept = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            inputs.call(impl=impl)
    assert [t.dtype for t in kept if t.shape == inputs.weight.shape] == [torch.bfloat16]


def test_no_second_derivatives(impl):
    inputs = tiny(dtype=WIDEST[impl])
    for name in ("x", "weight", "bias"):
        (grad,) = torch.autograd.grad(
            inputs.call(impl=impl).square().sum(), inputs.tensors()[name], create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@layouts
def test_inputs_are_not_modified_and_results_share_no_memory(impl, stacked_weights):
    inputs = make_linear_inputs(2, 63, activation="relu", stacked=stacked_weights)
    before = {name: t.detach().clone() for name, t in inputs.tensors().items()}
    inputs.gradients(impl=impl)
    out, hidden = inputs.call(impl=impl, with_hidden=True)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor, before[name]), name
    owners = {t.untyped_storage().data_ptr() for t in (*inputs.tensors().values(), out, hidden)}
    assert len(owners) == len(inputs.tensors()) + 2 - stacked_weights
    assert out.is_contiguous()


# --- the two matrices as one ---------------------------------------------------------------------


class Matmuls(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


def matmuls(inputs, **options):
    """Of forward and of the backward pass to x: the arithmetic of impl="torch" by itself."""
    flat = [t.detach().reshape(-1, t.shape[-1]) for t in (inputs.x, inputs.gate, inputs.grad_out)]
    weights = Weights(
        inputs.w_down.detach().reshape(-1, inputs.w_down.shape[-1]),
        inputs.w_up.detach().reshape(-1, inputs.w_up.shape[-1]),
        None, None, inputs.weight.detach(), inputs.bias.detach(),
    )  # fmt: skip
    ranks = (inputs.w_down.shape[1],) * inputs.w_down.shape[0]
    with Matmuls() as forward:
        _, _, saved = stacked.forward(*flat[:2], weights, None, ranks, "gelu", True, False)
    needs = (True, False, False, False, False, False)
    with Matmuls() as backward:
        stacked.backward(flat[2], None, None, flat[1], weights, saved, ranks, "gelu", needs)
    return forward.count, backward.count


def test_one_matmul_less_where_the_weights_are_one_matrix():
    inputs = make_linear_inputs(2, 9)
    assert matmuls(inputs) == (3, 3)
    assert matmuls(make_linear_inputs(2, 9, stacked=True)) == (2, 2)


def test_neighbours_that_are_no_matrix():
    both = torch.randn(7, 4)
    weight, w_down = both[:3], both[3:]
    assert torch.equal(stacked.one_matrix(weight, w_down), both)
    assert stacked.one_matrix(weight, w_down).data_ptr() == both.data_ptr()
    assert stacked.one_matrix(None, w_down) is None
    assert stacked.one_matrix(w_down, weight) is None
    assert stacked.one_matrix(weight, both[4:]) is None
    assert stacked.one_matrix(weight, w_down.clone()) is None
    assert stacked.one_matrix(weight, w_down.view(8, 2)) is None
    assert stacked.one_matrix(both[:2].t(), both[2:].view(-1, 2)) is None
    assert stacked.one_matrix(weight, w_down.view(torch.int32)) is None
    part = torch.randn(9, 4)[2:]
    assert torch.equal(stacked.one_matrix(part[:3], part[3:5]), part[:5])
    room = torch.zeros(112, dtype=torch.uint8).numpy()
    first = torch.from_numpy(room[:48]).view(torch.float32).view(3, 4)
    second = torch.from_numpy(room[48:]).view(torch.float32).view(4, 4)
    assert second.data_ptr() == first.data_ptr() + first.nbytes  # neighbours, but two storages
    assert stacked.one_matrix(first, second) is None


# --- zeros, nothing, not finite ------------------------------------------------------------------


@layouts
@gates
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["w_down", "w_up", "b_down", "b_up"])
def test_a_zero_gate_stops_what_is_not_finite(impl, name, bad, gate, stacked_weights):
    inputs = make_linear_inputs(2, 20, gate=gate, dtype=WIDEST[impl], stacked=stacked_weights)
    inputs.gate.data[..., 1] = 0
    clean = inputs.gradients(impl=impl)
    with torch.no_grad():
        inputs.tensors()[name][1] = bad
    poisoned = inputs.gradients(impl=impl)
    for result in ("out", "d_x", "d_weight", "d_bias"):
        assert poisoned[result].isfinite().all()
        torch.testing.assert_close(poisoned[result], clean[result])
    with torch.no_grad():  # where the unused adapter is left out
        torch.testing.assert_close(inputs.call(impl=impl), clean["out"])


def test_all_gates_zero_leave_the_linear(impl):
    inputs = make_linear_inputs(2, 20, dtype=WIDEST[impl], stacked=True)
    inputs.gate.data.zero_()
    expected = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    torch.testing.assert_close(inputs.call(impl=impl), expected)


@layouts
@pytest.mark.parametrize("lead", [(0,), (0, 5), (2, 0)], ids=str)
def test_no_tokens(impl, lead, stacked_weights):
    inputs = make_linear_inputs(*lead, gate="[E]", dtype=WIDEST[impl], stacked=stacked_weights)
    results = inputs.gradients(impl=impl)
    for name, tensor in inputs.tensors().items():
        assert results[f"d_{name}"].shape == tensor.shape
        assert not results[f"d_{name}"].any()
    assert results["out"].shape == (*lead, 96)


# --- autocast, forms of a call -------------------------------------------------------------------


@pytest.mark.parametrize("around", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_is_a_cast_of_x(impl, dtype, around):
    inputs = make_linear_inputs(2, 63)
    cast = inputs.replace(x=inputs.x.detach().to(dtype), grad_out=inputs.grad_out.to(dtype))
    expected = cast.replace(x=cast.x.requires_grad_()).gradients(impl=impl)
    with torch.autocast("cpu", dtype=dtype):
        out = inputs.call(impl=impl)
    with torch.autocast("cpu", dtype=dtype, enabled=around == "both"):
        grads = torch.autograd.grad(out, tuple(inputs.tensors().values()), cast.grad_out)
    torch.testing.assert_close(out, expected["out"], **BITWISE)
    for (name, tensor), grad in zip(inputs.tensors().items(), grads, strict=True):
        torch.testing.assert_close(grad, expected[f"d_{name}"].to(tensor.dtype), **BITWISE)


@layouts
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_two_runs_give_the_same_bits(impl, dtype, stacked_weights):
    inputs = make_linear_inputs(2, 128, D=96, R=64, dtype=dtype, stacked=stacked_weights)
    torch.testing.assert_close(inputs.gradients(impl=impl), inputs.gradients(impl=impl), **BITWISE)


def test_inference_is_the_forward_pass_of_training(impl):
    # Of frozen parameters: trained ones are read in another layout, with other last bits.
    inputs = make_linear_inputs(2, 63, dtype=WIDEST[impl], requires_grad=("x", "gate"))
    with torch.no_grad():
        out = inputs.call(impl=impl)
    assert not out.requires_grad
    torch.testing.assert_close(out, inputs.call(impl=impl).detach(), **BITWISE)
    with torch.inference_mode():
        torch.testing.assert_close(inputs.call(impl=impl), out, **BITWISE)


@pytest.mark.parametrize("implementation", [TRITON])
def test_triton_without_gradients_takes_its_door(implementation, monkeypatch):
    from pemt_fast.ops import triton_door

    monkeypatch.setattr(triton_door, "CALLS", {})
    inputs = make_linear_inputs(2, 9, requires_grad=False)
    out = inputs.call(impl=implementation)
    assert len(triton_door.CALLS) == 1
    torch.testing.assert_close(out, beside(inputs, impl=implementation), **BITWISE)


@needs_extension
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_the_door_to_the_cpu_kernels_is_open(requires_grad, monkeypatch):
    inputs = make_linear_inputs(2, 9, requires_grad=requires_grad)
    expected = inputs.call(impl="cpu")
    monkeypatch.setattr(native, "adapter_mixture", None)
    torch.testing.assert_close(inputs.call(impl="cpu"), expected, **BITWISE)


# --- messages ------------------------------------------------------------------------------------

WRONG = [
    ({"weight": torch.zeros(4, 6)}, ValueError, "weight must be [H, D] = [4, 5], got [4, 6]"),
    ({"weight": torch.zeros(5, 4)}, ValueError, "weight must be [H, D] = [4, 5], got [5, 4]"),
    ({"weight": torch.zeros(5)}, ValueError, "weight must be [H, D] = [4, 5], got [5]"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"weight": torch.zeros(4, 5, dtype=torch.int8)}, TypeError,
     "weight must be float32, bfloat16, float16 or float64, got torch.int8"),
    ({"weight": torch.zeros(4, 5, device="meta")}, ValueError,
     "weight must be on cpu, the device of x, got meta"),
    ({"bias": torch.zeros(5)}, ValueError, "bias must be [H] = [4], got [5]"),
    ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
    ({"bias": torch.zeros(4, dtype=torch.int8)}, TypeError,
     "bias must be float32, bfloat16, float16 or float64, got torch.int8"),
    ({"x": torch.zeros(2, 3, 6)}, ValueError,
     "x must be [..., D] with D = 5, the width of w_down, got [2, 3, 6]"),
    ({"gate": torch.zeros(3, 3)}, ValueError,
     "gate must be [E] = [3] or [B, E] = [2, 3] or [B, S, E] = [2, 3, 3], got [3, 3]"),
    ({"activation": "tanh"}, ValueError,
     "activation must be one of identity, relu, gelu, gelu_tanh, silu, got 'tanh'"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference", *IMPLS])
@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_rules(impl, changes, error, message):
    inputs = tiny(requires_grad=False).replace(**changes)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        inputs.call(impl=impl)


# --- registration, torch.compile -----------------------------------------------------------------


def operator(impl, suffix=""):
    native_suffix = "_native" if impl == "cpu" else ""
    op = getattr(OPS, f"adapter_mixture{native_suffix}{suffix}").default
    return op, () if impl == "cpu" else (impl,)


@layouts
@pytest.mark.parametrize("with_hidden", [False, True], ids=["out", "out-hidden"])
@pytest.mark.parametrize(
    "requires_grad", [False, True, ("x", "gate"), ("weight",)], ids=["frozen", "all", "x-gate", "w"]
)
def test_the_operator_is_well_registered(impl, requires_grad, with_hidden, stacked_weights):
    op, named = operator(impl)
    inputs = tiny(dtype=WIDEST[impl], requires_grad=requires_grad, stacked=stacked_weights)
    arguments = (
        inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, None,
        [2, 2, 2], inputs.activation, *named, False, with_hidden, inputs.weight, inputs.bias,
    )  # fmt: skip
    torch.library.opcheck(op, arguments)


def test_the_inner_operators_are_well_registered(impl):
    inputs = tiny(dtype=WIDEST[impl], requires_grad=False)
    op, named = operator(impl, "_backward")
    torch.library.opcheck(op, (
        inputs.grad_out, None, inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down,
        inputs.b_up, torch.randn(6, 6, dtype=inputs.x.dtype), [2, 2, 2], inputs.activation, *named,
        [True] * 6, inputs.weight,
    ))  # fmt: skip
    op, named = operator(impl, "_forward")
    torch.library.opcheck(op, (
        inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up, None,
        [2, 2, 2], inputs.activation, *named, False, True, True, inputs.weight, inputs.bias,
    ))  # fmt: skip


@layouts
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize(
    "requires_grad", [True, ("x", "gate"), False], ids=["all", "x-gate", "frozen"]
)
def test_compiled_values_and_gradients(impl, requires_grad, activation, stacked_weights):
    inputs = make_linear_inputs(
        2, 7, dtype=WIDEST[impl], activation=activation, requires_grad=requires_grad,
        stacked=stacked_weights,
    )  # fmt: skip
    function = torch.compile(linear_mixture, fullgraph=True, backend="aot_eager")
    actual = inputs.gradients(function, impl=impl)
    torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@gates
def test_one_compilation_for_every_number_of_tokens(gate, impl):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(linear_mixture, fullgraph=True, backend=counter)
    for tokens in (7, 9, 33):
        inputs = make_linear_inputs(2, tokens, gate=gate, dtype=WIDEST.get(impl, torch.float32))
        for tensor in (inputs.x, *([inputs.gate] if gate == "[B, S, E]" else [])):
            torch._dynamo.mark_dynamic(tensor, 1)
        actual = inputs.gradients(function, impl=impl)
        torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_under_autocast(impl):
    inputs = make_linear_inputs(2, 7)

    def run(function):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inputs.call(function, impl=impl)

    actual = run(torch.compile(linear_mixture, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(actual, run(linear_mixture), **BITWISE)


def test_inside_activation_checkpointing(impl):
    inputs = make_linear_inputs(2, 7, dtype=WIDEST[impl])

    def function(*args, **keywords):
        def call(*tensors):
            return linear_mixture(*tensors, **keywords, impl=impl)

        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False)

    actual = inputs.gradients(function)
    torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)
