# SPDX-License-Identifier: Apache-2.0
"""The attention layers of a model, by what they attend to.

T5 and its relatives, and models whose attention layers have `k_proj` and `v_proj` (Llama, Mistral,
Qwen, Gemma, BART and others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

PLACES = ("encoder", "decoder", "cross")
_CROSS = ("EncDecAttention", "encoder_attn")


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer.

    Attributes:
        name: Its dotted path.
        place: `encoder` and `decoder` attend to themselves, `cross` to the encoder's output.
        attention: The module.
        heads: Of keys and values.
        width: Of a head.
        weight: Of its keys.
    """

    name: str
    place: str
    attention: Any
    heads: int
    width: int
    weight: Tensor

    @property
    def out_features(self) -> int:
        """Of keys and values together."""
        return 2 * self.heads * self.width


def attention_sites(model: Any, places: Sequence[str] | None = None) -> list[AttentionSite]:
    """The attention layers of `places`, all of them by default, in the model's order.

    Raises:
        ValueError: there are none.
    """
    found = [site for name, m in model.named_modules() if (site := _site(name, m)) is not None]
    chosen = [site for site in found if places is None or site.place in places]
    there = sorted({site.place for site in found})
    if not found:
        raise ValueError(
            "model must have attention layers with k and v (T5) or k_proj and v_proj, "
            f"{type(model).__name__} has none"
        )
    missing = [place for place in places or () if place not in there]
    if missing:
        raise ValueError(f"prefix_places must be of {there} for this model, got {list(places)}")  # type: ignore[arg-type]
    return chosen


def _site(name: str, module: Any) -> AttentionSite | None:
    if hasattr(module, "key_value_proj_dim"):
        width, keys = module.key_value_proj_dim, module.k
    elif hasattr(module, "k_proj") and hasattr(module, "v_proj") and hasattr(module, "head_dim"):
        width, keys = module.head_dim, module.k_proj
    else:
        return None
    *owners, last = name.split(".")
    place = "encoder" if "encoder" in owners else "decoder"
    place = "cross" if last in _CROSS else place
    return AttentionSite(name, place, module, keys.out_features // width, width, keys.weight)
