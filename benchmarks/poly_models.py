# SPDX-License-Identifier: Apache-2.0
"""Who computes Poly: peft's layers, peft's arithmetic compiled, this library, and nobody (`plain`).

All share one set of random weights, rounded to bfloat16 whatever the dtype, so that peft in float64
is the reference of both. Adapters have the dtype of the model. In a step both draw noise, one draw
per sequence and layer.

T5-base is timed with its ReLU and checked with GELU: where a unit is near the kink of the ReLU,
rounding decides whether it has a gradient, and one of the three million of a layer is 6e-4 of it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.tuners.poly.layer import Linear as PeftLinear
from poly_cases import COMPILED, FORWARD, GENERATED, OURS, PEFT, PLAIN, STEP, PolyCase
from t5_cases import SHAPES
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5DenseActDense

import pemt_fast
from pemt_fast.nn.routers import SkillRouter
from pemt_fast.nn.routing import Routing, RoutingState
from pemt_fast.nn.skill_linear import SkillLinear

Named = dict[str, Tensor]
BASE = next(shape for shape in SHAPES if shape.name == "t5-base")


@torch.no_grad()
def _copy_skills(ours: Any, theirs: Any) -> None:
    """Random skills, the same in both layers."""
    ours.router.logits.normal_().copy_(ours.router.logits.bfloat16())
    ours.b.normal_(std=0.1).copy_(ours.b.bfloat16())
    ours.a.copy_(ours.a.bfloat16())
    theirs.poly_router["default"].module_logits.copy_(ours.router.logits.flatten(1))
    for name, skills in (("A", ours.a.transpose(-1, -2)), ("B", ours.b)):
        own = getattr(theirs, f"poly_lora_{name}")["default"]
        own.copy_(skills.reshape(own.shape))


def _skills_of(ours: Any, theirs: Any) -> dict[str, tuple[nn.Parameter, ...]]:
    router = theirs.poly_router["default"]
    lora = theirs.poly_lora_A["default"], theirs.poly_lora_B["default"]
    return {OURS: (ours.router.logits, ours.a, ours.b), PEFT: (router.module_logits, *lora)}


def _alike(grads: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> Named:
    """Gradients of peft's parameters in our shapes."""
    logits, a, b = grads
    turned = a.transpose(-1, -2) if a.shape != like[1].shape else a
    values = (logits, turned, b)
    names = ("d_logits", "d_a", "d_b")
    return {n: v.reshape(p.shape) for n, v, p in zip(names, values, like, strict=True)}


class Layers:
    """One linear layer and the contenders around it."""

    def __init__(self, case: PolyCase, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        base = nn.Linear(case.D, case.H, bias=False).requires_grad_(False)
        base.weight.copy_(base.weight.bfloat16())
        config = peft.PolyConfig(
            r=case.R, n_tasks=case.M, n_skills=case.K, n_splits=case.P, target_modules=["q"]
        )
        self.routing = Routing()
        router = SkillRouter(case.M, case.K, case.P)
        self.ours = SkillLinear(
            base, self.routing, case.R, router, case.K, case.P, scale=1 / case.R
        )
        self.peft: Any = PeftLinear(copy.deepcopy(base), "default", config)
        self.peft.base_layer.requires_grad_(False)
        _copy_skills(self.ours, self.peft)
        for module in (self.ours, self.peft):
            module.to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        draw = [torch.randn(case.B, case.S, w, generator=generator) for w in (case.D, case.H)]
        x, grad = (t.bfloat16().to(device, dtype) for t in draw)
        self.x, self.grad = x.requires_grad_(), grad
        self.task_ids = (torch.arange(case.B) * 7 % case.M).to(device)
        # As the wrapped model makes it: it has looked at ids on the CPU.
        looks = device == "cpu"
        self.state = RoutingState(task_ids=self.task_ids, num_tasks=case.M, may_be_unseen=not looks)
        self.skills = _skills_of(self.ours, self.peft)
        self.skills[COMPILED] = self.skills[PEFT]
        self.compiled: Any = None

    def _call(self, contender: str) -> Tensor:
        if contender == PLAIN:
            return self.ours.base(self.x)
        if contender == PEFT:
            return self.peft(self.x, task_ids=self.task_ids)
        if contender == COMPILED:
            if self.compiled is None:
                self.compiled = torch.compile(_peft_arithmetic)
            return self.compiled(self.peft, self.x, self.task_ids)
        with self.routing.use(self.state):
            return self.ours(self.x)

    def _step(self, contender: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self._call(contender)
        leaves = (self.x, *self.skills.get(contender, ()))
        return out, torch.autograd.grad(out, leaves, self.grad)

    def run(self, contender: str, mode: str) -> Callable[[], object]:
        """One call of a mode: without gradients, or with those of x and everything trained."""
        self.ours.train(mode == STEP)
        self.peft.train(mode == STEP)
        if mode == STEP:
            return lambda: self._step(contender)

        def forward() -> Tensor:
            with torch.no_grad():
                return self._call(contender)

        return forward

    def results(self, contender: str, *, training: bool = False) -> Named:
        """Output and all gradients; in training with noise from one seed."""
        self.run(contender, STEP if training else FORWARD)
        torch.manual_seed(3)
        out, (d_x, *d_skills) = self._step(contender)
        found = {"out": out, "d_x": d_x, **_alike(tuple(d_skills), self.skills[OURS])}
        return {name: t.detach().cpu() for name, t in found.items()}


def _peft_arithmetic(layer: Any, x: Tensor, task_ids: Tensor) -> Tensor:
    """What peft's layer computes, without its look at the ids, for which a compiler would stop."""
    router, a, b = layer.poly_router["default"], layer.poly_lora_A["default"], layer.poly_lora_B
    b = b["default"]
    logits = router.module_logits[task_ids].view(-1, router.n_splits, router.n_skills)
    if layer.training:
        noise = torch.rand_like(logits)
        logits = logits + noise.log() - (-noise).log1p()
    chosen = torch.sigmoid(logits)
    weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-12)
    factor_a = torch.einsum("bps,psdr->bpdr", weights, a).flatten(1, 2)
    factor_b = torch.einsum("bps,psrd->bprd", weights, b).transpose(1, 2).flatten(2)
    return layer.base_layer(x) + x.bmm(factor_a).bmm(factor_b) / a.shape[-1]


@contextlib.contextmanager
def _smooth(model: nn.Module) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, T5DenseActDense)]
    acts = [layer.act for layer in layers]
    for layer in layers:
        layer.act = nn.GELU()
    try:
        yield
    finally:
        for layer, act in zip(layers, acts, strict=True):
            layer.act = act


class Models:
    """A T5-base and the contenders on its query and value projections."""

    def __init__(self, case: PolyCase, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        shape = BASE
        config = T5Config(  # type: ignore[call-arg]
            vocab_size=shape.vocabulary, d_model=shape.H, d_kv=shape.d_kv, d_ff=shape.D,
            num_heads=shape.heads, num_layers=case.layers, num_decoder_layers=case.layers,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        t5 = T5ForConditionalGeneration(config).requires_grad_(False)
        with torch.no_grad():
            for parameter in t5.parameters():
                parameter.copy_(parameter.bfloat16())
        # Modules of their own, parameters in common.
        shared = {id(p): p for p in t5.parameters()}
        self.models: dict[str, Any] = {PLAIN: copy.deepcopy(t5, dict(shared))}
        options = {"n_tasks": case.M, "n_skills": case.K, "n_splits": case.P, "r": case.R}
        targets = ["q", "v"]
        self.models[PEFT] = peft.get_peft_model(
            copy.deepcopy(t5, dict(shared)),
            peft.PolyConfig(task_type="SEQ_2_SEQ_LM", target_modules=targets, **options),
        )
        self.models[OURS] = pemt_fast.get_model(
            t5,
            pemt_fast.PolyConfig(
                case.M, num_skills=case.K, num_splits=case.P, r=case.R, target_modules=targets
            ),
        )
        theirs = dict(self.models[PEFT].base_model.model.named_modules())
        self.pairs = []
        for name, layer in self.models[OURS].adapted_layers().items():
            _copy_skills(layer, theirs[name])
            self.pairs.append((layer, theirs[name]))
        for model in self.models.values():
            model.to(device, dtype)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, shape.vocabulary, (case.B, case.S), generator=generator)
        labels = torch.randint(2, shape.vocabulary, (case.B, case.target), generator=generator)
        self.inputs = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels
        }  # fmt: skip
        self.inputs = {name: t.to(device) for name, t in self.inputs.items()}
        self.task_ids = (torch.arange(case.B) * 7 % case.M).to(device)

    def _arguments(self, contender: str, *, labels: bool = True) -> dict[str, Any]:
        inputs = {k: v for k, v in self.inputs.items() if labels or k != "labels"}
        return inputs if contender == PLAIN else {**inputs, "task_ids": self.task_ids}

    def _step(self, contender: str) -> Any:
        model = self.models[contender]
        if contender == PLAIN:  # the gradient of its input, which the others pass on as well
            embeddings = model.get_input_embeddings()(self.inputs["input_ids"]).requires_grad_()
            inputs = {k: v for k, v in self.inputs.items() if k != "input_ids"}
            out = model(inputs_embeds=embeddings, **inputs)
        else:
            out = model(**self._arguments(contender))
        out.loss.backward()
        return out

    def _clear(self) -> None:
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    def run(self, contender: str, mode: str) -> Callable[[], object]:
        """One call of a mode; a step has no optimizer."""
        model = self.models[contender].train(mode == STEP)

        def step() -> None:
            self._step(contender)
            self._clear()

        def forward() -> Any:
            with torch.no_grad():
                return model(**self._arguments(contender)).logits

        def generate() -> Any:
            with torch.no_grad():
                return model.generate(
                    **self._arguments(contender, labels=False), do_sample=False, num_beams=1,
                    min_new_tokens=GENERATED, max_new_tokens=GENERATED,
                )  # fmt: skip

        return {STEP: step, FORWARD: forward}.get(mode, generate)

    def results(self, contender: str, *, training: bool = False) -> Named:
        """Logits, loss and the gradients of all skills."""
        self.run(contender, STEP if training else FORWARD)
        torch.manual_seed(3)
        with _smooth(self.models[contender]):
            out = self._step(contender)
        found = {"logits": out.logits, "loss": out.loss}
        for i, pair in enumerate(self.pairs):
            skills = _skills_of(*pair)
            grads = tuple(p.grad for p in skills[contender])
            found |= {f"{n} {i}": g for n, g in _alike(grads, skills[OURS]).items()}
        found = {name: t.detach().cpu().clone() for name, t in found.items()}
        self._clear()
        return found
