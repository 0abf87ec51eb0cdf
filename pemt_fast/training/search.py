# SPDX-License-Identifier: Apache-2.0
"""`SearchTrainer`: train a `PemlModel` while its architecture is searched.

Each step sets temperature, entropy weight and share of `none` of its part; they depend on the
step alone, so a resumed search goes on as it would have. Architecture and everything else learn
together from the training data (single-level), or the architecture from a validation part
(bi-level, first order): each step then takes the gradient of the architecture from a batch of that
part and all others from a training batch, at the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pemt_fast.peml_model import PemlModel
from pemt_fast.training.trainer import AdapterTrainer


class SearchTrainer(AdapterTrainer):
    """`AdapterTrainer` for the search of a `PemlModel`.

    The architecture has the learning rate of its config, everything else that of the arguments.
    `history` holds the weights of the operators over the steps at which transformers logs.

    Args:
        *args: As in `Seq2SeqTrainer`.
        architecture_dataset: For the bi-level search: examples that the architecture is trained on.
        **kwargs: As in `AdapterTrainer`.

    Raises:
        ValueError: the model's architecture is not searched.
    """

    def __init__(self, *args: Any, architecture_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PemlModel) or not model.adapter_config.searches:
            raise ValueError(
                "model must be a PemlModel whose architecture is searched, got "
                f"{type(model).__name__}"
            )
        self.searched: PemlModel = model
        self.architecture_dataset = architecture_dataset
        self.backward_passes = 0  # of the step so far: more than one with accumulation
        self.add_callback(_Schedule(self))

    @property
    def history(self) -> list[dict[str, Any]]:
        """`step` and `weights`, by network, cell and operator."""
        entries = self.state.log_history
        return [
            {"step": e["step"], "weights": e["architecture_weights"]}
            for e in entries
            if "architecture_weights" in e
        ]

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the weights of the operators."""
        if "loss" in logs:
            weights = [w.tolist() for w in self.searched.architecture_weights()]
            logs = {**logs, "architecture_weights": weights}
        super().log(logs, *args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in transformers; bi-level with the architecture's gradient from its own data."""
        if self.architecture_dataset is None:
            return super().training_step(model, inputs, *args, **kwargs)
        parameters = self.searched.router_parameters()
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        loss = super().training_step(model, inputs, *args, **kwargs)
        batch = self._prepare_inputs(self.architecture_batch())
        self.backward_passes += 1
        with self.compute_loss_context_manager():
            own: Any = self.compute_loss(model, batch)
        own = own / self.args.gradient_accumulation_steps
        for parameter, old, grad in zip(
            parameters, before, torch.autograd.grad(own, parameters), strict=True
        ):
            parameter.grad = grad if old is None else old + grad
        return loss

    def architecture_batch(self) -> dict[str, Any]:
        """Drawn by the step alone: a resumed search sees what it would have seen."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        passes = self.args.gradient_accumulation_steps
        number = self.state.global_step * passes + self.backward_passes
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        size = min(self.args.train_batch_size, len(self.architecture_dataset))
        chosen = torch.randperm(len(self.architecture_dataset), generator=generator)[:size]
        rows = [self.architecture_dataset[i] for i in chosen.tolist()]
        assert self.data_collator is not None
        return self.data_collator(rows)


class _Schedule(TrainerCallback):
    def __init__(self, trainer: SearchTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step is at 0, the last at 1."""
        progress = state.global_step / max(state.max_steps - 1, 1)
        self.trainer.searched.search_at(min(progress, 1.0))
        self.trainer.backward_passes = 0
