"""Pictures: those that cannot be read, and odd ones that are read rightly."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from mmtune.data.image import load_image
from tests.bad_input.bench import Bench, Kind, sample

RED, BLUE = (200, 30, 30), (20, 40, 220)


def _encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def _one(content: bytes | str, name: str = "odd.png", **changes: Any) -> Callable[[Bench], list[object]]:
    """A run of one step on one sample whose picture holds `content`."""

    def command(bench: Bench) -> list[object]:
        bench.file(name, content)
        return bench.data(sample(image=name), **changes)

    return command


def _is(
    *expected: tuple[tuple[int, int], tuple[int, int, int]], tolerance: int = 2
) -> Callable[[Bench], bool]:
    """Whether the picture's pixels at (x, y) have these colours."""

    def holds(bench: Bench) -> bool:
        picture = load_image(bench.sample.images[0])
        found = [np.asarray(picture.getpixel(at), int) - colour for at, colour in expected]
        return picture.mode == "RGB" and all(abs(difference).max() <= tolerance for difference in found)

    return holds


def _sides(mode: str, left: Any, right: Any) -> Image.Image:
    """A picture of 16 x 16 with two colours side by side."""
    picture = Image.new(mode, (16, 16), left)
    picture.paste(right, (8, 0, 16, 16))
    return picture


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 x 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + _chunk(b"IEND", b"")
    )


def _with_text(length: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * length, zip=True)
    return _encoded(_sides("RGB", RED, BLUE), "PNG", pnginfo=text)


def _palette() -> Image.Image:
    picture = _sides("P", 0, 1)
    picture.putpalette([*RED, *BLUE])
    return picture


def _animated(format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)]
    return _encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)


def _turned() -> bytes:
    """Red on the left once it is turned as its EXIF says (6: a quarter clockwise)."""
    exif = Image.Exif()
    exif[274] = 6
    return _encoded(_sides("RGB", RED, BLUE).rotate(90), "PNG", exif=exif)


def _cropping(content: bytes) -> Callable[[Bench], list[object]]:
    def command(bench: Bench) -> list[object]:
        vision = {
            "tower": "clip",
            "weights": str(bench.world / "base" / "vision"),
            "layer": -1,
            "fit": "crop",
        }
        return [*_one(content)(bench), f"model.vision={json.dumps(vision)}"]

    return command


def _closed(bench: Bench) -> list[object]:
    command = bench.data(sample())
    os.chmod(bench.here / "a.png", 0)
    return command


def _closed_folder(bench: Bench) -> list[object]:
    bench.picture("closed/b.png")
    command = bench.data(sample(image="closed/b.png"))
    os.chmod(bench.here / "closed", 0)
    return command


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
DEEP = np.repeat(np.array([[65535] * 8 + [32768] * 8], np.uint16), 16, 0)
PNG, JPEG = _encoded(NOISE, "PNG"), _encoded(NOISE, "JPEG")
TWO = _is(((2, 8), RED), ((13, 8), BLUE))
BROKEN, SAMPLE, MEND = "this picture cannot be read", "(sample s1)", "Take the picture out"
HTML = "<!DOCTYPE html><html><body>404 Not Found</body></html>"

KINDS = [
    Kind("a picture of zero bytes", _one(b""), BROKEN, "odd.png (sample s1)", MEND),
    Kind("a truncated PNG", _one(PNG[: len(PNG) // 2]), BROKEN, SAMPLE, MEND),
    Kind("a truncated JPEG", _one(JPEG[: len(JPEG) // 2], "odd.jpg"), BROKEN, "odd.jpg (sample s1)", MEND),
    Kind("a PNG broken in the middle", _one(PNG[:200] + bytes(400) + PNG[600:]), BROKEN, SAMPLE, MEND),
    Kind("a text file for a picture", _one("just text", "odd.jpg"), BROKEN, SAMPLE, MEND),
    Kind("an error page saved as a picture", _one(HTML, "odd.jpg"), BROKEN, SAMPLE, MEND),
    Kind(
        "a folder for a picture",
        lambda b: b.data(sample(image=".")),
        "no such picture",
        "sample s1",
        "image_root",
    ),
    Kind("a decompression bomb", _one(_bomb()), "decompression bomb", SAMPLE, MEND),
    Kind(
        "a PNG with 100 MB of text in it",
        _one(_with_text(10**8)),
        "Decompressed data too large",
        SAMPLE,
        MEND,
    ),
    Kind(
        "a picture of floating-point numbers",
        _one(_encoded(Image.new("F", (4, 4), 0.5), "TIFF")),
        "floating-point",
        SAMPLE,
        "8 or 16 bits",
    ),
    Kind("a broken picture, loaded by a worker", _one(b"", train={"workers": 1}), BROKEN, SAMPLE, MEND),
    Kind(
        "a picture nobody may read",
        _closed,
        "may not be read",
        "a.png (sample s1)",
        "Look at its permissions",
    ),
    Kind(
        "a folder of pictures nobody may enter",
        _closed_folder,
        "no such picture",
        "sample s1",
        "may you read it",
    ),
    # ---- Odd, and read rightly
    Kind("an animated GIF", _one(_animated("GIF"), "odd.gif"), then=_is(((8, 8), RED))),
    Kind("an animated PNG", _one(_animated("PNG")), then=_is(((8, 8), RED))),
    Kind("an animated WebP", _one(_animated("WEBP"), "odd.webp"), then=_is(((8, 8), RED), tolerance=8)),
    Kind(
        "16 bits",
        _one(_encoded(Image.fromarray(DEEP), "PNG")),
        then=_is(((2, 8), (255,) * 3), ((13, 8), (128,) * 3)),
    ),
    Kind(
        "CMYK",
        _one(_encoded(_sides("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=95), "odd.jpg"),
        then=_is(((2, 8), (255, 0, 0)), ((13, 8), (0, 0, 255)), tolerance=10),
    ),
    Kind("a palette", _one(_encoded(_palette(), "PNG")), then=TWO),
    Kind(
        "a palette with a transparent colour",
        _one(_encoded(_palette(), "PNG", transparency=0)),
        then=_is(((2, 8), (255,) * 3), ((13, 8), BLUE)),
    ),
    Kind(
        "grey",
        _one(_encoded(_sides("L", 10, 200), "PNG")),
        then=_is(((2, 8), (10,) * 3), ((13, 8), (200,) * 3)),
    ),
    Kind(
        "black and white",
        _one(_encoded(_sides("1", 0, 1), "PNG")),
        then=_is(((2, 8), (0,) * 3), ((13, 8), (255,) * 3)),
    ),
    Kind(
        "transparency",
        _one(_encoded(_sides("RGBA", (*RED, 255), (*BLUE, 0)), "PNG")),
        then=_is(((2, 8), RED), ((13, 8), (255,) * 3)),
    ),
    Kind("a picture turned by its EXIF", _one(_turned()), then=TWO),
    Kind("a wrong ending", _one(_encoded(_sides("RGB", RED, BLUE), "PNG"), "odd.jpg"), then=TWO),
    Kind("no ending", _one(_encoded(_sides("RGB", RED, BLUE), "PNG"), "odd"), then=TWO),
    Kind("a PNG with a little text in it", _one(_with_text(10**5)), then=TWO),
    Kind(
        "a picture of one pixel",
        _one(_encoded(Image.new("RGB", (1, 1), RED), "PNG")),
        then=_is(((0, 0), RED)),
    ),
    Kind(
        "a picture of 20000 x 1",
        _one(_encoded(Image.new("RGB", (20000, 1), RED), "PNG")),
        then=_is(((19999, 0), RED)),
    ),
    Kind(
        "a picture of 1 x 20000, cropped",
        _cropping(_encoded(Image.new("RGB", (1, 20000), RED), "PNG")),
        then=_is(((0, 19999), RED)),
    ),
]
