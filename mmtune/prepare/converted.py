"""Files that others made of a set in LLaVA's formats: checked, and put where they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import write_text
from mmtune.data.cards import Card, load_card
from mmtune.data.chat import IMAGE
from mmtune.data.image import is_there
from mmtune.data.samples import read_llava
from mmtune.evaluation.metrics.base import Question, some
from mmtune.evaluation.metrics.exact import lettered_options
from mmtune.evaluation.protocol import Protocol, load_protocol
from mmtune.evaluation.question_files import asked_from
from mmtune.evaluation.score import read_questions
from mmtune.prepare.originals import Converted, find
from mmtune.prepare.training import asking, right_answers


def found_in(converted: Converted, source: Path, root: Path) -> Path | None:
    """Where a user has the file; one that was made here in its place is not it."""
    target = root / converted.path
    found = find(converted.path, converted.also_in, source, source)
    if found is None and target.is_file():
        found = target
    return None if found is None or found.resolve() == stand_in(target).resolve() else found


def stand_in(target: Path) -> Path:
    """The name of what is made in place of a file that is not at hand, which tells whose it is."""
    return target.with_name(f"{target.stem}.mmtune{target.suffix}")


def check(converted: Converted, file: Path, root: Path, partial: bool) -> str:
    """Compares a file with the official one; returns how it is used.

    Raises UserError where its questions, answers or pictures are not the official ones; counts may differ
    where the data is partial.
    """
    if converted.card:
        return _check_samples(converted, file, root)
    protocol = load_protocol(converted.task)
    if converted.against:
        questions = read_questions(protocol.for_split(converted.split), file)
        other = protocol.other_count(converted.split, len(questions))
        if other and not partial:
            raise UserError(other, where=file, mend="Fetch it anew. --partial takes it as it is.")
        official = load_protocol(converted.against)
        _compare(questions, official, official.questions(converted.split, root)[0], file)
        how = f"--tasks {converted.task}"
    else:
        questions = asked_from(file, protocol.questions(converted.split, root)[0])
        how = f"--tasks {converted.task} --question_file {converted.task}={root / converted.path}"
    for question in questions:
        if question.image and not (root / protocol.images / question.image).is_file():
            mend = "Is the folder of the pictures the one that it was made for?"
            raise UserError(f"there is no picture {question.image}", where=file, mend=mend)
    return f"mmtune eval --model DIR {how} --output_path DIR"


def _check_samples(converted: Converted, file: Path, root: Path) -> str:
    card = load_card(converted.card)
    official = asking(card)
    known, _ = official.questions("train", root)
    folder = root / card.images
    questions = []
    for number, sample in enumerate(read_llava(file, folder)):
        if lost := [path for path in sample.images if not is_there(path)]:
            mend = "Is the folder of the pictures the one that it was made for?"
            raise UserError(f"there is no picture {lost[0]}", where=sample.place, mend=mend)
        asked = [turn.text for turn in sample.turns if turn.role == "user"]
        said = [turn.text for turn in sample.turns if turn.role == "assistant"]
        if len(asked) != 1 or len(said) != 1 or len(sample.images) != 1:
            mend = "Is it this set's file? Else move it away."
            raise UserError("it is not one question with one picture", where=sample.place, mend=mend)
        text = asked[0].replace(IMAGE, "").strip()
        image = os.path.relpath(str(sample.images[0]), folder)
        identity, options = sample.id or str(number), lettered_options(text)
        questions.append(Question(identity, text, tuple(said), image, cluster=image, choices=options))
    _compare(questions, official, known, file)
    return f"data: [{{card: {converted.card}, split: {converted.split}}}]"


def _compare(
    questions: Sequence[Question], official: Protocol, known: Sequence[Question], file: Path
) -> None:
    """Raises UserError for questions that no official one is like: picture, first line, options, answer."""
    card = Card("", "", "", "", Path())
    right: dict[tuple[str, str], set[str]] = {}
    options = {(*_key(question), _options(official.turns(question)[0].text)) for question in known}
    for question in known:
        [answer] = right_answers(card, official, question)
        right.setdefault(_key(question), set()).add(answer.casefold())
    strangers = [q.id for q in questions if _key(q) not in right]
    if strangers:
        raise UserError(
            f"questions that are not in {known and official.task}'s annotations: {some(strangers)}",
            where=file,
            mend="Picture and first line are compared. Is it of this set and split? Else move it away.",
        )
    others = [q.id for q in questions if q.choices and (*_key(q), _options(q.text)) not in options]
    if others:
        mend = "Fetch the file anew, or move it away."
        raise UserError(f"options that are not the official ones: {some(others)}", where=file, mend=mend)
    wrong = [
        question.id
        for question in questions
        if question.answers[0].strip().casefold() not in right[_key(question)]
    ]
    if wrong:
        mend = "Fetch the file anew, or move it away."
        raise UserError(f"answers that are not the official ones: {some(wrong)}", where=file, mend=mend)


def _key(question: Question) -> tuple[str, str]:
    """The picture, whatever kind it was saved as, and the first line of the text."""
    first_line = question.text.strip().split("\n", 1)[0].strip().casefold()
    return os.path.splitext(question.image or "")[0], first_line


def _options(text: str) -> tuple[str, ...]:
    return tuple(option.strip().casefold() for option in lettered_options(text))


def question_rows(card: Card, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """A question file that holds answers, as LoRASculpt's does: what the card's samples ask and answer."""
    protocol = asking(card)
    rows = []
    for question in questions:
        [turn] = protocol.turns(question)
        [answer] = right_answers(card, protocol, question)
        text = turn.text.removeprefix(f"{IMAGE}\n")
        described = {"question_id": question.id, "image": question.image, "text": text}
        rows.append({**described, "answer": answer, "category": "default"})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSONL file, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
