# SPDX-License-Identifier: Apache-2.0
"""A bottleneck adapter behind or beside a sub-layer of a transformer.

With `y = base(x)`: `z = y + adapter(y)`, or with `reads_input` `z = y + adapter(x)`. `base` is the
whole sub-layer, residual and dropout included, or a module inside it. Which of the two and where is
chosen in `methods/bottleneck.py`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.routing import Routing
from pemt_fast.ops.autocast import autocast_dtype


class AdaptedSublayer(nn.Module):
    """A sub-layer with one bottleneck adapter.

    Args:
        base: The sub-layer.
        adapter: From the model's width to the model's width.
        routing: Shared with the wrapped model.
        reads_input: The adapter reads the sub-layer's input instead of its output.
        dropout: On what the adapter adds, in training.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: BottleneckAdapter,
        routing: Routing,
        *,
        reads_input: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.routing = routing
        self.reads_input = reads_input
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden_states [B, S, H]`; returns what the sub-layer returns, its states adapted.

        Arguments as the sub-layer takes them.
        """
        out = self.base(hidden_states, *args, **kwargs)
        if not self.routing.enabled:
            return out
        self.routing.current()
        if isinstance(out, tuple):  # of attention: states, position bias, weights
            return (self._adapt(hidden_states, out[0]), *out[1:])
        return self._adapt(hidden_states, out)

    def _adapt(self, x: Tensor, y: Tensor) -> Tensor:
        # T5 in float16 keeps `wo` in float32, and the residual sum with it.
        read = x.to(y.dtype) if self.reads_input else y
        dropout = self.dropout if self.training else 0.0
        # Under autocast the operator returns 16 bits, the residual stream is wider.
        if dropout == 0 and autocast_dtype(x.device.type) is None:
            return self.adapter(read, y)
        return y + F.dropout(self.adapter(read, None), dropout, dropout > 0)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"reads_input={self.reads_input}, dropout={self.dropout}"
