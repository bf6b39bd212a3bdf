"""Files: broken ones are named with their line, written ones are whole."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from mmtune.core import files
from mmtune.core.errors import UserError
from mmtune.core.files import (
    read_json,
    read_jsonl,
    read_text,
    readable_json,
    remove_folder,
    remove_partials,
    replacing,
    replacing_folder,
    share,
    shipped,
    write_json,
    write_text,
    writing,
)

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(value=values)
@settings(max_examples=40, deadline=None)
def test_json_comes_back(folder: Path, value: Any) -> None:
    write_json(folder / "a.json", value)
    assert read_json(folder / "a.json") == value


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), values), min_size=1))
def test_jsonl_comes_back_with_line_numbers(folder: Path, rows: list[dict[str, Any]]) -> None:
    """U+2028 and the like inside a string end no line, blank lines count but hold nothing."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "a.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8", newline="")
    assert read_jsonl(folder / "a.jsonl") == [(2 * i + 1, row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b'{"a": 1,\n "b": }', "line 2: not valid JSON"),
        (b'["a\xff"]', r"not a UTF-8 text file \(byte 3\)"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5_000, "not valid JSON"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json.*{message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"a": 1}\n\n{"a": \n', "line 3: not valid JSON"),
        ('{"a": 1}\n[1]\n', "line 2: expected an object, found list"),
        ('{"a": ' + "1" * 5_000 + "}", "line 1: not valid JSON"),
    ],
)
def test_broken_jsonl(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=rf"a\.jsonl.*{message}"):
        read_jsonl(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "gunzip"),
        ('{"a": 1}'.encode("utf-16"), "iconv -f UTF-16"),
        (b'"\xe9"', "latin1"),
    ],
)
def test_what_is_no_utf_8_is_said_to_be_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "a.json")


def test_jsonl_where_json_is_expected(tmp_path: Path) -> None:
    for name, message in (
        ("a.json", "let its name end in .jsonl"),
        ("a.jsonl", "one JSON value is expected"),
    ):
        (tmp_path / name).write_text("{}\n{}\n")
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_text(tmp_path / "a")
    with pytest.raises(UserError, match="this is a folder"):
        read_text(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        read_text(tmp_path / "file" / "a")


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "naïve\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "naïve\n".encode()
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}])
def test_what_is_no_json_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match="cannot be written"):
            write_text(path, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_ships_with_the_package() -> None:
    assert (share("data") / "tiny_iconqa.yaml").is_file()
    assert share("eval").is_dir()


def test_what_ships_is_found_by_its_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = "tiny_iconqa.yaml"
    assert shipped(f"data/{card}") == share("data") / card
    for path in ("data/mine", "runs/a/final", card, str(tmp_path / "data")):
        assert shipped(path) == Path(path)
    write_text(tmp_path / "data" / card, "mine")
    assert shipped(Path("data", card)) == Path("data", card)


# ---- Whole, or not at all -------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with replacing_folder(folder) as partial:
        (partial / "inside").mkdir()
        (partial / "inside" / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "inside" / "file").read_text() == "text"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "a") as partial:
        (partial / "file").write_text("text")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("old")
    with pytest.raises(UserError, match="cannot be written"), replacing_folder(tmp_path / "a"):
        pass
    assert [path.read_text() for path in tmp_path.rglob("file")] == ["old"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was synced and may lose anything else, a name before the content behind it."""
    done: list[str] = []

    def tell(owner: Any, name: str, said: str, which: int) -> None:
        plain = getattr(owner, name)

        def told(*paths: Path) -> None:
            done.append(f"{said} {Path(paths[which]).name}")
            plain(*paths)

        monkeypatch.setattr(owner, name, told)

    tell(files, "sync", "sync", 0)
    tell(os, "rename", "name", 1)
    tell(os, "replace", "name", 1)
    write_text(tmp_path / "file", "text")
    assert done == ["sync .file.partial", "name file", f"sync {tmp_path.name}"]
    done.clear()
    with replacing_folder(tmp_path / "folder") as partial:
        (partial / "inside").write_text("text")
    assert done == ["sync inside", "sync .folder.partial", "name folder", f"sync {tmp_path.name}"]
    done.clear()
    remove_folder(tmp_path / "folder")
    assert done == ["name .folder.partial", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_go(tmp_path: Path) -> None:
    torn = ("checkpoints/.step-2.partial/training/.state.json.partial", "eval/.results.json.partial")
    for name in (*torn, "kept"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["kept"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "eval", "kept"}


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
    ids=["python", "rust"],
)
def test_a_failing_write_says_where_and_why(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError) as caught, writing(tmp_path / "file"):
        raise error
    (fault,) = caught.value.faults
    assert fault.where == str(tmp_path / "file")
    assert "No space left" in fault.what
    assert "--resume" in fault.mend


def test_a_fault_of_ours_in_a_write_stays_one(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError), writing(tmp_path / "file"):
        raise SafetensorError("no such tensor")


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        [1, 2],
        {"a": [[1, 2], [3]], "b": {"c": 1.5}, "d": {"e": None, "ü\n[": ["x", "y"]}},
        "é",
        None,
        [[], {}],
    ],
)
def test_readable_json_is_the_same_value(value: object) -> None:
    assert json.loads(readable_json(value)) == value


def test_readable_json_keeps_a_row_on_one_line() -> None:
    assert readable_json({"rows": [[1, 2], [3, 4]]}) == '{\n  "rows": [\n    [1, 2],\n    [3, 4]\n  ]\n}'
