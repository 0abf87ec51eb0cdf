"""What makes inference cheaper: adapters merged into T5's weights, experts that are dropped."""

import copy

import pytest
import torch
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast
from pemt_fast.nn.gates import drop_below

STAGE_1 = {"stage": 1, "sources": (), "source_prompt_lengths": None}
ONE_SOURCE = {"sources": ["a"], "source_prompt_lengths": (3,)}
MERGING = {"stage-1": STAGE_1, "one-source": ONE_SOURCE, "one-source-gated": ONE_SOURCE}


def build(case="", **changes):
    model = pemt_fast.get_model(
        tiny_t5(gated=case.endswith("gated")), pemt_config(**MERGING.get(case, {}), **changes)
    )
    return randomise(model)


def logits(model):
    with torch.no_grad():
        return model(**tiny_batch()).logits


def weights(t5):
    return {name: tensor.clone() for name, tensor in t5.state_dict().items()}


# --- merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MERGING)
def test_merged_computes_the_same(case):
    model = build(case)
    before = logits(model)
    batch = tiny_batch()
    text = model.generate(batch["input_ids"], batch["attention_mask"], num_beams=2, max_length=8)
    model.merge()
    assert model.merged
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    merged_text = model.generate(
        batch["input_ids"], batch["attention_mask"], num_beams=2, max_length=8
    )
    assert torch.equal(merged_text, text)
    # The source adapters are not asked any more.
    for parameter in model.base_model.encoder.block[0].layer[-1].DenseReluDense.wo.parameters():
        if parameter.shape[0] == 4 and parameter.dim() == 2:  # source_rank
            parameter.data.fill_(float("nan"))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["unmerge", "unload", "disabled"])
@pytest.mark.parametrize("case", MERGING)
def test_the_old_weights_come_back_bit_by_bit(case, end):
    t5 = tiny_t5(gated=case.endswith("gated"))
    original = weights(t5)
    model = randomise(pemt_fast.get_model(t5, pemt_config(**MERGING[case])))
    before = logits(model)
    with model.disabled():
        plain = logits(model)
    model.merge()
    model.merge()  # the second one does nothing
    if end == "disabled":
        with model.disabled():
            assert torch.equal(logits(model), plain)
        assert model.merged
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        return
    if end == "unmerge":
        model.unmerge()
        assert not model.merged
        assert torch.equal(logits(model), before)
    restored = weights(model.unload())
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in original.items())


def test_a_merged_model_saves_its_adapters(tmp_path):
    model = build("stage-1")
    before = logits(model)
    model.merge()
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_t5(), tmp_path)
    assert torch.equal(logits(again), before)


def test_merged_follows_a_change_of_dtype():
    model = build("stage-1")
    model.merge()
    model.to(torch.float64)
    model.unmerge()
    assert first_wo(model).base.weight.dtype == torch.float64


def first_wo(model):
    return model.base_model.encoder.block[0].layer[-1].DenseReluDense.wo


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the gates of encoder.0 depend on the input"),
        ({**STAGE_1, "source_kind": "bottleneck"}, "only LoRA sources merge"),
        ({**ONE_SOURCE, "source_kind": "bottleneck"}, "only LoRA sources merge"),
    ],
)
def test_what_does_not_merge_says_so_and_changes_nothing(changes, message):
    model = build(**changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.merge()
    assert not model.merged
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_merged_model_does_not_train():
    model = build("stage-1").train()
    model.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        model(**tiny_batch())
    model.unmerge()
    model(**tiny_batch()).loss.backward()


# --- gate_threshold ------------------------------------------------------------------------------


def test_weights_below_the_threshold_are_dropped():
    gate = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.34, 0.33, 0.33]])
    expected = torch.tensor([[0.625, 0.375, 0.0], [0.0, 1.0, 0.0], [0.34, 0.33, 0.33]])
    torch.testing.assert_close(drop_below(gate, 0.25), expected)
    # None reaches it: the largest one stays.
    only_largest = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0]])
    torch.testing.assert_close(drop_below(gate, 0.95), only_largest)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_dropped_experts_have_no_part_in_the_output(kind):
    model = build(source_kind=kind)
    out = model(**tiny_batch(), output_gates=True)
    threshold = float(torch.cat(list(out.gates.values())).median())
    model.gate_threshold = threshold
    dropped = model(**tiny_batch(), output_gates=True)
    assert not torch.allclose(dropped.logits, out.logits)
    for name, gate in out.gates.items():
        if name == "encoder.0":  # later layers see other states
            torch.testing.assert_close(dropped.gates[name], drop_below(gate, threshold))
    zeros = sum(int((gate == 0).sum()) for gate in dropped.gates.values())
    assert zeros > 0
    assert all(torch.allclose(g.sum(-1), torch.ones(3)) for g in dropped.gates.values())


def test_threshold_zero_and_training_drop_nothing():
    model = build(prompt_dropout=0.0)
    plain = model(**tiny_batch()).loss
    model.gate_threshold = 0.9
    model.train()
    assert torch.equal(model(**tiny_batch()).loss, plain)
    model.eval()
    assert not torch.equal(model(**tiny_batch()).loss, plain)


def test_threshold_while_generating_and_in_files(tmp_path):
    batch = tiny_batch()
    model = build(gate_threshold=0.9)
    assert model.gate_threshold == 0.9
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_t5(), tmp_path)
    assert again.gate_threshold == 0.9
    options = {"num_beams": 3, "max_length": 9, "output_scores": True,
               "return_dict_in_generate": True}  # fmt: skip
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with_threshold = model.generate(ids, mask, **options)
    assert torch.equal(with_threshold.sequences, again.generate(ids, mask, **options).sequences)
    model.gate_threshold = 0.0
    without = model.generate(ids, mask, **options)
    assert not torch.equal(with_threshold.scores[0], without.scores[0])


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_impossible_thresholds(value):
    with pytest.raises(ValueError, match=r"gate_threshold must be in \[0, 1\)"):
        pemt_config(gate_threshold=value)
