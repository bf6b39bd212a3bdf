"""What a lenient reader takes a reply for, and that it never takes too much."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmtune.evaluation.metrics.base import Question, Rule
from mmtune.evaluation.metrics.gqa import gqa
from mmtune.evaluation.metrics.iconqa import choice, letter, official
from mmtune.evaluation.metrics.repair import Reader, option_of
from mmtune.evaluation.metrics.vqa import m4c
from mmtune.evaluation.score import score_predictions
from tests.evaluation.test_score import SUMS, Task

COLOURS = ("red", "green", "blue", "yellow")
CLOSED = [Question(str(i), "What colour is the circle?", (COLOURS[i % 4],), None, str(i)) for i in range(40)]
RED = CLOSED[0]
SIGN = Question("1", "What does the sign say?", ("stop sign",) * 6 + ("stop",) * 4, None, "1")
COUNT = Question("2", "How many dogs are there?", ("3",) * 10, None, "2")
EXISTS = Question("3", "Is there a dog?", ("yes",) * 10, None, "3")
PET = Question("4", "Which?", ("dog",), None, "4", choices=("cat", "dog", "hot dog"), answer_index=1)
NUMBERS = Question("5", "How many?", ("2",), None, "5", choices=("1", "2", "0"), answer_index=1)

RIGHT: list[tuple[Question, Rule, str]] = [
    *(
        (RED, gqa, reply)
        for reply in ("'red'", "**Red**", "red!", "the red", "Answer: red", "- red", " red\n")
    ),
    *(
        (RED, gqa, reply)
        for reply in ("It is red.", "It's a red circle.", "The colour of the circle is red.")
    ),
    *((RED, gqa, reply) for reply in ("Red. I see it clearly.", "red\n\nAs you asked.", "red because it is")),
    *((RED, gqa, reply) for reply in ("So, the answer is: red.", "I think the circle is painted red.")),
    *(
        (SIGN, m4c, reply)
        for reply in ("It says stop sign.", "The sign reads 'Stop'", "There is stop written")
    ),
    *(
        (COUNT, m4c, reply)
        for reply in ("There are 3 dogs.", "**3** dogs are there", "The answer is 3, I believe")
    ),
    *((EXISTS, m4c, reply) for reply in ("Yes, there is a dog.", "yes there is", "Yes! A big dog.")),
    *(
        (PET, choice, reply)
        for reply in ("The answer is B.", "Option B", "Answer: (B)", "**B**", "1", "a dog")
    ),
    *((PET, choice, reply) for reply in ("B because it barks", "dog.\nIt barks.", "A dog", "B) a dog it is")),
    *((PET, rule, reply) for rule in (letter, official) for reply in ("The answer is B.", "It is a dog.")),
    (PET, official, "dog"),
    (NUMBERS, choice, "There are 2 circles."),
]
WRONG: list[tuple[Question, Rule, str]] = [
    *(
        (RED, gqa, reply)
        for reply in ("", " ", "A", "B.", "reddish", "hot red", "red-brown", "It is infrared.")
    ),
    *(
        (RED, gqa, reply)
        for reply in ("red or blue", "It is red and blue.", "It is not red.", "Red. Or blue.")
    ),
    *(
        (RED, gqa, reply)
        for reply in ("It isn't red.", "red, green, blue", "Either red.", "blue, it is no red")
    ),
    *(
        (SIGN, m4c, reply)
        for reply in ("It says nonstop.", "It does not say stop", "bus stop", "It is " + "x " * 400)
    ),
    *(
        (COUNT, m4c, reply)
        for reply in ("There are 13.", "There are 3 or 4.", "I see 3 dogs and 2 cats.", "It is 3.5")
    ),
    *((COUNT, m4c, reply) for reply in ("It is 2,300", "The year is 3-4", "There are 3 here and 3 there")),
    *(
        (EXISTS, m4c, reply)
        for reply in ("No, yes.", "Yes and no.", "Yesterday.", "No idea", "Not sure: yes")
    ),
    *(
        (PET, choice, reply)
        for reply in ("A cat", "cat or dog", "hot dog", "B. cat", "not B", "B, C", "B or A")
    ),
    *(
        (PET, choice, reply)
        for reply in ("A", "D", "It is a dogs' cat", "The dog is not it.", "0", "a dogfish")
    ),
    *((NUMBERS, choice, reply) for reply in ("1", "Option A", "There are 2, or 1", "The answer is 0.", "3")),
]


def _name(value: object) -> str:
    return str(getattr(value, "__name__", repr(value)[:40]))  # the same in every process, unlike an address


def reader(question: Question) -> Reader:
    return Reader(CLOSED if question is RED else [question])


@pytest.mark.parametrize(("question", "rule", "reply"), RIGHT, ids=_name)
def test_the_same_answer_in_another_form(question: Question, rule: Rule, reply: str) -> None:
    assert reader(question).score(question, reply, rule, 0.0) > 0


@pytest.mark.parametrize(("question", "rule", "reply"), WRONG, ids=_name)
def test_another_answer_is_left_alone(question: Question, rule: Rule, reply: str) -> None:
    assert rule(question, reply) == 0
    assert reader(question).score(question, reply, rule, 0.0) == 0


def test_options_that_are_letters_themselves() -> None:
    """The letter of one is the text of the other: "The answer is A" is not clear under either rule."""
    assert option_of(("B", "A"), "The answer is A.") is None
    assert option_of(("B", "C"), "The answer is A.") == 0


def test_every_wrapping_of_every_option_is_that_option() -> None:
    """A reader that is never wrong where the reply is made to mean one option, whatever the rule wants."""
    draw = random.Random(0)
    names = ["cat", "dog", "three", "5", "hot dog", "the left one", "black cat", "17", "7", "isosceles"]
    wraps = [
        "{}",
        "{}.",
        "'{}'",
        "**{}**",
        "Answer: {}",
        "The answer is {}.",
        "{}\nBecause of that.",
        "It is {}!",
    ]
    for _ in range(400):
        choices = tuple(draw.sample(names, draw.randint(2, 5)))
        index, wrap = draw.randrange(len(choices)), draw.choice(wraps)
        for form in (
            choices[index],
            "ABCDE"[index],
            f"({'ABCDE'[index]})",
            f"{'ABCDE'[index]}. {choices[index]}",
        ):
            assert option_of(choices, wrap.format(form)) == index, (choices, wrap.format(form))


WORDS = st.sampled_from(
    "red green blue stop sign 3 4 three dog cat yes no A B C. (B) is not or the a it It's answer: The 1"
    " ' ** . , because \n - hot".split(" ")
)
REPLIES = st.one_of(st.text(), st.lists(WORDS, max_size=12).map(" ".join))
KINDS = [(RED, gqa), (SIGN, m4c), (COUNT, m4c), (EXISTS, m4c), (PET, choice), (PET, letter), (PET, official)]


@pytest.mark.parametrize(("question", "rule"), KINDS)
@given(reply=REPLIES)
@example(reply="")
@example(reply="\ud800 \x00")
@example(reply="'THREE")
def test_lenient_is_never_below_strict_and_a_right_answer_stays_right(
    question: Question, rule: Rule, reply: str
) -> None:
    strict = rule(question, reply)
    lenient = reader(question).score(question, reply, rule, strict)
    assert strict <= lenient <= 1
    if not reply.strip():
        assert lenient == strict
    if question is PET and option_of(PET.choices, reply) in (0, 2):
        assert lenient == strict
    if lenient > strict and question is not PET:  # it was in the reply, not made up
        assert any(answer in reply.casefold().replace("three", "3") for answer in question.answers)


UNRELATED = st.lists(
    st.sampled_from("house tree und sky ° ? ! \n so running 'tis over'".split(" ")), max_size=9
)


@pytest.mark.parametrize(("question", "rule"), KINDS)
@given(words=UNRELATED)
def test_an_unrelated_reply_stays_wrong(question: Question, rule: Rule, words: list[str]) -> None:
    assert reader(question).score(question, " ".join(words), rule, 0.0) == 0


def test_a_task_has_a_lenient_score_beside_its_own() -> None:
    questions = [Question(str(i), "Sum?", (str(i + 2),), None, str(i)) for i in range(4)]
    said = {"0": "2", "1": "It is 3.", "2": "5"}
    score = score_predictions(questions, said, SUMS)
    assert (score.score, score.lenient) == (25.0, 50.0)
    assert [row["lenient"] for row in score.per_question] == [1.0, 1.0, 0.0, 0.0]
    assert score.summary()["lenient"] == 50.0


def test_the_order_of_questions_changes_nothing() -> None:
    task = Task("colours", "gqa", "gqa")
    said = {
        q.id: ("It is red and blue.", "It is red.", "A green one is.")[i % 3] for i, q in enumerate(CLOSED)
    }
    one, other = (score_predictions(order, said, task) for order in (CLOSED, CLOSED[::-1]))
    assert one.score < one.lenient == other.lenient  # type: ignore[operator]
