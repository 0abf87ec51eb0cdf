# SPDX-License-Identifier: Apache-2.0
"""Methods: a config each, and how it attaches to T5."""

from pemt_fast.methods.pemt_config import PemtConfig

__all__ = ["PemtConfig"]
