from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtune.cli import _parser
from mmtune.core.errors import UserError
from mmtune.evaluation.provenance import made_box, made_by, said
from mmtune.evaluation.report import make_report
from tests.made_up_runs import GROUPS, TASKS, TINY, base_of, rewrite, world


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made it")
    base, runs = base_of(folder), world(folder, GROUPS, (0, 1))
    for number, path in enumerate(sorted(folder.rglob("results.json"))):
        configs = json.loads(path.read_text())["configs"]
        configs["tiny_text"] |= {"prompt": "{question}\nBriefly.", "max_new_tokens": 16}
        rewrite(path, git_hash="c0ffee", date=f"day {number}", configs=configs, limit=50)
        rewrite(path, batch_size=32 + (number == 1), environment={"torch": "2.15", "peft": "0.21"})
    make_report(base, runs, TINY, "test", folder / "out")
    made: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return made


def test_what_is_alike_is_said_once_and_what_differs_by_model(report: dict[str, Any]) -> None:
    box = made_box(report)
    common = dict(box["common"])
    assert common["Evaluated by commit"] == "c0ffee" and common["Trained by commit"] == "c-dirty"
    assert common["Precision"] == "float32" and common["Questions"] == "the first 50 of each set"
    assert box["columns"] == ["Config", "Batch size", "Model", "Evaluated on"]
    assert [row["Batch size"] for row in box["models"]].count("33") == 1
    assert common["Versions"] == "torch 2.15, peft 0.21"
    assert [row["model"] for row in box["models"]] == [
        "base (base)",
        *(run["name"] for run in report["runs"]),
    ]
    assert [row["Config"] for row in box["models"][:2]] == ["", "hash of lora_s0"]
    assert len({row["Evaluated on"] for row in box["models"]}) == 5
    text = next(row for row in box["tasks"] if row["task"] == "tiny_text")
    assert (text["prompt"], text["tokens"], text["protocol"]) == (
        "{question}\nBriefly.",
        "16",
        "protocol tiny_text",
    )
    assert [row["task"] for row in box["tasks"]] == TASKS


def test_the_text_to_copy_holds_everything(report: dict[str, Any]) -> None:
    box = made_box(report)
    lines = box["text"].split("\n")
    for label, value in box["common"]:
        assert f"{label}: {value}" in lines
    for row in box["models"]:
        assert all(f"{label}: {row[label]}" in lines for label in box["columns"])
    assert r'prompt: "{question}\nBriefly."' in lines
    assert all(command in lines for command in box["commands"])


def test_the_commands_are_ones_that_mmtune_takes(report: dict[str, Any]) -> None:
    *evaluations, last = made_box(report)["commands"]
    assert len(evaluations) == 5
    for command in evaluations:
        options = _parser().parse_args(shlex.split(command)[1:])
        assert options.tasks.split(",") == TASKS and options.split == "test" and options.limit == 50
        assert (options.output_path / "results.json").is_file()
    options = _parser().parse_args(shlex.split(last)[1:])
    assert options.suite == "tiny" and len(options.runs) == 4 and isinstance(options.base, Path)


def test_the_commands_name_tasks_and_suites_of_ones_own(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, {"a": GROUPS[next(iter(GROUPS))]}, (0,))
    given = {
        "tasks": [*TASKS[:-1], "my own.yaml"],
        "decode": "likelihood",
        "data_root": "/data",
    }
    rewrite(next(base.rglob("results.json")), given=given)
    report = make_report(base, runs, replace(TINY, path="mine.yaml"), "test", tmp_path / "out")
    words = shlex.split(report["base"]["made_by"]["command"])
    options = _parser().parse_args(words[1:])
    assert options.tasks.split(",") == given["tasks"]
    assert (options.decode, options.data_root) == ("likelihood", Path("/data"))
    assert "--suite mine.yaml" in report["made_with"]["command"]
    shutil.rmtree(base / "eval")
    with pytest.raises(UserError, match=r"--model BASE_MODEL --suite mine\.yaml"):
        make_report(base, runs, replace(TINY, path="mine.yaml"), "test", tmp_path / "out")


def test_settings_in_words() -> None:
    assert said({"greedy": True, "tokens": 1, "other": None}) == "greedy yes, tokens 1, other not said"
    assert said({}) == "not said"


def test_a_command_asks_and_decodes_as_it_was_done(tmp_path: Path) -> None:
    results = {
        "model": "m",
        "results": {"a": {}, "b": {}},
        "splits": {"a": "test", "b": "test"},
        "precision": "bfloat16",
        "batch_size": 8,
        "changed_alone": {"a": {"asked": 32, "changed": 1}, "b": {"asked": 12, "changed": 2}},
        "configs": {
            "a": {"decode": "likelihood", "question_files": {"test": "/data/of mine.jsonl"}},
            "b": {"decode": "likelihood", "question_files": {"test": "its/own.jsonl"}},
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    made = made_by(tmp_path)
    options = _parser().parse_args(shlex.split(made["command"])[1:])
    assert options.question_file == ["a=/data/of mine.jsonl"] and options.decode == "likelihood"
    assert made["batch_changed"] == "3 of 44 that were asked again one at a time"
