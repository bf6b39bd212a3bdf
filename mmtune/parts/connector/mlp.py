"""N linear layers with a GELU between each two: LLaVA's mlpNx_gelu, two of them in LLaVA-1.5."""

from __future__ import annotations

import torch
from torch import nn

from mmtune.parts.connector.base import Connector


class MlpConnector(Connector):
    """linear_1 to linear_N; with two named as transformers names them in its Llava models."""

    layers = 2

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__(vision_width, language_width)
        for i in range(1, self.layers + 1):
            width = vision_width if i == 1 else language_width
            self.add_module(f"linear_{i}", nn.Linear(width, language_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.get_submodule("linear_1")(features)
        for i in range(2, self.layers + 1):
            hidden = self.get_submodule(f"linear_{i}")(nn.functional.gelu(hidden))
        return hidden


def mlp(layers: int) -> type[MlpConnector]:
    """The class behind `mlpNx_gelu` for N `layers`."""
    kind = f"mlp{layers}x_gelu"
    return type(f"MlpConnector{layers}", (MlpConnector,), {"kind": kind, "layers": layers})
