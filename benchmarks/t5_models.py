# SPDX-License-Identifier: Apache-2.0
"""Who computes PEMT's second stage: plain T5, the forms of `tail_forms.py`, this library.

All of them share one set of random weights; what differs is what stands at `wo`. The weights are
rounded to bfloat16 whatever the dtype, so that one reference serves both. There is no dropout: it
would cost all the same time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from t5_cases import FORWARD, GENERATED, OURS, PLAIN, STEP, T5Case
from tail_forms import FORMS, FormTail
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import pemt_fast

CONTENDERS = (PLAIN, *FORMS, OURS)


def batch(case: T5Case, device: str) -> dict[str, Tensor]:
    """Token ids; the last quarter of every other source sequence is padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = case.shape.vocabulary
    ids = torch.randint(2, tokens, (case.B, case.source), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, case.source - case.source // 4 :] = 0
    labels = torch.randint(2, tokens, (case.B, case.target), generator=generator)
    named = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in named.items()}


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Trained parameters that are not at their start, so that a wrong gradient shows."""
    for name, parameter in model.named_parameters():
        if name.endswith("w_gate"):
            parameter.normal_(std=parameter.shape[0] ** -0.5)
        elif "target_adapter" in name:
            parameter.normal_(std=0.05)
        elif "layer_norm" in name and parameter.requires_grad:
            parameter.normal_(mean=1, std=0.1)
        parameter.copy_(parameter.bfloat16())


class Models:
    """The contenders on one case in one dtype.

    Attributes:
        trained: What stage 2 trains, by the name it has in the library's model.
    """

    def __init__(self, case: T5Case, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        shape = case.shape
        config = T5Config(  # type: ignore[call-arg]
            vocab_size=shape.vocabulary, d_model=shape.H, d_kv=shape.d_kv, d_ff=shape.D,
            num_heads=shape.heads, num_layers=case.layers, num_decoder_layers=case.layers,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        with torch.device(device):
            t5 = T5ForConditionalGeneration(config).train()
        # Modules of its own, parameters in common: plain T5 keeps its `wo` and its layer norms.
        self._plain: Any = copy.deepcopy(t5, {id(p): p for p in t5.parameters()})
        pemt = pemt_fast.PemtConfig(
            sources=[f"source{i}" for i in range(case.E)], target="target", source_rank=case.R,
            target_reduction=case.reduction, prompt_length=case.prompt,
            source_prompt_lengths=[case.prompt] * case.E, prompt_dropout=0.0,
        )  # fmt: skip
        self.adapted = pemt_fast.get_model(t5, pemt)
        _randomise(self.adapted)
        self.adapted.to(dtype)
        self._plain.to(dtype)
        self.prompt = self.adapted.prompt().detach().requires_grad_()
        self.trained = {n: p for n, p in self.adapted.named_parameters() if p.requires_grad}
        self._sites: list[Any] = [
            block.layer[-1].DenseReluDense
            for stack in (t5.encoder, t5.decoder)
            for block in stack.block
        ]
        own: list[nn.Module] = [site.wo for site in self._sites]
        self.tails = {OURS: own}
        for name, form in FORMS.items():
            self.tails[name] = [FormTail(tail, form) for tail in own]
        self.inputs = batch(case, device)
        self._decoder_ids = t5._shift_right(self.inputs["labels"])

    def _use(self, contender: str) -> Any:
        """The model to call, with the contender's modules at `wo`."""
        if contender == PLAIN:
            return self._plain
        for site, tail in zip(self._sites, self.tails[contender], strict=True):
            site.wo = tail
        return self.adapted

    def _arguments(self, contender: str) -> dict[str, Tensor]:
        """Plain T5 gets a prompt too, of as many positions, whose gradient is asked for."""
        inputs = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        if contender != PLAIN:
            return inputs
        embeddings = self._plain.get_input_embeddings()(inputs["input_ids"])
        prompt = self.prompt.unsqueeze(0).expand(embeddings.shape[0], -1, -1)
        mask = inputs["attention_mask"]
        ones = mask.new_ones(mask.shape[0], self.prompt.shape[0])
        return {
            "inputs_embeds": torch.cat([prompt, embeddings], 1),
            "attention_mask": torch.cat([ones, mask], 1),
        }

    def forward(self, contender: str) -> Tensor:
        """Logits without a gradient, and without labels: no loss."""
        model = self._use(contender)
        with torch.no_grad():
            arguments = self._arguments(contender)
            out = model(**arguments, decoder_input_ids=self._decoder_ids, use_cache=False)
        return out.logits

    def step(self, contender: str) -> Any:
        """Forward with both losses, backward, gradients cleared; no optimizer."""
        out = self._forward_backward(contender)
        self._clear()
        return out

    def _forward_backward(self, contender: str) -> Any:
        model = self._use(contender)
        out = model(**self._arguments(contender), labels=self.inputs["labels"], use_cache=False)
        out.loss.backward()
        return out

    @contextlib.contextmanager
    def _smooth(self) -> Iterator[None]:
        acts = [site.act for site in self._sites]
        for site in self._sites:
            site.act = nn.GELU(approximate="tanh")
        try:
            yield
        finally:
            for site, act in zip(self._sites, acts, strict=True):
                site.act = act

    def _clear(self) -> None:
        self.prompt.grad = None
        for parameter in self.trained.values():
            parameter.grad = None

    def generate(self, contender: str, **options: Any) -> Tensor:
        """Greedy tokens `[B, 1 + GENERATED]`, all of them made; `options` of `generate`."""
        model = self._use(contender)
        with torch.no_grad():
            arguments = self._arguments(contender)
            return model.generate(
                **arguments, do_sample=False, num_beams=1,
                min_new_tokens=GENERATED, max_new_tokens=GENERATED, **options,
            )  # fmt: skip

    def run(self, contender: str, mode: str) -> Callable[[], object]:
        """One call of a mode."""
        calls: dict[str, Callable[[str], object]] = {FORWARD: self.forward, STEP: self.step}
        call = calls.get(mode, self.generate)
        return lambda: call(contender)

    def results(self, contender: str) -> dict[str, Tensor]:
        """Logits, losses and the gradient of every trained parameter, on the CPU.

        With gelu in the place of relu: between two roundings a unit at relu's kink changes sides,
        and one such unit is 5e-3 of the gradient of a layer norm.
        """
        with self._smooth():
            out = self._forward_backward(contender)
        found = {"logits": out.logits, "loss": out.loss, "aux_loss": out.aux_loss}
        missing = [name for name, p in self.trained.items() if p.grad is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
        found |= {f"d_{name}": p.grad for name, p in self.trained.items()}
        self._clear()
        return {name: tensor.detach().cpu() for name, tensor in found.items()}
