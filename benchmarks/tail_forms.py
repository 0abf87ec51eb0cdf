# SPDX-License-Identifier: Apache-2.0
"""PEMT's feed-forward tail written out in torch: as published, and in the best form we know.

`y = W_o·h + Σ_e g_e·m_e`, `z = y + target(y)` and the Task Sparsity Loss
`Σ_e mean_b(g_e)·(1 − mean_t cos(z_t, m_te))`; equations and names: `docs/pemt.md`. LoRA sources.
`FormTail` puts a form in the place of a `MixtureTail` whose parameters it shares, so everything
else of the model stays what it is. The library's operator and loss are not used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.gates import pool_prompt

# tail, h [B, S, D], gate [B, E], mask [B, S] or None, wants the loss -> z [B, S, H], loss
Form = Callable[[Any, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def _target_adapter(tail: Any, y: Tensor) -> Tensor:
    down, up = tail.target_adapter.down, tail.target_adapter.up
    hidden = F.gelu(F.linear(y, down.weight, down.bias), approximate="tanh")
    return y + F.linear(hidden, up.weight, up.bias)


def _loss(cosine: Tensor, gate: Tensor, mask: Tensor | None) -> Tensor:
    """Of `cosine [B, S, E]`, averaged over the tokens of the mask in at least float32."""
    cosine = cosine.to(torch.promote_types(cosine.dtype, torch.float32))
    if mask is None:
        mean = cosine.mean((0, 1))
    else:
        mean = (cosine * mask.unsqueeze(-1)).sum((0, 1)) / mask.sum()
    return (gate.mean(0) * (1 - mean)).sum()


def published(
    tail: Any, h: Tensor, gate: Tensor, mask: Tensor | None, wants_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """A loop over experts, their outputs stacked, a matmul with the gate, cosines of the stack."""
    mixture, outputs = tail.mixture, []
    for e in range(len(mixture.ranks)):
        rows = mixture.rows(e)
        outputs.append(F.linear(F.linear(h, mixture.w_down[rows]), mixture.w_up[rows].t()))
    experts = torch.stack(outputs, -1)  # [B, S, H, E]
    weights = gate.to(h.dtype)[:, None, :, None]  # [B, 1, E, 1]
    y = tail.base(h) + torch.matmul(experts, weights).squeeze(-1)
    z = _target_adapter(tail, y)
    if not wants_loss:
        return z, None
    cosine = F.cosine_similarity(z.unsqueeze(-1), experts, dim=2)  # [B, S, E]
    return z, _loss(cosine, gate, mask)


def stacked(
    tail: Any, h: Tensor, gate: Tensor, mask: Tensor | None, wants_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """Two wide matmuls with the gate between them, and the loss in rank space, under autograd."""
    mixture, (b, s, _) = tail.mixture, h.shape
    e_count, r = len(mixture.ranks), mixture.ranks[0]
    w_down, w_up = mixture.w_down, mixture.w_up
    hidden = F.linear(h, w_down).view(b, s, e_count, r)
    gated = (hidden * gate.to(h.dtype)[:, None, :, None]).view(b * s, -1)
    base = tail.base(h)
    y = torch.addmm(base.view(b * s, -1), gated, w_up).view_as(base)
    z = _target_adapter(tail, y)
    if not wants_loss:
        return z, None
    wide = torch.promote_types(h.dtype, torch.float32)
    dot = (F.linear(z, w_up).view_as(hidden) * hidden).sum(-1, dtype=wide)
    by_expert = w_up.view(e_count, r, -1)
    gram = torch.bmm(by_expert, by_expert.transpose(1, 2))  # [E, R, R]
    units = hidden.view(b * s, e_count, r).transpose(0, 1)  # [E, T, R]
    squares = (torch.bmm(units, gram) * units).sum(-1, dtype=wide).t().view_as(dot)
    z_norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
    # F.cosine_similarity clamps each norm at 1e-8.
    cosine = dot / (z_norm.clamp_min(1e-8) * squares.clamp_min(1e-16).sqrt())
    return z, _loss(cosine, gate, mask)


def bare_matmuls(tail: Any, h: Tensor, grad_z: Tensor) -> Callable[[], object]:
    """Only the matmuls of `wo`, mixture and target adapter, forward and backward; no loss."""
    x, dz = h.detach().flatten(0, 1), grad_z.flatten(0, 1)
    weights = [tail.base.weight, tail.mixture.w_down, tail.mixture.w_up]
    weights += [tail.target_adapter.down.weight, tail.target_adapter.up.weight]
    w_o, w_down, w_up, down, up = (w.detach() for w in weights)

    def run() -> list[Tensor]:
        units = torch.mm(x, w_down.t())
        y = torch.addmm(torch.mm(x, w_o.t()), units, w_up)
        hidden = torch.mm(y, down.t())
        z = torch.addmm(y, hidden, up.t())
        d_hidden = torch.mm(dz, up)
        dy = torch.addmm(dz, d_hidden, down)
        d_units = torch.mm(dy, w_up.t())
        dx = torch.addmm(torch.mm(dy, w_o), d_units, w_down)
        return [z, dx, torch.mm(dz.t(), hidden), torch.mm(d_hidden.t(), y)]

    return run


class FormTail(nn.Module):
    """A form in the place of `tail`, a `MixtureTail` with LoRA sources; gates are the tail's."""

    def __init__(self, tail: Any, form: Form) -> None:
        super().__init__()
        self.tail = tail
        self.form = form

    @property
    def weight(self) -> Tensor:
        """`wo.weight`: T5 casts the input of `wo` to its dtype."""
        return self.tail.base.weight

    def _gate(self, h: Tensor, state: Any) -> Tensor:
        tail = self.tail
        if not tail.is_decoder:
            return tail.gate(pool_prompt(h, tail.prompt_length))
        if tail.name not in state.decoder_gates:
            gate = tail.gate(state.encoder_query)
            if not state.generating:
                return gate
            state.decoder_gates[tail.name] = gate
        return state.decoder_gates[tail.name]

    def forward(self, h: Tensor) -> Tensor:
        """`h [B, S, d_ff]` to `[B, S, d_model]`."""
        tail, state = self.tail, self.tail.routing.state
        gate = self._gate(h, state)
        mask = state.decoder_mask if tail.is_decoder else state.encoder_mask
        z, loss = self.form(tail, h, gate, mask, state.wants_loss)
        state.gates[tail.name] = gate
        if loss is not None:
            state.losses[tail.name] = loss
        return z


FORMS: dict[str, Form] = {"published": published, "stacked": stacked}
