from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmtune.evaluation.thumbnails import SIDE, make_thumbnails


def opened(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_upright_in_rgb_and_small(tmp_path: Path) -> None:
    # Its left half is red as it is stored, and a turn by a quarter brings that half to the top.
    stored = Image.new("RGB", (400, 200), "blue")
    stored.paste((255, 0, 0), (0, 0, 200, 200))
    turned = Image.Exif()
    turned[0x0112] = 6
    stored.save(tmp_path / "turned.jpg", exif=turned)
    Image.new("LA", (10, 20), (0, 0)).save(tmp_path / "clear.png")
    made = make_thumbnails([(str(tmp_path), "turned.jpg"), (str(tmp_path), "clear.png")])
    turned_uri, clear_uri = made.uris.values()
    picture = opened(turned_uri).convert("RGB")
    assert picture.size == (SIDE // 2, SIDE)
    top, bottom = np.asarray(picture)[10, 32].astype(int), np.asarray(picture)[-10, 32].astype(int)
    assert top[0] > 200 > 80 > top[2] and bottom[2] > 200 > 80 > bottom[0]
    clear = opened(clear_uri)
    assert clear.size == (10, 20) and clear.mode == "RGB"
    assert np.asarray(clear).min() > 250  # on white


def test_the_first_ones_until_the_budget_is_spent_each_once(tmp_path: Path) -> None:
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    every = [(str(tmp_path), f"{number}.png") for number in range(40)]
    whole = make_thumbnails([*every, *every])
    assert list(whole.uris) == every and whole.over_budget == 0
    sizes = [len(uri) for uri in whole.uris.values()]
    part = make_thumbnails(every, sum(sizes[:35]) + sizes[35] - 1)
    assert list(part.uris) == every[:35] and part.over_budget == 5 and len(part) == 40
    nothing = make_thumbnails(every, 0)
    assert nothing.uris == {} and nothing.over_budget == 40 and nothing.warnings() == []


def test_what_cannot_be_shown_is_told_and_never_raised(tmp_path: Path) -> None:
    inner = tmp_path / "pictures"
    inner.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    Image.new("RGB", (9, 9)).save(inner / "whole.png")
    (inner / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (inner / "folder.png").mkdir()
    bad = ["missing.png", "broken.png", "folder.png", "../outside.png", "a\0b.png", "\ud800.png", "x" * 5000]
    made = make_thumbnails([(str(inner), name) for name in [*bad, "whole.png"]])
    assert [name for _, name in made.uris] == ["whole.png"]
    assert [name for _, name in made.unreadable] == bad
    assert "no such picture" in made.unreadable[str(inner), "missing.png"]
    (warning,) = made.warnings()
    assert warning.startswith("7 of 8 pictures are not shown") and "missing.png" in warning
