"""IconQA's options that are pictures: the question's picture and its lettered options as one picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_uppercase

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mmtune.core.files import replacing
from mmtune.data.image import load_image
from mmtune.evaluation.metrics.base import Question
from mmtune.prepare.originals import sha256

MARGIN = 12  # pixels around everything
LARGEST = 3.0  # no option is enlarged more than so many times
LINE = (120, 120, 120)
MADE_OF = "mmtune:made_of"  # the hash of the pictures, in the PNG's own text


def compose(picture: Image.Image, options: Sequence[Image.Image]) -> Image.Image:
    """The question's picture above its options, each in a frame with its letter, on white.

    All options are enlarged by one factor, for a question may ask which is longer. They stand in as many
    columns as bring the whole nearest to a square, which is what a tower sees.
    """
    together = sum(option.width for option in options)
    factor = min(LARGEST, max(1.0, picture.width / together))
    options = [
        option.resize((round(option.width * factor), round(option.height * factor)), Image.Resampling.BICUBIC)
        for option in options
    ]
    wide = max(option.width for option in options)
    high = max(option.height for option in options)
    letter = max(24, (wide + high) // 6)
    cell = (wide + letter + 2 * MARGIN, max(high, letter) + 2 * MARGIN)

    def size(columns: int) -> tuple[int, int]:
        rows = -(-len(options) // columns)
        width = max(picture.width + 2 * MARGIN, columns * cell[0] + 2 * MARGIN)
        return width, picture.height + rows * cell[1] + 3 * MARGIN

    columns = min(range(1, len(options) + 1), key=lambda count: (max(size(count)), count))
    whole = Image.new("RGB", size(columns), "white")
    whole.paste(picture, ((whole.width - picture.width) // 2, MARGIN))
    pencil = ImageDraw.Draw(whole)
    font = ImageFont.load_default(letter)
    left = (whole.width - columns * cell[0]) // 2
    for place, (mark, option) in enumerate(zip(ascii_uppercase, options, strict=False)):
        x = left + place % columns * cell[0]
        y = picture.height + 2 * MARGIN + place // columns * cell[1]
        pencil.rectangle((x, y, x + cell[0] - MARGIN // 2, y + cell[1] - MARGIN // 2), outline=LINE, width=2)
        pencil.text((x + MARGIN // 2, y + cell[1] // 2), mark, fill="black", font=font, anchor="lm")
        whole.paste(option, (x + letter + MARGIN, y + MARGIN))
    return whole


def compose_all(originals: Sequence[Question], composed: Sequence[Question], root: Path) -> int:
    """Draws what is not there of the composed questions' pictures, and returns how many that were.

    originals: the same questions with their several pictures; one that lacks any is not drawn. What was drawn
    of other pictures, as its file says, does not stay. Paths are relative to `root`. Raises UserError for a
    picture that is broken, or cannot be written.
    """

    def draw(pair: tuple[Question, Question]) -> bool:
        original, target = pair[0], root / str(pair[1].image)
        if not all((root / name).is_file() for name in original.images):
            target.unlink(missing_ok=True)
            return False
        hashes = "".join(sha256(root / name) for name in original.images)
        made_of = hashlib.sha256(hashes.encode()).hexdigest()
        if target.is_file() and _made_of(target) == made_of:
            return False
        first, *options = [load_image(root / name) for name in original.images]
        with replacing(target) as temporary:
            said = PngInfo()
            said.add_text(MADE_OF, made_of)
            compose(first, options).save(temporary, format="PNG", pnginfo=said)
        return True

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return sum(pool.map(draw, zip(originals, composed, strict=True)))
    finally:
        pool.shutdown(cancel_futures=True)  # not all the others after a broken one, or Ctrl-C


def _made_of(drawn: Path) -> str | None:
    try:
        with Image.open(drawn) as picture:
            return picture.info.get(MADE_OF)
    except OSError:  # whatever it is, it is drawn anew
        return None
