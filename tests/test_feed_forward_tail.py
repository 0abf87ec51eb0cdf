"""The modules at `wo` against the published formulas, written out with a loop, in float64."""

import pytest
import torch
import torch.nn.functional as F
from t5_factory import pemt_config, randomise, tiny_t5

import pemt_fast
from pemt_fast.nn.gates import pool_in_passing, pool_prompt
from pemt_fast.nn.routing import RoutingState

B, S, P = 3, 9, 5


def published_tail(tail, h, residual, query, bottleneck):
    """Output, gate and loss as the published code computes them: every expert's output stacked."""
    gate = torch.softmax(query @ tail.gate.w_gate, -1)  # [B, E]
    mixture, outputs = tail.mixture, []
    for e in range(len(mixture.ranks)):
        rows = mixture.rows(e)
        z = h @ mixture.w_down[rows].t()
        if bottleneck:
            z = F.gelu(z + mixture.b_down[rows], approximate="tanh")
        y = z @ mixture.w_up[rows]
        outputs.append(y + mixture.b_up[e] + residual if bottleneck else y)
    stacked = torch.stack(outputs, 3)  # [B, S, H, E]
    y = F.linear(h, tail.base.weight) + (stacked @ gate[:, None, :, None]).squeeze(-1)
    adapter = tail.target_adapter
    z = y + adapter.up(F.gelu(adapter.down(y), approximate="tanh"))
    cosine = F.cosine_similarity(z.flatten(0, 1)[None], torch.stack(outputs).flatten(1, 2), dim=2)
    loss = ((1 - cosine.mean(1)) * gate.mean(0)).sum()
    return z, gate, loss


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_mixture_tail(kind, ranks, stack):
    t5 = tiny_t5().double()
    model = randomise(pemt_fast.get_model(t5, pemt_config(source_kind=kind, source_ranks=ranks)))
    block = getattr(model.base_model, stack).block[0]
    feed_forward = block.layer[-1].DenseReluDense
    tail = feed_forward.wo
    for bias in (tail.mixture.b_down, tail.mixture.b_up):
        if bias is not None:
            torch.nn.init.normal_(bias)
    encoder = torch.randn(B, S, 32, dtype=torch.float64)
    x = torch.randn(B, S, 32, dtype=torch.float64, requires_grad=True)
    state = RoutingState(wants_loss=True)
    state.see_encoder(encoder, P)
    with model.routing.use(state):
        actual = feed_forward(x)
    h = torch.relu(feed_forward.wi(x))
    query = h[:, :P].mean(1) if stack == "encoder" else encoder[:, :P].mean(1)
    expected, gate, loss = published_tail(tail, h, x, query, kind == "bottleneck")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.gates[f"{stack}.0"], gate, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.losses[f"{stack}.0"], loss, rtol=1e-11, atol=1e-12)

    trained = [p for p in tail.parameters() if p.requires_grad]
    wanted = [x, *trained]
    weight = torch.randn_like(actual)
    total = (actual * weight).sum() + state.losses[f"{stack}.0"]
    published = (expected * weight).sum() + loss
    for mine, theirs in zip(
        torch.autograd.grad(total, wanted), torch.autograd.grad(published, wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_source_tail(kind):
    config = pemt_config(stage=1, sources=(), source_prompt_lengths=None, source_kind=kind)
    model = randomise(pemt_fast.get_model(tiny_t5().double(), config))
    feed_forward = model.base_model.encoder.block[1].layer[1].DenseReluDense
    tail = feed_forward.wo
    x = torch.randn(B, S, 32, dtype=torch.float64)
    with model.routing.use(RoutingState()):
        actual = feed_forward(x)
    h = torch.relu(feed_forward.wi(x))
    hidden = tail.adapter.down(h)
    if kind == "bottleneck":
        hidden = F.gelu(hidden, approximate="tanh")
    expected = F.linear(h, tail.base.weight) + tail.adapter.up(hidden)
    expected = expected + x if kind == "bottleneck" else expected
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_correlation_prompt_uses_dropout_in_training_only():
    model = randomise(pemt_fast.get_model(tiny_t5(), pemt_config()))
    prompt = model.prompt.eval()
    expected = prompt.prompt + sum(
        torch.softmax(prompt.prompt @ s.t(), -1) @ s for s in prompt.sources
    )
    torch.testing.assert_close(prompt(), expected)
    prompt.train()
    assert not torch.allclose(prompt(), expected)
    prompt.dropout = 0.0
    torch.testing.assert_close(prompt(), expected)


def elements_kept(function, without):
    """Elements that autograd keeps for the backward of `function`, but for tensors of `without`."""
    known = {t.untyped_storage().data_ptr() for t in without}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (
                tensor.numel(),
                storage,
            )  # alive, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = function()
    assert results is not None
    return sum(count for count, _ in kept.values())


def test_what_a_layer_keeps_for_backward():
    tokens, width, units, bottleneck, experts = 8 * 64, 96, 6 * 8, 6, 6
    model = randomise(
        pemt_fast.get_model(
            wide_t5(width, 4 * width),
            pemt_config(
                sources=list("abcdef"), source_prompt_lengths=None, source_rank=8,
                target_bottleneck=bottleneck,
            ),
        )
    )  # fmt: skip
    tail = model.base_model.encoder.block[0].layer[-1].DenseReluDense.wo
    h = torch.randn(8, 64, 4 * width, requires_grad=True)
    state = RoutingState(wants_loss=True)

    def ours():
        with model.routing.use(state):
            return tail(h), state.losses["encoder.0"]

    own = [h, *tail.parameters()]
    kept = elements_kept(ours, own)
    least = tokens * (2 * width + 2 * units + bottleneck)
    assert least <= kept <= least + 8 * 4 * width + 4 * 8 * experts + tokens
    tail.recompute = True
    kept_less = elements_kept(ours, own)
    least = tokens * (width + units)
    assert least <= kept_less <= least + 8 * 4 * width + 4 * 8 * experts + tokens
    query = h[:, :P].mean(1)
    published = elements_kept(lambda: published_tail(tail, h, None, query, False), own)
    assert published > tokens * 3 * experts * width > 5 * kept


def wide_t5(d_model, d_ff):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=d_model, d_kv=8, d_ff=d_ff, num_layers=1, num_decoder_layers=1,
        num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gate_costs_no_pass_over_all_positions(dtype, masked):
    x = torch.randn(3, 9, 8).to(dtype).requires_grad_()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool() if masked else None
    weight, d_out = torch.randn(5, 8).to(dtype), torch.randn(3, 9, 5).to(dtype)
    passed, pooled = pool_in_passing(x, 4, mask)
    out = torch.nn.functional.linear(passed, weight)
    given = []
    passed.register_hook(lambda grad: given.append(grad.data_ptr()))
    d_pooled = torch.randn_like(pooled)
    (found,) = torch.autograd.grad([out, pooled], [x], [d_out, d_pooled])
    expected_pooled = pool_prompt(x, 4, mask)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=0)
    out = torch.nn.functional.linear(x, weight)
    (expected,) = torch.autograd.grad([out, expected_pooled], [x], [d_out, d_pooled])
    torch.testing.assert_close(found, expected)
    if masked:
        torch.testing.assert_close(expected_pooled[2], x[2, 3].to(expected_pooled.dtype))
    # Not copied: the gradient of the matmul is the one that comes out.
    assert given == [found.data_ptr()]
