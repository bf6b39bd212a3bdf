"""Small files: what is broken is named with its line, what is written is written whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError

# Python refuses numbers of thousands of digits, and brackets nested as deep.
_UNPARSED = (ValueError, RecursionError)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError where it is missing, a folder, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except IsADirectoryError:
        raise UserError("this is a folder, a file was expected", where=path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not a UTF-8 text file (byte {error.start})", where=path) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None


def read_json(path: Path) -> Any:
    """The parsed JSON of a file. Raises UserError with the line of what is broken."""
    text = read_text(path)
    if not text.strip():
        raise UserError("the file is empty", where=path)
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", where=f"{path}, line {error.lineno}") from None
    except _UNPARSED as error:
        raise UserError(f"not valid JSON: {error}", where=path) from None


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) for each non-empty line. Raises UserError with the line of what is broken."""
    rows = []
    # Not splitlines(): that also breaks at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except json.JSONDecodeError as error:
            raise UserError(f"not valid JSON: {error.msg}", where=f"{path}, line {number}") from None
        except _UNPARSED as error:
            raise UserError(f"not valid JSON: {error}", where=f"{path}, line {number}") from None
        if not isinstance(row, dict):
            raise UserError(f"expected an object, found {type(row).__name__}", where=f"{path}, line {number}")
        rows.append((number, row))
    if not rows:
        raise UserError("the file is empty", where=path)
    return rows


def _parsed(text: str) -> Any:
    value = json.loads(text)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # no tokenizer takes it, and no file could hold it
            raise ValueError("half of a character, \\ud800 to \\udfff without the other half") from None
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; once the block ends without an error its content is put on
    the disk and it is renamed to `path`, so that a file of that name is whole, whenever the power fails.

    Raises UserError where it cannot be written.
    """
    path = Path(path)
    temporary = _hidden(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """As `replacing`, for a folder with all that is in it. `folder` must not exist yet.

    Raises UserError where it cannot be written.
    """
    temporary = _hidden(folder)
    try:
        with writing(folder):
            _remove(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            for inside in (*temporary.rglob("*"), temporary):
                sync(inside)
            os.rename(temporary, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, which loses its name before anything in it is gone. Raises UserError."""
    with writing(folder, "removed"):
        temporary = _hidden(folder)
        _remove(temporary)
        os.rename(folder, temporary)
        sync(folder.parent)
        shutil.rmtree(temporary)


def remove_partials(folder: Path) -> None:
    """Removes what was being written or removed under `folder` when a process died. Raises UserError."""
    for path in list(folder.rglob(".*.partial")):
        with writing(path, "removed"):
            _remove(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, done: str = "written") -> Iterator[None]:
    """Turns a write that fails into a UserError that names `path`: an OSError, and what the libraries written
    in Rust raise in its place, which is no OSError but quotes one.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (isinstance(error, OSError) or "(os error" in str(error)):
            raise
        raise UserError(
            f"cannot be {done}: {getattr(error, 'strerror', None) or error}",
            where=path,
            mend="What was written before is whole. Once this can be written, the same command goes on "
            "(mmtune train: with --resume).",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def share(kind: str) -> Path:
    """The folder of what ships with mmtune: `data` (cards, the tiny model) or `eval` (protocols, suites).

    In a checkout it stands at the top level, in an installed wheel under `mmtune/share`.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "share" / kind
    return installed if installed.is_dir() else package.parent / kind


def shipped(path: str | Path) -> Path:
    """`path`, or, where it starts with data/ and is not there, what ships with mmtune under that name.

    So `data/tiny/model` names the tiny model outside a checkout as it does inside.
    """
    path = Path(path)
    if path.parts[:1] == ("data",) and not path.exists():
        ours = share("data").joinpath(*path.parts[1:])
        return ours if ours.exists() else path
    return path


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
