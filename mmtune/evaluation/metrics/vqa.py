"""VQA soft accuracy under the rules that published numbers use; which project scores what is in each reader.

One file of predictions scores 49.1, 59.2 or 61.3 on TextVQA by the rule alone, so each is reproduced as
its public scorer runs, mistakes included:

* `m4c`: MMF's EvalAI processor, also LLaVA's and lmms-eval's. Prediction and answers are normalised.
* `vqa2021`: the VQA repository since March 2021. Both are normalised only where the ten answers differ;
  where all ten are the same, the prediction must equal them as they stand, capitals included.
* `vqa_legacy`: the VQA repository before, LAVIS, and LLaVA-HR's and LoRASculpt's OKVQA. The prediction is
  always normalised; the answers lose their punctuation where they differ, and are left alone where they
  do not.
* `vlmevalkit`: VLMEvalKit (vlmeval/dataset/utils/vqa_eval.py). Both are normalised, but a period after a
  digit stays (`2012.`), which costs a model that ends its answers with one.
* `lmms_eval_vqav2`: lmms-eval's vqav2 task. Both are normalised by the VQA repository's normaliser, whether
  or not the ten answers differ. (Its first versions mixed `m4c` and `vqa2021`.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.evaluation.metrics.base import Question, Rule, field

METRIC = "soft_accuracy"

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})

# Other marks (: ' & $ % # * ~ ^ |) stay; periods have a rule of their own.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MARKS = frozenset(PUNCTUATION)

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

# The official table is that of forms which lost one apostrophe, and one slip of the pen, kept here.
# Its four forms with a capital I are left out: they are looked up after lower(), and never found.
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTED.split()
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

_COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
_PERIOD_WITHOUT_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")


def _remembered(normalise: Callable[[str], str]) -> Callable[[str], str]:
    """The same function with a memory: ten annotators mostly write the same short answers."""
    remembering = lru_cache(maxsize=1 << 16)(normalise)

    @wraps(normalise)
    def normalised(text: str) -> str:
        return remembering(text) if len(text) <= 64 else normalise(text)

    return normalised


def strip_punctuation(text: str, period: re.Pattern[str] = _PERIOD_NOT_BEFORE_DIGIT) -> str:
    """Punctuation as the official processors treat it.

    A mark is deleted where it stands beside a space anywhere in the text, or where the text has a comma
    between digits (so `1,000-2,000` becomes `10002000`); otherwise it becomes a space (`1/2`: `1 2`).
    A period goes unless a digit follows: the pattern was meant to look behind as well, but does not.
    No more than 32 periods go, because the official code passes a regex flag where the count belongs.
    `period` matches those that go.
    """
    if _MARKS.isdisjoint(text):
        return period.sub("", text, count=32) if "." in text else text
    glued = _COMMA_BETWEEN_DIGITS.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if glued or beside_space else " ")
    return period.sub("", stripped, count=32)


def replace_words(text: str) -> str:
    """Lower case, number words up to ten as digits (`none` is 0), no articles, apostrophes restored.

    The articles go even where they are the whole answer: an option letter `A` becomes the empty string.
    """
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join([CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES])


def one_line(text: str) -> str:
    """Line feeds and tabs as spaces, none around: the first step of both repositories' evaluators."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@_remembered
def normalise_m4c(text: str) -> str:
    """The m4c normaliser (MMF's EvalAI processor).

    Commas and question marks go before anything else (`a,b`: `ab`; `1,000-2,000`: `1000 2000`), and every
    `'s` is split off (`joe's`: `joe 's`). Signs are lost (`-5`: `5`), curly apostrophes are not touched.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return replace_words(strip_punctuation(one_line(text)))


@_remembered
def normalise_vqa(text: str) -> str:
    """The VQA repository's normaliser: the same two steps without m4c's first."""
    return replace_words(strip_punctuation(one_line(text)))


@_remembered
def normalise_vlmevalkit(text: str) -> str:
    """VLMEvalKit's normaliser: the VQA repository's, but a period goes only where no digit is beside it."""
    return replace_words(strip_punctuation(one_line(text), _PERIOD_WITHOUT_DIGITS))


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the answers of min(1, matches among the other answers / 3).

    With ten answers 0, 1, 2, 3 and 4 matches give 0, 0.3, 0.6, 0.9 and 1. The published short form
    min(matches / 3, 1) leaves nobody out and is not the same.
    """
    matches = list(answers).count(prediction)
    by_matching = matches * min(3, matches - 1)
    by_others = (len(answers) - matches) * min(3, matches)
    # One division of whole numbers, so that 0.3 is the nearest double to 0.3.
    return (by_matching + by_others) / (3 * len(answers))


def _each(normalise: Callable[[str], str], answers: Sequence[str]) -> list[str]:
    """The answers normalised; what several annotators wrote is normalised once."""
    normalised = {answer: normalise(answer) for answer in set(answers)}
    return [normalised[answer] for answer in answers]


def m4c(question: Question, prediction: str) -> float:
    """Soft accuracy under `m4c`, as the top of this file has it."""
    return soft_accuracy(normalise_m4c(prediction), _each(normalise_m4c, question.answers))


def vqa2021(question: Question, prediction: str) -> float:
    """Soft accuracy under `vqa2021`, as the top of this file has it."""
    answers = _each(one_line, question.answers)
    if len(set(answers)) == 1:
        return soft_accuracy(one_line(prediction), answers)
    return soft_accuracy(normalise_vqa(prediction), _each(normalise_vqa, answers))


def vqa_legacy(question: Question, prediction: str) -> float:
    """Soft accuracy under `vqa_legacy`, as the top of this file has it."""
    answers: Sequence[str] = question.answers
    if len(set(answers)) > 1:
        answers = _each(strip_punctuation, answers)
    return soft_accuracy(normalise_vqa(prediction), answers)


def vlmevalkit(question: Question, prediction: str) -> float:
    """Soft accuracy under `vlmevalkit`, as the top of this file has it."""
    return soft_accuracy(normalise_vlmevalkit(prediction), _each(normalise_vlmevalkit, question.answers))


def lmms_eval_vqav2(question: Question, prediction: str) -> float:
    """Soft accuracy under `lmms_eval_vqav2`, as the top of this file has it."""
    return soft_accuracy(normalise_vqa(prediction), _each(normalise_vqa, question.answers))


RULES: dict[str, Rule] = {"m4c": m4c, "vqa2021": vqa2021, "vqa_legacy": vqa_legacy}
"""Those that every data set of the family can be scored by; a reader adds the projects that score its own."""


def rows_of(path: Path, key: str, expected: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) for each object of the list under `key` of a JSON file, or of the file where `key` is "".

    Raises UserError, saying what kind of file was `expected`, where there is no such list.
    """
    content = read_json(path)
    found = content.get(key) if key and isinstance(content, dict) else None if key else content
    if not isinstance(found, list):
        raise UserError(f"no list '{key}' in it" if key else "no list", where=path, mend=expected)
    rows = []
    for number, row in enumerate(found):
        where = f"{path}, {key}[{number}]"
        if not isinstance(row, dict):
            raise UserError(f"expected an object, found {type(row).__name__}", where=where)
        rows.append((where, row))
    return rows


def ten_answers(row: dict[str, Any], where: str, key: str | None) -> tuple[str, ...]:
    """The ten answers of a row: texts, or under `key` of objects. Raises UserError where they are not ten."""
    if "answers" not in row:
        raise UserError(
            "it has no 'answers'",
            where=where,
            mend="The official test file has none; score the validation file.",
        )
    found = field(row, "answers", list, where)
    answers: list[Any] = [answer.get(key) if key and isinstance(answer, dict) else answer for answer in found]
    if len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
        under = f" under '{key}'" if key else ""
        raise UserError(f"ten answers are expected, each a text{under}; found {len(answers)}", where=where)
    return tuple(answers)
