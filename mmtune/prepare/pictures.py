"""The pictures that a set's questions name: which are there, and links to those that lie elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmtune.core.errors import Fault
from mmtune.core.files import inside
from mmtune.evaluation.metrics.base import Question, some
from mmtune.prepare.originals import link


def missing(questions: Iterable[Question], folder: Path) -> list[str]:
    """The names of the questions' pictures that are not under `folder`, each once. Raises UserError."""
    names = dict.fromkeys(name for question in questions for name in question.images)
    return [name for name in names if not inside(folder, name).is_file()]


def gather(questions: Sequence[Question], folder: Path, places: Sequence[Path]) -> int:
    """Links pictures that are not under `folder` but in one of `places`, under their name or, as some save
    all of theirs, as .jpg. Returns how many.

    Where `folder` is a link to a user's own, which stays as it is, a folder of links takes its place.
    Raises UserError.
    """
    wanted: dict[str, Path] = {}
    for name in missing(questions, folder):
        for place in places:
            for candidate in (place / name, (place / name).with_suffix(".jpg")):
                if candidate.is_file():
                    wanted.setdefault(name, Path(os.path.realpath(candidate)))
    if wanted:
        make_own(folder)
    for name, found in wanted.items():
        link(folder / name, found)
    return len(wanted)


def make_own(folder: Path) -> None:
    """Puts a folder of links in the place of a link to a user's own, which stays as is. Raises UserError."""
    if folder.is_symlink():
        theirs = Path(os.path.realpath(folder))
        folder.unlink()
        for entry in os.scandir(theirs):
            link(folder / entry.name, Path(entry.path))


def fault_of(names: Sequence[str], questions: Sequence[Question], folder: Path) -> Fault:
    """What is said where pictures are missing."""
    total = len({name for question in questions for name in question.images})
    return Fault(
        f"{len(names):,} of {total:,} pictures are not there: {some(names)}",
        str(folder),
        "Fetch them. With --partial training goes without their samples; an evaluation needs them all.",
    )
