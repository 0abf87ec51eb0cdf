"""The decode kernel on a CUDA device: one launch, graphs, streams, counters, PEMT's generation.

Its values are in `test_cuda_calls.py`, which runs on a device too.
"""

import pytest
import torch
from gpu_cases import DEVICE, captured
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast
from pemt_fast import adapter_mixture
from pemt_fast.ops.cuda_door import Target
from pemt_fast.ops.target_mixture import mixture_with_target
from pemt_fast.testing import make_inputs

pytestmark = pytest.mark.gpu

# PEMT on T5-base, where the plan has several slices, and a small one, which one cluster makes.
SIZES = {
    "slices": {"E": 12, "R": 64, "D": 3072, "H": 768},
    "cluster": {"E": 3, "R": 16, "D": 192, "H": 200},
}
TOKENS = [1, 4, 16, 64]


def inputs_of(size, T, dtype=torch.bfloat16, **changes):
    return make_inputs(
        T, 1, dtype=dtype, device=DEVICE, requires_grad=False, **{**SIZES[size], **changes}
    )


def decode(inputs):
    with torch.no_grad():
        return inputs.call(adapter_mixture, impl="cuda")


def target_of(inputs):
    h, dtype = inputs.w_up.shape[-1], inputs.x.dtype

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE).mul_(h**-0.5).to(dtype)

    return Target(draw(48, h), draw(h, 48), draw(48), draw(h), "gelu_tanh", 1.0)


def decode_with_target(inputs, target):
    with torch.no_grad():
        return mixture_with_target(
            inputs.x, inputs.gate, inputs.w_down.flatten(0, 1), inputs.w_up.flatten(0, 1),
            inputs.b_down.flatten(), inputs.b_up, activation=inputs.activation, base=inputs.base,
            target=target, impl="cuda", ranks=[inputs.w_down.shape[1]] * len(inputs.w_down),
        )  # fmt: skip


def launched(run):
    """Names of the kernels and copies that a call brings onto the device."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


# The profiler watches, so the call takes the way through torch.ops.
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_a_call_is_one_launch(size, T):
    inputs = inputs_of(size, T)
    names = launched(lambda: decode(inputs))
    assert len(names) == 1 and "decode" in names[0], names


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_graphs_see_changes(size, T, dtype):
    inputs = inputs_of(size, T, dtype)
    graph, out = captured(lambda: decode(inputs))
    for change in (
        lambda: inputs.x.normal_(),
        lambda: inputs.gate[..., 1].zero_(),
        lambda: inputs.w_up[1].fill_(float("nan")),
        lambda: inputs.w_up.normal_(),
        lambda: inputs.gate.normal_(),
    ):
        change()
        graph.replay()
        assert torch.equal(out, decode(inputs)) and out.isfinite().all()


def test_a_graph_with_target_adapters_of_several_sites():
    inputs = [inputs_of("slices", 8) for _ in range(4)]
    targets = [target_of(each) for each in inputs]

    def run():
        return [decode_with_target(*each) for each in zip(inputs, targets, strict=True)]

    graph, results = captured(run)
    for each in inputs:
        each.x.normal_()
    graph.replay()
    for found, expected in zip(results, run(), strict=True):
        assert torch.equal(found, expected)


def test_calls_on_several_streams_at_once():
    """Each stream has a counter of its own: sums of one are never those of another."""
    inputs = [inputs_of("slices", 16) for _ in range(6)]
    expected = [decode(each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(30):
        found = []
        for each, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(decode(each))
        torch.cuda.synchronize()
        for out, right in zip(found, expected, strict=True):
            assert torch.equal(out, right)


def test_graphs_replayed_at_once_beside_eager_calls():
    inputs = [inputs_of("slices", 16) for _ in range(3)]
    expected = [decode(each) for each in inputs]
    graphs = [captured(lambda each=each: decode(each)) for each in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(30):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        out = decode(inputs[2])
        torch.cuda.synchronize()
        for found, right in zip([*(out for _, out in graphs), out], expected, strict=True):
            assert torch.equal(found, right)


def test_the_same_bits_on_every_call():
    inputs = inputs_of("slices", 16)
    first = decode(inputs)
    assert all(torch.equal(first, decode(inputs)) for _ in range(50))


def test_no_synchronisation_with_the_host():
    inputs, before = inputs_of("slices", 4), torch.cuda.get_sync_debug_mode()
    target = target_of(inputs)
    decode_with_target(inputs, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(inputs)
        decode_with_target(inputs, target)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors():
    here = inputs_of("slices", 4)
    there = here.replace(**{k: v.to("cuda:1") for k, v in here.tensors().items()})
    torch.testing.assert_close(decode(there).cpu(), decode(here).cpu(), rtol=1e-2, atol=1e-2)


def generation(impl, **changes):
    """A call of `generate` of the same tiny PEMT with this implementation."""
    model = randomise(pemt_fast.get_model(tiny_t5().to(DEVICE), pemt_config(impl=impl))).eval()
    inputs = {k: v.to(DEVICE) for k, v in tiny_batch().items()}
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    call |= {"suppress_tokens": [0, 1], **changes}
    return lambda: model.generate(**call)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pemt_generates_the_tokens_of_the_triton_kernels(cache):
    options = {"max_new_tokens": 6, "cache_implementation": cache}
    found = [generation(impl, **options)() for impl in ("triton", "cuda")]
    assert torch.equal(*found)


def test_a_decoding_step_of_pemt_is_one_kernel_per_site():
    counts = []
    for tokens in (2, 3):
        names = launched(generation("cuda", max_new_tokens=tokens))
        counts.append(sum("pemt_fast" in name and "decode" in name for name in names))
    assert counts[1] - counts[0] == 2  # layers of the tiny decoder
