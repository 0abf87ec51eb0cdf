"""What blocks of the documentation use without defining it: tiny models, a batch, trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import linear_models
import t5_factory
import torch
import transformers

import pemt_fast
from pemt_fast.data import synthetic_tokenizer


def tiny_t5(*args: Any, **kwargs: Any) -> Any:
    """What a hub name stands for; its tokens are those of `synthetic_tokenizer`."""
    return t5_factory.tiny_t5(vocabulary=len(synthetic_tokenizer())).train()


def tiny_llama(*args: Any, **kwargs: Any) -> Any:
    """The same, decoder-only."""
    return linear_models.tiny_model("llama").train()


def write_runs() -> None:
    """Trained sources and targets, as `pemt-fast train` leaves them."""
    sources = [f"runs/sources/{name}" for name in ("mnli", "qqp")]
    for source in sources:
        config = pemt_fast.PemtConfig(
            stage=1, target=Path(source).name, source_rank=4, prompt_length=6
        )
        pemt_fast.get_model(tiny_t5(), config).save_pretrained(source)
    for target in ("cb", "rte", "wic"):
        config = pemt_fast.PemtConfig(sources=sources, target=target, prompt_length=5)
        model = pemt_fast.get_model(tiny_t5(), config)
        model.save_pretrained(f"runs/{target}")
    bottleneck = pemt_fast.get_model(tiny_t5(), pemt_fast.BottleneckConfig())
    pemt_fast.export_adapterhub(bottleneck, "downloaded/adapter")


def names(folder: Path) -> dict[str, Any]:
    """What the pages use without defining it; made anew for every block."""
    tokenizer = synthetic_tokenizer()
    texts = ["premise a hypothesis b", "b c", "d e f g", "h"]
    batch = tokenizer(texts, text_target=["a", "b", "c d", "e"], padding=True, return_tensors="pt")
    rows = [
        {name: values[i] for name, values in batch.items()} | {"task_ids": torch.tensor(0)}
        for i in range(len(texts))
    ]
    arguments = transformers.Seq2SeqTrainingArguments(
        str(folder / "checkpoints"), max_steps=2, logging_steps=1, use_cpu=True,
        per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    return {
        "pemt_fast": pemt_fast, "t5": tiny_t5(), "other_t5": tiny_t5(), "llama": tiny_llama(),
        "tokenizer": tokenizer, "batch": dict(batch), "ids": batch["input_ids"],
        "mask": batch["attention_mask"], "rows": rows, "arguments": arguments, "torch": torch,
    }  # fmt: skip
