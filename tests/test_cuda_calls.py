"""`impl="cuda"`: the operator's calls of few tokens, from Python to the decode kernel.

On a GPU with its own library, everywhere with kernels whose threads are emulated on the host. What
a block of the kernel computes is in `test_cuda_decode.py`; the whole operator with `impl="cuda"` on
a GPU, gradients included, in `test_gpu_*.py`.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from cuda_kernels import emulated_library, forget, launches, loaded
from cuda_sources import COMPILER, HELPERS, needs_compiler
from implementations import needs_extension, needs_triton
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast
from pemt_fast import adapter_mixture, cli, doctor
from pemt_fast.ops import (
    adapter_mixture_with_hidden,
    cuda_library,
    dispatch,
    extension,
    target_mixture,
    triton_door,
)
from pemt_fast.ops.cuda_door import MOST_TOKENS, Target, takes_target
from pemt_fast.ops.dispatch import unavailable_reasons
from pemt_fast.ops.linear_mixture import linear_mixture
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import (
    GATE_FORMS,
    LAYOUTS,
    adapter_mixture_loop,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
)

pytestmark = [needs_extension, needs_triton]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITWISE = {"rtol": 0, "atol": 0}
FORM_IDS = ["percall", "persequence", "pertoken"]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return emulated_library(tmp_path_factory)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where calls run, with all of `impl="cuda"` that is needed for it."""
    if request.param == "cuda":
        assert unavailable_reasons("cuda", torch.device("cuda", 0)) == []
        yield "cuda"
    else:
        with loaded(request.getfixturevalue("emulated")):
            assert unavailable_reasons("cuda", torch.device("cpu")) == []
            yield "cpu"


@pytest.fixture
def only_decode(monkeypatch):
    """A call that is not for the decode kernel is an error."""
    from pemt_fast.ops import triton_backend

    def refuse(*_):
        raise AssertionError("this call went to the Triton kernels")

    monkeypatch.setattr(triton_backend, "forward", refuse)
    monkeypatch.setattr(triton_backend, "forward_call", refuse)
    triton_door.CALLS.clear()


@pytest.fixture
def taken(monkeypatch):
    """Which calls went to the Triton kernels, by their number of tokens."""
    from pemt_fast.ops import cuda_backend, triton_backend

    tokens, right = [], triton_backend.forward

    def count(x, *others):
        tokens.append(x.shape[0])
        return right(x, *others)

    monkeypatch.setattr(triton_backend, "forward", count)
    monkeypatch.setattr(triton_door, "door", lambda *_: None)  # the same without that function
    assert cuda_backend.triton_backend is triton_backend
    return tokens


@torch.no_grad()
def check(inputs, function=adapter_mixture, loop=adapter_mixture_loop, **options):
    exact = inputs.to(torch.float64).call(function, impl="reference", **options)
    with poisoned_empty():
        out = inputs.call(function, impl="cuda", **options)
    assert out.dtype == inputs.x.dtype and out.is_contiguous()
    assert_within_budget("out", out, exact, inputs.call(loop))


# --- values --------------------------------------------------------------------------------------

LEADS = [(1,), (3,), (2, 4), (1, 1), (9, 1), (4, 4), (17,), (2, 16), (5, 7), (64,), (8, 8)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_every_number_of_tokens(device, only_decode, lead, dtype):
    for gate in GATE_FORMS if len(lead) == 2 else GATE_FORMS[:2]:
        check(make_inputs(*lead, E=3, D=40, R=8, H=72, gate=gate, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extras", [(True, True), (False, False), (True, False), (False, True)])
def test_activations_biases_and_base(device, only_decode, extras, activation, dtype):
    bias, base = extras
    check(make_inputs(2, 3, E=4, D=33, R=5, H=29, bias=bias, base=base, activation=activation,
                      dtype=dtype, device=device))  # fmt: skip


@pytest.mark.parametrize("ranks", [(5,), (1, 24, 64), (7, 7, 7), (3,) * 16 + (40,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unequal_ranks(device, only_decode, dtype, ranks):
    check(make_inputs(2, 3, R=ranks, D=64, H=96, dtype=dtype, device=device))


# fp32 adapters over a bf16 model, a router in float32, an fp32 residual stream, and odd ones.
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("bf16", {"param_dtype": torch.float32}),
        ("bf16", {"gate_dtype": torch.float32}),
        ("bf16", {"base_dtype": torch.float32}),
        ("f32", {"param_dtype": torch.bfloat16, "gate_dtype": torch.float16}),
        ("f16", {"param_dtype": torch.bfloat16, "gate_dtype": torch.float64}),
        ("f16", {"base_dtype": torch.float64}),
    ],
    ids=["fp32-params", "fp32-gate", "fp32-base", "bf16-params", "odd", "fp64-base"],
)
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
def test_mixed_dtypes(device, only_decode, dtype, others, gate):
    check(make_inputs(3, 5, gate=gate, dtype=DTYPES[dtype], device=device, **others))


@pytest.mark.parametrize("name", ["w_down", "w_up", "b_down", "b_up"])
def test_one_parameter_in_another_dtype(device, only_decode, name):
    inputs = make_inputs(3, 5, dtype=torch.bfloat16, device=device)
    check(inputs.replace(**{name: getattr(inputs, name).detach().float()}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_any_strides(device, layout, param_layout):
    """What the kernel cannot read as it lies is for the Triton kernels."""
    check(make_inputs(3, 5, layout=layout, param_layout=param_layout, device=device))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_in_the_layout_of_a_linear(device, only_decode, dtype):
    """`w_up` of a single adapter as the transpose of `nn.Linear.weight`: no copy is made."""
    inputs = make_inputs(2, 5, E=1, R=24, D=40, H=48, dtype=dtype, device=device)
    up = inputs.w_up.detach()[0].t().contiguous()
    check(inputs.replace(w_up=up.t().unsqueeze(0)))


def test_rows_with_holes_between_them(device, only_decode):
    inputs = make_inputs(6, E=3, D=48, R=8, H=40, dtype=torch.bfloat16, device=device)
    wide_x, wide_base = (
        torch.cat([t.detach(), torch.full_like(t, math.nan)], -1) for t in (inputs.x, inputs.base)
    )
    check(inputs.replace(x=wide_x[:, :48], base=wide_base[:, :40]))
    check(inputs.replace(x=inputs.x[:1].expand(6, 48), base=inputs.base[:1].expand(6, 40)))
    inputs = make_inputs(2, 5, E=3, D=48, R=8, H=40, gate="[B, E]", device=device)
    one = inputs.replace(x=inputs.x.detach()[:, :1], base=inputs.base.detach()[:, :1])
    check(one)  # the first token of each sequence: one distance


def test_rows_at_unequal_distances(device):
    """They are for the Triton kernels, as is a transpose with holes."""
    inputs = make_inputs(2, 5, E=1, D=48, R=8, H=40, device=device)
    check(inputs.replace(x=inputs.x.detach()[:, :3], base=inputs.base.detach()[:, :3]))
    wide = torch.full((40, 12), math.nan, device=device)
    wide[:, :8] = inputs.w_up.detach()[0].t()
    check(inputs.replace(w_up=wide[:, :8].t().unsqueeze(0)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_addresses_that_are_not_aligned(device, only_decode, dtype):
    inputs = make_inputs(6, E=3, D=48, R=8, H=40, dtype=dtype, device=device)

    def moved(tensor):
        room = torch.empty(tensor.numel() + 1, dtype=dtype, device=device)
        room[1:] = tensor.detach().flatten()
        return room[1:].view_as(tensor)

    for name in ("x", "w_down", "w_up", "base"):
        check(inputs.replace(**{name: moved(getattr(inputs, name))}))


@pytest.mark.parametrize("where", ["w_down", "w_up", "b_down", "b_up"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_gate_of_zero_keeps_out_what_is_not_finite(device, only_decode, dtype, value, where):
    inputs = make_inputs(4, 2, E=3, D=40, R=8, H=40, dtype=dtype, device=device)
    gate = inputs.gate.detach().clone()
    gate[:2, 1] = 0
    broken = getattr(inputs, where).detach().clone()
    broken[1, 0] = value
    broken = inputs.replace(gate=gate, **{where: broken})
    with torch.no_grad():
        out = broken.call(adapter_mixture, impl="cuda")
        right = inputs.replace(gate=gate).call(adapter_mixture, impl="cuda")
    torch.testing.assert_close(out[:2], right[:2], **BITWISE)
    assert not out[2:].isfinite().all(-1).any()


def test_the_same_bits_twice(device, only_decode):
    inputs = make_inputs(16, 1, E=6, R=64, D=256, H=128, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        runs = [inputs.call(adapter_mixture, impl="cuda") for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_linear_as_base(device, only_decode):
    inputs = make_inputs(2, 3, E=3, D=40, R=8, H=48, base=False, device=device)
    weight, bias = torch.randn(48, 40, device=device), torch.randn(48, device=device)
    base = torch.nn.functional.linear(inputs.x.detach(), weight, bias)
    with torch.no_grad():
        found = linear_mixture(
            inputs.x, weight, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up,
            activation=inputs.activation, bias=bias, impl="cuda",
        )  # fmt: skip
        expected = inputs.replace(base=base).call(adapter_mixture, impl="cuda")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(device, only_decode, dtype):
    inputs = make_inputs(2, 3, E=3, D=40, R=8, H=48, device=device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        out = inputs.call(adapter_mixture, impl="cuda")
    cast = inputs.replace(x=inputs.x.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(out, cast.call(adapter_mixture, impl="cuda"), **BITWISE)
    assert out.dtype == dtype


# --- which calls it takes ------------------------------------------------------------------------


def test_all_other_calls_are_for_the_triton_kernels(device, taken):
    inputs = make_inputs(2, 3, E=2, D=16, R=8, H=16, device=device)
    expected = inputs.gradients(impl="torch")
    torch.testing.assert_close(inputs.gradients(impl="cuda"), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        inputs.call(adapter_mixture, impl="cuda")
        assert taken == [6]
        _, hidden = inputs.call(adapter_mixture_with_hidden, impl="cuda")
        assert taken == [6, 6] and hidden.shape == (2, 3, 16)
        many = make_inputs(MOST_TOKENS + 1, E=2, D=16, R=8, H=16, device=device)
        many.call(adapter_mixture, impl="cuda")
    assert taken == [6, 6, MOST_TOKENS + 1]


def test_many_tokens_take_the_short_way_to_the_triton_kernels(device, monkeypatch):
    from pemt_fast.ops import autograd

    inputs = make_inputs(MOST_TOKENS + 1, E=2, D=16, R=8, H=16, device=device)
    with torch.no_grad():
        expected = inputs.call(adapter_mixture, impl="torch")
        monkeypatch.setattr(autograd, "adapter_mixture", None)  # the long way
        out = inputs.call(adapter_mixture, impl="cuda")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_no_tokens_and_no_units_to_speak_of(device):
    inputs = make_inputs(0, E=2, D=16, R=8, H=16, device=device)
    with torch.no_grad():
        assert inputs.call(adapter_mixture, impl="cuda").shape == (0, 16)
    check(make_inputs(1, E=1, D=1, R=1, H=1, device=device))


def test_broken_rules_have_their_messages(device):
    inputs = make_inputs(2, 3, E=2, D=16, R=8, H=16, device=device)
    with torch.no_grad(), pytest.raises(ValueError, match="^gate must "):
        inputs.replace(gate=torch.ones(7, 2, device=device)).call(adapter_mixture, impl="cuda")
    with pytest.raises(RuntimeError, match="^impl='cuda' cannot run: it computes in float32, "):
        inputs.to(torch.float64).call(adapter_mixture, impl="cuda")


def test_auto_takes_it_where_the_table_says_so(device, monkeypatch, only_decode):
    from pemt_fast.ops import cuda_door

    inputs = make_inputs(2, 3, E=2, D=16, R=8, H=16, device=device)
    table = {device: "cuda"}
    for module in (dispatch, cuda_door):
        monkeypatch.setattr(module, "AUTO_TABLE", table)
    monkeypatch.setattr(dispatch, "CPU_KERNELS_ARE_FAST", False)
    # The function hides the module of the same name.
    calls = sys.modules["pemt_fast.ops.adapter_mixture"]
    monkeypatch.setattr(calls, "CPU_KERNELS_ARE_FAST", False)
    with torch.no_grad():
        expected = inputs.call(adapter_mixture, impl="cuda")
        for verified in (False, True):
            monkeypatch.setattr(dispatch, "is_verified", lambda *_, v=verified: v)
            assert dispatch.auto_impl(inputs.x.device, inputs.x.dtype) == (
                "cuda" if verified else "torch"
            )
        assert torch.equal(inputs.call(adapter_mixture), expected)


def test_auto_does_not_take_it_yet():
    assert "cuda" not in dispatch.AUTO_TABLE.values()


def test_the_environment_may_name_it(device, monkeypatch, only_decode):
    monkeypatch.setenv("PEMT_FAST_IMPL", "cuda")
    inputs = make_inputs(2, 3, E=2, D=16, R=8, H=16, device=device)
    with torch.no_grad():
        expected = inputs.call(adapter_mixture, impl="cuda")
        assert torch.equal(inputs.call(adapter_mixture), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_when_compiled(device, only_decode, dynamic):
    torch._dynamo.reset()
    inputs = make_inputs(2, 3, E=3, D=40, R=8, H=48, requires_grad=False, device=device)

    def call(x, gate, base):
        return inputs.replace(x=x, gate=gate, base=base).call(adapter_mixture, impl="cuda")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (2, 5):
        other = make_inputs(rows, 3, E=3, D=40, R=8, H=48, requires_grad=False, device=device)
        tensors = (other.x, other.gate, other.base)
        torch.testing.assert_close(compiled(*tensors), call(*tensors), **BITWISE)


# --- other devices -------------------------------------------------------------------------------

# Many processors without clusters; few with little shared memory; one; an H200.
DEVICES = ["108 166912 1", "8 49152 1", "1 232448 1", "132 232448 8", "16 60000 4"]


@pytest.mark.parametrize("tickets", ["1", "0"], ids=["counter", "no-counter"])
@pytest.mark.parametrize("facts", DEVICES)
def test_plans_for_other_devices(emulated, only_decode, monkeypatch, facts, tickets):
    monkeypatch.setenv("PEMT_FAST_EMULATED_DEVICE", facts)
    monkeypatch.setenv("PEMT_FAST_EMULATED_TICKETS", tickets)
    with loaded(emulated):
        for lead, dtype in (((3,), torch.bfloat16), ((2, 20), torch.float32)):
            check(make_inputs(*lead, E=6, R=8, D=64, H=136, dtype=dtype))


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (8, 1), (1, 3), (4, 2), (2, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_form_of_the_grid(device, only_decode, dtype, grid):
    module = extension.load()
    module.use_decode_grid(*grid)
    try:
        check(make_inputs(5, E=4, R=24, D=96, H=200, dtype=dtype, device=device))
        inputs = make_inputs(3, 3, E=3, D=64, R=40, H=136, dtype=dtype, device=device)
        target = make_target(136, 16, dtype, device)
        expected = with_target(inputs, target, impl="torch")
        torch.testing.assert_close(with_target(inputs, target), expected, rtol=5e-2, atol=5e-2)
    finally:
        module.use_decode_grid(0, 0)


def test_a_grid_that_cannot_be():
    with pytest.raises(ValueError, match="a grid has clusters of 1, 2, 4 or 8 .* got 3 and 1"):
        extension.load().use_decode_grid(3, 1)


def test_too_many_units_for_a_block_without_a_counter(emulated, monkeypatch, taken):
    """Then no plan fits, and the call is for the Triton kernels."""
    monkeypatch.setenv("PEMT_FAST_EMULATED_DEVICE", "8 49152 1")
    monkeypatch.setenv("PEMT_FAST_EMULATED_TICKETS", "0")
    with loaded(emulated):
        check(make_inputs(40, E=8, R=64, D=16, H=16))
    assert taken == [40]


def test_a_launch_that_fails_says_so(emulated, monkeypatch):
    inputs = make_inputs(2, 3)
    monkeypatch.setenv("PEMT_FAST_EMULATED_ERROR", "too many resources requested for launch")
    with loaded(emulated), torch.no_grad(), pytest.raises(RuntimeError) as raised:
        inputs.call(adapter_mixture, impl="cuda")
    assert (
        "the launch of pemt_fast's decode kernel on cpu failed: too many resources requested"
        in str(raised.value)
    )


# --- the target adapter in the same launch -------------------------------------------------------


def make_target(h, rank, dtype, device, activation="relu", bias=True, scale=1.0):
    def draw(*shape):
        return torch.randn(*shape).to(device, dtype)

    return Target(
        draw(rank, h) / h**0.5, draw(h, rank) / rank**0.5,
        draw(rank) if bias else None, draw(h) if bias else None, activation, scale,
    )  # fmt: skip


def with_target(inputs, target, impl="cuda", **changes):
    given = {name: getattr(inputs, name) for name in ("activation", "base")} | changes
    with torch.no_grad():
        return target_mixture.mixture_with_target(
            inputs.x, inputs.gate, inputs.w_down.flatten(0, 1), inputs.w_up.flatten(0, 1),
            None if inputs.b_down is None else inputs.b_down.flatten(), inputs.b_up,
            target=target, impl=impl, ranks=[inputs.w_down.shape[1]] * len(inputs.w_down), **given,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (17, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("rank", [5, 64])
def test_mixture_and_target_adapter_in_one_launch(device, only_decode, rank, lead, dtype):
    bias = rank == 5
    inputs = make_inputs(*lead, E=3, D=64, R=8, H=40, dtype=dtype, device=device, bias=bias)
    target = make_target(40, rank, dtype, device, bias=bias, scale=1.0 if bias else -0.75)
    out = with_target(inputs, target)
    wide = make_target(40, rank, torch.float64, device)._replace(
        **{k: v.double() for k, v in target._asdict().items() if isinstance(v, torch.Tensor)},
        scale=target.scale,
    )
    wide = wide if bias else wide._replace(b_down=None, b_up=None)
    exact = with_target(inputs.to(torch.float64), wide, impl="reference")
    assert_within_budget("out", out, exact, with_target(inputs, target, impl="torch"))


def test_a_target_adapter_is_one_launch(emulated, only_decode):
    inputs = make_inputs(2, 3, E=3, D=64, R=8, H=40)
    target = make_target(40, 16, torch.float32, "cpu")
    with loaded(emulated):
        before = launches(emulated)
        with_target(inputs, target)
        assert launches(emulated) == before + 1


def test_a_profiler_sees_the_one_operator(emulated, only_decode):
    inputs = make_inputs(2, 3, E=3, D=64, R=8, H=40)
    target = make_target(40, 16, torch.float32, "cpu")
    with loaded(emulated):
        expected, before = with_target(inputs, target), launches(emulated)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.testing.assert_close(with_target(inputs, target), expected, **BITWISE)
        assert launches(emulated) == before + 1
    assert "pemt_fast::mixture_with_target" in {event.name for event in profile.events()}


def test_with_gradients_they_are_two_calls(device):
    inputs = make_inputs(2, 3, device=device)
    assert not takes_target("cuda", inputs.x)
    with torch.no_grad():
        assert takes_target("cuda", inputs.x) and not takes_target("torch", inputs.x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_tokens_and_other_dtypes_are_two_calls(device, dtype):
    inputs = make_inputs(2, 33, E=2, D=16, R=8, H=16, dtype=dtype, device=device)
    few = make_inputs(2, 3, E=2, D=16, R=8, H=16, dtype=dtype, device=device)
    for found, parameters in ((inputs, dtype), (few, torch.float32)):
        target = make_target(16, 8, parameters, device)
        expected = with_target(found, target, impl="torch")
        torch.testing.assert_close(with_target(found, target), expected, rtol=5e-2, atol=5e-2)


def test_compiled_with_a_target_it_is_one_operator(emulated, only_decode):
    torch._dynamo.reset()
    inputs = make_inputs(2, 3, E=3, D=64, R=8, H=40, requires_grad=False)
    target = make_target(40, 16, torch.float32, "cpu")
    compiled = torch.compile(with_target, fullgraph=True, backend="aot_eager")
    with loaded(emulated):
        expected = with_target(inputs, target)
        before = launches(emulated)
        torch.testing.assert_close(compiled(inputs, target), expected, **BITWISE)
        assert launches(emulated) == before + 1


@pytest.mark.parametrize("sources", ["lora", "bottleneck"])
def test_pemt_generates_the_same_tokens(device, sources):
    """Every site of the decoder is one launch, and beams, samples and gates do not notice."""
    changes = {} if sources == "lora" else {"source_kind": "bottleneck"}
    inputs = {k: v.to(device) for k, v in tiny_batch().items()}
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    call |= {"max_new_tokens": 6, "suppress_tokens": [0, 1], "num_beams": 2}
    found = {}
    for impl in ("torch", "cuda"):
        torch.manual_seed(0)
        model = randomise(
            pemt_fast.get_model(tiny_t5().to(device), pemt_config(**changes, impl=impl))
        )
        found[impl] = model.generate(**call)
    assert torch.equal(found["torch"], found["cuda"])


def test_a_decoding_step_of_pemt_is_one_launch_per_site(emulated):
    model = randomise(pemt_fast.get_model(tiny_t5(), pemt_config(impl="cuda"))).eval()
    inputs = tiny_batch()
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    call |= {"suppress_tokens": [0, 1]}
    counts = []
    with loaded(emulated):
        for tokens in (1, 2, 4):
            before = launches(emulated)
            model.generate(**call, max_new_tokens=tokens)
            counts.append(launches(emulated) - before)
    sites = model.config.num_decoder_layers if hasattr(model, "config") else 2
    assert counts[1] - counts[0] == sites and counts[2] - counts[1] == 2 * sites


# --- reasons -------------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch):
    """Another library in the place of the package's."""

    def name(path):
        monkeypatch.setenv("PEMT_FAST_CUDA_LIBRARY", str(path))
        forget()

    yield name
    monkeypatch.undo()
    forget()
    cuda_library.missing_reason()


def test_a_library_that_is_not_there(named, tmp_path):
    named(tmp_path / "none.so")
    reason = cuda_library.missing_reason()
    assert f"is missing: there is no file {tmp_path}/none.so; to build it: pip install" in reason
    assert reason in unavailable_reasons("cuda", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^impl='cuda' cannot run: .* none.so of CUDA kernels"):
        make_inputs(2, 3).call(adapter_mixture, impl="cuda")


def test_the_reason_that_the_build_left(monkeypatch, named, tmp_path):
    monkeypatch.setattr(cuda_library, "FILE", tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda_library, "NOTE", tmp_path / "_cuda_missing.txt")
    named("")
    assert "is missing: it has not been built; to build it" in cuda_library.missing_reason()
    cuda_library.NOTE.write_text("nvcc was not found\n")
    forget()
    assert "is missing: nvcc was not found; to build it" in cuda_library.missing_reason()


def test_a_file_that_is_no_library(named, tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    named(tmp_path / "broken.so")
    assert "broken.so of CUDA kernels does not load: " in cuda_library.missing_reason()


@needs_compiler
def test_a_library_of_other_sources(named, tmp_path):
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text(
        f'#include "{HELPERS.parents[2]}/csrc/cuda/library.h"\n'
        "static const pemt_fast::cuda::Library old{pemt_fast::cuda::kLayout - 1};\n"
        'extern "C" const pemt_fast::cuda::Library* pemt_fast_cuda_library() { return &old; }\n'
    )
    subprocess.run(
        [COMPILER, "-std=c++17", "-w", "-shared", "-fPIC", "-o", library, source], check=True
    )
    named(library)
    assert "it was built from other sources than the extension" in cuda_library.missing_reason()


def test_a_device_on_which_the_kernels_do_not_load(emulated, monkeypatch):
    monkeypatch.setenv("PEMT_FAST_EMULATED_DEVICE", "many")
    with loaded(emulated):
        (reason,) = unavailable_reasons("cuda", torch.device("cpu"))
        assert reason == (
            "its kernels, built with CUDA 0.0 for emulated, do not load on cpu: "
            "PEMT_FAST_EMULATED_DEVICE must be three numbers"
        )


def test_info_names_the_library_or_the_reason(emulated, named, tmp_path, capsys):
    def info(*options):
        with pytest.raises(SystemExit) as done:
            cli.main(["info", *options])
        assert done.value.code in (0, None)
        return capsys.readouterr().out

    with loaded(emulated):
        found = json.loads(info("--json"))
        assert found["cuda_library"]["architectures"] == "emulated"
        assert found["unavailable"]["cpu"]["cuda"] == []
        assert "library of CUDA kernels" in info()
    named(tmp_path / "none.so")
    assert "there is no file" in json.loads(info("--json"))["cuda_library"]["why_not"]
    assert "there is no file" in info()


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_examines_the_decode_kernel(device, only_decode):
    found = doctor.examine("cuda", torch.device(device), torch.bfloat16)
    assert found.passed and 0 < found.worst <= 1, found


def test_doctor_finds_wrong_results_and_calls_that_go_elsewhere(emulated, monkeypatch):
    from pemt_fast.ops import cuda_door

    right = cuda_door.door
    with loaded(emulated):
        monkeypatch.setattr(cuda_door, "door", lambda *a: right(*a) * 1.01)
        found = doctor.examine("cuda", torch.device("cpu"), torch.float32)
        assert not found.passed and "exceeds the budget" in found.reason
        monkeypatch.setattr(cuda_door, "door", lambda *a: None)
        found = doctor.examine("cuda", torch.device("cpu"), torch.float32)
        assert "the decode kernel does not take this call" in found.reason
