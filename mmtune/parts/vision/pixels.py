"""preprocessor_config.json: what a checkpoint of transformers says of the transform of its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL.Image import Resampling
from transformers.utils import cached_file

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.data.image import ImageTransform, Resample
from mmtune.parts.loading import unloadable

FILE = "preprocessor_config.json"
_FILTERS: dict[int, Resample] = {
    Resampling.NEAREST: "nearest",
    Resampling.BILINEAR: "bilinear",
    Resampling.BICUBIC: "bicubic",
    Resampling.LANCZOS: "lanczos",
}


class Pixels(NamedTuple):
    """A tower's own transform, as the contract in base.py has it."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    own_fit: Literal["crop", "squash"] | None = "crop"
    crop_pct: float = 1.0


def read_pixels(weights: str, published: Pixels) -> Pixels:
    """What the file of a folder or hub name says; where it is silent, what holds for the family's `published`
    checkpoints. Raises UserError for a transform that no tower here has.
    """
    try:
        found = cached_file(weights, FILE, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise unloadable(weights, error) from None
    if found is None:
        return published
    said = read_json(Path(found))
    faults = [
        f"{name} is off"
        for name in ("do_resize", "do_rescale", "do_normalize")
        if said.get(name, True) is not True
    ]
    if abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        faults.append(f"rescale_factor {said['rescale_factor']} is not 1/255")
    mean, std = said.get("image_mean") or published.mean, said.get("image_std") or published.std
    if len(mean) != 3 or len(std) != 3:
        faults.append("image_mean and image_std are not three numbers each")
    code = said.get("resample")
    if code is not None and code not in _FILTERS:
        faults.append(f"resample {code} is none of {', '.join(f'{c:d} ({n})' for c, n in _FILTERS.items())}")
    if faults:
        mend = "Correct the file, or choose another checkpoint."
        raise UserError.of(Fault(what, found, mend) for what in faults)
    resample = published.resample if code is None else _FILTERS[code]
    fit, crop_pct = _fit(said, published)
    return Pixels((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), resample, fit, crop_pct)


def said_of(transform: ImageTransform) -> dict[str, Any]:
    """A transform, but for the padding of one that pads, in the words of transformers' image processors."""
    length, square = transform.length, {"height": transform.size, "width": transform.size}
    sizes: dict[str, Any] = {"size": {"shortest_edge": length}, "do_center_crop": True, "crop_size": square}
    if transform.fit == "squash":
        sizes["size"] = {"height": length, "width": length}
        if length == transform.size:
            sizes = {"size": square, "do_center_crop": False}
    return {
        **sizes,
        "resample": next(int(code) for code, name in _FILTERS.items() if name == transform.resample),
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def _fit(said: dict[str, Any], published: Pixels) -> tuple[Literal["crop", "squash"] | None, float]:
    """own_fit and crop_pct. A size of one number is that of the shorter side, as of old."""
    size, crop = said.get("size"), said.get("crop_size")
    if size is None:
        return published.own_fit, published.crop_pct
    sides = [size] if isinstance(size, int) else list(size.values())
    crops = said.get("do_center_crop", crop is not None)
    kept = [crop] if isinstance(crop, int) else list((crop or {}).values())
    one_side = isinstance(size, int) or "shortest_edge" in size
    if len({*sides}) > 1 or (crops and len({*kept}) != 1) or (one_side and not crops):
        return None, 1.0
    return "crop" if one_side else "squash", kept[0] / sides[0] if crops else 1.0
