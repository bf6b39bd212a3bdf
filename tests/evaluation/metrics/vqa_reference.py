"""The rules of the VQA family once more, written from their description and in another way.

Nothing is shared with mmtune but the table of contractions: texts are walked letter by letter, scores are
fractions, and every one of the ten leave-one-out scores is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

MARKS = [
    ";",
    "/",
    "[",
    "]",
    '"',
    "{",
    "}",
    "(",
    ")",
    "=",
    "+",
    "\\",
    "_",
    "-",
    ">",
    "<",
    "@",
    "`",
    ",",
    "?",
    "!",
]
WORDS = "none zero one two three four five six seven eight nine ten".split()


def is_digit(text: str, at: int) -> bool:
    return 0 <= at < len(text) and text[at].isdecimal()


def marks_gone(text: str, period_goes: Callable[[str, int], bool]) -> str:
    thousands = any(
        text[at] == "," and is_digit(text, at - 1) and digit_follows_commas(text, at)
        for at in range(len(text))
    )
    letters = []
    for letter in text:
        if letter not in MARKS:
            letters.append(letter)
        elif not (thousands or letter + " " in text or " " + letter in text):
            letters.append(" ")
    kept = "".join(letters)
    made, gone = "", 0
    for at, letter in enumerate(kept):
        if letter == "." and gone < 32 and period_goes(kept, at):
            gone += 1
        else:
            made += letter
    return made


def digit_follows_commas(text: str, at: int) -> bool:
    while at < len(text) and text[at] == ",":
        at += 1
    return is_digit(text, at)


def before_no_digit(text: str, at: int) -> bool:
    return not is_digit(text, at + 1)


def beside_no_digit(text: str, at: int) -> bool:
    return not is_digit(text, at + 1) and not is_digit(text, at - 1)


def words_mapped(text: str, contractions: dict[str, str]) -> str:
    made = []
    for word in text.lower().split():
        if word in WORDS:
            word = str(max(WORDS.index(word) - 1, 0))
        if word in ("a", "an", "the"):
            continue
        made.append(contractions.get(word, word))
    return " ".join(made)


def flat(text: str) -> str:
    return "".join(" " if letter in "\n\t" else letter for letter in text).strip()


def average(prediction: str, answers: list[str]) -> Fraction:
    thirds = 0
    for left_out in range(len(answers)):
        thirds += min(3, (answers[:left_out] + answers[left_out + 1 :]).count(prediction))
    return Fraction(thirds, 3 * len(answers))


def scores(answers: list[str], prediction: str, contractions: dict[str, str]) -> dict[str, Fraction]:
    """Every rule's score of one prediction."""

    def m4c(text: str) -> str:
        low = "".join(letter for letter in text.lower() if letter not in ",?")
        low = " 's".join(low.split("'s")).strip()
        return words_mapped(marks_gone(flat(low), before_no_digit), contractions)

    def vqa(text: str) -> str:
        return words_mapped(marks_gone(flat(text), before_no_digit), contractions)

    def vlmevalkit(text: str) -> str:
        return words_mapped(marks_gone(flat(text), beside_no_digit), contractions)

    as_they_are = [flat(answer) for answer in answers]
    differ = any(answer != as_they_are[0] for answer in as_they_are)
    raw_differ = any(answer != answers[0] for answer in answers)
    legacy = [marks_gone(answer, before_no_digit) for answer in answers] if raw_differ else answers
    return {
        "m4c": average(m4c(prediction), [m4c(answer) for answer in answers]),
        "vqa2021": average(vqa(prediction), [vqa(answer) for answer in as_they_are])
        if differ
        else average(flat(prediction), as_they_are),
        "vqa_legacy": average(vqa(prediction), legacy),
        "vlmevalkit": average(vlmevalkit(prediction), [vlmevalkit(answer) for answer in answers]),
        "lmms_eval_vqav2": average(vqa(prediction), [vqa(answer) for answer in answers]),
    }
