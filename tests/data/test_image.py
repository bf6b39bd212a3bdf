"""Pictures of every kind, the geometry of padding and cropping, and broken files."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.data.image import ImageTransform, load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
GREY = (122, 116, 104)  # LLaVA-1.5's background: int(255 * mean)


def _saved(picture: Image.Image, path: Path, **options: Any) -> np.ndarray:
    picture.save(path, **options)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def _noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# --- decoding ------------------------------------------------------------------------------------------


def test_rgb_is_left_alone(tmp_path: Path) -> None:
    pixels = _noise(5, 7)
    assert np.array_equal(_saved(Image.fromarray(pixels), tmp_path / "a.png"), pixels)


def test_grey_has_three_equal_channels(tmp_path: Path) -> None:
    grey = _noise(5, 7, 1)[..., 0]
    assert np.array_equal(_saved(Image.fromarray(grey), tmp_path / "a.png"), np.stack([grey] * 3, -1))


def test_black_and_white(tmp_path: Path) -> None:
    bits = np.array([[0, 255], [255, 0]], np.uint8)
    loaded = _saved(Image.fromarray(bits).convert("1"), tmp_path / "a.png")
    assert np.array_equal(loaded[..., 0], bits)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    pixels = _noise(6, 9, len(mode))
    pixels[0, 0, -1], pixels[1, 1, -1] = 0, 255
    loaded = _saved(Image.fromarray(pixels, mode), tmp_path / "a.png")
    colours = pixels[..., :-1] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, -1)
    assert np.abs(loaded - _on_white(colours.astype(float), pixels[..., -1].astype(float))).max() <= 1
    assert tuple(loaded[0, 0]) == (255, 255, 255)
    assert np.array_equal(loaded[1, 1], colours[1, 1])


def _palette() -> tuple[Image.Image, np.ndarray]:
    colours = np.array([[255, 0, 0], [0, 128, 255], [10, 20, 30]], np.uint8)
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(colours.tobytes())
    return picture, colours[indices]


def test_palette(tmp_path: Path) -> None:
    picture, expected = _palette()
    assert np.array_equal(_saved(picture, tmp_path / "a.png"), expected)


@pytest.mark.parametrize("alpha", [0, bytes([0, 255, 128])])
def test_palette_with_transparency(tmp_path: Path, alpha: int | bytes) -> None:
    """A transparent index, or an alpha for each index."""
    picture, colours = _palette()
    loaded = _saved(picture, tmp_path / "a.png", transparency=alpha)
    each = np.array([0, 255, 255] if isinstance(alpha, int) else list(alpha), float)
    expected = _on_white(colours.astype(float), each[np.asarray(picture)])
    assert np.abs(loaded - expected).max() <= 1


def test_a_grey_declared_transparent(tmp_path: Path) -> None:
    grey = np.array([[7, 8]], np.uint8)
    loaded = _saved(Image.fromarray(grey), tmp_path / "a.png", transparency=7)
    assert loaded[0, 0, 0] == 255
    assert loaded[0, 1, 0] == 8


def test_cmyk(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    loaded = _saved(picture, tmp_path / "a.jpg", quality=95)
    assert np.abs(loaded.astype(int) - (255, 0, 0)).max() <= 6


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    loaded = _saved(Image.fromarray(deep), tmp_path / "a.png")
    assert loaded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_thirty_two_bits_stay_within_range(tmp_path: Path) -> None:
    deep = np.array([[-5, 0, 65535, 2_000_000]], np.int32)
    loaded = _saved(Image.fromarray(deep), tmp_path / "a.tiff")
    assert loaded[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    """A camera stores the turned picture and how to turn it back (EXIF 2.3, tag 274)."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    assert np.array_equal(_saved(picture, tmp_path / "a.png", exif=exif), upright)


# --- broken files --------------------------------------------------------------------------------------


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.png: no such picture"):
        load_image(tmp_path / "no.png")
    with pytest.raises(UserError, match="cannot be read"):
        load_image(tmp_path)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "gif"])
def test_a_truncated_picture_is_named(tmp_path: Path, format: str) -> None:
    whole = io.BytesIO()
    Image.fromarray(_noise(40, 40)).save(whole, format)
    path = tmp_path / f"cut.{format}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    with pytest.raises(UserError, match=rf"cut\.{format}: this picture cannot be read"):
        load_image(path)


def test_no_picture_at_all(tmp_path: Path) -> None:
    for content in (b"", b"<html>404</html>"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jpg: this picture cannot be read"):
            load_image(tmp_path / "a.jpg")


def test_whatever_a_decoder_raises_names_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow lets struct.error and the like escape for some damaged EXIF data, too rarely to wait for."""

    def broken(picture: Image.Image) -> Image.Image:
        raise struct.error("required argument is not an integer")

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(UserError, match=r"a\.png: this picture cannot be read: required"):
        load_image(tmp_path / "a.png")


@given(data=st.data(), format=st.sampled_from(["jpeg", "png", "gif", "tiff", "webp"]))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_never_anything_but_a_named_fault(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, format: str
) -> None:
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(_noise(12, 9)).save(whole, format, exif=exif)
    damaged = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(damaged), 160) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{format}"
    path.write_bytes(damaged)
    try:
        assert load_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)


# --- geometry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(10, 31), (31, 10), (30, 31), (1, 8)])
def test_padding_centres_on_the_mean_colour(height: int, width: int) -> None:
    """At the square's own size nothing is resized, so every pixel is known."""
    pixels = _noise(height, width)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = GREY
    expected[top : top + height, left : left + width] = pixels
    made = ImageTransform(side, CLIP_MEAN, CLIP_STD, "pad")(Image.fromarray(pixels))
    assert np.array_equal(made, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_square_of_the_right_size_is_left_alone(fit: str) -> None:
    pixels = _noise(24, 24)
    made = ImageTransform(24, CLIP_MEAN, CLIP_STD, fit)(Image.fromarray(pixels))  # type: ignore[arg-type]
    assert np.array_equal(made, pixels.transpose(2, 0, 1))
    assert made.dtype == np.uint8
    assert made.flags.c_contiguous


def test_cropping_cuts_the_middle() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    made = ImageTransform(20, CLIP_MEAN, CLIP_STD, "crop")(Image.fromarray(pixels))
    assert np.array_equal(made, pixels[:, 20:40].transpose(2, 0, 1))


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    size=st.integers(1, 40),
    fit=st.sampled_from(["pad", "crop"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_becomes_the_square(height: int, width: int, size: int, fit: str) -> None:
    picture = Image.new("RGB", (width, height), GREY)
    made = ImageTransform(size, CLIP_MEAN, CLIP_STD, fit)(picture)  # type: ignore[arg-type]
    assert made.shape == (3, size, size)
    assert np.abs(made.astype(int) - np.array(GREY)[:, None, None]).max() <= 1


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_a_very_long_picture_takes_little_memory_and_the_same_pixels(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is kept is computed, or it is scaled down before its square is made; no pixel can tell."""
    across = np.linspace(0, 255, 400)[None, :, None] + np.linspace(-20, 20, 40)[:, None, None]
    picture = Image.fromarray(np.repeat(across.clip(0, 255), 3, -1).astype(np.uint8))
    transform = ImageTransform(20, CLIP_MEAN, CLIP_STD, fit)
    usual = transform(picture).astype(int)
    made: list[tuple[int, int]] = []
    monkeypatch.setattr("mmtune.data.image.MOST_PIXELS", 200 * 200 if fit == "pad" else 20 * 100)
    whole = Image.Image.resize

    def resize(picture: Image.Image, size: tuple[int, int], *options: Any, **named: Any) -> Image.Image:
        made.append(size)
        return whole(picture, size, *options, **named)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert np.abs(transform(picture) - usual).max() <= 3
    assert max(width * height for width, height in made) <= 200 * 200 // 10


def _clip_processor(size: int) -> Any:
    return pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="no PIL form of CLIP's image processor"
    ).CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _normalised(made: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (made / 255 - mean) / std


@pytest.mark.parametrize("shape", [(480, 640), (641, 333), (224, 500), (227, 224), (100, 150), (333, 333)])
def test_cropping_is_clips_own(shape: tuple[int, int]) -> None:
    picture = Image.fromarray(_noise(*shape)).resize(shape[::-1])
    expected = _clip_processor(224)(picture, return_tensors="np")["pixel_values"][0]
    made = ImageTransform(224, CLIP_MEAN, CLIP_STD, "crop")(picture)
    assert np.abs(_normalised(made) - expected).max() < 1e-5


# --- real pictures -------------------------------------------------------------------------------------


def test_real_photographs(real_data: Path) -> None:
    processor = _clip_processor(224)
    seen = 0
    for path in sorted((real_data / "photos").iterdir()):
        if "truncated" in path.name:
            with pytest.raises(UserError, match=path.name):
                load_image(path)
            continue
        picture = load_image(path)
        assert picture.mode == "RGB"
        expected = processor(picture, return_tensors="np")["pixel_values"][0]
        made = ImageTransform(224, CLIP_MEAN, CLIP_STD, "crop")(picture)
        assert np.abs(_normalised(made) - expected).max() < 1e-5, path.name
        seen += 1
    assert seen >= 10
