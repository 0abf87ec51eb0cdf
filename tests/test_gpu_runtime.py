"""How the operator behaves on a CUDA device: graphs, streams, devices, repetition.

Its values are in `test_gpu_operator.py`; here a call is compared with another one of its own.
"""

import contextlib
import copy

import pytest
import torch
from gpu_cases import (
    BITWISE,
    DEVICE,
    FORM_IDS,
    IMPLS,
    ODD_SIZES,
    SIZES,
    UNEQUAL_RANKS,
    Layer,
    captured,
    everything,
    gpu_inputs,
)

from pemt_fast import adapter_mixture
from pemt_fast.testing import GATE_FORMS

pytestmark = pytest.mark.gpu


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


# --- graphs --------------------------------------------------------------------------------------

# One after the other: gates of zero appear and disappear, a broken adapter behind one of them.
CHANGES = [
    lambda inputs: inputs.x.data.normal_(),
    lambda inputs: inputs.gate.data[..., 1].zero_(),
    lambda inputs: inputs.w_up.data[1].fill_(float("nan")),
    lambda inputs: inputs.gate.data.zero_(),
    lambda inputs: inputs.w_up.data.normal_(),
    lambda inputs: inputs.gate.data.normal_(),
]


def replays_see_changes(inputs, run):
    graph, results = captured(run)
    for change in CHANGES:
        change(inputs)
        graph.replay()
        torch.testing.assert_close(results, run())
        assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("size", SIZES)
def test_inference_captured_in_a_graph(impl, size, gate):
    inputs = gpu_inputs(size, 3, 43, gate=gate, requires_grad=False)
    replays_see_changes(inputs, lambda: {"out": inputs.call(adapter_mixture, impl=impl)})


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward_captured_in_a_graph(impl, size, gate, recompute):
    inputs = gpu_inputs(size, 3, 43, gate=gate)
    replays_see_changes(inputs, lambda: inputs.gradients(impl=impl, recompute=recompute))


def test_weight_gradients_over_many_tokens_captured_in_a_graph(impl):
    inputs = gpu_inputs("few-units", 4, 1025)
    replays_see_changes(inputs, lambda: inputs.gradients(impl=impl))


def gradients_of(module, x):
    """Output and gradients of a module, the latter those of the sum of squares."""
    out = module(x)
    grads = torch.autograd.grad(out.square().sum(), (x, *module.parameters()))
    return out.detach().clone(), *(grad.clone() for grad in grads)


def test_a_graphed_module(impl):
    layer = Layer(impl).to(DEVICE)
    twin = copy.deepcopy(layer)
    sample, x = (
        torch.randn(3, 43, ODD_SIZES["D"], device=DEVICE, requires_grad=True) for _ in range(2)
    )
    graphed = torch.cuda.make_graphed_callables(layer, (sample,))
    expected = gradients_of(twin, x)
    torch.testing.assert_close(gradients_of(graphed, x), expected, rtol=1e-4, atol=1e-4)


# --- the host, streams, devices ------------------------------------------------------------------


@contextlib.contextmanager
def no_synchronisation():
    """What makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RANKS = {**{size: {} for size in SIZES}, "unequal": {"R": UNEQUAL_RANKS}}


@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("size", RANKS)
def test_the_host_never_waits(impl, size, gate):
    inputs = gpu_inputs(size if size in SIZES else "few-units", 3, 43, gate=gate, **RANKS[size])
    inputs.gate.data[..., 1] = 0

    def run():
        everything(inputs, impl)
        inputs.gradients(impl=impl, recompute=True)

    run()  # what is read once: kernels to compile, tables for new ranks
    with no_synchronisation():
        run()


@pytest.mark.parametrize("size", SIZES)
def test_on_the_stream_of_the_call(impl, size):
    inputs = gpu_inputs(size, 3, 43)
    expected = everything(inputs, impl)
    values, stream = inputs.x.detach().clone(), torch.cuda.Stream()
    inputs.x.data.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # x is there some 50 ms later, on this stream only
        inputs.x.data.copy_(values)
        results = everything(inputs, impl)
    stream.synchronize()
    torch.testing.assert_close(results, expected, **BITWISE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("size", SIZES)
def test_on_a_device_that_is_not_the_current_one(impl, size):
    expected = everything(gpu_inputs(size, 3, 43, device="cuda:0"), impl)
    assert torch.cuda.current_device() == 0
    actual = everything(gpu_inputs(size, 3, 43, device="cuda:1"), impl)
    for name, result in actual.items():
        assert result.device == torch.device("cuda:1")
        torch.testing.assert_close(result.cpu(), expected[name].cpu())


def moved(tensor):
    """The same tensor one element behind an address that kernels are compiled for."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    copy = buffer[1:].view(tensor.shape)
    copy.copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


def test_addresses_that_are_not_aligned(impl):
    """Between calls with addresses that are: what was compiled for them must not be taken."""
    inputs = gpu_inputs("few-units", 3, 43)
    expected = everything(inputs, impl)
    tensors = {**inputs.tensors(), "grad_out": inputs.grad_out}
    other = inputs.replace(**{name: moved(tensor) for name, tensor in tensors.items()})
    torch.testing.assert_close(everything(other, impl), expected)
    torch.testing.assert_close(everything(inputs, impl), expected, **BITWISE)


# --- repetition ----------------------------------------------------------------------------------

# Sums over all tokens and over those of a sequence, in parts and in one; with few units our own
# kernel makes the gradients of the weights, with many the library.
REPEATED = {
    "T1": ("few-units", (1,), {"gate": "[E]"}),
    "pertoken": ("few-units", (3, 43), {"gate": "[B, S, E]"}),
    "few-units-percall": ("few-units", (4099,), {"gate": "[E]"}),
    "few-units-persequence": ("few-units", (4, 1025), {"gate": "[B, E]"}),
    "unequal-persequence": ("few-units", (3, 1667), {"R": UNEQUAL_RANKS}),
    "unequal-pertoken": ("few-units", (5001,), {"R": UNEQUAL_RANKS}),
    "short-sequences": ("many-units", (8, 129), {"gate": "[B, E]"}),
    "long-sequences": ("many-units", (4, 4099), {"gate": "[B, E]"}),
    "many-gates": ("many-units", (16385,), {"gate": "[B, E]"}),
    "f32": ("many-units", (4, 1025), {"R": 64, "dtype": torch.float32}),
}


@pytest.mark.parametrize(("size", "lead", "changes"), REPEATED.values(), ids=REPEATED)
def test_two_runs_give_the_same_bits(impl, size, lead, changes):
    first = everything(gpu_inputs(size, *lead, **changes), impl)
    second = everything(gpu_inputs(size, *lead, **changes), impl)
    torch.testing.assert_close(second, first, **BITWISE)


@pytest.mark.parametrize("size", SIZES)
def test_recomputing_gives_the_same_bits(impl, size):
    inputs = gpu_inputs(size, 3, 43)
    saved = inputs.gradients(impl=impl, recompute=False)
    again = inputs.gradients(impl=impl, recompute=True)
    torch.testing.assert_close(again, saved, **BITWISE)


@pytest.mark.parametrize("size", SIZES)
def test_a_call_leaves_earlier_results(impl, size):
    inputs = gpu_inputs(size, 3, 43)
    first = everything(inputs, impl)
    copies = {name: result.clone() for name, result in first.items()}
    inputs.x.data.normal_()
    assert not torch.equal(everything(inputs, impl)["inference"], first["inference"])
    torch.testing.assert_close(first, copies, **BITWISE)
