"""Format repair: the answers that a lenient reader would take a reply for, so that form and knowledge part.

A tuned model may still know an answer and give it in another form: a sentence for a word, a letter for an
option's text, quotes, an explanation. The strict score is the task's own rule on the reply as it is; the
lenient one is the same rule's best over the reply and its repaired forms. Repair is conservative: where a
reply hedges, negates or names a rival answer it is left as it is, so the lenient score is a lower bound of
what the model knew. A reply that holds the answer in no form, such as a letter where a colour was asked,
cannot be repaired by any reader. Captions have no one right form and no lenient score.

What is repaired: spaces, quotes, brackets, markdown and marks around the answer; labels ("Answer: X") and
lead-ins ("The answer is X", "It is a X", "The sign says X"); an explanation after the first sentence or after
"because"; yes or no at the start of a sentence; an annotated answer as whole words in a sentence, once; and
for options the letter, the text or the (official, zero-based) index, each for each other.
The distinction is CoIN's between truth alignment and reasoning knowledge (arXiv 2403.08350).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from string import ascii_uppercase

from mmtune.evaluation.metrics.base import Question, Rule, plain

LONGEST = 600  # characters; a longer reply is no answer in another form
CLOSED = 5  # questions for each distinct answer from which on a task's answers are a closed set

_LEFT = " \t\r\n\"'`*_“”‘’«»([{"
_RIGHT = " \t\r\n\"'`*_“”‘’«»)]}.,;:!?"
_BULLET = re.compile(r"(?:[-–—>]|#{1,6})\s+")
_LABEL = re.compile(r"(?:(?:the )?(?:final |correct |short )?answer|a|response)\s*[:=]\s*(?=\S)", re.I)
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence|well|sure|ok|okay)[,:]?\s+)?"
    r"(?:(?:the|this|that|these|those|its|it|they|there|he|she|i|my)\b[^.!?\n]{0,80}?"
    r"(?:\b(?:is|are|was|were|be|says?|reads?|shows?|see|think|has|have)\b|(?<=\w)['’](?:s|re)\b)"
    r"|answer is)\s*:?\s+(?=\S)",
    re.I,
)
_ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.I)
_SENTENCE_END = re.compile(r"\n|(?<=[.!?])\s+|,?\s+because\b", re.I)
_YES_NO = re.compile(
    r"(yes|no)(?=\s*[,.;:!\n]|\s+(?:it|there|they|he|she|the|this|that|these|those|i|we|you)\b)", re.I
)
_LETTERED = re.compile(
    r"(?:(?:option|choice|letter)\s+)?((?-i:[A-Za-z]))(?:[\])*]*[.):,]+\s*(?P<rest>.*))?", re.I | re.S
)
_CAPITAL = re.compile(r"\b[A-Z]\b")
_WORD = re.compile(r"\w+(?:[-'.,:/]\w+)*")
_DENIES = frozenset("not no never neither nor none without cannot or either unless except".split())
_VERBS = frozenset(
    "is are was were be says say reads read shows show has have had contains looks seems appears see "
    "can does do think believe it's that's there's they're he's she's".split()
)
_NUMBERS = frozenset("zero one two three four five six seven eight nine ten eleven twelve".split())


class Reader:
    """Reads replies leniently to the questions of one task."""

    def __init__(self, questions: Sequence[Question]) -> None:
        own: set[tuple[str, ...]] = set()
        for question in questions:
            own.update(words for answer in set(question.answers) if (words := _words(answer)))
            if len(own) * CLOSED > len(questions):
                own = set()
                break
        self.rivals = own
        """The task's answers as words, where they are a closed set, of which one excludes the others."""
        self.longest = max(map(len, self.rivals), default=0)

    def score(self, question: Question, reply: str, rule: Rule, strict: float) -> float:
        """The rule's best over the reply, which it gives `strict`, and its repaired forms."""
        if strict >= 1 or not reply.strip() or len(reply) > LONGEST:
            return strict
        return max([strict, *(rule(question, form) for form in self.forms(question, reply))])

    def forms(self, question: Question, reply: str) -> list[str]:
        """What the reply may stand for, in forms that a rule may know; none where that is not clear.

        Of a question with options it is the right option in each of its forms, if that is the one meant: the
        form of another might read as the right one (the index 1, the text 1).
        """
        if question.answer_index is not None and question.choices:
            chosen = option_of(question.choices, reply)
            if chosen != question.answer_index:
                return []
            return [question.choices[chosen], *ascii_uppercase[chosen : chosen + 1], str(chosen)]
        # No rule turns an answer of many more words into the annotated one.
        longest = 2 + max((len(_words(answer)) for answer in set(question.answers)), default=0)
        short = [form for form in unwrapped(reply) if not _longer(form, longest)]
        found = [form for form in short if not self._beside_rival(question, reply, form)]
        return list(dict.fromkeys([*found, *self._said_inside(question, reply)]))

    def _said_inside(self, question: Question, reply: str) -> list[str]:
        """Yes or no at the start, or the annotated answer that the reply, a sentence, holds once."""
        words = _words(reply)
        if start := _YES_NO.match(_strip(reply)):
            said = start[1].lower()
            return [] if ("no" if said == "yes" else "yes") in words else [said]
        if not _VERBS & set(words) or _denies(words):
            return []
        held: dict[tuple[str, ...], str] = {}
        for answer in dict.fromkeys(question.answers):
            phrase = _words(answer)
            if _count(phrase, words) != 1:
                continue
            tells = len(phrase) > 1 or len(phrase[0]) > 1 or phrase[0].isdigit()
            if tells and answer.casefold() not in ("yes", "no"):
                held[phrase] = answer
        outer = [phrase for phrase in held if not any(_inside(phrase, other) for other in held)]
        if len(outer) != 1 or self._beside_rival(question, reply, held[outer[0]]):
            return []
        return [held[outer[0]]]

    def _beside_rival(self, question: Question, reply: str, form: str) -> bool:
        """Whether the reply also names another answer of the closed set, or another number.

        One that the question itself names is no rival, unless it names the answer too, as an alternative.
        """
        mine, words, asked = _words(form), _words(reply), _words(question.text)
        if _count(mine, asked):
            asked = ()
        if any(map(_is_number, mine)):
            others = [word for word in words if _is_number(word) and word not in mine and word not in asked]
            if others:
                return True
        return any(
            phrase in self.rivals and not _count(phrase, mine) and not _count(phrase, asked)
            for size in range(1, self.longest + 1)
            for phrase in _phrases(words, size)
        )


def unwrapped(reply: str) -> list[str]:
    """The reply without what surrounds a short answer: marks, label, lead-in, article, explanation.

    The explanation is only cut off where it neither denies nor leaves a choice open.
    """
    starts = [_strip(reply)]
    first, *rest = _SENTENCE_END.split(starts[0], maxsplit=1)
    if rest and not _denies(_words(rest[0])):
        starts.append(_strip(first))
    found: list[str] = []
    for text in starts:
        found.append(text)
        for pattern in (_LABEL, _LEAD_IN, _ARTICLE):
            match = pattern.match(text)
            if match and not _denies(_words(match[0])):
                text = _strip(text[match.end() :])
            found.append(text)
    return list(dict.fromkeys(form for form in found if form and form != reply))


def option_of(choices: Sequence[str], reply: str) -> int | None:
    """The one option that a reply means by text, letter or index; None where that is not clear.

    Not clear are two texts, two letters, or the letter of one and the text of another; a denial; and an "a"
    before further words, which is an article.
    """
    forms = [reply, *unwrapped(reply)]
    same = {plain(form) for form in forms}
    whole = {index for index, text in enumerate(choices) if plain(text) and plain(text) in same}
    meant = set(whole)
    if not _denies(_words(reply)):
        meant |= _named(choices, reply)
        for form in forms:
            meant |= {index for index in _letters(form) if index < len(choices)}
    if not meant and not any(char.isdigit() for text in choices for char in text):
        meant = {index for index in range(len(choices)) if str(index) in same}
    return meant.pop() if len(meant) == 1 else None


def _letters(form: str) -> set[int]:
    """The letters, from A = 0, that a form stands for (A, A. because, option A), and others beside it."""
    match = _LETTERED.fullmatch(form)
    rest = (match["rest"] or "") if match else ""
    if match is None or (match[1].islower() and _words(rest)):
        return set()
    return {ascii_uppercase.index(letter) for letter in (match[1].upper(), *_CAPITAL.findall(rest))}


def _named(choices: Sequence[str], reply: str) -> set[int]:
    """The options whose texts the reply holds as whole words, but for those inside another's text."""
    words, phrases = _words(reply), [_words(text) for text in choices]
    held = [index for index, phrase in enumerate(phrases) if _count(phrase, words)]
    return {i for i in held if not any(_inside(phrases[i], phrases[j]) for j in held)}


def _strip(text: str) -> str:
    text = text.strip()
    bullet = _BULLET.match(text)
    return text[bullet.end() if bullet else 0 :].lstrip(_LEFT).rstrip(_RIGHT)


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(_folded(text)))


def _longer(text: str, count: int) -> bool:
    """Whether a text has more words than that; it is read no further."""
    return any(True for _ in islice(_WORD.finditer(_folded(text)), count, None))


def _folded(text: str) -> str:
    return text.casefold().replace("’", "'")


def _denies(words: Sequence[str]) -> bool:
    return not _DENIES.isdisjoint(words) or any(word.endswith("n't") for word in words)


def _is_number(word: str) -> bool:
    return word[0].isdigit() or word in _NUMBERS


def _phrases(words: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [words[i : i + size] for i in range(len(words) - size + 1)]


def _count(phrase: tuple[str, ...], words: tuple[str, ...]) -> int:
    """How often a phrase stands among words; an empty one never does."""
    if not phrase or phrase[0] not in words:
        return 0
    return words.count(phrase[0]) if len(phrase) == 1 else _phrases(words, len(phrase)).count(phrase)


def _inside(phrase: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether a phrase is a proper part of another."""
    return len(phrase) < len(other) and _count(phrase, other) > 0
