"""A run at several parts of the way from its base, as a report reads it."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmtune.core.errors import UserError
from mmtune.evaluation.frontier import frontier_legend
from mmtune.evaluation.report import make_report
from mmtune.evaluation.scales import scale_group
from mmtune.evaluation.terminal import print_report
from tests.made_up_runs import TINY, base_of, level, rewrite, world, write_evaluation

GROUPS = {"lora": (40.0, 67.0), "lorasculpt": (80.0, 62.0)}


def write_scale(run: Path, scale: float, source: float, target: float) -> Path:
    place = run / TINY.folder("test", scale=scale)
    write_evaluation(place, level(source, target), seed=int(100 * scale), model=run.name)
    rewrite(place / "results.json", scale=scale, base_hash="base model")
    return place


def test_the_way_is_in_the_report(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    for run in runs[:2]:
        write_scale(run, 0.75, 60, 60)
        write_scale(run, 0.25, 96, 30)
    write_scale(runs[0], 0.5, 80, 50)  # of one seed alone: no mean
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    first = report["runs"][0]
    assert [one["scale"] for one in first["scales"]] == [0.25, 0.5, 0.75]
    for one in first["scales"]:
        scores = one["scores"]
        assert one["source"] == pytest.approx(sum(scores[task] for task in TINY.source) / len(TINY.source))
        assert one["target"] == scores["tiny_iconqa"]
    group = report["groups"][0]
    assert [one["scale"] for one in group["scales"]] == [0.25, 0.75]
    each = [row["scales"][0]["source"] for row in report["runs"][:2]]
    assert group["scales"][0]["source"]["mean"] == pytest.approx(sum(each) / 2)
    assert "scales" not in report["groups"][1] and "scales" not in report["runs"][2]
    console = Console(file=StringIO(), width=100)
    print_report(report, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    table = printed[printed.index("Part of the way") : printed.index("Could it be chance")]
    at = group["scales"][1]
    assert f"{at['source']['mean']:.1f} / {at['target']['mean']:.1f}" in table
    assert "lorasculpt" not in table
    assert "its dots are 0.25, 0.75 of the way" in " ".join(frontier_legend(report))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Part of the way" in page and f"{at['target']['mean']:.1f}" in page


def test_a_report_without_scales_has_none_of_it(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert all("scales" not in row for row in (*report["runs"], *report["groups"]))
    assert "Part of the way" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_hash": "older"}, "of another model than the run's"),
        ({"base_hash": "another"}, "another model than the base"),
        ({"scale": None}, "does not say at what scale"),
        ({"decoding": {"max_new_tokens": 3}}, "decoding differs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_scale_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    rewrite(write_scale(runs[0], 0.5, 80, 50) / "results.json", **changes)
    with pytest.raises(UserError, match=said):
        make_report(base, runs, TINY, "test", tmp_path / "out")


def test_a_scaled_evaluation_is_no_runs_own(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    rewrite(runs[0] / TINY.folder("test") / "results.json", scale=0.5)
    with pytest.raises(UserError, match=r"the scale differs: 0\.5, but None for the base"):
        make_report(base, runs, TINY, "test", tmp_path / "out")


def test_kl_is_averaged_over_seeds(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    for run, kl in zip(runs, (0.1, 0.3, 0.2), strict=False):
        path = run / TINY.folder("test") / "results.json"
        results = json.loads(path.read_text())["results"]
        for task in results:
            results[task] |= {"kl": kl, "kl_stderr": 0.01}
        rewrite(path, results=results)
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert report["runs"][1]["scores"]["tiny_place"]["kl"] == 0.3
    assert report["groups"][0]["kl"]["tiny_place"]["mean"] == pytest.approx(0.2)
    assert report["groups"][1]["kl"] == {}  # one of its seeds was not measured


def test_of_no_runs_scales_there_is_no_mean() -> None:
    assert scale_group([{}, {"scales": []}]) == []
