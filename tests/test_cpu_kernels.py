"""`impl="cpu"`: every instruction set, memory, bits, packed weights, threads, the door in C++.

What holds for all implementations is in `test_adapter_mixture.py` and `test_edge_cases.py`; here
are the limits inside these kernels. Sizes are those of `csrc/cpu/`: a panel has 16 columns, a block
64, a tile 6 rows or fewer; up to 4 tokens weights are read where they lie; a product hands 24
tokens to its pass; a block has 192 tokens at most, and from 192 on weights are packed for one call.
"""

import ctypes
import gc
import itertools
import multiprocessing
import os
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from guards import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import needs_extension
from rounding import assert_equals_reference, assert_within, rounding_bounds

from pemt_fast import adapter_mixture
from pemt_fast.ops import adapter_mixture_with_hidden, extension, native
from pemt_fast.ops.validation import ACTIVATIONS, check_adapter_mixture
from pemt_fast.testing import (
    GATE_FORMS,
    LAYOUTS,
    TENSOR_NAMES,
    adapter_mixture_loop,
    assert_matches_oracle,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
)

pytestmark = needs_extension

kernels = extension.load()
ISAS = [] if kernels is None else kernels.cpu_isas()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITWISE = {"rtol": 0, "atol": 0}
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
FORM_IDS = ["percall", "persequence", "pertoken"]
# Frozen weights are packed once, trained ones are read as they lie.
FROZEN, TRAINED = ("x", "gate", "base"), True
WHAT_TRAINS = {"frozen": FROZEN, "trained": TRAINED}


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


@pytest.fixture(autouse=True)
def _nothing_packed():
    kernels.clear_packed_weights()


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine has, in use."""
    best = kernels.cpu_isa()
    kernels.use_cpu_isa(request.param)
    yield request.param
    kernels.use_cpu_isa(best)


def run(inputs, **options):
    return inputs.call(adapter_mixture, impl="cpu", **options)


def assert_budget(make, **options):
    assert_matches_oracle(make, impl="cpu", **options)


def test_instruction_sets_are_the_ones_of_this_machine():
    assert ISAS[0] == "plain"
    assert kernels.cpu_isa() in ISAS
    with pytest.raises(ValueError, match="no instruction set mmx"):
        kernels.use_cpu_isa("mmx")


# --- values around the limits of the kernels -----------------------------------------------------

# Tokens: few, one tile and its neighbours, 24 and 192 and theirs, a second block of 1 or 65.
TOKENS = (1, 2, 4, 5, 6, 7, 23, 24, 25, 47, 48, 63, 191, 192, 193, 257)
# Widths and ranks: a panel and its neighbours, one block and one more, two blocks and two more.
WIDTHS = (15, 130, 17, 33, 65, 16)
RANKS = (
    (1, 1), (2, 15), (1, 16), (3, 17), (33, 1), (1, 65), (2, (5, 16, 1)), (5, (1, 2, 3, 31, 9)),
    (6, 24), (1, 130), (17, (3,) * 16 + (40,)),
)  # fmt: skip


def token_cases():
    """Every number of tokens, once frozen and once trained, with the rest taken in turn."""
    cases = []
    turns = zip(
        itertools.cycle(WIDTHS), itertools.cycle(WIDTHS[::-1] + (96,)), itertools.cycle(RANKS),
        itertools.cycle(GATE_FORMS), itertools.cycle(ACTIVATIONS),
        itertools.cycle([True, True, False]), itertools.cycle([True, False]), strict=False,
    )  # fmt: skip
    for tokens, trains in itertools.product(TOKENS, WHAT_TRAINS):
        d, h, (e, ranks), gate, activation, bias, base = next(turns)
        # Sequences of 7 begin inside blocks of tokens and inside tiles.
        lead = (tokens // 7, 7) if tokens % 7 == 0 else (1, tokens) if gate != "[E]" else (tokens,)
        name = f"T{tokens}-{trains}-E{e}-D{d}-H{h}-{gate}-{activation}".replace(", ", "")
        sizes = {
            "E": e, "D": d, "R": ranks, "H": h, "gate": gate, "activation": activation,
            "bias": bias, "base": base, "requires_grad": WHAT_TRAINS[trains],
        }  # fmt: skip
        cases.append(pytest.param(lead, sizes, id=name))
    return cases


@pytest.mark.parametrize(("lead", "sizes"), token_cases())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_tokens(isa, dtype, lead, sizes):
    assert_budget(lambda seed: make_inputs(*lead, **sizes, dtype=dtype, seed=seed))


# Sequences of unequal position in blocks: 5 tokens are shorter than a tile, 30 longer than the 24
# tokens of a pass, 100 and 130 cross a block of 192.
@pytest.mark.parametrize("lead", [(40, 5), (7, 30), (3, 100), (2, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sequences_that_begin_inside_a_block(isa, dtype, lead):
    assert_budget(lambda seed: make_inputs(*lead, E=3, D=33, R=17, H=40, dtype=dtype, seed=seed))


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("e", [2, 5, 8, 16, 31, 32, 33], ids=lambda e: f"E{e}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_adapters(isa, dtype, e, trains):
    assert_budget(
        lambda seed: make_inputs(
            9, E=e, D=40, R=3, H=33, dtype=dtype, requires_grad=trains, seed=seed
        )
    )


# Of a single row or column the budget sees too little; what rounding explains is known.
ONES = [
    {"D": 1}, {"H": 1}, {"R": 1}, {"E": 1}, {"D": 1, "H": 1}, {"R": 1, "E": 1},
    {"D": 1, "H": 1, "R": 1, "E": 1},
]  # fmt: skip


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 25, 193], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(
    "ones", ONES, ids=lambda ones: "-".join(f"{name}{size}" for name, size in ones.items())
)
def test_one_of_something(isa, ones, tokens, trains):
    sizes = {"E": 3, "D": 17, "R": 5, "H": 18, **ones}
    assert_equals_reference(
        make_inputs(tokens, **sizes, gate="[B, E]", requires_grad=trains), impl="cpu"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(isa, activation):
    # From -120 to 120: where polynomials meet, where 1 - sigmoid cancels, where exp overflows.
    z = torch.cat([torch.linspace(-120, 120, 2401), torch.linspace(-12, 12, 2401)])
    inputs = make_inputs(
        len(z), E=1, D=1, R=1, H=1, gate="[E]", bias=False, base=False, activation=activation
    )
    ones = {name: torch.ones_like(t).requires_grad_() for name, t in inputs.tensors().items()}
    inputs = inputs.replace(
        **{**ones, "x": z[:, None].requires_grad_()}, grad_out=torch.ones(len(z), 1)
    )
    actual = inputs.gradients(impl="cpu")
    exact = inputs.to(torch.float64).gradients(impl="reference")
    # Four rounding steps: of a value up to |z|, of a slope up to 1.13.
    step = 4 * torch.finfo(torch.float32).eps
    assert_within("out", actual["out"], exact["out"], step * z[:, None].abs())
    assert_within("d_x", actual["d_x"], exact["d_x"], torch.full((len(z), 1), step))


MIXED = {
    "bf16-over-f32": (torch.bfloat16, {"param_dtype": torch.float32}),
    "bf16-over-f16": (torch.bfloat16, {"param_dtype": torch.float16, "gate_dtype": torch.float32}),
    "f32-over-bf16": (torch.float32, {"param_dtype": torch.bfloat16}),
    "f32-over-f16": (torch.float32, {"param_dtype": torch.float16, "base_dtype": torch.bfloat16}),
    "f16-over-bf16": (torch.float16, {"param_dtype": torch.bfloat16}),
    "f16-over-f32": (torch.float16, {"param_dtype": torch.float32, "base_dtype": torch.float32}),
    "bf16-base-f32": (torch.bfloat16, {"base_dtype": torch.float32}),
    "bf16-base-f16": (torch.bfloat16, {"base_dtype": torch.float16}),
    "f16-base-f64": (torch.float16, {"base_dtype": torch.float64}),
}


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("tokens", [3, 29, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize(("dtype", "others"), MIXED.values(), ids=MIXED)
def test_mixed_dtypes(isa, dtype, others, tokens, trains):
    # More than one block in both products, and an odd number of terms in both.
    sizes = {"D": 71, "R": (5, 16, 60), "H": 130, "dtype": dtype, "requires_grad": trains}
    assert_budget(lambda seed: make_inputs(tokens, **sizes, **others, seed=seed))


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("tokens", [3, 29, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parameters_and_gates_in_float64(isa, dtype, tokens, trains):
    # Their gradients are no better than the float32 they are summed in: that is what is compared.
    wide = {"param_dtype": torch.float64, "gate_dtype": torch.float64, "base_dtype": torch.float64}

    def make(seed):
        return make_inputs(tokens, E=3, D=33, H=40, dtype=dtype, requires_grad=trains, seed=seed,
                           **wide)  # fmt: skip

    inputs = make(0)
    actual = inputs.gradients(impl="cpu")
    exact = inputs.to(torch.float64).gradients(impl="reference")
    eager = inputs.gradients(adapter_mixture_loop)
    for name, result in actual.items():
        assert result.dtype == (dtype if name in ("out", "d_x") else torch.float64)
        narrow = torch.float32 if result.dtype == torch.float64 else result.dtype
        assert_within_budget(name, result.to(narrow), exact[name], eager[name].to(narrow))


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
# Columns are shared up to 23 tokens per thread, tokens from there on; N is worth the threads.
@pytest.mark.parametrize("tokens", [1, 3, 23, 49, 257], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_several_threads(isa, dtype, tokens, trains, threads):
    torch.set_num_threads(threads)
    gate = "[E]" if tokens == 49 else "[B, E]"
    sizes = {"E": 33, "D": 130, "R": 17, "H": 65, "gate": gate, "requires_grad": trains}
    assert_budget(
        lambda seed: make_inputs(tokens, **sizes, dtype=dtype, seed=seed), recompute=tokens == 23
    )


@st.composite
def any_call(draw):
    """Leading sizes and keywords of `make_inputs`, wide enough for the budget."""
    widths = st.integers(20, 140)
    lead = draw(st.sampled_from([(t,) for t in TOKENS] + [(3, 1), (1, 70), (5, 13), (13, 5)]))
    e = draw(st.integers(1, 33))
    ranks = draw(
        st.integers(1, 33) | st.lists(st.integers(1, 40), min_size=e, max_size=e).map(tuple)
    )
    dtypes = st.sampled_from(list(DTYPES.values()))
    return lead, {
        "E": e,
        "D": draw(widths),
        "R": ranks,
        "H": draw(widths),
        "dtype": draw(dtypes),
        "param_dtype": draw(st.none() | dtypes),
        "gate": draw(st.sampled_from(GATE_FORMS[: len(lead) + 1])),
        "bias": draw(st.booleans()),
        "base": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "requires_grad": draw(
            st.sampled_from([False, FROZEN, TRAINED]) | st.sets(st.sampled_from(TENSOR_NAMES))
        ),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "param_layout": draw(st.sampled_from(LAYOUTS)),
    }


@settings(max_examples=60)
@given(call=any_call(), threads=st.sampled_from([1, 1, 2]), recompute=st.booleans())
@pytest.mark.parametrize("instructions", ISAS)
def test_any_call_equals_the_reference(instructions, call, threads, recompute):
    best = kernels.cpu_isa()
    kernels.use_cpu_isa(instructions)
    torch.set_num_threads(threads)
    try:
        lead, keywords = call
        inputs = make_inputs(*lead, **keywords)
        results = inputs.gradients(impl="cpu", recompute=recompute)
        for name, result in results.items():
            assert bool(result.isfinite().all()), name
        # By values in float32, where no rounding can hide a wrong index; by the budget elsewhere.
        if keywords["dtype"] == torch.float32:
            assert_equals_reference(inputs, impl="cpu", recompute=recompute)
        else:
            exact = inputs.to(torch.float64).gradients(impl="reference")
            eager = inputs.gradients(adapter_mixture_loop)
            for name, result in results.items():
                if result.numel() >= 64:
                    assert_within_budget(name, result, exact[name], eager[name])
    finally:
        kernels.use_cpu_isa(best)


# Around the number of token blocks after which sums of blocks are added up.
@pytest.mark.parametrize("tokens", [512, 528, 1024, 1040, 2048, 32768], ids=lambda t: f"T{t}")
def test_sums_over_many_tokens(isa, tokens):
    """One chain of additions, token block after token block, would leave the budget.

    Every 16th token has a gradient: the others add nothing, but lengthen the chain.
    """
    few = make_inputs(1, tokens // 16, E=6, R=8, D=40, H=72, gate="[B, S, E]")
    spread = {}
    for name in ("x", "gate", "base", "grad_out"):
        tensor = few.grad_out if name == "grad_out" else few.tensors()[name]
        spread[name] = tensor.new_zeros(1, tokens, tensor.shape[-1])
        spread[name][:, ::16] = tensor.detach()
        spread[name].requires_grad_(name != "grad_out")
    actual = few.replace(**spread).gradients(impl="cpu")
    exact = few.to(torch.float64).gradients(impl="reference")
    eager = few.gradients(adapter_mixture_loop)
    for name in ("d_w_down", "d_w_up", "d_b_up"):
        assert_within_budget(name, actual[name], exact[name], eager[name])


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("tokens", [1, 4, 7, 25, 193], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_writes_all_of_its_results_and_nothing_else(isa, dtype, tokens, trains):
    """All memory that torch hands out lies between guards and begins as NaN, guards included."""
    inputs = make_inputs(tokens, D=33, R=(5, 16, 20), H=17, dtype=dtype, requires_grad=trains)
    with GuardedMemory() as memory:
        guarded = inputs.gradients(impl="cpu")
    assert len(memory.buffers) > 5, "the case must allocate to say anything"
    assert memory.overruns() == []
    torch.testing.assert_close(inputs.gradients(impl="cpu"), guarded, **BITWISE)


@pytest.mark.parametrize("tokens", [1, 4, 7, 25, 193], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_an_earlier_call_left_in_the_workspace_is_not_read(isa, dtype, trains, tokens):
    sizes = {"D": 33, "R": (5, 17, 20), "H": 17, "dtype": dtype, "requires_grad": trains}
    inputs = make_inputs(tokens, **sizes)
    expected = inputs.gradients(impl="cpu")
    wide = make_inputs(tokens + 1, E=3, D=96, R=32, H=80, dtype=dtype)
    broken = wide.replace(
        x=torch.full_like(wide.x, float("nan")).requires_grad_(),
        gate=torch.full_like(wide.gate, float("nan")).requires_grad_(),
    )
    assert not broken.gradients(impl="cpu")["d_x"].isfinite().any()
    torch.testing.assert_close(inputs.gradients(impl="cpu"), expected, **BITWISE)


@pytest.mark.parametrize("tokens", [3, 25, 193], ids=lambda t: f"T{t}")
def test_inputs_are_read_within_their_bounds(isa, tokens):
    # Rows of a wider tensor: what lies between and around them is NaN.
    inputs = make_inputs(
        tokens, D=33, R=17, H=19, dtype=torch.bfloat16, layout="sliced", param_layout="sliced"
    )
    for result in inputs.gradients(impl="cpu").values():
        assert result.isfinite().all()


@pytest.mark.skipif(SANITIZED, reason="the sanitizer touches all memory")
@pytest.mark.parametrize("name", ["x", "base"])
def test_offsets_beyond_32_bits(name):
    try:
        # Never touched but for its rows: no memory is taken for the rest.
        torch.utils.deterministic.fill_uninitialized_memory = False
        storage = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"needs 4 GiB of address space: {error}")
    inputs = make_inputs(3, dtype=torch.bfloat16, requires_grad=False)
    tensor = getattr(inputs, name)
    rows = storage.as_strided(tensor.shape, (2**30 + 64, 1))
    rows.copy_(tensor)
    torch.testing.assert_close(run(inputs.replace(**{name: rows})), run(inputs), **BITWISE)


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 4, 30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bits_do_not_depend_on_what_ran_before(isa, dtype, tokens, threads, trains):
    torch.set_num_threads(threads)
    sizes = {"E": 9, "D": 130, "R": 33, "H": 96, "dtype": dtype, "requires_grad": trains}
    inputs = make_inputs(tokens, **sizes)
    first = inputs.gradients(impl="cpu")
    packed_before = inputs.gradients(impl="cpu")
    for other in (3, 77, 211):
        make_inputs(other, D=70, R=20, H=50, dtype=dtype).gradients(impl="cpu")
    after_others = inputs.gradients(impl="cpu")
    kernels.clear_packed_weights()
    packed_anew = inputs.gradients(impl="cpu")
    for again in (packed_before, after_others, packed_anew):
        torch.testing.assert_close(again, first, **BITWISE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inference_has_the_bits_of_training_with_frozen_weights(isa, dtype):
    inputs = make_inputs(30, dtype=dtype, requires_grad=FROZEN)
    out = run(inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs), out.detach(), **BITWISE)
    with torch.inference_mode():
        torch.testing.assert_close(run(inputs), out.detach(), **BITWISE)


# --- packed weights ------------------------------------------------------------------------------


def packed_count():
    return kernels.packed_weights_size()[0]


def fresh(inputs):
    """The same values in tensors that were never seen before."""
    return inputs.replace(
        **{
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in inputs.tensors().items()
        }
    )


@pytest.mark.parametrize("tokens", [30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_frozen_weights_are_packed_once(dtype, tokens):
    inputs = make_inputs(tokens, dtype=dtype, requires_grad=FROZEN)
    inputs.gradients(impl="cpu")
    count, size = kernels.packed_weights_size()
    assert count >= 4, "two weights, each read along both of its sides"
    element = 2 if dtype == torch.bfloat16 and "bf16" in kernels.cpu_isa() else 4
    assert size >= 2 * element * (inputs.w_down.numel() + inputs.w_up.numel())
    inputs.gradients(impl="cpu")
    make_inputs(tokens + 8, seed=1, dtype=dtype).replace(
        **{name: getattr(inputs, name) for name in ("w_down", "w_up", "b_down", "b_up")}
    ).gradients(impl="cpu")
    assert kernels.packed_weights_size() == (count, size)


@pytest.mark.parametrize("tokens", [3, 30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_trained_weights_are_not_kept(dtype, tokens):
    inputs = make_inputs(tokens, dtype=dtype)
    inputs.gradients(impl="cpu")
    inputs.gradients(impl="cpu", recompute=True)
    assert kernels.packed_weights_size() == (0, 0)


def test_copies_are_not_kept():
    # Of weights with other strides or in float64 only copies are packed.
    for changes in ({"param_layout": "transposed"}, {"param_dtype": torch.float64, "bias": False}):
        inputs = make_inputs(30, requires_grad=False, **changes)
        run(inputs)
        assert packed_count() == 0


def change_through_numpy(tensor):
    tensor.detach().numpy()[:] *= -2


def change_by_load_state_dict(tensor):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    module.weight.data = tensor
    module.load_state_dict({"weight": -2 * tensor})


def change_by_an_optimizer(tensor):
    tensor.requires_grad_()
    tensor.grad = torch.ones_like(tensor)
    torch.optim.SGD([tensor], lr=0.5).step()
    tensor.requires_grad_(False)


CHANGES = {
    "add_": lambda t: t.add_(0.1),
    "copy_": lambda t: t.copy_(-2 * t),
    "zero_": lambda t: t.zero_(),
    "one-element": lambda t: t.view(-1)[7].add_(3),
    "a-slice": lambda t: t[1:].mul_(-1),
    "through-a-view": lambda t: t.view(-1).mul_(-1),
    "through-detach": lambda t: t.detach().mul_(-1),
    "through-data": lambda t: t.data.mul_(-2),
    "new-data": lambda t: setattr(t, "data", -2 * t),
    "set_": lambda t: t.set_(-2 * t),
    "numpy": change_through_numpy,
    "foreach": lambda t: torch._foreach_mul_([t], 3),
    "load_state_dict": change_by_load_state_dict,
    "optimizer": change_by_an_optimizer,
}


@pytest.mark.parametrize("name", ["w_down", "w_up", "b_down", "b_up"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_the_next_call(change, name):
    inputs = make_inputs(30, requires_grad=FROZEN)
    before = inputs.gradients(impl="cpu")
    with torch.no_grad():
        change(getattr(inputs, name))
    after = inputs.gradients(impl="cpu")
    assert not torch.equal(after["out"], before["out"])
    torch.testing.assert_close(after, fresh(inputs).gradients(impl="cpu"), **BITWISE)


@pytest.mark.parametrize("name", ["w_down", "w_up"])
def test_a_change_between_forward_and_backward_raises(name):
    inputs = make_inputs(30, requires_grad=FROZEN)
    out = run(inputs)
    with torch.no_grad():
        getattr(inputs, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_weight_that_changes_often_leaves_nothing_behind():
    inputs = make_inputs(30, requires_grad=False)
    run(inputs)
    kept = kernels.packed_weights_size()
    for _ in range(20):
        inputs.w_down.mul_(0.9)
        inputs.b_up.mul_(0.9)
        run(inputs)
    assert kernels.packed_weights_size() == kept
    for tensor in inputs.tensors().values():
        assert weakref.getweakrefcount(tensor) <= 2


def test_freezing_and_training_in_turn():
    inputs = make_inputs(30, requires_grad=FROZEN)
    frozen = inputs.gradients(impl="cpu")
    for name in ("w_down", "w_up"):
        getattr(inputs, name).requires_grad_()
    assert_equals_reference(inputs, impl="cpu")
    for name in ("w_down", "w_up"):
        getattr(inputs, name).requires_grad_(False)
    torch.testing.assert_close(inputs.gradients(impl="cpu"), frozen, **BITWISE)


def test_one_weight_for_inputs_of_several_dtypes():
    inputs = make_inputs(30, requires_grad=False, base=False)
    calls = [inputs.replace(x=inputs.x.to(dtype)) for dtype in DTYPES.values()]
    expected = [run(fresh(call)) for call in calls]
    for _ in range(2):
        for call, out in zip(calls, expected, strict=True):
            torch.testing.assert_close(run(call), out, **BITWISE)


def test_views_of_one_tensor_are_told_apart():
    stack = make_inputs(30, E=8, requires_grad=False, base=False, bias=False)
    for first, last in [(0, 4), (4, 8), (2, 6), (0, 8), (0, 4)]:
        part = stack.replace(
            **{name: getattr(stack, name)[first:last] for name in ("w_down", "w_up")},
            gate=stack.gate[:, :4] if last - first == 4 else stack.gate,
        )
        torch.testing.assert_close(run(part), run(fresh(part)), **BITWISE)


@pytest.mark.parametrize("fewer_first", [False, True])
def test_rows_of_b_up_are_told_apart(fewer_first):
    # Zeros everywhere: no sampled element tells one number of adapters from another.
    sizes = {"D": 20, "H": 33, "requires_grad": False, "gate": "[E]"}
    two = make_inputs(30, R=(4, 4), **sizes)
    two = two.replace(b_up=torch.zeros(2, 33))
    one = make_inputs(30, R=(8,), **sizes).replace(
        w_down=two.w_down, w_up=two.w_up, b_up=two.b_up[:1]
    )
    for inputs in (one, two, one) if fewer_first else (two, one, two):
        torch.testing.assert_close(run(inputs), run(fresh(inputs)), **BITWISE)


def test_a_view_follows_its_base():
    stack = torch.randn(8, 24, 60)
    inputs = make_inputs(30, requires_grad=False).replace(w_down=stack[1:7])
    before = run(inputs)
    stack[3].mul_(-1)
    assert not torch.equal(run(inputs), before)
    torch.testing.assert_close(run(inputs), run(fresh(inputs)), **BITWISE)
    del inputs, stack
    gc.collect()
    assert packed_count() == 0


@pytest.mark.parametrize("shape", [(6, 24, 60), (3, 48, 60)], ids=str)
def test_memory_that_is_used_again_is_packed_again(shape):
    inputs = make_inputs(30, E=shape[0], R=shape[1], requires_grad=False)
    addresses = set()
    for seed in range(30):
        weight = make_inputs(E=shape[0], R=shape[1], gate="[E]", requires_grad=False, seed=seed)
        addresses.add(weight.w_down.data_ptr())
        inputs = inputs.replace(w_down=weight.w_down)
        del weight
        torch.testing.assert_close(run(inputs), run(fresh(inputs)), **BITWISE)
    if not SANITIZED:  # the sanitizer keeps freed memory
        assert len(addresses) < 30, "an address must come again for the case to say anything"


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim():
    """Give what is free back to the system: a gap in the heap may have served a large request."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.skipif(SANITIZED, reason="the sanitizer keeps freed memory")
@pytest.mark.parametrize("trains", [False, FROZEN], ids=["inference", "training"])
def test_packed_weights_go_with_their_tensor(trains):
    trim()
    inputs = make_inputs(
        5, E=4, D=4100, R=640, H=16, gate="[E]", bias=False, base=False, requires_grad=False
    )
    inputs.gate.requires_grad_(bool(trains))
    results = inputs.gradients(impl="cpu")
    if trains:
        inputs.x.requires_grad_()
        results = inputs.gradients(impl="cpu")
    packed = kernels.packed_weights_size()[1]
    weights = inputs.w_down.numel() * 4
    assert packed >= weights * (2 if trains else 1)
    before = resident_bytes()
    del inputs, results
    gc.collect()
    trim()
    # Read before anything asks the cache, which would tidy up.
    freed = before - resident_bytes()
    assert freed > 0.9 * (weights + packed)
    assert packed_count() == 0


def test_inference_tensors():
    # They count no changes, so that nothing of them is kept.
    with torch.inference_mode():
        inputs = make_inputs(30, requires_grad=False)
        first = run(inputs)
        torch.testing.assert_close(run(inputs), first, **BITWISE)
        inputs.w_down.mul_(-1)
        inputs.b_up[2, 3] = 5
        changed = run(inputs)
    assert packed_count() == 0
    assert not torch.equal(first, changed)
    torch.testing.assert_close(run(inputs), changed, **BITWISE)
    bound = rounding_bounds(inputs)["out"]
    exact = inputs.to(torch.float64).call(adapter_mixture, impl="reference")
    assert_within("out", changed, exact, bound)


def test_packed_weights_survive_checkpointing_and_hooks():
    inputs = make_inputs(30, requires_grad=FROZEN)
    expected = inputs.gradients(impl="cpu")
    kept = kernels.packed_weights_size()

    def checkpointed(x, gate, *args, **keywords):
        return torch.utils.checkpoint.checkpoint(
            lambda x, gate: adapter_mixture(x, gate, *args, **keywords), x, gate,
            use_reentrant=False,
        )  # fmt: skip

    torch.testing.assert_close(inputs.gradients(checkpointed, impl="cpu"), expected, **BITWISE)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(inputs.gradients(impl="cpu"), expected, **BITWISE)
    gc.collect()
    assert kernels.packed_weights_size() == kept


# --- threads and processes -----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_several_python_threads_at_once(threads):
    torch.set_num_threads(threads)
    shared = make_inputs(64, D=130, R=33, H=96, requires_grad=FROZEN)
    calls = [shared] + [
        make_inputs(tokens, D=20 + tokens, R=17, H=33, dtype=dtype, requires_grad=trains)
        for tokens, dtype, trains in [
            (3, torch.bfloat16, FROZEN), (25, torch.float32, TRAINED), (70, torch.float16, FROZEN),
        ]
    ]  # fmt: skip
    expected = [call.gradients(impl="cpu") for call in calls]
    start = threading.Barrier(4)

    def work(first):
        torch.set_num_threads(threads)
        start.wait()
        for turn in range(24):
            index = (first + turn) % len(calls)
            # Some find the weights packed, some pack them, some see them go.
            if turn % 5 == first:
                kernels.clear_packed_weights()
            actual = calls[index].gradients(impl="cpu")
            torch.testing.assert_close(actual, expected[index], **BITWISE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_weights_that_come_and_go_in_several_threads():
    expected = make_inputs(30, D=130, R=33, requires_grad=FROZEN, seed=3).gradients(impl="cpu")

    def work(_):
        torch.set_num_threads(1)
        for _ in range(15):
            inputs = make_inputs(30, D=130, R=33, requires_grad=FROZEN, seed=3)
            torch.testing.assert_close(inputs.gradients(impl="cpu"), expected, **BITWISE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    gc.collect()
    assert packed_count() == 0


LARGE = {"E": 8, "D": 256, "R": 64, "H": 256}  # worth several threads


def in_forked_child(function, results):
    torch.set_num_threads(1)  # as every DataLoader worker does; torch itself hangs otherwise
    results.put(function())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("seen", [True, False], ids=["packed-before", "packed-in-the-child"])
def test_a_forked_child_of_a_parent_with_threads(seen):
    torch.set_num_threads(2)
    inputs = make_inputs(130, **LARGE, requires_grad=FROZEN)
    warm = inputs if seen else make_inputs(130, **LARGE, requires_grad=FROZEN, seed=1)
    warm.gradients(impl="cpu")

    def total():
        return sum(float(t.double().sum()) for t in inputs.gradients(impl="cpu").values())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_forked_child, args=(total, results))
    child.start()
    try:
        actual = results.get(timeout=60)
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()
    torch.set_num_threads(1)
    assert actual == total()


class Outputs(torch.utils.data.Dataset):
    """Calls the operator in the worker."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 3

    def __getitem__(self, index):
        with torch.no_grad():
            return run(self.inputs.replace(x=self.inputs.x * index))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_data_loader_worker():
    torch.set_num_threads(2)
    data = Outputs(make_inputs(130, **LARGE, requires_grad=FROZEN))
    data.inputs.gradients(impl="cpu")
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    outputs = list(loader)
    torch.set_num_threads(1)
    for index, out in enumerate(outputs):
        torch.testing.assert_close(out, data[index], **BITWISE)


# --- adapters that are not used ------------------------------------------------------------------

# Ranks of four adapters: whole panels; panels that two share; many to a panel; an odd number of
# hidden units, the last adapter alone in the last panel.
RANKS_OF_FOUR = [(16, 32, 16, 64), (8, 24, 17, 15), (3, 1, 5, 2), (16, 16, 16, 5), (65, 64, 70, 2)]
UNUSED = [(1,), (3,), (0, 2), (0, 1, 2), (1, 2, 3)]


BROKEN = ["w_down", "w_up", "b_down", "b_up"]


@pytest.mark.parametrize("unused", UNUSED, ids=lambda unused: "without" + "".join(map(str, unused)))
@pytest.mark.parametrize("ranks", RANKS_OF_FOUR, ids=lambda ranks: "-".join(map(str, ranks)))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_unused_adapters_are_left_out_and_their_nan_stays_inside(isa, dtype, bias, ranks, unused):
    turn = sum(ranks) + sum(unused) + len(unused)
    tokens, form = (3, 30)[turn % 2], GATE_FORMS[turn % 3]
    inputs = make_inputs(
        1, tokens, R=ranks, D=40, H=33, dtype=dtype, gate=form, bias=bias, requires_grad=False
    )
    inputs.gate[..., list(unused)] = 0
    # Intact: the same as if they were not there.
    exact = inputs.to(torch.float64).call(adapter_mixture, impl="reference")
    eager = inputs.call(adapter_mixture_loop)
    assert_within_budget("out", run(inputs), exact, eager)

    broken = BROKEN[turn % (4 if bias else 2)]
    of_unit = torch.arange(4).repeat_interleave(torch.tensor(ranks))
    of_row = torch.arange(4) if broken == "b_up" else of_unit
    getattr(inputs, broken)[torch.isin(of_row, torch.tensor(unused))] = float("nan")
    assert_within_budget("out", run(inputs), exact, eager)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("ranks", RANKS_OF_FOUR, ids=lambda ranks: "-".join(map(str, ranks)))
@pytest.mark.parametrize("trains", [False, FROZEN, TRAINED], ids=["inference", *WHAT_TRAINS])
def test_tokens_that_do_not_use_a_broken_adapter(isa, trains, ranks, broken):
    # One row of the gate for 9 tokens changes inside a pass and inside a tile.
    form = GATE_FORMS[1 + (ranks[0] + BROKEN.index(broken)) % 2]
    inputs = make_inputs(5, 9, R=ranks, D=40, H=33, gate=form, requires_grad=TRAINED)
    unused = torch.zeros(5, 9, dtype=torch.bool)
    unused[1:3] = True
    if form == "[B, S, E]":
        unused[:, ::2] = True
    mask = unused[:, 0] if form == "[B, E]" else unused
    inputs.gate.data[..., 2].masked_fill_(mask, 0)
    exact = inputs.to(torch.float64).gradients(impl="reference")
    bounds = rounding_bounds(inputs)

    for name, tensor in inputs.tensors().items():
        tensor.requires_grad_(trains is True or bool(trains) and name in trains)
    of_unit = torch.arange(4).repeat_interleave(torch.tensor(ranks))
    rows = torch.arange(4) if broken == "b_up" else of_unit
    getattr(inputs, broken).data[rows == 2] = float("nan")
    results = inputs.gradients(impl="cpu")
    for name in results.keys() & {"out", "d_x"}:
        assert_within(name, results[name][unused], exact[name][unused], bounds[name][unused])
    assert not results["out"][~unused].isfinite().all(-1).any()
    if trains:
        assert_within("d_base", results["d_base"], exact["d_base"], bounds["d_base"])
        others = [0, 1, 3]
        d_gate = (t["d_gate"][..., others] for t in (results, exact, bounds))
        assert_within("d_gate", *d_gate)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_hidden_units_that_overflow_behind_a_zero_gate(isa, dtype, activation, recompute):
    # Finite weights, but x·w_down is infinite in adapter 1, which every other token does not use.
    inputs = make_inputs(
        30, E=3, D=33, R=5, H=20, gate="[B, E]", dtype=dtype, activation=activation
    )
    inputs.gate.data[::2, 1] = 0

    def results():
        with torch.no_grad():
            inference = run(inputs)
        return {"inference": inference, **inputs.gradients(impl="cpu", recompute=recompute)}

    intact = results()
    inputs.w_down.data[1] = inputs.x[0].detach().sign() * 3e38
    assert inputs.call(adapter_mixture_with_hidden, impl="cpu")[1][0].isinf().any()
    overflowing = results()
    for name in ("out", "d_x", "inference"):
        torch.testing.assert_close(overflowing[name][::2], intact[name][::2], **BITWISE)


def test_unused_adapters_take_no_time():
    inputs = make_inputs(256, E=64, R=32, D=256, H=256, gate="[E]", bias=False, requires_grad=False)
    one = inputs.gate.clone()
    one[1:] = 0

    def least_time(inputs):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            run(inputs)
            times.append(time.perf_counter() - start)
        return min(times)

    # A sixty-fourth of the work; half leaves room for whatever else the machine does.
    assert least_time(inputs.replace(gate=one)) < 0.5 * least_time(inputs)


def test_a_gate_that_is_not_a_number_reaches_only_its_tokens(isa):
    inputs = make_inputs(5, 9, requires_grad=False)
    expected = run(inputs)
    inputs.gate[2, 3] = float("nan")
    out = run(inputs)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(out[others], expected[others], **BITWISE)


def test_tokens_that_are_not_finite_stay_alone(isa):
    inputs = make_inputs(60, requires_grad=FROZEN)
    expected = inputs.gradients(impl="cpu")
    x, grad_out = inputs.x.detach().clone(), inputs.grad_out.clone()
    x[7], x[31, 5], grad_out[50] = float("nan"), float("inf"), float("nan")
    broken = inputs.replace(x=x.requires_grad_(), grad_out=grad_out).gradients(impl="cpu")
    intact = torch.ones(60, dtype=torch.bool)
    intact[[7, 31, 50]] = False
    for name in ("out", "d_x", "d_gate"):
        torch.testing.assert_close(broken[name][intact], expected[name][intact], **BITWISE)
    assert broken["out"][7].isnan().all()
    assert broken["d_x"][50].isnan().all()


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subset",
    [
        ("w_up",), ("w_down",), ("b_up",), ("b_down",), ("gate",), ("x",), ("base",),
        ("b_down", "b_up"), ("gate", "b_up"), ("w_up", "base"), ("w_down", "gate"),
    ],
    ids=lambda subset: "+".join(subset),
)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("tokens", [4, 30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gradients_that_are_asked_for(activation, tokens, recompute, subset):
    inputs = make_inputs(tokens, D=33, R=(5, 17), H=20, activation=activation, requires_grad=subset)
    assert_equals_reference(inputs, impl="cpu", recompute=recompute)


def hidden_gradients(inputs, **options):
    """Gradients of what requires one, through the hidden units alone."""
    _, hidden = inputs.call(adapter_mixture_with_hidden, **options)
    width = hidden.shape[-1]
    grad_hidden = torch.cat([inputs.grad_out] * (width // inputs.grad_out.shape[-1] + 1), -1)
    leaves = {name: t for name, t in inputs.tensors().items() if t.requires_grad}
    grads = torch.autograd.grad(
        hidden, tuple(leaves.values()), grad_hidden[..., :width], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("subset", [("x",), ("w_down",), ("b_down", "w_up"), TRAINED], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("tokens", [4, 30, 200], ids=lambda t: f"T{t}")
def test_gradients_through_the_hidden_units_alone(tokens, recompute, subset):
    inputs = make_inputs(tokens, D=33, R=(5, 17), H=20, requires_grad=subset)
    assert_equals_reference(inputs, hidden_gradients, impl="cpu", recompute=recompute)


# What `sum`, a mean over tokens and a sum over the last dimension send back.
EXPANDED = {
    "one-number": lambda grad: grad[:1, :1].expand_as(grad),
    "one-row": lambda grad: grad[:1].expand_as(grad),
    "one-column": lambda grad: grad[:, :1].expand_as(grad),
    "transposed": lambda grad: grad.t().contiguous().t(),
    "every-other": lambda grad: torch.stack([grad, torch.full_like(grad, float("nan"))], -1)[
        ..., 0
    ],
}


@pytest.mark.parametrize("trains", WHAT_TRAINS.values(), ids=WHAT_TRAINS)
@pytest.mark.parametrize("tokens", [1, 4, 30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("expand", EXPANDED.values(), ids=EXPANDED)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_of_any_strides(dtype, expand, tokens, trains):
    inputs = make_inputs(tokens, D=33, R=(5, 17), H=20, dtype=dtype, requires_grad=trains)
    grad_out = expand(inputs.grad_out)
    actual = inputs.replace(grad_out=grad_out).gradients(impl="cpu")
    expected = inputs.replace(grad_out=grad_out.contiguous()).gradients(impl="cpu")
    torch.testing.assert_close(actual, expected, **BITWISE)


def strided(tensor, order):
    """The same values: dimensions stored in another order, with gaps of NaN between elements."""
    dims = list(range(tensor.dim()))
    dims = dims[order % len(dims) :] + dims[: order % len(dims)] if dims else dims
    stored = tensor.detach().permute(dims)
    gaps = torch.full((*stored.shape, 2), float("nan"), dtype=tensor.dtype)
    gaps[..., 1] = stored
    back = [dims.index(dim) for dim in range(len(dims))]
    return gaps[..., 1].permute(back).requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("gate", GATE_FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("lead", [(2, 2), (3, 30), (2, 100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_is_contiguous(dtype, lead, gate, order):
    inputs = make_inputs(*lead, D=33, R=5, H=20, dtype=dtype, gate=gate)
    scattered = {name: strided(t, order) for name, t in inputs.tensors().items()}
    actual = inputs.replace(**scattered, grad_out=strided(inputs.grad_out, order))
    torch.testing.assert_close(
        actual.gradients(impl="cpu"), inputs.gradients(impl="cpu"), **BITWISE
    )


@pytest.mark.parametrize("name", ["x", "gate", "w_down", "w_up", "b_down", "b_up"])
def test_second_derivatives_raise(name):
    inputs = make_inputs(2, 5)
    loss = run(inputs).square().sum()
    (grad,) = torch.autograd.grad(loss, getattr(inputs, name), create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable.*only with impl="reference"'):
        grad.sum().backward()


def test_the_base_may_be_differentiated_twice():
    inputs = make_inputs(2, 5, requires_grad=("base",))
    loss = run(inputs).square().sum()
    (d_base,) = torch.autograd.grad(loss, inputs.base, create_graph=True)
    (second,) = torch.autograd.grad(d_base.sum(), inputs.base)
    torch.testing.assert_close(second, torch.full_like(second, 2))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", [adapter_mixture, adapter_mixture_with_hidden])
def test_without_gradients_no_graph(context, function):
    inputs = make_inputs(2, 5)
    with context():
        results = inputs.call(function, impl="cpu")
    for result in results if isinstance(results, tuple) else (results,):
        assert result.grad_fn is None and not result.requires_grad
        assert result.is_inference() == (context is torch.inference_mode)


@pytest.mark.parametrize("tokens", [3, 30, 200], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_is_a_cast_of_x(isa, dtype, tokens):
    inputs = make_inputs(tokens, requires_grad=FROZEN)
    cast = inputs.replace(x=inputs.x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        out = run(inputs)
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(run(inputs), run(fresh(inputs)), **BITWISE)
    assert out.dtype == dtype
    torch.testing.assert_close(out, run(cast), **BITWISE)


# --- the door ------------------------------------------------------------------------------------


def through_door(inputs, **changes):
    """What the C++ entry answers: None if the call is for the Python side."""
    tensors = {name: getattr(inputs, name) for name in TENSOR_NAMES}
    arguments = {
        **tensors, "activation": inputs.activation, "ranks": inputs.ranks, "recompute": False,
        "with_hidden": False, **changes,
    }  # fmt: skip
    return native.door(*arguments.values())


class Marked(torch.Tensor):
    """A subclass without behaviour of its own."""


def test_the_door_takes_what_is_for_the_kernels():
    inputs = make_inputs(2, 5)
    assert torch.equal(through_door(inputs), run(inputs))
    out, hidden = through_door(inputs, with_hidden=True)
    assert hidden.shape == (2, 5, 144)
    parameter = torch.nn.Parameter(inputs.w_down.detach().clone())
    assert torch.equal(through_door(inputs.replace(w_down=parameter)), out)


NOT_FOR_THE_DOOR = {
    "float64": {"x": torch.zeros(2, 5, 60, dtype=torch.float64)},
    "integers": {"x": torch.zeros(2, 5, 60, dtype=torch.int64)},
    "meta": {"x": torch.zeros(2, 5, 60, device="meta")},
    "sparse": {"x": torch.zeros(2, 5, 60).to_sparse()},
    "subclass": {"x": torch.zeros(2, 5, 60).as_subclass(Marked)},
    "list": {"gate": [[1.0] * 6] * 2},
    "none": {"w_up": None},
    "number": {"base": 0},
    "activation": {"activation": "tanh"},
    "no-text": {"activation": None},
    "surrogate": {"activation": "\udc80"},
    "ranks": {"ranks": (24,) * 6},
}


@pytest.mark.parametrize("changes", NOT_FOR_THE_DOOR.values(), ids=NOT_FOR_THE_DOOR)
def test_the_door_leaves_the_rest_to_python(changes):
    assert through_door(make_inputs(2, 5), **changes) is None


@pytest.mark.parametrize(
    "ranks",
    [(), (0, 9), (-1, 10), (10,), (True, 8), (4.0, 5.0), (2**64, 9), (2**62,) * 4 + (9,), [4, 5]],
    ids=str,
)
def test_the_door_takes_only_ranks_that_fit(ranks):
    inputs = make_inputs(5, R=(4, 5))
    assert through_door(inputs, ranks=ranks) is None


def test_an_activation_that_is_no_text_at_all_is_named():
    for name in ("tanh", "\udc80", None):
        with pytest.raises(ValueError, match="^activation must be one of identity, relu"):
            run(make_inputs(2, 5).replace(activation=name))


@pytest.mark.parametrize("as_list", [list, torch.Size, lambda ranks: map(int, ranks)])
def test_ranks_need_not_be_a_tuple(as_list):
    inputs = make_inputs(5, R=(4, 5), requires_grad=False)
    arguments = (inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up)
    out = adapter_mixture(
        *arguments, activation="gelu", base=inputs.base, impl="cpu", ranks=as_list((4, 5))
    )
    torch.testing.assert_close(out, run(inputs), **BITWISE)


def test_a_subclass_keeps_its_type():
    inputs = make_inputs(2, 5, requires_grad=False)
    out = run(inputs.replace(x=inputs.x.as_subclass(Marked)))
    assert type(out) is Marked
    torch.testing.assert_close(out.as_subclass(torch.Tensor), run(inputs), **BITWISE)


@pytest.mark.parametrize("real_weights", [False, True])
def test_fake_tensors(real_weights):
    inputs = make_inputs(2, 5, requires_grad=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        names = ("x",) if real_weights else inputs.tensors()
        fakes = {name: mode.from_tensor(getattr(inputs, name)) for name in names}
        out, hidden = inputs.replace(**fakes).call(adapter_mixture_with_hidden, impl="cpu")
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert (out.shape, hidden.shape) == ((2, 5, 96), (2, 5, 144))


def test_tensors_that_are_negated_lazily():
    inputs = make_inputs(30, requires_grad=False)
    lazy = {
        name: torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        for name, tensor in inputs.tensors().items()
    }
    assert all(tensor.is_neg() for tensor in lazy.values())
    torch.testing.assert_close(run(inputs.replace(**lazy)), run(inputs), **BITWISE)


@st.composite
def nearly_right(draw):
    """Arguments with at most two dimensions changed, added or removed."""
    ranks = draw(st.sampled_from([None, (2, 1), (3,), (1, 1, 1)]))
    e, n = (2, 4) if ranks is None else (len(ranks), 3)
    lead = draw(st.sampled_from([(), (3,), (2, 3)]))
    shapes = {
        "x": [*lead, 4],
        "gate": [*lead[: draw(st.integers(0, len(lead)))], e],
        "w_down": [e, 2, 4] if ranks is None else [n, 4],
        "w_up": [e, 2, 5] if ranks is None else [n, 5],
        "b_down": [e, 2] if ranks is None else [n],
        "b_up": [e, 5],
        "base": [*lead, 5],
    }
    for _ in range(draw(st.integers(0, 2))):
        shape = shapes[draw(st.sampled_from(TENSOR_NAMES))]
        place = draw(st.integers(0, max(len(shape) - 1, 0)))
        what = draw(st.sampled_from(["change", "add", "remove"]))
        if what == "add" or not shape:
            shape.insert(place, draw(st.integers(0, 3)))
        elif what == "remove":
            del shape[place]
        else:
            shape[place] = draw(st.integers(0, 6))
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name in draw(st.sets(st.sampled_from(["b_down", "b_up", "base"]))):
        tensors[name] = None
    return tensors, ranks


@settings(max_examples=400)
@given(arguments=nearly_right())
def test_the_door_has_the_rules_of_validation(arguments):
    tensors, ranks = arguments
    try:
        check_adapter_mixture(*tensors.values(), "relu", ranks)
        fits = True
    except ValueError:
        fits = False
    answer = native.door(*tensors.values(), "relu", ranks, False, False)
    assert (answer is not None) == fits
