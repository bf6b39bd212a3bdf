"""preprocessor_config.json, and what it stands for against transformers' own image processors on PIL."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)

from mmtune.core.errors import UserError
from mmtune.data.image import ImageTransform
from mmtune.parts.spec import MODEL_TYPES, TOWERS
from mmtune.parts.vision.pixels import Pixels, read_pixels, said_of
from mmtune.parts.vision.siglip2 import in_rows
from tests.parts.towers import FAMILIES, Family

GREY = (0.5, 0.5, 0.5)
PUBLISHED = Pixels(GREY, GREY, "lanczos", "squash", 0.9)
SHAPES = [(50, 31), (31, 50), (28, 28), (9, 40), (200, 131)]
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
OF_TRANSFORMERS = [family for family in FAMILIES if family.name in set(MODEL_TYPES.values())]
SQUASHED = {"size": {"height": 28, "width": 28}}


def noise(width: int, height: int) -> Image.Image:
    drawn = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(drawn)


def wrote(folder: Path, said: dict[str, Any]) -> str:
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return str(folder)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (CLIPImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
        (BitImageProcessorPil, CROPPED),
        (SiglipImageProcessorPil, SQUASHED),
        (CLIPImageProcessorPil, {"size": {"height": 32, "width": 32}, "crop_size": CROPPED["crop_size"]}),
    ],
)
def test_pixels_are_those_of_transformers(
    tmp_path: Path, processor: Any, said: dict[str, Any], resample: int
) -> None:
    """Bit for bit; and what is said of the transform again makes the same processor."""
    mean, std, filters, fit, crop_pct = read_pixels(
        wrote(tmp_path, {**said, "resample": resample}), PUBLISHED
    )
    assert fit is not None
    transform = ImageTransform(28, mean, std, fit, filters, crop_pct)
    for fields in ({**said, "resample": resample}, said_of(transform)):
        theirs = processor(**fields, do_rescale=False, do_normalize=False)
        for shape in SHAPES:
            expected = theirs(noise(*shape), return_tensors="np")["pixel_values"][0]
            assert np.array_equal(transform(noise(*shape)), expected), shape


@pytest.mark.parametrize(
    ("said", "fit", "crop_pct"),
    [
        ({}, "squash", 0.9),  # the family's own
        ({"size": 224, "crop_size": 224}, "crop", 1.0),  # as of old
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, "crop", 224 / 256),
        ({"size": {"height": 384, "width": 384}, "do_center_crop": None}, "squash", 1.0),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, None, 1.0),
        ({"size": {"height": 224, "width": 336}}, None, 1.0),
    ],
)
def test_how_a_picture_becomes_a_square(
    tmp_path: Path, said: dict[str, Any], fit: str | None, crop_pct: float
) -> None:
    found = read_pixels(wrote(tmp_path, said), PUBLISHED)
    assert (found.own_fit, found.crop_pct) == (fit, crop_pct)
    assert found[:3] == PUBLISHED[:3]


def test_no_file_stands_for_what_was_published(tmp_path: Path) -> None:
    assert read_pixels(str(tmp_path), PUBLISHED) == PUBLISHED


def test_a_transform_that_no_tower_has_is_refused_whole(tmp_path: Path) -> None:
    said = {"do_normalize": False, "rescale_factor": 1 / 127.5, "resample": 4, "image_mean": [0.5]}
    with pytest.raises(UserError) as refused:
        read_pixels(wrote(tmp_path, said), PUBLISHED)
    text = str(refused.value)
    for part in (
        "do_normalize is off",
        "is not 1/255",
        "resample 4 is none of",
        "image_mean is not three numbers",
    ):
        assert part in text


def test_the_file_of_transformers_5(tmp_path: Path) -> None:
    """What CLIPProcessor saves; the older file counts where that says nothing of pictures."""
    kind = {"image_processor_type": "CLIPImageProcessor"}
    said = {**kind, "image_mean": [0.1, 0.2, 0.3], "resample": 2, **CROPPED}
    nested = tmp_path / "processor_config.json"
    nested.write_text(json.dumps({"processor_class": "CLIPProcessor", "image_processor": said}))
    wrote(tmp_path, {**kind, "image_mean": [0.4, 0.4, 0.4]})
    read = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    found = read_pixels(str(tmp_path), PUBLISHED)
    assert found.mean == tuple(read.image_mean) == (0.1, 0.2, 0.3)
    assert found[2:] == ("bilinear", "crop", 28 / 32)
    nested.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_pixels(str(tmp_path), PUBLISHED).mean == (0.4, 0.4, 0.4)


@pytest.mark.parametrize(
    ("said", "fit", "crop_pct"),
    [
        ({"size": {"shortest_edge": 24}}, "crop", 224 / 256),
        ({"size": {"shortest_edge": 24}, "do_center_crop": True}, "crop", 224 / 256),
        ({"size": 24}, "crop", 224 / 256),
        ({"do_center_crop": False}, None, 1.0),
        ({"size": {"longest_edge": 24}}, None, 1.0),
        ({"size": {"longest_edge": 24}, "crop_size": 24}, None, 1.0),
        ({"size": {"shortest_edge": 24, "longest_edge": 24}}, None, 1.0),
        ({"size": {"height": 24, "width": 24, "shortest_edge": None}}, "squash", 1.0),
    ],
)
def test_where_a_family_that_crops_is_silent(
    tmp_path: Path, said: dict[str, Any], fit: str | None, crop_pct: float
) -> None:
    found = read_pixels(wrote(tmp_path, said), Pixels(GREY, GREY, "bicubic", "crop", 224 / 256))
    assert (found.own_fit, found.crop_pct) == (fit, crop_pct)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"image_mean": 0.5}, "image_mean is not three numbers: 0.5"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean is not three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std has to be above zero"),
        ({"rescale_factor": "x"}, "rescale_factor 'x' is not 1/255"),
        ({"resample": [3]}, r"resample \[3\] is none of"),
        ({"size": {}}, r"size {} is neither a whole number of pixels nor {height, width} or {shortest_edge}"),
        ({"size": "24"}, "size '24' is neither"),
        ({"size": [24, 24]}, r"size \[24, 24\] is neither"),
        ({"size": {"shortest_edge": None}}, "size {'shortest_edge': None} is neither"),
        ({"size": 0, "crop_size": 24}, "size 0 is neither"),
        (
            {"crop_size": [24, 24]},
            r"crop_size \[24, 24\] is neither a whole number of pixels nor {height, width}$",
        ),
        ({"do_center_crop": "yes"}, "do_center_crop is 'yes'"),
        ([], "not the fields of an image processor"),
        (None, "not the fields of an image processor"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, said: Any, what: str) -> None:
    with pytest.raises(UserError, match=re.compile(what, re.MULTILINE)):
        read_pixels(wrote(tmp_path, said), PUBLISHED)


@pytest.mark.parametrize("named", ["clip", "siglip", "dinov3"])
def test_the_published_transform_is_the_default_of_its_processor(tmp_path: Path, named: str) -> None:
    """Not DINOv2's: its checkpoints say 256 and 224 of a BitImageProcessor, whose defaults are others."""
    tower = TOWERS.load(named)
    default = getattr(transformers, tower.processor)().to_dict()
    silent = Pixels((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "nearest", None, 0.0)
    found = read_pixels(wrote(tmp_path, default), silent)
    assert found == tower.published


@pytest.mark.parametrize("family", OF_TRANSFORMERS, ids=lambda family: family.name)
def test_a_saved_tower_brings_the_image_processor_of_its_family(family: Family, tmp_path: Path) -> None:
    """Its pixels, normalised, are the tower's own: to a rounding, but for DINOv3.

    transformers has DINOv3's transform on torchvision alone, which resizes after it has divided by 255 and
    doesn't round to whole levels: up to one level of 255 on noise.
    """
    tower = TOWERS.load(family.tower).load(family.save(tmp_path / "tower"), -2, torch.float32)
    tower.save(tmp_path / "saved")
    naflex, unrounded = family.tower == "siglip2", family.tower == "dinov3"
    processor = AutoImageProcessor.from_pretrained(
        tmp_path / "saved", **({} if unrounded else {"backend": "pil"})
    )
    transform = tower.transform("squash" if naflex else "own")
    for shape in [(50, 50)] if naflex else SHAPES:  # NaFlex keeps the ratio
        picture = noise(*shape)
        mine = tower.normalise(torch.from_numpy(transform(picture))[None], torch.float32)
        mine = in_rows(mine, tower.patch) if naflex else mine
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        level = 1 / 255 / min(tower.std)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1.01 * level if unrounded else 1e-6)
