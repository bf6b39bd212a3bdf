from __future__ import annotations

import itertools
import math
import random as randomness
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from mmtune.evaluation import significance
from mmtune.evaluation.significance import (
    Z95,
    bootstrap95,
    detectable,
    holm,
    mcnemar,
    mean95,
    normal_p,
    paired,
    sign_flip,
    wilson95,
)

VQA = [0.0, 0.3, 0.6, 0.9, 1.0]
scores = st.sampled_from(VQA)


def by_brute_force(sums: list[float]) -> float:
    """The share of all signs whose total is as far from zero, one by one."""
    total = abs(math.fsum(sums))
    totals = [
        abs(math.fsum(s * v for s, v in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    return sum(t >= total - 1e-9 for t in totals) / len(totals)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (5, 5), (1, 9), (40, 61), (700, 810), (0, 2000)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    wanted = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(wanted, rel=1e-9)
    assert mcnemar(won, lost) == mcnemar(lost, won)


@given(st.lists(st.integers(-6, 6).map(lambda tenths: tenths / 10), min_size=1, max_size=9))
def test_sign_flip_of_scores_on_a_grid_is_brute_force(sums: list[float]) -> None:
    p, exact = sign_flip(sums)
    assert exact
    assert p == pytest.approx(by_brute_force(sums), rel=1e-9)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=9))
def test_sign_flip_of_a_few_clusters_is_brute_force(sums: list[float]) -> None:
    assume(all(abs(s) > 1e-6 or s == 0 for s in sums))
    p, exact = sign_flip(sums)
    assert exact
    assert p == pytest.approx(by_brute_force(sums), rel=1e-9)


def test_sign_flip_is_scipys_permutation_test() -> None:
    draw = np.random.default_rng(3)
    for _ in range(5):
        a, b = draw.choice(VQA, 11), draw.choice(VQA, 11)
        theirs = stats.permutation_test(
            (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flip(a - b)[0] == pytest.approx(theirs.pvalue, abs=1e-9)


def test_drawn_signs_come_close_to_all_of_them() -> None:
    sums = np.random.default_rng(1).normal(0.2, 1, 20)
    signs = 1 - 2 * (np.arange(2**20)[:, None] >> np.arange(20) & 1)
    wanted = np.mean(np.abs(signs @ sums) >= abs(sums.sum()))
    p, exact = sign_flip(sums)
    assert not exact
    assert p == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / significance.DRAWS))
    assert sign_flip(sums) == (p, False)
    never = sign_flip(np.abs(sums) + 1)[0]
    assert never == 1 / (significance.DRAWS + 1)


@given(st.integers(0, 30), st.integers(0, 30))
def test_with_a_picture_for_each_question_the_two_tests_are_one(lost: int, won: int) -> None:
    assert sign_flip([-1.0] * lost + [1.0] * won)[0] == pytest.approx(mcnemar(lost, won), rel=1e-9)


@given(st.lists(st.tuples(scores, scores, st.integers(0, 5)), min_size=2, max_size=40), st.randoms())
def test_order_and_sides(rows: list[tuple[float, float, int]], random: randomness.Random) -> None:
    def test(rows: list[tuple[float, float, int]], sign: int = 1) -> dict[str, Any]:
        return paired([sign * (a - b) for a, b, _ in rows], [f"picture {c}" for _, _, c in rows])

    row, swapped = test(rows), test(rows, -1)
    shuffled = list(rows)
    random.shuffle(shuffled)
    for other in (test(shuffled), swapped):
        for key in ("p", "p_mcnemar", "stderr", "detectable", "test", "n", "clusters"):
            if isinstance(row.get(key), float):
                assert other[key] == pytest.approx(row[key], abs=1e-9), key
            else:
                assert other.get(key) == row.get(key), key
    assert swapped["difference"] == pytest.approx(-row["difference"], abs=1e-9)
    assert test(shuffled)["difference"] == pytest.approx(row["difference"], abs=1e-9)
    low, high = row["ci95"]
    assert swapped["ci95"] == pytest.approx([-high, -low], abs=1e-9)
    assert 0 < row["p"] <= 1
    if row["clusters"] > 1 and abs(row["difference"]) > 1e-9:
        low, high = row["ci95_bootstrap"]
        assert swapped["ci95_bootstrap"] == pytest.approx([-high, -low], abs=1e-9)


def test_which_test_makes_the_headline() -> None:
    alone = paired([1, -1, 0, 1, 0], ["a", "b", "b", "c", "c"])
    assert alone["test"] == "McNemar, exact"
    assert alone["p"] == alone["p_mcnemar"] == mcnemar(1, 2)
    together = paired([1, 1, 0, 1, 0], ["a", "a", "b", "c", "c"])
    assert together["test"] == "sign flips of pictures, exact"
    assert together["p_mcnemar"] == mcnemar(0, 3)
    assert together["p"] == by_brute_force([2, 1]) == 0.5
    assert "p_mcnemar" not in paired([0.3, 1], ["a", "b"])
    same = paired([0, 0], ["a", "b"])
    assert (same["p"], same["stderr"]) == (1, 0)


def null(draw: np.random.Generator, pictures: int, each: int) -> tuple[list[float], list[str]]:
    """0/1 differences of two equal models whose answers to the questions of a picture go together."""
    leaning = draw.normal(0, 1.5, pictures)
    a, b = (
        draw.random((pictures, each)) < 1 / (1 + np.exp(-leaning * draw.choice([-1, 1], pictures)))[:, None]
        for _ in range(2)
    )
    of = [str(i) for i in range(pictures) for _ in range(each)]
    return (a.astype(float) - b.astype(float)).ravel().tolist(), of


def test_under_the_null_p_is_uniform_over_pictures_and_not_over_questions() -> None:
    draw = np.random.default_rng(11)
    rows = [paired(*null(draw, 60, 12)) for _ in range(300)]
    ours, naive = np.array([[row["p"], row["p_mcnemar"]] for row in rows]).T
    assert stats.kstest(ours, "uniform").pvalue > 0.01
    assert np.mean(ours < 0.05) < 0.09
    assert np.mean(naive < 0.05) > 0.2


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    assert detectable(1.0) == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    draw = np.random.default_rng(5)
    found = []
    for _ in range(400):
        differences = draw.normal(detectable(0.3 / 20), 0.3, 400)
        found.append(normal_p(100 * differences.mean(), 100 * stats.sem(differences)) or 0)
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("lost", [0, 1, 3, 6, 12])
def test_where_few_answers_changed_the_detectable_difference_is_found_as_often(lost: int) -> None:
    n, draw = 300, np.random.default_rng(7)
    told = paired([-1.0] * lost + [0.0] * (n - lost), [str(i) for i in range(n)])["detectable"]
    found = [mcnemar(int(draw.binomial(n, told / 100)), 0) < 0.05 for _ in range(2000)]
    assert np.mean(found) > 0.77


def test_normal_p() -> None:
    for value, stderr in ((0.0, 1.0), (1.3, 0.7), (-4.0, 1.1), (30.0, 1.0)):
        wanted = 2 * stats.norm.sf(abs(value / stderr))
        assert normal_p(value, stderr) == pytest.approx(wanted, rel=1e-9)
    assert normal_p(1.0, None) is None
    assert (normal_p(0.0, 0.0), normal_p(1.0, 0.0)) == (1.0, 0.0)


def test_bootstrap_covers_the_truth_and_agrees_with_scipys() -> None:
    draw = np.random.default_rng(2)
    sums, sizes = draw.normal(0.5, 2, 150), draw.integers(1, 9, 150)
    theirs = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        random_state=0,
    ).confidence_interval
    ours = bootstrap95(sums, sizes)
    assert ours == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=1.5)
    assert bootstrap95(sums, sizes) == ours
    assert bootstrap95([1.0], [3]) is None
    covered = []
    for _ in range(200):
        values = draw.normal(0.1, 1, 60)
        low, high = bootstrap95(values, np.ones(60, dtype=int)) or [0, 0]
        covered.append(low <= 10 <= high)
    assert np.mean(covered) > 0.88


@pytest.mark.parametrize(("right", "n"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20), (291, 300)])
def test_wilson_is_scipys_where_each_question_has_a_picture(right: int, n: int) -> None:
    found = wilson95([1.0] * right + [0.0] * (n - right), [str(i) for i in range(n)])
    # The standard error is over n - 1, so that inside there is one draw less.
    draws = n if right in (0, n) else n - 1
    low, high = (draws * right / n + Z95**2 / 2 + sign * Z95 * _root(right / n, draws) for sign in (-1, 1))
    assert found == pytest.approx([100 * end / (draws + Z95**2) for end in (low, high)], abs=1e-6)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert found == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=1e-6 if draws == n else 0.7)


def _root(share: float, draws: int) -> float:
    return math.sqrt(draws * share * (1 - share) + Z95**2 / 4)


def test_wilson_counts_pictures_and_not_their_questions() -> None:
    assert wilson95([1.0] * 20, [str(i // 4) for i in range(20)]) == wilson95([1.0] * 5, list("abcde"))
    once = wilson95([1.0, 1.0, 0.0, 1.0, 0.0] * 8, [str(i) for i in range(40)])
    twice = wilson95([1.0, 1.0, 0.0, 1.0, 0.0] * 16, [str(i % 40) for i in range(80)])
    assert twice == pytest.approx(once, abs=0.3)
    assert wilson95([1.0], ["a"]) is None


def test_the_interval_of_a_mean_adds_in_squares_on_each_side() -> None:
    assert mean95([50.0, 70.0], [[47.0, 53.0], [66.0, 74.0]]) == pytest.approx([57.5, 62.5])
    assert mean95([100.0, 0.0], [[96.0, 100.0], [0.0, 4.0]]) == pytest.approx([48.0, 52.0])
    assert mean95([100.0, 100.0], [[96.0, 100.0], None]) is None


def test_holm() -> None:
    # As R's p.adjust(c(.01, .02, .03, .04, .05), "holm") gives it.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, None, 0.01]) == [0.04, None, 0.02]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps: list[float], level: float) -> None:
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p is not None and p <= level} == rejected


def test_the_largest_sets_take_less_than_a_second() -> None:
    draw = np.random.default_rng(0)
    of = [str(i) for i in draw.integers(0, 3166, 12_578)]
    for differences in (draw.choice(VQA, 12_578) - draw.choice(VQA, 12_578), draw.normal(0, 0.3, 12_578)):
        began = time.process_time()
        paired(differences.tolist(), of)
        assert time.process_time() - began < 2  # 0.6 on a quiet core


def test_an_error_clustered_by_picture_on_a_set_like_gqa() -> None:
    # 12,578 questions on 398 pictures, as in GQA's test-dev: pictures differ in how hard they are.
    draw = np.random.default_rng(7)
    of = np.concatenate([np.arange(398), draw.integers(0, 398, 12_578 - 398)])

    def sample() -> np.ndarray:
        ease = draw.normal(0.5, 0.9, 398)
        return (draw.random(12_578) < 1 / (1 + np.exp(-ease[of]))).astype(float)

    right = sample()
    clustered = significance.clustered_stderr(right.tolist(), [str(i) for i in of])
    residuals = np.bincount(of, weights=right - right.mean())
    sandwich = math.sqrt((residuals**2).sum()) / 12_578  # the cluster-robust error of an intercept alone
    assert clustered == pytest.approx(sandwich, rel=1e-3)
    truth = np.std([sample().mean() for _ in range(400)], ddof=1)
    naive = stats.sem(right)
    assert clustered == pytest.approx(truth, rel=0.15)
    assert naive < 0.6 * truth
