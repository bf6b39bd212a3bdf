"""LLaVA training files (JSON, JSONL or webdataset shards) -> Sample(id, images, turns).

A file's rows are `{"id", "image": path or list of paths, "conversations": [{"from", "value"}]}`;
text-only rows have no image, or null. Other keys are not read. In a shard the pictures stand beside their
row, in its order, whatever their paths in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import inside, parse_json, read_json, read_jsonl
from mmtune.data.chat import IMAGE, Turn
from mmtune.data.image import Picture
from mmtune.data.shards import Stored, is_shards, key_and_ending, row_and_pictures, stored_samples

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MOST_FAULTS = 20


@dataclass(frozen=True)
class Sample:
    """One conversation about any number of pictures; the i-th picture belongs to the i-th `<image>`.

    where: the file and the sample's place in it, for messages; ids need not be unique in LLaVA's own data.
    """

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """What a message calls it: its id and, where it was read from a file, its place there."""
        return self.where or f"sample {self.id}"


def read_llava(path: Path, image_root: Path, limit: int | None = None) -> list[Sample]:
    """The samples of a training file, or of the shards that `path` names, at most `limit`.

    image_root: what the paths of pictures are relative to; not looked at for shards. Raises UserError with
    the first faults found.
    """
    samples, faults = read_sound(path, image_root, limit)
    if faults:
        raise UserError.of(faults)
    return samples


def read_sound(path: Path, image_root: Path, limit: int | None = None) -> tuple[list[Sample], list[Fault]]:
    """The samples without faults and the first faults of the others. Raises UserError for a broken file."""
    faults: list[Fault] = []
    if is_shards(path):
        stored, faults = stored_samples(path, limit)
        reads = [partial(_stored_sample, files) for files in stored]
    else:
        find = partial(inside, image_root)
        reads = [partial(_sample, row, where, find) for where, row in read_rows(path)[:limit]]
    if not reads and not faults:
        raise UserError("there are no samples", where=path, mend="Was it written whole?")
    samples = []
    for read in reads:
        try:
            samples.append(read())
        except UserError as error:
            faults += error.faults
            if len(faults) >= MOST_FAULTS:
                faults.append(Fault("there may be more; these are the first", str(path)))
                break
    return samples, faults


def read_row(row: Any, where: str, image_root: Path) -> Sample:
    """The sample that one row of a training file makes. where: the row's place. Raises UserError."""
    return _sample(row, where, partial(inside, image_root))


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """The rows of a training file as they are written, each with its place. Raises UserError."""
    if str(path).endswith(".jsonl"):
        return [(f"{path}, line {line}", row) for line, row in read_jsonl(path)]
    whole = read_json(path)
    if not isinstance(whole, list):
        raise UserError(
            f"expected a list of samples, found {type(whole).__name__}",
            where=path,
            mend="Put the samples between [ and ], with commas between them.",
        )
    return [(f"{path}, sample {i}", row) for i, row in enumerate(whole)]


def repeated_ids(samples: Sequence[Sample]) -> list[str]:
    """Ids that several samples share. No fault: LLaVA's own mixture names samples after their pictures."""
    return [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]


def image_first(sample: Sample) -> Sample:
    """The same sample with each user turn's pictures moved to its front, as LLaVA-1.5 does with its data."""

    def moved(turn: Turn) -> Turn:
        count = turn.text.count(IMAGE)
        if turn.role != "user" or count == 0:
            return turn
        rest = turn.text.replace(IMAGE, "").strip()
        return Turn("user", "\n".join([IMAGE] * count + ([rest] if rest else [])))

    return replace(sample, turns=tuple(moved(turn) for turn in sample.turns))


def _stored_sample(files: list[Stored]) -> Sample:
    """The sample that a shard's files of one key make."""
    stored, pictures = row_and_pictures(files)
    where = f"{stored.shard}, {key_and_ending(stored)[0]}"
    try:
        row = parse_json(stored.read().decode(), stored)
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text (byte {error.start})"
        raise UserError(what, where=stored, mend="Save it as UTF-8.") from None
    named = row.get("image") if isinstance(row, dict) else 0
    named = [named] if isinstance(named, str) else named
    if named and isinstance(named, list) and len(named) != len(pictures):
        raise UserError(
            f"the row names {len(named)} pictures, {len(pictures)} lie beside it",
            where=where,
            mend="Was the shard written whole? Each picture of a row stands beside it, in the same order.",
        )
    if named is None or isinstance(named, list):
        row = {**row, "image": [picture.name for picture in pictures]}
    return _sample(row, where, {picture.name: picture for picture in pictures}.__getitem__)


def _sample(row: Any, where: str, find: Callable[[str], Picture]) -> Sample:
    if not isinstance(row, dict):
        raise UserError(
            f"expected an object, found {type(row).__name__}",
            where=where,
            mend="A sample is {'id': ..., 'image': ..., 'conversations': [...]}.",
        )
    name = row.get("id")
    if name is not None:
        where = f"{where} (id {name})"
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise UserError(f"'id' must be text or a whole number, found {_found(row, 'id')}", where=where)
    if row.get("images") and not row.get("image"):
        raise UserError(
            "'images' is not read", where=where, mend="Name it 'image': a path or a list of paths."
        )
    images = row.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise UserError(
            f"'image' must be a path or a list of paths, found {_found(row, 'image')}",
            where=where,
            mend="Leave it out, or null, where there is no picture.",
        )
    conversations = row.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise UserError(
            f"'conversations' must be a list with at least one turn, found {_found(row, 'conversations')}",
            where=where,
            mend=f"The sample has: {', '.join(row)}.",
        )
    turns = tuple(_turn(entry, i, where) for i, entry in enumerate(conversations))
    placeholders = sum(turn.text.count(IMAGE) for turn in turns)
    if placeholders != len(images):
        raise UserError(
            f"{placeholders} {IMAGE} in the conversation, but {len(images)} pictures",
            where=where,
            mend=f"Each picture needs its own {IMAGE} in a user's turn.",
        )
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise UserError(
            "no assistant's turn with text, so there is nothing to learn from",
            where=where,
            mend="Give it an answer, or take the sample out.",
        )
    try:
        paths = tuple(map(find, images))
    except UserError as error:
        raise UserError(error.faults[0].what, where=where, mend=error.faults[0].mend) from None
    return Sample(str(name), paths, turns, where)


def _found(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "nothing"
    written = json.dumps(row[key])
    return written if len(written) <= 40 else f"{written[:40]}..."


def _turn(entry: Any, index: int, where: str) -> Turn:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise UserError(
            f"turn {index + 1} must be an object with 'from' and a text 'value'",
            where=where,
            mend="Write {'from': 'human', 'value': 'What is it?'}, the answer from 'gpt'.",
        )
    speaker = entry.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(
            f"turn {index + 1}: unknown speaker {speaker!r}",
            where=where,
            mend=f"Known: {', '.join(ROLES)}.",
        )
    return Turn(role, entry["value"])  # type: ignore[arg-type]
