"""Run by `torchrun` from test_distributed.py: gradients and training on several processes.

`gradients OUT` compares DDP and FSDP2 with one process, method by method. `train PLAN` does the
runs of a JSON file one after the other: `[{"way", "directory", "resume"}, …]`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from t5_factory import VOCAB, tiny_t5
from torch import Tensor, nn
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_utils import set_seed

import pemt_fast

TOTAL_BATCH, STEPS = 4, 4


def make_model(method: str) -> Any:
    """Adapters whose output is not zero."""
    t5 = tiny_t5()
    torch.manual_seed(1)
    config: Any = {
        # No dropout: what is drawn depends on the number of processes.
        "pemt": lambda: pemt_fast.PemtConfig(
            sources=["a", "b", "c"], target="cb", source_rank=5, prompt_length=4,
            source_prompt_lengths=[4, 3, 5], prompt_dropout=0.0, aux_weight=0.0,
        ),
        "pemt_loss": lambda: pemt_fast.PemtConfig(
            sources=["a", "b", "c"], target="cb", source_rank=5, prompt_length=4,
            source_prompt_lengths=[4, 3, 5], prompt_dropout=0.0,
        ),
        "pemt_stage_1": lambda: pemt_fast.PemtConfig(
            stage=1, target="cb", source_rank=5, prompt_length=4
        ),
        "c_poly": lambda: pemt_fast.CPolyConfig(num_tasks=2),
        "poly": lambda: pemt_fast.PolyConfig(num_tasks=2),
        "mtl_lora": lambda: pemt_fast.MtlLoraConfig(num_tasks=2),
        "peml": lambda: pemt_fast.PemlConfig(num_tasks=2, prefix_length=3),
        "bottleneck": lambda: pemt_fast.BottleneckConfig(),
    }[method]()  # fmt: skip
    model = pemt_fast.get_model(t5, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


METHODS = ("pemt", "pemt_loss", "pemt_stage_1", "c_poly", "poly", "mtl_lora", "peml", "bottleneck")


def make_batch(method: str, rows: int = TOTAL_BATCH) -> dict[str, Tensor]:
    """Rows of equal length, so that the mean over a batch is that of the means of its parts."""
    torch.manual_seed(2)
    return {
        "input_ids": torch.randint(2, VOCAB, (rows, 10)),
        "labels": torch.randint(2, VOCAB, (rows, 6)),
        "task_ids": torch.arange(rows) % (1 if method.startswith("pemt") else 2),
    }


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.eval()  # Poly draws in training
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n.removeprefix("module."): _whole(g) for n, g in found.items()}


def _mean_of_parts(model: nn.Module, batch: dict[str, Tensor], parts: int) -> dict[str, Tensor]:
    """The gradients of one process that takes the parts of a batch one after the other."""
    size = TOTAL_BATCH // parts
    found = [
        _gradients(model, {name: values[i * size :][:size] for name, values in batch.items()})
        for i in range(parts)
    ]
    return {name: sum(part[name] for part in found) / parts for name in found[0]}  # type: ignore[misc]


def _distances(gradients: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by parameter."""
    return {
        name: ((gradients[name].double() - g).norm() / g.norm().clamp_min(1e-12)).item()
        for name, g in true.items()
    }


def compare_gradients(out: Path) -> None:
    """Distances of gradients from those in float64, on one process and on all together.

    Of the whole batch; with the Task Sparsity Loss, which multiplies two means over a batch, of its
    parts one by one.
    """
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    share = TOTAL_BATCH // world
    found = {}
    for method in METHODS:
        batch = make_batch(method)
        own = {name: values[rank * share :][:share] for name, values in batch.items()}
        alone = make_model(method)
        parts = world if method == "pemt_loss" else 1
        true = _mean_of_parts(make_model(method).double(), batch, parts)
        expected = _distances(_mean_of_parts(alone, batch, parts), true)
        tokens = alone.generate(batch["input_ids"], task_ids=batch["task_ids"], max_length=5)
        for way in ("ddp", "fsdp2"):
            model = make_model(method)
            run: Any = (
                pemt_fast.shard(model)
                if way == "fsdp2"
                else nn.parallel.DistributedDataParallel(model)
            )
            _gradients(run, own)
            gradients = _gradients(run, own)  # again: what a cache kept must not be stale
            model.save_pretrained(out / f"{method}-{way}-{rank if way == 'ddp' else 0}")
            same = model.generate(batch["input_ids"], task_ids=batch["task_ids"], max_length=5)
            found[f"{method}-{way}"] = {
                "alone": expected,
                "together": _distances(gradients, true),
                "left_over": sorted(gradients.keys() - true.keys()),
                "generates": torch.equal(tokens, same),
            }
        alone.save_pretrained(out / f"{method}-alone-{rank}")
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train(run: dict[str, Any], world: int) -> None:
    """A few steps of `AdapterTrainer`, saved in the middle and at the end."""
    model = make_model(run["method"])
    if run["way"] == "fsdp2":
        pemt_fast.shard(model)
    rows = make_batch(run["method"], STEPS * TOTAL_BATCH)
    examples = [{k: v[i] for k, v in rows.items()} for i in range(STEPS * TOTAL_BATCH)]
    directory = run["directory"]
    set_seed(3)
    trainer = pemt_fast.AdapterTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            directory, max_steps=STEPS, save_steps=STEPS // 2, save_strategy="steps",
            per_device_train_batch_size=TOTAL_BATCH // world, learning_rate=1e-2,
            report_to="none", disable_tqdm=True, use_cpu=True, seed=3, data_seed=3,
            remove_unused_columns=False,
        ),
        train_dataset=examples,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=run.get("resume"))
    trainer.save_model(f"{directory}/final")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "gradients":
        return compare_gradients(Path(sys.argv[2]))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    for run in json.loads(Path(sys.argv[2]).read_text()):
        train(run, int(os.environ.get("WORLD_SIZE", "1")))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
