"""Tiny models with adapters on their linear layers, for the tests of those methods."""

import dataclasses

import torch
from t5_factory import VOCAB, randomise, tiny_t5
from transformers import LlamaConfig, LlamaForCausalLM

import pemt_fast

TASKS = 3
METHODS = {
    "lora": lambda: pemt_fast.LoraConfig(r=4),
    "multi-lora": lambda: pemt_fast.MultiLoraConfig(r=4, num_adapters=2),
    "moe-lora": lambda: pemt_fast.MoeLoraConfig(TASKS, num_experts=2, r=4, embedding_width=8),
    "mtl-lora": lambda: pemt_fast.MtlLoraConfig(TASKS, num_up=2, r=4, temperature=0.5),
    "mtl-lora-diagonal": lambda: pemt_fast.MtlLoraConfig(TASKS, r=4, diagonal=True),
    "mix-lora": lambda: pemt_fast.MixLoraConfig(r=2, num_experts=3),
    "poly": lambda: pemt_fast.PolyConfig(TASKS, num_skills=4, r=2),
    "mhr": lambda: pemt_fast.PolyConfig(TASKS, num_skills=3, num_splits=4, r=2),
    "c-poly": lambda: pemt_fast.CPolyConfig(TASKS),
    "c-poly-trained": lambda: pemt_fast.CPolyConfig(TASKS, 2, 2, trains_specific=True),
    "c-poly-average": lambda: pemt_fast.CPolyConfig(TASKS, combine="average"),
    "c-poly-separate": lambda: pemt_fast.CPolyConfig(TASKS, 0, 1),
}
SHARED = ("lora", "multi-lora", "mix-lora")  # the same for all tasks
MODELS = ("t5", "llama")


def tiny_llama(seed: int = 0):
    """A two-layer Llama with random weights in evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_model(kind: str):
    return tiny_t5() if kind == "t5" else tiny_llama()


def tiny_inputs(kind: str, rows: int = 4):
    """Inputs and labels; padding on the right for T5, on the left for Llama."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        if kind == "t5":
            mask[row, 7 - row :] = 0
        else:
            mask[row, :row] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "t5":
        labels = torch.randint(2, VOCAB, (rows, 5), generator=generator)
    else:
        labels = torch.where(mask.bool(), ids, -100)
    return {**inputs, "labels": labels}


def adapted(method: str, kind: str = "t5", *, random: bool = True, **changes):
    """A tiny model with a method on it, whose adapters do something."""
    config = dataclasses.replace(METHODS[method](), **changes)
    model = pemt_fast.get_model(tiny_model(kind), config)
    return randomise(model, scale=0.3) if random else model
