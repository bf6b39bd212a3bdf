"""Accuracy on OCR-VQA: questions about book covers, several to a cover, each with one answer.

* `lorasculpt`: LoRASculpt's eval_ocrvqa.py. Equality but for case: a space or full stop at the end is wrong.
* `llava-hr`: LLaVA-HR's OCRVQAAccuracyEvaluator. Outer space is forgiven too. `vlmevalkit` is another
  name for it: VLMEvalKit's OCRVQA_TEST does the same.
* `exact`: ours, which also forgives one trailing full stop.

Published numbers are of the whole test split (VLMEvalKit) or of 2,000 questions that LLaVA-HR drew (LLaVA-HR,
LoRASculpt); those it drew are in its own file and cannot be drawn again. `sample` draws others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl
from mmtune.evaluation.metrics.base import Question, Rule, an_object, checked, field, texts
from mmtune.evaluation.metrics.exact import exact, lorasculpt, stripped

METRIC = "accuracy"
RULES: dict[str, Rule] = {
    "lorasculpt": lorasculpt,
    "llava-hr": stripped,
    "vlmevalkit": stripped,
    "exact": exact,
}
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
SPLITS = {"train": 1, "val": 2, "test": 3}


def read(
    path: Path,
    split: str = "test",
    extension: str | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of the official dataset.json, or of a converted file, one row for each question.

    Official: {book: {imageURL, questions, answers, genre, split}}. A question's id is BOOK_INDEX, its picture
    BOOK and the extension of its URL (or `extension`, where the pictures were saved as another kind), its
    category the genre. Converted (LLaVA-HR; JSONL or a JSON list): question_id, image, text, answer; the file
    is the split. Where its ids repeat, as books' do, questions get ids ID_INDEX, and predictions that carry
    the book's are matched by book and question. LLaVA's request for a short answer at the end of a text is
    left out: it is the protocol's to make.
    sample: no more than so many questions, which `seed` and their ids alone decide on.
    Raises UserError, naming file and book or line.
    """
    if sample is not None and (not isinstance(sample, int) or isinstance(sample, bool) or sample < 1):
        raise UserError(f"sample: {sample!r} is no number of questions", mend="Write a whole number above 0.")
    if split not in SPLITS:
        raise UserError(f"OCR-VQA has no split '{split}'", mend=f"Known: {', '.join(SPLITS)}.")
    content = None if path.suffix == ".jsonl" else read_json(path)
    if isinstance(content, dict):
        questions = list(_official(content, path, SPLITS[split], extension))
    else:
        questions = _converted(path, content)
    checked(questions, path)
    if sample is None or sample >= len(questions):
        return questions
    drawn = {question.id for question in sorted(questions, key=lambda each: _lot(seed, each.id))[:sample]}
    return [question for question in questions if question.id in drawn]


def _lot(seed: int, identity: str) -> bytes:
    """A number drawn for a question: the order of the file and the other questions don't change it."""
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _official(books: dict[str, Any], path: Path, split: int, extension: str | None) -> Iterator[Question]:
    for name, found in books.items():
        where = f"{path}, book {name}"
        book = an_object(found, where)
        if field(book, "split", int, where) != split:
            continue
        asked, answers = (texts(book, key, where) for key in ("questions", "answers"))
        if len(asked) != len(answers):
            raise UserError(f"{len(asked)} questions and {len(answers)} answers", where=where)
        url = field(book, "imageURL", str, where)
        kind = PurePosixPath(urlparse(url).path).suffix if extension is None else extension
        genre = book.get("genre")
        for index, (text, answer) in enumerate(zip(asked, answers, strict=True)):
            yield Question(
                id=f"{name}_{index}",
                text=text,
                answers=(answer,),
                image=f"{name}{kind}",
                cluster=name,
                category=genre if isinstance(genre, str) else "",
            )


def _converted(path: Path, content: Any) -> list[Question]:
    if content is None:
        rows = [(f"{path}, line {line}", row) for line, row in read_jsonl(path)]
    elif isinstance(content, list):
        places = [f"{path}, [{number}]" for number in range(len(content))]
        rows = [(where, an_object(row, where)) for where, row in zip(places, content, strict=True)]
    else:
        raise UserError(
            f"expected an object or a list, found {type(content).__name__}",
            where=path,
            mend="Give OCR-VQA's dataset.json, or questions with question_id, image, text and answer.",
        )
    ids = [str(field(row, "question_id", (str, int), where)) for where, row in rows]
    repeated = len(set(ids)) < len(ids)
    so_far: Counter[str] = Counter()
    questions = []
    for (where, row), identity in zip(rows, ids, strict=True):
        image = field(row, "image", str, where)
        questions.append(
            Question(
                id=f"{identity}_{so_far[identity]}" if repeated else identity,
                text=field(row, "text", str, where).removesuffix(SHORT_ANSWER),
                answers=(str(field(row, "answer", (str, int, float), where)),),
                image=image,
                cluster=identity if repeated else image,
            )
        )
        so_far[identity] += 1
    return questions
