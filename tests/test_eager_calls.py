"""The short ways of eager calls: who still sees them, and what must not differ on them."""

import implementations
import pytest
import torch
from implementations import INTERPRETED, TRITON, needs_triton
from torch.utils._python_dispatch import TorchDispatchMode

from pemt_fast import adapter_mixture
from pemt_fast.ops import triton_door
from pemt_fast.ops.watchers import nobody_watches
from pemt_fast.testing import adapter_mixture_loop, assert_within_budget, make_inputs

IMPLS = ["torch", TRITON]
interpreted = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED, reason="tests/test_gpu_runtime.py has it for GPUs"),
]


def small(**changes):
    sizes = {"E": 3, "D": 20, "R": 8, "H": 24, "activation": "relu"}
    return make_inputs(2, 5, **(sizes | changes))


class Seen(TorchDispatchMode):
    """The names of our operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pemt_fast":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", IMPLS)
def test_dispatch_modes_see_the_operator(impl):
    inputs = small()
    with Seen() as seen:
        inputs.gradients(impl=impl)
    assert seen.names == [
        "pemt_fast.adapter_mixture_forward.default",
        "pemt_fast.adapter_mixture_backward.default",
    ]
    with Seen() as seen, torch.no_grad():
        inputs.call(adapter_mixture, impl=impl)
    assert seen.names == ["pemt_fast.adapter_mixture.default"]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mode_around_backward_alone_sees_it(impl):
    inputs = small()
    out = inputs.call(adapter_mixture, impl=impl)
    with Seen() as seen:
        out.backward(inputs.grad_out)
    assert seen.names == ["pemt_fast.adapter_mixture_backward.default"]


@pytest.mark.parametrize("impl", IMPLS)
def test_profilers_see_the_operator(impl):
    inputs = small()
    with torch.profiler.profile() as profile:
        inputs.gradients(impl=impl)
    names = {event.key for event in profile.key_averages()}
    assert {"pemt_fast::adapter_mixture_forward", "pemt_fast::adapter_mixture_backward"} <= names


def test_who_counts_as_a_watcher():
    x, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(3))

    class Subclass(torch.Tensor):
        pass

    assert nobody_watches(x, None, parameter)
    with torch.inference_mode():
        assert nobody_watches(torch.randn(3))
    with torch.autocast("cpu"):
        assert nobody_watches(x)
    assert not nobody_watches(x, x.as_subclass(Subclass))
    assert not nobody_watches(x.to("meta"))
    assert not nobody_watches(torch._neg_view(x))
    assert not nobody_watches(x, 3)
    seen = []
    torch.func.vmap(lambda t: seen.append(nobody_watches(t)) or t)(x)
    torch.jit.trace(lambda t: seen.append(nobody_watches(t)) or t + 1, x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(nobody_watches(x))
    with Seen():
        seen.append(nobody_watches(x))
    # The tracer runs the function once more afterwards, to compare.
    assert seen[0] is False and seen[1] is False and seen[-2:] == [False, False]
    assert nobody_watches(x)


@pytest.mark.parametrize("impl", implementations.IMPLS)
def test_results_may_be_changed_in_place(impl):
    inputs = small()
    with torch.no_grad():
        out = inputs.call(adapter_mixture, impl=impl)
    out.add_(inputs.base)  # base requires grad, out came without
    out.sum().backward()
    assert inputs.base.grad is not None
    inputs.call(adapter_mixture, impl=impl).relu_().sum().backward()
    assert inputs.x.grad is not None


def no_grad_call(inputs, **options):
    with torch.no_grad():
        return inputs.call(adapter_mixture, impl="triton", **options)


def assert_right(inputs, out):
    with torch.no_grad():
        exact = inputs.to(torch.float64).call(adapter_mixture, impl="reference")
        assert_within_budget("out", out, exact, inputs.call(adapter_mixture_loop))


@pytest.fixture
def calls(monkeypatch):
    """The forms that the door has met."""
    monkeypatch.setattr(triton_door, "CALLS", {})
    return triton_door.CALLS


class TestDoor:
    pytestmark = interpreted

    def test_later_calls_see_new_values(self, calls):
        for seed in range(3):
            inputs = small(seed=seed, requires_grad=False)
            assert_right(inputs, no_grad_call(inputs))
        assert len(calls) == 1 and None not in calls.values()

    @pytest.mark.parametrize(
        "change",
        [
            {"gate": "[B, S, E]"}, {"gate": "[E]"}, {"activation": "silu"}, {"bias": False},
            {"base": False}, {"dtype": torch.bfloat16}, {"base_dtype": torch.bfloat16}, {"H": 23},
            {"R": 4}, {"gate_dtype": torch.float16}, {"layout": "sliced"},
            {"param_layout": "sliced"},
        ],
        ids=str,
    )  # fmt: skip
    def test_every_change_of_form_is_a_form(self, calls, change):
        for inputs in (small(requires_grad=False), small(requires_grad=False, **change)):
            for _ in range(2):
                assert_right(inputs, no_grad_call(inputs))
        assert len(calls) == 2

    @pytest.mark.parametrize(
        "change",
        [{"param_dtype": torch.float64}, {"layout": "transposed"}, {"gate_dtype": torch.float64}],
        ids=str,
    )
    def test_what_needs_a_copy_takes_the_long_way(self, calls, change):
        inputs = small(requires_grad=False, **change)
        for _ in range(2):
            assert_right(inputs, no_grad_call(inputs))
        assert list(calls.values()) == [None]

    def test_tensors_that_are_not_aligned(self, calls):
        inputs = small(requires_grad=False)
        for shift in (1, 0, 3):
            room = torch.zeros(inputs.x.numel() + shift)
            x = room[shift:].view(inputs.x.shape).copy_(inputs.x)
            assert_right(inputs, no_grad_call(inputs.replace(x=x)))
        assert len(calls) == 1

    def test_the_precision_of_float32_is_part_of_the_form(self, calls):
        inputs, settings = small(requires_grad=False), torch.backends.cuda.matmul
        before = settings.fp32_precision
        try:
            for settings.fp32_precision in ("ieee", "tf32"):
                no_grad_call(inputs)
        finally:
            settings.fp32_precision = before
        assert len(calls) == 2

    def test_gradients_and_autocast_take_the_long_way(self, calls):
        inputs = small()
        inputs.call(adapter_mixture, impl="triton").sum().backward()
        assert inputs.x.grad is not None and not calls
        with torch.autocast("cpu", torch.bfloat16):
            assert no_grad_call(inputs).dtype == torch.bfloat16
        assert list(calls.values()) == [None]

    def test_rules_hold_after_a_valid_call(self, calls):
        inputs = small(requires_grad=False)
        no_grad_call(inputs)
        with pytest.raises(ValueError, match="gate must be"):
            no_grad_call(inputs.replace(gate=inputs.gate[:1]))
        with pytest.raises(ValueError, match="activation must be one of"):
            adapter_mixture(
                inputs.x, inputs.gate, inputs.w_down, inputs.w_up, activation="tanh", impl="triton"
            )
        with pytest.raises(TypeError, match="x must be a torch.Tensor"):
            no_grad_call(inputs.replace(x=None))

    def test_forms_are_forgotten_before_they_fill_memory(self, calls, monkeypatch):
        monkeypatch.setattr(triton_door, "_MOST_CALLS", 2)
        for T in (1, 2, 3, 1):
            inputs = make_inputs(T, E=2, D=16, R=8, H=16, gate="[E]", requires_grad=False)
            assert_right(inputs, no_grad_call(inputs))
            assert len(calls) <= 2

    def test_unequal_ranks(self, calls):
        inputs = small(R=(4, 8, 12), requires_grad=False)
        assert_right(inputs, no_grad_call(inputs))
        with torch.no_grad():
            out = adapter_mixture(
                inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up,
                activation="relu", base=inputs.base, impl="triton", ranks=[4, 8, 12],
            )  # fmt: skip
        torch.testing.assert_close(out, no_grad_call(inputs), rtol=0, atol=0)
