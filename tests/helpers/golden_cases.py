"""Loads the cases under `tests/golden/pemt` that the published PEMT code produced."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

import pemt_fast

GOLDEN = Path(__file__).parents[1] / "golden" / "pemt"
CASES = sorted(p.name for p in GOLDEN.iterdir())


def load_case(case: str, dtype: torch.dtype = torch.float32):
    folder = GOLDEN / case
    meta = json.loads((folder / "meta.json").read_text())
    t5 = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    if meta["stage"] == 1:
        model = pemt_fast.load_published_pemt(t5, sources=[folder])
    else:
        model = pemt_fast.load_published_pemt(
            t5,
            sources=[folder / "sources" / name for name in meta["sources_in_order"]],
            target=folder,
            extra=folder / "gates_and_norms.safetensors",
        )
    outputs = "outputs64" if dtype == torch.float64 else "outputs"
    return (
        model.eval(),
        meta,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / f"{outputs}.safetensors"),
    )
