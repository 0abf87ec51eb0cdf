# SPDX-License-Identifier: Apache-2.0
"""Attention whose keys and values have a trained prefix in front.

`softmax(scale·q·[P_k; K]ᵀ + [0; bias] + [0; mask])·[P_v; V]` per head. Hidden states, positions and
caches keep their length: the prefix is put in front of keys and values inside the attention
function. Every query sees every prefix position; prefix keys have no position, so no rotation and,
in T5, no relative position bias.

transformers' attention layers look up their function by the name in their config
(`AttentionInterface`). A layer with a prefix gets a view of the config with the name of the
function here, which calls the one that the model's config names: nothing of a layer is copied, and
`set_attn_implementation` still works.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pemt_fast.nn.routing import Routing

ATTENTION = "pemt_fast_prefix"
SUPPORTED = ("eager", "sdpa")

KeyValue = tuple[Tensor, Tensor]


class PrefixedConfig:
    """The config of one attention layer: the model's, but for the attention function."""

    _attn_implementation = ATTENTION

    def __init__(self, config: Any) -> None:
        self.model_config = config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config":  # copying asks for attributes before there are any
            raise AttributeError(name)
        return getattr(self.model_config, name)


class AttentionPrefix(nn.Module):
    """The prefix of one attention layer, its child `prefix`.

    Args:
        source: Returns keys and values, `[P, 2·heads·width]`: heads of the keys first.
        attention: The layer.
        routing: Shared with the wrapped model.
        name: What the wrapped model calls it.
        heads: Of keys and values.
        width: Of a head.
    """

    def __init__(
        self,
        source: nn.Module,
        attention: nn.Module,
        routing: Routing,
        name: str,
        heads: int,
        width: int,
    ) -> None:
        super().__init__()
        self.source = source
        self.routing = routing
        self.name = name
        self.heads = heads
        self.width = width
        # Every modeling file has an eager function of its own under this name.
        self._eager = sys.modules[type(attention).__module__].eager_attention_forward

    def forward(self) -> KeyValue:
        """Keys and values `[heads, P, width]`."""
        both = self.source().unflatten(-1, (2, self.heads, self.width)).permute(1, 2, 0, 3)
        return both[0], both[1]

    def current(self) -> KeyValue:
        """As `forward`; during `generate` what was prepared for all its steps."""
        found: KeyValue | None = self.routing.current().prepared.get(self.name)
        return self() if found is None else found

    def attend_with(self, implementation: str) -> Callable[..., Any]:
        """The attention function of that name.

        Raises:
            ValueError: it is not known to be exact with a prefix.
        """
        if implementation not in SUPPORTED:
            raise ValueError(
                f"attn_implementation must be one of {list(SUPPORTED)} for a prefix of keys and "
                f"values, got {implementation!r}; use set_attn_implementation"
            )
        if implementation == "eager":
            return self._eager  # type: ignore[no-any-return]
        return ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"heads={self.heads}, width={self.width}"


def prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers, for layers with an `AttentionPrefix`.

    Args:
        module: The attention layer.
        query: `[B, heads, S_q, width]`.
        key: `[B, key heads, S, width]`, with whatever a cache holds.
        value: Like the keys.
        attention_mask: Bool, True where seen, or float, added: `[B or 1, 1, S_q, S]`; or None.
        **kwargs: For the attention function; `position_bias [1, heads, S_q, S]` gets zeros for the
            prefix.

    Returns:
        `[B, S_q, heads, width]` and, where the function has them, weights `[B, heads, S_q, P + S]`.
    """
    prefix: AttentionPrefix = module.prefix
    implementation = module.config.model_config._attn_implementation
    attend = prefix.attend_with(implementation)
    if not prefix.routing.enabled:
        return attend(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    prefix_key, prefix_value = prefix.current()
    length, tokens = prefix_key.shape[1], key.shape[2]
    mask = attention_mask
    if mask is not None:
        mask = F.pad(mask, (length, 0), value=1 if mask.dtype == torch.bool else 0)
    elif implementation == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs):
        mask = _causal_mask(query.shape[2], tokens, length, query.device)
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = F.pad(bias, (length, 0))
    both = _in_front(prefix_key, key), _in_front(prefix_value, value)
    return attend(module, query, *both, mask, **kwargs)  # type: ignore[no-any-return]


def _in_front(prefix: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([prefix.to(rows.dtype).expand(rows.shape[0], -1, -1, -1), rows], 2)


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _causal_mask(queries: int, tokens: int, length: int, device: torch.device) -> Tensor:
    """What the kernels do without a mask, and all of the prefix: bool `[1, 1, S_q, P + S]`."""
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=device).tril()
    return F.pad(seen, (length, 0), value=True)[None, None]


def uses_interface(attention: nn.Module) -> bool:
    """Whether the layer looks up its attention function: T5 does from transformers 5.15 on."""
    forward = inspect.unwrap(type(attention).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


# Only layers with a `PrefixedConfig` ask for this name.
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, prefix_attention)
