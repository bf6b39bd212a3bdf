"""Small files: what is broken is named with its line, what is written is written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError

# Python refuses numbers of thousands of digits, and brackets nested as deep.
_UNPARSED = (ValueError, RecursionError)


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
        return json.loads(text)
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
            row = json.loads(line)
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` when the block ends without an error.

    Raises UserError where the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=path) from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
