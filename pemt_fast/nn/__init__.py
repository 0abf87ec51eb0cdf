# SPDX-License-Identifier: Apache-2.0
"""Modules that own parameters: adapters, mixtures, gates, prompts and their places in T5."""

from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.feed_forward_tail import MixtureTail, SourceTail
from pemt_fast.nn.gates import PooledGate
from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.prompts import CorrelationPrompt, TargetPrompts
from pemt_fast.nn.targets import TargetGates, TargetNorm

__all__ = [
    "AdapterMixture",
    "BottleneckAdapter",
    "CorrelationPrompt",
    "MixtureTail",
    "PooledGate",
    "SourceTail",
    "TargetGates",
    "TargetNorm",
    "TargetPrompts",
]
