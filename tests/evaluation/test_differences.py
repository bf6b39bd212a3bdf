from __future__ import annotations

from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from mmtune.core.errors import UserError
from mmtune.evaluation.differences import between, changes, paired_answers
from mmtune.evaluation.forgetting import Answer
from mmtune.evaluation.significance import holm, paired


def answers(seed: int, share: float, n: int = 120) -> dict[str, Answer]:
    right = np.random.default_rng(seed).random(n) < share
    return {str(i): Answer(float(r), f"picture {i // 2}") for i, r in enumerate(right)}


BASE = {"a": answers(1, 0.9), "b": answers(2, 0.8), "c": answers(3, 0.5), "t": answers(4, 0.2)}
RUN = {"a": answers(5, 0.6), "b": answers(6, 0.75), "c": answers(7, 0.5), "t": answers(8, 0.7)}


def test_a_run_against_its_base() -> None:
    row = changes(BASE, RUN, ["a", "b", "c"], ["t"])
    for task in BASE:
        differences = [RUN[task][i].score - BASE[task][i].score for i in BASE[task]]
        alone = paired(differences, [answer.cluster for answer in BASE[task].values()])
        assert {key: row["tasks"][task][key] for key in alone} == alone
    together = [row["tasks"][task]["p"] for task in ("a", "b", "c")]
    assert [row["tasks"][task]["p_holm"] for task in ("a", "b", "c")] == holm(together)
    assert row["tasks"]["t"]["p_holm"] == row["tasks"]["t"]["p"] == row["target"]["p"]
    source = row["source"]
    assert source["difference"] == pytest.approx(fmean(row["tasks"][task]["difference"] for task in "abc"))
    stderr = sum(row["tasks"][task]["stderr"] ** 2 for task in "abc") ** 0.5 / 3
    assert source["stderr"] == pytest.approx(stderr)
    sums = [
        sum(RUN[task][i].score - BASE[task][i].score for i in (str(2 * pair), str(2 * pair + 1)))
        for task in "abc"
        for pair in range(60)
    ]
    signs = np.random.default_rng(3).choice([-1, 1], (20_000, len(sums)))
    by_chance = np.mean(abs(signs @ np.array(sums)) >= abs(sum(sums)) - 1e-9)
    assert source["p"] == pytest.approx(by_chance, abs=0.005)
    assert source["detectable"] == pytest.approx(2.8016 * stderr, rel=1e-4)


def test_few_changed_answers_are_no_certainty_about_the_source() -> None:
    base = {task: {str(i): Answer(1.0, str(i)) for i in range(50)} for task in ("a", "b", "t")}
    run = {task: dict(its) for task, its in base.items()}
    for i in "01":
        run["a"][i] = run["b"][i] = Answer(0.0, i)
    row = changes(base, run, ["a", "b"], ["t"])
    assert row["source"]["p"] == stats.binomtest(0, 4).pvalue == 0.125
    assert row["source"]["detectable"] == pytest.approx(7.906)
    unchanged = changes(base, base, ["a", "b"], ["t"])["source"]
    assert (unchanged["p"], unchanged["difference"]) == (1.0, 0.0)
    assert unchanged["detectable"] == pytest.approx(7.906)


def test_other_questions_are_refused() -> None:
    with pytest.raises(UserError, match="different questions"):
        paired_answers(answers(1, 0.5), answers(1, 0.5, n=121), "a")


def test_methods_against_the_best_and_the_first() -> None:
    methods = {
        name: {"s": answers(i, share), "t": answers(i + 9, 0.5)} for i, (name, share) in enumerate(LEVELS)
    }
    runs = {
        name: [{"source": 100 * share + e, "target": 50.0 - e, "mean": 50 * share + 25} for e in (-1, 0, 2)]
        for name, share in LEVELS
    }
    runs["poor"] = runs["poor"][:1]
    found = between(methods, runs, ["s"], ["t"])
    assert (found["best"], found["first"]) == ("best", "first")
    pairs = [(pair["a"], pair["b"]) for pair in found["pairs"]]
    assert pairs == [("first", "best"), ("poor", "best"), ("poor", "first")]
    first, poor, _ = found["pairs"]
    against = changes(methods["best"], methods["first"], ["s"], ["t"])
    assert first["tasks"] == against["tasks"]
    assert [first["source"]["p_holm"], poor["source"]["p_holm"]] == holm(
        [first["source"]["p"], poor["source"]["p"]]
    )
    assert first["source"]["stderr_seeds"] == pytest.approx((2 * stdev([-1, 0, 2]) ** 2 / 3) ** 0.5)
    assert poor["source"]["stderr_seeds"] is None
    assert between({"poor": methods["poor"]}, runs, ["s"], ["t"])["pairs"] == []


LEVELS = [("first", 0.8), ("poor", 0.3), ("best", 0.9)]
