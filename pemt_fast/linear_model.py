# SPDX-License-Identifier: Apache-2.0
"""`LinearAdapterModel`: any Hugging Face model whose linear layers carry adapters.

Encoder-decoder or decoder-only. The forward pass tells the layers which task each sequence belongs
to (`nn/routing.py`); the layers are in `nn/adapted_linear.py`, what else the model can do is in
`attached.py`. It serves as well where adapters are behind sub-layers (`nn/sublayer.py`) and where
the weights themselves are trained (`methods/full.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pemt_fast.attached import AttachedModel
from pemt_fast.inputs import TaskIds, read_task_ids
from pemt_fast.nn.adapted_linear import AdaptedLinear
from pemt_fast.nn.routers import Router
from pemt_fast.nn.routing import UNSEEN_TASK, RoutingState, route_checkpoints
from pemt_fast.sharding import any_sharded

if TYPE_CHECKING:
    from pemt_fast.methods.task_config import TaskConfig


class LinearAdapterModel(AttachedModel):
    """A model with adapters beside its linear layers. Built by `get_model`.

    Attributes:
        base_model, adapter_config: See `AttachedModel`.
    """

    # As for `AdapterModel`.
    accepts_loss_kwargs = False

    adapter_config: TaskConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name, layer in self.adapted_layers().items():
            layer.name = name

    def _new_state(
        self, task_ids: TaskIds | None, batch: int, device: torch.device
    ) -> RoutingState:
        if not self.routing.enabled or self.merged or not self.adapter_config.uses_tasks:
            return RoutingState()
        tasks = read_task_ids(task_ids, self.tasks, batch, device, knows_unseen=True)
        state = RoutingState(task_ids=tasks, num_tasks=len(self.tasks))
        # Where looking waits for nothing: with all tasks known the routers have less to do.
        if tasks is not None and tasks.device.type == "cpu" and not torch.compiler.is_compiling():
            state.may_be_unseen = bool((tasks == UNSEEN_TASK).any())
        return state

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        task_ids: TaskIds | None = None,
        **kwargs: object,
    ) -> Any:
        """The model's forward; arguments that are None are not passed on.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`.
            labels: `[B, S]` or `[B, S_dec]`, -100 for tokens without a label.
            inputs_embeds: `[B, S, d_model]` instead of `input_ids`.
            decoder_input_ids: `[B, S_dec]`, of encoder-decoder models.
            decoder_attention_mask: `[B, S_dec]`.
            encoder_outputs: From an earlier pass.
            task_ids: `[B]`, the task of each sequence, as numbers or names of `tasks`, or
                `UNSEEN_TASK` (-1) for the uniform average. Needed where there are several tasks
                and the method tells them apart; others take no notice of them.
            **kwargs: Passed to the model.
        """
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels,
            "inputs_embeds": inputs_embeds, "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask, "encoder_outputs": encoder_outputs,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        state = self._new_state(task_ids, *_batch_of(given))
        state.wants_loss = labels is not None and self.adapter_config.aux_weight != 0
        state.encoder_mask, state.decoder_mask = attention_mask, None
        if labels is not None:
            state.decoder_mask = labels != -100
        if self.training and not torch.compiler.is_compiling():
            self._route_checkpoints()
        with self.routing.use(state):
            out = self.base_model(**given, **kwargs)
        # A layer that is recomputed during backward must not record a second time.
        state.recording = False
        if getattr(out, "loss", None) is not None and (more := self._more_loss(state)) is not None:
            out.loss = out.loss + more
        return out

    def _more_loss(self, state: RoutingState) -> Tensor | None:
        """What the method adds to the model's loss."""
        if not state.losses:
            return None
        weight = self.adapter_config.aux_weight
        return weight * torch.stack(list(state.losses.values())).mean()

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor | None = None, task_ids: TaskIds | None = None, **kwargs: object
    ) -> Any:
        """The model's `generate`; one call may hold sequences of different tasks.

        Args:
            input_ids: `[B, S]`; `inputs_embeds` instead where the model takes them.
            task_ids: As in `forward`.
            **kwargs: Passed to the model's `generate`.
        """
        given = {"input_ids": input_ids, "inputs_embeds": kwargs.get("inputs_embeds")}
        rows, device = _batch_of(given)
        state = self._new_state(task_ids, rows, device)
        state.generating, state.recording = True, False
        if self.routing.enabled and not self.merged and not self.training:
            # Noise is new in every step of training; without it every step would make the same.
            self._prepare(state, rows)
        with self.routing.use(state):
            return self.base_model.generate(input_ids, **kwargs)

    def _prepare(self, state: RoutingState, rows: int) -> None:
        """What is the same in all steps of a `generate` call."""
        for name, layer in self.adapted_layers().items():
            if any_sharded(layer.parameters()):
                continue  # whole only while the layer runs
            if (prepared := layer.prepare(state, rows)) is not None:
                state.prepared[name] = prepared

    def task_number(self, task: int | str | None) -> int:
        """As in `AttachedModel`; 0 where the method does not tell tasks apart."""
        return super().task_number(task) if self.adapter_config.uses_tasks else 0

    def merge(self, task: int | str | None = None) -> None:
        """As in `AttachedModel`, for one task; afterwards `task_ids` are not looked at."""
        super().merge(self.task_number(task))

    def adapted_layers(self) -> dict[str, AdaptedLinear]:
        """The layers with adapters by the name the plain model has for them."""
        named = self.base_model.named_modules()
        return {name: module for name, module in named if isinstance(module, AdaptedLinear)}

    def router_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that decide how much of each skill a task gets."""
        routers = [m for m in self.modules() if isinstance(m, Router)]
        found = {id(p): p for router in routers for p in router.parameters() if p.requires_grad}
        return list(found.values())  # a router may hold another one

    def parameter_groups(
        self, learning_rate: float, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: routers at the config's `router_learning_rate`, if it has one.

        `AdapterTrainer` does this by itself.
        """
        routers = self.router_parameters()
        own = {id(parameter) for parameter in routers}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        rate = getattr(self.adapter_config, "router_learning_rate", None) or learning_rate
        groups = [
            {"params": others, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": routers, "lr": rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """As in transformers, in both forms."""
        options = activation_checkpointing_kwargs or {}
        if options.get("use_reentrant"):
            # Frozen embeddings would leave the re-entrant form without a gradient.
            self.base_model.enable_input_require_grads()
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        self._route_checkpoints()

    def _route_checkpoints(self) -> None:
        # The re-entrant form loses the gradient of an auxiliary loss.
        takes_reentrant = self.adapter_config.aux_weight == 0
        route_checkpoints(self.base_model.modules(), self.routing, takes_reentrant=takes_reentrant)


def _batch_of(given: dict[str, Any]) -> tuple[int, torch.device]:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if given.get(name) is not None:
            return given[name].shape[0], given[name].device
    if given.get("encoder_outputs") is not None:
        return given["encoder_outputs"][0].shape[0], given["encoder_outputs"][0].device
    raise ValueError("pass input_ids, inputs_embeds or encoder_outputs")
