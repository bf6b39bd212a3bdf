from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import Question
from mmtune.experiments import runs
from mmtune.experiments.swap_options import read_swap
from mmtune.experiments.swap_tower import run_swap
from mmtune.parts.model import VisionLanguageModel
from tests.world import FULL, LORA

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 32,
}


def swap_file(place: Path, **changes: Any) -> Path:
    """A swap of two towers, of which one is the base's own and one has another grid."""
    data = [{"path": "datasets/tiny/train_captions.json", "image_root": "datasets/tiny"}]
    train = {"steps": 2, "batch_size": 8, "schedule": "constant", "max_length": 512, "log_every": 1}
    described = {
        "name": "towers",
        "model": {"base": "base"},
        "towers": {
            "same": {"tower": "clip", "weights": "base/vision", "layer": -1},
            "coarse": {"tower": "clip", "config": SMALL, "layer": -1},
        },
        "starts": ["scratch", "fitted"],
        "fit": {"pictures": 20},
        "stages": [
            {
                "name": "align",
                "data": data,
                "tune": {"connector": FULL},
                "train": {**train, "probe": {"samples": 4, "every": 1}},
            },
        ],
        "seeds": [0, 1],
        "control": "coarse",
        "evaluate": {"suite": "tiny", "split": "val", "limit": 4},
        "output": str(place / "runs"),
        **changes,
    }
    path = place / "swap.yaml"
    path.write_text(yaml.safe_dump(described, sort_keys=False))
    return path


def answers(
    model: VisionLanguageModel, protocol: object, questions: Sequence[Question], *_: object
) -> list[list[dict[str, str]]]:
    """Stands in for `answer_in_batches`: the more tokens a model has for a picture, the more is right."""
    right = 1 if model.image_tokens == 4 else 3
    texts = [question.answers[0] if i < right else "nothing" for i, question in enumerate(questions)]
    return [[{"question_id": q.id, "text": text}] for q, text in zip(questions, texts, strict=True)]


class Killed(BaseException):
    """As a power cut: nothing may catch it."""


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A swap that was killed in the middle of its third run and went on: what it wrote, and what it said."""
    place = tmp_path_factory.mktemp("swap")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        patch.setattr("mmtune.evaluation.generate.answer_in_batches", answers)
        patch.setattr("mmtune.experiments.estimate._tried", lambda run: None)
        path = swap_file(place)
        whole = runs._run_one
        begun: list[str] = []

        def killed(run: Any, *rest: Any) -> None:
            if len(begun) == 2:
                raise Killed
            begun.append(run.name)
            whole(run, *rest)

        patch.setattr(runs, "_run_one", killed)
        with pytest.raises(Killed):
            run_swap(path)
        patch.setattr(runs, "_run_one", whole)
        folder = place / "runs" / "towers"
        before = {file: file.stat().st_mtime_ns for name in begun for file in (folder / name).rglob("*")}
        before |= {file: file.stat().st_mtime_ns for file in (folder / "fits").rglob("*")}
        report = run_swap(path)
        kept = {file: file.stat().st_mtime_ns for file in before}
        yield {"path": path, "folder": folder, "report": report, "kept": kept == before, "begun": begun}


def test_it_goes_on_where_it_was_killed_and_touches_nothing_that_is_done(done: dict[str, Any]) -> None:
    assert done["begun"] == ["same_scratch_s0", "same_scratch_s1"]
    assert done["kept"]
    rows = [(row["label"], row["seeds"]) for row in done["report"]["rows"]]
    assert rows == [("same, scratch", [0, 1]), ("same, fitted", [0, 1]), ("coarse, scratch", [0, 1])]
    assert done["report"]["missing"] == []
    for file in ("swap.json", "swap.png", "swap.html", "towers.json", "plan/same_fitted_s1.yaml"):
        assert (done["folder"] / file).is_file()
    assert json.loads((done["folder"] / "swap.json").read_text()) == json.loads(json.dumps(done["report"]))


def test_the_figures_are_those_of_the_runs(done: dict[str, Any]) -> None:
    report, folder = done["report"], done["folder"]
    for row in [report["base"], *report["rows"]]:
        assert row["scores"]["tiny_colour"]["mean"] == (25 if row["label"].startswith("coarse") else 75)
        results = [
            json.loads((folder / name / "eval" / "tiny-val" / "results.json").read_text())["results"]
            for name in row.get("runs", ["base"])
        ]
        scores = [[its[task]["score"] for task in its] for its in results]
        assert row["source"]["mean"] == pytest.approx(fmean(fmean(each[:-1]) for each in scores))
        assert row["target"]["mean"] == pytest.approx(fmean(each[-1] for each in scores))
        assert row["source"]["sd"] == (stdev(fmean(each[:-1]) for each in scores) if row["seeds"] else None)
    same, fitted, coarse = report["rows"]
    assert (same["facts"]["image_tokens"], coarse["facts"]["image_tokens"]) == (16, 4)
    vision = VisionLanguageModel.from_pretrained(folder / "coarse_scratch_s0" / "final").vision
    assert coarse["facts"]["parameters"] == sum(p.numel() for p in vision.parameters())
    assert len(coarse["facts"]["memory"]) == 1 and coarse["facts"]["memory"][0] > 2**29
    lines = [
        json.loads(line) for line in (folder / "same_fitted_s0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert fitted["curves"][0] == [(line["step"], line["probe_loss"]) for line in lines if line["stage"] == 1]
    speeds = [
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[1])["samples_per_s"]
        for name in same["runs"]
    ]
    assert same["samples_per_s"] == pytest.approx(fmean(speeds))  # of the second of two steps
    assert fitted["fit"]["r2"]["image_tokens"] > 0.99 and same["fit"] is None
    assert [(p["a"], p["b"]) for p in report["compared"]["control"]] == [("same, scratch", "coarse, scratch")]
    assert "the base's tower makes 16 features" in report["uncontrolled"]["same, fitted"]
    assert report["made_with"]["without_pictures"] == ["tiny_text"]
    assert [p["b"] for p in report["compared"]["base"]] == ["base"] * 3
    assert report["compared"]["base"][2]["tasks"]["tiny_colour"]["difference"] == -50
    against = report["compared"]["control"][0]["source"]
    assert against["difference"] == pytest.approx(same["source"]["mean"] - coarse["source"]["mean"])
    assert [(p["a"], p["b"]) for p in report["compared"]["starts"]] == [("same, fitted", "same, scratch")]
    assert set(report["saved"]) == {"same"} and len(report["saved"]["same"]) == 2
    for saved, old, new in zip(report["saved"]["same"], same["curves"], fitted["curves"], strict=True):
        assert (saved["last_loss"], saved["first_loss"]) == (old[-1][1], new[0][1])


def test_the_fitted_start_is_where_it_says(done: dict[str, Any]) -> None:
    """The base's own tower: the fitted connector is the base's, which the new one is not."""
    same, fitted, _ = done["report"]["rows"]
    assert fitted["curves"][0][0][1] != pytest.approx(same["curves"][0][0][1], abs=1e-3)
    assert fitted["curves"][0][0][1] == pytest.approx(fitted["curves"][1][0][1], abs=0.05)
    weights = yaml.safe_load((done["folder"] / "plan" / "same_fitted_s0.yaml").read_text())["model"]
    assert weights["connector"]["weights"] == str(done["folder"] / "fits" / "same")


def test_the_report_alone_names_what_is_missing(
    done: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(world)
    shutil.copytree(done["folder"].parent, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "towers" / "same_fitted_s1" / "eval")
    output = f"output={tmp_path / 'runs'}"
    assert main(["swap-tower", str(done["path"]), "--report", output]) == 0
    said = capsys.readouterr().out
    assert "WARNING: not finished, so not in here: same_fitted_s1" in said
    assert "WARNING: coarse starts from scratch alone: the base's tower makes 16 features" in said
    assert main(["swap-tower", str(done["path"]), "--report", "output=elsewhere"]) == 2
    assert "this swap has not begun" in capsys.readouterr().err
    # What is another tower, training or evaluation by now is refused by name, and nothing is overwritten.
    page = tmp_path / "runs" / "towers" / "swap.html"
    page.write_text("the one before")
    for change, said in (
        (
            "towers.third={tower: clip, weights: base/vision, layer: -1}",
            "towers.third: not planned yet: third",
        ),
        ("stages.0.train.batch_size=4", "stages.0.train.batch_size (8 before, 4 now)"),
        ("evaluate.limit=3", "base: it was evaluated with another limit: 4, where 3 is asked for"),
        ("evaluate.dtype=bfloat16", "another dtype: float32, where bfloat16 is asked for"),
    ):
        assert main(["swap-tower", str(done["path"]), "--report", output, change]) == 2
        assert said in capsys.readouterr().err
    assert page.read_text() == "the one before"
    fewer = "towers={same: {tower: clip, weights: base/vision, layer: -1}}"
    assert main(["swap-tower", str(done["path"]), "--report", output, fewer, "control=null"]) == 0
    assert "coarse" not in capsys.readouterr().out


def test_the_plan_is_a_list_of_commands_that_train_takes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A language model without a base: its first tower and connector, from scratch."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("mmtune.evaluation.generate.answer_in_batches", answers)
    path = swap_file(
        tmp_path,
        model={"language": {"weights": "base/language"}},
        connector={"kind": "linear"},
        towers={"coarse": {"tower": "clip", "config": SMALL, "layer": -1}},
        starts=["scratch"],
        seeds=[3],
    )
    described = yaml.safe_load(path.read_text())
    described["stages"].append({**described["stages"][0], "name": "tune", "tune": {"language": LORA}})
    path.write_text(yaml.safe_dump(described))
    assert main(["swap-tower", str(path), "--plan"]) == 0
    train, report = capsys.readouterr().out.splitlines()
    plan = tmp_path / "runs" / "towers" / "plan" / "coarse_scratch_s3.yaml"
    assert train == f"mmtune train {plan} --resume"
    assert main(train.split()[1:]) == 0
    capsys.readouterr()
    assert main(report.split()[1:]) == 0
    said = capsys.readouterr().out
    assert len(json.loads((plan.parents[1] / "swap.json").read_text())["rows"][0]["facts"]["memory"]) == 2
    assert "coarse" in said and "base" not in said.split("What they cost")[0]


def test_all_faults_of_all_towers_come_at_once_before_anything_trains(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    towers = {
        "odd": {"tower": "klip", "weights": "base/vision"},
        "both": {"tower": "clip", "weights": "base/vision", "config": SMALL, "layer": -1},
    }
    with pytest.raises(UserError) as caught:
        run_swap(swap_file(tmp_path, towers=towers, control=None))
    where = [fault.where.split(", ")[1:] for fault in caught.value.faults]
    lines = (tmp_path / "swap.yaml").read_text().splitlines()
    assert where == [
        [f"line {lines.index('    tower: klip') + 1}", "towers.odd.tower"],
        [f"line {lines.index('  both:') + 1}", "towers.both"],
    ]

    towers = {
        "absent": {"tower": "clip", "weights": "nowhere"},
        "deep": {"tower": "clip", "weights": "base/vision", "layer": -9},
        "coarse": {"tower": "clip", "config": SMALL, "layer": -1},
    }
    with pytest.raises(UserError) as caught:
        run_swap(swap_file(tmp_path, towers=towers, starts=["fitted"], stages=[_long()]))
    said = "\n".join(str(fault) for fault in caught.value.faults)
    for words in (
        "towers.absent",
        "towers.deep: ",
        "layer -9 of a tower with 1 layers",
        "no connector can be fitted to it: the base's tower makes 16 features of a picture, this one 4",
        "more than max_length 8",
    ):
        assert words in said
    assert not (tmp_path / "runs").exists()


def _long() -> dict[str, Any]:
    data = [{"path": "datasets/tiny/train_captions.json", "image_root": "datasets/tiny"}]
    return {
        "data": data,
        "tune": {"connector": FULL},
        "train": {"steps": 1, "batch_size": 8, "max_length": 8},
    }


def test_faults_of_the_swap_itself(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    for changes, said in (
        ({"control": "none"}, "no tower is called 'none'"),
        ({"seeds": [1, 1]}, "one is given twice"),
        ({"towers": {"base": {"tower": "clip"}}, "control": None}, "no tower can be called 'base'"),
        ({"seeds": [0, -1]}, "seeds.1: expected 0 to"),
        ({"stages": [{**_long(), "tune": {"connector": FULL, "language": LORA}}]}, "not the language"),
        ({"stages": [{**_long(), "tune": {}}]}, "its connector is frozen"),
        ({"connector": {"kind": "linear", "weights": "base/connector"}}, "starts anew here, or is fitted"),
        ({"towers": {"a/b": {}}}, "'a/b' cannot be the name of a folder"),
        ({"model": {"language": {"weights": "base/language"}}}, "there is no base whose image tokens"),
        ({"model": {"base": "base", "vision": {}}}, "'vision' is what is swapped"),
        ({"fit": {"pictures": 3}}, "expected 10 or more, found 3"),
        ({"evaluate": {"suite": "tiny", "kl": True}}, "there is no base model to go back to"),
    ):
        with pytest.raises(UserError) as caught:
            read_swap(swap_file(tmp_path, **changes))
        assert said in str(caught.value)
    with pytest.raises(UserError) as caught:
        read_swap(swap_file(tmp_path, towers={}))
    assert [fault.what for fault in caught.value.faults] == ["empty: there is nothing to run"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a swap starts in one process"):
        run_swap(swap_file(tmp_path))
