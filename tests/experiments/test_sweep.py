from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.experiments.sweep import read_sweep, run_sweep, without_copies
from tests.world import FULL, LORA, run_file


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return tmp_path


def sweep_file(world: Path, place: Path, grid: dict[str, Any], **changes: Any) -> Path:
    run_file(world, place / "one", "run", train={"steps": 1})
    described = {
        "name": "grid",
        "run": "one/run.yaml",
        "base": str(world / "base"),
        "grid": grid,
        "suite": "tiny",
        "split": "val",
        "choose": "mean",
        "output": str(place / "runs"),
        **changes,
    }
    path = place / "sweep.yaml"
    path.write_text(yaml.safe_dump(described, sort_keys=False))
    return path


def test_a_grid_is_every_combination(world: Path, place: Path) -> None:
    grid = {"tune.language.lr": [1e-3, 2e-5], "seed": [0, 1], "tune.connector.penalty": [None]}
    _, runs = read_sweep(sweep_file(world, place, grid))
    names = [run.name for run in runs]
    assert names == [f"lr{lr}_seed{seed}_penaltyNone" for lr in ("0.001", "2e-05") for seed in (0, 1)]
    for run, (lr, seed) in zip(runs, [(1e-3, 0), (1e-3, 1), (2e-5, 0), (2e-5, 1)], strict=True):
        assert run.tune
        assert (run.tune.language.lr, run.seed) == (lr, seed)
        assert run.tune.language.rank == LORA["rank"]
        assert (run.tune.connector.lr, run.tune.connector.penalty) == (FULL["lr"], None)
        assert run.folder == place / "runs" / "grid" / run.name


def test_keys_that_end_alike_are_told_apart(world: Path, place: Path) -> None:
    grid = {"tune.connector.lr": [1e-3], "tune.language.lr": [1e-4], "seed": [0]}
    _, runs = read_sweep(sweep_file(world, place, grid))
    assert [run.name for run in runs] == ["connector_lr0.001_language_lr0.0001_seed0"]


def test_several_keys_may_share_a_value(world: Path, place: Path) -> None:
    grid = {"tune.connector.lr, tune.language.lr": [1e-3, 1e-4]}
    _, runs = read_sweep(sweep_file(world, place, grid))
    assert [run.name for run in runs] == ["lr0.001", "lr0.0001"]
    for run, rate in zip(runs, (1e-3, 1e-4), strict=True):
        assert run.tune
        assert (run.tune.connector.lr, run.tune.language.lr) == (rate, rate)


def test_faults_of_the_sweep_and_of_its_runs(world: Path, place: Path) -> None:
    with pytest.raises(UserError, match="no values"):
        read_sweep(sweep_file(world, place, {"seed": []}))
    with pytest.raises(UserError, match="unknown key 'ranc'"):
        read_sweep(sweep_file(world, place, {"tune.language.ranc": [1]}))
    with pytest.raises(UserError, match="same name"):
        read_sweep(sweep_file(world, place, {"tune.language.lr": [1e-3, 1.0000001e-3]}))


def test_a_sweep_skips_what_is_done_and_ends_in_a_report(
    world: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(world, place, {"tune.language.lr": [0.0, 1e-2]})
    assert main(["sweep", str(path)]) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    folder = place / "runs" / "grid"
    report = json.loads((folder / "report" / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["lr0", "lr0.01"]
    assert report["made_with"]["split"] == "val"
    best = max(report["runs"], key=lambda run: run["mean"])["name"]
    assert said.out.splitlines()[-1] == f"best: {best}"

    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if "report" not in file.parts}
    kept = {file: time for file, time in kept.items() if file.is_file()}
    assert main(["sweep", str(path)]) == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept

    # A run that was changed since is not passed off as the one that lies there.
    run_file(world, place / "one", "run", train={"steps": 1, "clip": 0.5})
    assert main(["sweep", str(path)]) == 2
    assert "in: train.clip (1.0 before, 0.5 now)" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_runs_may_be_named_one_by_one_with_seeds(world: Path, place: Path) -> None:
    run_file(world, place / "two", "other", train={"steps": 2})
    named = {"slow": {"tune.language.lr": 1e-5}, "frozen": {"run": "two/other.yaml", "tune.connector": {}}}
    path = sweep_file(world, place, {}, runs=named, seeds=[3, 5])
    _, runs = read_sweep(path)
    assert [(run.name, run.seed) for run in runs] == [
        ("slow_s3", 3),
        ("slow_s5", 5),
        ("frozen_s3", 3),
        ("frozen_s5", 5),
    ]
    slow, frozen = runs[0], runs[2]
    assert slow.tune and slow.train and frozen.tune and frozen.train
    assert (slow.tune.language.lr, slow.train.steps) == (1e-5, 1)
    assert (frozen.tune.connector.tuner, frozen.train.steps) == ("frozen", 2)


def test_nothing_is_chosen_on_test_and_every_faulty_run_is_named(world: Path, place: Path) -> None:
    with pytest.raises(UserError, match="a choice made on test"):
        read_sweep(sweep_file(world, place, {"seed": [0]}, split="test"))
    with pytest.raises(UserError, match="either 'grid' or 'runs'"):
        read_sweep(sweep_file(world, place, {"seed": [0]}, runs={"a": {}}))
    with pytest.raises(UserError, match="'run' is missing"):
        read_sweep(sweep_file(world, place, {"seed": [0]}, run=None))
    with pytest.raises(UserError, match="a seed is given twice"):
        read_sweep(sweep_file(world, place, {}, runs={"a": {}}, seeds=[1, 1]))
    with pytest.raises(UserError, match="'a/b' cannot be the name of a folder"):
        read_sweep(sweep_file(world, place, {"seed": [0]}, name="a/b"))
    with pytest.raises(UserError, match="no run of a sweep can be called base, report"):
        read_sweep(sweep_file(world, place, {}, runs={"report": {}, "fine": {}, "base": {"seed": 1}}))
    with pytest.raises(UserError, match="expected a whole number, found '2026-01-01'"):
        read_sweep(sweep_file(world, place, {"train.steps": [date(2026, 1, 1)]}))
    runs = {"a": {"tune.language.ranc": 1}, "b": {"train.clip": -1}, "c": {}}
    with pytest.raises(UserError) as caught:
        read_sweep(sweep_file(world, place, {}, runs=runs, seeds=[0, 1]))
    assert [fault.where.split(": ")[0].rpartition(", ")[2] for fault in caught.value.faults] == ["a", "b"]


def test_side_by_side_gives_the_same_and_one_failure_stops_no_other(
    world: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"good": {"seed": 0}, "bad": {"tune.language.targets": ["nowhere"]}, "fine": {"seed": 1}}
    alone = sweep_file(world, place, {}, name="alone", runs={name: runs[name] for name in ("good", "fine")})
    assert main(["sweep", str(alone)]) == 0
    both = sweep_file(world, place, {}, name="both", runs=runs)
    assert main(["sweep", str(both), "jobs=2"]) == 2
    said = capsys.readouterr()
    assert "'nowhere' is no" in said.err and "bad" in said.err and "Traceback" not in said.err
    assert "3 of 3" in said.out and "bad FAILED" in said.out
    folder = place / "runs" / "both"
    assert "What trains" in (folder / "logs" / "good.log").read_text()
    for name in ("good", "fine"):
        results = [
            json.loads((place / "runs" / which / name / "eval" / "tiny-val" / "results.json").read_text())
            for which in ("alone", "both")
        ]
        assert results[0]["results"] == results[1]["results"]
        assert results[0]["model_hash"] == results[1]["model_hash"]


def test_runs_of_one_config_and_seed_are_run_once(world: Path, place: Path) -> None:
    runs = {"a": {"tune.language.lr": 0.002}, "b": {"train.log_every": 3}, "c": {"tune.language.lr": 2e-3}}
    _, read = read_sweep(sweep_file(world, place, {}, runs={**runs, "same": {}}, seeds=[0, 1]))
    kept, lines = without_copies(read)
    assert [run.name for run in kept] == ["a_s0", "a_s1", "b_s0", "b_s1"]
    assert [line.split(",")[0] for line in lines] == [
        f"{copy}_s{seed} is the same as {first}_s{seed}"
        for copy, first in (("c", "a"), ("same", "b"))
        for seed in (0, 1)
    ]


def test_runs_that_the_report_would_refuse_are_told_of_first(
    world: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(world / "base", place / "other")
    (other / "language" / "note.txt").write_text("This makes it another model.")
    runs: dict[str, Any] = {"same": {}, "other": {"model.base": str(other)}}
    assert main(["sweep", str(sweep_file(world, place, {}, runs=runs))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mmtune: other: it starts from model") and "but the sweep's base is" in said
    vision = {"tower": "clip", "weights": str(world / "base" / "vision"), "layer": -1}
    runs = {"made": {"model": {"base": str(world / "base"), "vision": vision}}}
    assert main(["sweep", str(sweep_file(world, place, {}, runs=runs, attribution=True))]) == 2
    assert "no base model whose parts could be put back" in capsys.readouterr().err
    assert not (place / "runs" / "grid" / "base").exists()


def test_the_way_from_the_base_and_the_kl_are_measured_too(world: Path, place: Path) -> None:
    path = sweep_file(world, place, {"seed": [0]}, scales=[0.5], kl=True)
    (group,) = run_sweep(path)["groups"]
    assert [each["scale"] for each in group["scales"]] == [0.5]
    assert group["kl"]["tiny_colour"]["mean"] >= 0
    with pytest.raises(UserError, match="expected 0 to 1, found 2"):
        read_sweep(sweep_file(world, place, {"seed": [0]}, scales=[2]))


def test_one_after_the_other_a_failure_stops_no_other(
    world: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"bad": {"tune.language.targets": ["nowhere"]}, "good": {"seed": 0}, "copy": {"seed": 0}}
    assert main(["sweep", str(sweep_file(world, place, {}, runs=runs))]) == 2
    said = capsys.readouterr().err
    assert "bad FAILED" in said and "'nowhere' is no" in said and "Traceback" not in said
    assert "copy is the same as good" in said
    folder = place / "runs" / "grid"
    assert (folder / "good" / "eval" / "tiny-val" / "results.json").is_file()
    assert not (folder / "copy").exists()
