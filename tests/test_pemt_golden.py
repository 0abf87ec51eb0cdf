"""Parity with the published PEMT implementation: outputs, gates, losses, every gradient, tokens.

The cases under `tests/golden/pemt` were produced by the authors' code (see their `meta.json`).
"""

import pytest
import torch
from golden_cases import CASES, load_case
from transformers import T5ForConditionalGeneration

import pemt_fast
from pemt_fast.nn.feed_forward_tail import MixtureTail
from pemt_fast.nn.stacking import is_stacked

# Of golden/README.md. Float64: transformers keeps float32 inside the layer norms and the softmax.
TOLERANCE = {
    torch.float32: {"hidden": 2e-5, "output": 5e-6, "gradient": 1e-6},
    torch.float64: {"hidden": 3e-6, "output": 3e-6, "gradient": 5e-8},
}


# Ways through a feed-forward tail: `auto` is the C++ kernels where they are built, `stacked` one
# matmul for wo and the down-projections, `recompute` target adapter and loss computed twice.
WAYS = ("auto", "stacked", "recompute")


def take(model, way):
    for module in model.modules():
        if way == "stacked" and hasattr(module, "impl"):
            module.impl = "torch"
        if way == "recompute" and hasattr(module, "recompute"):
            module.recompute = True
    for tail in (m for m in model.modules() if isinstance(m, MixtureTail)):
        tail.stack()
        if way == "stacked":
            assert is_stacked(tail.base, tail.mixture)


@pytest.fixture(
    scope="module", params=[(c, d, w) for c in CASES for d in TOLERANCE for w in WAYS], ids=str
)
def run(request):
    case, dtype, way = request.param
    model, meta, inputs, reference = load_case(case, dtype)
    take(model, way)
    out = model(**inputs, output_gates=True, output_hidden_states=True)
    out.loss.backward()
    return model, meta, reference, out, TOLERANCE[dtype]


def assert_close(actual, expected, bound):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=bound)


def test_outputs(run):
    model, _, reference, out, bound = run
    assert_close(out.logits, reference["logits"], bound["output"])
    assert_close(out.loss, reference["total_loss"], bound["output"])
    assert_close(model.prompt(), reference["correlation_prompt"], bound["output"])
    encoder = reference["encoder_last_hidden_state"]
    assert_close(out.encoder_last_hidden_state, encoder, bound["hidden"])


def test_block_outputs(run):
    _, _, reference, out, bound = run
    # The last hidden state that transformers records is the one after the final layer norm.
    for stack, states in (
        ("encoder", out.encoder_hidden_states),
        ("decoder", out.decoder_hidden_states),
    ):
        for i, state in enumerate(states[1:-1]):
            assert_close(state, reference[f"block_output.{stack}.{i}"], bound["hidden"])


def test_gates_and_sparsity_loss(run):
    _, meta, reference, out, bound = run
    if meta["stage"] == 1:
        assert out.aux_loss is None and not out.gates
        return
    assert sorted(out.gates) == sorted(k[5:] for k in reference if k.startswith("gate."))
    for name, gate in out.gates.items():
        # The gate's softmax is never below float32, also inside a float64 model.
        assert_close(gate, reference[f"gate.{name}"], bound["output"])
    assert_close(out.aux_loss, reference["moe_loss"], bound["output"])


def test_gradients(run):
    model, meta, reference, _, bound = run
    names = pemt_fast.published_names(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert names.keys() == trained.keys()
    assert sorted(names.values()) == sorted(meta["trainable_parameters"])
    for ours, theirs in names.items():
        expected = reference[f"grad.{theirs}"]
        assert trained[ours].grad.shape == expected.shape
        error = (trained[ours].grad - expected).abs().max().item()
        assert error <= bound["gradient"], (theirs, error)
        assert error <= 1e-5 * expected.abs().max().item(), (theirs, error)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case):
    model, meta, inputs, reference = load_case(case)
    length = meta["generate_max_length"]
    tokens = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=length
    )
    expected = reference["generated_ids"]
    padded = torch.nn.functional.pad(tokens, (0, expected.shape[1] - tokens.shape[1]))
    assert torch.equal(padded, expected)


@pytest.mark.parametrize("case", CASES)
def test_unload_gives_back_the_plain_model(case):
    model, _, inputs, reference = load_case(case)
    plain = model.unload()
    assert isinstance(plain, T5ForConditionalGeneration)
    assert_close(plain(**inputs).logits, reference["plain_logits"], 5e-6)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_every_implementation_reproduces_the_loss(impl):
    model, _, inputs, reference = load_case("A")
    for module in model.modules():
        if hasattr(module, "impl"):
            module.impl = impl
    assert_close(model(**inputs).loss, reference["total_loss"], 5e-6)
