# SPDX-License-Identifier: Apache-2.0
"""`AdapterModel`: a T5 with adapters, used like the T5 it wraps.

`get_model` builds one from a method's config (`methods/pemt.py`), `load` from a directory written
by `save_pretrained`. The forward pass prepends the task prompt, sets the routing state that the
layers read (`nn/routing.py`) and adds the auxiliary loss. Files are handled by `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from pemt_fast import checkpoint
from pemt_fast.nn.prompts import CorrelationPrompt
from pemt_fast.nn.routing import RoutedCheckpoint, Routing, RoutingState
from pemt_fast.t5 import Attachment, T5Model, check_t5, feed_forward_sites


class MethodConfig(Protocol):
    """What a method's config offers: it attaches itself and survives a trip through JSON."""

    def attach(
        self, model: T5Model, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> AdapterModel:
        """Attach the method to `model`, reading what the config names if `reads_sources`."""
        ...

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values, `method` among them."""
        ...


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


def get_model(
    model: T5Model, config: MethodConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> AdapterModel:
    """Attach a method to a T5 in place and return the wrapped model.

    Args:
        model: A `T5ForConditionalGeneration` (v1.0, v1.1, FLAN-T5) or
            `MT5ForConditionalGeneration`. Its own weights are never
            changed; `unload()` gives it back untouched.
        config: For example a `PemtConfig`.
        tokenizer: Used to start the task prompt from the words of the task's description.

    Raises:
        TypeError: `model` is not a T5.
        ValueError: something in the config does not fit the model.
        RuntimeError: the model carries adapters already.
    """
    _check_free(model)
    return config.attach(model, tokenizer, reads_sources=True)


def _check_free(model: T5Model) -> None:
    check_t5(model)
    if getattr(model, "_pemt_fast_attached", False):
        raise RuntimeError("model already carries pemt_fast adapters: unload() it first")


def load(model: T5Model, directory: str | os.PathLike[str]) -> AdapterModel:
    """Attach what `save_pretrained` wrote to `directory` to a freshly loaded T5.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not fit the model; the message names it.
    """
    config, weights = checkpoint.read(directory)
    _check_free(model)
    adapted = config.attach(model, None, reads_sources=False)
    try:
        checkpoint.assign(adapted, weights, directory)
    except ValueError:
        adapted.unload()
        raise
    return adapted


class AdapterModel(nn.Module):
    """A T5 with adapters attached. Built by `get_model`.

    Attributes:
        base_model: The T5; its attributes (`config`, `generation_config`, …) are available here.
        adapter_config: The method's config, complete: building from it needs no other file.
        prompt: The task prompt in front of the encoder input.
        gate_threshold: Experts whose gate weight is below it are dropped at inference.
    """

    # T5 takes num_items_in_batch and ignores it. Left to the signature, transformers' trainer would
    # believe that the loss is divided by it, and add up accumulated gradients instead of averaging.
    accepts_loss_kwargs = False

    def __init__(
        self,
        base_model: T5Model,
        adapter_config: MethodConfig,
        prompt: CorrelationPrompt,
        routing: Routing,
        attachment: Attachment,
        *,
        aux_weight: float,
        masks_padding: bool,
        gate_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_config = adapter_config
        self.prompt = prompt
        self.routing = routing
        self.aux_weight = aux_weight
        self.masks_padding = masks_padding
        self.gate_threshold = gate_threshold
        self._attachment = attachment
        attachment.add_hook(
            base_model.decoder.register_forward_pre_hook(self._see_encoder, with_kwargs=True)
        )
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

    def _see_encoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder: the gates look at the encoder output."""
        states = kwargs.get("encoder_hidden_states")
        if self.routing.state is not None and states is not None:
            self.routing.state.see_encoder(states, self.prompt.length)

    def _check_task_ids(self, task_ids: Tensor | None) -> None:
        if task_ids is not None:
            raise ValueError(
                "task_ids must be None: this model adapts one target, "
                f"{getattr(self.adapter_config, 'target', '?')!r}"
            )

    def _with_prompt(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings with the prompt in front, and a mask that covers it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.base_model.get_input_embeddings()(input_ids)
        prompt = self.prompt().to(inputs_embeds.dtype)
        prompt = prompt.unsqueeze(0).expand(inputs_embeds.shape[0], -1, -1)
        return torch.cat([prompt, inputs_embeds], 1), self._extend_mask(attention_mask)

    def _extend_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        ones = attention_mask.new_ones(attention_mask.shape[0], self.prompt.length)
        return torch.cat([ones, attention_mask], 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        task_ids: Tensor | None = None,
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
            task_ids: None; this model adapts one target.
            output_gates: Return the gate weights of every layer.
            return_dict: False for a plain tuple.
            **kwargs: Passed to T5 (`past_key_values`, `use_cache`, `output_hidden_states`, …).
        """
        self._check_task_ids(task_ids)
        if encoder_outputs is None:
            inputs_embeds, attention_mask = self._with_prompt(
                input_ids, attention_mask, inputs_embeds
            )
        elif attention_mask is not None and self.routing.enabled:
            missing = encoder_outputs[0].shape[1] - attention_mask.shape[1]
            attention_mask = self._extend_mask(attention_mask) if missing else attention_mask
        if not self.routing.enabled and encoder_outputs is None:
            attention_mask = _drop(attention_mask, self.prompt.length)
            inputs_embeds = _drop(inputs_embeds, self.prompt.length)
        state = RoutingState(
            wants_loss=labels is not None and self.aux_weight != 0,
            gate_threshold=self.gate_threshold,
        )
        if self.masks_padding:
            state.encoder_mask = None if attention_mask is None else attention_mask.bool()
            state.decoder_mask = None if labels is None else labels != -100
        if self.training:
            self._route_checkpoints()
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

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        task_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """T5's `generate` with prompt and adapters; the decoder's gates are computed once.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`; from the padding of `input_ids` when absent.
            inputs_embeds: `[B, S, d_model]` instead of `input_ids`.
            task_ids: None; this model adapts one target.
            **kwargs: Passed to T5's `generate` (`num_beams`, `max_length`, `labels`, …).
        """
        self._check_task_ids(task_ids)
        pad = self.base_model.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = input_ids.ne(pad).long()
        if not self.routing.enabled:
            return self.base_model.generate(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        inputs_embeds, attention_mask = self._with_prompt(input_ids, attention_mask, inputs_embeds)
        state = RoutingState(generating=True, recording=False, gate_threshold=self.gate_threshold)
        with self.routing.use(state):
            return self.base_model.generate(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
            )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """As in transformers; only the non-reentrant form keeps the auxiliary loss's gradient."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(_REENTRANT)
        if hasattr(self.base_model, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(options, **kwargs)
        else:
            self.base_model.gradient_checkpointing_enable(options, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, object] | None = None
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def _route_checkpoints(self) -> None:
        """Let recomputed layers see the routing state of their own forward pass."""
        for stack in (self.base_model.encoder, self.base_model.decoder):
            for block in stack.block:
                function = getattr(block, "_gradient_checkpointing_func", None)
                if function is None or isinstance(function, RoutedCheckpoint):
                    continue
                if getattr(function, "keywords", {}).get("use_reentrant"):
                    raise ValueError(_REENTRANT)
                block._gradient_checkpointing_func = RoutedCheckpoint(function, self.routing)

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
        self.unmerge()
        self._attachment.undo()
        for stack in (self.base_model.encoder, self.base_model.decoder):
            for block in stack.block:
                function = getattr(block, "_gradient_checkpointing_func", None)
                if isinstance(function, RoutedCheckpoint):
                    block._gradient_checkpointing_func = function.checkpoint
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


_REENTRANT = (
    "gradient checkpointing with use_reentrant=True loses the gradient of the Task Sparsity Loss "
    'and of the decoder gates; use gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def _drop(tensor: Tensor | None, positions: int) -> Tensor | None:
    return None if tensor is None else tensor[:, positions:]
