# SPDX-License-Identifier: Apache-2.0
"""Files of other projects: the authors' PEMT checkpoints."""
