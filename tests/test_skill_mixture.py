"""`skill_mixture` against the float64 oracle, a loop over sequences and peft's Poly and MHR."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import CPU, WIDEST, needs_extension
from skill_inputs import NAMES, assert_matches_oracle, make_skills, skill_loop
from torch._dynamo.testing import CompileCounterWithBackend

from pemt_fast.ops import extension
from pemt_fast.ops.skill_mixture import skill_mixture
from pemt_fast.ops.skill_terms import mixes_tasks
from pemt_fast.testing import (
    LAYOUTS,
    LargestTensor,
    poisoned_empty,
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
BITWISE = {"rtol": 0, "atol": 0}
OPS = torch.ops.pemt_fast
SKILL_IMPLS = ["torch", CPU]
ISAS = [] if extension.load() is None else extension.load().cpu_isas()


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


@pytest.fixture(params=SKILL_IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """The C++ kernels on one instruction set of this machine."""
    kernels = extension.load()
    best = kernels.cpu_isa()
    kernels.use_cpu_isa(request.param)
    yield request.param
    kernels.use_cpu_isa(best)


# --- values: the output and every gradient -------------------------------------------------------

# K = 1 and R = 1 are the least there is, 103 skills those of C-Poly on 100 tasks. With as many rows
# as sequences nothing is selected, with one row all tokens are one sequence. D and H (32, 60, 96)
# are no multiples of a block and have 4 as a divisor, the most splits here; P = 0 is Poly without
# a dimension for splits. Few tasks of many skills are mixed before they are selected.
CASES = {
    # lead, M, K, P, R, D, H, ids, base, layout
    "B1-S1": ((1, 1), 5, 8, 0, 4, 60, 96, "random", True, "contiguous"),
    "B1-S63-one-row": ((1, 63), 1, 8, 0, 1, 60, 96, None, False, "contiguous"),
    "B3-S21-one-row": ((3, 21), 1, 8, 2, 4, 96, 60, None, True, "sliced"),
    "B3-S21-one-task": ((3, 21), 1, 8, 4, 4, 96, 60, "random", True, "transposed"),
    "B5-S9-row-each": ((5, 9), 5, 8, 0, 4, 60, 96, None, True, "sliced"),
    "B5-S9-row-each-P4": ((5, 9), 5, 3, 4, 2, 60, 96, None, False, "transposed"),
    "B8-S17-K1": ((8, 17), 4, 1, 1, 4, 60, 96, "random", True, "contiguous"),
    "B8-S17-R1": ((8, 17), 4, 8, 0, 1, 60, 32, "random", True, "sliced"),
    "B8-S1-K1-R1": ((8, 1), 4, 1, 1, 1, 32, 60, "random", False, "transposed"),
    "B16-S5-task": ((16, 5), 2, 16, 0, 4, 60, 96, "random", True, "contiguous"),
    "B16-S5-task-P2": ((16, 5), 3, 17, 2, 3, 60, 96, "random", False, "sliced"),
    "B16-S1-task-P4": ((16, 1), 3, 17, 4, 4, 96, 60, "repeated", True, "transposed"),
    "B8-S33-M100": ((8, 33), 100, 4, 0, 4, 60, 96, "repeated", True, "contiguous"),
    "B8-S7-M100-K103": ((8, 7), 100, 103, 1, 2, 60, 96, "repeated", True, "sliced"),
    "B2-S257": ((2, 257), 5, 4, 2, 16, 60, 32, "random", True, "transposed"),
    "B7": ((7,), 5, 8, 0, 4, 60, 96, "random", True, "sliced"),
    "B2-3-4": ((2, 3, 4), 5, 8, 2, 4, 60, 96, "random", True, "transposed"),
}


def inputs_of(case, **changes):
    lead, m, k, p, r, d, h, ids, base, layout = CASES[case]
    chosen = {
        "M": m, "K": k, "P": p, "R": r, "D": d, "H": h, "ids": ids, "base": base, "layout": layout,
    }  # fmt: skip
    return make_skills(*lead, **{**chosen, **changes})


def test_both_ways_of_mixing_are_among_the_cases():
    ways = {
        mixes_tasks(m, lead[0], k) for lead, m, k, *_, ids, _, _ in CASES.values() if ids and m > 1
    }
    assert ways == {False, True}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_within_the_error_budget(dtype, case, impl):
    assert_matches_oracle(lambda seed: inputs_of(case, dtype=dtype, seed=seed), impl=impl)


# Sequences so long that threads share them and factors are packed, so short that rows are read as
# they lie; odd widths; every sequence its own task or one for all.
LONG = {
    "B2-S300": ((2, 300), {"M": 5, "K": 4, "R": 17, "D": 70, "H": 37}),
    "B3-S260-P2": ((3, 260), {"M": 2, "K": 5, "P": 2, "R": 3, "D": 62, "H": 130}),
    "B4-S48": ((4, 48), {"M": 9, "K": 3, "R": 8, "D": 768, "H": 40}),
    "B9-S2": ((9, 2), {"M": 3, "K": 70, "R": 5, "D": 33, "H": 768}),
}


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mixes", [True, False], ids=["mixed", "factors"])
@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_instruction_sets_and_threads(isa, dtype, case, mixes, threads):
    torch.set_num_threads(threads)
    lead, sizes = case
    assert_matches_oracle(
        lambda seed: make_skills(*lead, **sizes, mixes=mixes, dtype=dtype, seed=seed), impl="cpu"
    )


@needs_extension
def test_rows_of_skills_that_do_not_divide_among_the_threads():
    torch.set_num_threads(3)
    lead, sizes = LONG["B9-S2"]
    assert_matches_oracle(lambda seed: make_skills(*lead, **sizes, seed=seed), impl="cpu")


FACTORS = {
    "B5-S9": ((5, 9), {"M": 3}),
    "B5-S1-other-tasks": ((5, 1), {"M": 9, "layout": "sliced", "param_layout": "transposed"}),
    "B4-S7-row-each": ((4, 7), {"M": 4, "ids": None, "base": False}),
    "B3-S21-one-row": ((3, 21), {"M": 1, "ids": None, "scale": 1.0}),
    "B3-S21-one-task": ((3, 21), {"M": 1, "layout": "transposed"}),
}


@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_factors_of_the_tasks_themselves(dtype, case, impl):
    lead, sizes = case
    assert_matches_oracle(
        lambda seed: make_skills(*lead, **sizes, mixes=False, dtype=dtype, seed=seed), impl=impl
    )


def test_factors_of_another_dtype_are_scaled_in_float32(impl):
    options = {"M": 3, "mixes": False, "scale": 0.3, "param_dtype": torch.bfloat16}
    assert_matches_oracle(lambda seed: make_skills(5, 9, **options, seed=seed), impl=impl)


@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS)
def test_factors_are_skills_mixed_with_a_unit_matrix(case):
    lead, sizes = case
    inputs = make_skills(*lead, **sizes, mixes=False, dtype=torch.float64)
    unit = inputs.replace(mixing=torch.eye(len(inputs.a), dtype=torch.float64))
    torch.testing.assert_close(inputs.gradients(), unit.gradients(), **FLOAT64)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_in_float64(case):
    inputs = inputs_of(case, dtype=torch.float64)
    actual, exact = inputs.gradients(impl="torch"), inputs.gradients(impl="reference")
    torch.testing.assert_close(actual, exact, **FLOAT64)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_the_loop_over_sequences(case):
    inputs = inputs_of(case, dtype=torch.float64)
    actual, expected = inputs.gradients(impl="reference"), inputs.gradients(skill_loop)
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("shape", [(2, 2), (12, 1)], ids=["mixes-sequences", "mixes-tasks"])
def test_gradients_are_finite_differences(shape):
    inputs = make_skills(*shape, M=2, K=7, P=2, R=2, D=4, H=6, dtype=torch.float64)
    assert mixes_tasks(2, shape[0], 7) == (shape[0] == 12)

    def function(*tensors):
        return inputs.replace(**dict(zip(NAMES, tensors, strict=True))).call(impl="torch")

    assert torch.autograd.gradcheck(function, tuple(inputs.tensors().values()))


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("splits", [0, 1, 2, 4])
def test_parameters_of_any_strides(splits, param_layout):
    inputs = make_skills(5, 7, P=splits, dtype=torch.float64, param_layout=param_layout)
    actual, exact = inputs.gradients(), inputs.gradients(impl="reference")
    torch.testing.assert_close(actual, exact, **FLOAT64)


# fp32 skills over a bf16 model are normal, the router in float32 too; the reverse comes with
# evaluation; an fp32 residual stream over bf16 layers with T5's float32 `wo`.
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("bf16", {"param_dtype": torch.float32, "mixing_dtype": torch.float32}),
        ("bf16", {"mixing_dtype": torch.float32}),
        ("bf16", {"base_dtype": torch.float32}),
        ("f32", {"param_dtype": torch.bfloat16}),
        ("f32", {"mixing_dtype": torch.bfloat16, "base_dtype": torch.float16}),
        ("f16", {"param_dtype": torch.bfloat16, "mixing_dtype": torch.float64}),
        ("f32", {"param_dtype": torch.float64, "base_dtype": torch.float64}),
    ],
    ids=["fp32-params", "fp32-mixing", "fp32-base", "bf16-params", "half-mixing-base", "odd",
         "float64"],
)  # fmt: skip
@pytest.mark.parametrize("case", ["B8-S33-M100", "B16-S5-task-P2", "B3-S21-one-row"])
def test_mixed_dtypes(dtype, others, case, impl):
    assert_matches_oracle(
        lambda seed: inputs_of(case, dtype=DTYPES[dtype], seed=seed, **others), impl=impl
    )


@pytest.mark.parametrize("ids", [None, "random"], ids=["one-row", "task-ids"])
def test_skills_are_mixed_in_float32(ids, impl):
    # Weights 1 + 2^-10 and -1 of equal skills leave 2^-10, or nothing when rounded to bfloat16.
    inputs = make_skills(
        4, 3, M=2 if ids else 1, K=2, R=1, D=1, H=1, ids=ids, scale=1.0, base=False,
        dtype=torch.bfloat16, mixing_dtype=torch.float32, requires_grad=False,
    )  # fmt: skip
    inputs.mixing.copy_(torch.tensor([1 + 2**-10, -1.0]))
    ones = {name: torch.ones_like(getattr(inputs, name)) for name in ("x", "a", "b")}
    out = inputs.replace(**ones).call(impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 2**-20), **BITWISE)


@pytest.mark.parametrize("ids", [None, "random"], ids=["row-each", "task-ids"])
def test_the_gradient_of_a_skill_is_summed_over_sequences_in_float32(ids, impl):
    # Every sequence adds 1, and bfloat16 does not know the number 257.
    inputs = make_skills(
        257, 1, M=1 if ids else 257, K=1, R=1, D=1, H=1, ids=ids, scale=1.0, base=False,
        dtype=torch.bfloat16, param_dtype=torch.float32,
    )  # fmt: skip
    if ids:
        inputs = inputs.replace(mixing=torch.ones(2, 1, 1, requires_grad=True))
        inputs.task_ids.zero_()
    ones = {name: torch.ones_like(t, requires_grad=True) for name, t in inputs.tensors().items()}
    inputs = inputs.replace(**ones, grad_out=torch.ones_like(inputs.grad_out))
    grads = inputs.gradients(impl=impl)
    assert grads["d_a"].item() == grads["d_b"].item() == 257


def test_the_gradient_of_a_factor_is_summed_over_sequences_in_float32(impl):
    inputs = make_skills(
        257, 1, M=2, R=1, D=1, H=1, scale=1.0, base=False, mixes=False,
        dtype=torch.bfloat16, param_dtype=torch.float32,
    )  # fmt: skip
    inputs.task_ids.zero_()
    ones = {name: torch.ones_like(t, requires_grad=True) for name, t in inputs.tensors().items()}
    inputs = inputs.replace(**ones, grad_out=torch.ones_like(inputs.grad_out))
    grads = inputs.gradients(impl=impl)
    assert grads["d_a"].flatten().tolist() == grads["d_b"].flatten().tolist() == [257, 0]


@pytest.mark.parametrize("mixes", [True, False], ids=["mixed", "factors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_factors_are_rounded_to_the_dtype_of_x(dtype, mixes, impl):
    # 1 + eps / 4 is then 1, and the columns of x cancel.
    inputs = make_skills(
        2, 3, M=2, K=1, R=1, D=2, H=1, scale=1.0, base=False, mixes=mixes, dtype=dtype,
        param_dtype=torch.float32, mixing_dtype=torch.float32, requires_grad=False,
    )  # fmt: skip
    for tensor in inputs.tensors().values():
        tensor.fill_(1)
    inputs.a[..., 0] += torch.finfo(dtype).eps / 4
    inputs.x[..., 1] = -1
    assert not bool(inputs.call(impl=impl).any())


def test_a_gradient_without_strides(impl):
    # `out.sum().backward()` sends one number, expanded.
    dtype = WIDEST[impl]
    inputs = make_skills(3, 5, dtype=dtype)
    inputs = inputs.replace(grad_out=torch.ones((), dtype=dtype).expand(3, 5, 96))
    given = inputs.replace(grad_out=inputs.grad_out.contiguous())
    torch.testing.assert_close(inputs.gradients(impl=impl), given.gradients(impl=impl), **BITWISE)


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("rows", ["one-row", "row-each", "task-ids", "few-tasks"])
@pytest.mark.parametrize("lead", [(0, 5), (3, 0), (0,), (0, 0)], ids=str)
def test_no_tokens(lead, rows, splits, impl):
    rows_of = {"one-row": (1, None), "row-each": (lead[0], None), "task-ids": (5, "random")}
    m, ids = rows_of.get(rows, (1, "random"))
    inputs = make_skills(*lead, M=m, P=splits, ids=ids)
    results = inputs.gradients(impl=impl)
    assert results["out"].shape == (*lead, 96)
    for name, tensor in inputs.tensors().items():
        torch.testing.assert_close(results[f"d_{name}"], torch.zeros_like(tensor))


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", ["B8-S33-M100", "B16-S5-task"])
def test_task_ids_select_rows(case, ids):
    inputs = inputs_of(case, dtype=torch.float64, requires_grad=False)
    rows = inputs.mixing[inputs.task_ids]
    selected = inputs.replace(task_ids=inputs.task_ids.to(ids)).call()
    torch.testing.assert_close(
        selected, inputs.replace(mixing=rows, task_ids=None).call(), **FLOAT64
    )


@pytest.mark.parametrize("case", ["B8-S33-M100", "B16-S5-task"])
def test_unused_tasks_get_no_gradient(case, impl):
    inputs = inputs_of(case)
    used = torch.zeros(len(inputs.mixing), dtype=torch.bool)
    used[inputs.task_ids] = True
    d_mixing = inputs.gradients(impl=impl)["d_mixing"]
    assert bool((d_mixing[~used] == 0).all())
    assert bool((d_mixing[used] != 0).all())


def test_equal_sequences_of_one_task_give_equal_rows(impl):
    inputs = make_skills(6, 5, requires_grad=False)
    inputs.task_ids.fill_(3)
    x, base = (t[:1].expand(6, -1, -1) for t in (inputs.x, inputs.base))
    out = inputs.replace(x=x, base=base).call(impl=impl)
    torch.testing.assert_close(out, out[:1].expand_as(out), **BITWISE)


# --- which gradients -----------------------------------------------------------------------------

SUBSETS = [
    subset for count in range(len(NAMES) + 1) for subset in itertools.combinations(NAMES, count)
]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "nothing")
@pytest.mark.parametrize("case", ["B5-S9-row-each-P4", "B16-S5-task-P2", "B3-S21-one-row", "B7"])
def test_each_gradient_on_its_own(case, subset, impl):
    inputs = inputs_of(case, dtype=WIDEST[impl], requires_grad=subset, base=True)
    exact = inputs_of(case, dtype=WIDEST[impl], base=True).gradients(impl=impl)
    out = inputs.call(impl=impl)
    assert out.requires_grad == bool(subset)
    if subset:
        out.backward(inputs.grad_out)
    grads = {f"d_{name}": t.grad for name, t in inputs.tensors().items() if t.grad is not None}
    assert grads.keys() == {f"d_{name}" for name in subset}
    torch.testing.assert_close(grads, {name: exact[name] for name in grads}, **BITWISE)


def test_no_second_derivatives():
    inputs = make_skills(2, 3)
    (d_x,) = torch.autograd.grad(inputs.call().square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_the_reference_has_second_derivatives():
    inputs = make_skills(2, 2, M=2, K=2, R=2, D=4, H=4, dtype=torch.float64)

    def function(*tensors):
        return inputs.replace(**dict(zip(NAMES, tensors, strict=True))).call(impl="reference")

    assert torch.autograd.gradgradcheck(function, tuple(inputs.tensors().values()))


def test_no_grad_leaves_no_graph():
    with torch.no_grad():
        assert not make_skills(2, 3).call().requires_grad


# --- memory --------------------------------------------------------------------------------------

B, S, K, R, D, H = 6, 9, 5, 4, 20, 11
HIDDEN = B * S * R


@pytest.mark.parametrize(
    ("requires_grad", "expected"),
    [
        (("x",), set()),
        (("a",), {"x"}),
        (("b",), {"hidden"}),
        (("x", "b"), {"hidden"}),
        (("mixing",), {"x", "hidden"}),
        (NAMES, {"x", "hidden"}),
        (("base",), set()),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("M", [2, 100], ids=["few-tasks", "many-tasks"])
def test_kept_for_backward(M, requires_grad, expected, impl):
    inputs = make_skills(
        B, S, M=M, K=K, R=R, D=D, H=H, dtype=torch.bfloat16, param_dtype=torch.float32,
        requires_grad=requires_grad,
    )  # fmt: skip
    arguments = {t.data_ptr(): name for name, t in inputs.tensors().items()}
    arguments[inputs.task_ids.data_ptr()] = "task_ids"
    kept = {}

    def pack(tensor):
        kept[arguments.get(tensor.data_ptr(), "hidden")] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = inputs.call(impl=impl)
    assert out.requires_grad
    parameters = {"mixing", "a", "b", "task_ids"} if requires_grad != ("base",) else set()
    assert kept.keys() == expected | parameters
    if "hidden" in kept:
        assert (kept["hidden"].numel(), kept["hidden"].dtype) == (HIDDEN, torch.bfloat16)


@pytest.mark.parametrize("M", [2, 100], ids=["few-tasks", "many-tasks"])
def test_no_tensor_holds_the_factors_of_every_token(M):
    tokens, width = 64, 48
    inputs = make_skills(4, tokens, M=M, K=6, R=2, D=width, H=width)
    with LargestTensor() as largest:
        inputs.gradients()
    assert largest.elements == 4 * tokens * width  # x and the output; factors are 4·2·48


# --- inputs and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_not_modified(case):
    inputs = inputs_of(case)
    named = {**inputs.tensors(), "grad_out": inputs.grad_out}
    before = {name: t.detach().clone() for name, t in named.items()}
    inputs.gradients()
    for name, tensor in named.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_contiguous_and_its_own(case, requires_grad):
    inputs = inputs_of(case, requires_grad=requires_grad)
    out = inputs.call()
    assert out.is_contiguous()
    assert not out._is_view()
    tensors = {**inputs.tensors(), "out": out}
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("case", ["B16-S5-task", "B8-S33-M100", "B3-S21-one-task", "B2-S257"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bits(threads, dtype, case, impl):
    torch.set_num_threads(threads)
    inputs = inputs_of(case, dtype=dtype, R=8, D=192, H=384)
    first, second = inputs.gradients(impl=impl), inputs.gradients(impl=impl)
    torch.testing.assert_close(second, first, **BITWISE)


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [*SKILL_IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_is_a_cast_of_x(dtype, impl):
    inputs = make_skills(4, 7)
    cast = inputs.replace(x=inputs.x.detach().to(dtype), grad_out=inputs.grad_out.to(dtype))
    expected = cast.replace(x=cast.x.requires_grad_()).gradients(impl=impl)
    with torch.autocast("cpu", dtype=dtype):
        out = inputs.call(impl=impl)
    grads = torch.autograd.grad(out, tuple(inputs.tensors().values()), cast.grad_out)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected["out"], **BITWISE)
    for (name, tensor), grad in zip(inputs.tensors().items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad, expected[f"d_{name}"].to(grad.dtype), **BITWISE)


def test_autocast_around_backward_too():
    inputs = make_skills(4, 7)
    cast = inputs.replace(x=inputs.x.detach().bfloat16(), grad_out=inputs.grad_out.bfloat16())
    expected = cast.replace(x=cast.x.requires_grad_()).gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = inputs.replace(grad_out=cast.grad_out).gradients()
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name].to(result.dtype), **BITWISE)


def test_autocast_leaves_float64_alone():
    inputs = make_skills(2, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = inputs.gradients()
    torch.testing.assert_close(actual, inputs.gradients(), **BITWISE)


# --- rules ---------------------------------------------------------------------------------------


def arguments(splits=0, **changes):
    inputs = make_skills(2, 3, M=4, K=5, P=splits, R=6, D=8, H=10, requires_grad=False)
    tensors = {**inputs.tensors(), "task_ids": torch.tensor([3, 0])}
    return {**tensors, **changes}


WRONG_SHAPES = [
    ("x", (8,), "x must be [B, ..., D], got shape [8]"),
    ("x", (2, 3, 9), "x must be [B, ..., D] with D = 8, the width of a over all splits, "
     "got [2, 3, 9]"),
    ("a", (5, 6), "a must be [K, R, D] or [P, K, R, D / P], got shape [5, 6]"),
    ("a", (0, 6, 8), "a needs K >= 1 and R >= 1, got [0, 6, 8]"),
    ("a", (5, 0, 8), "a needs K >= 1 and R >= 1, got [5, 0, 8]"),
    ("b", (1, 5, 6, 10), "b must be [K, R, H], like a, got shape [1, 5, 6, 10]"),
    ("b", (5, 10, 6), "b must be [K, R, H] = [5, 6, 6], got [5, 10, 6]"),
    ("mixing", (5,), "mixing must be [tasks, K] = [tasks, 5] or [tasks, P, K] = [tasks, 1, 5], "
     "got [5]"),
    ("mixing", (4, 6), "mixing must be [tasks, K] = [tasks, 5] or [tasks, P, K] = [tasks, 1, 5], "
     "got [4, 6]"),
    ("mixing", (4, 2, 5), "mixing must be [tasks, K] = [tasks, 5] or [tasks, P, K] = "
     "[tasks, 1, 5], got [4, 2, 5]"),
    ("base", (3, 10), "base must be [B, ..., H] = [2, 3, 10], got [3, 10]"),
]  # fmt: skip
WRONG_SPLIT_SHAPES = [
    ("a", (0, 5, 6, 4), "a needs P >= 1, K >= 1 and R >= 1, got [0, 5, 6, 4]"),
    ("b", (5, 6, 10), "b must be [P, K, R, H / P], like a, got shape [5, 6, 10]"),
    ("b", (1, 5, 6, 5), "b must be [P, K, R, H / P] = [2, 5, 6, 5], got [1, 5, 6, 5]"),
    ("mixing", (4, 5), "mixing must be [tasks, P, K] = [tasks, 2, 5], got [4, 5]"),
]


def assert_raises(error, message, keywords):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        skill_mixture(**keywords)


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shapes(name, shape, message):
    assert_raises(ValueError, message, arguments(**{name: torch.zeros(shape)}))


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SPLIT_SHAPES)
def test_wrong_shapes_of_splits(name, shape, message):
    assert_raises(ValueError, message, arguments(2, **{name: torch.zeros(shape)}))


@pytest.mark.parametrize("name", ["x", "mixing", "a", "b", "base", "task_ids"])
def test_only_tensors(name):
    message = f"{name} must be a torch.Tensor, got list"
    assert_raises(TypeError, message, arguments(**{name: [1.0]}))


@pytest.mark.parametrize("name", NAMES)
def test_only_floats(name):
    message = f"{name} must be float32, bfloat16, float16 or float64, got torch.int64"
    assert_raises(TypeError, message, arguments(**{name: arguments()[name].long()}))


@pytest.mark.parametrize("name", ["mixing", "a", "b", "base", "task_ids"])
def test_one_device(name):
    message = f"{name} must be on cpu, the device of x, got meta"
    assert_raises(ValueError, message, arguments(**{name: arguments()[name].to("meta")}))


@pytest.mark.parametrize("rows", [3, 4, 0])
def test_rows_without_task_ids(rows):
    message = (
        "mixing must have 1 row or one for each of the 2 sequences of x when task_ids is None, "
        f"got {rows}"
    )
    assert_raises(ValueError, message, arguments(task_ids=None, mixing=torch.zeros(rows, 5)))


def test_the_shape_of_task_ids():
    message = "task_ids must be [B] = [2], got [2, 1]"
    assert_raises(ValueError, message, arguments(task_ids=torch.tensor([[3], [0]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8], ids=str)
def test_the_dtype_of_task_ids(dtype):
    message = f"task_ids must be int64 or int32, got {dtype}"
    assert_raises(TypeError, message, arguments(task_ids=torch.tensor([1, 0]).to(dtype)))


@pytest.mark.parametrize("task", [4, -1, 100])
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_unknown_tasks(impl, task):
    message = f"task_ids must be from 0 to 3, mixing has 4 tasks, got {task}"
    keywords = arguments(task_ids=torch.tensor([3, task]), impl=impl)
    assert_raises(IndexError, message, keywords)


def test_an_unknown_task_in_a_compiled_graph_is_an_error_too():
    function = torch.compile(skill_mixture, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        (IndexError, RuntimeError), match="out of range|task_ids must be from 0 to 3, got 4"
    ):
        function(**arguments(task_ids=torch.tensor([3, 4])))


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_that_do_not_exist(impl):
    message = (
        f"impl='{impl}' cannot run: this version of pemt_fast ships no {impl} kernels for "
        "skill_mixture"
    )
    assert_raises(RuntimeError, message, arguments(impl=impl))


@needs_extension
def test_the_kernels_do_not_take_float64():
    inputs = make_skills(2, 3, dtype=torch.float64)
    message = "it computes in float32, bfloat16 or float16, x is float64"
    with pytest.raises(RuntimeError, match=message):
        inputs.call(impl="cpu")


def test_splits_have_no_factors_of_tasks():
    message = "a must be [M, R, D], the factors of the tasks, when mixing is None, got [2, 5, 6, 4]"
    assert_raises(ValueError, message, arguments(2, mixing=None))


def test_unknown_tasks_of_factors():
    message = "task_ids must be from 0 to 4, a has 5 tasks, got 5"
    keywords = arguments(mixing=None, task_ids=torch.tensor([3, 5]))
    assert_raises(IndexError, message, keywords)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_auto_is_never_a_kernel_that_does_not_exist(name, monkeypatch):
    inputs = make_skills(2, 3, requires_grad=False)
    monkeypatch.setattr("pemt_fast.ops.skill_mixture.resolve_impl", lambda *_: name)
    torch.testing.assert_close(inputs.call(), inputs.call(impl="auto"), **BITWISE)


def test_an_unknown_impl():
    message = "impl must be one of auto, reference, torch, cpu, triton, cuda, got 'eager'"
    assert_raises(ValueError, message, arguments(impl="eager"))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(*lead, **changes):
    sizes = {"M": 3, "K": 5, "R": 2, "D": 8, "H": 12, "dtype": torch.float32}
    return make_skills(*(lead or (4, 3)), **{**sizes, **changes})


def op_arguments(inputs, impl):
    return (
        inputs.x, inputs.mixing, inputs.a, inputs.b, inputs.task_ids, inputs.base, inputs.scale,
        impl,
    )  # fmt: skip


SMALL = {
    "sequences": {},
    "tasks": {"M": 2, "K": 40},
    "splits": {"P": 2},
    "one-row": {"M": 1, "ids": None},
    "row-each": {"M": 4, "ids": None, "base": False},
    "factors": {"mixes": False},
    "mixed-dtypes": {"dtype": torch.bfloat16, "param_dtype": torch.float32, "P": 4},
}


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(
    "requires_grad", [False, True, ("x",), ("a", "b")], ids=["frozen", "all", "x", "skills"]
)
def test_the_operator_is_well_registered(requires_grad, case, impl):
    inputs = small(requires_grad=requires_grad, **case)
    torch.library.opcheck(OPS.skill_mixture.default, op_arguments(inputs, impl))


@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_the_forward_operator_is_well_registered(case, save, impl):
    inputs = small(requires_grad=False, **case)
    arguments = (*op_arguments(inputs, impl), save)
    torch.library.opcheck(OPS.skill_mixture_forward.default, arguments)


@pytest.mark.parametrize(
    "needs",
    [(True,) * 4, (True, False, False, False), (False, False, True, True)],
    ids=["all", "x", "skills"],
)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_the_backward_operator_is_well_registered(case, needs, impl):
    inputs = small(requires_grad=False, **case)
    hidden = torch.randn(4, 3, 2).to(inputs.x.dtype)
    arguments = (
        inputs.grad_out, inputs.x, inputs.mixing, inputs.a, inputs.b, inputs.task_ids, hidden,
        inputs.scale, impl, [need and (i != 1 or case.get("mixes", True))
                             for i, need in enumerate(needs)],
    )  # fmt: skip
    torch.library.opcheck(OPS.skill_mixture_backward.default, arguments)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_meta_tensors_have_the_right_shapes(case):
    inputs = small(**case)
    names = (*inputs.tensors(), "grad_out", *(["task_ids"] if inputs.task_ids is not None else []))
    meta = inputs.replace(
        **{
            name: getattr(inputs, name).detach().to("meta").requires_grad_(name in inputs.tensors())
            for name in names
        }
    )
    results, fakes = inputs.gradients(), meta.gradients()
    for name, result in results.items():
        assert (fakes[name].shape, fakes[name].dtype) == (result.shape, result.dtype), name
        assert fakes[name].stride() == result.stride(), name


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("impl", [*SKILL_IMPLS, "reference"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_compiled_values_and_gradients(case, impl):
    inputs = small(**case)
    function = torch.compile(skill_mixture, fullgraph=True, backend="aot_eager")
    actual, expected = inputs.gradients(function, impl=impl), inputs.gradients(impl=impl)
    torch.testing.assert_close(actual, expected, **BITWISE)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_one_compilation_for_every_number_of_sequences_and_tokens(case):
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(skill_mixture, fullgraph=True, backend=counter)
    for lead in ((4, 3), (7, 9), (33, 2), (5, 128)):
        rows = {"M": lead[0]} if case.get("M") == 4 else {}
        inputs = small(*lead, **{**case, **rows})
        dynamic = [(inputs.x, 0), (inputs.x, 1)]
        if inputs.base is not None:
            dynamic += [(inputs.base, 0), (inputs.base, 1)]
        if inputs.task_ids is not None:
            dynamic += [(inputs.task_ids, 0)]
        if rows:
            dynamic += [(inputs.mixing, 0)]
        for tensor, dim in dynamic:
            torch._dynamo.mark_dynamic(tensor, dim)
        actual = inputs.gradients(function)
        torch.testing.assert_close(actual, inputs.gradients(), **BITWISE)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_under_autocast():
    inputs = small(dtype=torch.float32)
    function = torch.compile(skill_mixture, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = inputs.call(function), inputs.call()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, **BITWISE)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_inside_activation_checkpointing(reentrant):
    inputs = small()
    expected = inputs.gradients()

    def function(*tensors, **keywords):
        return torch.utils.checkpoint.checkpoint(
            lambda *again: skill_mixture(*again, **keywords), *tensors, use_reentrant=reentrant
        )

    inputs.call(function).backward(inputs.grad_out)
    # The reentrant form hands gradients to its own arguments only.
    for name in ("x", "mixing", "a", "b"):
        torch.testing.assert_close(getattr(inputs, name).grad, expected[f"d_{name}"], **BITWISE)


def test_exported_module():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(5, 2, 8))
            self.b = torch.nn.Parameter(torch.randn(5, 2, 12))
            self.mixing = torch.nn.Parameter(torch.rand(3, 5))

        def forward(self, x, task_ids):
            return skill_mixture(x, self.mixing, self.a, self.b, task_ids=task_ids)

    layer = Layer()
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=2)
    program = torch.export.export(
        layer, (torch.randn(4, 7, 8), torch.tensor([2, 0, 1, 1])),
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch}), strict=True,
    )  # fmt: skip
    x, task_ids = torch.randn(3, 12, 8), torch.tensor([1, 1, 2])
    torch.testing.assert_close(program.module()(x, task_ids), layer(x, task_ids))


# --- anything ------------------------------------------------------------------------------------


@st.composite
def any_call(draw):
    """A call of any shape, form, strides and dtypes, as keywords of `make_skills`."""
    maybe_dtype = st.none() | st.sampled_from(list(DTYPES.values()))
    lead = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    splits = draw(st.integers(0, 3))
    ids = draw(st.sampled_from([None, "random", "repeated"]))
    rows = st.sampled_from([1, lead[0]]) if ids is None else st.integers(1, 12)
    return lead, {
        "M": draw(rows),
        "K": draw(st.integers(1, 20)),
        "P": splits,
        "R": draw(st.integers(1, 9)),
        "D": draw(st.integers(1, 15)) * max(splits, 1),
        "H": draw(st.integers(1, 15)) * max(splits, 1),
        "ids": ids,
        "mixes": splits > 0 or draw(st.booleans()),
        "base": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, -0.25, 3.0])),
        "dtype": draw(st.sampled_from([*DTYPES.values(), torch.float64])),
        "param_dtype": draw(maybe_dtype),
        "mixing_dtype": draw(maybe_dtype),
        "base_dtype": draw(maybe_dtype),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "param_layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60)
@given(call=any_call())
def test_any_call_equals_the_reference(call):
    # Values in float64, where no rounding can hide a wrong index; dtypes as drawn.
    lead, keywords = call
    inputs = make_skills(*lead, **keywords)
    results = inputs.gradients()
    for name, tensor in inputs.tensors().items():
        assert results[f"d_{name}"].dtype == tensor.dtype
        assert results[f"d_{name}"].shape == tensor.shape
    assert results["out"].dtype == inputs.x.dtype
    assert all(bool(result.isfinite().all()) for result in results.values())
    widest = inputs.to(torch.float64)
    torch.testing.assert_close(widest.gradients(), widest.gradients(impl="reference"), **FLOAT64)
    narrow = inputs.to(torch.float32)
    exact = narrow.to(torch.float64).gradients(impl="reference")
    for name, result in narrow.gradients().items():
        close = {"rtol": 1e-4, "atol": 1e-4 * (1 + float(exact[name].abs().max()))}
        torch.testing.assert_close(result.double(), exact[name], **close)


# --- peft ----------------------------------------------------------------------------------------

# Lead, M, K, P, R, D, H of a layer of peft's; P = 1 is Poly, P > 1 is MHR.
PEFT_LAYERS = {
    "poly": ((6, 9), 5, 4, 1, 3, 32, 48),
    "mhr": ((6, 9), 5, 4, 4, 3, 32, 48),
    "one-task": ((3, 9), 1, 4, 2, 8, 32, 48),
    "few-tasks": ((24, 3), 2, 16, 2, 4, 32, 48),
}


def peft_layer(tasks, skills, splits, rank, d, h):
    layers = pytest.importorskip("peft.tuners.poly.layer", reason="peft is not installed")
    config = pytest.importorskip("peft").PolyConfig(
        r=rank, n_tasks=tasks, n_skills=skills, n_splits=splits, init_weights=False
    )
    layer = layers.Linear(torch.nn.Linear(d, h), "default", config)
    torch.nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer


def assert_same(actual, expected):
    """Equal to 1e-6 of the largest element: what is left of float32 after sums of other orders."""
    error = float((actual - expected).detach().abs().max())
    largest = float(expected.detach().abs().max())
    assert error <= 1e-6 * largest, f"differs by {error / largest:.1e} of {largest:.3e}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("case", PEFT_LAYERS.values(), ids=PEFT_LAYERS)
def test_equals_the_layer_of_peft(case, training):
    lead, tasks, *sizes = case
    layer = peft_layer(tasks, *sizes).train(training)
    router = layer.poly_router["default"]
    theirs = (router.module_logits, layer.poly_lora_A["default"], layer.poly_lora_B["default"])
    task_ids = torch.randint(tasks, lead[:1])
    x = torch.randn(*lead, sizes[3], requires_grad=True)
    grad_out = torch.randn(*lead, sizes[4])

    torch.manual_seed(1)
    expected = layer(x, task_ids=task_ids)
    expected_grads = torch.autograd.grad(expected, (x, *theirs), grad_out)

    torch.manual_seed(1)
    if training:  # a sample of its own for every sequence, the same in both
        mixing, ids = router(task_ids, x), None
    else:
        mixing, ids = router(torch.arange(tasks), x), task_ids
    logits, lora_a, lora_b = theirs
    out = skill_mixture(
        x, mixing, lora_a.transpose(2, 3), lora_b,
        task_ids=ids, base=layer.base_layer(x), scale=1 / sizes[2],
    )  # fmt: skip
    grads = torch.autograd.grad(out, (x, logits, lora_a, lora_b), grad_out)
    assert_same(out, expected)
    for actual, exact in zip(grads, expected_grads, strict=True):
        assert_same(actual, exact)
