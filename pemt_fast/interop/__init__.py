# SPDX-License-Identifier: Apache-2.0
"""Files of other projects: the authors' PEMT checkpoints; LoRA and Poly of peft and mttl."""
