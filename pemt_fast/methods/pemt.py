# SPDX-License-Identifier: Apache-2.0
"""PEMT on T5: how its parts attach in each stage.

Stage 1 puts one trainable source adapter beside every `wo` and a prompt in front of the encoder.
Stage 2 puts the frozen sources, a gate and the target adapter there, ties the prompt to the source
prompts and trains the layer norms. The equations are in `docs/pemt.md`, the choices in
`pemt_config.py`, the checks in `pemt_plan.py`, the arithmetic in `nn/feed_forward_tail.py` and
`nn/prompts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.methods.pemt_plan import Plan, Source, make_plan
from pemt_fast.model import AdapterModel
from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.feed_forward_tail import MixtureTail, SourceTail
from pemt_fast.nn.gates import PooledGate
from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.prompts import CorrelationPrompt, TargetPrompts, init_prompts
from pemt_fast.nn.routing import Routing
from pemt_fast.nn.targets import TargetGates, TargetNorm
from pemt_fast.t5 import Attachment, T5Model, check_t5, feed_forward_sites, layer_norm_sites


def attach(
    model: T5Model,
    config: PemtConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: Sequence[Source] | None = None,
) -> AdapterModel:
    """Attach PEMT to a T5; everything is checked before the model is touched.

    Args:
        model: The T5.
        config: The choices; its `sources` may name directories.
        tokenizer: For the prompt's length and first values.
        sources: Trained sources in memory, instead of the directories.
    """
    check_t5(model)
    plan = make_plan(model, config, tokenizer, sources)
    config = plan.config
    embedding = model.get_input_embeddings().weight
    dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else model.dtype
    prompt = _prompt(plan, embedding.shape[1])
    init_prompts(prompt, embedding, plan.token_ids, config.draws_prompt_from)
    for own, source in zip(prompt.sources, plan.sources, strict=False):
        own.data.copy_(source.prompt)
    routing = Routing()
    sites = feed_forward_sites(model)
    tails: list[SourceTail | MixtureTail] = [
        _source_tail(model, config, routing)
        if config.stage == 1
        else _mixture_tail(model, plan, site.name, routing)
        for site in sites
    ]
    for site, tail in zip(sites, tails, strict=True):
        tail.to(device=site.feed_forward.wo.weight.device, dtype=dtype)
    attachment = Attachment(model)
    for site, tail in zip(sites, tails, strict=True):
        tail.base = site.feed_forward.wo
        attachment.replace_module(site.feed_forward, "wo", tail)
        if isinstance(tail, MixtureTail):
            tail.stack()
        if tail.adds_residual:
            attachment.add_hook(site.feed_forward.register_forward_pre_hook(tail.keep_residual))
    if config.trains_layer_norms:
        norms = layer_norm_sites(model)
        if len(config.tasks) > 1:
            for owner, name in norms:
                norm = TargetNorm(getattr(owner, name), len(config.tasks), routing)
                attachment.replace_module(owner, name, norm)
        else:
            attachment.train_copies([getattr(owner, name).weight for owner, name in norms])
    return AdapterModel(
        model,
        config,
        prompt.to(device=embedding.device, dtype=dtype),
        routing,
        attachment,
        aux_weight=config.aux_weight if config.stage == 2 else 0.0,
        masks_padding=config.masks_padding,
        gate_threshold=config.gate_threshold,
    ).train(model.training)


def _prompt(plan: Plan, width: int) -> CorrelationPrompt | TargetPrompts:
    lengths, dropout = plan.source_prompt_lengths, plan.config.prompt_dropout
    if len(plan.prompt_lengths) > 1:
        return TargetPrompts(plan.prompt_lengths, width, lengths, dropout)
    return CorrelationPrompt(plan.prompt_lengths[0], width, lengths, dropout)


def _source_tail(model: T5Model, config: PemtConfig, routing: Routing) -> SourceTail:
    bottleneck = config.source_kind == "bottleneck"
    adapter = BottleneckAdapter(
        model.config.d_ff, config.source_rank, model.config.d_model,
        activation="gelu_tanh" if bottleneck else "identity", bias=bottleneck, impl=config.impl,
    )  # fmt: skip
    if bottleneck:
        adapter.reset_parameters("normal")
    else:
        adapter.reset_parameters("kaiming" if config.published else "lora")
    return SourceTail(nn.Identity(), adapter, routing, bottleneck)


def _mixture_tail(model: T5Model, plan: Plan, name: str, routing: Routing) -> MixtureTail:
    d_ff, d_model = model.config.d_ff, model.config.d_model
    bottleneck, impl = plan.config.source_kind == "bottleneck", plan.config.impl
    mixture = AdapterMixture(
        d_ff, d_model, plan.ranks,
        activation="gelu_tanh" if bottleneck else "identity", bias=bottleneck, impl=impl,
    )  # fmt: skip
    for e, source in enumerate(plan.sources):
        mixture.set_adapter(e, *source.adapters[name])
    mixture.requires_grad_(False)
    gate_width = d_model if name.startswith("decoder") else d_ff
    return MixtureTail(
        nn.Identity(),
        mixture,
        _gate(plan, gate_width) if len(plan.ranks) > 1 else None,
        _target_adapter(plan, d_model),
        name=name,
        prompt_length=max(plan.prompt_lengths),
        routing=routing,
        adds_residual=bottleneck,
        recompute=plan.config.recompute,
    )


def _gate(plan: Plan, width: int) -> PooledGate | TargetGates:
    targets = len(plan.config.tasks)
    if targets > 1:
        return TargetGates(targets, width, len(plan.ranks))
    return PooledGate(width, len(plan.ranks))


def _target_adapter(plan: Plan, width: int) -> BottleneckAdapter | AdapterMixture:
    """One adapter, or the mixture of those of several targets, which a one-hot gate takes apart."""
    targets, rank, impl = len(plan.config.tasks), plan.target_bottleneck, plan.config.impl
    if targets > 1:
        mixture = AdapterMixture(
            width, width, (rank,) * targets, activation="gelu_tanh", bias=True, impl=impl
        )
        for weight in (mixture.w_down, mixture.w_up):
            nn.init.normal_(weight, std=0.01)
        return mixture
    adapter = BottleneckAdapter(width, rank, width, activation="gelu_tanh", bias=True, impl=impl)
    adapter.reset_parameters("normal")
    return adapter
