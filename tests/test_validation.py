"""Every rule of the operator raises one message that names the argument, the rule and what came."""

import re
import sys

import pytest
import torch
from implementations import CPU, needs_extension

from pemt_fast.ops import adapter_mixture, adapter_mixture_with_hidden, dispatch, native
from pemt_fast.testing import make_inputs

# The package's attribute of that name is the function, not the module.
OPERATOR = sys.modules["pemt_fast.ops.adapter_mixture"]
B, S, E, D, R, H = 2, 3, 4, 5, 6, 7
N = E * R


def arguments(**changes):
    tensors = make_inputs(B, S, E=E, D=D, R=R, H=H, requires_grad=False).tensors()
    return {**tensors, "activation": "relu", **changes}


def packed(**changes):
    tensors = make_inputs(B, S, D=D, R=(R,) * E, H=H, requires_grad=False).tensors()
    return {**tensors, "activation": "relu", "ranks": (R,) * E, **changes}


def assert_raises(error, message, keywords, function=adapter_mixture):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**keywords)


# Argument, its wrong shape, the rule.
WRONG_SHAPES = [
    ("x", (), "x must be [..., D], got a scalar"),
    ("x", (B, S, D + 1), "x must be [..., D] with D = 5, the width of w_down, got [2, 3, 6]"),
    ("w_down", (N, D), "w_down must be [E, R, D], got shape [24, 5]"),
    ("w_down", (0, R, D), "w_down needs E >= 1 and R >= 1, got [0, 6, 5]"),
    ("w_down", (E, 0, D), "w_down needs E >= 1 and R >= 1, got [4, 0, 5]"),
    ("w_up", (N, H), "w_up must be [E, R, H], got shape [24, 7]"),
    ("w_up", (E, H, R), "w_up must be [E, R, H] = [4, 6, 6], got [4, 7, 6]"),
    ("w_up", (E + 1, R, H), "w_up must be [E, R, H] = [4, 6, 7], got [5, 6, 7]"),
    ("b_down", (N,), "b_down must be [E, R] = [4, 6], got [24]"),
    ("b_up", (H,), "b_up must be [E, H] = [4, 7], got [7]"),
    ("base", (S, H), "base must be [..., H] = [2, 3, 7], got [3, 7]"),
]
WRONG_PACKED_SHAPES = [
    ("w_down", (E, R, D), "w_down must be [N, D] when ranks are given, got shape [4, 6, 5]"),
    ("w_up", (E, R, H), "w_up must be [N, H] when ranks are given, got shape [4, 6, 7]"),
    ("w_up", (N + 1, H), "w_up must be [N, H] = [24, 7], got [25, 7]"),
    ("b_down", (E, R), "b_down must be [N] = [24], got [4, 6]"),
    ("b_up", (E + 1, H), "b_up must be [E, H] = [4, 7], got [5, 7]"),
]


def shape_id(value):
    return str(list(value)) if isinstance(value, tuple) else value if "must" not in value else ""


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SHAPES, ids=shape_id)
def test_wrong_shape(name, shape, message):
    assert_raises(ValueError, message, arguments(**{name: torch.zeros(shape)}))


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_PACKED_SHAPES, ids=shape_id)
def test_wrong_shape_beside_ranks(name, shape, message):
    assert_raises(ValueError, message, packed(**{name: torch.zeros(shape)}))


@pytest.mark.parametrize(
    "shape",
    [(), (E + 1,), (S, E), (B + 1, E), (B, S + 1, E), (S, B, E), (1, E), (B, 1, E), (B, S, 1, E)],
    ids=shape_id,
)
def test_gate_must_be_a_prefix_of_x(shape):
    message = "gate must be [E] = [4] or [B, E] = [2, 4] or [B, S, E] = [2, 3, 4], got "
    assert_raises(ValueError, message + str(list(shape)), arguments(gate=torch.zeros(shape)))


def test_gate_of_a_single_token():
    keywords = arguments(x=torch.zeros(D), gate=torch.zeros(1, E), base=None)
    assert_raises(ValueError, "gate must be [E] = [4], got [1, 4]", keywords)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((), "ranks must hold one positive rank per adapter, got []"),
        ((N, 0), "ranks must hold one positive rank per adapter, got [24, 0]"),
        ((N + 1, -1), "ranks must hold one positive rank per adapter, got [25, -1]"),
        (
            (R, R),
            "ranks must sum to N = 24, the rows of the packed w_down, got [6, 6] which sums to 12",
        ),
    ],
    ids=["empty", "zero", "negative", "wrong-sum"],
)
def test_wrong_ranks(ranks, message):
    assert_raises(ValueError, message, packed(ranks=ranks))


@pytest.mark.parametrize("name", ["x", "gate", "w_down", "w_up", "b_down", "b_up", "base"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_only_float_tensors(name, dtype):
    keywords = arguments()
    keywords[name] = keywords[name].to(dtype)
    message = f"{name} must be float32, bfloat16, float16 or float64, got {dtype}"
    assert_raises(TypeError, message, keywords)


@pytest.mark.parametrize("name", ["gate", "w_down", "w_up", "b_down", "b_up", "base"])
def test_one_device(name):
    keywords = arguments()
    keywords[name] = keywords[name].to("meta")
    message = f"{name} must be on cpu, the device of x, got meta"
    assert_raises(ValueError, message, keywords)


@pytest.mark.parametrize("name", ["x", "gate", "w_down", "w_up", "b_down", "b_up", "base"])
def test_only_tensors(name):
    keywords = arguments()
    keywords[name] = keywords[name].tolist()
    assert_raises(TypeError, f"{name} must be a torch.Tensor, got list", keywords)


def test_unknown_activation():
    message = "activation must be one of identity, relu, gelu, gelu_tanh, silu, got 'tanh'"
    assert_raises(ValueError, message, arguments(activation="tanh"))


def test_the_variant_with_hidden_units_checks_too():
    message = "b_up must be [E, H] = [4, 7], got [7]"
    assert_raises(ValueError, message, arguments(b_up=torch.zeros(H)), adapter_mixture_with_hidden)


def test_options_are_keywords():
    six_tensors = list(arguments().values())[:6]
    with pytest.raises(TypeError, match="takes from 4 to 6 positional arguments"):
        adapter_mixture(*six_tensors, "relu")


# --- which implementation runs -------------------------------------------------------------------


def test_unknown_impl():
    message = "impl must be one of auto, reference, torch, cpu, triton, cuda, got 'fast'"
    assert_raises(ValueError, message, arguments(impl="fast"))


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_gpu_implementation_lists_every_reason(impl, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_TRITON_INTERPRETED", False)
    with pytest.raises(RuntimeError, match=f"^impl='{impl}' cannot run: ") as raised:
        adapter_mixture(**arguments(impl=impl))
    assert "it runs on cuda tensors, x is on cpu" in str(raised.value)
    assert "torch sees no CUDA device" in str(raised.value)


@pytest.fixture
def no_extension(monkeypatch):
    """The operator as it is where `pemt_fast._C` could not be built."""
    monkeypatch.setattr(native, "door", native._closed)
    monkeypatch.setattr(dispatch, "_EXTENSION_MISSING", "the extension is missing: no compiler")
    without_fast_kernels(monkeypatch)


def without_fast_kernels(monkeypatch):
    for module in (dispatch, OPERATOR):
        monkeypatch.setattr(module, "CPU_KERNELS_ARE_FAST", False)


OTHERS_ON_A_CPU = (
    "\nhere run: reference, torch (what auto takes)\n"
    "triton does not run: it runs on cuda tensors, x is on {device}; torch sees no CUDA device"
)


@needs_extension
def test_a_refusal_says_what_runs_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_TRITON_INTERPRETED", False)
    with pytest.raises(RuntimeError) as raised:
        adapter_mixture(**arguments(impl="cpu", x=torch.zeros(B, S, D).double()))
    message = "impl='cpu' cannot run: it computes in float32, bfloat16 or float16, x is float64"
    assert str(raised.value).startswith(message + OTHERS_ON_A_CPU.format(device="cpu"))
    assert "\ncuda does not run: it runs on cuda tensors" in str(raised.value)
    with pytest.raises(RuntimeError, match=r"run: reference, torch, cpu \(what auto takes\)"):
        adapter_mixture(**arguments(impl="triton"))


def test_cpu_kernels_list_every_reason(no_extension):
    tensors = {k: v for k, v in arguments().items() if isinstance(v, torch.Tensor)}
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    reasons = "it runs on cpu tensors, x is on meta; the extension is missing: no compiler"
    with pytest.raises(RuntimeError, match=f"^impl='cpu' cannot run: {reasons}\nhere run: "):
        adapter_mixture(**arguments(impl="cpu", **meta))


@pytest.fixture
def which_ran(monkeypatch):
    """Names of the implementations that were called, in order."""
    ran = []
    monkeypatch.setattr(
        OPERATOR,
        "adapter_mixture_reference",
        lambda *args: ran.append("reference") or (args[0], args[0]),
    )

    monkeypatch.setattr(
        "pemt_fast.ops.autograd.backend",
        lambda impl: ran.append(impl) or dispatch.backend(impl),
    )
    door, native_operator = native.door, native.adapter_mixture

    def recording_door(*args):
        out = door(*args)
        ran.extend([] if out is None else ["cpu by the door"])
        return out

    monkeypatch.setattr(native, "door", recording_door)
    monkeypatch.setattr(
        native, "adapter_mixture", lambda *args: ran.append("cpu") or native_operator(*args)
    )
    return ran


@pytest.mark.parametrize("forced", ["reference", "torch", CPU])
def test_the_environment_names_what_auto_means(forced, which_ran, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", forced)
    adapter_mixture(**arguments())
    assert which_ran == [forced]


def test_the_environment_names_what_auto_means_in_compiled_calls(monkeypatch, caplog):
    monkeypatch.setenv("PEMT_FAST_IMPL", "torch")
    dispatch._log_forced_once.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: adapter_mixture(**a), fullgraph=True, backend="eager")
    given = arguments()
    with caplog.at_level("WARNING", logger="pemt_fast"):
        out = compiled(**given)
    torch.testing.assert_close(out, adapter_mixture(**given, impl="torch"), rtol=0, atol=0)
    assert caplog.text.count("impl='auto' means 'torch' because PEMT_FAST_IMPL is set") == 1


@pytest.mark.parametrize("unset", ["", "auto"])
def test_without_a_name_in_the_environment_auto_follows_the_table(unset, which_ran, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", unset)
    adapter_mixture(**arguments())
    assert which_ran == [dispatch.auto_impl(torch.device("cpu"), torch.float32)]


@needs_extension
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "cpu by the door"),
        (torch.bfloat16, "cpu by the door"),
        (torch.float16, "cpu by the door"),
        (torch.float64, "torch"),
    ],
    ids=["f32", "bf16", "f16", "f64"],
)
def test_auto_takes_the_cpu_kernels_for_their_dtypes(dtype, expected, which_ran, monkeypatch):
    if not dispatch.CPU_KERNELS_ARE_FAST:
        pytest.skip("this processor has no vector instructions that the kernels know")
    monkeypatch.delenv("PEMT_FAST_IMPL", raising=False)
    inputs = make_inputs(B, S, E=E, D=D, R=R, H=H, dtype=dtype, requires_grad=False)
    inputs.call(adapter_mixture)
    inputs.call(adapter_mixture_with_hidden)
    assert which_ran == [expected] * 2


@needs_extension
def test_without_vector_instructions_auto_takes_torch(which_ran, monkeypatch):
    monkeypatch.delenv("PEMT_FAST_IMPL", raising=False)
    without_fast_kernels(monkeypatch)
    adapter_mixture(**arguments())
    adapter_mixture(**arguments(impl="cpu"))
    assert which_ran == ["torch", "cpu by the door"]


def test_without_the_extension_auto_takes_torch(no_extension, which_ran, monkeypatch):
    monkeypatch.delenv("PEMT_FAST_IMPL", raising=False)
    adapter_mixture(**arguments())
    assert which_ran == ["torch"]


def test_a_named_implementation_ignores_the_environment(which_ran, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", "reference")
    adapter_mixture(**arguments(impl="torch"))
    assert which_ran == ["torch"]


@needs_extension
def test_the_named_cpu_kernels_ignore_the_environment(which_ran, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", "reference")
    adapter_mixture(**arguments(impl="cpu"))
    assert which_ran == ["cpu by the door"]


def test_unknown_implementation_in_the_environment(monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", "fast")
    message = "PEMT_FAST_IMPL must be one of auto, reference, torch, cpu, triton, cuda, got 'fast'"
    assert_raises(ValueError, message, arguments())


def test_an_implementation_forced_by_the_environment_runs_or_raises(monkeypatch):
    monkeypatch.setenv("PEMT_FAST_IMPL", "cuda")
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: it runs on cuda tensors"):
        adapter_mixture(**arguments())
