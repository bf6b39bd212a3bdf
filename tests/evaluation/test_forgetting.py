from __future__ import annotations

import math
import random
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.forgetting import (
    Answer,
    ci95,
    group_by_config,
    harmonic_mean,
    label_of,
    mean_sd,
    paired_drop,
    retention,
    seed_mean,
    series_of,
    stderr_of_mean,
    summary,
)

SOURCE, TARGET = ["okvqa", "ocrvqa", "gqa", "textvqa"], ["iconqa"]


@pytest.mark.parametrize(
    ("row", "source", "mean"),
    [
        # LoRASculpt on IconQA as its authors report it, and an independent rerun of it.
        ((53.52, 59.50, 57.63, 53.76, 85.26), 56.10, 70.68),
        ((52.71, 54.70, 56.34, 51.64, 86.26), 53.85, 70.05),
    ],
)
def test_published_rows(row: tuple[float, ...], source: float, mean: float) -> None:
    made = summary(dict(zip([*SOURCE, *TARGET], row, strict=True)), SOURCE, TARGET)
    assert made["source"] == pytest.approx(source, abs=0.0051)
    assert made["target"] == row[-1]
    assert made["mean"] == pytest.approx(mean, abs=0.0051)
    assert made["o_mean"] == pytest.approx(sum(row) / 5)
    assert made["harmonic_mean"] == pytest.approx(
        2 * made["source"] * made["target"] / (made["source"] + made["target"])
    )


@given(st.floats(1e-6, 100), st.floats(1e-6, 100))
def test_harmonic_mean_lies_between_the_smaller_and_the_mean(a: float, b: float) -> None:
    assert min(a, b) * (1 - 1e-12) <= harmonic_mean(a, b) <= (a + b) / 2 * (1 + 1e-12)


@given(st.floats(0, 100))
def test_harmonic_mean_is_zero_where_either_is(a: float) -> None:
    assert harmonic_mean(a, 0) == harmonic_mean(0, a) == 0


def test_error_of_source_is_that_of_independent_sets() -> None:
    assert stderr_of_mean([3.0, 4.0]) == pytest.approx(2.5)
    assert stderr_of_mean([1.0] * 4) == pytest.approx(0.5)
    assert stderr_of_mean([1.0, None]) is None
    draws = np.random.default_rng(0).normal(0, [0.5, 1.0, 2.0], size=(200_000, 3)).mean(axis=1)
    assert stderr_of_mean([0.5, 1.0, 2.0]) == pytest.approx(draws.std(), rel=0.01)


def test_interval() -> None:
    assert ci95(50.0, 1.0) == pytest.approx([48.040036, 51.959964])
    assert ci95(50.0, None) is None


def answers(scores: list[float], clusters: list[str] | None = None) -> dict[str, Answer]:
    names = clusters or [f"picture {i}" for i in range(len(scores))]
    return {str(i): Answer(score, name) for i, (score, name) in enumerate(zip(scores, names, strict=True))}


def test_drop_by_hand() -> None:
    drop, stderr = paired_drop(answers([1, 1, 1, 0]), answers([1, 0, 0.5, 1]), "t")
    differences = [0, 1, 0.5, -1]
    assert drop == pytest.approx(12.5)
    assert stderr == pytest.approx(100 * stdev(differences) / 2)


def test_drop_of_equal_answers_is_certain_however_uncertain_the_scores() -> None:
    same = answers([1, 0] * 10)
    assert paired_drop(same, same, "t") == (0, 0)


def test_error_of_a_drop_agrees_with_a_bootstrap_over_pictures() -> None:
    draw = random.Random(0)
    base, tuned, clusters = [], [], []
    for picture in range(150):
        hard = draw.random()  # questions about one picture are lost together
        for _ in range(4):
            base.append(float(draw.random() < 0.9))
            tuned.append(float(draw.random() < hard))
            clusters.append(str(picture))
    _, stderr = paired_drop(answers(base, clusters), answers(tuned, clusters), "t")
    by_picture = (np.array(base) - np.array(tuned)).reshape(150, 4).mean(axis=1)
    resampled = np.random.default_rng(0).choice(by_picture, size=(20_000, 150)).mean(axis=1)
    assert stderr == pytest.approx(100 * resampled.std(), rel=0.05)
    _, naive = paired_drop(answers(base), answers(tuned), "t")
    assert stderr is not None and naive is not None and stderr > 1.2 * naive


def test_interval_of_a_drop_covers_the_truth_in_about_95_of_100_worlds() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        base = (draw.random(300) < 0.8).astype(float)
        tuned = base * (draw.random(300) < 0.75)  # a quarter of what was known is lost: 20 points
        interval = ci95(*paired_drop(answers(base.tolist()), answers(tuned.tolist()), "t"))
        assert interval is not None
        covered += interval[0] <= 20 <= interval[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_different_questions_cannot_be_paired() -> None:
    with pytest.raises(UserError, match="different questions: 2"):
        paired_drop(answers([1, 0]), answers([1, 0, 1]), "t")


def test_retention() -> None:
    assert retention(80, 60) == 0.75
    assert retention(0, 10) is None


def test_mean_and_sd_of_seeds() -> None:
    assert mean_sd([60.0, 62.0, 67.0]) == pytest.approx({"mean": 63.0, "sd": math.sqrt(13)})
    assert mean_sd([60.0]) == {"mean": 60.0, "sd": None}


def test_mean_over_seeds_is_taken_question_by_question() -> None:
    mean = seed_mean([answers([1, 0, 0.5]), answers([0, 0, 1])], "t")
    assert [answer.score for answer in mean.values()] == [0.5, 0, 0.75]
    with pytest.raises(UserError, match="different questions"):
        seed_mean([answers([1]), answers([1, 0])], "t")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lora_s0", "lora"),
        ("lora-s1", "lora"),
        ("lora_seed2", "lora"),
        ("lora_s12", "lora"),
        ("loras2", "loras2"),
        ("lora_steps3", "lora_steps3"),
        ("lora", "lora"),
    ],
)
def test_label(name: str, label: str) -> None:
    assert label_of(name) == label


def test_groups_are_what_differs_in_the_seed_alone() -> None:
    def config(name: str, seed: int, lr: float = 1e-3) -> dict[str, object]:
        return {"name": name, "seed": seed, "output": name, "evaluate": seed, "tune": {"lr": lr}}

    configs = {
        "b_s1": config("b_s1", 1),
        "b_s0": config("b_s0", 0),
        "c": config("c", 0, lr=1e-4),
        "d_s0": config("d_s0", 0, lr=1e-2),
        "d_s1": config("d_s1", 1, lr=1e-1),
    }
    data = dict.fromkeys(configs, "hash")
    groups = group_by_config(configs, data)
    assert groups == [("b", ["b_s0", "b_s1"]), ("c", ["c"]), ("d_s0", ["d_s0"]), ("d_s1", ["d_s1"])]
    other = group_by_config(configs, data | {"b_s1": "other data"})
    assert [names for _, names in other][:2] == [["b_s1"], ["b_s0"]]
    with pytest.raises(UserError, match="c, e have the same config, and seeds 0, 0"):
        group_by_config(configs | {"e": config("e", 0, lr=1e-4)}, data | {"e": "hash"})


def test_means_do_not_depend_on_the_order_of_tasks() -> None:
    draw = random.Random(0)
    scores = {task: draw.uniform(0, 100) for task in [*SOURCE, *TARGET]}
    back = summary(dict(reversed(scores.items())), SOURCE[::-1], TARGET)
    assert back == summary(scores, SOURCE, TARGET)
    assert back["source"] == fmean(scores[task] for task in SOURCE)


def test_series_are_groups_that_differ_in_one_number_alone() -> None:
    def config(tuner: str, lr: float, **more: Any) -> dict[str, Any]:
        return {"name": f"{tuner} {lr}", "seed": 0, "tune": {"language": {"tuner": tuner, "lr": lr, **more}}}

    configs = {
        "high": config("lora", 2e-3),
        "low": config("lora", 5e-5),
        "else": config("lora", 1e-3, rank=8),
        "middle": config("lora", 2e-4),
        "sculpt": config("lorasculpt", 1e-4),
        "sculpt high": config("lorasculpt", 2e-3),
        "on": config("full", 1e-3, flag=True),
        "off": config("full", 1e-3, flag=False),
        "none": config("full", 1e-3, flag=None),
    }
    assert series_of(configs) == [{"key": "tune.language.lr", "labels": ["low", "middle", "high"]}]
    del configs["low"]
    assert series_of(configs) == []
