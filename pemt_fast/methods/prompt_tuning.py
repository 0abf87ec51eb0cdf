# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning (Lester et al., 2021) on T5: trained vectors in front of the encoder input.

The frozen T5 reads `[P; E(text)]` with the trained prompt `P [prompt_length, d_model]`; the decoder
gets no prompt. Equal to peft's `PromptTuningConfig` for SEQ_2_SEQ_LM. The prompts are
PEMT's without sources: `nn/prompts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from pemt_fast.methods.task_config import ADAPTER_DTYPES, TaskConfig
from pemt_fast.nn.prompts import CorrelationPrompt, TargetPrompts, init_prompts
from pemt_fast.nn.routing import Routing
from pemt_fast.t5 import Attachment, T5Model, check_t5, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.model import AdapterModel

PROMPT_INITS = ("vocabulary", "normal")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(TaskConfig):
    """One trained prompt for all tasks, or one per task.

    Attributes:
        prompt_length: Prompt positions (peft's `num_virtual_tokens`), 100 in the paper.
        per_task: A prompt of its own for each of the `num_tasks` tasks, chosen by `task_ids`.
            Otherwise all share one and `task_ids` make no difference.
        prompt_init: `vocabulary` (rows of the embedding table) or `normal` (N(0, 1)).
        description: Text whose tokens choose the rows, repeated or cut to the length; with
            `per_task` one for all or one per task. None: rows are drawn at random.
        num_tasks, task_names: As in `TaskConfig`.
        adapter_dtype: Dtype of the prompt; None: the model's.
    """

    method: ClassVar[str] = "prompt_tuning"

    num_tasks: int = 1
    prompt_length: int = 100
    per_task: bool = False
    prompt_init: str = "vocabulary"
    description: str | Sequence[str] | None = None
    adapter_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("prompt_length", 1)
        self.require_one_of("prompt_init", PROMPT_INITS)
        self.require_one_of("adapter_dtype", (None, *ADAPTER_DTYPES))
        if self.description is None:
            return
        if self.prompt_init != "vocabulary":
            raise ValueError(
                "description chooses rows of the vocabulary and must be None with "
                f"prompt_init={self.prompt_init!r}, got {self.description!r}"
            )
        if not isinstance(self.description, str) and len(self.description) != self.num_prompts:
            raise ValueError(
                f"description must hold one text per prompt ({self.num_prompts}), "
                f"got {list(self.description)}"
            )

    @property
    def uses_tasks(self) -> bool:
        """As in `TaskConfig`: with a prompt per task."""
        return self.per_task

    @property
    def num_prompts(self) -> int:
        """How many prompts are trained."""
        return self.num_tasks if self.per_task else 1

    def attach(
        self, model: T5Model, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> AdapterModel:
        """Build the method on `model`; called by `get_model` and `load`."""
        from pemt_fast.model import AdapterModel

        check_t5(model)
        limit = max_positions(model)
        if self.prompt_length > limit:
            raise ValueError(
                f"prompt_length must be at most {limit}, the positions of this model, "
                f"got {self.prompt_length}"
            )
        # A saved prompt needs no first values.
        token_ids = self._token_ids(tokenizer) if reads_sources else [None] * self.num_prompts
        embedding = model.get_input_embeddings().weight
        prompt: CorrelationPrompt | TargetPrompts
        if self.num_prompts > 1:
            prompt = TargetPrompts((self.prompt_length,) * self.num_prompts, embedding.shape[1])
        else:
            prompt = CorrelationPrompt(self.prompt_length, embedding.shape[1])
        init_prompts(prompt, embedding, token_ids, self.prompt_init)
        dtype = getattr(torch, self.adapter_dtype) if self.adapter_dtype else model.dtype
        return AdapterModel(
            model,
            self,
            prompt.to(device=embedding.device, dtype=dtype),
            Routing(),
            Attachment(model),
            aux_weight=0.0,
            masks_padding=False,
            takes_reentrant=True,
        ).train(model.training)

    def _token_ids(self, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int] | None]:
        """The tokens that choose the rows of each prompt; None for random rows."""
        if self.description is None:
            return [None] * self.num_prompts
        if tokenizer is None:
            raise ValueError("description needs a tokenizer: pass get_model one, got None")
        single = isinstance(self.description, str)
        texts = [self.description] * self.num_prompts if single else list(self.description)
        found = [list(tokenizer(text)["input_ids"]) for text in texts]
        if [] in found:
            raise ValueError(f"description must hold at least one token, got {self.description!r}")
        return found  # type: ignore[return-value]
