"""A question's picture and its options as one: each option is found again beside its letter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.data.image import load_image
from mmtune.evaluation.metrics.iconqa import read
from mmtune.prepare.composed import LINE, MARGIN, compose, compose_all

COLOURS = ((220, 30, 30), (30, 160, 60), (30, 80, 230), (240, 200, 20), (160, 40, 180))


def blocks(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) around all pixels of one colour."""
    there = (np.asarray(picture) == colour).all(axis=2)
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_options_stand_in_reading_order_under_the_picture(count: int) -> None:
    picture = Image.new("RGB", (300, 120), (1, 2, 3))
    options = [Image.new("RGB", (80 + 10 * n, 60), colour) for n, colour in enumerate(COLOURS[:count])]
    whole = compose(picture, options)
    assert blocks(whole, (1, 2, 3))[1] == MARGIN
    found = [blocks(whole, colour) for colour in COLOURS[:count]]
    assert all(top >= 120 + 2 * MARGIN for _, top, _, _ in found)
    places = [(top, left) for left, top, _, _ in found]
    assert places == sorted(places)
    widths = [right - left for left, _, right, _ in found]
    factor = widths[0] / 80
    assert widths == [round(option.width * factor) for option in options]  # one factor for all
    for left, top, _, _ in found:  # the letter stands left of its option, in black
        cell = np.asarray(whole)[top : top + 60, left - 40 : left]
        assert (cell == 0).all(axis=2).any()
    assert (np.asarray(whole) == LINE).all(axis=2).any()
    assert max(whole.size) < 2.2 * min(whole.size)


def test_it_is_the_same_to_the_byte_each_time(tmp_path: Path) -> None:
    picture, options = Image.new("RGB", (90, 40), "red"), [Image.new("RGB", (30, 30), "blue")] * 3
    digests = set()
    for name in ("a.png", "b.png"):
        compose(picture, options).save(tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_real_problems(real_data: Path, tmp_path: Path) -> None:
    """Each is drawn once, larger than its picture, and in it the options can be made out pixel for pixel."""
    folder = real_data / "iconqa/choose_img"
    apart, composed = read(folder, "choose_img"), read(folder, "choose_img", composed="composed")
    assert [question.choices for question in composed] == [tuple("ABCD"[: len(q.choices)]) for q in apart]
    assert [question.answer_index for question in composed] == [q.answer_index for q in apart]
    assert [question.answers for question in composed] == [("ABCDE"[q.answer_index or 0],) for q in apart]
    root = tmp_path / "set"
    root.mkdir()
    for question in apart:
        (root / question.id).symlink_to(folder / question.id)
    assert compose_all(apart, composed, root) == len(apart) == 16
    assert compose_all(apart, composed, root) == 0
    for several, one in zip(apart, composed, strict=True):
        assert one.images == (f"composed/{one.id}.png",)
        whole = np.asarray(load_image(root / one.images[0]))
        first = np.asarray(load_image(folder / str(several.image)))
        left = (whole.shape[1] - first.shape[1]) // 2
        assert (whole[MARGIN : MARGIN + len(first), left : left + first.shape[1]] == first).all()


def test_only_options_that_are_pictures_are_composed(real_data: Path) -> None:
    with pytest.raises(UserError, match="only choose_img has options that are pictures, not choose_txt"):
        read(real_data / "iconqa/choose_txt", "choose_txt", composed="composed")
