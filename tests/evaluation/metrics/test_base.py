from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import Question, checked, clustered_stderr, field, image_path, plain, some

SCORES = st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=2, max_size=30)


def pairwise_stderr(scores: list[float], clusters: list[str]) -> float:
    """Miller (arXiv 2411.00640), literally: the plain variance and every pair within a cluster."""
    n, mean = len(scores), statistics.fmean(scores)
    pairs = sum(
        (scores[i] - mean) * (scores[j] - mean)
        for i in range(n)
        for j in range(n)
        if i != j and clusters[i] == clusters[j]
    )
    return math.sqrt(max(statistics.variance(scores) / n + pairs / n**2, 0.0))


@given(SCORES)
def test_a_picture_each_gives_the_plain_standard_error(scores: list[float]) -> None:
    stderr = clustered_stderr(scores, [str(i) for i in range(len(scores))])
    assert stderr == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)), abs=1e-12)


@given(SCORES, st.data())
def test_clusters_agree_with_the_published_double_sum(scores: list[float], data: st.DataObject) -> None:
    clusters = data.draw(st.lists(st.sampled_from("abc"), min_size=len(scores), max_size=len(scores)))
    # Square roots of variances that vanish magnify rounding: hence 1e-7.
    assert clustered_stderr(scores, clusters) == pytest.approx(pairwise_stderr(scores, clusters), abs=1e-7)


def test_questions_that_fail_together_widen_the_error() -> None:
    scores = [0.0, 0.0, 1.0, 1.0]
    together, apart = (clustered_stderr(scores, list(names)) for names in ("aabb", "abcd"))
    assert together is not None and apart is not None and together > apart


def test_one_question_has_no_standard_error() -> None:
    assert clustered_stderr([1.0], ["a"]) is None


@pytest.mark.parametrize("text", ["cat", "Cat.", " cat \n", "CAT .", "cat. "])
def test_plain_forgives_space_case_and_a_period(text: str) -> None:
    assert plain(text) == "cat"


def test_plain_forgives_no_more() -> None:
    assert plain("cat..") == "cat."
    assert plain("6:00 P.M.") != plain("6:00 A.M.")


def test_a_field_is_there_and_of_its_kind() -> None:
    assert field({"n": 3}, "n", (int, str), "row 1") == 3
    with pytest.raises(UserError, match=r"row 1: 'n' is missing\n.*Found: m"):
        field({"m": 3}, "n", int, "row 1")
    with pytest.raises(UserError, match="row 1: 'n' should be int, found bool"):
        field({"n": True}, "n", int, "row 1")


def test_image_templates_know_one_placeholder() -> None:
    assert image_path("images/test/{image_id}.png", 7) == "images/test/7.png"
    for wrong in ("{id}.png", "{}.png", "{image_id"):
        with pytest.raises(UserError, match="image_id"):
            image_path(wrong, 7)


def test_ids_name_one_question_each() -> None:
    question = Question("7", "why", ("so",), None, "7")
    with pytest.raises(UserError, match=r"f\.json: question ids occur more than once: 7"):
        checked([question, question], Path("f.json"))
    with pytest.raises(UserError, match="no questions"):
        checked([], Path("f.json"))


def test_some_names_the_first_and_counts_the_rest() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(range(9)) == "0, 1, 2, 3, 4, ... (9 in all)"
