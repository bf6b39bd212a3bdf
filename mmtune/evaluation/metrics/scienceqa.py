"""Accuracy on ScienceQA: school questions with options, half of them with a picture or a hint.

* `llava`: LLaVA's eval_science_qa.py, which takes a bare letter (A to E, a capital, no space), `A. ` at the
  start, or `The answer is A` where that stands there once, with one character after it. All else is wrong.
* `lmms-eval`: lmms-eval's scienceqa task, after outer space is stripped: the bare letter but for case, or a
  capital and a full stop at the start.
* `letter`: ours, as on IconQA: `a` and `(A)` too, and an option's whole text.
* `official`: the option's index, as the official evaluate_acc.py reads it.

The breakdown is the official one: by subject, by context (text, image, neither; a question with both counts
in both) and by grade.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import Question, Rule, an_object, checked, field, read_object, texts
from mmtune.evaluation.metrics.iconqa import letter, official

METRIC = "accuracy"
MEND = "Is it ScienceQA's own file?"

_LETTERS = tuple("ABCDE")
# The full stop is not escaped in LLaVA's pattern: any character but a line break will do, none will not.
_STATED = re.compile(r"The answer is ([A-Z]).")


def llava(question: Question, prediction: str) -> float:
    """LLaVA's rule: the letter it finds is the right option's."""
    return float(_found(prediction) == _right(question))


def _found(prediction: str) -> str | None:
    if prediction in _LETTERS:
        return prediction
    if prediction[:1] in _LETTERS and prediction[1:3] == ". ":
        return prediction[0]
    stated: list[str] = _STATED.findall(prediction)
    return stated[0] if len(stated) == 1 else None


def lmms_eval(question: Question, prediction: str) -> float:
    """lmms-eval's rule: the letter alone, or a capital letter with a full stop after it at the start."""
    right, text = _right(question), prediction.strip()
    return float(text.lower() == right.lower() or text.startswith(f"{right}."))


def _right(question: Question) -> str:
    assert question.answer_index is not None
    return ascii_uppercase[question.answer_index]


RULES: dict[str, Rule] = {"llava": llava, "lmms-eval": lmms_eval, "letter": letter, "official": official}


def read(path: Path, split: str = "test", images_only: bool = False) -> list[Question]:
    """The questions of the official problems.json that pid_splits.json beside it counts to `split`.

    Pictures: SPLIT/PID/image.png; a question without one is asked without. `context` is the hint.
    images_only: only questions with a picture (SQA-IMG). Raises UserError, naming file and problem.
    """
    problems = read_object(path, MEND)
    splits_path = path.with_name("pid_splits.json")
    splits = read_object(splits_path, MEND)
    if split not in splits:
        raise UserError(f"no split '{split}'", where=splits_path, mend=f"Known: {', '.join(sorted(splits))}.")
    questions = []
    for pid in map(str, field(splits, split, list, str(splits_path))):
        if pid not in problems:
            raise UserError(
                f"problem {pid} of split '{split}' is not in it", where=path, mend="Fetch the file anew."
            )
        where = f"{path}, problem {pid}"
        question = _question(an_object(problems[pid], where), pid, where)
        if question.image is not None or not images_only:
            questions.append(question)
    return checked(questions, path)


def files(path: Path, **_: object) -> list[Path]:
    """What is read beside problems.json."""
    splits = path.with_name("pid_splits.json")
    return [splits] if splits.is_file() else []


def _question(problem: dict[str, Any], pid: str, where: str) -> Question:
    choices = texts(problem, "choices", where)
    index = field(problem, "answer", int, where)
    if not 0 <= index < len(choices):
        raise UserError(
            f"'answer' is {index}, there are {len(choices)} choices", where=where, mend="Correct it."
        )
    hint = field(problem, "hint", str, where)
    image = field(problem, "image", str, where) if problem.get("image") else None
    return Question(
        id=pid,
        text=field(problem, "question", str, where),
        answers=(choices[index],),
        # A mini split is a part of the split whose pictures it shares; the problem names that one.
        image=None if image is None else f"{field(problem, 'split', str, where)}/{pid}/{image}",
        cluster=pid,
        choices=choices,
        category=_categories(problem, bool(hint), image is not None, where),
        answer_index=index,
        context=hint,
    )


def _categories(problem: dict[str, Any], has_hint: bool, has_image: bool, where: str) -> tuple[str, ...]:
    grade = field(problem, "grade", str, where)
    number = grade.removeprefix("grade")
    if not number.isascii() or not number.isdigit():
        raise UserError(f"'{grade}' is no grade", where=where, mend=MEND)
    context = [name for name, has in (("text context", has_hint), ("image context", has_image)) if has]
    return (
        field(problem, "subject", str, where),
        *(context or ["no context"]),
        "grades 1-6" if int(number) <= 6 else "grades 7-12",
    )
