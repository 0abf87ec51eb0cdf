# SPDX-License-Identifier: Apache-2.0
"""Doors to other libraries' own calls; each imports its library, nothing else imports a door."""
