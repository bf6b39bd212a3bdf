"""What a checkpoint of transformers says of the transform of its pictures.

It stands in preprocessor_config.json or, as processors of transformers 5 save it, in processor_config.json
under `image_processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL.Image import Resampling
from transformers.utils import cached_file

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.data.image import ImageTransform, Resample
from mmtune.parts.loading import unloadable
from mmtune.parts.vision.base import is_number, unfit_colours

FILE, NESTED = "preprocessor_config.json", "processor_config.json"
_FILTERS: dict[int, Resample] = {
    Resampling.NEAREST: "nearest",
    Resampling.BILINEAR: "bilinear",
    Resampling.BICUBIC: "bicubic",
    Resampling.LANCZOS: "lanczos",
}

_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"longest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)
_MEND = "Correct the file, or choose another checkpoint."


class Pixels(NamedTuple):
    """A tower's own transform, as the contract in base.py has it."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    own_fit: Literal["crop", "squash"] | None = "crop"
    crop_pct: float = 1.0


def image_processor(weights: str) -> tuple[dict[str, Any], Path] | None:
    """What a folder or hub name says of its pictures, and the file that does: NESTED comes before FILE, as
    for transformers' AutoImageProcessor. None where neither says anything. Raises UserError.
    """
    for name in (NESTED, FILE):
        try:
            found = cached_file(weights, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise unloadable(weights, error) from None
        if found is None:
            continue
        said = read_json(Path(found))
        if name == NESTED and isinstance(said, dict):
            if said.get("image_processor") is None:
                continue
            said = said["image_processor"]
        if not isinstance(said, dict):
            raise UserError("not the fields of an image processor", where=found, mend=_MEND)
        return said, Path(found)
    return None


def read_pixels(weights: str, published: Pixels) -> Pixels:
    """What the file of a folder or hub name says; where it is silent, what holds for the family's `published`
    checkpoints. Raises UserError for a transform that no tower here has.
    """
    found = image_processor(weights)
    if found is None:
        return published
    said = {name: value for name, value in found[0].items() if value is not None}  # null: as if not said
    faults = [
        f"{name} is {_word(said[name])}"
        for name in ("do_resize", "do_rescale", "do_normalize")
        if said.get(name, True) is not True
    ]
    if not isinstance(said.get("do_center_crop", True), bool):
        faults.append(f"do_center_crop is {said['do_center_crop']!r}, neither true nor false")
    factor = said.get("rescale_factor", 1 / 255)
    if not is_number(factor) or abs(factor * 255 - 1) > 1e-6:
        faults.append(f"rescale_factor {factor!r} is not 1/255")
    mean, std = said.get("image_mean", published.mean), said.get("image_std", published.std)
    faults += unfit_colours(mean, std, "image_")
    code = said.get("resample")
    if code is not None and (not is_number(code) or code not in _FILTERS):
        faults.append(f"resample {code} is none of {', '.join(f'{c:d} ({n})' for c, n in _FILTERS.items())}")
    size = _sides(said, "size", _SIZES, faults)
    crop = _sides(said, "crop_size", _SIZES[:1], faults)
    if faults:
        raise UserError.of(Fault(what, str(found[1]), _MEND) for what in faults)
    resample = published.resample if code is None else _FILTERS[code]
    fit, crop_pct = _fit(size, crop, said.get("do_center_crop"), published)
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


def _word(value: Any) -> str:
    return "off" if value is False else f"{value!r}"


def _sides(
    said: dict[str, Any], name: str, known: Sequence[set[str]], faults: list[str]
) -> dict[str, int] | None:
    """A size by its sides, a single number as the `side`; None where nothing is said, or a fault is added."""
    size = said.get(name)
    if size is None:
        return None
    sides = {"side": size}
    if isinstance(size, dict):
        sides = {side: length for side, length in size.items() if length is not None}
    lengths_fit = all(type(length) is int and length > 0 for length in sides.values())
    if lengths_fit and (set(sides) in known or not isinstance(size, dict)):
        return sides
    words = " or ".join("{" + ", ".join(sorted(each)) + "}" for each in known)
    faults.append(f"{name} {size!r} is neither a whole number of pixels nor {words}")
    return None


def _fit(
    size: dict[str, int] | None, crop: dict[str, int] | None, crops: bool | None, published: Pixels
) -> tuple[Literal["crop", "squash"] | None, float]:
    """own_fit and crop_pct. A size of one number is that of the shorter side, as CLIP's files had it, or of a
    square where the family squashes. What is cut where no crop_size is said is the family's.
    """
    if size is None:
        if crops is False and published.own_fit == "crop":
            return None, 1.0
        return published.own_fit, published.crop_pct
    names, lengths, kept = {*size}, {*size.values()}, {*(crop or {}).values()}
    if crops is None:
        crops = crop is not None or (published.own_fit == "crop" and names != _SIZES[0])
    if names == {"side"}:
        names = _SIZES[0] if published.own_fit == "squash" and not crops else _SIZES[1]
    one_side = names == _SIZES[1]
    if names not in _SIZES[:2] or len(lengths) > 1 or len(kept) > 1 or (one_side and not crops):
        return None, 1.0
    crop_pct = kept.pop() / lengths.pop() if kept else published.crop_pct
    return "crop" if one_side else "squash", crop_pct if crops else 1.0
