"""Training files that are published as such, in LLaVA's format: read row by row, and made ready to train on.

What LLaVA's own training code copes with in silence is done here knowingly, counted and named: a turn of the
assistant's before the first question is left out, and a picture that was saved under another ending than the
file has is linked. What cannot be trained on stays out, by its reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtune.core.errors import Fault, UserError
from mmtune.data.chat import check_roles
from mmtune.data.image import is_there
from mmtune.data.samples import read_row
from mmtune.prepare.originals import Released, link
from mmtune.prepare.pictures import make_own

TEXT = "text"  # stands for a folder in `of`, for rows without a picture
LATE_START = "the assistant's turn before the first question is left out"
NO_PICTURE = "their picture is missing"
ENDINGS = (".jpg", ".jpeg", ".png", ".gif")


@dataclass
class Ready:
    """Rows to train on; the ids of those that were mended and of those left out, by what was done or why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    mended: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    linked: int = 0


def count_faults(released: Released, rows: Sequence[tuple[str, Any]], file: Path) -> list[Fault]:
    """A fault where the file has another number of samples than the published one, in all or of a folder."""
    mend = "Fetch it anew. --partial takes it as it is."
    found = []
    if len(rows) != released.samples:
        found.append(Fault(f"{len(rows):,} samples, published are {released.samples:,}", str(file), mend))
    counted = count_folders(row for _, row in rows)
    for folder, official in released.of.items():
        if counted[folder] != official:
            what = "without a picture" if folder == TEXT else f"with a picture in {folder}"
            said = f"{counted[folder]:,} samples {what}, published are {official:,}"
            found.append(Fault(said, str(file), mend))
    return found


def count_folders(rows: Iterable[Any]) -> Counter[str]:
    """How many rows have their first picture in which folder, by the first part of its path."""
    counted: Counter[str] = Counter()
    for row in rows:
        image = row.get("image") if isinstance(row, dict) else None
        image = image[0] if isinstance(image, list) and image else image
        counted[image.split("/")[0] if isinstance(image, str) else TEXT] += 1
    return counted


def ready(rows: Sequence[tuple[str, Any]], images: Path, seed: int) -> Ready:
    """Rows, each with its place in the file, as they are trained on, in an order that the seed decides.

    images: what their pictures' paths are relative to. Raises UserError where a link cannot be made.
    """
    made = Ready()
    sound: list[tuple[int, dict[str, Any], list[Path]]] = []
    for number, (where, row) in enumerate(rows):
        name = str(row.get("id", number)) if isinstance(row, dict) else str(number)
        try:
            sample = read_row(row, where, images)
            late = next((i for i, turn in enumerate(sample.turns) if turn.role != "assistant"), 0)
            if late:
                row = {**row, "conversations": row["conversations"][late:]}
                sample = read_row(row, where, images)
            check_roles(sample.turns)
        except UserError as error:
            made.left_out.setdefault(error.faults[0].what, []).append(name)
            continue
        if late:
            made.mended.setdefault(LATE_START, []).append(name)
        sound.append((number, row, [Path(str(picture)) for picture in sample.images]))
    made.linked = _link_renamed(path for _, _, paths in sound for path in paths)
    placed = []
    for number, row, paths in sound:
        if all(is_there(path) for path in paths):
            placed.append((hashlib.sha256(f"{seed}/{row['id']}/{number}".encode()).digest(), row))
        else:
            made.left_out.setdefault(NO_PICTURE, []).append(str(row["id"]))
    made.rows = [row for _, row in sorted(placed, key=lambda pair: pair[0])]
    return made


def _link_renamed(paths: Iterable[Path]) -> int:
    """Links pictures that are there under another ending: LLaVA's file calls all of OCR-VQA's covers .jpg."""
    found = {}
    for path in dict.fromkeys(paths):
        others = [path.with_suffix(ending) for ending in ENDINGS]
        if not is_there(path) and any(other.is_file() for other in others):
            found[path] = next(other for other in others if other.is_file()).resolve()
    for folder in dict.fromkeys(path.parent for path in found):
        make_own(folder)
    for path, other in found.items():
        link(path, other)
    return len(found)
