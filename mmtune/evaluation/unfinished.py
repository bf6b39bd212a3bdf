"""The answers of a task that is under way: on the disk as they come, so that a killed evaluation goes on.

Each process appends to a file of its own, `answers_TASK.RANK.partial.jsonl`: a header that says all that
decides the answers, then a line per question. They are read by whoever goes on, in however many processes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmtune.core import processes
from mmtune.core.files import writing


class Unfinished:
    """The unfinished answers of `task` in `folder`, and where this process adds to them (as a context).

    header: all that decides the answers, ready for JSON. A file with another header is not read.
    done: question id -> row, as they were found when this was made. made: what was noted beside them.
    """

    def __init__(self, folder: Path, task: str, header: dict[str, Any]) -> None:
        self.folder = folder
        self.task = task
        self.header = json.loads(json.dumps(header))
        self.path = folder / f"answers_{task}.{processes.rank()}.partial.jsonl"
        self.file: IO[bytes] | None = None
        self.made: dict[str, Any] = {}
        self.done = self.read()
        if processes.rank() == 0:
            self._say()

    def read(self) -> dict[str, dict[str, Any]]:
        """Question id -> row, of all processes. Raises UserError where a file cannot be read."""
        found: dict[str, dict[str, Any]] = {}
        for path in self._files():
            header, *rows = _lines(path)
            if header == self.header:
                found.update((row["question_id"], row) for row in rows if "question_id" in row)
                self.made |= {key: row["made"][key] for row in rows if "made" in row for key in row["made"]}
        return found

    def note(self, made: dict[str, Any]) -> None:
        """Keeps how the answers that follow are made, which a loaded model alone tells."""
        self.add([{"made": made}])

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows; those of answers hold a `question_id`. Raises UserError where they cannot be
        written.
        """
        assert self.file is not None
        with writing(self.path):
            self.file.write(b"".join(_line(row) for row in rows))
            self.file.flush()

    def remove(self) -> None:
        """Removes the files of all processes."""
        for path in self._files():
            with writing(path, "removed"):
                path.unlink()

    def __enter__(self) -> Unfinished:
        with writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            goes_on = self.path.is_file() and _lines(self.path)[0] == self.header
            self.file = open(self.path, "ab" if goes_on else "wb")
        # A line that a kill cut off is ended, so that it spoils no other; it is no JSON and not read.
        with writing(self.path):
            self.file.write(b"\n" if goes_on else _line(self.header))
            self.file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.file is not None
        with writing(self.path):
            self.file.close()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"answers_{escape(self.task)}.*.partial.jsonl"))

    def _say(self) -> None:
        other: set[str] = set()
        for path in self._files():
            header = _lines(path)[0]
            if isinstance(header, dict) and header != self.header:
                keys = header.keys() | self.header.keys()
                other |= {key for key in keys if header.get(key) != self.header.get(key)}
        if other:
            said = f"answers made with another {', '.join(sorted(other))} lie here; begun anew"
            print(f"{self.task}: {said}", file=sys.stderr, flush=True)
        if self.done:
            print(f"{self.task}: {len(self.done)} answers are there already", file=sys.stderr, flush=True)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path) -> list[Any]:
    """What is whole in a file: its lines that are JSON objects; the first is None where that one is not."""
    with writing(path, "read"):
        first, *rest = path.read_bytes().split(b"\n")
    return [next(_objects([first]), None), *_objects(rest)]


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
