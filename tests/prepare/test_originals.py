"""Sets as they were published: found, linked or unpacked, compared with what was published, or asked for."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.data.cards import load_card
from mmtune.evaluation.protocol import load_protocol
from mmtune.prepare.originals import Original, absent, compare, load_originals, originals_names, place, unpack

ZIP = "https://example.org/set.zip"


def zipped(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    return path


@pytest.mark.parametrize("name", originals_names())
def test_every_set_fits_its_cards_and_protocols(name: str) -> None:
    known = load_originals(name)
    assert known.root == Path("datasets") / name
    assert all(load_protocol(task).root == known.root for task in known.tasks)
    for released in known.released:
        card = load_card(released.card)
        assert card.name in known.cards and card.root == known.root and released.split in card.splits
        assert not released.of or sum(released.of.values()) == released.samples
    for card in map(load_card, known.cards):
        if not card.task:
            assert card.name in {released.card for released in known.released}
            continue
        protocol = load_protocol(card.task)
        assert (card.root, Path(card.images)) == (known.root, Path(protocol.images))
        assert set(card.splits) & set(protocol.annotations)
    for file in known.converted:
        assert file.split in (
            load_card(file.card).splits if file.card else load_protocol(file.task).annotations
        )
        assert file.made_by in ("", *known.cards)
    for original in known.originals:
        assert bool(original.confirmed_by) == bool(original.bytes or original.sha256)
        assert original.sha256 is None or len(bytes.fromhex(original.sha256)) == 32


def test_no_card_names_a_set_that_is_not_there() -> None:
    listed = {card for name in originals_names() for card in load_originals(name).cards}
    made = {path.stem for path in share("data").glob("*.yaml") if not path.stem.startswith("tiny_")}
    assert listed == made


def test_what_is_absent_is_told_once_for_each_download(tmp_path: Path) -> None:
    wanted = [
        Original(["a.json", "b.json"], ZIP, bytes=2_500_000_000),
        Original(["c"], ZIP, needed_for="training"),
        Original(["d.json"], "https://example.org/page"),
    ]
    (tmp_path / "b.json").write_text("{}")
    first, second = absent(wanted, tmp_path, tmp_path / "root", "CC BY 4.0")
    assert first.what == "not there: a.json, c"
    assert first.mend.startswith(f"Get it from {ZIP} (CC BY 4.0).")
    assert first.mend.endswith("--cards none goes without.")
    assert second.what == "not there: d.json"
    zipped(tmp_path / "set.zip", x="")
    assert [fault.what for fault in absent(wanted, tmp_path, tmp_path / "root", "")] == ["not there: d.json"]


def test_what_lies_elsewhere_is_linked_and_left_alone(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "sets/this"
    (source / "unpacked").mkdir(parents=True)
    (source / "unpacked/a.json").write_text("{}")
    beside = tmp_path / "sets/other/pictures"
    beside.mkdir(parents=True)
    original = Original(["a.json", "pictures"], ZIP, inside="unpacked", also_in=["../other"])
    assert len(list(place(original, source, root, exact=True))) == 2
    assert (root / "a.json").samefile(source / "unpacked/a.json")
    assert (root / "pictures").readlink() == Path("../other/pictures")
    assert list(place(original, source, root, exact=True)) == []
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer/a.json").write_text("[]")
    list(place(original, tmp_path / "newer", root, exact=True))
    assert (root / "a.json").read_text() == "[]"
    assert (source / "unpacked/a.json").read_text() == "{}"


def test_archives_are_unpacked_as_they_come(tmp_path: Path) -> None:
    zipped(tmp_path / "set.zip", in__a="1", in__pictures__x__0="2", in__pictures__y="3", in__picturesque="4")
    original = Original(["a", "pictures"], ZIP, inside="in")
    said = list(place(original, tmp_path, tmp_path / "root", exact=True))
    assert said == [f"{tmp_path}/root/{name}: out of {tmp_path}/set.zip" for name in ("a", "pictures")]
    files = sorted(path for path in (tmp_path / "root").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "root")) for path in files] == ["a", "pictures/x/0", "pictures/y"]
    assert [path.read_text() for path in files] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut", None, "a broken archive"),
        ("flipped", None, "a broken archive: Error -3"),
        ("other", {"b": "1"}, "there is no a in it"),
        ("evil", {"a/../../outside": "1"}, "leads out of the folder"),
    ],
)
def test_archives_that_are_not_it(
    name: str, content: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    archive = tmp_path / "set.zip"
    if content is None:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("a", "1" * 1000)
        whole = archive.read_bytes()  # the member's own bytes begin at 31
        archive.write_bytes(whole[:-30] if name == "cut" else whole[:31] + b"\xff" * 4 + whole[35:])
    else:
        zipped(archive, **content)
    with pytest.raises(UserError, match=message):
        unpack(archive, "a", tmp_path / "root" / "a")
    assert not list(tmp_path.glob("root/*"))
    assert not (tmp_path / "outside").exists()


def test_a_download_is_compared_with_the_published_one(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "set.zip", a="1")
    size, digest = archive.stat().st_size, hashlib.sha256(archive.read_bytes()).hexdigest()
    compare(archive, Original(["a"], ZIP, bytes=size, sha256=digest, confirmed_by="us"))
    for other, said in (
        (Original(["a"], ZIP, bytes=size + 1, confirmed_by="us"), f"it has {size} bytes, published are"),
        (
            Original(["a"], ZIP, sha256="0" * 64, confirmed_by="us"),
            "its SHA-256 is not that of the published",
        ),
    ):
        with pytest.raises(UserError, match=said):
            list(place(other, tmp_path, tmp_path / "root", exact=True))
        assert not (tmp_path / "root").exists()
    list(place(other, tmp_path, tmp_path / "root", exact=False))
    assert (tmp_path / "root/a").read_text() == "1"
