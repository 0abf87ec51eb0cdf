"""`task_sparsity_loss` against the published form, which builds every adapter's output.

What only a kernel can get wrong is in `test_sparsity_rows.py`.
"""

import pytest
import torch
from implementations import CPU, IMPLS
from torch._dynamo.testing import CompileCounterWithBackend

from pemt_fast.ops import task_sparsity_loss
from pemt_fast.testing import LargestTensor

B, S, E, H = 3, 5, 4, 11


def published(z, gate, hidden, w_up, b_up=None, *, residual=None, mask=None, ranks):
    """`Σ_e mean_b(gate) · (1 − mean_t cos(z, m_e))` with `m [B, S, E, H]` written out."""
    m = torch.stack(
        [h @ w for h, w in zip(hidden.split(ranks, -1), w_up.split(ranks), strict=True)], dim=-2
    )
    if b_up is not None:
        m = m + b_up
    if residual is not None:
        m = m + residual.unsqueeze(-2)
    cosine = torch.nn.functional.cosine_similarity(z.unsqueeze(-2), m, dim=-1)  # [B, S, E]
    tokens = cosine.flatten(0, 1) if mask is None else cosine[mask]
    return (gate.mean(0) * (1 - tokens.mean(0))).sum()


def arguments(ranks=(3, 3, 3, 3), *, b_up=False, residual=False, mask=False, dtype=torch.float64):
    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    tokens = (B, S)
    return {
        "z": leaf(*tokens, H),
        "gate": torch.randn(B, E, dtype=torch.float64).softmax(-1).to(dtype).requires_grad_(),
        "hidden": leaf(*tokens, sum(ranks)),
        "w_up": leaf(sum(ranks), H, scale=3**-0.5),
        "b_up": leaf(E, H) if b_up else None,
        "residual": leaf(*tokens, H) if residual else None,
        "mask": torch.arange(S) < torch.tensor([[5], [2], [3]]) if mask else None,
        "ranks": ranks,
    }


def run(function, keywords, **options):
    loss = function(**keywords, **options)
    leaves = {
        name: tensor
        for name, tensor in keywords.items()
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad
    }
    grads = torch.autograd.grad(loss, tuple(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 4, 2, 5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "mask"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("b_up", [False, True], ids=["", "bias"])
def test_equals_the_published_form(b_up, residual, mask, ranks):
    keywords = arguments(ranks, b_up=b_up, residual=residual, mask=mask)
    actual, expected = run(task_sparsity_loss, keywords), run(published, keywords)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 4, 2, 5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "bias-residual-mask"])
@pytest.mark.parametrize("impl", IMPLS)
def test_float32(impl, extras, ranks):
    keywords = arguments(ranks, b_up=extras, residual=extras, mask=extras, dtype=torch.float32)
    double = {
        name: value.detach().double().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in keywords.items()
    }
    actual, expected = run(task_sparsity_loss, keywords, impl=impl), run(published, double)
    assert actual["loss"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual["loss"].double(), expected["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_returns_float32(impl, dtype):
    keywords = arguments(b_up=True, residual=True, dtype=dtype)
    loss = task_sparsity_loss(**keywords, impl=impl)
    assert loss.dtype == torch.float32
    # A cosine is a sum of products that were rounded once each.
    expected = published(
        **{k: v.double() if torch.is_tensor(v) else v for k, v in keywords.items()}
    )
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_the_mask_excludes_padding():
    keywords = arguments(b_up=True, residual=True, mask=True)
    expected = run(task_sparsity_loss, keywords)
    padding = ~keywords["mask"]
    for name in ("z", "hidden", "residual"):
        changed = keywords[name].detach().clone()
        changed[padding] = 100 * torch.randn_like(changed[padding])
        keywords[name] = changed.requires_grad_()
    actual = run(task_sparsity_loss, keywords)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert not actual["z"][padding].any()


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "bias-residual"])
def test_all_masked_is_zero_with_zero_gradients(extras):
    keywords = arguments(b_up=extras, residual=extras)
    keywords["mask"] = torch.zeros(B, S, dtype=torch.bool)
    for name, value in run(task_sparsity_loss, keywords).items():
        assert not value.any(), name


@pytest.mark.parametrize("mask", [False, True], ids=["no-mask", "mask"])
def test_no_tokens_is_zero(mask):
    keywords = arguments()
    for name in ("z", "hidden"):
        keywords[name] = keywords[name][:, :0]
    keywords["mask"] = torch.zeros(B, 0, dtype=torch.bool) if mask else None
    assert task_sparsity_loss(**keywords) == 0


@pytest.mark.parametrize("name", ["z", "hidden", "w_up"])
def test_zero_vectors_have_finite_gradients(name):
    keywords = arguments()
    keywords[name] = torch.zeros_like(keywords[name]).requires_grad_()
    actual = run(task_sparsity_loss, keywords)
    assert all(bool(value.isfinite().all()) for value in actual.values())
    torch.testing.assert_close(actual["loss"], published(**keywords).detach())


def test_adapters_that_agree_cost_nothing():
    keywords = arguments()
    shared = torch.randn(3, H, dtype=torch.float64)
    keywords["w_up"] = shared.repeat(E, 1)
    keywords["hidden"] = torch.randn(B, S, 3, dtype=torch.float64).repeat(1, 1, E)
    keywords["z"] = 7 * keywords["hidden"][..., :3] @ shared
    loss = task_sparsity_loss(**keywords)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2,) * 32, (1, 3) * 16], ids=["equal", "unequal"])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "bias-residual"])
def test_no_adapter_output_is_built(extras, ranks):
    batch, tokens, width, experts = 2, 16, 48, len(ranks)

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    keywords = {
        "z": leaf(batch, tokens, width),
        "gate": leaf(batch, experts),
        "hidden": leaf(batch, tokens, sum(ranks)),
        "w_up": leaf(sum(ranks), width),
        "b_up": leaf(experts, width) if extras else None,
        "residual": leaf(batch, tokens, width) if extras else None,
        "ranks": ranks,
    }
    with LargestTensor() as largest:
        run(task_sparsity_loss, keywords)
    # The largest are w_up [N, H] and its like.
    assert largest.elements <= sum(ranks) * width
    assert largest.elements < batch * tokens * experts * width / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("impl", ["torch", CPU])
def test_low_precision_gradients_do_not_underflow(impl, dtype):
    """With the loss scaled as for float16 training they are as exact as the dtype."""
    tokens, width, ranks = 1024, 32, (4, 4)
    torch.manual_seed(1)
    double = {
        "z": torch.randn(1, tokens, width) * 8, "gate": torch.tensor([[0.7, 0.3]]),
        "hidden": torch.randn(1, tokens, 8), "w_up": torch.randn(8, width) / 2,
    }  # fmt: skip
    low = {name: value.to(dtype).requires_grad_() for name, value in double.items()}
    double = {name: value.detach().double().requires_grad_() for name, value in low.items()}
    scale = 4096.0
    (scale * task_sparsity_loss(**low, ranks=ranks, impl=impl)).backward()
    (scale * published(**double, ranks=ranks)).backward()
    for name in ("z", "hidden", "gate"):
        exact, found = double[name].grad, low[name].grad.double()
        assert found.dtype == torch.float64 and low[name].grad.dtype == dtype
        error = float((found - exact).norm() / exact.norm())
        assert error < 3 * torch.finfo(dtype).eps, name


def test_registered_operator():
    keywords = arguments((1, 4, 2, 5), b_up=True, residual=True, mask=True)
    names = ("z", "gate", "hidden", "w_up", "b_up", "residual", "mask", "ranks")
    call = (*(keywords[name] for name in names), "torch")
    torch.library.opcheck(torch.ops.pemt_fast.task_sparsity_loss.default, call)
    needs = (True, True, False, True, False, True)
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in call)
    torch.library.opcheck(
        torch.ops.pemt_fast.task_sparsity_loss_gradients.default, (*detached, needs)
    )


def test_gradients_are_what_finite_differences_say():
    keywords = arguments((1, 4, 2, 5), b_up=True, residual=True, mask=True)
    names = ("z", "gate", "hidden", "w_up", "b_up", "residual")

    def function(z, gate, hidden, w_up, b_up, residual):
        return task_sparsity_loss(
            z, gate, hidden, w_up, b_up, residual=residual, mask=keywords["mask"],
            ranks=keywords["ranks"],
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(keywords[name] for name in names))


@pytest.mark.parametrize("names", [("z",), ("gate", "hidden"), ("residual", "b_up"), ("w_up",)])
def test_only_what_is_asked_for(names):
    keywords = arguments(b_up=True, residual=True)
    expected = run(task_sparsity_loss, keywords)
    for name, value in keywords.items():
        if isinstance(value, torch.Tensor) and name not in names:
            keywords[name] = value.detach()
    actual = run(task_sparsity_loss, keywords)
    assert set(actual) == {"loss", *names}
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_backward_keeps_only_gradients():
    keywords = arguments()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        task_sparsity_loss(**keywords)
    sizes = {tuple(t.shape) for t in kept}
    assert sizes == {(), (B, S, H), (B, E), (B, S, 12), (12, H)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(B, S, 5)}, r"hidden must be \[\.\.\., N\] = \[3, 5, 12\]"),
        ({"w_up": torch.zeros(12, 3)}, r"w_up must be \[N, H\] = \[12, 11\], got \[12, 3\]"),
        ({"b_up": torch.zeros(2, 3)}, r"b_up must be \[E, H\] = \[4, 11\], got \[2, 3\]"),
        ({"residual": torch.zeros(2, 3)}, r"residual must be"),
        ({"mask": torch.ones(2, 3)}, r"mask must be \[\.\.\.\] = \[3, 5\], got \[2, 3\]"),
        ({"gate": torch.zeros(B, 3)}, r"gate must be \[B, E\] with E = 4, got \[3, 3\]"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        task_sparsity_loss(**arguments() | change)


def test_compiles_as_one_graph_for_all_numbers_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(task_sparsity_loss, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for tokens in (5, 4, 3, 2):
        keywords = arguments(b_up=True, residual=True, mask=True, dtype=torch.float32)
        for name in ("z", "hidden", "residual", "mask"):
            cut = keywords[name].detach()[:, :tokens].contiguous()
            keywords[name] = cut.requires_grad_(name != "mask")
        torch.testing.assert_close(run(compiled, keywords), run(task_sparsity_loss, keywords))
        graphs.append(counter.frame_count)
    # The second number of tokens may tell the compiler that they vary.
    assert graphs[-1] == graphs[1]
