"""One linear layer (LLaVA 1.0)."""

from __future__ import annotations

import torch
from torch import nn

from mmtune.parts.connector.base import Connector


class LinearConnector(Connector):
    """A single projection."""

    kind = "linear"

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__(vision_width, language_width)
        self.linear = nn.Linear(vision_width, language_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features)
