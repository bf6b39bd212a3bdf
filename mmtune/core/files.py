"""Small files: what is broken is named with its line, what is written is written whole."""

from __future__ import annotations

import fcntl
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
    """The text of a UTF-8 file, without a byte order mark; every line end a line feed.

    Raises UserError where it is missing, a folder, unreadable or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", where=path, mend="Is the path right?") from None
    except IsADirectoryError:
        raise UserError(
            "this is a folder, a file was expected", where=path, mend="Name a file in it."
        ) from None
    except UnicodeDecodeError as error:
        if error.object.startswith(b"\x1f\x8b"):
            raise UserError("it is compressed", where=path, mend="Unpack it first: gunzip FILE.") from None
        line = error.object[: error.start].count(b"\n") + 1
        other = "UTF-16" if error.object.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
        raise UserError(
            f"not a UTF-8 text file (byte {error.start})",
            where=f"{path}, line {line}",
            mend=f"Save it as UTF-8; from {other}: iconv -f {other} -t utf-8 FILE.",
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=path, mend="Look at its permissions and its disk."
        ) from None
    except ValueError:  # a NUL byte in the path
        raise UserError(f"{str(path)!r} cannot be the path of a file", mend="Correct the path.") from None


def read_json(path: Path) -> Any:
    """The parsed JSON of a file. Raises UserError with the line of what is broken."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: object) -> Any:
    """The value of the JSON text of a file, `path`. Raises UserError with the line of what is broken."""
    if not text.strip():
        raise UserError("the file is empty", where=path, mend="Was it written whole?")
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        mend = "Mend that line; was the file written whole?"
        if error.msg == "Extra data":
            mend = "A file of one object per line is JSONL: let its name end in .jsonl."
            if str(path).endswith(".jsonl"):
                mend = "It has an object per line; a file that is one JSON value is expected here."
        where = f"{path}, line {error.lineno}"
        raise UserError(f"not valid JSON: {error.msg}", where=where, mend=mend) from None
    except _UNPARSED as error:
        raise UserError(f"not valid JSON: {error}", where=path, mend="Mend it, or write it anew.") from None


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) for each non-empty line. Raises UserError with the line of what is broken."""
    rows = []
    # Not splitlines(): that also breaks at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except _UNPARSED as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(
                f"not valid JSON: {said}",
                where=f"{path}, line {number}",
                mend="Each line must be one whole JSON object; a file that is one list ends in .json.",
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"expected an object, found {type(row).__name__}",
                where=f"{path}, line {number}",
                mend="Each line must be one whole JSON object; a file that is one list ends in .json.",
            )
        rows.append((number, row))
    if not rows:
        raise UserError("the file is empty", where=path, mend="Was it written whole?")
    return rows


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for what json would take in silence."""
    value = _DECODER.decode(text)
    if _SURROGATE.search(text):
        # Half of a pair (an emoji cut in two) is no text: neither a tokenizer nor a file takes it.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"\\u{ord(half):x} is half of a character; write both halves or none") from None
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        of = f" of the object with id {made['id']}" if "id" in made and again != "id" else ""
        raise ValueError(f"the key '{again}'{of} is given twice; keep one of the two")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice)  # made once: a file has many lines


def inside(root: Path, name: str) -> Path:
    """The file `name` under the folder `root`; an absolute name must lie there too.

    A name from a data file must not reach what lies elsewhere, so `..` is taken literally, whatever is
    linked. A link inside the folder is followed: it is the user's own. Raises UserError.
    """
    if "\0" in name:
        raise UserError(
            f"{name!r} cannot be the path of a file: it holds a NUL byte", mend="Correct the path."
        )
    if ".." not in name and not name.startswith("/"):
        return Path(root) / name
    above = os.path.abspath(root)
    relative = os.path.relpath(os.path.normpath(os.path.join(above, name)), above)
    if relative == ".." or relative.startswith("../"):
        raise UserError(
            f"'{name}' leads out of the folder of the pictures, {root}",
            mend="Give a folder that holds all of them (image_root; / where their paths are absolute).",
        )
    return Path(root) / relative


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


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A context in which this process alone works in `folder`, which is made where there is none; nothing of
    it is left behind, also after a kill. Raises UserError where another process works there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another process is writing to this folder",
                where=folder,
                mend="Wait for it, end it, or give another folder.",
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def readable_json(value: Any, indent: str = "") -> str:
    """Indented JSON, in which a list of plain values and what else holds only numbers stand on one line."""
    parts = list(value.values()) if isinstance(value, dict) else value
    plain = (int, float) if isinstance(value, dict) else (int, float, str)
    if not isinstance(parts, list) or all(isinstance(part, plain) for part in parts):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    names = (
        [f"{json.dumps(name, ensure_ascii=False)}: " for name in value] if isinstance(value, dict) else None
    )
    lines = [
        f"{deeper}{names[place] if names else ''}{readable_json(part, deeper)}"
        for place, part in enumerate(parts)
    ]
    opening, closing = "{}" if names else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{indent}{closing}"


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
