"""Shards against the training file and folder they were made of, webdataset's own reader, and broken tars."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.batches import batch_order, collate, encode_samples, load_images
from mmtune.data.chat import IMAGE, Chat
from mmtune.data.image import ImageTransform, load_image
from mmtune.data.samples import image_first, read_llava, read_sound
from mmtune.data.sharding import write_shards
from mmtune.data.shards import Stored, index_shard, shard_files
from mmtune.run import DataOptions, data_hash

TRANSFORM = ImageTransform(8, (0.5,) * 3, (0.5,) * 3)
ENDINGS = ("png", "jpg", "JPEG", "webp")


def _row(name: object, *images: str, **more: Any) -> dict[str, Any]:
    said = f"{IMAGE * len(images)}What is {name}?"
    turns = [{"from": "human", "value": said}, {"from": "gpt", "value": f"It is {name}."}]
    image = {} if not images else {"image": images[0] if len(images) == 1 else list(images)}
    return {"id": name, **image, "conversations": turns, **more}


def _picture(seed: int, ending: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5 + seed % 7, 6, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, {"jpg": "jpeg"}.get(ending.lower(), ending))
    return written.getvalue()


def _folder(folder: Path, counts: list[int]) -> Path:
    """A training file of rows with so many pictures each, every second picture that of an earlier row."""
    rows, made = [], 0
    for number, count in enumerate(counts):
        names = []
        for _ in range(count):
            place = made // 2
            name = f"deep/{place}.v1.{ENDINGS[place % len(ENDINGS)]}"
            (folder / "deep").mkdir(exist_ok=True)
            (folder / name).write_bytes(_picture(place, ENDINGS[place % len(ENDINGS)]))
            names.append(name)
            made += 1
        rows.append(_row(f"n\u00e4me {number % 5}", *names, extra=number))
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def _tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def _json(*images: str, name: str = "a") -> bytes:
    return json.dumps(_row(name, *images)).encode()


# ---- The same as a folder -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(make_tokenizer: Any) -> Chat:
    return Chat(make_tokenizer("byte_level", "chatml"), "template", 5)


@given(
    counts=st.lists(st.sampled_from([0, 1, 1, 1, 2, 12]), min_size=1, max_size=12),
    per_shard=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    limit=st.none() | st.integers(1, 12),
)
def test_the_same_batches_as_from_a_folder(
    chat: Chat,
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    per_shard: int,
    seed: int,
    limit: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    file = _folder(folder, counts)
    shards = write_shards(file, folder, folder / "shards", per_shard)
    assert len(shard_files(shards)) == -(-len(counts) // per_shard)
    read = [read_llava(file, folder, limit), read_llava(shards, Path("nowhere"), limit)]
    one, other = (encode_samples([*map(image_first, s)], chat, 10**6)[0] for s in read)
    for epoch in range(2):
        order = batch_order(one, 3, seed, epoch)
        assert order == batch_order(other, 3, seed, epoch)
        for batch in order:
            made = [collate([examples[i] for i in batch], TRANSFORM, 0) for examples in (one, other)]
            assert made[0].sample_ids == made[1].sample_ids
            for name in ("input_ids", "attention_mask", "labels", "images"):
                assert torch.equal(getattr(made[0], name), getattr(made[1], name)), name


def test_webdataset_reads_them_and_rows_and_pictures_keep_their_bytes(tmp_path: Path) -> None:
    file = _folder(tmp_path, [1, 0, 3, 1, 1])
    shards = write_shards(file, tmp_path, tmp_path / "shards", 2)
    rows = json.loads(file.read_text())
    found = [*webdataset.WebDataset(str(shards), shardshuffle=False)]
    assert [json.loads(sample["json"]) for sample in found] == rows
    for sample, row in zip(found, rows, strict=True):
        names = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
        keys = sorted(key for key in sample if key != "json" and not key.startswith("__"))
        assert [sample[key] for key in keys] == [(tmp_path / name).read_bytes() for name in names]


def test_what_webdataset_writes_is_read_in_its_order(tmp_path: Path) -> None:
    """As others make them: keys with folders, shards of odd sizes, pictures encoded by webdataset."""
    with webdataset.ShardWriter(str(tmp_path / "w%02d.tar"), maxcount=2, verbose=0) as writer:
        for number in (3, 1, 2):
            pixels = np.full((4, 4, 3), number, np.uint8)
            writer.write({"__key__": f"x/y{number}", "json": _row(number, "any.gif"), "png": pixels})
    for pattern in ("w{00..01}.tar", "w*.tar", "w0?.tar", "w{00,01}.tar"):
        samples = read_llava(tmp_path / pattern, tmp_path)
        assert [sample.id for sample in samples] == ["3", "1", "2"]
        values = [load_images(sample.images, TRANSFORM).unique().tolist() for sample in samples]
        assert values == [[3], [1], [2]]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _folder(tmp_path, [1, 2, 0])
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_shards(file, tmp_path, tmp_path / "a", 2)
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_shards(file, tmp_path, tmp_path / "b", 2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# ---- Their hash -----------------------------------------------------------------------------------------


def test_the_hash_covers_rows_names_and_sizes_of_every_shard(tmp_path: Path) -> None:
    data = [DataOptions(path=tmp_path / "{a,b}.tar")]
    _tar(tmp_path / "a.tar", {"0.json": _json("x"), "0.png": _picture(0)})
    hashes = []
    for files in (
        {"1.json": _json("x"), "1.png": _picture(1)},
        {"1.json": _json("x", name="b"), "1.png": _picture(1)},
        {"2.json": _json("x"), "2.png": _picture(1)},
        {"1.json": _json("x"), "1.png": _picture(1) + b"0"},
    ):
        _tar(tmp_path / "b.tar", files)
        hashes.append(data_hash(data))
        shutil.copy(tmp_path / "b.tar", tmp_path / "c.tar")
        assert data_hash([DataOptions(path=tmp_path / "{a,c}.tar")]) == hashes[-1]
    assert len(set(hashes)) == 4


# ---- What is wrong with them ----------------------------------------------------------------------------

WHOLE = {"0.json": _json("x"), "0.png": _picture(0), "1.json": _json(), "2.json": _json("y"), "2.png": b"no"}


def _faults(pattern: Path) -> str:
    try:
        return "\n".join(map(str, read_sound(pattern, Path())[1]))
    except UserError as error:
        return str(error)


def test_a_tar_that_is_cut_at_any_block_is_never_taken_for_whole(tmp_path: Path) -> None:
    whole = _tar(tmp_path / "whole.tar", WHOLE)
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    assert content[end:].strip(b"\0") == b""
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end + 1, 512), *range(7, end, 300)]:
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.tar"):
            index_shard(cut)
    cut.write_bytes(content[: end + 512])
    assert len(index_shard(cut)) == len(WHOLE)


def test_a_header_that_is_damaged(tmp_path: Path) -> None:
    content = bytearray(_tar(tmp_path / "a.tar", WHOLE).read_bytes())
    second = index_shard(tmp_path / "a.tar")[1].offset - 512
    content[second] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    assert f"a.tar: this shard is cut short or damaged at byte {second}" in _faults(tmp_path / "a.tar")


def test_two_tars_in_one_file(tmp_path: Path) -> None:
    one, other = _tar(tmp_path / "a.tar", WHOLE), _tar(tmp_path / "b.tar", {"9.json": _json()})
    (tmp_path / "c.tar").write_bytes(one.read_bytes() + other.read_bytes())
    assert "goes on after its end" in _faults(tmp_path / "c.tar")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_compressed_shard(tmp_path: Path, name: str) -> None:
    content = _tar(tmp_path / "plain", WHOLE).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert "Unpack it first: gunzip FILE" in _faults(tmp_path / name)


def test_a_link(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", WHOLE)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        entry = tarfile.TarInfo("3.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(entry)
    assert "a.tar, 3.png: a link" in _faults(tmp_path / "a.tar")


BROKEN: dict[str, tuple[dict[str, bytes], str]] = {
    "no row": ({"0.png": b""}, "a.tar: the sample '0' has no 0.json"),
    "no picture": ({"0.json": _json("x")}, "a.tar, 0: the row names 1 pictures, 0 lie beside it"),
    "one too many": ({"0.json": _json("x"), "0.0.png": b"", "0.1.png": b""}, "names 1 pictures, 2 lie"),
    "unnamed": ({"0.json": _json(), "0.png": b""}, "a.tar, 0 (id a): 0 <image> in the conversation, but 1"),
    "a gap": ({"0.json": _json("x", "y"), "0.0.png": b"", "0.2.png": b""}, "not numbered from 0 on: 0.0.png"),
    "both": (
        {"0.json": _json("x", "y"), "0.0.png": b"", "0.png": b""},
        "not numbered from 0 on: 0.0.png, 0.p",
    ),
    "two endings": ({"0.json": _json("x"), "0.jpg": b"", "0.png": b""}, "a.tar, 0.png: given twice"),
    "two rows": ({"0.json": _json(), "0.JSON": _json()}, "a.tar, 0.JSON: given twice"),
    "a text": ({"0.json": _json(), "0.txt": b""}, "a.tar, 0.txt: neither a row nor a picture"),
    "no ending": ({"0": b""}, "a.tar, 0: a file that belongs to no sample"),
    "apart": ({"0.json": _json(), "1.json": _json(), "0.png": b""}, "the key '0' comes again after another"),
    "no JSON": ({"0.json": b"{"}, "a.tar, 0.json, line 1: not valid JSON"),
    "no text": ({"0.json": b"\xff"}, "a.tar, 0.json: not UTF-8"),
    "no object": ({"0.json": b"[]"}, "a.tar, 0: expected an object, found list"),
    "no samples": ({}, "a.tar: there are no samples"),
    "odd image": ({"0.json": json.dumps({**_row("a"), "image": 3}).encode()}, "'image' must be a path"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_named_by_shard_and_key(tmp_path: Path, name: str) -> None:
    files, message = BROKEN[name]
    assert message in _faults(_tar(tmp_path / "a.tar", files))


def test_every_shards_faults_at_once(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", {"0.json": _json("x"), "1.json": _json(), "2.png": b""})
    (tmp_path / "b.tar").write_bytes(_tar(tmp_path / "b.tar", WHOLE).read_bytes()[:600])
    _tar(tmp_path / "c.tar", {"0.json": _json(), "1.json": b"?"})
    samples, faults = read_sound(tmp_path / "?.tar", tmp_path)
    assert len(samples) == 2
    places = [Path(fault.where.split(",")[0]).name for fault in faults]
    assert sorted(places) == ["a.tar", "a.tar", "b.tar", "c.tar"]


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    _tar(tmp_path / "a0.tar", WHOLE)
    with pytest.raises(UserError) as caught:
        shard_files(tmp_path / "a{0..2}.tar")
    assert [fault.what for fault in caught.value.faults] == [
        f"there is no shard {tmp_path}/a1.tar",
        f"there is no shard {tmp_path}/a2.tar",
    ]
    with pytest.raises(UserError, match=r"no shard .*b\*\.tar"):
        shard_files(tmp_path / "b*.tar")


def test_a_broken_picture_and_a_shard_that_was_cut_later_are_named(tmp_path: Path) -> None:
    samples = read_llava(_tar(tmp_path / "a.tar", WHOLE), tmp_path)
    picture = samples[2].images[0]
    assert isinstance(picture, Stored)
    with pytest.raises(UserError, match=r"a\.tar, 2\.png: this picture cannot be read"):
        load_image(picture)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: picture.offset])
    with pytest.raises(UserError, match=r"a\.tar, 2\.png: the shard ends before this file does"):
        load_image(picture)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar, 2\.png: no such picture"):
        load_image(picture)


# ---- The command ----------------------------------------------------------------------------------------


def test_the_command_says_how_a_run_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _folder(tmp_path, [1, 1, 0])
    asked = ["data", "shard", str(file), str(tmp_path / "to"), "--samples_per_shard", "2"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert said == f'written; in a run: data: [{{path: "{tmp_path}/to/train-{{000000..000001}}.tar"}}]\n'
    assert main(asked) == 2
    assert "this is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("x.png", "no such picture"), ("y.txt", "not the name of")])
def test_the_command_writes_nothing_where_pictures_are_amiss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "y.txt").write_text("")
    (tmp_path / "train.json").write_text(json.dumps([_row("a", name), _row("b", name)]))
    assert main(["data", "shard", str(tmp_path / "train.json"), str(tmp_path / "to")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.json", "y.txt"]
