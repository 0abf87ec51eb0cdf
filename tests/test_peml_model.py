"""PEML on tiny models: sharing, what a search leaves, files, errors."""

import copy
import dataclasses
import itertools

import pytest
import torch
from linear_models import MODELS, tiny_inputs, tiny_model
from t5_factory import randomise
from torch import nn

import pemt_fast
from pemt_fast.nn.adapted_linear import AdaptedLinear
from pemt_fast.nn.prefix_operators import OPERATORS

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SHARING = ("none", "architecture", "network")
LAYERS = {"t5": 6, "llama": 2}
every_model = pytest.mark.parametrize("kind", MODELS)
every_sharing = pytest.mark.parametrize("sharing", SHARING)


def peml(kind="t5", *, random=True, **changes):
    options = {"r": 2, "prefix_length": 5, "prefix_width": 8, "prefix_depth": 2, **changes}
    torch.manual_seed(1)
    model = pemt_fast.get_model(tiny_model(kind), pemt_fast.PemlConfig(**options))
    return randomise(model, scale=0.3) if random else model


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@every_sharing
@every_model
def test_lora_and_prefix_are_trained_together_and_nothing_else(kind, sharing):
    model = peml(kind, sharing=sharing).train()
    own = tiny_model(kind).state_dict().keys()
    grads = gradients(model, tiny_inputs(kind))
    assert all(g is not None and bool(g.isfinite().all()) for g in grads.values())
    ends = {name.rpartition(".")[2] for name in grads}
    assert {"w_down", "w_up", "seed", "out", "alpha"} <= ends
    assert not {name.removeprefix("base_model.") for name in grads} & own
    linears = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    plain = tiny_model(kind)
    inside = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == len(inside) - 1  # all but the language head


@pytest.mark.parametrize(
    ("sharing", "networks", "logits"), [("none", 6, 6), ("architecture", 6, 1), ("network", 1, 1)]
)
def test_what_layers_share(sharing, networks, logits):
    model = peml(sharing=sharing)
    assert len(model.prefixes()) == LAYERS["t5"]
    assert (len(model.networks()), len(model.logits())) == (networks, logits)
    assert len(model.architecture()) == logits == len(model.router_parameters())
    seeds = {id(prefix.source.seed) for prefix in model.prefixes().values()}
    assert len(seeds) == LAYERS["t5"]
    keys = [prefix()[0] for prefix in model.prefixes().values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(keys, 2))


@every_model
def test_the_search_is_in_the_loss_of_training_only(kind):
    model, batch = peml(kind, entropy_weight=0.5), tiny_inputs(kind)
    plain = {}
    for progress in (0.0, 0.5, 1.0):
        model.search_at(progress)
        model.eval()
        plain[progress] = model(**batch).loss
        model.train()
        # Of what can be decided for: all but `none`, the last one; skip is the identity at first.
        weights = [
            w[:, :-1] / w[:, :-1].sum(-1, keepdim=True) for w in model.architecture_weights()
        ]
        most = torch.tensor([len(OPERATORS) - 2.0, len(OPERATORS) - 1.0]).log()
        share = sum((torch.special.entr(w).sum(-1) / most).mean() for w in weights) / len(weights)
        added = model(**batch).loss - plain[progress]
        torch.testing.assert_close(added, 0.5 * progress * share.to(added.dtype), **CLOSE)
    assert plain[0.0] != plain[1.0]  # another temperature


def test_progress_is_a_part():
    with pytest.raises(ValueError, match="progress must be from 0 to 1, got 1.5"):
        peml().search_at(1.5)


@every_sharing
@every_model
def test_discretised_computes_what_a_decided_search_computes(kind, sharing):
    model, batch = peml(kind, sharing=sharing), tiny_inputs(kind)
    with torch.no_grad():
        for number, logits in enumerate(model.logits()):
            for cell, row in enumerate(logits.alpha):
                row.zero_()[(3 * number + 5 * cell + 2) % (len(OPERATORS) - 1)] = 1000.0
    names = tuple(OPERATORS)
    expected_names = tuple(
        tuple(names[(3 * number + 5 * cell + 2) % (len(names) - 1)] for cell in range(2))
        for number in range(len(model.logits()))
    )
    assert model.architecture() == expected_names
    expected, parameters = model(**batch).logits, model.count_parameters()[0]
    model.discretise()
    assert model.architecture() == expected_names == model.adapter_config.architecture
    assert not model.logits() and not model.router_parameters()
    assert model.adapter_config.router_learning_rate is None
    assert model.count_parameters()[0] < parameters
    assert len(model.networks()) == (1 if sharing == "network" else LAYERS[kind])
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    gradients(model.train(), batch)
    with pytest.raises(RuntimeError, match="the architecture is fixed already"):
        model.discretise()
    anew = pemt_fast.get_model(tiny_model(kind), model.adapter_config)
    assert anew.adapter_state_dict().keys() == model.adapter_state_dict().keys()
    assert anew.architecture() == expected_names


@every_model
def test_materialised_computes_the_same_without_networks(kind):
    model, batch = peml(kind), tiny_inputs(kind)
    with pytest.raises(RuntimeError, match=r"still searched: discretise\(\) first"):
        model.materialise()
    model.discretise()
    expected = model(**batch).logits
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=5)
    model.materialise()
    torch.testing.assert_close(model(**batch).logits, expected)
    assert not model.networks() and model.adapter_config.prefix_depth == 0
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), tokens)
    model.materialise()
    model.merge()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge()
    torch.testing.assert_close(model(**batch).logits, expected)


@every_sharing
@every_model
def test_files_at_every_stage(kind, sharing, tmp_path):
    model, batch = peml(kind, sharing=sharing, adapter_dtype="float32"), tiny_inputs(kind)
    for stage in ("searched", "discretised", "materialised"):
        if stage == "discretised":
            model.discretise()
        if stage == "materialised":
            model.materialise()
        expected = model(**batch).logits
        model.save_pretrained(tmp_path / stage)
        again = pemt_fast.load(tiny_model(kind), tmp_path / stage)
        assert again.adapter_config == model.adapter_config
        assert torch.equal(again(**batch).logits, expected)
        twin = copy.deepcopy(again)
        assert torch.equal(twin(**batch).logits, expected)
        with torch.no_grad():
            next(iter(twin.prefixes().values())).source.parameters().__next__().add_(1.0)
        assert torch.equal(again(**batch).logits, expected)
        assert not torch.equal(twin(**batch).logits, expected)


@every_model
def test_generation_makes_the_prefix_once(kind, monkeypatch):
    model, batch = peml(kind), tiny_inputs(kind)
    model.discretise()
    calls = []
    network = type(model.networks()[0])
    forward = network.forward
    monkeypatch.setattr(
        network, "forward", lambda self, seed: calls.append(1) or forward(self, seed)
    )
    model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6)
    assert len(calls) == LAYERS[kind]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_sharing
@every_model
def test_gradient_checkpointing_while_searching(kind, sharing, reentrant):
    # In float64: a network of all operators on random values is far from well-conditioned.
    model, batch = peml(kind, sharing=sharing).double().train(), tiny_inputs(kind)
    model.search_at(0.5)
    expected = {n: g.clone() for n, g in gradients(model, batch).items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, batch), expected, **CLOSE)


@every_model
def test_a_search_compiles_to_one_graph_for_all_its_steps(kind):
    torch._dynamo.reset()
    model, batch = peml(kind).train(), tiny_inputs(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for progress in (0.0, 0.5, 1.0):
            model.search_at(progress)
            expected = model(**batch).loss
            torch.testing.assert_close(compiled(**batch).loss, expected, **CLOSE)


def test_a_prefix_is_not_dropped_by_the_export(tmp_path):
    with pytest.raises(ValueError, match="model must be a LoRA alone: there is no place for a pre"):
        pemt_fast.export_peft_lora(peml(), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_unload_gives_the_untouched_model():
    plain, batch = tiny_model("t5"), tiny_inputs("t5")
    base = peml().unload()
    assert base.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(base(**batch).logits, plain(**batch).logits)
    assert all(
        type(m.config).__name__ == "T5Config" for m in base.modules() if hasattr(m, "config")
    )


def test_an_architecture_per_network():
    cells = (("linear", "gated"), ("conv3", "skip"), ("mlp_relu", "identity"))
    model = peml(sharing="none", prefix_places=("decoder", "cross"), architecture=cells + cells[:1])
    assert model.architecture() == cells + cells[:1]
    shared = peml(sharing="architecture", architecture=cells[:1])
    assert len(shared.networks()) == 6
    model = peml(sharing="network", architecture=cells[1:2])
    assert len(model.networks()) == 1


BAD = [
    ({"prefix_length": 0}, "prefix_length must be an integer of at least 1, got 0"),
    ({"prefix_depth": -1}, "prefix_depth must be an integer of at least 0, got -1"),
    ({"sharing": "all"}, "sharing must be one of ['none', 'architecture', 'network'], got 'all'"),
    ({"operators": ()}, "operators must be of "),
    ({"operators": ("linear", "attention")}, "operators must be of "),
    ({"operators": ("linear", "linear")}, "operators must be of "),
    ({"temperature": (1.0, 0.0)}, "temperature must be two positive numbers, got [1.0, 0.0]"),
    ({"entropy_weight": -0.1}, "entropy_weight must be at least 0, got -0.1"),
    ({"architecture": (("linear",),)}, "architecture must have prefix_depth = 2 operators in each"),
    ({"architecture": (("linear", "attention"),)}, "architecture must be of "),
    ({"prefix_places": ("middle",)}, "prefix_places must be of ['encoder', 'decoder', 'cross']"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_configs_name_the_field(changes, message):
    with pytest.raises(ValueError) as raised:
        pemt_fast.PemlConfig(**changes)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"prefix_places": ("cross",)}, "prefix_places must be of ['decoder'] for this"),
        ("t5", {"architecture": (("skip", "skip"),) * 2}, "architecture must have one list of "),
        ("t5", {"target_modules": ("nowhere",)}, "target_modules ('nowhere',) name no layer"),
    ],
    ids=["places", "architecture", "layers"],
)
def test_what_does_not_fit_the_model(kind, changes, message):
    base = tiny_model(kind)
    before = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(ValueError) as raised:
        pemt_fast.get_model(base, pemt_fast.PemlConfig(**changes))
    assert str(raised.value).startswith(message)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == before


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="must have attention layers with k and v"):
        pemt_fast.get_model(torch.nn.Linear(3, 4), pemt_fast.PemlConfig())


def test_configs_survive_json():
    config = pemt_fast.PemlConfig(architecture=[["linear", "skip"]], sharing="network")
    values = config.to_dict()
    assert values.pop("method") == "peml"
    assert pemt_fast.PemlConfig.from_dict(values) == config
    assert dataclasses.replace(config, architecture=None).searches
