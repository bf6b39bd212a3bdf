from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.evaluation.metrics.coco_java import absent, java_tokens
from mmtune.evaluation.metrics.ptb import PUNCTUATION, tokenise

OFFICIAL = json.loads(
    (Path(__file__).parents[2] / "data" / "captions" / "ptb_tokens.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("row", OFFICIAL, ids=lambda row: row["caption"][:30])
def test_words_are_the_official_ones(row: dict[str, list[str]]) -> None:
    assert tokenise(str(row["caption"])) == row["tokens"]


@pytest.mark.parametrize(
    "odd", ["\r", "\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\t", "\r\n"]
)
def test_a_line_break_inside_is_a_space(odd: str) -> None:
    assert tokenise(f"a dog{odd}on a bench.") == ["a", "dog", "on", "a", "bench"]


@pytest.mark.parametrize("caption", ["", " ", ".", "...", '" "', "\n", "😀", "?", "-- , ;"])
def test_captions_without_a_word(caption: str) -> None:
    assert tokenise(caption) == []


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_gives_words_without_spaces_and_twice_the_same(text: str) -> None:
    words = tokenise(text)
    assert words == tokenise(text)
    assert all(word and not set(word) & set(" \n\r\t") and word not in PUNCTUATION for word in words)


@pytest.mark.parametrize("unit", ["a", "a.", "a-", "a+", "a@", "'", "1/", "1 ", "(", "<a", "http://", "a'"])
def test_the_time_grows_with_the_length_not_with_its_square(unit: str) -> None:
    begun = time.process_time()
    tokenise(unit * (100_000 // len(unit)))
    assert time.process_time() - begun < 20


@pytest.mark.skipif(absent() is not None, reason=f"the official tokeniser is not here: {absent()}")
def test_the_official_tokeniser_itself() -> None:
    captions = [row["caption"] for row in OFFICIAL]
    # Each is followed by one in small letters, for the official one reads on into the next line.
    asked = tuple(text for caption in captions for text in (caption, "", "a\rb\u2028c"))
    found = java_tokens(asked)
    assert [list(words) for words in found[::3]] == [row["tokens"] for row in OFFICIAL]
    assert set(found[1::3]) == {()}
    assert set(found[2::3]) == {("a", "b", "c")}
