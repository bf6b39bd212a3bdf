from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mmtune.evaluation.forgetting import Answer
from mmtune.evaluation.protocol import Suite
from mmtune.experiments.swap_page import print_swap, warnings, write_swap_page
from mmtune.experiments.swap_picture import draw_swap
from mmtune.experiments.swap_report import _pairs, _scored, _uncontrolled, align_speed, reaches, steps_saved
from mmtune.experiments.swap_words import is_beyond, words

SETS = ["tiny_reading", "tiny_colour", "tiny_shape", "tiny_place", "tiny_text", "tiny_iconqa"]


def made_up(count: int, starts: tuple[str, ...] = ("scratch", "fitted"), seeds: int = 2) -> dict[str, Any]:
    """A report of `count` towers, its numbers drawn."""
    rng = random.Random(count)

    def cell(mean: float, sd: float | None = 1.5) -> dict[str, Any]:
        half = 2 + 3 * rng.random()
        return {"mean": mean, "sd": sd, "ci95": [mean - half, mean + half], "unit": "%"}

    def scored(level: float, sd: float | None = 1.5) -> dict[str, Any]:
        scores = {task: cell(min(97.0, level + rng.uniform(-15, 15)), sd) for task in SETS}
        summary = {which: cell(level + rng.uniform(-3, 3), sd) for which in ("source", "target", "mean")}
        return {"scores": scores, **summary}

    rows = []
    for number in range(count):
        tower = "random" if number == count - 1 else f"a_tower_of_kind_{number}"
        for start in starts:
            if tower == "random" and start == "fitted":
                continue
            slow = 150 if start == "scratch" else 60
            curves = [
                [
                    [step, 0.2 + (4 + rng.random()) * math.exp(-step / slow)]
                    for step in (1, *range(25, 601, 25))
                ]
                for _ in range(seeds)
            ]
            fit = {"pictures": 300, "ridge": 1e-3, "r2": {"preactivations": 0.812, "image_tokens": 0.756}}
            rows.append(
                {
                    "label": f"{tower}, {start}" if len(starts) > 1 else tower,
                    "tower": tower,
                    "start": start,
                    "seeds": list(range(seeds)),
                    "runs": [f"{tower}_{start}_s{seed}" for seed in range(seeds)],
                    **scored(30 + 50 * rng.random(), 1.5 if seeds > 1 else None),
                    "facts": {
                        "image_tokens": 576,
                        "parameters": 303_000_000,
                        "whole": 304_000_000,
                        "connector_parameters": 20_000_000,
                        "memory": [21 << 30, 22 << 30],
                    },
                    "fit": fit if start == "fitted" else None,
                    "samples_per_s": 12.345,
                    "speeds": [12.345] * seeds,
                    "questions_per_s": 67.89,
                    "curves": curves,
                }
            )

    def against(a: str, b: str) -> dict[str, Any]:
        part = {"difference": 8.0, "ci95": [6.0, 10.0], "p_holm": 0.0004, "stderr_seeds": 1.0}
        sets = {task: {**part, "ci95_bootstrap": [5.8, 10.1]} for task in SETS}
        return {"a": a, "b": b, "tasks": sets, "source": part, "target": {**part, "p_holm": 0.2}}

    labels = [row["label"] for row in rows]
    compared = {"control": [against(a, labels[-1]) for a in labels[:-1]]}
    compared["base"] = [against(a, "base") for a in labels]
    if len(starts) > 1:
        compared["starts"] = [against(rows[1]["label"], rows[0]["label"])]
    return {
        "name": "towers",
        "base": {"label": "base", "seeds": [], **scored(70, None)},
        "rows": rows,
        "compared": compared,
        "control": "random",
        "uncontrolled": {},
        "alignment_only": False,
        "saved": {},
        "unanswered": {"random_scratch_s0": 3},
        "unlike": {},
        "missing": ["late_scratch_s1"],
        "no_fit": {"random": "its weights are drawn anew in each run"},
        "jobs": 2,
        "words": ["Other than random on the target: none."],
        "files": {"swap.json": "runs/towers/swap.json"},
        "made_with": {
            "suite": "tiny",
            "splits": dict.fromkeys(SETS, "test"),
            "source": SETS[:-1],
            "target": SETS[-1:],
            "limit": None,
            "without_pictures": ["tiny_text"],
        },
    }


def test_where_a_curve_reaches_a_loss() -> None:
    curve = [(1, 4.0), (10, 2.0), (20, 3.0), (30, 1.0)]
    assert reaches(curve, 5.0) == 1  # at its first look already
    assert reaches(curve, 3.0) == pytest.approx(5.5)
    assert reaches(curve, 2.0) == 10
    assert reaches(curve, 1.5) == pytest.approx(27.5)
    assert reaches(curve, 0.9) is None


def test_what_the_fitted_start_saves() -> None:
    scratch = [(1, 8.0), (50, 4.0), (100, 2.0)]
    fitted = [(1, 3.0), (50, 2.0), (100, 1.0)]
    assert steps_saved(scratch, fitted) == {
        "first": 1,
        "first_loss": 3.0,
        "scratch_at": 75.0,
        "last": 100,
        "last_loss": 2.0,
        "fitted_at": 50.0,
        "fitted_last_loss": 1.0,
    }
    assert steps_saved(fitted, scratch)["fitted_at"] is None


def test_beyond_chance_is_beyond_questions_and_seeds() -> None:
    cell = {"difference": 8.0, "p_holm": 0.01, "stderr_seeds": None}
    assert is_beyond(cell)
    assert not is_beyond({**cell, "p_holm": 0.06})
    assert not is_beyond({**cell, "stderr_seeds": 5.0})
    assert not is_beyond({**cell, "p_holm": None})


def test_in_words() -> None:
    report = made_up(2)
    tower = report["rows"][0]["tower"]
    scratch, fitted = [(1, 8.0), (100, 2.0)], [(1, 5.0), (50, 2.0), (100, 1.0)]
    report["saved"] = {tower: [{"seed": 0, **steps_saved(scratch, fitted)}]}
    said = words(report)
    assert said[:4] == [
        f"Source less random's, beyond chance: {tower}, scratch +8.0 ± 2.0; {tower}, fitted +8.0 ± 2.0.",
        "Source less random's, within it: none.",
        "Target less random's, beyond chance: none.",
        f"Target less random's, within it: {tower}, scratch +8.0 ± 2.0; {tower}, fitted +8.0 ± 2.0.",
    ]
    assert "a loss of 5.000 after step 1, which scratch reaches at step 50" in said[4]
    assert "2.000, at step 50: 50 of 100 steps saved" in said[4]
    assert len(said) == 5


def test_what_scratch_never_reaches_saves_more_than_all_its_steps() -> None:
    report = made_up(2)
    tower = report["rows"][0]["tower"]
    scratch, fitted = [(1, 2.4), (250, 0.303)], [(1, 0.024), (250, 0.006)]
    report["saved"] = {tower: [{"seed": 0, **steps_saved(scratch, fitted)}]}
    assert (
        "More than 250 steps saved: scratch does not reach in 250 steps what the fitted start has after "
        "step 1 (a probe's loss of 0.024 against 0.303 at the end)."
    ) in words(report)[4]


def test_what_no_tower_moves_is_said_of_an_alignment_alone() -> None:
    report = {**made_up(2), "alignment_only": True, "uncontrolled": {"a, fitted": "it has no fitted start"}}
    said = "\n".join(words(report))
    assert "sets without pictures (tiny_text)" in said and "not tuned for (tiny_iconqa). Read Source." in said
    assert "a, fitted is not held against random: it has no fitted start." in said


def test_unlike_starts_are_never_compared() -> None:
    rows = made_up(3)["rows"]  # random has no fitted start
    facts = {"random": {"no_fit": "its weights are drawn anew in each run"}}
    by_start = {start: [row for row in rows if row["start"] == start] for start in ("scratch", "fitted")}
    pairs = _pairs(rows, "random")
    scratch = [row["label"] for row in by_start["scratch"] if row["tower"] != "random"]
    assert pairs["control"] == [(label, "random, scratch") for label in scratch]
    best = {start: max(its, key=lambda row: row["mean"]["mean"])["label"] for start, its in by_start.items()}
    assert sorted(b for _, b in pairs["best"]) == sorted([best["scratch"]] * 2 + [best["fitted"]])
    assert all(a.split(", ")[1] == b.split(", ")[1] for a, b in pairs["best"])
    why = "it has no fitted start (its weights are drawn anew in each run)"
    fitted = [row["label"] for row in by_start["fitted"]]
    assert _uncontrolled(rows, "random", facts) == dict.fromkeys(fitted, why)


def test_speeds_are_medians_and_unlike_ones_are_warned_of(tmp_path: Path) -> None:
    speeds = [3.0, 100.0, 110.0, 4.0, 120.0]  # the first steps are slow, and so was something once
    lines = [{"step": 10 * i, "stage": 1, "samples_per_s": speed} for i, speed in enumerate(speeds)]
    lines.append({"step": 60, "stage": 2, "samples_per_s": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert align_speed(SimpleNamespace(folder=tmp_path)) == 105.0  # type: ignore[arg-type]
    report = made_up(2)
    assert not any("samples/s" in line for line in warnings(report))
    report["rows"][0]["speeds"] = [18.1, 20.0]
    report["rows"][1]["speeds"] = [127.0, 128.0]
    assert any("went at 18.1 to 128 samples/s, for the same work" in line for line in warnings(report))


def test_no_interval_is_a_point_or_past_its_end() -> None:
    suite = Suite("s", ["all", "none"], ["half"])
    given = {"all": [1.0] * 300, "none": [0.0] * 300, "half": [0.0, 1.0] * 150}
    answers = {
        task: {str(i): Answer(score, str(i)) for i, score in enumerate(its)} for task, its in given.items()
    }
    scores = {task: {"score": 100 * fmean(its), "unit": "%"} for task, its in given.items()}
    made = _scored([SimpleNamespace(scores=scores)], answers, suite)  # type: ignore[list-item]
    sure = 300 / (300 + 1.96**2)
    assert made["scores"]["all"]["ci95"] == pytest.approx([100 * sure, 100], abs=1e-3)
    assert made["scores"]["none"]["ci95"] == pytest.approx([0, 100 - 100 * sure], abs=1e-3)
    low, high = made["source"]["ci95"]  # of two sets, each sure on one side
    assert [50 - low, high - 50] == pytest.approx([50 - 50 * sure] * 2, abs=1e-3)


@pytest.mark.parametrize(("count", "starts"), [(2, ("scratch",)), (7, ("scratch", "fitted"))])
def test_picture_page_and_table(tmp_path: Path, count: int, starts: tuple[str, ...]) -> None:
    report = made_up(count, starts)
    report["rows"][0]["label"] = "<script>alert(1)</script>"
    draw_swap(report, tmp_path / "swap.png")
    with Image.open(tmp_path / "swap.png") as picture:
        assert picture.width == 1650 and picture.height > 300 * math.ceil(count / 4)
    write_swap_page(report, tmp_path / "swap.png", tmp_path / "swap.html")
    page = (tmp_path / "swap.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "late_scratch_s1" in page and "drawn anew" in page
    said = Console(file=io.StringIO(), width=120)
    print_swap(report, said)
    text = said.file.getvalue()  # type: ignore[attr-defined]
    for words_ in ("± SD, 2 seeds", "0.756" if len(starts) > 1 else "576", "<0.001", "WARNING: not finished"):
        assert words_ in text
