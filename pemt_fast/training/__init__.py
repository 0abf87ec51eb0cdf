# SPDX-License-Identifier: Apache-2.0
"""Training: PEMT's two stages on transformers' Trainer, metrics, reports, the demo."""
