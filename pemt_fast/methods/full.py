# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: every weight of the model, or of some of its modules, is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pemt_fast.methods.linear_config import is_meant
from pemt_fast.methods.task_config import TaskConfig
from pemt_fast.nn.routing import Routing
from pemt_fast.t5 import Attachment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.linear_model import LinearAdapterModel


@dataclass(frozen=True, kw_only=True)
class FullFineTuningConfig(TaskConfig):
    """The weights themselves are trained; works for every model, `task_ids` make no difference.

    What is trained is a copy in the model's place, in the model's dtype. The originals are kept
    for `disabled()` and `unload()`, so the trained weights take twice their memory, besides
    gradients and optimizer states. Tied weights stay tied and are saved once; training one of
    them trains all.

    Attributes:
        target_modules: Last parts of the names of modules, `("layer_norm", "lm_head")`, or a
            regular expression for whole names; all weights inside them are trained. None: all
            weights of the model.
        num_tasks, task_names: As in `TaskConfig`.
    """

    method: ClassVar[str] = "full"
    uses_tasks: ClassVar[bool] = False

    num_tasks: int = 1
    target_modules: str | Sequence[str] | None = None

    def attach(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> LinearAdapterModel:
        """Build the method on `model`; called by `get_model` and `load`."""
        from pemt_fast.linear_model import LinearAdapterModel

        chosen = self.weights(model)
        for name, weight in chosen.items():
            if not weight.is_floating_point():
                raise ValueError(
                    f"only floating-point weights can be trained, {name} is {weight.dtype}: load "
                    "the model without quantisation, or choose others with target_modules"
                )
        attachment = Attachment(model)
        attachment.train_copies(chosen.values())
        return LinearAdapterModel(model, self, Routing(), attachment).train(model.training)

    def weights(self, model: Any) -> dict[str, nn.Parameter]:
        """The weights that are trained by their names in `model`, tied ones under any of theirs.

        Raises:
            ValueError: `target_modules` name no module that has weights.
        """
        if self.target_modules is None:
            return dict(model.named_parameters())
        found = {
            f"{name}.{inner}": weight
            for name, module in model.named_modules()
            if name and is_meant(name, self.target_modules)
            for inner, weight in module.named_parameters()
        }
        if not found:
            last = {name.split(".")[-2] for name, _ in model.named_parameters() if "." in name}
            raise ValueError(
                f"target_modules {self.target_modules!r} name no module with weights; "
                f"there are {sorted(last)}"
            )
        return found
