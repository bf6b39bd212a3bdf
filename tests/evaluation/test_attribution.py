from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.evaluation.report import make_report
from tests.made_up_runs import GROUPS, SOURCE, TASKS, TINY, base_of, level, rewrite, world, write_evaluation

VARIANTS = {"language": "language_off", "connector": "connector_restored"}


def put_back(run: Path, part: str, source: float, target: float, **changes: Any) -> Path:
    """The evaluation of a run with a part put back."""
    folder = run / TINY.folder("test", part)
    write_evaluation(folder, level(source, target), seed=len(run.name), model=run.name)
    rewrite(folder / "results.json", **{"restored": part, "base_hash": "base model", **changes})
    return folder


def reported(tmp_path: Path, base: Path, runs: list[Path]) -> dict[str, Any]:
    return make_report(base, runs, TINY, "test", tmp_path / "out")


def test_what_was_evaluated_is_reported_and_nothing_else(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    for i, run in enumerate(runs[:2]):
        put_back(run, "language", 90 - i, 26 + i)
    put_back(runs[0], "connector", 45, 60)
    report = reported(tmp_path, base, runs)
    rows = report["runs"]
    assert [set(row.get("attribution", {})) for row in rows] == [
        {"language_off", "connector_restored"},
        {"language_off"},
        set(),
        set(),
    ]
    assert "attribution" not in rows[2] and "attribution" not in report["groups"][1]
    for run, row in zip(runs[:2], rows, strict=False):
        said = read_json(run / TINY.folder("test", "language") / "results.json")["results"]
        made = row["attribution"]["language_off"]
        assert made["scores"] == {task: said[task]["score"] for task in TASKS}
        assert made["source"] == pytest.approx(fmean(said[task]["score"] for task in SOURCE))
        assert made["target"] == pytest.approx(said["tiny_iconqa"]["score"])
    (group, _) = report["groups"]
    assert set(group["attribution"]) == {"language_off"}
    mine = [row["attribution"]["language_off"] for row in rows[:2]]
    for key in ("source", "target"):
        values = [each[key] for each in mine]
        assert group["attribution"]["language_off"][key] == pytest.approx(
            {"mean": fmean(values), "sd": stdev(values)}
        )
    places = [each["scores"]["tiny_place"] for each in mine]
    assert group["attribution"]["language_off"]["scores"]["tiny_place"]["mean"] == fmean(places)
    assert report["warnings"] == [
        "lora: no mean of connector_restored, which lora_s1 was not evaluated in",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_hash": "an old one"}, "of model an old one, but the run is model lora_s0"),
        ({"base_hash": "other"}, "with a part of model other, but the run started from base model"),
        ({"restored": "connector"}, "the part put back differs: connector, but language for the base"),
        ({"restored": None}, "the part put back differs: None"),
        ({"data": dict.fromkeys(TASKS, "x")}, "tiny_place: the annotation file differs: x"),
    ],
)
def test_stale_and_misplaced_evaluations_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    place = put_back(runs[0], "language", 90, 26, **changes)
    with pytest.raises(UserError) as caught:
        reported(tmp_path, base, runs)
    assert said in str(caught.value)
    assert {fault.where for fault in caught.value.faults} == {str(place)}
    if "hash" in "".join(changes):
        command = f"mmtune eval --model {runs[0]}/final --restore language --suite tiny --output_path {place}"
        assert command in str(caught.value)


def test_an_evaluation_with_a_part_put_back_is_not_taken_for_the_runs_own(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    rewrite(runs[1] / TINY.folder("test") / "results.json", restored="language", base_hash="base model")
    with pytest.raises(UserError, match="the part put back differs: language, but None for the base"):
        reported(tmp_path, base, runs)


def test_circumstances_of_a_restored_evaluation_are_warned_of(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    put_back(runs[0], "language", 90, 26, precision="bfloat16")
    assert reported(tmp_path, base, runs)["warnings"] == [
        "lora_s0 with language put back was evaluated with other precision than the base: "
        "bfloat16 instead of float32"
    ]
