# SPDX-License-Identifier: Apache-2.0
"""`AdapterModel`: a T5 with a task prompt and, in PEMT, adapters; used like the T5 it wraps.

`attach.py` builds one, from a method's config or from saved files. The forward pass prepends the
task prompt (`inputs.py`), sets the routing state that the layers read (`nn/routing.py`) and adds
the auxiliary loss. What else the model can do is in `attached.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from pemt_fast.attached import AttachedModel
from pemt_fast.inputs import TaskIds, prepend_mask, prepend_prompt, read_task_ids
from pemt_fast.nn.gate_statistics import GateStatistics
from pemt_fast.nn.prompts import CorrelationPrompt, TargetPrompts
from pemt_fast.nn.routing import REENTRANT, Routing, RoutingState, route_checkpoints
from pemt_fast.t5 import Attachment, T5Model

if TYPE_CHECKING:
    from pemt_fast.attach import MethodConfig


@dataclass
class AdapterSeq2SeqLMOutput(Seq2SeqLMOutput):
    """`Seq2SeqLMOutput` with what the adapters add.

    Attributes:
        aux_loss: The method's auxiliary loss before its weight; `loss` is cross-entropy +
            `aux_weight`·`aux_loss`. None without labels or where the method has none.
        gates: With `output_gates=True`, gate weights `[B, E]` by layer (`encoder.0`, …).
    """

    aux_loss: Tensor | None = None
    gates: dict[str, Tensor] | None = None


class AdapterModel(AttachedModel):
    """A T5 with a prompt and adapters attached. Built by `get_model`.

    Attributes:
        base_model, adapter_config: See `AttachedModel`.
        prompt: The task prompt in front of the encoder input.
        takes_reentrant: Whether the re-entrant form of gradient checkpointing keeps all gradients.
        gate_threshold: Experts whose gate weight is below it are dropped at inference.
    """

    # T5 takes num_items_in_batch and ignores it. Left to the signature, transformers' trainer would
    # believe that the loss is divided by it, and add up accumulated gradients instead of averaging.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base_model: T5Model,
        adapter_config: MethodConfig[Any],
        prompt: CorrelationPrompt | TargetPrompts,
        routing: Routing,
        attachment: Attachment,
        *,
        aux_weight: float,
        masks_padding: bool,
        gate_threshold: float = 0.0,
        takes_reentrant: bool = False,
    ) -> None:
        attachment.add_hook(
            base_model.decoder.register_forward_pre_hook(self._see_encoder, with_kwargs=True)
        )
        super().__init__(base_model, adapter_config, routing, attachment)
        self.prompt: Any = prompt
        self.aux_weight = aux_weight
        self.masks_padding = masks_padding
        self.gate_threshold = gate_threshold
        self.takes_reentrant = takes_reentrant
        self._gate_watchers: list[tuple[GateStatistics, bool | None]] = []

    def _see_encoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder: the gates look at the encoder output."""
        states = kwargs.get("encoder_hidden_states")
        if self.routing.state is not None and states is not None:
            self.routing.state.see_encoder(states, self.prompt.length)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            return self.base_model.get_input_embeddings()(input_ids)
        return inputs_embeds

    def _new_state(self, task_ids: TaskIds | None, batch: int, **values: Any) -> RoutingState:
        if not self.routing.enabled:
            return RoutingState()
        tasks = None
        if self.adapter_config.uses_tasks:
            tasks = read_task_ids(task_ids, self.tasks, batch, self.prompt.trained[0].device)
        return RoutingState(
            task_ids=tasks,
            num_tasks=len(self.tasks),
            prompt_mask=self.prompt.mask(tasks),
            gate_threshold=self.gate_threshold,
            **values,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: TaskIds | None = None,
        output_gates: bool = False,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> AdapterSeq2SeqLMOutput | tuple[object, ...]:
        """T5's forward with the prompt, the adapters and the auxiliary loss.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 1 for tokens; the prompt's part is added here.
            decoder_input_ids: `[B, S_dec]`; from `labels` when absent.
            decoder_attention_mask: `[B, S_dec]`.
            encoder_outputs: From an earlier pass of this model (prompt positions included).
            inputs_embeds: `[B, S, d_model]` instead of `input_ids`.
            labels: `[B, S_dec]`, -100 for tokens without a label.
            task_ids: `[B]`, the task of each sequence, as numbers or names of `tasks`; needed where
                the model has several; methods that do not tell them apart take no notice.
            output_gates: Return the gate weights of every layer.
            return_dict: False for a plain tuple.
            **kwargs: Passed to T5 (`past_key_values`, `use_cache`, `output_hidden_states`, …).
        """
        if encoder_outputs is None:
            inputs_embeds = self._embed(input_ids, inputs_embeds)
        known: Any = inputs_embeds if encoder_outputs is None else encoder_outputs[0]
        state = self._new_state(
            task_ids, known.shape[0], wants_loss=labels is not None and self.aux_weight != 0
        )
        if self.routing.enabled:
            inputs_embeds, attention_mask = self._with_prompt(
                inputs_embeds, attention_mask, encoder_outputs, state
            )
        if self.masks_padding:
            state.encoder_mask = None if attention_mask is None else attention_mask.bool()
            state.decoder_mask = None if labels is None else labels != -100
        if self.training:
            for stack in (self.base_model.encoder, self.base_model.decoder):
                route_checkpoints(stack.block, self.routing, takes_reentrant=self.takes_reentrant)
        with self.routing.use(state):
            out = self.base_model(
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        # A layer that is recomputed during backward must not record a second time.
        state.recording = False
        if self._gate_watchers and not torch.compiler.is_compiling():
            for statistics, training in self._gate_watchers:
                if training in (None, self.training):
                    statistics.add(state.gates)
        loss, aux_loss = out.loss, None
        if state.losses:
            aux_loss = torch.stack(list(state.losses.values())).mean()
            loss = loss + self.aux_weight * aux_loss
        result = AdapterSeq2SeqLMOutput(
            **{**out, "loss": loss},
            aux_loss=aux_loss,
            gates=state.gates if output_gates else None,
        )
        return result if return_dict is not False else result.to_tuple()

    @contextlib.contextmanager
    def watch_gates(self, training: bool | None = None) -> Iterator[GateStatistics]:
        """Inside the block the gate weights of all sequences that `forward` sees are summed up.

        Not those of `generate`, which calls T5 itself, nor inside a compiled graph.

        Args:
            training: Only while the model is training, or only while it is not; None: always.
        """
        sources = getattr(self.adapter_config, "sources", ())
        watcher = GateStatistics(sources), training
        self._gate_watchers.append(watcher)
        try:
            yield watcher[0]
        finally:
            # By identity: statistics have no equality of their own.
            self._gate_watchers = [w for w in self._gate_watchers if w is not watcher]

    def _with_prompt(
        self,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None,
        state: RoutingState,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings and attention mask with the prompt in front."""
        length, prompt_mask = self.prompt.length, state.prompt_mask
        if inputs_embeds is not None:
            prompt = self.prompt.rows(inputs_embeds.shape[0], state.task_ids)
            inputs_embeds, mask = prepend_prompt(inputs_embeds, attention_mask, prompt, prompt_mask)
            if prompt_mask is not None and not self.masks_padding:
                # What fills up a prompt is no token, published or not.
                state.encoder_mask = prepend_mask(
                    prompt_mask.new_ones(inputs_embeds.shape[0], inputs_embeds.shape[1] - length),
                    length,
                    prompt_mask,
                )
            return inputs_embeds, mask
        assert encoder_outputs is not None
        text = encoder_outputs[0].shape[1] - length
        if attention_mask is None and prompt_mask is not None:
            attention_mask = prompt_mask.new_ones(prompt_mask.shape[0], text).long()
        if attention_mask is not None and attention_mask.shape[1] == text:
            attention_mask = prepend_mask(attention_mask, length, prompt_mask)
        return None, attention_mask

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: TaskIds | None = None,
        **kwargs: object,
    ) -> Any:
        """T5's `generate` with prompt and adapters; the decoder's gates are computed once.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`; from the padding of `input_ids` when absent.
            inputs_embeds: `[B, S, d_model]` instead of `input_ids`.
            task_ids: As in `forward`; one call may hold sequences of different tasks.
            **kwargs: Passed to T5's `generate` (`num_beams`, `max_length`, `labels`, …).
        """
        pad = self.base_model.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = input_ids.ne(pad).long()
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        state = self._new_state(task_ids, inputs_embeds.shape[0], generating=True, recording=False)
        if self.routing.enabled:
            inputs_embeds, attention_mask = self._with_prompt(
                inputs_embeds, attention_mask, None, state
            )
        with self.routing.use(state):
            return self.base_model.generate(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
            )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """As in transformers; only the non-reentrant form keeps the auxiliary loss's gradient.

        Prompt tuning has no such loss and takes both forms.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"] and not self.takes_reentrant:
            raise ValueError(REENTRANT)
        super().activation_checkpointing_enable(options, **kwargs)
