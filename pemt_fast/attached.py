# SPDX-License-Identifier: Apache-2.0
"""`AttachedModel`: what can be done with a T5 that carries adapters, apart from running it.

Switching them off, merging them, taking them away, saving and counting them. `AdapterModel`
(`model.py`) adds the forward pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pemt_fast import checkpoint
from pemt_fast.nn.routing import Routing, unroute_checkpoints
from pemt_fast.t5 import Attachment, T5Model, feed_forward_sites

if TYPE_CHECKING:
    from pemt_fast.attach import MethodConfig


class AttachedModel(nn.Module):
    """A T5 with adapters.

    Attributes:
        base_model: The T5; its attributes (`config`, `generation_config`, …) are available here.
        adapter_config: The method's config, complete: building from it needs no other file.
    """

    def __init__(
        self,
        base_model: T5Model,
        adapter_config: MethodConfig,
        routing: Routing,
        attachment: Attachment,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_config = adapter_config
        self.routing = routing
        self._attachment = attachment
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

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks; `task_ids` are their numbers in this order."""
        return self.adapter_config.tasks

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model computes what the untouched T5 computes."""
        if not self.routing.enabled:
            yield
            return
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
                self.merge()

    def _tails(self) -> list[Any]:
        return [site.feed_forward.wo for site in feed_forward_sites(self.base_model)]

    @property
    def merged(self) -> bool:
        """Whether the adapters are in T5's own weights."""
        return any(tail.merged for tail in self._tails())

    def merge(self) -> None:
        """Add the adapters to the weights of `wo`, so that they cost nothing at inference.

        Exact up to the rounding of the weights, and possible where nothing depends on the input:
        LoRA sources in stage 1, a single LoRA source in stage 2. The prompt and the target adapter
        stay as they are. `unmerge`, `unload` and `disabled` restore the old weights bit by bit.

        Raises:
            ValueError: something does not merge; the message says what, and nothing is changed.
        """
        tails = [tail for tail in self._tails() if not tail.merged]
        for tail in tails:
            tail.merged_delta()
        for tail in tails:
            tail.merge()

    def unmerge(self) -> None:
        """Undo `merge`; without one, nothing."""
        for tail in self._tails():
            tail.unmerge()

    def unload(self) -> T5Model:
        """Remove everything that was attached and return the untouched T5."""
        for tail in self._tails():
            tail.release()
        self._attachment.undo()
        for stack in (self.base_model.encoder, self.base_model.decoder):
            unroute_checkpoints(stack.block)
        del self.base_model._pemt_fast_attached
        return self.base_model

    def save_pretrained(self, directory: str | os.PathLike[str], **kwargs: object) -> None:
        """Write the adapters (not the T5) to `directory`, complete: `load` needs nothing else.

        Safetensors and a JSON config, each written under a temporary name and renamed.
        """
        checkpoint.write(self, directory)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Every tensor that was attached: trained ones, frozen sources, trained layer norms."""
        return checkpoint.adapter_state_dict(self)

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
