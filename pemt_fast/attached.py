# SPDX-License-Identifier: Apache-2.0
"""`AttachedModel`: what can be done with a model that carries adapters, apart from running it.

Switching them off, merging them, taking them away, saving and counting them. The forward pass is
added by `AdapterModel` (`model.py`, methods with a prompt) and `LinearAdapterModel`
(`linear_model.py`, all others).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pemt_fast import checkpoint
from pemt_fast.nn.routing import UNSEEN_TASK, Routing, unroute_checkpoints
from pemt_fast.nn.wrapped_linear import WrappedLinear
from pemt_fast.sharding import any_sharded
from pemt_fast.t5 import Attachment

if TYPE_CHECKING:
    from pemt_fast.attach import MethodConfig


class AttachedModel(nn.Module):
    """A model with adapters.

    Attributes:
        base_model: The model; its attributes (`config`, `generation_config`, …) are available here.
        adapter_config: The method's config, complete: building from it needs no other file.
    """

    def __init__(
        self,
        base_model: Any,
        adapter_config: MethodConfig[Any],
        routing: Routing,
        attachment: Attachment,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_config = adapter_config
        self.routing = routing
        self._attachment = attachment
        self._merged_task: int | None = None
        attachment.seal()
        base_model._pemt_fast_attached = True

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not here are the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _get_name(self) -> str:
        # transformers' trainer tells by it whether label smoothing has to shift the labels.
        return type(self.base_model).__name__

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks; `task_ids` are their numbers in this order."""
        return self.adapter_config.tasks

    def task_number(self, task: int | str | None) -> int:
        """The number of a task given by number or name; of the only one if none is given.

        Raises:
            ValueError: there is no such task, or there are several and none is given.
        """
        if task is None and len(self.tasks) == 1:
            return 0
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task)
        if isinstance(task, int) and UNSEEN_TASK <= task < len(self.tasks):
            return task
        raise ValueError(f"task must be one of {list(self.tasks)}, got {task!r}")

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """As in transformers, whose older versions have it under its older name only."""
        name = "activation_checkpointing_enable"
        if not hasattr(self.base_model, name):
            name = "gradient_checkpointing_enable"
        getattr(self.base_model, name)(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, object] | None = None
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model computes what the untouched model computes."""
        if not self.routing.enabled:
            yield
            return
        self._require_whole("disabled()")
        merged = self.merged
        self.unmerge()
        self._attachment.swap_parameters()
        self.routing.enabled = False
        try:
            yield
        finally:
            self.routing.enabled = True
            self._attachment.swap_parameters()
            if merged:
                self.merge(self._merged_task)

    def _require_whole(self, what: str) -> None:
        if any_sharded(self.parameters()):
            raise RuntimeError(
                f"{what} needs whole parameters and FSDP2 has sharded them: save_pretrained() "
                "here, then load() in a process without sharding"
            )

    def _layers(self) -> list[WrappedLinear]:
        return [m for m in self.base_model.modules() if isinstance(m, WrappedLinear)]

    @property
    def merged(self) -> bool:
        """Whether the adapters are in the model's own weights."""
        return any(layer.merged for layer in self._layers())

    def merge(self, task: int | str | None = None) -> None:
        """Add the adapters to the weights they stand beside, so that they cost nothing any more.

        Exact up to the rounding of the weights, and possible where nothing depends on the input:
        for one task of LoRA and its mixtures, for LoRA sources in stage 1 of PEMT, for a single
        LoRA source in stage 2 (prompt and target adapter stay as they are). `unmerge`, `unload`
        and `disabled` restore the old weights bit by bit.

        Args:
            task: Number or name of the task; needed where the model has several.

        Raises:
            ValueError: something does not merge; the message says what, and nothing is changed.
        """
        self._require_whole("merge()")
        task = None if task is None else self.task_number(task)
        if not self._layers():
            raise ValueError(
                f"{type(self.adapter_config).__name__} puts nothing beside a linear layer: there "
                "is nothing that could be merged into its weight"
            )
        if self.merged and task != self._merged_task:
            raise ValueError(f"task {self._merged_task} is merged already: unmerge() it first")
        layers = [layer for layer in self._layers() if not layer.merged]
        for layer in layers:
            layer.merged_delta(task)
        for layer in layers:
            layer.merge(task)
        self._merged_task = task

    def unmerge(self) -> None:
        """Undo `merge`; without one, nothing."""
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(self, task: int | str | None = None) -> Any:
        """The model with the adapters in its weights for good, and nothing attached any more.

        Args:
            task: As in `merge`.

        Raises:
            ValueError: something does not merge, or would be left over, such as a prompt or a
                prefix; the message says what, and nothing is changed.
        """
        was_merged = self.merged
        self.merge(self._merged_task if was_merged and task is None else task)
        inside = [f"{n}." for n, m in self.named_modules() if isinstance(m, WrappedLinear)]
        if left := [n for n in self.adapter_state_dict() if not n.startswith(tuple(inside))]:
            if not was_merged:
                self.unmerge()
            raise ValueError(
                f"{type(self.adapter_config).__name__} has parts that no weight of the model can "
                f"take in, {left[0]} is the first of {len(left)}: keep the adapters attached"
            )
        weights = [layer.base.weight for layer in self._layers()]
        merged = [weight.data for weight in weights]
        model = self.unload()
        for weight, values in zip(weights, merged, strict=True):
            weight.data = values
        return model

    def unload(self) -> Any:
        """Remove everything that was attached and return the untouched model."""
        self._require_whole("unload()")
        for layer in self._layers():
            layer.release()
        self._attachment.undo()
        unroute_checkpoints(self.base_model.modules())
        del self.base_model._pemt_fast_attached
        return self.base_model

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: object) -> None:
        """Write the adapters (not the model) to `directory`, complete: `load` needs nothing else.

        Safetensors and a JSON config, each written under a temporary name and renamed.
        """
        checkpoint.write(self, directory)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Every tensor that was attached: trained ones, frozen sources, trained layer norms."""
        return checkpoint.adapter_state_dict(self)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `adapter_state_dict`, trained or frozen, to be changed in place."""
        own = self.adapter_state_dict()
        return {name: p for name, p in self.named_parameters() if name in own}

    def count_parameters(self) -> tuple[int, int]:
        """Trainable and total number of parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the counts in the line `peft` users know."""
        trainable, total = self.count_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )
