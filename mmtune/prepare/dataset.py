"""`mmtune data prepare NAME`: a set as it was published becomes what cards and protocols read.

What is absent is told at once, with where to get it. What is there is linked into place or unpacked, counted
and compared with published hashes; then the training files are made. prepared.json says what was found and
made: a second call sees what has changed since and does only what is left to do.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mmtune
from mmtune.core.config import to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import alone_in, read_json, read_text, write_json, write_text
from mmtune.core.table import nearest
from mmtune.data.cards import Card, load_card
from mmtune.data.samples import read_rows
from mmtune.evaluation.metrics.base import Question, an_object, some
from mmtune.evaluation.protocol import Protocol, load_protocol
from mmtune.evaluation.score import no_collection, read_questions
from mmtune.prepare import converted, pictures
from mmtune.prepare.composed import compose_all
from mmtune.prepare.originals import (
    Original,
    Originals,
    Released,
    absent,
    link,
    load_originals,
    place,
    sha256,
)
from mmtune.prepare.released import NO_PICTURE, count_faults, count_folders, ready
from mmtune.prepare.training import VERSION, as_text, asking, samples

MANIFEST = "prepared.json"
TRAINING = ("train", "restval")  # splits that are trained on, never scored


@dataclass(frozen=True)
class Job:
    """What is prepared, out of which folder into which, and how: the arguments of `prepare`."""

    known: Originals
    source: Path
    root: Path
    cards: list[str]
    partial: bool
    seed: int


@dataclass(frozen=True)
class Asked:
    """The questions of a split as a protocol asks them: to be scored, or to be a card's samples."""

    protocol: Protocol
    split: str
    questions: list[Question]
    card: Card | None = None

    @property
    def is_composed(self) -> bool:
        """Whether each question's pictures become one."""
        return "composed" in self.protocol.options


def prepare(
    name: str,
    source: Path | None = None,
    root: Path | None = None,
    cards: Sequence[str] | None = None,
    partial: bool = False,
    seed: int = 0,
) -> None:
    """Prepares the set `name` in `root` from the originals in `source`, by default `root` itself.

    cards: those whose training files are made, by default all of the set's; what only training needs may be
    absent where there are none. partial: takes data that is not whole, or not the published bytes. seed: of
    the order of the samples. Raises UserError with all that is absent, or wrong.
    """
    known = load_originals(name)
    root = root or known.root
    source = source or root
    chosen = known.cards if cards is None else list(cards)
    for card in chosen:
        if card not in known.cards:
            raise UserError(f"{name} has no card '{card}'", where="--cards", mend=nearest(card, known.cards))
    wanted = [each for each in known.originals if each.needed_for != "training" or chosen]
    needed = [each for each in wanted if each.needed_for != "more" and not (partial and each.task)]
    faults = absent(needed, source, root, known.licence)
    if source != root and not source.is_dir():
        faults.insert(0, Fault("no such folder", str(source), "--source says where the originals lie."))
    if faults:
        raise UserError.of(faults)
    job = Job(known, source, root, chosen, partial, seed)
    with alone_in(root), no_collection():
        path = root / MANIFEST
        before: dict[str, Any] = {
            "originals": {},
            "questions": {},
            "made": {},
            "composed": {},
            "converted": {},
        }
        before |= an_object(read_json(path), path, "Move it away.") if path.is_file() else {}
        print(f"{name}: {known.about} Licence: {known.licence}. {known.page}")
        originals = _place_all(job, wanted, before["originals"])
        asked = _read_all(job)
        counted = _count(job, asked)
        drawn = {each.split: _compose(job, each) for each in asked if each.is_composed}
        made = {}
        for each in asked:
            if each.card is not None:
                file = each.card.splits[each.split]
                made[file] = _make(job, each, each.card, before["made"].get(file))
        for released in known.released:
            if released.card in chosen:
                file = load_card(released.card).splits[released.split]
                made[file] = _ready(job, released, before["made"].get(file))
        after = {
            "dataset": name,
            "licence": known.licence,
            "made_with": {"mmtune": mmtune.__version__, "version": VERSION},
            # What an earlier call with other cards found and made is still there.
            "originals": before["originals"] | originals,
            "questions": {
                **before["questions"],
                **{task: before["questions"].get(task, {}) | splits for task, splits in counted.items()},
            },
            "made": before["made"] | made,
            "composed": before["composed"] | drawn,
            "converted": before["converted"] | _convert_all(job),
        }
        if after != before:
            write_json(path, after)
        print(f"  {'as before' if after == before else 'written'}: {path}")


def _place_all(job: Job, wanted: Sequence[Original], before: dict[str, Any]) -> dict[str, Any]:
    """Brings the originals to where they are read. Returns what each is: bytes and hash, or a folder.

    Raises UserError for those that are not the published ones, or have changed since they were prepared.
    """
    found: dict[str, Any] = {}
    faults = []
    for original in wanted:
        if absent([original], job.source, job.root, ""):
            why = f"so {original.task} cannot be asked" if original.task else "and not needed"
            print(f"  not there, {why}: {', '.join(original.paths)} ({original.url})")
            continue
        for line in place(original, job.source, job.root, exact=not job.partial):
            print(f"  {line}", flush=True)
        for path in original.paths:
            target = job.root / path
            if not target.exists():  # another folder holds what is needed of it
                continue
            if target.is_dir():
                found[path] = {"folder": True}
                continue
            found[path] = {"bytes": target.stat().st_size, "sha256": sha256(target)}
            if path in before and before[path] != found[path]:
                mend = f"Fetch the former, or move {MANIFEST} away, and what it says was made."
                faults.append(Fault("it is not the file that was prepared before", str(target), mend))
    if faults:
        raise UserError.of(faults)
    return found


def _read_all(job: Job) -> list[Asked]:
    """The questions that are scored, by task and split, and those of each card's training files.

    Raises UserError with the faults of all files.
    """
    wanted: list[tuple[Protocol, str, Card | None]] = []
    without = {
        each.task
        for each in job.known.originals
        if not all((job.root / path).exists() for path in each.paths)
    }
    for task in job.known.tasks:
        protocol = load_protocol(task)
        if task in without or ("composed" in protocol.options and task not in job.cards):
            continue
        for split, file in protocol.annotations.items():
            if split not in TRAINING and (job.root / file).exists():
                wanted.append((protocol, split, None))
    for card in map(load_card, job.cards):
        if not card.task:  # its file is released as such
            continue
        protocol = asking(card)
        wanted += [(protocol, split, card) for split in card.splits if split in protocol.annotations]
    asked: list[Asked] = []
    faults: dict[Fault, None] = {}  # in their order, each once
    for protocol, split, made in wanted:
        try:
            questions, _ = protocol.questions(split, job.root)
        except UserError as error:
            faults.update(dict.fromkeys(error.faults))
            continue
        asked.append(Asked(protocol.for_split(split), split, questions, made))
    if faults:
        raise UserError.of(faults)
    return asked


def _count(job: Job, asked: Sequence[Asked]) -> dict[str, Any]:
    """How many questions each split of each task has, and how many of their pictures are missing.

    Raises UserError where the counts are not the official ones, or where a picture is missing that is scored
    or trained on; with partial data it says so.
    """
    counted: dict[str, Any] = {}
    lines: dict[str, None] = {}
    faults: dict[Fault, None] = {}  # in their order, each once
    for each in asked:
        protocol, split, questions = each.protocol, each.split, each.questions
        folder = job.root / protocol.images
        lost = [] if each.is_composed else _missing(job, questions, folder)
        official = protocol.expect.get(split)
        counted.setdefault(protocol.task, {})[split] = {
            "questions": len(questions),
            "official": official,
            "pictures_missing": len(lost),
            "partial": job.partial,
        }
        right = ", the official count" if official == len(questions) else ""
        if other := protocol.other_count(split, len(questions)):
            faults[Fault(other, str(job.root), "Fetch it anew. --partial takes it as it is.")] = None
            right = f"; officially {official:,}"
        reported = split == protocol.report_split and protocol.task not in job.known.counted
        if lost and (reported or each.card is not None):
            faults[pictures.fault_of(lost, questions, folder)] = None
        right += f"; {len(lost):,} pictures are missing" if lost else ""
        line = f"  {protocol.task}, {split}: {len(questions):,} questions{right}"
        lines[line] = None
    for line in lines:
        print(line)
    if faults and not job.partial:
        raise UserError.of(faults)
    if faults:
        print("  partial: taken as it is, not all of what was published")
    return counted


def _missing(job: Job, questions: Sequence[Question], folder: Path) -> list[str]:
    """The pictures that are neither under `folder` nor where they could be linked from."""
    places = [base / name for base in (job.root, job.source) for name in job.known.gathered_from]
    if linked := pictures.gather(questions, folder, places):
        print(f"  {folder}: links to {linked:,} pictures")
    return pictures.missing(questions, folder)


def _compose(job: Job, each: Asked) -> dict[str, Any]:
    """Draws the pictures in which a question's and its options' are one. Returns where and how many."""
    options = {key: value for key, value in each.protocol.options.items() if key != "composed"}
    annotations = job.root / each.protocol.annotations[each.split]
    apart = read_questions(replace(each.protocol, options=options), annotations)
    folder = job.root / each.protocol.images
    composed = each.protocol.options["composed"]
    print(f"  {folder / composed}: {len(each.questions):,} pictures", end="", flush=True)
    print(f", {compose_all(apart, each.questions, folder):,} of them drawn now")
    there = len(each.questions) - len(pictures.missing(each.questions, folder))
    return {"folder": composed, "pictures": there}


def _make(job: Job, each: Asked, card: Card, before: dict[str, Any] | None) -> dict[str, Any]:
    """Makes a card's training file where it is not made already. Returns what the manifest says of it.

    Raises UserError for a file in its place that is not one made here, or was changed since.
    """
    path = job.root / card.splits[each.split]
    lost = set(pictures.missing(each.questions, job.root / each.protocol.images))
    there = [question for question in each.questions if not lost.intersection(question.images)]
    origin = _origin(job, each, card, sorted(lost))

    def make() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        left_out = {
            "without_picture": len(each.questions) - len(there),
            "without_answer": sum(not any(answer.strip() for answer in q.answers) for q in there),
        }
        described = {"card": card.name, "split": each.split, "left_out": left_out}
        return samples(card, each.protocol, there, job.seed), described

    made = _written(job, path, origin, before, make)
    said = f"{made['samples']:,} samples, card {card.name}, split {each.split}"
    for why, count in made["left_out"].items():
        said += f"; {count:,} questions {why.replace('_', ' ')} left out" if count else ""
    print(f"  {path}: {said}")
    return made


def _written(
    job: Job,
    path: Path,
    origin: str,
    before: dict[str, Any] | None,
    make: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]],
) -> dict[str, Any]:
    """What the manifest says of a training file, which is made where it is not made already of the same.

    make: its rows, and what is to be said of them. Raises UserError for a file in its place that is not one
    made here, or was changed since.
    """
    as_made = before is not None and path.exists() and sha256(path) == before["sha256"]
    if before is not None and as_made and before["origin"] == origin:
        return {**before, "partial": job.partial}
    rows, described = make()
    text = as_text(rows)
    if path.exists() and not as_made and read_text(path) != text:
        what = "it was not made here" if before is None else "it has been changed since it was made"
        mend = "Move it away: it is made anew, and would be overwritten."
        raise UserError(what, where=path, mend=mend)
    write_text(path, text)
    how = {"seed": job.seed, "partial": job.partial}
    return {"samples": len(rows), **described, **how, "sha256": sha256(path), "origin": origin}


def _ready(job: Job, released: Released, before: dict[str, Any] | None) -> dict[str, Any]:
    """Makes a card's training file of a released one. Returns what the manifest says of it.

    Raises UserError where its counts are not the published ones or its pictures are not all there, unless the
    data is partial, and as `_written` does.
    """
    card, file = load_card(released.card), job.root / released.path
    rows = read_rows(file)
    found = ready(rows, job.root / card.images, job.seed)
    if found.linked:
        print(
            f"  {job.root / card.images}: links to {found.linked:,} pictures that are there by another ending"
        )
    faults = count_faults(released, rows, file)
    if lost := found.left_out.get(NO_PICTURE):
        mend = "Fetch them. With --partial training goes without them."
        faults.append(Fault(f"{len(lost):,} samples lack their picture: {some(lost)}", str(file), mend))
    if faults and not job.partial:
        raise UserError.of(faults)
    for fault in faults:
        print(f"  partial, taken as it is: {fault.what}")
    decides = [to_dict(card), sha256(file), found.left_out, job.seed, VERSION]
    origin = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]
    described = {
        "card": card.name,
        "split": released.split,
        "of": dict(sorted(count_folders(found.rows).items())),
        "ids_of_several": sum(count > 1 for count in Counter(str(row["id"]) for row in found.rows).values()),
        "mended": found.mended,
        "left_out": found.left_out,
    }
    made = _written(
        job, job.root / card.splits[released.split], origin, before, lambda: (found.rows, described)
    )
    print(
        f"  {job.root / card.splits[released.split]}: {made['samples']:,} of {len(rows):,} samples, "
        f"card {card.name}, split {released.split}"
    )
    if made["ids_of_several"]:
        print(f"    {made['ids_of_several']:,} ids stand for several samples, which all stay")
    for why, ids in {**made["mended"], **made["left_out"]}.items():
        print(
            f"    {len(ids):,} samples{' left out' if why in made['left_out'] else ''}: {why} ({some(ids)})"
        )
    return made


def _origin(job: Job, each: Asked, card: Card, lost: Sequence[str]) -> str:
    """A hash of all that a training file is made of."""
    decides = {
        "card": to_dict(card),
        "protocol": each.protocol.hash,
        "files": [sha256(file) for file in each.protocol.files(each.split, job.root)],
        "lost": list(lost),
        "seed": job.seed,
        "version": VERSION,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _convert_all(job: Job) -> dict[str, Any]:
    """Checks and links the files that others made of the set, and makes those that stand in for one.

    Raises UserError with the faults of all of them.
    """
    used: dict[str, Any] = {}
    faults: list[Fault] = []
    for each in job.known.converted:
        target = job.root / each.path
        found = converted.found_in(each, job.source, job.root)
        if found is not None:
            try:
                use = converted.check(each, found, job.root, job.partial)
            except UserError as error:
                faults += error.faults
                continue
            if found != target:
                link(target, found)
            used[each.path] = {"whose": each.whose, "sha256": sha256(found)}
            print(f"  {target}, {each.whose}: {use}")
        elif each.made_by in job.cards:
            card, own = load_card(each.made_by), converted.stand_in(target)
            questions, _ = asking(card).questions(each.split, job.root)
            converted.write_rows(own, converted.question_rows(card, questions))
            link(target, own)
            used[each.path] = {"whose": "made here", "sha256": sha256(own)}
            print(f"  {target}: made here in place of {each.whose}, as {own.name}; --tasks {each.task}")
    if faults:
        raise UserError.of(faults)
    return used
