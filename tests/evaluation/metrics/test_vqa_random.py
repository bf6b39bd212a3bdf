"""20,000 made-up predictions under every rule of the family against an implementation of another hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mmtune.evaluation.metrics import vqa
from mmtune.evaluation.metrics.base import Question, Rule
from tests.evaluation.metrics import vqa_reference

RULES: dict[str, Rule] = {
    **vqa.RULES,
    "vlmevalkit": vqa.vlmevalkit,
    "lmms_eval_vqav2": vqa.lmms_eval_vqav2,
}
PIECES = [
    *("a", "an", "the", "A", "The", "none", "None", "two", "Ten", "eleven", "yes", "no", "stop", "STOP"),
    *(
        "dont",
        "don't",
        "he's",
        "hes",
        "somebody'd",
        "Im",
        "o'clock",
        "surfing",
        "10",
        "2012",
        "3.14",
        "1,000",
    ),
    *("1,,000", "50%", "$5", "-5", "1/2", "3:00", "U.S.A.", "e.g.", "www.x.com", "cat", "dog", "’", "é", "ß"),
    *("٣", "٣,٣", "²", "İ", "日本", "😀", "\u2028", "\xa0", "." * 40, "", "nan"),
]
GLUE = [" ", "", " ", ",", ", ", ".", ". ", "-", "\n", "\t", "?", "!", "'s", ";", "/", " - ", "  "]


def made_up(rng: random.Random) -> str:
    text = rng.choice(PIECES)
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        text += rng.choice(GLUE) + rng.choice(PIECES)
    return text


def disguised(rng: random.Random, text: str) -> str:
    """The same text as another annotator or a model might have written it."""
    ways = (str.lower, str.upper, str.title, lambda t: t + ".", lambda t: f" {t} ", lambda t: f"the {t}", str)
    return rng.choice(ways)(text)


@pytest.mark.parametrize("seed", range(4))
def test_random_predictions_score_as_in_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    seen: dict[str, Counter[float]] = {name: Counter() for name in RULES}
    for _ in range(5000):
        pool = [made_up(rng) for _ in range(rng.choice((1, 2, 3)))]
        answers = (
            [pool[0]] * 10 if rng.random() < 0.2 else [disguised(rng, rng.choice(pool)) for _ in range(10)]
        )
        prediction = disguised(rng, rng.choice([*pool, made_up(rng)]))
        question = Question("1", "?", tuple(answers), None, "1")
        expected = vqa_reference.scores(answers, prediction, vqa.CONTRACTIONS)
        for name, rule in RULES.items():
            found = rule(question, prediction)
            assert found == float(expected[name]), (name, answers, prediction)
            seen[name][found] += 1
    for name, counts in seen.items():  # no rule was tried on one kind of score only
        assert set(counts) == {0.0, 0.3, 0.6, 0.9, 1.0}, name
        assert min(counts.values()) > 20, name
