"""Exact match on LLaVA question files that carry their answers.

Such as LoRASculpt's IconQA, whose text is the question and lines `A. cat` and whose answer is a letter. Its
script divides by the number of predictions, so that those it lacks raise the score; here the file's questions
are the denominator under every rule.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

from mmtune.core.files import read_jsonl
from mmtune.evaluation.metrics import iconqa
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, plain

METRIC = "exact_match"


def exact(question: Question, prediction: str) -> float:
    """Equality but for outer space, case and one trailing period."""
    return float(plain(prediction) == plain(question.answers[0]))


def lorasculpt(question: Question, prediction: str) -> float:
    """Equality but for case, as LoRASculpt's script has it: a trailing space or period is wrong."""
    return float(prediction.lower() == question.answers[0].lower())


def stripped(question: Question, prediction: str) -> float:
    """Equality but for case and outer space, of prediction and answer."""
    return float(prediction.strip().lower() == question.answers[0].strip().lower())


RULES: dict[str, Rule] = {"exact": exact, "lorasculpt": lorasculpt, "letter": iconqa.letter}


def read(path: Path) -> list[Question]:
    """The questions of a JSONL file: question_id, text, answer, and where there are any image and category.

    Where the text has lines `A. cat`, `B. dog` and the answer is one of their letters, these are the options.
    Raises UserError, naming file, line and id, for rows without their fields.
    """
    questions = []
    for line, row in read_jsonl(path):
        where = f"{path}, line {line}"
        identity = str(field(row, "question_id", (str, int), where))
        where = f"{where}, question_id {identity}"
        image = field(row, "image", str, where) if row.get("image") is not None else None
        text = field(row, "text", str, where)
        answer = str(field(row, "answer", (str, int, float), where))
        options = lettered_options(text)
        right = ascii_uppercase.find(answer.upper()) if len(answer) == 1 else -1
        has_options = 0 <= right < len(options)
        questions.append(
            Question(
                id=identity,
                text=text,
                answers=(answer,),
                image=image,
                cluster=image if image is not None else identity,
                category=field(row, "category", str, where) if "category" in row else "",
                choices=options if has_options else (),
                answer_index=right if has_options else None,
            )
        )
    return checked(questions, path)


def lettered_options(text: str) -> tuple[str, ...]:
    """The texts of the lines `A. cat`, `B. dog` and so on; of several such lists the last."""
    options: list[str] = []
    for line in text.split("\n"):
        if line.startswith("A. "):
            options = []
        if len(options) < len(ascii_uppercase) and line.startswith(f"{ascii_uppercase[len(options)]}. "):
            options.append(line[3:])
    return tuple(options) if len(options) > 1 else ()
