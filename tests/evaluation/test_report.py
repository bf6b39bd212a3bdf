from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console

from mmtune.core.errors import UserError
from mmtune.evaluation.forgetting import Z95
from mmtune.evaluation.report import make_report
from mmtune.evaluation.terminal import print_report
from tests.made_up_runs import (
    GROUPS,
    SOURCE,
    TASKS,
    TINY,
    base_of,
    level,
    rewrite,
    world,
    write_evaluation,
    write_run,
)


def printed(report: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=80)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_report_json_holds_what_the_evaluations_say(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1, 2))
    (runs[0] / "metrics.jsonl").write_text(
        '{"step": 1, "density_a": 1.0}\n{"step": 2, "density_a": 0.1}\n{"step": 3, "loss": 0.5}\n'
    )
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert [run["name"] for run in report["runs"]] == [run.name for run in runs]
    zero = json.loads((base / "eval/tiny-test/results.json").read_text())["results"]
    for run, row in zip(runs, report["runs"], strict=True):
        said = json.loads((run / "eval/tiny-test/results.json").read_text())["results"]
        scores = {task: said[task]["score"] for task in TASKS}
        source, target = fmean(scores[task] for task in SOURCE), scores["tiny_iconqa"]
        assert row["scores"]["tiny_shape"] == {
            key: said["tiny_shape"][key] for key in ("score", "stderr", "n", "missing", "rule")
        } | {"unit": "%"}
        assert row["source"] == pytest.approx(source)
        assert row["target"] == pytest.approx(target)
        assert row["mean"] == pytest.approx((source + target) / 2)
        assert row["harmonic_mean"] == pytest.approx(2 * source * target / (source + target))
        assert row["o_mean"] == pytest.approx(fmean(scores.values()))
        stderr = sum(said[task]["stderr"] ** 2 for task in SOURCE) ** 0.5 / 5
        assert row["source_stderr"] == pytest.approx(stderr)
        assert row["source_ci95"] == pytest.approx([source - Z95 * stderr, source + Z95 * stderr])
        for task in SOURCE:
            assert row["drop"][task] == pytest.approx(zero[task]["score"] - scores[task])
            assert row["drop_ci95"][task][0] < row["drop"][task] < row["drop_ci95"][task][1]
            assert row["change"]["tasks"][task]["difference"] == pytest.approx(-row["drop"][task])
            assert row["retention"][task] == pytest.approx(scores[task] / zero[task]["score"])
        assert row["tuner"] == "lora"
        assert row["seed"] == int(run.name[-1])
    assert report["runs"][0]["density"] == {"density_a": 0.1}
    assert "density" not in report["runs"][1]
    assert report["base"]["name"] == "base"
    made = report["made_with"]
    assert made["protocols"] == {task: f"protocol {task}" for task in TASKS}
    assert made["config"]["lora_s0"] == "hash of lora_s0"
    assert made["data"]["lora_s0"] == "d"
    assert made["versions"] == {"torch": "2.11"}
    assert (made["suite"], made["split"]) == ("tiny", "test")
    assert made["splits"] == dict.fromkeys(TASKS, "test")
    assert made["commit"] == {run.name: "c-dirty" for run in runs}


def test_groups_are_the_seeds_of_one_config(tmp_path: Path) -> None:
    report = make_report(
        base_of(tmp_path), world(tmp_path, GROUPS, seeds=(2, 0, 1)), TINY, "test", tmp_path / "out"
    )
    assert [group["label"] for group in report["groups"]] == ["lora", "lorasculpt"]
    group = report["groups"][1]
    assert group["seeds"] == [0, 1, 2]
    assert group["runs"] == ["lorasculpt_s0", "lorasculpt_s1", "lorasculpt_s2"]
    mine = [run for run in report["runs"] if run["label"] == "lorasculpt"]
    for key in ("source", "target", "mean", "harmonic_mean", "o_mean"):
        values = [run[key] for run in mine]
        assert group[key]["mean"] == pytest.approx(fmean(values))
        assert group[key]["sd"] == pytest.approx(stdev(values))
    drops = [run["drop"]["tiny_place"] for run in mine]
    assert group["drop"]["tiny_place"]["mean"] == pytest.approx(fmean(drops))
    assert group["drop"]["tiny_place"]["sd"] == pytest.approx(stdev(drops))
    changed = [run["change"]["target"]["difference"] for run in mine]
    assert group["change"]["target"]["difference"] == pytest.approx(fmean(changed))
    kept = [run["retention"]["tiny_place"] for run in mine]
    assert group["retention"]["tiny_place"] == pytest.approx({"mean": fmean(kept), "sd": stdev(kept)})
    assert report["between"]["best"] == "lorasculpt"
    (pair,) = report["between"]["pairs"]
    assert (pair["a"], pair["b"]) == ("lora", "lorasculpt")
    ahead = report["groups"][0]["source"]["mean"] - group["source"]["mean"]
    assert pair["source"]["difference"] == pytest.approx(ahead)
    low, high = group["source"]["ci95"]
    assert (low + high) / 2 == pytest.approx(group["source"]["mean"])


def test_one_seed_has_no_sd_and_the_interval_of_its_run(tmp_path: Path) -> None:
    report = make_report(
        base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,)), TINY, "test", tmp_path / "out"
    )
    group, run = report["groups"][0], report["runs"][0]
    assert group["source"]["sd"] is None
    assert group["drop"]["tiny_text"]["ci95"] == pytest.approx(run["drop_ci95"]["tiny_text"])
    text = printed(report)
    assert "seeds" not in text.split("Source: mean of")[0]
    assert "a single seed" in text


def test_missing_predictions_and_other_circumstances_are_warned_of(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    path = runs[1] / "eval" / "tiny-test" / "results.json"
    results = json.loads(path.read_text())["results"]
    results["tiny_place"]["missing"] = 3
    rewrite(path, results=results, precision="bfloat16", environment={"torch": "2.12"})
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert report["warnings"] == [
        "lorasculpt_s0, tiny_place: 3 of 200 questions have no prediction and count as wrong",
        "lorasculpt_s0 was evaluated with other versions than the base: torch 2.12 instead of 2.11",
        "lorasculpt_s0 was evaluated with other precision than the base: bfloat16 instead of float32",
    ]
    text = " ".join(printed(report).split())
    assert "predictions missing, all models: 3" in text
    for warning in report["warnings"]:
        assert f"WARNING: {warning}" in text


def test_what_all_runs_share_is_warned_of_once(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    for run in runs:
        rewrite(run / "eval" / "tiny-test" / "results.json", batch_size=100)
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert report["warnings"] == [
        "lora_s0, lora_s1, lorasculpt_s0, ... (4 in all) were evaluated with other batch_size than the base: "
        "100 instead of 32"
    ]


def test_missing_evaluations_are_answered_with_the_commands_that_make_them(tmp_path: Path) -> None:
    runs = world(tmp_path, GROUPS, seeds=(0,))
    base = tmp_path / "tiny_align"
    (base / "final").mkdir(parents=True)
    (runs[0] / "eval" / "tiny-test" / "results.json").unlink()
    (runs[1] / "final" / "trained.json").unlink()
    with pytest.raises(UserError) as caught:
        make_report(base, runs, TINY, "test", tmp_path / "out")
    mends = [fault.mend for fault in caught.value.faults]
    assert len(mends) == 3
    assert mends[0] == (
        f"Run: mmtune eval --model {base}/final --suite tiny --output_path {base}/eval/tiny-test"
    )
    assert mends[1] == (
        f"Run: mmtune eval --model {runs[0]}/final --suite tiny --output_path {runs[0]}/eval/tiny-test"
    )
    assert "--resume" in mends[2]
    with pytest.raises(UserError, match="--split val"):
        make_report(base, runs[:1], TINY, "val", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"splits": {task: "val" for task in TASKS}},
            "tiny_text: the split differs: val, but test for the base",
        ),
        ({"configs": {task: {"hash": "x"} for task in TASKS}}, "tiny_shape: the protocol differs: x"),
        ({"data": {task: "y" for task in TASKS}}, "tiny_iconqa: the annotation file differs: y"),
        ({"decoding": {"max_new_tokens": 1}}, "the decoding differs"),
    ],
)
def test_scores_made_in_another_way_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    rewrite(runs[1] / "eval" / "tiny-test" / "results.json", **changes)
    with pytest.raises(UserError) as caught:
        make_report(base, runs, TINY, "test", tmp_path / "out")
    assert named in str(caught.value)
    assert {fault.where for fault in caught.value.faults} == {"lorasculpt_s0"}


def test_another_rule_and_other_questions_are_not_compared(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    path = runs[0] / "eval" / "tiny-test" / "results.json"
    results = json.loads(path.read_text())["results"]
    results["tiny_text"]["rule"] = "lenient"
    rewrite(path, results=results)
    with pytest.raises(UserError, match="tiny_text: the rule differs: lenient, but exact for the base"):
        make_report(base, runs, TINY, "test", tmp_path / "out")
    samples = runs[1] / "eval" / "tiny-test" / "samples_tiny_text.jsonl"
    samples.write_text(samples.read_text().replace('"question_id": 7,', '"question_id": 7000,'))
    with pytest.raises(UserError, match="different questions: 7, 7000"):
        make_report(base, runs[1:], TINY, "test", tmp_path / "out")


def test_samples_of_another_evaluation_are_noticed(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    place = Path("eval") / "tiny-test" / "samples_tiny_text.jsonl"
    (runs[0] / place).write_text((base / place).read_text())
    with pytest.raises(UserError, match="different evaluations"):
        make_report(base, runs, TINY, "test", tmp_path / "out")


def test_a_run_from_another_model_is_not_compared(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    rewrite(runs[0] / "final" / "trained.json", base="other model")
    rewrite(runs[1] / "final" / "trained.json", model_hash="trained again")
    with pytest.raises(UserError) as caught:
        make_report(base, runs, TINY, None, tmp_path / "out")
    said = [str(fault) for fault in caught.value.faults]
    assert (
        "lora_s0: it started from model other model, but the base is model base model (somewhere)" in said[0]
    )
    assert "lorasculpt_s0: its final model is trained again, but lorasculpt_s0 (somewhere)" in said[1]
    rewrite(runs[0] / "final" / "trained.json", base=None)
    report = make_report(base, runs[:1], TINY, None, tmp_path / "out")
    assert report["warnings"] == [
        "lora_s0 started from no saved model as a whole, so the base cannot be checked"
    ]


def test_tasks_on_splits_of_their_own(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    splits = {**dict.fromkeys(TASKS, "test"), "tiny_reading": "val"}
    for folder in (base, *runs):
        rewrite(folder / "eval" / "tiny-test" / "results.json", splits=splits)
    report = make_report(base, runs, TINY, None, tmp_path / "out")
    assert report["made_with"]["splits"] == splits
    assert "splits reading val, colour test" in " ".join(printed(report).split())


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    with pytest.raises(UserError, match="several runs of one name: lora_s0"):
        make_report(base, [*runs, runs[0]], TINY, "test", tmp_path / "out")


def test_a_single_question_and_a_base_at_zero_leave_intervals_and_retention_undefined(tmp_path: Path) -> None:
    nothing = {task: 0.0 for task in TASKS}
    write_evaluation(tmp_path / "base" / "eval" / "tiny-test", nothing, n=2)
    run = write_run(tmp_path / "runs" / "r", level(50, 50), seed=0, n=2)
    for folder in (tmp_path / "base", run):
        place = folder / "eval" / "tiny-test"
        results = json.loads((place / "results.json").read_text())["results"]
        for task in TASKS:
            line = (place / f"samples_{task}.jsonl").read_text().splitlines()[0]
            (place / f"samples_{task}.jsonl").write_text(line + "\n")
            results[task] |= {"n": 1, "stderr": None, "score": 100 * json.loads(line)["score"]}
        rewrite(place / "results.json", results=results)
    report = make_report(tmp_path / "base", [run], TINY, "test", tmp_path / "out")
    row = report["runs"][0]
    assert row["source_ci95"] is None
    assert row["drop_ci95"]["tiny_text"] is None
    assert row["retention"]["tiny_text"] is None
    assert "r " in printed(report)


def test_report_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, mmtune.evaluation.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
