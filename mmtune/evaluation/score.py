"""Scores of files: predictions are matched to the questions of an annotation file, which is the denominator.

A question without a prediction is wrong; a prediction without a question, or a second one for the same
question, is refused. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from typing import Protocol as Structure

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl, read_text
from mmtune.core.table import nearest
from mmtune.evaluation.metrics import FORMATS
from mmtune.evaluation.metrics.base import OverAll, Question, Rule, TaskScore, clustered_stderr, some
from mmtune.evaluation.metrics.repair import Reader


class Protocol(Structure):
    """What scoring needs to know of a benchmark's protocol."""

    @property
    def task(self) -> str: ...

    @property
    def format(self) -> str:
        """The annotation format, a name of `FORMATS`."""

    @property
    def rule(self) -> str:
        """The rule that is used where none is asked for."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Further arguments of the format's `read`, such as IconQA's task and split."""


def score_file(
    protocol: Protocol, predictions: Path, annotations: Path, rule: str | None = None
) -> TaskScore:
    """The score of a file of predictions against an official annotation file.

    `rule` replaces the protocol's own. Raises UserError, naming file, line and id, for files that are
    broken or do not belong together.
    """
    find_rule(protocol, rule)
    with no_collection():
        questions = read_questions(protocol, annotations)
        try:
            found = read_predictions(predictions, questions)
        except UserError as error:
            raise _of_a_sample(error, protocol) from None
    return score_predictions(questions, found, protocol, rule)


def _of_a_sample(error: UserError, protocol: Protocol) -> UserError:
    """The same error; where the protocol draws some of the file's questions, it says so."""
    drawn = protocol.options.get("sample")
    fault = error.faults[0]
    if drawn is None or "not in the annotation file" not in fault.what:
        return error
    what = fault.what.replace("in the annotation file", f"among the {drawn} that task {protocol.task} draws")
    mend = f"{fault.mend} A task without 'sample' asks all questions of the file (OCR-VQA: ocrvqa_full)."
    return UserError(what, where=fault.where, mend=mend)


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for garbage: a million new objects without a cycle would be searched again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_questions(protocol: Protocol, annotations: Path) -> list[Question]:
    """The questions of an annotation file in the protocol's format. Raises UserError."""
    read = FORMATS.load(protocol.format).read
    known = [name for name in inspect.signature(read).parameters if name != "path"]
    for name in protocol.options:
        if name not in known:
            raise UserError(
                f"annotation format '{protocol.format}' has no option '{name}'",
                where=f"task {protocol.task}",
                mend=nearest(name, known) if known else "It has no options.",
            )
    questions: list[Question] = read(Path(annotations), **protocol.options)
    return questions


def find_rule(protocol: Protocol, rule: str | None = None) -> tuple[str, Rule | OverAll]:
    """The rule asked for, or the protocol's own, and its name. Raises UserError that lists the known ones."""
    rules: dict[str, Rule | OverAll] = FORMATS.load(protocol.format).RULES
    name = protocol.rule if rule is None else rule
    if name not in rules:
        raise UserError(
            f"unknown rule '{name}' for task '{protocol.task}'", mend=f"Known: {', '.join(sorted(rules))}."
        )
    return name, rules[name]


def score_predictions(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    protocol: Protocol,
    rule: str | None = None,
    among: Sequence[Question] | None = None,
) -> TaskScore:
    """The score of `predictions` (question id -> text) over all `questions`.

    among: all questions of the file, where only some are asked: a word of a caption is as rare as it is in
    the references of all. Missing predictions count as wrong. Raises UserError for an id that is no
    question's, and where there are no questions.
    """
    name, found = find_rule(protocol, rule)
    if not questions:
        raise UserError(
            "no questions to score", where=f"task {protocol.task}", mend="Is this the right annotation file?"
        )
    unknown = predictions.keys() - {question.id for question in questions}
    if unknown:
        raise UserError(
            f"predictions for ids that are not in the annotation file: {some(sorted(unknown))}",
            mend="Score against the file that the predictions were made for.",
        )
    score = found.prepare(among or questions, predictions) if isinstance(found, OverAll) else found
    per_question: list[dict[str, Any]] = [
        {
            "question_id": question.id,
            "prediction": predictions.get(question.id),
            "score": score(question, predictions[question.id]) if question.id in predictions else 0.0,
            "cluster": question.cluster,
        }
        for question in questions
    ]
    scorer = FORMATS.load(protocol.format)
    unit = getattr(scorer, "UNIT", "%")
    lenient = _add_lenient(per_question, questions, score) if unit == "%" else None
    scores = [row["score"] for row in per_question]
    stderr = clustered_stderr(scores, [question.cluster for question in questions])
    missing = [question.id for question in questions if question.id not in predictions]
    warnings = []
    if missing:
        share = f"{len(missing)} of {len(questions)}"
        warnings.append(f"{share} questions have no prediction and count as wrong: {some(missing)}")
    if hasattr(scorer, "warn"):
        warnings += scorer.warn(among or questions, predictions)
    return TaskScore(
        task=protocol.task,
        rule=name,
        metric=scorer.METRIC,
        score=_points(scores),
        stderr=None if stderr is None else 100 * stderr,
        n=len(questions),
        missing=len(missing),
        per_question=per_question,
        by_category=_by_category(questions, scores),
        unit=unit,
        lenient=lenient,
        also=scorer.also(questions, predictions, name, scores) if hasattr(scorer, "also") else {},
        warnings=tuple(warnings),
    )


def _add_lenient(rows: Sequence[dict[str, Any]], questions: Sequence[Question], rule: Rule) -> float:
    """Adds `lenient` to each row, the score after format repair, and returns its mean in points."""
    reader = Reader(questions)
    for row, question in zip(rows, questions, strict=True):
        row["lenient"] = reader.score(question, row["prediction"] or "", rule, row["score"])
    return _points([row["lenient"] for row in rows])


def _points(scores: Sequence[float]) -> float:
    return 100 * math.fsum(scores) / len(scores)


def _by_category(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, dict[str, float]]:
    members: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        several = (question.category,) if isinstance(question.category, str) else question.category
        for category in several:
            if category:
                members.setdefault(category, []).append(score)
    return {
        category: {"score": _points(members[category]), "n": len(members[category])}
        for category in sorted(members)
    }


class Row(NamedTuple):
    """A line of a file of predictions or of prompts, and where it stands."""

    where: str
    id: str
    text: str | None
    prompt: str | None
    image: str | None = None


def read_predictions(path: Path, questions: Sequence[Question]) -> dict[str, str]:
    """Question id -> predicted text, from JSONL or a JSON list of answers, or a JSON map of id to text.

    An answer has a `question_id` (GQA: `questionId`; captions: `image_id`), a text under `text` (LLaVA and
    mmtune), `answer` (VQA, EvalAI), `prediction` (GQA) or `caption`, and maybe its `prompt`. lmms-eval's
    samples have the id in their `doc` or `submission`, the text in `filtered_resps`. Where no id is a
    question's, as in LLaVA's answers to TextVQA, which carry the image's id, answers are matched by image and
    question: the first line of the prompt, but for case.
    A text of null is no prediction (`mmtune score --per_sample` writes it for a missing one).
    Raises UserError, naming lines and ids, for answers that belong to no question and for second ones.
    """
    found = matched_rows(path, _read_rows(Path(path)), questions, "answer")
    return {identity: row.text for identity, row in found.items() if row.text is not None}


def matched_rows(path: Path, rows: Sequence[Row], questions: Sequence[Question], what: str) -> dict[str, Row]:
    """Question id -> its row, by id, or else by image and the first line of the prompt.

    Raises UserError, naming lines and ids, for a row (`what`: an answer, a prompt) that belongs to no
    question or to several, and for a second one.
    """
    known = {question.id for question in questions}
    if any(row.id in known for row in rows):
        return _matched(path, [(row, row.id if row.id in known else None) for row in rows], what)
    without_prompt = [row for row in rows if row.prompt is None]
    if without_prompt:
        raise UserError(
            f"none of its ids is a question's, such as {some(row.id for row in rows[:3])}; "
            f"the annotation file has {some([question.id for question in questions[:3]])}",
            where=path,
            mend="Answers that carry an image's id need their 'prompt', to tell which question they answer; "
            f"{len(without_prompt)} of {len(rows)} have none.",
        )
    by_prompt: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        by_prompt.setdefault((question.cluster, _first_line(question.text)), []).append(question.id)
    matches: list[tuple[Row, str | None]] = []
    for row in rows:
        pictures = (row.id, *((row.image, Path(row.image).stem) if row.image else ()))
        keys = [(picture, _first_line(row.prompt or "")) for picture in pictures]
        found = next((by_prompt[key] for key in keys if key in by_prompt), [])
        if len(found) > 1:
            raise UserError(
                f"its {what} fits several questions: {some(found)} ask the same of image {row.id}",
                where=row.where,
                mend="Write the question's own id into question_id.",
            )
        matches.append((row, found[0] if found else None))
    return _matched(path, matches, what)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].rstrip().lower()


def _matched(path: Path, matches: Sequence[tuple[Row, str | None]], what: str) -> dict[str, Row]:
    unknown = [row for row, identity in matches if identity is None]
    if unknown:
        raise UserError(
            f"{what}s to questions that are not in the annotation file: {some(row.id for row in unknown)}",
            where=unknown[0].where,
            mend="Take the annotation file that they were made for.",
        )
    count = Counter(identity for _, identity in matches)
    again = [row for row, identity in matches if count[identity] > 1]
    if again:
        repeated = [identity for identity in count if count[identity] > 1]
        raise UserError(
            f"more than one {what} to a question: {some(repeated)}",
            where=f"{path} ({', '.join(row.where.removeprefix(f'{path}, ') for row in again[:4])})",
            mend=f"Leave one {what} to each question in the file.",
        )
    return {identity: row for row, identity in matches if identity is not None}


def _read_rows(path: Path) -> list[Row]:
    text = read_text(path)
    pairs = _pairs(text)
    if pairs and not {"question_id", "questionId", "image_id", "image", "doc_id"} & {key for key, _ in pairs}:
        named = [(f"{path}, '{key}'", key, value) for key, value in pairs]
        rows = [Row(where, key, _text(value, where), None) for where, key, value in named]
    elif text.lstrip().startswith("["):
        rows = [_row(row, f"{path}, [{number}]") for number, row in enumerate(read_json(path))]
    else:
        rows = [_row(row, f"{path}, line {line}") for line, row in read_jsonl(path)]
    if not rows:
        raise UserError("no predictions in this file", where=path, mend="Was it written whole?")
    return rows


def _pairs(text: str) -> list[tuple[str, Any]]:
    """The pairs of a text that is one JSON object, else none.

    A dict would drop the first of two answers to one question in silence.
    """
    if not text.lstrip().startswith("{"):
        return []
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
        return pairs
    except (ValueError, RecursionError):  # whoever reads the lines says what is wrong
        return []


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"expected an object, found {type(row).__name__}",
            where=where,
            mend="An answer is {'question_id': ..., 'text': ...}.",
        )
    identity = _identity(row)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        what = "it has no 'question_id'"
        if identity is not None:
            what = f"its id should be a whole number or a text, found {json.dumps(identity)[:40]}"
        raise UserError(what, where=where, mend=f"Found: {', '.join(row) or 'nothing'}.")
    where = f"{where}, question_id {identity}"
    names = [name for name in ("text", "answer", "prediction", "caption") if name in row]
    if not names and "filtered_resps" in row:
        names = ["filtered_resps"]
    # Not the first of several: an answer file that also holds the right answers would score itself.
    if len(names) != 1:
        found = " and ".join(names) or "none"
        raise UserError(
            f"expected one of 'text', 'answer', 'prediction' and 'caption', found {found}",
            where=where,
            mend="LLaVA's answer files name the predicted text 'text'.",
        )
    prompt = row["prompt"] if isinstance(row.get("prompt"), str) else None
    image = row["image"] if isinstance(row.get("image"), str) else None
    said = row[names[0]]
    while names == ["filtered_resps"] and isinstance(said, list) and len(said) == 1:
        said = said[0]
    return Row(where, str(identity), _text(said, where), prompt, image)


def _identity(row: dict[str, Any]) -> Any:
    """What names the question: the row's own id, or that of lmms-eval's `doc` or `submission` in it."""
    inner = [row[name] for name in ("doc", "submission") if isinstance(row.get(name), dict)]
    for holder in (row, *inner):
        for key in ("question_id", "questionId", "image_id", "image"):
            if key in holder:
                return holder[key]
    return None


def _text(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(
        f"the prediction should be a text, found {json.dumps(value)[:40]}",
        where=where,
        mend="An option is given as its letter, its index or its text.",
    )
