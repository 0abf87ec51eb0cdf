"""Values of the operator on a CUDA device: the output and every gradient.

The error budget against the float64 oracle, for both implementations that run there. Which kernels
of the tables run is in `test_gpu_table.py`, what zeros do in `test_gpu_edge_cases.py`.
"""

import pytest
import torch
from gpu_cases import (
    BITWISE,
    DEVICE,
    DTYPES,
    FORM_IDS,
    IMPLS,
    ODD_SIZES,
    SIZES,
    everything,
    gpu_inputs,
    random_calls,
)

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden
from pemt_fast.ops.reference import ACTIVATION_FUNCTIONS
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import (
    GATE_FORMS,
    adapter_mixture_loop,
    assert_matches_oracle,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
)

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


# --- the error budget ----------------------------------------------------------------------------


# To a kernel float16 is bfloat16: the random calls have it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_the_error_budget(impl, dtype, gate, activation):
    options = {"dtype": dtype, "activation": activation, "device": DEVICE, **ODD_SIZES}
    assert_matches_oracle(
        lambda seed: make_inputs(2, 63, gate=gate, seed=seed, **options), impl=impl
    )


@pytest.mark.parametrize("call", random_calls(), ids=str)
def test_random_calls_within_the_error_budget(impl, call):
    assert_matches_oracle(
        lambda seed: make_inputs(*call.lead, **call.options, seed=seed, device=DEVICE),
        impl=impl, recompute=call.recompute,
    )  # fmt: skip


# Strides of x, gate, base and the incoming gradient, and those of the weights.
@pytest.mark.parametrize(
    ("size", "layout", "param_layout"),
    [("few-units", "sliced", "transposed"), ("many-units", "transposed", "sliced")],
)
def test_any_strides(impl, size, layout, param_layout):
    options = {"layout": layout, "param_layout": param_layout, "gate": "[B, S, E]"}
    assert_matches_oracle(lambda seed: gpu_inputs(size, 3, 43, **options, seed=seed), impl=impl)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
def test_a_gradient_without_strides(impl, size, gate):
    # `out.sum().backward()` sends one number, expanded.
    def make(seed):
        inputs = gpu_inputs(size, 3, 43, gate=gate, seed=seed)
        return inputs.replace(grad_out=inputs.grad_out[:1, :1, :1].expand_as(inputs.grad_out))

    assert_matches_oracle(make, impl=impl)


# fp32 adapters over a bf16 model, a router in float32, an fp32 residual stream, and the reverse.
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("bf16", {"param_dtype": torch.float32}),
        ("bf16", {"param_dtype": torch.float32, "gate_dtype": torch.float32}),
        ("bf16", {"base_dtype": torch.float32}),
        ("f32", {"param_dtype": torch.bfloat16, "gate_dtype": torch.bfloat16}),
        ("bf16", {"param_dtype": torch.float16, "gate_dtype": torch.float64}),
    ],
    ids=["fp32-params", "fp32-params-gate", "fp32-base", "bf16-params-gate", "odd"],
)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
def test_mixed_dtypes(impl, gate, dtype, others):
    options = {"gate": gate, "dtype": DTYPES[dtype], "device": DEVICE, **ODD_SIZES, **others}
    assert_matches_oracle(lambda seed: make_inputs(3, 43, **options, seed=seed), impl=impl)


def loop_with_hidden(x, gate, w_down, w_up, b_down=None, b_up=None, *, activation, **options):
    """The eager twin of `adapter_mixture_with_hidden`, without `ranks`."""
    out = adapter_mixture_loop(
        x, gate, w_down, w_up, b_down, b_up, activation=activation, **options
    )
    z = torch.nn.functional.linear(x, w_down.flatten(0, 1), b_down.flatten())
    return out, ACTIVATION_FUNCTIONS[activation](z)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(("size", "activation"), [("few-units", "gelu"), ("many-units", "relu")])
def test_hidden_units_and_their_gradients(impl, size, activation, recompute):
    inputs = gpu_inputs(size, 3, 43, activation=activation)
    units = inputs.w_down.shape[:2].numel()
    grad_hidden = inputs.grad_out.repeat(1, 1, 2)[..., :units].flip(-1)

    def run(inputs, function, **options):
        results = inputs.call(function, **options)
        grads = torch.autograd.grad(
            results, tuple(inputs.tensors().values()),
            [inputs.grad_out, grad_hidden.to(inputs.grad_out.dtype)],
        )  # fmt: skip
        found = [*(result.detach() for result in results), *grads]
        return dict(zip(["out", "hidden", *inputs.tensors()], found, strict=True))

    actual = run(inputs, adapter_mixture_with_hidden, impl=impl, recompute=recompute)
    exact = run(inputs.to(torch.float64), adapter_mixture_with_hidden, impl="reference")
    eager = run(inputs, loop_with_hidden)
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_is_a_cast_of_x(impl, dtype, gate):
    inputs = gpu_inputs("few-units", 3, 43, gate=gate, dtype=torch.float32)
    cast = inputs.replace(x=inputs.x.detach().to(dtype), grad_out=inputs.grad_out.to(dtype))
    expected = cast.replace(x=cast.x.requires_grad_()).gradients(impl=impl)
    with torch.autocast(DEVICE, dtype=dtype):
        out = inputs.call(adapter_mixture, impl=impl)
    grads = torch.autograd.grad(out, tuple(inputs.tensors().values()), cast.grad_out)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected["out"], **BITWISE)
    for (name, tensor), grad in zip(inputs.tensors().items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad, expected[f"d_{name}"].to(grad.dtype), **BITWISE)


@pytest.fixture
def tf32():
    """Products of float32 numbers rounded to 10 bits, as torch's own matmuls then do."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("tf32 needs compute capability 8.0")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
def test_tf32_when_it_is_switched_on(impl, tf32, gate):
    """The budget with the rounding step of tf32, over an eager loop in tf32."""
    inputs = make_inputs(8, 125, E=16, R=64, D=192, H=256, gate=gate, device=DEVICE)
    actual = everything(inputs, impl)
    eager = inputs.gradients(adapter_mixture_loop)
    exact = inputs.to(torch.float64).gradients(impl="reference")
    for name, result in actual.items():
        name = "out" if name == "inference" else name
        error, eager_error = (
            float((r.detach().double() - exact[name]).abs().max()) for r in (result, eager[name])
        )
        assert error <= 2 * (eager_error + 2**-10 * float(exact[name].abs().max())), name
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    again = everything(inputs, impl)
    for name in ("inference", "out", "d_x", "d_w_down", "d_w_up"):
        assert not torch.equal(again[name], actual[name]), f"{name} is the same as in tf32"
