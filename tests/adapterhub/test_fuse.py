"""`fuse(model)` on live models of AdapterHub's library: outputs, gradients, and all else stays."""

import copy
import pickle
import re
from pathlib import Path

import adapters
import pytest
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from adapters.methods.modeling import BertFusion
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import pemt_fast
from pemt_fast.fusing import adapterhub
from pemt_fast.fusing.protocol import FusedModule

IDS = torch.tensor([[5, 9, 3, 8, 2, 7], [4, 4, 6, 1, 0, 0], [9, 8, 7, 6, 5, 1]])
LABELS = torch.tensor([[3, 8, 1], [6, 1, -100], [2, 9, 1]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS}
EVERYWHERE = {"mh_adapter": True, "output_adapter": True, "cross_adapter": True}
PRESETS = {
    "seq": SeqBnConfig(non_linearity="gelu", scaling=0.7, **EVERYWHERE),
    "double": DoubleSeqBnConfig(cross_adapter=True),
    "par": ParBnConfig(non_linearity="gelu_new", scaling=1.5, **EVERYWHERE),
    "learned": SeqBnConfig(scaling="learned", non_linearity="linear", **EVERYWHERE),
}
FUSIONS = {
    "dynamic": {}, "static": {"value": False, "regularization": False},
    "residual_before": {"residual_before": True}, "no_query": {"query": False},
    "temperature": {"temperature": True, "value_before_softmax": False},
    "keyless": {"key": False, "query": False, "value": False},
}  # fmt: skip
SITES = 2 + 3


def tiny_t5(mt5=False, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": "gelu",
    }  # fmt: skip
    classes = (
        (MT5Config, MT5ForConditionalGeneration) if mt5 else (T5Config, T5ForConditionalGeneration)
    )
    return classes[1](classes[0](**{**sizes, **changes}))


def with_adapters(config, setup, *, fusion=None, model=None, reductions=(2, 4, 8)):
    """Adapters a, b, c of unequal widths; every parameter takes part."""
    model = tiny_t5() if model is None else model
    adapters.init(model)
    for name, factor in zip("abc", reductions, strict=True):
        model.add_adapter(name, config=config.replace(reduction_factor=factor))
    blocks = [setup] if not isinstance(setup, Stack) else list(setup)
    for block in blocks:
        if isinstance(block, Fuse):
            changes = {"key": True, "query": True, "value": True, **(fusion or {})}
            made = adapters.DynamicAdapterFusionConfig(**changes)
            model.add_adapter_fusion(block, config=made)
    model.set_active_adapters(setup)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.15
                parameter.copy_(drawn + 1 if "scaling" in name else drawn)
    return model.requires_grad_(True)


def outputs_and_gradients(model, **options):
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, BertFusion) and module.config["temperature"]:
            module.T = 50.0  # it falls with every call
    out = model(**INPUTS, **options)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@torch.no_grad()
def logits(model, **options):
    return model(**INPUTS, **options).logits


def calls_of(monkeypatch):
    """The forms of the calls that were fused."""
    seen, right = [], adapterhub._run

    def counted(steps, f, x, impl):
        seen.append(len(steps))
        return right(steps, f, x, impl)

    monkeypatch.setattr(adapterhub, "_run", counted)
    return seen


def distance(found, exact):
    """Of each tensor, relative to its size; where that is 0 up to rounding, to the largest's."""
    assert found.keys() == exact.keys()
    largest = max(float(t.norm()) for t in exact.values())
    return {
        name: float((found[name].double() - t).norm() / max(float(t.norm()), 1e-3 * largest))
        for name, t in exact.items()
    }


def overall(found, exact):
    """The distance of all tensors together: that of a tensor of 8 elements is luck."""
    squares = [
        ((found[name].double() - t).square().sum(), t.square().sum()) for name, t in exact.items()
    ]
    return float((sum(s[0] for s in squares) / sum(s[1] for s in squares)).sqrt())


def check(model, monkeypatch, calls=SITES):
    """In float64 each tensor is equal; in float32 they are as near to that as the library's."""
    single = copy.deepcopy(model)
    exact, theirs = outputs_and_gradients(model.double()), outputs_and_gradients(single)
    for one in (model, single):
        report = pemt_fast.fuse(one)
        assert not report.skipped and len(report.fused) == calls, str(report)
    seen = calls_of(monkeypatch)
    assert max(distance(outputs_and_gradients(model), exact).values()) < 1e-10
    found = outputs_and_gradients(single)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert overall(found, exact) <= 2 * overall(theirs, exact) + 1e-6
    assert len(seen) == 2 * calls


SETUPS = {
    "single": "a", "stack": Stack("a", "b", "c"), "average": Average("a", "b", "c"),
    "weighted": Average("c", "a", weights=[3.0, 1.0]),
    "unnormalised": Average("c", "a", weights=[3, -1], normalize_weights=False),
    "fuse": Fuse("a", "b", "c"), "stack_fuse": Stack("a", Fuse("b", "c")),
    "stack_average": Stack("a", Average("b", "c")),
    "average_then_one": Stack(Average("b", "c"), "a"),
    "fuse_then_one": Stack(Fuse("b", "c"), "a"),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("setup", SETUPS)
def test_outputs_and_gradients_are_the_librarys(preset, setup, monkeypatch):
    check(with_adapters(PRESETS[preset], SETUPS[setup]), monkeypatch)


@pytest.mark.parametrize("preset", ["seq", "double", "par"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_form_of_fusion(fusion, preset, monkeypatch):
    setup = Stack("a", Fuse("b", "c"))
    check(with_adapters(PRESETS[preset], setup, fusion=FUSIONS[fusion]), monkeypatch)


def test_the_temperature_falls_as_there():
    model = with_adapters(PRESETS["seq"], Fuse("a", "b"), fusion=FUSIONS["temperature"])
    layer = model.encoder.block[0].layer[1].adapter_fusion_layer["a,b"]
    logits(model)
    falling = [50.0, layer.T]
    pemt_fast.fuse(model)
    logits(model)
    falling.append(layer.T)
    assert falling == pytest.approx([50.0, 49.95, 49.9])


def test_a_query_before_the_sum():
    options = {"fusion": {"query_before_ln": True}}
    model = with_adapters(PRESETS["seq"], Fuse("a", "b"), **options)
    report = pemt_fast.fuse(model)
    assert {site.reason for site in report.skipped} == {"query_before_ln has no fused form"}
    assert not report.fused
    model = with_adapters(PRESETS["double"], Fuse("a", "b"), **options)
    expected = logits(model.double())
    assert not pemt_fast.fuse(model).skipped
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


def test_mt5(monkeypatch):
    model = tiny_t5(mt5=True, tie_word_embeddings=False)
    check(with_adapters(PRESETS["seq"], Average("a", "b"), model=model), monkeypatch)


def test_sublayers_and_blocks_without_an_adapter(monkeypatch):
    config = SeqBnConfig(non_linearity="gelu", mh_adapter=True, leave_out=[0])
    check(with_adapters(config, Stack("a", "b")), monkeypatch, calls=2)


def test_a_stack_passes_over_what_is_not_there(monkeypatch):
    model = tiny_t5()
    adapters.init(model)
    model.add_adapter("a", config=SeqBnConfig(non_linearity="gelu", reduction_factor=2))
    model.add_adapter("b", config=SeqBnConfig(mh_adapter=True, non_linearity="gelu"))
    model.set_active_adapters(Stack("a", "b"))
    check(model.requires_grad_(True), monkeypatch, calls=4)


# --- calls that stay the library's ---------------------------------------------------------------


def unchanged(model, monkeypatch, **options):
    """Bit by bit as before, through the library's own method."""
    torch.manual_seed(3)
    expected = outputs_and_gradients(model, **options)
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    torch.manual_seed(3)
    found = outputs_and_gradients(model, **options)
    assert not seen
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dropout_in_training(monkeypatch):
    config = SeqBnConfig(dropout=0.4)
    model = with_adapters(config, Stack("a", "b")).train()
    unchanged(model, monkeypatch)
    monkeypatch.undo()
    model = with_adapters(PRESETS["seq"], Fuse("a", "b"), fusion={"dropout_prob": 0.3}).train()
    unchanged(model, monkeypatch)
    monkeypatch.undo()
    pemt_fast.unfuse(model)
    check(model.eval(), monkeypatch)


def test_attentions_that_are_asked_for(monkeypatch):
    model = with_adapters(PRESETS["seq"], Fuse("a", "b"))
    unchanged(model, monkeypatch, output_adapter_fusion_attentions=True)
    attentions = model(**INPUTS, output_adapter_fusion_attentions=True).adapter_fusion_attentions
    assert attentions["a,b"][0]["output_adapter"].shape == (3, 6, 2)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (Parallel("a", "b", "c"), "Parallel repeats the batch for every adapter"),
        (BatchSplit("a", "b", batch_sizes=[1, 2]), "there is no fused form of BatchSplit"),
        (Average(Stack("a", "b"), "c"), "there is no fused form of compositions within Average"),
    ],
)
def test_compositions_without_a_fused_form(setup, reason):
    model = with_adapters(PRESETS["seq"], setup)
    batch = {"input_ids": IDS, "decoder_input_ids": LABELS.clamp(0)}
    with torch.no_grad():
        expected = model(**batch).logits
    report = pemt_fast.fuse(model)
    assert not report.fused and len(report.skipped) == SITES
    assert all(reason in site.reason for site in report.skipped)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_split_is_the_librarys():
    model = tiny_t5()
    adapters.init(model)
    for name in "ab":
        model.add_adapter(name, config="seq_bn")
    model.set_active_adapters(Split("a", "b", splits=[2, 4]))
    reasons = {site.reason for site in pemt_fast.fuse(model).skipped}
    assert reasons == {"there is no fused form of Split"}


OPTIONS = {
    "ln_before": ({"ln_before": True}, "the adapter a has ln_before or ln_after"),
    "ln_after": ({"ln_after": True}, "the adapter a has ln_before or ln_after"),
    "phm": ({"phm_layer": True, "phm_dim": 2}, "the adapter a has a phm_layer"),
    "gating": ({"use_gating": True}, "the adapter a has use_gating or stochastic_depth"),
    "channel": ({"scaling": "channel"}, "the adapter a has scaling='channel'"),
    "leaky": ({"non_linearity": "leakyrelu"}, "the adapter a has a non_linearity without"),
    "order": ({"original_ln_after": False}, "the adapter a has residuals in an order"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_without_a_fused_form(option, monkeypatch):
    changes, reason = OPTIONS[option]
    model = with_adapters(SeqBnConfig(**changes), "a", reductions=(2, 2, 2))
    expected = outputs_and_gradients(model)
    report = pemt_fast.fuse(model)
    assert not report.fused and all(site.reason.startswith(reason) for site in report.skipped)
    torch.testing.assert_close(outputs_and_gradients(model), expected, rtol=0, atol=0)
    # Not known to `fuse` while nothing was active, it is the library's all the same.
    later = with_adapters(SeqBnConfig(**changes), "a", reductions=(2, 2, 2))
    later.add_adapter("fine", config=PRESETS["seq"])
    later.set_active_adapters(None)
    assert pemt_fast.fuse(later).fused
    later.set_active_adapters("a")
    seen = calls_of(monkeypatch)
    found = outputs_and_gradients(later)
    assert not seen
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=0)


def test_adapters_of_different_kinds():
    model = tiny_t5()
    adapters.init(model)
    model.add_adapter("a", config="seq_bn")
    model.add_adapter("b", config="par_bn")
    model.set_active_adapters(Stack("a", "b"))
    reasons = {site.reason for site in pemt_fast.fuse(model).skipped}
    assert reasons == {"Stack[a, b] has adapters of different kinds"}


def test_other_methods_are_reported():
    model = tiny_t5()
    adapters.init(model)
    model.add_adapter("a", config="unipelt")
    model.set_active_adapters("a")
    report = pemt_fast.fuse(model)
    reasons = {site.reason for site in report.skipped}
    assert "there is no fused form of LoRALinearTorch" in reasons
    assert "there is no fused form of PrefixTuningLayer" in reasons
    assert {site.kind for site in report.sites} == {"adapters"}


def test_models_without_adapters():
    model = tiny_t5()
    adapters.init(model)
    with pytest.raises(ValueError, match="no adapters to fuse; kinds that are known: adapters, pe"):
        pemt_fast.fuse(model)


# --- what changes while it is fused --------------------------------------------------------------


def test_setups_that_change(monkeypatch):
    model = with_adapters(PRESETS["seq"], "a")
    plain = copy.deepcopy(model)
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    for one in (model, plain):
        one.add_adapter_fusion(Fuse("a", "b"))
    plain.load_state_dict(model.state_dict())
    for setup in (Average("a", "c"), Fuse("a", "b"), Parallel("a", "b"), None, "b"):
        results = []
        for one in (model, plain):
            one.set_active_adapters(setup)
            with torch.no_grad():
                results.append(one(input_ids=IDS, decoder_input_ids=LABELS.clamp(0)).logits)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3 * SITES
    with adapters.AdapterSetup(Stack("c", "a")):
        found = logits(model)
        torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-5)
    assert seen[-SITES:] == [2] * SITES


def test_adapterdrop_and_parameters(monkeypatch):
    model = with_adapters(PRESETS["seq"], Stack("a", "b"))
    plain = copy.deepcopy(model)
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    for one in (model, plain):
        one.adapters_config.skip_layers = [0]
        with torch.no_grad():
            one.decoder.block[0].layer[2].adapters["a"].adapter_up.weight.mul_(2)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert len(seen) == 3
    for one in (model, plain):
        one.delete_adapter("a")
        one.set_active_adapters("b")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def test_same_state_and_classes_and_back(tmp_path):
    model = with_adapters(PRESETS["double"], Fuse("a", "b"))
    parameters, names = list(model.parameters()), list(model.state_dict())
    classes = {n: type(m) for n, m in model.named_modules()}
    expected = logits(model)
    pemt_fast.fuse(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert all(isinstance(m, classes[n]) for n, m in model.named_modules())
    model.save_adapter(tmp_path, "a")
    loaded = tiny_t5()
    adapters.init(loaded)
    loaded.load_adapter(str(tmp_path), set_active=True)
    model.set_active_adapters("a")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert pemt_fast.unfuse(model) == SITES and pemt_fast.unfuse(model) == 0
    assert {n: type(m) for n, m in model.named_modules()} == classes
    model.set_active_adapters(Fuse("a", "b"))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused(way, monkeypatch):
    """Of a sub-layer: the library's whole models cannot be pickled."""
    model = with_adapters(PRESETS["seq"], Average("a", "b"))
    pemt_fast.fuse(model, impl="torch")
    layer, x = model.encoder.block[0].layer[1], torch.randn(1, 2, 16)
    copied = way(layer)
    seen = calls_of(monkeypatch)
    assert torch.equal(copied(x), layer(x)) and len(seen) == 2
    assert isinstance(copied, FusedModule) and copied.fused_impl == "torch"


def test_generation_and_checkpoints():
    model = with_adapters(PRESETS["seq"], Fuse("a", "b"))
    expected = outputs_and_gradients(model)
    options = {"input_ids": IDS, "num_beams": 3, "max_new_tokens": 5}
    tokens = model.eval().generate(**options)
    pemt_fast.fuse(model)
    assert torch.equal(model.generate(**options), tokens)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    found = outputs_and_gradients(model)
    assert max(distance(found, {n: t.double() for n, t in expected.items()}).values()) < 1e-4


@pytest.mark.parametrize("setup", ["single", "stack", "fuse"])
def test_bfloat16(setup, monkeypatch):
    model = with_adapters(PRESETS["seq"], SETUPS[setup])
    exact = outputs_and_gradients(copy.deepcopy(model).bfloat16().double())
    model = model.bfloat16()
    theirs = overall(outputs_and_gradients(model), exact)
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    found = outputs_and_gradients(model)
    assert {t.dtype for t in found.values()} == {torch.bfloat16} and len(seen) == SITES
    assert overall(found, exact) <= 2 * theirs


def test_an_average_in_bfloat16_raises_as_it_did():
    model = with_adapters(PRESETS["seq"], Average("a", "b")).bfloat16()
    for fused in (False, True):
        if fused:
            pemt_fast.fuse(model)
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            logits(model)


@pytest.mark.parametrize("setup", ["single", "average", "fuse"])
def test_autocast(setup, monkeypatch):
    model = with_adapters(PRESETS["seq"], SETUPS[setup])
    exact = logits(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = logits(model)
        pemt_fast.fuse(model)
        seen = calls_of(monkeypatch)
        ours = logits(model)
    assert ours.dtype == theirs.dtype and len(seen) == SITES
    far = [float((t.double() - exact).norm() / exact.norm()) for t in (ours, theirs)]
    assert far[0] <= 2 * far[1] + 1e-2
    layer = model.encoder.block[0].layer[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 2, 16)).dtype == torch.float32


@pytest.mark.parametrize("setup", ["stack", "average", "fuse"])
def test_compiles_to_one_graph(setup):
    torch._dynamo.reset()
    model = with_adapters(PRESETS["seq"], SETUPS[setup])
    pemt_fast.fuse(model)
    layer, x = model.encoder.block[0].layer[1], torch.randn(3, 6, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


# --- what docs/adapterhub.md says of the library -------------------------------------------------


def one_layer(preset, setup):
    """A feed-forward sub-layer, an input x, its own output f and what each adapter makes of y."""
    model = with_adapters(PRESETS[preset], setup, reductions=(2, 2, 2)).double()
    layer, x = model.encoder.block[0].layer[1], torch.randn(2, 3, 16, dtype=torch.float64)
    f = layer.dropout(layer.DenseReluDense(layer.layer_norm(x)))

    def adapter(name, y):
        module = layer.adapters[name]
        return module.adapter_up(module.adapter_down(y)) * module.scaling

    return layer, x, f, adapter


def test_an_average_divides_twice():
    layer, x, f, adapter = one_layer("seq", Average("a", "b", weights=[0.25, 0.75]))
    members = 0.25 * adapter("a", x + f) + 0.75 * adapter("b", x + f)
    torch.testing.assert_close(layer(x), x + (f + members) / 2, rtol=0, atol=1e-12)


def test_of_stacked_parallel_adapters_the_last_counts():
    layer, x, f, adapter = one_layer("par", Stack("a", "b"))
    torch.testing.assert_close(layer(x), x + f + adapter("b", x), rtol=0, atol=1e-12)


def test_post_add_raises():
    model = with_adapters(SeqBnConfig(residual_before_ln="post_add"), "a")
    with pytest.raises(UnboundLocalError, match="residual"):
        logits(model)


def test_the_report_of_the_page():
    model = with_adapters(SeqBnConfig(), Fuse("a", "b", "c"), model=tiny_t5(num_layers=12))
    assert str(pemt_fast.fuse(model)) == "24 of 24 modules with adapters are fused"


# --- what else may be in the way -----------------------------------------------------------------


def test_a_replaced_method_is_left_alone():
    model = with_adapters(PRESETS["seq"], "a")
    layer = model.encoder.block[0].layer[1]
    layer.bottleneck_layer_forward = layer.bottleneck_layer_forward
    (site,) = pemt_fast.fuse(model).skipped
    assert "has replaced its bottleneck_layer_forward" in site.reason
    # A replaced forward calls the fused method.
    model = with_adapters(PRESETS["seq"], "a")
    layer = model.encoder.block[0].layer[1]
    layer.forward = layer.forward
    assert not pemt_fast.fuse(model).skipped


def test_the_bert_kind_of_site_is_reported():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=20, num_hidden_layers=1, **sizes))
    adapters.init(model)
    model.add_adapter("a", config="seq_bn", set_active=True)
    reason = "there is no fused form of BertOutputWithAdapters"
    assert [site.reason for site in pemt_fast.fuse(model).sites] == [reason]


def test_an_impl_that_cannot_run_raises():
    model = with_adapters(BnConfig(True, True, 2, "relu"), "a")
    pemt_fast.fuse(model, impl="cuda")
    with pytest.raises(RuntimeError, match="^impl='cuda' cannot run: "):
        logits(model)


def test_the_block_of_the_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "adapterhub.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    exec(compile(block, "adapterhub.md", "exec"), {"t5": tiny_t5()})
    assert "2 of 2 modules with adapters are fused" in capsys.readouterr().out
