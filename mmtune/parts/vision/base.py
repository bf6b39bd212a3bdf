"""The contract of a vision tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.data.image import Fit, HalfPixel, ImageTransform, Resample
from mmtune.parts.known import config_of, is_known
from mmtune.parts.loading import recompute_activations, split_layers


class VisionTower(nn.Module):
    """Pictures in, patch features out.

    A tower declares `width` (of a feature), `image_size` and `patch` (sides in pixels), `tokens` (patches per
    picture), `prefix` (how many tokens stand before the patches: CLS and registers) and `has_cls` (whether
    CLS is among them). `unused` are prefixes of the names of parameters that its features don't depend on.
    A feature is what a block gives, with no final norm; layers above the one that is used are neither loaded
    nor run.

    What it says of its own transform: `mean`, `std` and `resample` hold for every picture; `own_fit`,
    `crop_pct` and `half_pixel` where a run says `fit: own`. crop_pct is the tower's side over the length that
    a picture is resized to before its middle is cut. own_fit is None where a picture is not made a square at
    all.

    A tower of transformers holds its model as `hf`; `layers`, `checkpoint_activations` and `attend_by` are
    for those.
    """

    hf: Any

    width: int
    tokens: int
    image_size: int
    patch: int
    prefix: int
    has_cls: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    own_fit: Literal["crop", "squash"] | None = "crop"
    crop_pct: float = 1.0
    half_pixel: HalfPixel = "down"
    unused: tuple[str, ...] = ()
    config_file: str = "config.json"
    given_config: dict[str, Any] | None = None  # of weights that come without one

    @classmethod
    def load(cls, weights: str, layer: int, dtype: torch.dtype, image_size: int | None = None) -> VisionTower:
        """From a folder or hub name, up to `layer`. image_size: a side in pixels that is not its own; the
        positions are interpolated as the family's library does it. Raises UserError, where a weight is
        missing too.
        """
        raise NotImplementedError

    @classmethod
    def fields(cls, config: dict[str, Any], where: str) -> dict[str, Any]:
        """What `create` takes, from a checkpoint's `config_file`. where: its name. Raises UserError where it
        is that of another family.
        """
        return config

    @classmethod
    def known_fields(cls, weights: str) -> dict[str, Any] | None:
        """What `create` takes, of a folder, which need hold no weights, or of a name whose config is known
        without a download; None of others.
        """
        if not is_known(weights, cls.config_file):
            return None
        return cls.fields(config_of(weights, cls.config_file), weights)

    @classmethod
    def create(cls, config: dict[str, Any], layer: int, image_size: int | None = None) -> VisionTower:
        """With random weights, from the fields of the family's own config. Raises UserError for others."""
        raise NotImplementedError

    def take_transform(self, folder: str) -> None:
        """Says of its own transform what a folder's files do, where it was made by `create` of their config,
        which says nothing of it. Raises UserError.
        """

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes the family's own format, safetensors only. tensors: in place of the tower's own."""
        raise NotImplementedError

    def transform(self, fit: Fit | Literal["own"]) -> ImageTransform:
        """How pictures become what the tower takes. Raises UserError for `own` where that is no square."""
        chosen = self.own_fit if fit == "own" else fit
        if chosen is None:
            raise UserError(
                "the tower's own transform makes no squares of pictures",
                where="model.vision.fit",
                mend="Choose pad, crop or squash.",
            )
        made = ImageTransform(self.image_size, self.mean, self.std, chosen, self.resample)
        return replace(made, crop_pct=self.crop_pct, half_pixel=self.half_pixel) if fit == "own" else made

    def layers(self) -> list[nn.Module]:
        """What an engine that splits weights gathers at a time: the blocks, with transformers those modules
        that its model says are not to be split, the embeddings of some families among them.
        """
        return split_layers(self.hf)

    def checkpoint_activations(self, on: bool = True) -> None:
        """From now on a block keeps its input alone and runs again in the backward pass; or no longer."""
        recompute_activations(self.hf, on)

    def attend_by(self, implementation: str) -> None:
        """Chooses how attention is computed: `sdpa` or `eager`."""
        self.hf.set_attn_implementation(implementation)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, tokens, width] of uint8 pictures [N, 3, image_size, image_size]."""
        raise NotImplementedError

    def normalise(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """uint8 pictures [N, 3, S, S] -> what the tower's first layer expects, of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return ((images.float() / 255 - mean) / std).to(dtype)


def require_contract(tower: VisionTower) -> None:
    """Raises UserError that names what a tower from outside the package lacks."""
    declared = ("width", "tokens", "image_size", "patch", "prefix", "has_cls", "mean", "std")
    methods = ["save", "forward"]
    if not hasattr(tower, "hf"):
        methods += ["layers", "checkpoint_activations", "attend_by"]
    lacking = [name for name in declared if not hasattr(tower, name)]
    lacking += [name for name in methods if getattr(type(tower), name) is getattr(VisionTower, name)]
    if lacking:
        raise UserError(
            f"{type(tower).__name__} lacks {', '.join(lacking)}",
            where="model.vision.tower",
            mend="A tower says and does all that docs/add-a-tower.md lists.",
        )


def layers_up_to(layer: int, count: int, where: str) -> int:
    """How many of a tower's `count` layers are used where `layer`, -1 for the last, is the one whose output
    is taken. Raises UserError where there is none.
    """
    if count < 1:
        raise UserError("a tower without layers", where=where, mend="Correct its config.")
    used = count + 1 + layer
    if layer >= 0 or used < 1:
        raise UserError(
            f"layer {layer} of a tower with {count} layers",
            where=where,
            mend=f"Name one from -{count} to -1.",
        )
    return used


def side_of(size: Any, name: str, where: str) -> int:
    """The side in pixels of a square, which configs give as one number or as two. Raises UserError."""
    sides = size if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or sides[0] < 1:
        raise UserError(f"{name}: expected the side of a square in pixels, found {size}", where=where)
    return sides[0]


def is_number(value: Any) -> bool:
    """Whether it is a finite number, of a JSON file for instance; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unfit_colours(mean: Any, std: Any, prefix: str = "") -> list[str]:
    """What keeps a file's mean and std from being three numbers each, std's above zero. prefix: of the names
    that the file has for them.
    """
    faults = []
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(is_number, values)):
            faults.append(f"{prefix}{name} is not three numbers: {values!r}")
        elif name == "std" and min(values) <= 0:
            faults.append(f"{prefix}std has to be above zero: {values!r}")
    return faults


def require_tokens(tokens: int, side: int, patch: int, where: str) -> int:
    """The tokens of a picture. Raises UserError where there is none."""
    if tokens < 1:
        what = f"image_size {side} is smaller than a patch, {patch} pixels: a picture has no tokens"
        raise UserError(what, where=where, mend="Choose an image_size of several patches.")
    return tokens


def require_whole_patches(side: int, patch: int, where: str) -> None:
    """Raises UserError for an image_size that is not made of whole patches, with the nearest that are."""
    if side % patch or side < patch:
        below, above = side // patch * patch, (side // patch + 1) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"image_size {side} is no multiple of the patch, {patch} pixels",
            where=where,
            mend=f"The nearest: {nearest}.",
        )
