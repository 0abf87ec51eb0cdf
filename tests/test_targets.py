"""Several targets in one model: every sequence gets what its own model computes."""

import copy
import json

import pytest
import torch
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast

TARGETS = ("cb", "rte", "wic")
LENGTHS = (5, 2, 4)
CASES = {
    "lora": {},
    "gated": {},
    "bottleneck": {"source_kind": "bottleneck"},
    "one-source": {"sources": ["a"], "source_prompt_lengths": (3,)},
    "equal-prompts": {},
    "published": {"published": True},
    "frozen-norms": {"train_layer_norms": False},
}
MIXED = [2, 0, 1, 0]


def build_single(case, k, **changes):
    """Target k: trained parameters of its own, sources that all of them share."""
    length = 4 if case == "equal-prompts" else LENGTHS[k]
    config = pemt_config(target=TARGETS[k], prompt_length=length, **{**CASES[case], **changes})
    torch.manual_seed(0)
    model = pemt_fast.get_model(tiny_t5(gated=case == "gated"), config)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixture" in name or "prompt.sources" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return randomise(model, seed=100 + k)


def build_joined(tmp_path, case="lora", **changes):
    singles = [build_single(case, k, **changes) for k in range(len(TARGETS))]
    folders = [tmp_path / target for target in TARGETS]
    for single, folder in zip(singles, folders, strict=True):
        single.save_pretrained(folder)
    return singles, pemt_fast.load(tiny_t5(gated=case == "gated"), folders)


def rows_of(k):
    return [b for b, task in enumerate(MIXED) if task == k]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_computes_what_each_target_computes_alone(tmp_path, case):
    singles, joined = build_joined(tmp_path, case)
    assert joined.tasks == TARGETS
    batch = tiny_batch(len(MIXED))
    with torch.no_grad():
        out = joined(**batch, task_ids=torch.tensor(MIXED), output_gates=True)
        for k, single in enumerate(singles):
            alone = single(**batch, output_gates=True)
            close(out.logits[rows_of(k)], alone.logits[rows_of(k)])
            for name, gate in alone.gates.items():
                close(out.gates[name][rows_of(k)], gate[rows_of(k)])
        others = joined(**batch, task_ids=[0] * len(MIXED)).logits
    assert not torch.allclose(others[0], out.logits[0], atol=1e-3)


@pytest.mark.parametrize("case", ["lora", "bottleneck", "published"])
def test_the_loss_of_one_target_is_that_of_its_own_model(tmp_path, case):
    singles, joined = build_joined(tmp_path, case)
    batch = tiny_batch(3)
    for k, single in enumerate(singles):
        alone, out = single(**batch), joined(**batch, task_ids=[TARGETS[k]] * 3)
        close(out.aux_loss, alone.aux_loss)
        close(out.loss, alone.loss)


@pytest.mark.parametrize("case", ["lora", "gated", "bottleneck", "equal-prompts"])
def test_gradients_reach_the_target_of_each_sequence_only(tmp_path, case):
    singles, joined = build_joined(tmp_path, case)
    batch = tiny_batch(len(MIXED))
    weights = torch.randn(len(MIXED), 1, 1, generator=torch.Generator().manual_seed(5))
    (joined(**batch, task_ids=MIXED).logits * weights).sum().backward()
    wo = joined.base_model.encoder.block[1].layer[-1].DenseReluDense.wo
    norm = joined.base_model.decoder.block[0].layer[0].layer_norm
    for k, single in enumerate(singles):
        rows = rows_of(k)
        (single(**batch).logits[rows] * weights[rows]).sum().backward()
        own = single.base_model.encoder.block[1].layer[-1].DenseReluDense.wo
        units = wo.target_adapter.rows(k)
        pairs = {
            "gate": (wo.gate.w_gate.grad[k], own.gate.w_gate.grad),
            "down": (wo.target_adapter.w_down.grad[units], own.target_adapter.down.weight.grad),
            "up": (wo.target_adapter.w_up.grad[units], own.target_adapter.up.weight.grad.t()),
            "b_up": (wo.target_adapter.b_up.grad[k], own.target_adapter.up.bias.grad),
            "prompt": (joined.prompt.prompts[k].grad, single.prompt.prompt.grad),
            "norm": (
                norm.weights.grad[k],
                single.base_model.decoder.block[0].layer[0].layer_norm.weight.grad,
            ),
        }
        for name, (ours, alone) in pairs.items():
            assert float(alone.abs().max()) > 0, name
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampled-many": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "static-cache": {"cache_implementation": "static"},
    "static-cache-beams": {"cache_implementation": "static", "num_beams": 3},
    "no-cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("case", ["lora", "bottleneck"])
def test_generation_equals_one_target_at_a_time(tmp_path, case, way):
    singles, joined = build_joined(tmp_path, case)
    batch = tiny_batch(len(MIXED), source=9)
    # Random weights like the pad token too well.
    options = {"max_new_tokens": 10, "suppress_tokens": [0, 1], **GENERATION[way]}
    many = options.get("num_return_sequences", 1)

    def run(model, **kwargs):
        torch.manual_seed(7)
        return model.generate(batch["input_ids"], batch["attention_mask"], **options, **kwargs)

    mixed = run(joined, task_ids=MIXED)
    for k, single in enumerate(singles):
        alone = run(single)
        for b in rows_of(k):
            assert torch.equal(mixed[b * many : b * many + many], alone[b * many : b * many + many])
    assert len({tuple(row) for row in mixed.tolist()}) > 1


@pytest.mark.parametrize("k", range(3))
def test_generation_of_one_sequence(tmp_path, k):
    singles, joined = build_joined(tmp_path)
    ids = tiny_batch(1)["input_ids"]
    for options in ({}, {"num_beams": 4}):
        expected = singles[k].generate(ids, max_new_tokens=8, **options)
        found = joined.generate(ids, max_new_tokens=8, task_ids=[k], **options)
        assert torch.equal(found, expected)


def test_the_joined_model_survives_its_files(tmp_path):
    _, joined = build_joined(tmp_path)
    joined.save_pretrained(tmp_path / "all")
    again = pemt_fast.load(tiny_t5(), tmp_path / "all")
    assert again.tasks == TARGETS
    batch = tiny_batch(len(MIXED))
    assert torch.equal(
        again(**batch, task_ids=MIXED).logits, joined(**batch, task_ids=MIXED).logits
    )
    saved = json.loads((tmp_path / "all" / "pemt_fast_config.json").read_text())
    assert saved["target"] == list(TARGETS) and saved["prompt_length"] == list(LENGTHS)


def test_encoder_outputs_are_reused(tmp_path):
    _, joined = build_joined(tmp_path)
    batch = tiny_batch(len(MIXED))
    out = joined(**batch, task_ids=MIXED)
    reused = joined(
        attention_mask=batch["attention_mask"], labels=batch["labels"], task_ids=MIXED,
        encoder_outputs=(out.encoder_last_hidden_state,),
    )  # fmt: skip
    close(reused.logits, out.logits)
    unmasked = joined(input_ids=batch["input_ids"], labels=batch["labels"], task_ids=MIXED)
    reused = joined(
        labels=batch["labels"], task_ids=MIXED,
        encoder_outputs=(unmasked.encoder_last_hidden_state,),
    )  # fmt: skip
    close(reused.logits, unmasked.logits)


@torch.no_grad()
def test_unload_and_disabled_give_the_untouched_model():
    t5 = tiny_t5()
    batch = tiny_batch(3)
    plain = t5(**batch).logits
    names = list(t5.state_dict())
    model = randomise(pemt_fast.get_model(t5, pemt_config(target=["a", "b"])))
    with model.disabled():
        assert torch.equal(model(**batch).logits, plain)
    assert not torch.allclose(model(**batch, task_ids=[0, 1, 0]).logits, plain, atol=1e-3)
    assert model.unload() is t5
    assert list(t5.state_dict()) == names and torch.equal(t5(**batch).logits, plain)


def test_compiles_checkpoints_and_copies(tmp_path):
    _, joined = build_joined(tmp_path)
    batch = {**tiny_batch(len(MIXED)), "task_ids": torch.tensor(MIXED)}
    expected = joined(**batch).loss
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    close(compiled(**batch).loss, expected)
    close(copy.deepcopy(joined)(**batch).loss, expected)
    joined.train()
    joined.prompt.dropout = 0.0
    joined(**batch).loss.backward()
    plain = [p.grad.clone() for p in joined.parameters() if p.requires_grad]
    joined.zero_grad()
    joined.gradient_checkpointing_enable()
    joined(**batch).loss.backward()
    again = [p.grad for p in joined.parameters() if p.requires_grad]
    for first, second in zip(plain, again, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_targets_follow_the_dtype(tmp_path, dtype):
    _, joined = build_joined(tmp_path)
    batch = tiny_batch(len(MIXED))
    expected = joined(**batch, task_ids=MIXED).logits
    joined.to(dtype)
    found = joined(**batch, task_ids=MIXED).logits
    assert found.dtype == dtype
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_fresh_targets_train_together():
    model = pemt_fast.get_model(tiny_t5(), pemt_config(target=["a", "b"], prompt_dropout=0.0))
    batch, ids = tiny_batch(4), torch.tensor([0, 1, 1, 0])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.train()(**batch, task_ids=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(model.prompt.prompts[0], model.prompt.prompts[1])


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, r"task_ids must give the task of each of the 4 sequences \(0: a, 1: b"),
        ([0, 1, 2, 0], ValueError, r"task_ids must be among 0: a, 1: b; got \[0, 1, 2, 0\]"),
        ([0, -1, 0, 0], ValueError, "task_ids must be among"),
        (["a", "b", "cb", "a"], ValueError, "task_ids must be among 0: a, 1: b; got 'cb'"),
        (
            [0, 1],
            ValueError,
            r"task_ids must have shape \[B\] = \[4\], one per sequence, got \[2\]",
        ),
        (torch.zeros(4), TypeError, "task_ids must be integers or names of tasks, got .*float32"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_bad_task_ids(task_ids, error, message, call):
    model = pemt_fast.get_model(tiny_t5(), pemt_config(target=["a", "b"]))
    with pytest.raises(error, match=message):
        if call == "forward":
            model(**tiny_batch(4), task_ids=task_ids)
        else:
            model.generate(tiny_batch(4)["input_ids"], task_ids=task_ids, max_length=3)


def test_one_target_takes_its_only_id():
    model = randomise(pemt_fast.get_model(tiny_t5(), pemt_config()))
    batch = tiny_batch()
    expected = model(**batch).logits
    assert torch.equal(model(**batch, task_ids=torch.zeros(3, dtype=torch.long)).logits, expected)
    assert torch.equal(model(**batch, task_ids=["t"] * 3).logits, expected)
    with pytest.raises(ValueError, match="task_ids must be among 0: t; got"):
        model(**batch, task_ids=[0, 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": ["a", "a"]}, "target must hold different names"),
        ({"target": []}, "target must hold different names"),
        ({"target": ["a", "b/c"]}, "target must be a task name without '/' or '.', got 'b/c'"),
        ({"target": ["a", "b"], "prompt_length": (3,) * 3}, r"prompt_length must hold one value"),
        ({"target": ["a", "b"], "prompt_length": (3, 0)}, "prompt_length must be at least 1"),
        ({"target": ["a", "b"], "description": ["x"] * 3}, "description must hold one value"),
        (
            {"target": ["a", "b"], "stage": 1, "sources": (), "source_prompt_lengths": None},
            "stage 1 trains one task",
        ),
    ],
)
def test_bad_targets(changes, message):
    with pytest.raises(ValueError, match=message):
        pemt_config(**changes)


def test_targets_that_do_not_belong_together(tmp_path):
    build_single("lora", 0).save_pretrained(tmp_path / "cb")
    build_single("lora", 1, target_bottleneck=6).save_pretrained(tmp_path / "narrow")
    other = build_single("lora", 1)
    with torch.no_grad():
        other.prompt.sources[1][0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    source = pemt_config(stage=1, sources=(), source_prompt_lengths=None)
    pemt_fast.get_model(tiny_t5(), source).save_pretrained(tmp_path / "source")
    for folder, message in {
        "narrow": "target_bottleneck is 6, but 8 in .*cb; targets of one model must share it",
        "other": "the frozen prompt.sources.1 differs from that of .*cb",
        "source": "expected one target trained in stage 2",
        "cb": "target must hold different names",
    }.items():
        t5 = tiny_t5()
        with pytest.raises(ValueError, match=message):
            pemt_fast.load(t5, [tmp_path / "cb", tmp_path / folder])
        assert not hasattr(t5, "_pemt_fast_attached")
    with pytest.raises(ValueError, match="at least one directory"):
        pemt_fast.load(tiny_t5(), [])
    assert pemt_fast.load(tiny_t5(), [tmp_path / "cb"]).tasks == ("cb",)


def test_published_names_know_one_target_only():
    model = pemt_fast.get_model(tiny_t5(), pemt_config(target=["a", "b"]))
    with pytest.raises(ValueError, match="one target"):
        pemt_fast.published_names(model)
