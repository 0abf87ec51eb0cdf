"""`fuse(model)`: peft's adapters and a user's own keep their outputs and gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

peft = pytest.importorskip("peft", reason="peft is a development dependency")

from implementations import INTERPRETED, needs_triton  # noqa: E402

import pemt_fast  # noqa: E402
from pemt_fast.fusing import FusedKind, StackedCall, default_kinds  # noqa: E402
from pemt_fast.fusing.protocol import FusedModule  # noqa: E402

TARGETS = ["q", "v", "wo"]
IDS = torch.tensor([[5, 9, 3, 8, 2, 7], [4, 4, 6, 1, 0, 0], [9, 8, 7, 6, 5, 1]])
LABELS = torch.tensor([[3, 8, 1], [6, 1, -100], [2, 9, 1]])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tiny_t5(**changes):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, **changes,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name or "poly" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(drawn)
    return model


def lora_model(*, adapters=("default", "b"), base=None, **changes):
    """Adapters of unequal rank and scaling, all of them active."""
    made = [
        peft.LoraConfig(r=4 + 2 * i, lora_alpha=3 + i, target_modules=TARGETS, **changes)
        for i in range(len(adapters))
    ]
    model = peft.get_peft_model(base or tiny_t5(), made[0])
    for name, config in zip(adapters[1:], made[1:], strict=True):
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return randomised(model)


def poly_model(splits):
    config = peft.PolyConfig(
        task_type="SEQ_2_SEQ_LM", r=4, n_tasks=3, n_skills=5, n_splits=splits,
        target_modules=["q", "v"],
    )  # fmt: skip
    return randomised(peft.get_peft_model(tiny_t5(), config))


def logits_and_gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(2)  # Poly draws numbers in training
    out = model(input_ids=IDS, attention_mask=IDS > 0, labels=LABELS, **inputs)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, attention_mask=IDS > 0, labels=LABELS, **inputs).logits


def calls_of(monkeypatch):
    """Which operators a fused model calls."""
    from pemt_fast.fusing import peft_lora, peft_poly, protocol

    seen = []
    for module, name in (
        (protocol, "linear_mixture"), (protocol, "adapter_mixture"),
        (peft_poly, "skill_mixture"), (peft_lora, "skill_mixture"),
    ):  # fmt: skip
        right = getattr(module, name)

        def counted(*args, _right=right, _name=name, **options):
            seen.append(_name)
            return _right(*args, **options)

        monkeypatch.setattr(module, name, counted)
    return seen


# --- peft LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [("default",), ("default", "b"), ("default", "b", "c")])
@pytest.mark.parametrize("changes", [{}, {"lora_bias": True}], ids=["plain", "bias"])
def test_lora_has_the_outputs_and_gradients_it_had(monkeypatch, adapters, changes):
    model = lora_model(adapters=adapters, **changes)
    expected = logits_and_gradients(model)
    report = pemt_fast.fuse(model)
    assert len(report.fused) == 16 and not report.skipped
    seen = calls_of(monkeypatch)
    torch.testing.assert_close(logits_and_gradients(model), expected, **CLOSE)
    assert seen == ["linear_mixture"] * 16


@pytest.mark.parametrize(
    "names",
    [["default", "__base__", "b"], ["b"] * 3, ["__base__"] * 3, ["b", "default", "unknown"]],
    ids=["mixed", "one", "none", "unknown"],
)
@pytest.mark.parametrize("equal", [True, False], ids=["equal-ranks", "unequal-ranks"])
def test_an_adapter_for_each_sequence(names, equal):
    model = lora_model().eval()
    if equal:
        model.add_adapter("c", peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS))
        names = [{"b": "c"}.get(name, name) for name in names]
        randomised(model)
    if "unknown" in names:  # peft refuses it before any layer is called
        with pytest.raises(ValueError):
            logits(model, adapter_names=names)
        return
    expected = logits(model, adapter_names=names)
    pemt_fast.fuse(model)
    torch.testing.assert_close(logits(model, adapter_names=names), expected, **CLOSE)


def test_adapters_in_float32_on_a_model_in_bfloat16():
    """As peft loads them: they compute in float32, the layer's result is bfloat16."""
    model = lora_model(base=tiny_t5().bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    layer = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    x = torch.randn(3, 6, 32).bfloat16()
    expected = layer(x)
    pemt_fast.fuse(model)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=8e-3, atol=1e-6)  # one rounding step


def test_sequences_of_other_lengths_and_ranks_take_one_operator_each(monkeypatch):
    model = lora_model(adapters=("default", "b")).eval()
    model.add_adapter("c", peft.LoraConfig(r=4, target_modules=TARGETS))
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    logits(model, adapter_names=["c", "default", "c"])
    assert seen == ["skill_mixture"] * 16
    seen.clear()
    logits(model, adapter_names=["c", "b", "c"])  # of ranks 4 and 6
    assert seen == ["linear_mixture"] * 16


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="the session has a GPU")
def test_a_mixed_batch_through_kernels_that_skill_mixture_has_not():
    model = lora_model(adapters=("default",)).eval()
    model.add_adapter("c", peft.LoraConfig(r=4, target_modules=TARGETS))
    layer = randomised(model).base_model.model.encoder.block[0].layer[0].SelfAttention.q
    x, names = torch.randn(3, 4, 32), ["c", "default", "__base__"]
    with torch.no_grad():
        expected = layer(x, adapter_names=names)
        pemt_fast.fuse(model, impl="triton")
        torch.testing.assert_close(layer(x, adapter_names=names), expected, **CLOSE)


def test_dropout_in_training_is_pefts(monkeypatch):
    model = lora_model(lora_dropout=0.5)
    expected = logits_and_gradients(model)
    pemt_fast.fuse(model)
    seen = calls_of(monkeypatch)
    torch.testing.assert_close(logits_and_gradients(model), expected, rtol=0, atol=0)
    assert seen == []
    logits(model.eval())
    assert len(seen) == 16


def test_disabled_and_merged_adapters(monkeypatch):
    model = lora_model().eval()
    active = logits(model)
    with model.disable_adapter():
        disabled = logits(model)
    pemt_fast.fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), disabled, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), active, **CLOSE)
    model.merge_adapter(["default", "b"])
    seen = calls_of(monkeypatch)
    torch.testing.assert_close(logits(model), active, **CLOSE)
    assert seen == []
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), active, **CLOSE)


def test_parameters_that_change_are_seen():
    model = lora_model().eval()
    pemt_fast.fuse(model)
    before = logits(model)
    layer = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    for change in (
        lambda: layer.lora_A["b"].weight.data.mul_(2),
        lambda: setattr(layer.lora_B["b"].weight, "data", layer.lora_B["b"].weight.data * 2),
        lambda: layer.scaling.update(b=0.1),
        lambda: model.base_model.set_adapter(["b"]),
        lambda: model.double(),
    ):
        change()
        found = logits(model)
        assert not torch.equal(found, before)
        pemt_fast.unfuse(model)
        torch.testing.assert_close(found, logits(model), **CLOSE)
        pemt_fast.fuse(model)
        before = found


def test_beams_and_gradient_checkpointing():
    model = lora_model()
    expected = logits_and_gradients(model)
    tokens = model.eval().generate(input_ids=IDS, num_beams=3, max_new_tokens=5)
    pemt_fast.fuse(model)
    assert torch.equal(model.generate(input_ids=IDS, num_beams=3, max_new_tokens=5), tokens)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(logits_and_gradients(model), expected, **CLOSE)


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model = lora_model()
    pemt_fast.fuse(model)
    layer = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    x = torch.randn(3, 6, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)


# --- peft Poly -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", [1, 2])
def test_poly_has_the_outputs_and_gradients_it_had(monkeypatch, splits, training):
    model = poly_model(splits).train(training)
    tasks = {"task_ids": torch.tensor([0, 2, 1])}
    expected = logits_and_gradients(model, **tasks)
    report = pemt_fast.fuse(model)
    assert {site.kind for site in report.fused} == {"peft Poly"} and not report.skipped
    seen = calls_of(monkeypatch)
    torch.testing.assert_close(logits_and_gradients(model, **tasks), expected, **CLOSE)
    assert seen == ["skill_mixture"] * 12


# --- the model stays what it is ------------------------------------------------------------------


def test_same_state_and_classes_and_back(tmp_path):
    model = lora_model()
    parameters, names = list(model.parameters()), list(model.state_dict())
    classes = {n: type(m) for n, m in model.named_modules()}
    pemt_fast.fuse(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert all(isinstance(m, classes[n]) for n, m in model.named_modules())
    logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_t5(), tmp_path)
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(logits(loaded.eval()), logits(model), **CLOSE)
    assert pemt_fast.unfuse(model) == 16 and pemt_fast.unfuse(model) == 0
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_fused_twice_is_fused_once_with_the_later_impl():
    model = lora_model()
    first, again = pemt_fast.fuse(model), pemt_fast.fuse(model, impl="torch")
    assert [s.name for s in first.fused] == [s.name for s in again.fused]
    fused = [m for m in model.modules() if isinstance(m, FusedModule)]
    assert {m.fused_impl for m in fused} == {"torch"}
    assert not any(isinstance(m.fused_from, FusedModule) for m in fused)
    assert "FusedLinear" in repr(model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused_and_are_their_own(way):
    model = lora_model().eval()
    pemt_fast.fuse(model)
    expected = logits(model)
    copied = way(model)
    assert torch.equal(logits(copied), expected)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied), expected)
    assert pemt_fast.unfuse(copied) == 16


# --- what is not fused, and why ------------------------------------------------------------------


def test_variants_and_other_layers_are_reported():
    model = peft.get_peft_model(
        tiny_t5(), peft.LoraConfig(r=4, target_modules=["q", "shared"], use_dora=False)
    )
    model.add_adapter("dora", peft.LoraConfig(r=4, target_modules=["v"], use_dora=True))
    report = pemt_fast.fuse(model)
    reasons = {site.name.split(".")[-1]: site.reason for site in report.skipped}
    assert reasons["v"] == "the adapters dora are variants of LoRA (DoRA or the like)"
    assert reasons["shared"] == "there is no fused form of lora.Embedding"
    assert {site.name.split(".")[-1] for site in report.fused} == {"q"}
    text = str(report)
    assert text.startswith(f"{len(report.fused)} of {len(report.sites)} modules") and "dora" in text


def test_a_replaced_forward_is_left_alone():
    model = lora_model()
    layer = model.base_model.model.encoder.block[0].layer[0].SelfAttention.q
    layer.forward = layer.forward
    (site,) = pemt_fast.fuse(model).skipped
    assert "has replaced its forward" in site.reason and site.name.endswith("SelfAttention.q")


def test_errors():
    with pytest.raises(ValueError, match="^the model has no adapters to fuse; kinds .* peft LoRA"):
        pemt_fast.fuse(tiny_t5())
    with pytest.raises(ValueError, match="^impl must be one of auto, "):
        pemt_fast.fuse(lora_model(), impl="fast")
    with pytest.raises(RuntimeError, match="^impl='cuda' cannot run: "):
        model = lora_model()
        pemt_fast.fuse(model, impl="cuda")
        logits(model)


# --- kinds of a user -----------------------------------------------------------------------------


class Parallel(nn.Module):
    """A research project's loop over bottleneck adapters with fixed weights."""

    def __init__(self, width, ranks):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, r) for r in ranks)
        self.up = nn.ModuleList(nn.Linear(r, width) for r in ranks)
        self.weights = nn.Parameter(torch.randn(len(ranks)))

    def forward(self, x):
        pairs = zip(self.weights, self.down, self.up, strict=True)
        return x + sum(w * up(down(x).relu()) for w, down, up in pairs)


class ParallelKind:
    name = "parallel adapters"

    def matches(self, module):
        return type(module) is Parallel

    def why_not(self, module):
        return "a single adapter" if len(module.down) == 1 else None

    def call(self, module, impl, x):
        if x.dim() != 3:
            return None
        return StackedCall(
            x, module.weights, torch.cat([d.weight for d in module.down]),
            torch.cat([u.weight.t() for u in module.up]), [d.out_features for d in module.down],
            "relu", torch.cat([d.bias for d in module.down]),
            torch.stack([u.bias for u in module.up]), base=x,
        ).run(impl)  # fmt: skip


def test_modules_of_a_user():
    assert isinstance(ParallelKind(), FusedKind)
    torch.manual_seed(0)
    model = nn.Sequential(Parallel(16, (3, 5)), Parallel(16, (4,)))
    x = torch.randn(2, 4, 16)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    report = pemt_fast.fuse(model, kinds=[ParallelKind(), *default_kinds()])
    assert [(s.name, s.reason) for s in report.sites] == [("0", ""), ("1", "a single adapter")]
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert model(x[0]).shape == (4, 16)  # which its own forward computes
