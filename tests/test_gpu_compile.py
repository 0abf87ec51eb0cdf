"""The operator under `torch.compile` on a CUDA device."""

import copy

import pytest
import torch
from gpu_cases import (
    BITWISE,
    DEVICE,
    FORM_IDS,
    IMPLS,
    ODD_SIZES,
    UNEQUAL_RANKS,
    WIDTHS,
    Layer,
    gpu_inputs,
)
from torch._dynamo.testing import CompileCounterWithBackend

from pemt_fast import adapter_mixture
from pemt_fast.testing import make_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.mark.parametrize(
    ("form", "backend"),
    [("[E]", "aot_eager"), ("[B, E]", "inductor"), ("[B, S, E]", "aot_eager")],
    ids=FORM_IDS,
)
def test_one_compilation_for_every_number_of_tokens(impl, form, backend):
    counter = CompileCounterWithBackend(backend)
    function = torch.compile(adapter_mixture, fullgraph=True, backend=counter)
    for tokens in (7, 43, 129, 2500):
        inputs = gpu_inputs("few-units", 2, tokens, gate=form)
        for tensor in (inputs.x, inputs.base, *([inputs.gate] if form == "[B, S, E]" else [])):
            torch._dynamo.mark_dynamic(tensor, 1)
        actual = inputs.gradients(function, impl=impl)
        torch.testing.assert_close(actual, inputs.gradients(impl=impl), **BITWISE)
    assert counter.frame_count == 1


def test_a_compiled_module_trains(impl):
    layer = Layer(impl).to(DEVICE)
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (layer, twin)]
    for tokens in (43, 44, 129):
        x = torch.randn(2, tokens, ODD_SIZES["D"], device=DEVICE)
        torch._dynamo.mark_dynamic(x, 1)
        for module, optimizer in zip((layer, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [16, UNEQUAL_RANKS[::-1]], ids=["equal", "unequal"])
def test_compiled_with_cuda_graphs(impl, ranks):
    """The first call, which makes the tables for new ranks, is inside of the graphs' memory."""
    function = torch.compile(adapter_mixture, fullgraph=True, mode="reduce-overhead")
    inputs = make_inputs(
        3, 43, E=4, R=ranks, dtype=torch.bfloat16, **WIDTHS, requires_grad=False, device=DEVICE
    )
    actual = []
    for seed in range(4):
        inputs.x.copy_(torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(seed)))
        torch.compiler.cudagraph_mark_step_begin()
        out = inputs.call(function, impl=impl).clone()
        actual.append((out, inputs.call(adapter_mixture, impl=impl)))
    for out, expected in actual:
        torch.testing.assert_close(out, expected)
