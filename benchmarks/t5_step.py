# SPDX-License-Identifier: Apache-2.0
"""Times a PEMT stage-2 step and a forward pass on T5-base's widths, `impl="torch"` against `"cpu"`.

    python benchmarks/t5_step.py [--layers 3] [--rounds 9]

Random weights, 8 sequences of 128 source and 32 target tokens, 6 sources of rank 64. One process,
interleaved; medians.
"""

from __future__ import annotations

import argparse

import torch
from measure import pin_threads
from transformers import T5Config, T5ForConditionalGeneration

import pemt_fast
from pemt_fast.timing import interleave, median_ms, ratio

BATCH, SOURCE, TARGET = 8, 128, 32
IMPLS = ("torch", "cpu")


def model_of(impl: str, layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """T5-base with fewer layers and PEMT's second stage on it, the same weights every time."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=layers, num_decoder_layers=layers,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config).to(dtype)
    sources = [f"source{i}" for i in range(6)]
    pemt = pemt_fast.PemtConfig(sources=sources, target="target", prompt_length=20, impl=impl)
    return pemt_fast.get_model(t5, pemt).train()


def batch() -> dict[str, torch.Tensor]:
    """Token ids; the last quarter of every other source sequence is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 32000, (BATCH, SOURCE), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -SOURCE // 4 :] = 0
    labels = torch.randint(2, 32000, (BATCH, TARGET), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def main() -> None:
    """Print one line per dtype and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="of encoder and decoder each")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    threads = pin_threads(None)
    inputs = batch()
    print(f"T5-base widths, {options.layers}+{options.layers} layers, {threads} threads, ms")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        models = {impl: model_of(impl, options.layers, dtype) for impl in IMPLS}

        def step(model: torch.nn.Module) -> None:
            model(**inputs).loss.backward()
            model.zero_grad(set_to_none=True)

        def forward(model: torch.nn.Module) -> None:
            with torch.no_grad():
                model(**inputs)

        for mode, run in (("step", step), ("forward", forward)):
            runs = {impl: (lambda m=m, run=run: run(m)) for impl, m in models.items()}
            seconds = interleave(runs, rounds=options.rounds)
            times = ", ".join(f"{impl} {median_ms(seconds[impl]):.0f}" for impl in IMPLS)
            print(f"{name} {mode}: {times}, ratio {ratio(seconds, 'torch', 'cpu'):.2f}")


if __name__ == "__main__":
    main()
