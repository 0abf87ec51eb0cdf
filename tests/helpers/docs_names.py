"""What blocks of the documentation use without defining it: tiny models, a batch, trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import pemt_fast
from pemt_fast.data import synthetic_tokenizer


def tiny_t5(*args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    tokenizer = synthetic_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def tiny_llama(*args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


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
