"""Analytic objectives for searches of hyper-parameters, importable by worker processes."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from pemt_fast.training.hyper_search import search_hyper_parameters
from pemt_fast.training.hyper_space import HyperSpace

SPACE = HyperSpace(prefix_depth=(2,), prefix_width=(32,))


def distance(values: dict, report: Callable[[int, float], None] | None = None) -> float:
    """At most 0; 0 at P=16, r=8, one network for all, rates 1e-3 and 0.1."""
    misses = (values["prefix_length"] != 16) + (values["r"] != 8) + (values["sharing"] != "network")
    rate = math.log10(values["learning_rate"]) + 3
    own_rate = math.log10(values["architecture_learning_rate"]) + 1
    return -0.3 * misses - rate**2 - 0.5 * own_rate**2


def work(storage: str, folder: str, trials: int, dies_at: int | None = None) -> None:
    """A worker that writes down what it runs, and may die in one of its trials as if killed."""
    ran = []
    Path(folder, f"ready-{os.getpid()}").touch()
    # The other one is still importing: together, or one would run all.
    while dies_at is None and len(list(Path(folder).glob("ready-*"))) < 2:
        time.sleep(0.01)

    def objective(values, report):
        if len(ran) == dies_at:
            os._exit(9)
        ran.append(values)
        Path(folder, f"ran-{os.getpid()}.json").write_text(json.dumps(ran))
        # Time for the others: a trial of no length is over before they have begun.
        time.sleep(0.2)
        return distance(values)

    search_hyper_parameters(objective, SPACE, storage=storage, name="peml", trials=trials)
