"""Pictures: decoded, laid on a square, resized to uint8. Normalising happens on the device, in the tower."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from mmtune.core.errors import UserError
from mmtune.data.shards import Stored

Picture = Path | Stored  # a file by itself, or in a shard
Fit = Literal["pad", "crop", "squash"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
HalfPixel = Literal["down", "even"]
MOST_PIXELS = 2**26  # of a picture made on the way to the model's size: 8192 x 8192
_MEND = "Take the picture out of the data, or fetch or save it anew."


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes size x size pixels; saved with the model.

    fit: `pad` lays it on a square of the mean colour (LLaVA-1.5), `crop` resizes the shorter side and cuts
    the middle (CLIP), `squash` resizes both sides (SigLIP). mean, std: of the tower, on a scale of 0 to 1.
    resample: PIL's filter. crop_pct: `crop` and `squash` resize to size / crop_pct, of which the middle is
    kept (224/256 for DINOv2). half_pixel: how the place where it begins is rounded, `down` by transformers,
    to the `even` pixel by torchvision, so by timm and open_clip.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit = "pad"
    resample: Resample = "bicubic"
    crop_pct: float = 1.0
    half_pixel: HalfPixel = "down"

    @property
    def length(self) -> int:
        """What `crop` resizes the shorter side to, and `squash` both, in pixels."""
        return math.floor(self.size / self.crop_pct + 1e-6)  # 224 / (224 / 256) has to be 256

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """A uint8 array [3, size, size] of an RGB picture.

        One so long that its square would hold more than MOST_PIXELS is scaled down before it is padded.
        """
        resample = Image.Resampling[self.resample.upper()]
        if self.fit == "pad" and picture.width != picture.height:
            side = max(picture.size)
            if side**2 > MOST_PIXELS:
                shrink = math.isqrt(MOST_PIXELS) / side
                width, height = (max(1, round(length * shrink)) for length in picture.size)
                picture = picture.resize((width, height), resample)
                side = max(picture.size)
            background = tuple(int(255 * value) for value in self.mean)
            square = Image.new("RGB", (side, side), background)
            square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            picture = square
        if self.fit != "pad":
            length, short = self.length, min(picture.size)
            sides = [length * side // short if self.fit == "crop" else length for side in picture.size]
            picture = self._middle(picture, sides[0], sides[1], resample)
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), resample)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def _middle(
        self, picture: Image.Image, width: int, height: int, resample: Image.Resampling
    ) -> Image.Image:
        """The middle of a picture that was resized to width x height."""
        size = self.size
        rest = (width - size, height - size)
        left, top = (r // 2 if self.half_pixel == "down" else round(r / 2) for r in rest)
        if width * height > MOST_PIXELS:  # then only what is kept
            across, down = picture.width / width, picture.height / height
            kept = (left * across, top * down, (left + size) * across, (top + size) * down)
            return picture.resize((size, size), resample, box=kept)
        return picture.resize((width, height), resample).crop((left, top, left + size, top + size))


def is_there(picture: Picture) -> bool:
    """Whether there is such a file: False too where its folder is closed. What was indexed is there."""
    return isinstance(picture, Stored) or os.path.isfile(picture)


def load_image(path: Picture) -> Image.Image:
    """An upright RGB picture. Transparent parts are laid on white, 16-bit greys scaled to 8; of an animation
    the first frame.

    Raises UserError that names the file where it is missing or broken.
    """
    try:
        with Image.open(io.BytesIO(path.read()) if isinstance(path, Stored) else path) as opened:
            opened.load()
            return upright_rgb(opened)
    except FileNotFoundError:
        raise UserError("no such picture", where=path, mend="Is the folder of the pictures right?") from None
    except PermissionError:
        raise UserError("this picture may not be read", where=path, mend="Look at its permissions.") from None
    except UserError as error:
        raise UserError(error.faults[0].what, where=path, mend=error.faults[0].mend) from None
    except Exception as error:  # Damaged headers make decoders raise nearly anything, struct.error too.
        raise UserError(f"this picture cannot be read: {error}", where=path, mend=_MEND) from None


def upright_rgb(opened: Image.Image) -> Image.Image:
    """An opened picture turned as its EXIF data say, in RGB, as `load_image` gives it. Raises UserError."""
    picture = ImageOps.exif_transpose(opened)
    if picture.mode == "F":
        raise UserError(
            "a picture of floating-point numbers has no black and no white",
            mend="Save it with 8 or 16 bits.",
        )
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).clip(0, 65535)
        picture = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
