"""Tiny random T5s and batches for the model tests; no download."""

import torch
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import pemt_fast

D_MODEL, D_FF, VOCAB = 32, 64, 80


def tiny_t5(
    *, gated: bool = False, mt5: bool = False, dropout: float = 0.0, seed: int = 0,
    vocabulary: int = VOCAB,
):  # fmt: skip
    """A two-layer T5 with random weights in evaluation mode."""
    torch.manual_seed(seed)
    config_class, model_class = (
        (MT5Config, MT5ForConditionalGeneration) if mt5 else (T5Config, T5ForConditionalGeneration)
    )
    config = config_class(
        vocab_size=vocabulary,
        d_model=D_MODEL,
        d_kv=8,
        d_ff=D_FF,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu" if gated or mt5 else "relu",
        tie_word_embeddings=not (gated or mt5),
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=0.3,
    )
    return model_class(config).eval()


def tiny_batch(batch: int = 3, source: int = 7, target: int = 5, seed: int = 1):
    """Right-padded inputs and labels; every row but the first has padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCAB, (batch, source), generator=generator)
    labels = torch.randint(2, VOCAB, (batch, target), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(1, batch):
        mask[row, source - row :] = 0
        labels[row, target - 1 :] = -100
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}


def pemt_config(**changes):
    """Stage 2 with three fresh sources and prompts of unequal length."""
    values = {
        "sources": ["a", "b", "c"],
        "target": "t",
        "source_rank": 4,
        "target_bottleneck": 8,
        "prompt_length": 5,
        "source_prompt_lengths": (6, 3, 4),
    }
    return pemt_fast.PemtConfig(**{**values, **changes})


def randomise(model, seed: int = 3, scale: float = 0.2):
    """Give every trained parameter a value that matters: gates start at zero otherwise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))
    return model
