"""Two linear layers with a GELU between them (LLaVA-1.5's mlp2x_gelu)."""

from __future__ import annotations

import torch
from torch import nn

from mmtune.parts.connector.base import Connector


class MlpConnector(Connector):
    """linear_1, GELU, linear_2; named as transformers names them in its Llava models."""

    kind = "mlp2x_gelu"

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__(vision_width, language_width)
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))
