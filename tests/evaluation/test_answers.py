from __future__ import annotations

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.answers import answer_forms, flips, loss_parts, over_seeds
from mmtune.evaluation.forgetting import Answer


def answers(*said: tuple[str, float], accepted: str = "") -> dict[str, Answer]:
    right = tuple(accepted.split())
    return {str(i): Answer(score, f"picture {i}", text, right) for i, (text, score) in enumerate(said)}


BASE = {
    "colour": answers(("red", 1), ("blue", 1), ("b", 0), ("green", 0), ("red", 1), accepted="red blue brown"),
    "letters": answers(("red", 0), ("", 0), ("dog", 0), ("dog", 0)),
}


def test_answers_in_the_targets_form_by_hand() -> None:
    run = {
        # In turn: the target's form but for case and a period; the base said it too; the annotations hold
        # it; a wrong letter that the run never gives rightly; nothing at all.
        "colour": answers(("A.", 0), ("B", 0), ("Brown", 0), ("D", 0), (" ", 0)),
        "letters": answers(("a", 1), ("B", 1), ("brown", 1), ("D", 0)),
    }
    forms = answer_forms(BASE, run, ["colour"], ["letters"])
    assert forms == {
        "colour": {"mean_length": 10 / 5, "empty": 20.0, "new": 40.0, "off_format": 20.0},
        "letters": {"mean_length": 8 / 4, "empty": 0.0},
    }


def test_a_form_of_its_own_is_new_but_not_the_targets() -> None:
    run = {"colour": answers(*[("re", 0)] * 5), "letters": answers(*[("A", 1)] * 4)}
    colour = answer_forms(BASE, run, ["colour"], ["letters"])["colour"]
    assert (colour["new"], colour["off_format"], colour["mean_length"]) == (100, 0, 2)


def test_the_base_has_no_answers_out_of_its_own_form() -> None:
    same = {**BASE, "letters": answers(("red", 1), ("blue", 1), ("x", 1), ("y", 1))}
    colour = answer_forms(same, same, ["colour"], ["letters"])["colour"]
    assert (colour["new"], colour["off_format"]) == (0, 0)


def read(*scores: tuple[float, float]) -> dict[str, Answer]:
    """Questions on two pictures, with their strict and lenient scores."""
    return {
        str(i): Answer(strict, f"picture {i // 2}", lenient=lenient)
        for i, (strict, lenient) in enumerate(scores)
    }


def test_a_drop_is_lost_format_and_lost_knowledge() -> None:
    base = {"a": read((1, 1), (1, 1), (1, 1), (0, 1)), "caption": answers(("a dog", 1), ("a cat", 1))}
    run = {"a": read((1, 1), (0, 1), (0, 0), (0, 0)), "caption": answers(("dog", 0), ("cat", 0))}
    parts, intervals = loss_parts(base, run, ["a", "caption"])
    # Drop 50: two of four. Lenient: 100 before, 50 after; strict: 75 before, 25 after.
    assert parts == {"a": {"lenient": 50.0, "knowledge": 50.0, "format": 0.0}}
    # By hand: knowledge is 0, 0 | 1, 1: all residuals of a picture agree, so it is 2 draws of 1/2 ± 1/2.
    low, high = intervals["a"]["knowledge"] or []
    assert (high - low) / 2 == pytest.approx(1.959964 * 100 * (1 / 12 + 1 / 16 * 1) ** 0.5)
    assert sum(intervals["a"]["format"] or []) == pytest.approx(0)
    parts, _ = loss_parts({"a": base["a"]}, {"a": read((0, 1), (0, 1), (0, 0), (0, 1))}, ["a"])
    assert parts == {"a": {"lenient": 75.0, "knowledge": 25.0, "format": 50.0}}
    assert loss_parts(base, base, ["a"])[0] == {"a": {"lenient": 100.0, "knowledge": 0.0, "format": 0.0}}


def test_parts_of_different_questions_are_refused() -> None:
    with pytest.raises(UserError, match="different questions: 1"):
        loss_parts({"a": read((1, 1), (1, 1))}, {"a": read((1, 1))}, ["a"])


def test_over_seeds_keeps_what_every_seed_has() -> None:
    assert over_seeds([{"a": {"x": 1.0}, "b": {"x": 1.0}}, {"a": {"x": 3.0}}]).keys() == {"a"}


def test_flips_are_what_the_net_change_hides() -> None:
    base = {"a": answers(("", 1), ("", 1), ("", 0), ("", 0.3), ("", 0.6))}
    run = {"a": answers(("", 0), ("", 1), ("", 1), ("", 0.6), ("", 0.3))}
    assert flips(base, run) == {"a": {"right_to_wrong": 2, "wrong_to_right": 2}}
    assert flips(base, base) == {"a": {"right_to_wrong": 0, "wrong_to_right": 0}}


def test_flips_of_different_questions_are_refused() -> None:
    with pytest.raises(UserError, match="different questions: 1"):
        flips({"a": answers(("", 1), ("", 1))}, {"a": answers(("", 1))})


def test_over_seeds_each_number_has_mean_and_sd() -> None:
    rows = [{"a": {"lost": 1, "won": 4}}, {"a": {"lost": 3, "won": 4}}]
    assert over_seeds(rows) == {
        "a": {"lost": {"mean": 2, "sd": pytest.approx(2**0.5)}, "won": {"mean": 4, "sd": 0}}
    }
