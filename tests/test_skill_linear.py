"""`skill_mixture` with a linear layer in the place of the base; layers whose operator has one."""

import pytest
import torch
from implementations import CPU, WIDEST
from linear_models import adapted, tiny_inputs
from skill_inputs import assert_matches_oracle, make_skills

from pemt_fast.ops.skill_mixture import skill_mixture
from pemt_fast.testing import poisoned_empty

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITWISE = {"rtol": 0, "atol": 0}
OPS = torch.ops.pemt_fast
MIXED = [1, 0, 2, 1]
# One sequence, one row for all, splits, factors of tasks, long enough to be packed and shared.
CASES = {
    "B3-S21": ((3, 21), {}),
    "B3-S21-one-row": ((3, 21), {"M": 1, "ids": None}),
    "B5-S9-P4": ((5, 9), {"M": 2, "P": 4, "layout": "transposed"}),
    "B5-S9-factors": ((5, 9), {"M": 3, "mixes": False, "param_layout": "sliced"}),
    "B2-S300": ((2, 300), {"K": 3, "layout": "sliced"}),
    "B7": ((7,), {"bias": False}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(params=["torch", CPU])
def impl(request):
    return request.param


def with_linear(case, **changes):
    lead, sizes = case
    return make_skills(*lead, **{**sizes, "linear": True, **changes})


@every_case
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_within_the_error_budget(threads, dtype, case, impl):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert_matches_oracle(lambda seed: with_linear(case, dtype=dtype, seed=seed), impl=impl)
    torch.set_num_threads(before)


@every_case
def test_is_the_linear_as_base(case, impl):
    inputs = with_linear(case, dtype=WIDEST[impl])

    def beside(*args, weight, bias, base, **options):
        base = torch.nn.functional.linear(args[0], weight, bias)
        return skill_mixture(*args, base=base, **options)

    torch.testing.assert_close(
        inputs.gradients(impl=impl), inputs.gradients(beside, impl=impl), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("requires_grad", "keeps"),
    [
        (("x",), {"weight"}),
        (("weight",), {"x"}),
        (("bias",), set()),
        (("a",), {"x"}),
        (("b",), {"hidden"}),
        (("x", "b"), {"weight", "hidden"}),
        (("mixing", "weight"), {"x", "hidden"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_each_gradient_on_its_own(requires_grad, keeps, impl):
    case, dtype = CASES["B5-S9-P4"], WIDEST[impl]
    exact = with_linear(case, dtype=dtype).gradients(impl=impl)
    inputs = with_linear(case, dtype=dtype, requires_grad=requires_grad)
    names = {t.data_ptr(): name for name, t in inputs.tensors().items()}
    names[inputs.task_ids.data_ptr()] = "task_ids"
    kept = set()

    def pack(tensor):
        kept.add(names.get(tensor.data_ptr(), "hidden"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = inputs.call(impl=impl)
    assert kept - {"mixing", "a", "b", "task_ids"} == keeps
    out.backward(inputs.grad_out)
    for name, tensor in inputs.tensors().items():
        if name in requires_grad:
            torch.testing.assert_close(tensor.grad, exact[f"d_{name}"], rtol=1e-5, atol=1e-6)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@every_case
def test_nothing_else_is_written_to(case, requires_grad, impl):
    inputs = with_linear(case, requires_grad=requires_grad)
    named = {**inputs.tensors(), "grad_out": inputs.grad_out}
    before = {name: t.detach().clone() for name, t in named.items()}
    out = inputs.call(impl=impl)
    assert out.is_contiguous()
    assert not out._is_view()
    assert out.untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in named.values()
    }
    if requires_grad:
        out.backward(inputs.grad_out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named.items())


@pytest.mark.parametrize("lead", [(0, 5), (3, 0)], ids=str)
def test_no_tokens(lead, impl):
    inputs = make_skills(*lead, linear=True)
    results = inputs.gradients(impl=impl)
    assert results["out"].shape == (*lead, 96)
    for name, tensor in inputs.tensors().items():
        torch.testing.assert_close(results[f"d_{name}"], torch.zeros_like(tensor))


def test_autocast_casts_the_linear_too(impl):
    inputs = make_skills(4, 7, linear=True)
    names = ("x", "weight", "bias")
    cast = inputs.replace(**{n: getattr(inputs, n).detach().bfloat16() for n in names})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = inputs.call(impl=impl)
        out.backward(inputs.grad_out.bfloat16())
    torch.testing.assert_close(out, cast.call(impl=impl), **BITWISE)
    assert inputs.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "all"])
def test_registered_and_compiled(requires_grad, impl):
    inputs = make_skills(4, 3, M=3, K=5, R=2, D=8, H=12, linear=True, requires_grad=requires_grad)
    arguments = (
        inputs.x, inputs.mixing, inputs.a, inputs.b, inputs.task_ids, None, inputs.scale, impl,
    )  # fmt: skip
    linear = {"weight": inputs.weight, "bias": inputs.bias}
    torch.library.opcheck(OPS.skill_mixture.default, arguments, linear)
    function = torch.compile(skill_mixture, fullgraph=True, backend="aot_eager")
    run = inputs.gradients if requires_grad else inputs.call
    torch.testing.assert_close(run(function, impl=impl), run(impl=impl), **BITWISE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(96, 61)}, r"weight must be \[H, D\] = \[96, 60\], got \[96, 61\]"),
        ({"bias": torch.zeros(95)}, r"bias must be \[H\] = \[96\], got \[95\]"),
        ({"weight": None}, "bias must be None when weight is: it belongs to the linear"),
        ({"base": torch.zeros(2, 3, 96)}, "base must be None when weight is given: the linear"),
        ({"weight": torch.zeros(96, 60, device="meta")}, "weight must be on cpu, the device of x"),
    ],
)
def test_rules(changes, message):
    inputs = make_skills(2, 3, linear=True, requires_grad=False)
    named = {**inputs.tensors(), "task_ids": inputs.task_ids, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        skill_mixture(**named)


# --- layers --------------------------------------------------------------------------------------

LAYERS = (
    "poly", "mhr", "c-poly-average", "mtl-lora", "lora", "multi-lora", "moe-lora", "c-poly",
)  # fmt: skip


def queries(model):
    return next(layer for name, layer in model.adapted_layers().items() if name.endswith(".q"))


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_with_hooks_is_called(method):
    model, inputs = adapted(method), tiny_inputs("t5")
    expected = model(**inputs, task_ids=MIXED).logits
    calls = []
    base = queries(model).base
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    found = model(**inputs, task_ids=MIXED).logits
    assert calls == [1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    base.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(model(**inputs, task_ids=MIXED).logits, expected)


@pytest.mark.parametrize("method", LAYERS)
def test_a_layer_of_another_class_is_called(method):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, inputs = adapted(method), tiny_inputs("t5")
    layer = queries(model)
    doubled = Doubled(*layer.base.weight.shape[::-1], bias=False)
    doubled.weight.data = layer.base.weight.detach() / 2
    expected = model(**inputs, task_ids=MIXED).logits
    layer.base = doubled
    torch.testing.assert_close(
        model(**inputs, task_ids=MIXED).logits, expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", LAYERS)
def test_dropout_is_before_the_adapters_only(method):
    model, inputs = adapted(method, dropout=1 - 1e-9).train(), tiny_inputs("t5")
    with model.disabled():
        expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, task_ids=MIXED).logits, expected)


@pytest.mark.parametrize("method", LAYERS)
def test_the_bias_of_a_layer_stays(method):
    model, inputs = adapted(method), tiny_inputs("t5")
    base = queries(model).base
    without = model(**inputs, task_ids=MIXED).logits
    base.bias = torch.nn.Parameter(torch.randn(base.out_features))
    found = model(**inputs, task_ids=MIXED).logits
    base.register_forward_hook(lambda *_: None)  # by itself
    expected = model(**inputs, task_ids=MIXED).logits
    assert not torch.allclose(expected, without)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
