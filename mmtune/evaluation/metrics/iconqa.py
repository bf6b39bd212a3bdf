"""Accuracy on IconQA: questions with options (texts or pictures) and questions with a blank to fill.

The official scorer compares `str(answer) == str(label)`, where the label of a question with options is an
index, which only a classifier answers. For models that write, `choice` and `letter` read an option out of
what was written, and `normalised` forgives a filled blank its form. Predictions never pass through a VQA
normaliser, which takes the letter A for an article and deletes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import Question, Rule, an_object, checked, field, plain, read_object

METRIC = "accuracy"
TASKS = ("choose_txt", "choose_img", "fill_in_blank")
MEND = "Is it IconQA's own file?"

# "A", "A.", "(A)", "A) cat", "A: cat", but not "A cat": there the A may well be an article.
_LETTERED = re.compile(r"\(?([A-Za-z])(?:[.):]+\s*(?P<text>.*))?", re.DOTALL)
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def official(question: Question, prediction: str) -> float:
    """The official rule: the option's index, or the blank's text, to the letter."""
    label = question.answers[0] if question.answer_index is None else question.answer_index
    return float(prediction == str(label))


def option_by_text(choices: tuple[str, ...], prediction: str) -> int | None:
    """The option whose whole text the prediction is, but for outer space, case and one trailing period.

    Where several are (`Yes` and `yes`), the one written in the same way; where that is not one either, none.
    """
    wanted = plain(prediction)
    same = [index for index, text in enumerate(choices) if wanted and plain(text) == wanted]
    if len(same) > 1:
        same = [index for index in same if choices[index].strip() == prediction.strip()]
    return same[0] if len(same) == 1 else None


def option_by_letter(choices: tuple[str, ...], prediction: str) -> int | None:
    """The option whose letter the prediction is: `A`, `a`, `A.`, `(A)`, or `A. cat` where option A is cat."""
    lettered = _LETTERED.fullmatch(prediction.strip())
    if lettered is None:
        return None
    index = ascii_uppercase.index(lettered[1].upper())
    if index >= len(choices):
        return None
    text = plain(lettered["text"] or "")
    return index if text in ("", plain(choices[index])) else None


def choice(question: Question, prediction: str) -> float:
    """An option's text, or else its letter; what fits no option, or more than one, is wrong.

    Text comes first, so where the options are letters themselves (A: C, B: A) the prediction `A` is the
    option that reads A. A prompt that asks for the option's letter means the other one: use `letter` there.
    Options that are the same text cannot be told apart by it, only by their letter.
    """
    choices = _choices(question, "choice")
    chosen = option_by_text(choices, prediction)
    if chosen is None:
        chosen = option_by_letter(choices, prediction)
    return float(chosen == question.answer_index)


def letter(question: Question, prediction: str) -> float:
    """As `choice`, with letters first: for prompts that ask for the option's letter."""
    choices = _choices(question, "letter")
    chosen = option_by_letter(choices, prediction)
    if chosen is None:
        chosen = option_by_text(choices, prediction)
    return float(chosen == question.answer_index)


def lorasculpt(question: Question, prediction: str) -> float:
    """LoRASculpt's rule: the letter but for case. `A.`, `A ` and `(A)` are wrong."""
    _choices(question, "lorasculpt")
    assert question.answer_index is not None
    return float(prediction.lower() == ascii_uppercase[question.answer_index].lower())


def normalised(question: Question, prediction: str) -> float:
    """A filled blank, but for outer space, case, commas between thousands and one trailing period."""
    answer = _blank(question, "normalised")
    return float(_number(prediction) == _number(answer))


def strict(question: Question, prediction: str) -> float:
    """A filled blank to the letter, as the official rule has it."""
    return float(prediction == _blank(question, "strict"))


RULES: dict[str, Rule] = {
    "official": official,
    "choice": choice,
    "letter": letter,
    "lorasculpt": lorasculpt,
    "normalised": normalised,
    "strict": strict,
}


def read(
    path: Path, task: str = "choose_txt", split: str = "test", composed: str | None = None
) -> list[Question]:
    """The questions of one IconQA task.

    `path` is the official problems.json, with pid_splits.json beside it to say which problems are in
    `split` (mini splits too) and pid2skills.json, if it is there, to say each one's skills; or a folder of
    problem folders {pid}/data.json, all taken. Pictures: iconqa/{split}/{task}/{pid}/image.png, or
    {pid}/image.png. For choose_img `choices` are the names of the options' pictures, which lie beside it,
    and `choice_images` their paths.
    Raises UserError, naming file and problem.
    """
    if task not in TASKS:
        raise UserError(f"unknown IconQA task '{task}'", mend=f"Known: {', '.join(TASKS)}.")
    if composed is not None and task != "choose_img":
        raise UserError(f"composed: only choose_img has options that are pictures, not {task}")
    path = Path(path)
    if path.is_dir() and (path / "problems.json").is_file():
        path = path / "problems.json"
    if path.is_dir():
        return checked(_composed(_read_folders(path, task), composed), path)
    problems = read_object(path, MEND)
    splits_path = path.with_name("pid_splits.json")
    splits = read_object(splits_path, MEND)
    name = f"{task}_{split}"
    if name not in splits:
        raise UserError(f"no split '{name}'", where=splits_path, mend=f"Known: {', '.join(sorted(splits))}.")
    skills_path = path.with_name("pid2skills.json")
    skills = read_object(skills_path, MEND) if skills_path.is_file() else {}
    ids = field(splits, name, list, str(splits_path))
    # A mini split is a part of the split whose name it carries, and so are its pictures.
    folder = f"iconqa/{split.removeprefix('mini')}/{task}"
    questions = []
    for pid in map(str, ids):
        if pid not in problems:
            raise UserError(
                f"problem {pid} of split '{name}' is not in it", where=path, mend="Fetch the file anew."
            )
        questions.append(
            _question(
                problems[pid],
                pid,
                task,
                image=f"{folder}/{pid}/image.png",
                skills=tuple(map(str, field(skills, pid, list, str(skills_path)) if pid in skills else ())),
                where=f"{path}, problem {pid}",
            )
        )
    return checked(_composed(questions, composed), path)


def files(path: Path, **_: object) -> list[Path]:
    """What is read beside problems.json and decides which questions are asked."""
    splits = path.with_name("pid_splits.json")
    return [splits] if path.is_file() and splits.is_file() else []


def warn(questions: Sequence[Question], predictions: Mapping[str, str]) -> list[str]:
    """What is missing in the breakdown."""
    if any(question.category for question in questions):
        return []
    return ["there is no pid2skills.json beside the problems, so no breakdown by skill"]


def _read_folders(path: Path, task: str) -> list[Question]:
    found = sorted(path.glob("*/data.json"), key=lambda file: (len(file.parent.name), file.parent.name))
    if not found:
        raise UserError(
            "neither problems.json nor problem folders with a data.json in it",
            where=path,
            mend="Give IconQA's problems.json, or a folder such as iconqa/test/choose_txt.",
        )
    return [
        _question(read_object(file, MEND), pid, task, image=f"{pid}/image.png", skills=(), where=str(file))
        for file in found
        for pid in [file.parent.name]
    ]


def _composed(questions: list[Question], folder: str | None) -> list[Question]:
    """The same questions where each is shown as one picture, whose options are known by their letters."""
    if folder is None:
        return questions
    return [
        replace(
            question,
            image=f"{folder}/{question.id}.png",
            choices=tuple(ascii_uppercase[: len(question.choices)]),
            choice_images=(),
            answers=(ascii_uppercase[question.answer_index or 0],),
        )
        for question in questions
    ]


def _question(
    problem: Any, pid: str, task: str, *, image: str, skills: tuple[str, ...], where: str
) -> Question:
    problem = an_object(problem, where)
    kind = field(problem, "ques_type", str, where)
    if kind != task:
        raise UserError(
            f"a problem of task '{kind}', expected '{task}'", where=where, mend="Name its own task."
        )
    text = field(problem, "question", str, where)
    if task == "fill_in_blank":
        answer = field(problem, "answer", str, where)
        return Question(pid, text, (answer,), image, cluster=pid, category=skills)
    choices = tuple(map(str, field(problem, "choices", list, where)))
    index = field(problem, "answer", int, where)
    if not 0 <= index < len(choices):
        raise UserError(
            f"'answer' is {index}, there are {len(choices)} choices", where=where, mend="Correct it."
        )
    folder = image.removesuffix("image.png")
    return Question(
        pid,
        text,
        (choices[index],),
        image,
        cluster=pid,
        choices=choices,
        choice_images=tuple(folder + name for name in choices) if task == "choose_img" else (),
        category=skills,
        answer_index=index,
    )


def _choices(question: Question, rule: str) -> tuple[str, ...]:
    if not question.choices:
        raise UserError(
            f"the rule '{rule}' needs options, question {question.id} has none",
            mend="For fill_in_blank use 'normalised' or 'strict', elsewhere a rule that compares texts.",
        )
    return question.choices


def _blank(question: Question, rule: str) -> str:
    if question.choices:
        raise UserError(
            f"the rule '{rule}' is for blanks, question {question.id} has options",
            mend="For questions with options use 'choice', 'letter' or 'official'.",
        )
    return question.answers[0]


def _number(text: str) -> str:
    return _THOUSANDS_COMMA.sub("", plain(text))
