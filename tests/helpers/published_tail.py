"""PEMT's second stage as published: every expert's output is made, stacked and compared.

`PublishedModel` takes an `AdapterModel`, shares its parameters and its T5, and computes everything
else (prompt, gates, mixture, loss) from the equations of `docs/pemt.md` in plain torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class PublishedOutput:
    """The two parts of the loss, each the mean over the groups of rows."""

    cross_entropy: torch.Tensor
    aux_loss: torch.Tensor
    loss: torch.Tensor


class PublishedTail(nn.Module):
    """`wo` and what stage 2 adds to it; keeps `z [B, S, H]`, `stacked [B, S, H, E]`, `gate [B, E]`.

    Args:
        tail: The `MixtureTail` whose parameters are used.
        feed_forward: The module around it, whose input bottleneck experts add.
        bottleneck: Whether the experts have biases, gelu and that residual.
    """

    def __init__(self, tail, feed_forward, bottleneck):
        super().__init__()
        self.base, self.mixture, self.gate = tail.base, tail.mixture, tail.gate
        self.target_adapter = tail.target_adapter
        self.prompt_length, self.bottleneck = tail.prompt_length, bottleneck
        self.query = None
        feed_forward.register_forward_pre_hook(self._see_input)

    @property
    def weight(self):
        return self.base.weight

    def _see_input(self, module, args):
        self.residual = args[0]

    def _expert(self, h, e):
        rows, mixture = self.mixture.rows(e), self.mixture
        hidden = h @ mixture.w_down[rows].t()
        if not self.bottleneck:
            return hidden @ mixture.w_up[rows]
        hidden = F.gelu(hidden + mixture.b_down[rows], approximate="tanh")
        return hidden @ mixture.w_up[rows] + mixture.b_up[e] + self.residual

    def forward(self, h):
        query = h[:, : self.prompt_length].mean(1) if self.query is None else self.query
        self.weights = torch.softmax(query @ self.gate.w_gate, -1)
        experts = [self._expert(h, e) for e in range(len(self.mixture.ranks))]
        self.stacked = torch.stack(experts, -1)
        y = self.base(h) + torch.matmul(self.stacked, self.weights[:, None, :, None]).squeeze(-1)
        adapter = self.target_adapter
        self.z = y + adapter.up(F.gelu(adapter.down(y), approximate="tanh"))
        return self.z

    def sparsity_loss(self, rows, mask):
        """Task Sparsity Loss of these rows of the batch; `mask [B, S]`, true where it counts."""
        cosine = F.cosine_similarity(self.z[rows].unsqueeze(-1), self.stacked[rows], dim=2)
        return (self.weights[rows].mean(0) * (1 - cosine[mask[rows]].mean(0))).sum()


class PublishedModel(nn.Module):
    """Stage 2 on the T5 of `adapted`, which is of no other use afterwards.

    Args:
        adapted: From `get_model`, without dropout.
    """

    def __init__(self, adapted):
        super().__init__()
        self.base_model, self.prompt = adapted.base_model, adapted.prompt
        self.config = adapted.adapter_config
        self.tails = {"encoder": [], "decoder": []}
        for stack, tails in self.tails.items():
            for block in getattr(self.base_model, stack).block:
                feed_forward = block.layer[-1].DenseReluDense
                bottleneck = self.config.source_kind == "bottleneck"
                tails.append(PublishedTail(feed_forward.wo, feed_forward, bottleneck))
                feed_forward.wo = tails[-1]

    def forward(self, input_ids, attention_mask, labels, groups=1):
        """The mean over `groups` equal parts of the rows of each part's own loss.

        A part averages its cross-entropy over its own labels, its gates over its own sequences and
        its cosines over its own tokens.
        """
        prompt = self.prompt.prompt
        for source in self.prompt.sources:
            prompt = prompt + torch.softmax(self.prompt.prompt @ source.t(), -1) @ source
        embedded = self.base_model.shared(input_ids)
        embedded = torch.cat([prompt.expand(len(input_ids), -1, -1), embedded], 1)
        mask = F.pad(attention_mask, (len(prompt), 0), value=1)
        encoded = self.base_model.encoder(inputs_embeds=embedded, attention_mask=mask)
        for tail in self.tails["decoder"]:
            tail.query = encoded[0][:, : len(prompt)].mean(1)
        logits = self.base_model(encoder_outputs=encoded, attention_mask=mask, labels=labels).logits

        counts = {"encoder": mask.bool(), "decoder": labels != -100}
        if self.config.loss_tokens == "all":
            counts = {stack: torch.ones_like(count) for stack, count in counts.items()}
        size = len(input_ids) // groups
        entropies, sparsities = [], []
        for rows in (slice(i * size, (i + 1) * size) for i in range(groups)):
            entropies.append(F.cross_entropy(logits[rows].flatten(0, 1), labels[rows].flatten()))
            sparsities += [
                tail.sparsity_loss(rows, counts[stack])
                for stack, tails in self.tails.items()
                for tail in tails
            ]
        cross_entropy, aux_loss = torch.stack(entropies).mean(), torch.stack(sparsities).mean()
        loss = cross_entropy + self.config.aux_weight * aux_loss
        return PublishedOutput(cross_entropy, aux_loss, loss)
