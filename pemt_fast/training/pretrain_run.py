# SPDX-License-Identifier: Apache-2.0
"""Shape, optimisation and checkpoints of one pretraining; `pretrain.py` starts it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pemt_fast.checkpoint import replace_file
from pemt_fast.data.span_corruption import (
    EOS_ID,
    MIN_VOCAB_SIZE,
    PAD_ID,
    Batch,
    TaskBatches,
    TextBatches,
)

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

logger = logging.getLogger("pemt_fast")

_WARMUP_SHARE = 0.05
_FINAL_RATE = 0.1  # of the highest
_CURVE_POINTS = 100


@dataclass(frozen=True)
class PretrainConfig:
    """Shape of the model and course of the training.

    Attributes:
        d_model: width of the model.
        d_ff: width inside the feed-forward blocks.
        num_heads: attention heads; divides `d_model`.
        layers: encoder layers.
        decoder_layers: decoder layers.
        vocab_size: token ids, the 100 sentinels included.
        gated: gated GELU feed-forward as in T5 v1.1 instead of ReLU as in v1.0. The embeddings
            stay tied in both.
        steps: optimizer steps.
        batch_size: sequences per step.
        sequence_length: tokens of an input, and most tokens of a task's source.
        lr: highest learning rate, relative to the size of each weight tensor.
        density: share of the tokens that is hidden.
        mean_span: mean length of a hidden span.
        task_share: share of the steps spent on tasks, where there are any.
        precision: "bf16" computes under autocast, weights stay float32; "auto" does so where the
            processor multiplies bf16 natively.
        checkpoint_every: steps between two checkpoints.
        seed: seed of weights, order and spans.
    """

    d_model: int = 256
    d_ff: int = 1024
    num_heads: int = 4
    layers: int = 3
    decoder_layers: int = 3
    vocab_size: int = 4096
    gated: bool = False
    steps: int = 2000
    batch_size: int = 16
    sequence_length: int = 128
    lr: float = 2e-2
    density: float = 0.15
    mean_span: float = 3.0
    task_share: float = 0.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        least = {name: 1 for name in ("d_model", "d_ff", "num_heads", "layers", "decoder_layers")}
        least |= {"steps": 1, "batch_size": 1, "checkpoint_every": 1, "sequence_length": 8}
        least |= {"vocab_size": MIN_VOCAB_SIZE, "mean_span": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        for name in ("density", "task_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads must divide d_model = {self.d_model}, got {self.num_heads}"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")


class PretrainRun:
    """Model, optimizer and position of one training."""

    def __init__(
        self,
        config: PretrainConfig,
        model: T5ForConditionalGeneration,
        text: TextBatches,
        task: TaskBatches | None,
        device: str | None,
    ) -> None:
        self.config, self.text, self.task = config, text, task
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = _computes_in_bf16(config.precision, self.device)
        self.model = model.train()
        self.model.to(self.device)  # type: ignore[arg-type]
        # One group per tensor: each has a learning rate of its own. Position biases start near 0,
        # but are added to attention logits and have to reach their size.
        groups = [
            {"params": [p], "least_size": 1.0 if "relative_attention_bias" in name else 1e-3}
            for name, p in self.model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=0)
        self.losses: list[float] = []
        self.seconds = 0.0

    def train(self, checkpoint: Path, *, progress: bool) -> None:
        """Train to the last step, from the checkpoint where there is one."""
        from tqdm.auto import tqdm

        if checkpoint.is_file():
            self._load(checkpoint)
            logger.info("continuing after step %d", len(self.losses))
        config, shown = self.config, None
        start = len(self.losses)
        bar = tqdm(
            total=config.steps, initial=start, desc="pretrain", unit="step", disable=not progress
        )
        with bar:
            for step in range(start, config.steps):
                began = time.perf_counter()
                loss = self._step(step)
                self.losses.append(loss)
                self.seconds += time.perf_counter() - began
                shown = loss if shown is None else 0.95 * shown + 0.05 * loss
                bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
                bar.update()
                if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                    replace_file(checkpoint, self._write)

    def held_out_loss(self) -> float:
        """Mean over the target tokens of the blocks kept out of the training."""
        self.model.eval()
        with torch.no_grad():
            batches = self.text.held_out()
            sizes = [batch["labels"].size for batch in batches]
            total = sum(
                self._loss(batch).item() * size for batch, size in zip(batches, sizes, strict=True)
            )
        return total / sum(sizes)

    def loss_curve(self) -> list[dict[str, float]]:
        """Mean losses of text and tasks over at most 100 stretches of steps."""
        width = math.ceil(len(self.losses) / _CURVE_POINTS)
        curve = []
        for start in range(0, len(self.losses), width):
            steps = range(start, min(start + width, len(self.losses)))
            point: dict[str, float] = {"step": steps[-1] + 1}
            for name, is_task in (("text_loss", False), ("task_loss", True)):
                losses = [self.losses[s] for s in steps if self._is_task_step(s) == is_task]
                if losses:
                    point[name] = round(sum(losses) / len(losses), 4)
            curve.append(point)
        return curve

    def _task_steps_before(self, step: int) -> int:
        return 0 if self.task is None else math.floor(step * self.config.task_share)

    def _is_task_step(self, step: int) -> bool:
        return self._task_steps_before(step + 1) > self._task_steps_before(step)

    def _batch(self, step: int) -> Batch:
        of_tasks = self._task_steps_before(step)
        if self.task is not None and self._is_task_step(step):
            return self.task.batch(of_tasks)
        return self.text.batch(step - of_tasks)

    def _loss(self, batch: Batch) -> torch.Tensor:
        tensors = {name: torch.from_numpy(ids).to(self.device) for name, ids in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(**tensors).loss

    def _step(self, step: int) -> float:
        loss = self._loss(self._batch(step))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; try an lr below {self.config.lr}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = _learning_rate(step, self.config)
        # As in T5's Adafactor a step is relative to the tensor's size: T5 starts with embeddings
        # of size 1 and query weights below 0.01, too far apart for one rate.
        for group in self.optimizer.param_groups:
            weight = group["params"][0].detach()
            size = weight.norm().item() / math.sqrt(weight.numel())
            group["lr"] = rate * max(group["least_size"], size)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def _write(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        torch.save(state, path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def _learning_rate(step: int, config: PretrainConfig) -> float:
    """Rise linearly, then fall along a cosine."""
    warmup = max(1, round(_WARMUP_SHARE * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


def _computes_in_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # NOTE: not in every version of torch that we support; without it float32 is the safe answer.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def build_model(config: PretrainConfig, vocab_size: int) -> T5ForConditionalGeneration:
    """A T5 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    shape = T5Config(
        vocab_size=vocab_size,
        d_model=config.d_model,
        d_kv=config.d_model // config.num_heads,
        d_ff=config.d_ff,
        num_heads=config.num_heads,
        num_layers=config.layers,
        num_decoder_layers=config.decoder_layers,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        dropout_rate=0.0,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return T5ForConditionalGeneration(shape)
