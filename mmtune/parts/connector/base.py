"""The contract of a connector: features of the tower in, embeddings of the language model out."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmtune.core.config import argument_faults
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, write_json
from mmtune.parts.loading import own_weights
from mmtune.parts.spec import CONNECTORS, ConnectorOptions

COPY = "Copy the folder anew from where it was made; it must be whole."
WHERE = "model.connector"


class Connector(nn.Module):
    """Made from `vision_width`, `language_width` and the options of its kind, which are keyword arguments of
    the subclass; it hands them on, and they are saved with it. `kind` is the name it goes by in a run.
    `tokens(n)` says how many embeddings n features give.
    """

    kind: str

    def __init__(self, vision_width: int, language_width: int, **options: Any) -> None:
        super().__init__()
        self.vision_width = vision_width
        self.language_width = language_width
        self.options = options

    def tokens(self, features: int) -> int:
        """Raises UserError for a number of features that the connector cannot take."""
        return features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, features, vision_width] -> [N, tokens(features), language_width]."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What decides its tensors, as config.json says it."""
        named = {
            "kind": self.kind,
            "vision_width": self.vision_width,
            "language_width": self.language_width,
        }
        return named | ({"options": self.options} if self.options else {})

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes config.json and model.safetensors. tensors: in place of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.described())
        save_file(own_weights(self, tensors), folder / "model.safetensors", metadata={"format": "pt"})

    def require_own(self, folder: Path) -> None:
        """Raises UserError where the connector saved in `folder` is another than this one."""
        config, own = saved_connector(folder), json.loads(json.dumps(self.described()))
        differing = [
            f"its {name} is {config.get(name)!r}, here it is {own.get(name)!r}"
            for name in ("kind", "options")
            if config.get(name) != own.get(name)
        ]
        saved = [config.get(name) for name in ("vision_width", "language_width")]
        if saved != [self.vision_width, self.language_width]:
            differing.append(
                f"it takes {saved[0]} and gives {saved[1]}, but the tower is {self.vision_width} wide "
                f"and the language model {self.language_width}"
            )
        if differing:
            options = json.dumps(self.options) if self.options else ""
            chosen = f"kind: {self.kind}" + (f", options: {options}" if options else "")
            flag = shlex.quote(self.kind + (f":{options}" if options else ""))
            raise UserError(
                f"this connector was made for other parts: {'; '.join(differing)}",
                where=folder / "config.json",
                mend=f"Start a new one, under model, and train it: connector: {{{chosen}}}; "
                f"in mmtune assemble: --connector {flag}",
            )

    def load(self, folder: Path) -> None:
        """Takes the weights of a saved connector. Raises UserError where kind, widths, options or tensors
        differ.
        """
        self.require_own(folder)
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


def new_connector(options: ConnectorOptions, vision_width: int, language_width: int) -> Connector:
    """A connector with random weights. Options that are not given are those of its `weights`, where it has
    some. Raises UserError with every option that is unknown or of a wrong type, or that its class does not
    hand on, so that it would not be saved.
    """
    made = CONNECTORS.load(options.kind, f"{WHERE}.kind")
    given = options.options
    if given is None and options.weights is not None and (Path(options.weights) / "config.json").is_file():
        given = saved_connector(Path(options.weights)).get("options")
    given = given or {}
    if faults := argument_faults(made, given, 2, f"{WHERE}.options"):
        raise UserError.of(faults)
    try:
        connector: Connector = made(vision_width, language_width, **given)
    except UserError:
        raise
    except Exception as error:  # one from outside may refuse a value by any, or be broken
        what = f"refused by {options.kind}: {type(error).__name__}: {error}"
        raise UserError(what, where=f"{WHERE}.options", mend="Correct the options, or the class.") from error
    if kept_back := sorted(given.keys() - connector.options.keys()):
        raise UserError(
            f"{options.kind} does not hand on {', '.join(kept_back)}, which would not be saved with it",
            where=f"{WHERE}.options",
            mend="In its __init__: super().__init__(vision_width, language_width, "
            + ", ".join(f"{name}={name}" for name in kept_back)
            + ").",
        )
    connector.kind = options.kind
    return connector


def saved_connector(folder: Path) -> dict[str, Any]:
    """What config.json says of a saved connector. Raises UserError."""
    config = read_json(folder / "config.json")
    described = isinstance(config, dict) and isinstance(config.get("kind"), str)
    if not described or not isinstance(config.get("options", {}), dict):
        what = "not the config of a connector that mmtune saved"
        raise UserError(what, where=folder / "config.json", mend="Name the folder of a saved connector.")
    return config


def miscounted(part: str, given: int, said: int) -> UserError:
    """The error for a part whose features are not as many as it says."""
    return UserError(
        f"{part}, says that it gives {said} features per picture, and gives {given}",
        where="model",
        mend="Correct `tokens` in its class: pictures would get into each other's places.",
    )


def at_least_one(**options: int) -> None:
    """Raises UserError that names the options of a connector that are 0 or less."""
    faults = [
        Fault(f"expected 1 or more, found {value}", f"{WHERE}.options.{name}")
        for name, value in options.items()
        if value < 1
    ]
    if faults:
        raise UserError.of(faults)


def square_side(features: int, kind: str) -> int:
    """The side of the square grid that a tower's features are. Raises UserError where they are none."""
    side = math.isqrt(features)
    if side * side != features:
        raise UserError(
            f"{kind} takes features on a square grid, and the tower gives {features} per picture",
            where=WHERE,
            mend="Choose a connector that takes each feature by itself, such as mlp2x_gelu.",
        )
    return side
