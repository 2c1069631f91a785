"""torch's layers without torch's own initialisation: moe/model/init.py fills every parameter.

Besides drawing numbers that are thrown away, torch's initialisers on the meta device import its
compiler, more than a second of every command's start.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """y = x W^T + b."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """Rows of a table by token id."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""
