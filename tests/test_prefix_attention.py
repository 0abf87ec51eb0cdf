"""Keys and values with a prefix, against attention written out by hand and peft's prefix tuning."""

import functools
import math

import peft
import pytest
import torch
from linear_models import MODELS, tiny_inputs, tiny_model
from t5_factory import randomise
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

import pemt_fast
from pemt_fast.nn.prefix_attention import PrefixedConfig

FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
LENGTH = 5
every_model = pytest.mark.parametrize("kind", MODELS)
every_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def use(model, implementation):
    """Of all layers: the stacks of T5 have configs of their own, which older versions forget."""
    model.set_attn_implementation(
        implementation if implementation in ("eager", "sdpa") else "eager"
    )
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, PrefixedConfig):
            config._attn_implementation = implementation


def prefixed(kind, *, dtype=torch.float32, implementation="sdpa", **changes):
    """A tiny model with a plain prefix whose values matter, and without LoRA."""
    model = tiny_model(kind).to(dtype)
    use(model, implementation)
    options = {"target_modules": (), "prefix_length": LENGTH, "prefix_depth": 0, **changes}
    return randomise(pemt_fast.get_model(model, pemt_fast.PemlConfig(**options)), scale=0.7)


# --- attention by hand ---------------------------------------------------------------------------


def softmax_with_prefix(module, query, key, value, added, scale):
    """Scores of prefix and tokens side by side; `added` belongs to the tokens."""
    prefix_key, prefix_value = module.prefix()
    tokens = query @ key.transpose(-1, -2) * scale + added
    prefix = torch.einsum("bhqd,hpd->bhqp", query, prefix_key) * scale
    weights = torch.cat([prefix, tokens], -1).softmax(-1)
    seen, rest = weights.split([LENGTH, key.shape[2]], -1)
    out = torch.einsum("bhqp,hpd->bhqd", seen, prefix_value) + rest @ value
    return out.transpose(1, 2).flatten(2)


def additive(mask, dtype):
    if mask is None:
        return 0.0
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    return mask


def t5_by_hand(module, x, mask=None, key_value_states=None, position_bias=None, **_):
    source = x if key_value_states is None else key_value_states

    def heads(rows):
        return rows.unflatten(-1, (module.n_heads, -1)).transpose(1, 2)

    query, key, value = heads(module.q(x)), heads(module.k(source)), heads(module.v(source))
    if position_bias is None:
        position_bias = x.new_zeros(1, module.n_heads, x.shape[1], source.shape[1])
        if module.has_relative_attention_bias:
            position_bias = module.compute_bias(x.shape[1], source.shape[1])
    mask = additive(mask, x.dtype)
    if module.is_causal and key_value_states is None:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mask = mask + x.new_zeros(future.shape).masked_fill(future, -math.inf)
    out = softmax_with_prefix(module, query, key, value, position_bias + mask, 1.0)
    return module.o(out), position_bias, None


def llama_by_hand(module, hidden_states, position_embeddings, attention_mask=None, **_):
    def heads(rows):
        return rows.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)

    def rotated(rows):
        first, second = rows.chunk(2, -1)
        cos, sin = (t.unsqueeze(1) for t in position_embeddings)
        return rows * cos + torch.cat([-second, first], -1) * sin

    x, groups = hidden_states, module.num_key_value_groups
    query, key = rotated(heads(module.q_proj(x))), rotated(heads(module.k_proj(x)))
    key, value = (t.repeat_interleave(groups, 1) for t in (key, heads(module.v_proj(x))))
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    # Rows of padding see nothing but the prefix.
    mask = additive(attention_mask, x.dtype) + x.new_zeros(future.shape).masked_fill(
        future, -math.inf
    )
    prefix = module.prefix
    both = [t.repeat_interleave(groups, 0) for t in prefix()]
    shell = nn.Module()
    shell.prefix = lambda: both
    out = softmax_with_prefix(shell, query, key, value, mask, module.scaling)
    return module.o_proj(out), None


def by_hand(model, kind):
    for prefix_name in model.prefixes():
        layer = model.base_model.get_submodule(prefix_name)
        layer.forward = functools.partial(t5_by_hand if kind == "t5" else llama_by_hand, layer)
    return model


def results(model, batch):
    """Logits and the gradients of prefixes and embeddings."""
    model.zero_grad(set_to_none=True)
    embed = model.get_input_embeddings().weight.requires_grad_()
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(model.prefixes()) + 1
    return {"logits": out.logits.detach(), "d_embed": embed.grad.clone(), **grads}


@every_implementation
@every_model
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no-mask"])
def test_equals_attention_by_hand(kind, implementation, masked):
    batch = tiny_inputs(kind)
    if not masked:
        del batch["attention_mask"]
    model = prefixed(kind, dtype=torch.float64, implementation=implementation)
    found = results(model, batch)
    expected = results(by_hand(model, kind), batch)
    # Llama's eager attention computes its softmax in float32.
    bounds = CLOSE if (kind, implementation) == ("llama", "eager") else FLOAT64
    if kind == "llama" and masked:  # what padding computes means nothing
        seen = batch["attention_mask"].bool()
        found["logits"], expected["logits"] = found["logits"][seen], expected["logits"][seen]
    torch.testing.assert_close(found, expected, **bounds)


@pytest.mark.parametrize("places", [("encoder",), ("decoder",), ("cross",)], ids=" ".join)
def test_places(places):
    model = prefixed("t5", dtype=torch.float64, prefix_places=places)
    names = {"encoder": "encoder", "decoder": "decoder.block", "cross": "EncDecAttention"}
    assert len(model.prefixes()) == 2
    assert all(names[places[0]] in name for name in model.prefixes())
    assert all(("EncDec" in name) == (places[0] == "cross") for name in model.prefixes())
    batch = tiny_inputs("t5")
    found = results(model, batch)
    torch.testing.assert_close(found, results(by_hand(model, "t5"), batch), **FLOAT64)


# --- peft ----------------------------------------------------------------------------------------


def peft_values(model, lengths):
    """peft's prefix `[P, layers · 2 · heads · width]`, keys before values in every layer."""
    generator = torch.Generator().manual_seed(3)
    return 0.7 * torch.randn(*lengths, generator=generator, dtype=torch.float64)


def test_equals_peft_on_llama():
    base = tiny_model("llama").double()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(tiny_model("llama").double(), config).double().eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(peft_values(theirs, weight.shape))
    ours = pemt_fast.get_model(
        base,
        pemt_fast.PemlConfig(target_modules=(), prefix_length=LENGTH, prefix_depth=0),
    )
    # peft's prefix takes positions 0 to P - 1 and pushes the text on; its keys carry no rotation.
    # Ours takes none: turn its keys back by P positions.
    rotary = base.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1, 1).double(), torch.tensor([[-LENGTH]]))
    cos, sin = cos.double()[0], sin.double()[0]
    layers = weight.detach().unflatten(-1, (2, 2, 2, 8))  # layers, keys and values, heads, width
    for i, prefix in enumerate(ours.prefixes().values()):
        key, value = layers[:, i].unbind(1)
        first, second = key.chunk(2, -1)
        key = key * cos + torch.cat([-second, first], -1) * sin
        with torch.no_grad():
            prefix.source.both.copy_(torch.cat([key.flatten(1), value.flatten(1)], -1))
    batch = tiny_inputs("llama", rows=1)  # no padding: every token has the same position in both
    with torch.no_grad():
        expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # Rotations are computed in float32.
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_equals_peft_on_t5():
    # peft's prefix is in front of the decoder's own attention, with the position bias of tokens
    # that came before; ours has none: both are the same where there is no bias at all.
    def without_bias():
        model = tiny_model("t5").double()
        with torch.no_grad():
            for stack in (model.encoder, model.decoder):
                attention = stack.block[0].layer[0].SelfAttention
                attention.relative_attention_bias.weight.zero_()
        return model

    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(without_bias(), config).double().eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(peft_values(theirs, weight.shape))
    ours = pemt_fast.get_model(
        without_bias(),
        pemt_fast.PemlConfig(
            target_modules=(), prefix_length=LENGTH, prefix_depth=0, prefix_places=("decoder",)
        ),
    )
    heads = ours.config.num_heads
    # peft repeats its numbers for the two attentions of a layer and then deals them out by four.
    entries = weight.detach().unflatten(-1, (-1, heads, ours.config.d_kv)).repeat(1, 2, 1, 1)
    for i, prefix in enumerate(ours.prefixes().values()):
        with torch.no_grad():
            prefix.source.both.copy_(entries[:, 4 * i : 4 * i + 2].flatten(1))
    batch = tiny_inputs("t5")
    found, expected = results(ours, batch), theirs(**batch)
    torch.testing.assert_close(found["logits"], expected.logits, **FLOAT64)
    expected.loss.backward()
    gradients = torch.zeros_like(entries)
    for i, name in enumerate(ours.prefixes()):
        own = found[f"base_model.{name}.prefix.source.both"]
        gradients[:, 4 * i : 4 * i + 2] = own.unflatten(-1, (2, heads, -1))
    gradients = sum(gradients.chunk(2, 1)).flatten(1)
    torch.testing.assert_close(gradients, weight.grad, **FLOAT64)


# --- the model around it -------------------------------------------------------------------------


@every_model
def test_padding_and_batches_make_no_difference(kind):
    model, batch = prefixed(kind), tiny_inputs(kind)
    together = model(**batch).logits
    for row in range(4):
        alone = model(**{name: t[row : row + 1] for name, t in batch.items()}).logits
        seen = slice(None) if kind == "t5" else batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][seen], alone[0][seen], **CLOSE)


@every_implementation
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@every_model
def test_generation_with_a_cache_is_the_same(kind, options, implementation):
    model, batch = prefixed(kind, implementation=implementation), tiny_inputs(kind)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    made = []
    for cache in (True, False):
        torch.manual_seed(0)
        made.append(model.generate(**inputs, max_new_tokens=6, use_cache=cache, **options))
    assert torch.equal(*made)


@every_model
def test_generation_with_a_static_cache(kind):
    model, batch = prefixed(kind), tiny_inputs(kind)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "disable_compile": True}
    expected = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **options), expected)


@every_model
def test_caches_and_hidden_states_keep_their_length(kind):
    model, batch = prefixed(kind), tiny_inputs(kind)
    out = model(**batch, use_cache=True, output_hidden_states=True)
    states = out.decoder_hidden_states if kind == "t5" else out.hidden_states
    tokens = batch["labels"].shape[1]
    assert {state.shape[1] for state in states} == {tokens}
    assert out.past_key_values.get_seq_length() == tokens


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_model
def test_gradient_checkpointing(kind, reentrant):
    model, batch = prefixed(kind).train(), tiny_inputs(kind)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if n in expected}
    torch.testing.assert_close(found, expected, **CLOSE)


@every_implementation
@every_model
def test_compiles_to_one_graph(kind, implementation):
    torch._dynamo.reset()
    model, batch = prefixed(kind, implementation=implementation), tiny_inputs(kind)
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, **CLOSE)


@every_model
def test_attention_implementations_can_be_changed_later(kind):
    model, batch = prefixed(kind), tiny_inputs(kind)
    expected = model(**batch).logits
    use(model, "eager")
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    weights = model(**batch, output_attentions=True)
    weights = weights.encoder_attentions if kind == "t5" else weights.attentions
    assert {w.shape[-1] for w in weights} == {LENGTH + batch["input_ids"].shape[1]}
    use(model, "flex_attention")
    with pytest.raises(ValueError, match=r"must be one of \['eager', 'sdpa'\] for a prefix"):
        model(**batch)


@every_model
def test_disabled_and_unload_give_the_untouched_model(kind):
    batch = tiny_inputs(kind)
    plain = tiny_model(kind)
    expected, names = plain(**batch).logits, plain.state_dict().keys()
    model = prefixed(kind)
    assert not torch.allclose(model(**batch).logits, expected)
    with model.disabled():
        torch.testing.assert_close(model(**batch).logits, expected)
    inside = model.base_model
    with pytest.raises(RuntimeError, match="call the model that get_model returned"):
        inside(**batch)
    base = model.unload()
    assert base.state_dict().keys() == names
    torch.testing.assert_close(base(**batch).logits, expected)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_with_a_float32_prefix(kind, dtype):
    model = prefixed(kind, dtype=dtype, adapter_dtype="float32").train()
    out = model(**tiny_inputs(kind))
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_bart():
    config = BartConfig(
        vocab_size=80, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"target_modules": (), "prefix_length": LENGTH, "prefix_depth": 0}
    made = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        base = BartForConditionalGeneration(config).double().eval()
        base.set_attn_implementation(implementation)
        model = randomise(pemt_fast.get_model(base, pemt_fast.PemlConfig(**options)), scale=0.7)
        assert model.adapter_config.prefix_places == ("encoder", "decoder", "cross")
        made.append(results(model, tiny_inputs("t5")))
    torch.testing.assert_close(*made, **FLOAT64)
    assert [name.rpartition(".")[2] for name in model.prefixes()] == [
        "self_attn", "self_attn", "encoder_attn",
    ]  # fmt: skip
    batch = tiny_inputs("t5")
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    cached, plain = (
        model.generate(**inputs, max_new_tokens=6, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@every_model
def test_only_layers_that_look_up_their_function(kind, monkeypatch):
    model = tiny_model(kind)
    layer = next(
        m for m in model.modules() if type(m).__name__ in ("T5Attention", "LlamaAttention")
    )
    monkeypatch.setattr(type(layer), "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(ValueError, match="AttentionInterface .T5: transformers 5.15 or newer"):
        pemt_fast.get_model(model, pemt_fast.PemlConfig())
