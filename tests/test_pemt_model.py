"""The wrapped model: forward, generate, checkpointing, compile, unload; on tiny random T5s."""

import copy

import pytest
import torch
from golden_cases import load_case
from t5_factory import D_FF, D_MODEL, pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast

VARIANTS = {
    "relu": {},
    "gated": {"t5": {"gated": True}},
    "mt5": {"t5": {"mt5": True}},
    "bottleneck": {"source_kind": "bottleneck"},
    "unequal-ranks": {"source_ranks": (2, 5, 3)},
    "one-source": {"sources": ["a"], "source_prompt_lengths": (3,)},
    "published": {"published": True},
    "stage-1": {"stage": 1, "sources": (), "source_prompt_lengths": None},
    "stage-1-bottleneck": {
        "stage": 1, "sources": (), "source_prompt_lengths": None, "source_kind": "bottleneck",
    },
}  # fmt: skip


def build(variant: str = "relu", **changes):
    changes = {**VARIANTS[variant], **changes}
    t5 = tiny_t5(**changes.pop("t5", {}))
    return randomise(pemt_fast.get_model(t5, pemt_config(**changes)))


def first_wo(model):
    return model.base_model.encoder.block[0].layer[1].DenseReluDense.wo


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, batch, **kwargs):
    model.zero_grad()
    out = model(**batch, **kwargs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in trained(model).items()}


def assert_same(actual, expected, rtol=1e-5, atol=1e-7):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_that_should_train_gets_a_gradient(variant):
    model = build(variant)
    out, grads = gradients(model, tiny_batch(), output_gates=True)
    assert torch.isfinite(out.loss)
    assert all(g.abs().max() > 0 for g in grads.values())
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert any("wo.base" in n for n in frozen)
    stage_one = variant.startswith("stage-1")
    assert any("layer_norm" in n for n in grads) != stage_one
    assert any("mixture" in n for n in frozen) != stage_one


@pytest.mark.parametrize("variant", ["relu", "gated", "mt5", "bottleneck", "unequal-ranks"])
def test_gates_are_per_sequence_and_sum_to_one(variant):
    model, batch = build(variant), tiny_batch()
    gates = model(**batch, output_gates=True).gates
    assert list(gates) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    for gate in gates.values():
        assert gate.shape == (3, 3)
        torch.testing.assert_close(gate.sum(1), torch.ones(3))
        assert not torch.allclose(gate[0], gate[1])
    assert model(**batch).gates is None


def test_trainable_parameters_match_the_paper():
    """Stage 2 on T5-base, six sources, a prompt of 25: counts from the published shapes."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, vocab_size=32128,
        decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(config)
    six = ["mnli", "qnli", "qqp", "sst2", "squad", "record"]
    plan = pemt_fast.PemtConfig(sources=six, target="cb", prompt_length=25, prompt_init="normal")
    with torch.device("meta"):
        model = pemt_fast.get_model(t5, plan)
    sizes = {n: p.numel() for n, p in trained(model).items()}
    assert sum(v for n, v in sizes.items() if "gate" in n) == 276_480
    assert sum(v for n, v in sizes.items() if "target_adapter" in n) == 1_789_056
    assert sum(v for n, v in sizes.items() if "layer_norm" in n) == 47_616
    assert model.count_parameters()[0] == 276_480 + 1_789_056 + 47_616 + 25 * 768


@pytest.mark.parametrize("variant", ["relu", "bottleneck", "stage-1"])
@pytest.mark.parametrize("enabled_on", ["wrapper", "t5"])
def test_gradient_checkpointing_changes_nothing(variant, enabled_on):
    model, batch = build(variant).train(), tiny_batch()
    model.prompt.dropout = 0.0
    expected_out, expected = gradients(model, batch)
    if enabled_on == "wrapper":
        model.gradient_checkpointing_enable()
    else:
        model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    out = model(**batch)
    # A second forward with other masks must not disturb the recomputation of the first.
    model(**tiny_batch(batch=2, source=9, seed=7))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected_out.loss)
    assert_same({n: p.grad for n, p in trained(model).items()}, expected)


def test_reentrant_checkpointing_is_refused():
    model = build().train()
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradient"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base_model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradient"):
        model(**tiny_batch())


@pytest.mark.parametrize("variant", ["relu", "bottleneck", "stage-1"])
def test_compiles_to_one_graph(variant):
    model, batch = build(variant), tiny_batch()
    expected_out, expected = gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(**batch, output_gates=True)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected_out.loss)
    assert_same({n: p.grad for n, p in trained(model).items()}, expected)
    assert bool(out.gates) == (variant != "stage-1")


def test_padding_counts_only_when_published():
    for published in (False, True):
        model, batch = build(published=published), tiny_batch()
        longer = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4)),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
            "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
        }
        with torch.no_grad():
            same = torch.allclose(model(**batch).aux_loss, model(**longer).aux_loss, atol=1e-6)
        assert same != published


def test_batch_of_one_equals_its_row():
    model, batch = build(), tiny_batch()
    whole = model(**batch)
    for row in range(3):
        one = model(**{k: v[row : row + 1] for k, v in batch.items()})
        torch.testing.assert_close(one.logits[0], whole.logits[row], rtol=1e-5, atol=1e-6)


def test_generate_beams_and_batch_of_one():
    model, meta, inputs, _ = load_case("A")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for beams in (1, 4):
        options = {"num_beams": beams, "max_length": 12}
        whole = model.generate(ids, mask, **options)
        assert whole[:, 1:].unique().numel() > 3
        for row in range(len(ids)):
            alone = model.generate(ids[row : row + 1], mask[row : row + 1], **options)[0]
            assert torch.equal(alone, whole[row, : len(alone)])
            assert not whole[row, len(alone) :].any()


def test_generate_equals_stepwise_forward():
    """Without a cache and with everything recomputed, greedy decoding gives the same tokens."""
    model, _, inputs, _ = load_case("A")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = model.generate(ids, mask, max_length=7, min_length=7)
    decoded = torch.zeros(len(ids), 1, dtype=torch.long)
    for _ in range(6):
        logits = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=decoded, use_cache=False
        ).logits[:, -1]
        logits[:, 1] = float("-inf")  # min_length forbids the end token
        decoded = torch.cat([decoded, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(decoded, tokens)


def test_generate_finds_padding_and_computes_decoder_gates_once():
    model, _, inputs, _ = load_case("A")
    calls = []
    for block in model.base_model.decoder.block:
        gate = block.layer[-1].DenseReluDense.wo.gate
        gate.register_forward_hook(lambda *_: calls.append(1))
    with_mask = model.generate(inputs["input_ids"], inputs["attention_mask"], max_length=12)
    assert len(calls) == len(model.base_model.decoder.block)
    assert torch.equal(model.generate(inputs["input_ids"], max_length=12), with_mask)


def test_encoder_outputs_are_reused():
    model, batch = build(), tiny_batch()
    first = model(**batch)
    encoder = (first.encoder_last_hidden_state,)
    labels, mask = batch["labels"], batch["attention_mask"]
    again = model(encoder_outputs=encoder, attention_mask=mask, labels=labels)
    torch.testing.assert_close(again.logits, first.logits)


def test_outputs_of_t5_are_still_recorded():
    out = build()(**tiny_batch(), output_hidden_states=True)
    assert len(out.encoder_hidden_states) == 3 and len(out.decoder_hidden_states) == 3
    assert isinstance(build()(**tiny_batch(), return_dict=False), tuple)


def test_disabled_and_unload_give_the_untouched_model():
    untouched, batch = tiny_t5(), tiny_batch()
    expected = untouched(**batch).logits
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    t5 = tiny_t5()
    objects = {n: id(p) for n, p in t5.named_parameters()}
    t5.shared.weight.requires_grad_(False)
    model = randomise(pemt_fast.get_model(t5, pemt_config()))
    assert not torch.allclose(model(**batch).logits, expected)
    with model.disabled():
        torch.testing.assert_close(model(**batch).logits, expected)
    assert not torch.allclose(model(**batch).logits, expected)
    restored = model.unload()
    assert restored is t5 and not hasattr(t5, "_pemt_fast_attached")
    assert {n: id(p) for n, p in t5.named_parameters()} == objects
    assert all(torch.equal(v, before[k]) for k, v in t5.state_dict().items())
    assert {n for n, p in t5.named_parameters() if not p.requires_grad} == {"shared.weight"}
    torch.testing.assert_close(t5(**batch).logits, expected)
    assert not any(m._forward_pre_hooks for m in t5.modules())
    pemt_fast.get_model(t5, pemt_config())


def test_deepcopy_is_independent():
    model, batch = build(), tiny_batch()
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(**batch).loss, model(**batch).loss)
    randomise(clone, seed=9)
    assert not torch.allclose(clone(**batch).loss, model(**batch).loss)
    assert first_wo(clone).routing is clone.routing
    assert clone.unload() is clone.base_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attached_parameters_follow_the_model(dtype):
    model = randomise(pemt_fast.get_model(tiny_t5().to(dtype), pemt_config()))
    assert {p.dtype for p in model.parameters()} == {dtype}
    _, grads = gradients(model, tiny_batch())
    assert all(torch.isfinite(g).all() for g in grads.values())
    mixed = pemt_fast.get_model(tiny_t5().to(dtype), pemt_config(adapter_dtype="float32"))
    assert mixed.prompt.prompt.dtype == torch.float32
    gradients(mixed, tiny_batch())


def test_autocast_trains_float32_adapters():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = gradients(model, tiny_batch())
    assert {g.dtype for g in grads.values()} == {torch.float32}


def test_inner_t5_refuses_to_run_alone():
    model = build()
    with pytest.raises(RuntimeError, match="call the model that get_model returned"):
        model.base_model(**tiny_batch())


def test_bad_calls_name_the_argument():
    model, batch = build(), tiny_batch()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(labels=batch["labels"])
    with pytest.raises(RuntimeError, match="already carries pemt_fast adapters"):
        pemt_fast.get_model(model.base_model, pemt_config())
    with pytest.raises(TypeError, match="must be a T5ForConditionalGeneration"):
        pemt_fast.get_model(torch.nn.Linear(2, 2), pemt_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 3}, r"stage must be one of \[1, 2\], got 3"),
        ({"source_kind": "lorra"}, "source_kind must be one of"),
        ({"sources": []}, "stage 2 needs at least one source"),
        ({"sources": ["a", "a", "b"]}, "sources must differ"),
        ({"source_prompt_lengths": (1, 2)}, r"source_prompt_lengths must hold one .* \(3\)"),
        ({"prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"aux_weight": -1.0}, "aux_weight must not be negative"),
        ({"target": "a/b"}, "target must be a task name"),
        ({"stage": 1}, "stage 1 trains one source"),
    ],
)
def test_bad_configs_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        pemt_config(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt_length": 513}, ValueError, "prompt_length must be at most 512"),
        (
            {"target_bottleneck": None, "target_reduction": 64},
            ValueError,
            f"target_reduction must be at most d_model = {D_MODEL}",
        ),
        ({"sources": ["./no/such", "b", "c"]}, FileNotFoundError, "'./no/such' is neither an exi"),
    ],
)
def test_misfit_leaves_the_model_untouched(changes, error, message):
    t5 = tiny_t5()
    before = dict(t5.named_modules())
    with pytest.raises(error, match=message):
        pemt_fast.get_model(t5, pemt_config(**changes))
    assert dict(t5.named_modules()) == before
    assert all(p.requires_grad for p in t5.parameters())


def test_stage_one_may_name_its_source_twice():
    lengths = {"source_prompt_lengths": None, "stage": 1}
    assert pemt_config(sources=["t"], **lengths) == pemt_config(sources=[], **lengths)


def test_prompt_starts_from_the_vocabulary():
    t5 = tiny_t5()
    rows = {tuple(r.tolist()) for r in t5.shared.weight}
    model = pemt_fast.get_model(t5, pemt_config())
    assert all(tuple(r.tolist()) in rows for r in model.prompt.prompt)
    published = pemt_fast.get_model(tiny_t5(), pemt_config(published=True))
    assert not any(tuple(r.tolist()) in rows for r in published.prompt.prompt)


def test_stage_one_starts_as_the_plain_model_unless_published():
    config = pemt_config(stage=1, sources=(), source_prompt_lengths=None)
    wo = (
        pemt_fast.get_model(tiny_t5(), config)
        .base_model.encoder.block[0]
        .layer[1]
        .DenseReluDense.wo
    )
    assert not wo.adapter.up.weight.any() and wo.adapter.down.weight.shape == (4, D_FF)
    published = pemt_config(stage=1, sources=(), source_prompt_lengths=None, published=True)
    wo = (
        pemt_fast.get_model(tiny_t5(), published)
        .base_model.encoder.block[0]
        .layer[1]
        .DenseReluDense.wo
    )
    assert wo.adapter.up.weight.any()


def test_print_trainable_parameters(capsys):
    model = build()
    model.print_trainable_parameters()
    trainable, total = model.count_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out
