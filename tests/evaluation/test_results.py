"""The shape of results.json and of the samples: lmms-eval's names beside mmtune's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mmtune.evaluation.evaluate import evaluate
from mmtune.evaluation.forgetting import read_evaluation
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.results import TIMES, task_row
from mmtune.evaluation.score import score_predictions
from tests.made_up_runs import TASKS, base_of, rewrite
from tests.world import half_right

# What lmms-eval 0.7.3 writes for a model on two tasks with one metric each and --log_samples; left out are
# what only its own run has: lmms_eval_version, git_branch, usage, chat templates, start and end on its clock.
TOP = """results group_subtasks configs versions n-shot higher_is_better n-samples config git_hash date
task_hashes model_source model_name model_name_sanitized total_evaluation_time_seconds""".split()
CONFIG = """model model_args batch_size batch_sizes device limit gen_kwargs random_seed numpy_seed torch_seed
fewshot_seed""".split()


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        patch.setattr("mmtune.evaluation.generate.answer_in_batches", half_right)
        return place, evaluate(Path("base"), ["tiny_colour", "tiny_iconqa"], place, batch_size=8, limit=7)


def rows_of(place: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / f"samples_{task}.jsonl").read_text().splitlines()]


def test_results_have_the_names_of_lmms_eval(made: tuple[Path, dict[str, Any]]) -> None:
    place, returned = made
    results = json.loads((place / "results.json").read_text())
    assert results == returned
    assert set(TOP) <= results.keys()
    assert set(CONFIG) <= results["config"].keys()
    assert set(TIMES) <= results.keys()
    for task in ("tiny_colour", "tiny_iconqa"):
        row = results["results"][task]
        assert (row["alias"], row["samples"], row["n"]) == (task, 7, 7)
        assert row[f"{row['metric']},none"] == pytest.approx(row["score"] / 100)
        assert row[f"{row['metric']}_stderr,none"] == pytest.approx(row["stderr"] / 100)
        assert results["higher_is_better"][task] == {row["metric"]: True}
        assert results["n-samples"][task] == {"original": 12, "effective": 7}
        assert results["n-shot"][task] == 0
        assert results["versions"][task] == results["configs"][task]["hash"] == load_protocol(task).hash
    assert results["config"]["model_args"] == "pretrained=base,dtype=float32"
    assert (results["config"]["batch_size"], results["config"]["limit"]) == (8, 7)
    assert float(results["total_evaluation_time_seconds"]) > 0


def test_samples_have_the_names_of_lmms_eval(made: tuple[Path, dict[str, Any]]) -> None:
    place, results = made
    for task in ("tiny_colour", "tiny_iconqa"):
        result, rows = results["results"][task], rows_of(place, task)
        assert [row["doc_id"] for row in rows] == list(range(7))
        assert fmean(row[result["metric"]] for row in rows) == result[f"{result['metric']},none"]
        for row in rows:
            assert row["doc"]["question"] in row["input"]
            assert row["input"] == row["prompt"] == row["arguments"][0]
            assert row["resps"] == [row["prediction"]] == [row["filtered_resps"]]
            assert row["target"] == row["doc"]["answers"]
            # lmms-eval's --baseline takes the first key with "score" in its name.
            assert next(row[key] for key in row if "score" in key) == row["score"]
            assert row["category"] == row["doc"]["category"]
            assert (Path(results["images"][task]) / row["image"]).is_file()
            hashed = json.dumps(row["doc"], indent=2, ensure_ascii=False).encode()
            assert row["doc_hash"] == hashlib.sha256(hashed).hexdigest()
            assert row["prompt_hash"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
        joined = "".join(f"sample_{i}{row['doc_hash']}" for i, row in enumerate(rows))
        assert results["task_hashes"][task] == hashlib.sha256(joined.encode()).hexdigest()


def test_a_single_question_has_no_error() -> None:
    question = Question("1", "What?", ("yes",), None, "1")
    row = task_row(score_predictions([question], {"1": "yes"}, load_protocol("tiny_text")))
    assert row[f"{row['metric']}_stderr,none"] == "N/A"
    assert row["stderr"] is None


def test_older_results_are_read(tmp_path: Path) -> None:
    """Those had the packages' versions under `versions`."""
    place = base_of(tmp_path) / "eval" / "tiny-test"
    newer = read_evaluation(place, TASKS)
    results = json.loads((place / "results.json").read_text())
    packages = results.pop("environment")
    (place / "results.json").write_text(json.dumps(results))
    rewrite(place / "results.json", versions=packages)
    assert read_evaluation(place, TASKS) == newer
    assert newer.made_with["versions"] == {"torch": "2.11"}
