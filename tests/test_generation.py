"""`generate` with a static cache and a compiled decoding step: one graph that computes no gate."""

import re

import pytest
import torch
from linear_models import adapted
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5
from transformers import CompileConfig

import pemt_fast
from pemt_fast import UNSEEN_TASK

CASES = {
    "lora": {},
    "bottleneck": {"source_kind": "bottleneck"},
    "two-targets": {"target": ["a", "b"]},
    "one-source": {"sources": ["a"], "source_prompt_lengths": (3,)},
    "threshold": {"gate_threshold": 0.4},
    "stage-1": {"stage": 1, "sources": (), "source_prompt_lengths": None},
}
OPTIONS = {
    "max_new_tokens": 8, "suppress_tokens": [0, 1], "no_repeat_ngram_size": 1,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip


class Graphs:
    """A compiler that keeps every graph it gets and runs it as it is."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, example_inputs):
        self.seen.append(graph.graph)
        return graph

    def __deepcopy__(self, memo):
        return self  # generate copies its config, and the compiler in it

    def called(self):
        return {str(node.target) for graph in self.seen for node in graph.nodes}


def compiled_options(graphs):
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=graphs)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def build(case):
    torch._dynamo.reset()
    model = randomise(pemt_fast.get_model(tiny_t5(), pemt_config(**CASES[case])))
    task_ids = {"task_ids": [0, 1, 1, 0]} if case == "two-targets" else {}
    return model, task_ids


@pytest.mark.parametrize("case", CASES)
def test_compiled_decoding_gives_the_same_tokens_from_one_graph(case):
    model, task_ids = build(case)
    graphs = Graphs()
    options = compiled_options(graphs)
    first_logits = []
    for seed in range(3):
        batch = tiny_batch(4, source=9, seed=seed)
        call = (batch["input_ids"], batch["attention_mask"])
        expected = model.generate(*call, **OPTIONS, **task_ids)
        found = model.generate(*call, **OPTIONS, **task_ids, **options)
        assert_same(found, expected)
        first_logits.append(found.logits[-1])
    assert len(graphs.seen) == 1
    assert not torch.allclose(first_logits[0], first_logits[1], atol=1e-3)
    called = re.findall(r"\w+", " ".join(graphs.called()))
    assert any(name.startswith("adapter_mixture") for name in called)
    # Gates and their pooling belong to the first step; nothing in the graph waits for a device.
    for absent in ("softmax", "item", "_local_scalar_dense", "nonzero", "repeat_interleave"):
        assert absent not in called


@pytest.mark.parametrize("method", ["lora", "moe-lora", "mtl-lora", "poly", "mhr", "c-poly"])
def test_compiled_decoding_of_tasks_asks_no_router(method):
    torch._dynamo.reset()
    model = adapted(method)
    graphs = Graphs()
    for seed, task_ids in enumerate(([2, 0, 1, 0], [1, 1, 1, 2], [0, UNSEEN_TASK, 2, 1])):
        batch = tiny_batch(4, source=9, seed=seed)
        call = {k: batch[k] for k in ("input_ids", "attention_mask")}
        expected = model.generate(**call, task_ids=task_ids, **OPTIONS)
        found = model.generate(**call, task_ids=task_ids, **OPTIONS, **compiled_options(graphs))
        assert_same(found, expected)
    assert len(graphs.seen) == 1
    called = re.findall(r"\w+", " ".join(graphs.called()))
    assert any(name.startswith(("adapter_mixture", "skill_mixture")) for name in called)
    for absent in ("sigmoid", "einsum", "item", "repeat_interleave"):
        assert absent not in called


def test_tasks_change_without_a_new_graph():
    model, _ = build("two-targets")
    graphs = Graphs()
    options = compiled_options(graphs)
    batch = tiny_batch(4, source=9)
    call = (batch["input_ids"], batch["attention_mask"])
    texts = []
    for task_ids in ([0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]):
        expected = model.generate(*call, **OPTIONS, task_ids=task_ids)
        texts.append(model.generate(*call, **OPTIONS, task_ids=task_ids, **options))
        assert_same(texts[-1], expected)
    assert len(graphs.seen) == 1
    assert not torch.allclose(texts[0].logits[-1], texts[2].logits[-1], atol=1e-3)


def test_gates_of_the_decoder_are_computed_once(monkeypatch):
    model, _ = build("lora")
    asked = []
    for block in model.base_model.decoder.block:
        gate = block.layer[-1].DenseReluDense.wo.gate
        gate.register_forward_hook(lambda *_: asked.append(1))
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        asked.clear()
        model.generate(tiny_batch()["input_ids"], **OPTIONS, **options)
        assert len(asked) == len(model.base_model.decoder.block), options
