"""The contract of a connector: features of the tower in, embeddings of the language model out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json
from mmtune.parts.loading import own_weights

COPY = "Copy the folder anew from where it was made; it must be whole."


class Connector(nn.Module):
    """Made from `vision_width` and `language_width`; `tokens(n)` says how many embeddings n features give."""

    kind: str

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.language_width = language_width

    def tokens(self, features: int) -> int:
        return features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, features, vision_width] -> [N, tokens(features), language_width]."""
        raise NotImplementedError

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors. tensors: in place of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"kind": self.kind, "vision_width": self.vision_width, "language_width": self.language_width}
        write_json(folder / "config.json", config)
        save_file(own_weights(self, tensors), folder / "model.safetensors", metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Takes the weights of a saved connector. Raises UserError where kind, widths or tensors differ."""
        config = read_json(folder / "config.json")
        for name in ("kind", "vision_width", "language_width"):
            if config.get(name) != getattr(self, name):
                raise UserError(
                    f"{name} is {config.get(name)!r} in the file, but {getattr(self, name)!r} in this model",
                    where=folder / "config.json",
                    mend="This connector was made for other parts; leave out its weights to start a new one.",
                )
        try:
            weights = load_file(folder / "model.safetensors")
        except FileNotFoundError:
            raise UserError("no such file", where=folder / "model.safetensors", mend=COPY) from None
        except SafetensorError as error:
            raise UserError(
                f"not a whole safetensors file: {error}", where=folder / "model.safetensors", mend=COPY
            ) from None
        expected = self.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != found:
            differing = sorted(
                name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)
            )
            raise UserError(
                f"tensors missing, unknown or of another shape: {', '.join(differing)}",
                where=folder / "model.safetensors",
                mend=COPY,
            )
        self.load_state_dict(weights)
