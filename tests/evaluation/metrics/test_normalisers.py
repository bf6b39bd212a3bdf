"""The normalisers against slow restatements of their rules, and by what must hold for any text."""

from __future__ import annotations

import re
from collections.abc import Callable
from string import ascii_letters, ascii_uppercase, digits

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmtune.evaluation.metrics import exact, gqa, iconqa, vqa
from mmtune.evaluation.metrics.base import Question, plain

MARKS = ';/[]"{}()=+\\_-><@`,?!'
marked = st.text(st.sampled_from(MARKS + " .,.' aA1\n\t"), max_size=30)
words = st.sampled_from(
    ["a", "The", "none", "Two", "dont", "don't", "1,000", "2.5", ".", "x", "he's", "O'Clock"]
)
anything = st.text(max_size=30) | marked | st.lists(words, max_size=8).map(" ".join)
spoken = st.text(ascii_letters + digits, min_size=1, max_size=8) | st.sampled_from(
    ["the", "Three", "wont", "None"]
)
NORMALISERS = [vqa.normalise_m4c, vqa.normalise_vqa]


def slow_punctuation(text: str) -> str:
    """Character by character, as the rule is told in words."""
    thousands = re.search(r"\d,+\d", text) is not None
    kept = ""
    for mark in text:
        if mark not in MARKS:
            kept += mark
        elif not thousands and mark + " " not in text and " " + mark not in text:
            kept += " "
    made, gone = "", 0
    for i, character in enumerate(kept):
        if character == "." and not kept[i + 1 : i + 2].isdecimal() and gone < 32:
            gone += 1
        else:
            made += character
    return made


def slow_words(text: str) -> str:
    said = []
    for word in text.lower().split():
        for value, name in enumerate("zero one two three four five six seven eight nine ten".split()):
            word = str(value) if word == name else word
        word = "0" if word == "none" else word
        if word not in ("a", "an", "the"):
            said.append(vqa.CONTRACTIONS.get(word, word))
    return " ".join(said)


@given(text=anything)
@settings(max_examples=400)
def test_the_rules_in_words(text: str) -> None:
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    assert vqa.normalise_vqa(text) == slow_words(slow_punctuation(flat))
    first = re.sub("'s", " 's", re.sub("[,?]", "", text.lower())).strip()
    flat = first.replace("\n", " ").replace("\t", " ").strip()
    assert vqa.normalise_m4c(text) == slow_words(slow_punctuation(flat))


@pytest.mark.parametrize("normalise", NORMALISERS)
@given(text=anything)
@settings(max_examples=150)
def test_what_no_normalised_text_holds(normalise: Callable[[str], str], text: str) -> None:
    made = normalise(text)
    assert isinstance(made, str)
    assert not set(made) & set(MARKS)
    assert not set(made.split()) & {"a", "an", "the", "none", "two", "ten"}
    assert made == " ".join(made.split())


@pytest.mark.parametrize("normalise", NORMALISERS)
@given(text=st.text(st.characters(max_codepoint=127), max_size=30))
@settings(max_examples=150)
def test_case_does_not_matter(normalise: Callable[[str], str], text: str) -> None:
    assert normalise(text) == normalise(text.swapcase())


@pytest.mark.parametrize("normalise", NORMALISERS)
@given(
    said=st.lists(spoken, max_size=6),
    gaps=st.lists(st.sampled_from([" ", "  ", "\n", "\t "]), min_size=7, max_size=7),
)
@settings(max_examples=150)
def test_plain_words_are_normalised_one_by_one(
    normalise: Callable[[str], str], said: list[str], gaps: list[str]
) -> None:
    """And white space between them does not matter, and a second time changes nothing."""
    text = "".join(gap + word for gap, word in zip(gaps, said, strict=False))
    made = normalise(text)
    singly = [normalise(word) for word in said]
    assert made == " ".join(filter(None, singly))
    assert normalise(made) == made


# ---- The other scorers ----------------------------------------------------------------------------------


@given(
    text=st.text(max_size=20),
    case=st.sampled_from([str.upper, str.lower, str.title]),
    space=st.sampled_from(["", " ", "\n"]),
)
@settings(max_examples=150)
def test_exact_forgives_outer_space_and_one_period_and_no_more(
    text: str, case: Callable[[str], str], space: str
) -> None:
    question = Question("1", "?", (text,), None, "1")
    assert exact.exact(question, text) == 1
    assert exact.exact(question, space + text + space) == 1
    if text.strip() and not text.rstrip().endswith("."):
        assert exact.exact(question, f"{text.rstrip()}.{space}") == 1
        assert exact.exact(question, f"{text.rstrip()}..") == 0
    if text.isascii():
        assert exact.exact(question, case(text)) == 1
    assert exact.exact(question, f"{text}x") == 0


@given(answer=st.text(max_size=10).map(str.lower), periods=st.integers(0, 3), text=st.text(max_size=10))
@settings(max_examples=150)
def test_gqa_forgives_case_and_periods_at_the_end(answer: str, periods: int, text: str) -> None:
    assume(not answer.endswith(".") and answer.lower() == answer)
    question = Question("1", "?", (answer,), None, "1")
    assert gqa.gqa(question, answer + "." * periods) == 1
    if answer.isascii():
        assert gqa.gqa(question, answer.upper()) == 1
    assert gqa.gqa(question, answer + " ") == 0
    assert gqa.gqa(question, text) in (0.0, 1.0)


@given(
    choices=st.lists(st.text(max_size=6), min_size=2, max_size=8, unique_by=plain),
    data=st.data(),
    anything=st.text(max_size=8),
)
@settings(max_examples=200)
def test_an_option_is_chosen_by_its_letter_and_by_its_text(
    choices: list[str], data: st.DataObject, anything: str
) -> None:
    index = data.draw(st.integers(0, len(choices) - 1))
    question = Question("1", "?", (choices[index],), None, "1", choices=tuple(choices), answer_index=index)
    letter = ascii_uppercase[index]
    for form in (letter, letter.lower(), f"{letter}.", f"({letter})", f" {letter})\n"):
        assert iconqa.letter(question, form) == 1
    others = {ascii_uppercase[i] for i in range(len(choices))} - {letter}
    assert not any(iconqa.letter(question, other) for other in others)
    if plain(choices[index]):
        assert iconqa.choice(question, choices[index]) == 1
        assert iconqa.choice(question, f" {choices[index]}\n") == 1
    for rule in (iconqa.letter, iconqa.choice, iconqa.official, iconqa.lorasculpt):
        assert rule(question, anything) in (0.0, 1.0)
