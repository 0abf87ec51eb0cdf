# SPDX-License-Identifier: Apache-2.0
"""`GateCallback`: the gates' choices beside the loss, in every log and evaluation of a trainer."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import TrainerCallback

from pemt_fast.model import AdapterModel
from pemt_fast.nn.gate_statistics import GateStatistics


class GateCallback(TrainerCallback):
    """Adds `gate_<source>` and `gate_entropy` to what any trainer of transformers logs.

    Means over the sequences since the last log; of an evaluation over its sequences, as
    `eval_gate_<source>`. See `GateStatistics.metrics`. `AdapterTrainer(gate_statistics=True)` puts
    one in front of the callbacks that report, so that these see the values too.

    Attributes:
        history: By step, `{"step", "gates": {layer: [mean weight per source]}}` of each log.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._stack = contextlib.ExitStack()
        self._model: AdapterModel | None = None
        self._training: GateStatistics | None = None
        self._evaluation: GateStatistics | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._watch(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count, if the callback came later than the trainer."""
        self._watch(kwargs["model"])
        assert self._training is not None
        self._training.reset()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add to a log of the training loss, or to the metrics of an evaluation."""
        if logs is None or self._training is None or self._evaluation is None:
            return
        ends = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
        if "loss" in logs:
            counted, prefix = self._training, "gate"
        elif ends and ends[0] != "train":
            counted, prefix = self._evaluation, f"{ends[0]}_gate"
        else:
            return
        counted.reduce()
        found = counted.metrics(prefix)
        logs.update(found)
        # The trainer has put a copy there.
        state.log_history[-1].update(found)
        if counted is self._training:
            self.history.append({"step": state.global_step, "gates": counted.means()})
        counted.reset()

    def close(self) -> None:
        """Count no more."""
        self._stack.close()
        self._model = self._training = self._evaluation = None

    def _watch(self, model: Any) -> None:
        model = getattr(model, "module", model)
        if model is self._model:
            return
        if not isinstance(model, AdapterModel):
            raise ValueError(
                f"GateCallback needs a model with gates, as PEMT's, got {type(model).__name__}"
            )
        self.close()
        self._model = model
        self._training = self._stack.enter_context(model.watch_gates(training=True))
        self._evaluation = self._stack.enter_context(model.watch_gates(training=False))
