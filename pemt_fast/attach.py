# SPDX-License-Identifier: Apache-2.0
"""How adapters get onto a model: `get_model` from a method's config, `load` from saved files.

What comes out is an `AdapterModel` (`model.py`) for methods with a prompt, PEMT and prompt tuning,
and a `LinearAdapterModel` (`linear_model.py`) for all others. The methods are in `methods/`, the
files are handled by `checkpoint.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pemt_fast import checkpoint
from pemt_fast.attached import AttachedModel
from pemt_fast.safe_files import allocate_at_most, count_elements

Attached = TypeVar("Attached", bound=AttachedModel, covariant=True)


class MethodConfig(Protocol[Attached]):
    """What a method's config offers: it attaches itself and survives a trip through JSON."""

    def attach(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> Attached:
        """Attach the method to `model`, reading what the config names if `reads_sources`."""
        ...

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values, `method` among them."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that `task_ids` number."""
        ...

    @property
    def uses_tasks(self) -> bool:
        """Whether `task_ids` make a difference."""
        ...


def get_model(
    model: Any, config: MethodConfig[Attached], tokenizer: PreTrainedTokenizerBase | None = None
) -> Attached:
    """Attach a method to a model in place and return the wrapped model.

    Args:
        model: For PEMT, prompt tuning and bottleneck adapters a `T5ForConditionalGeneration` (v1.0,
            v1.1, FLAN-T5) or `MT5ForConditionalGeneration`; for adapters on linear layers and full
            fine-tuning any model of transformers. Its own weights are never changed; `unload()`
            gives it back untouched.
        config: For example a `PemtConfig` or a `CPolyConfig`.
        tokenizer: Used to start a task prompt from the words of the task's description.

    Raises:
        TypeError: the method is for T5 and `model` is not one.
        ValueError: something in the config does not fit the model.
        RuntimeError: the model carries adapters already.
    """
    check_free(model)
    return config.attach(model, tokenizer, reads_sources=True)


def check_free(model: Any) -> None:
    """Raise a `RuntimeError` if the model carries adapters."""
    if getattr(model, "_pemt_fast_attached", False):
        raise RuntimeError("model already carries pemt_fast adapters: unload() it first")


def load(model: Any, directory: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Any:
    """Attach what `save_pretrained` wrote to `directory` to a freshly loaded model.

    Several directories of targets that share their sources make one model of all of them: in the
    order given, `task_ids` chooses the target of each sequence.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not fit the model or the other directories; the
            message names it.
    """
    if isinstance(directory, str | os.PathLike):
        config, weights = checkpoint.read(directory)
    else:
        config, weights = _read_several([os.fspath(d) for d in directory])
    check_free(model)
    elements = count_elements(weights.values()), count_elements(model.parameters())
    with allocate_at_most(*elements, directory):
        adapted = config.attach(model, None, reads_sources=False)
    try:
        checkpoint.assign(adapted, weights, directory)
    except ValueError:
        adapted.unload()
        raise
    return adapted


def _read_several(directories: list[str]) -> tuple[MethodConfig[Any], dict[str, Tensor]]:
    if not directories:
        raise ValueError("directory must name at least one directory, got an empty list")
    configs, weights = zip(*(checkpoint.read(d) for d in directories), strict=True)
    if len(directories) == 1:
        return configs[0], weights[0]
    methods = sorted({type(config).__name__ for config in configs})
    join = getattr(configs[0], "join", None)
    if len(methods) > 1 or join is None:
        raise ValueError(
            f"directory: only targets of one method that can share a model load together, got "
            f"{', '.join(methods)} in {', '.join(directories)}"
        )
    return join(directories, configs, weights)
