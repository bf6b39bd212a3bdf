"""Evaluations of a random model on the small tiny world, files included."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.evaluation.evaluate import evaluate, print_results
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol

TASKS = ["tiny_reading", "tiny_colour", "tiny_text", "tiny_iconqa"]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    text = (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, working where the world is."""
    monkeypatch.chdir(world)
    return tmp_path


def test_batch_size_changes_no_answer(place: Path) -> None:
    made = {size: evaluate(Path("base"), TASKS, place / str(size), batch_size=size) for size in (1, 3, 16)}
    for task in TASKS:
        alone = samples(place / "1", task)
        assert len(alone) == 12
        assert len({row["prediction"] for row in alone}) > 3
        for size in (3, 16):
            assert samples(place / str(size), task) == alone
            assert made[size]["results"][task] == made[1]["results"][task]


def test_results_say_how_they_were_made(place: Path) -> None:
    returned = evaluate(Path("base"), TASKS, place, batch_size=8)
    made = json.loads((place / "results.json").read_text())
    assert made == returned
    assert list(made["results"]) == TASKS
    for task in TASKS:
        result = made["results"][task]
        assert {"score", "stderr", "n", "rule", "metric", "missing"} <= result.keys()
        assert 0 <= result["score"] <= 100
        assert (result["n"], result["missing"]) == (12, 0)
        assert made["configs"][task]["hash"] == load_protocol(task).hash
        assert made["configs"][task]["prompt"] == load_protocol(task).prompt
        assert len(made["data"][task]) == 16
    assert (made["batch_size"], made["padding"], made["precision"]) == (8, "left", "float32")
    assert (made["model"], made["split"], made["limit"]) == ("base", "test", None)
    assert {"torch", "transformers", "peft", "mmtune"} <= made["versions"].keys()


def test_samples_hold_prompt_target_and_score(place: Path) -> None:
    evaluate(Path("base"), ["tiny_colour"], place)
    rows = samples(place, "tiny_colour")
    official = json.loads(Path("datasets/tiny/gqa/colour_test_questions.json").read_text())
    for row in rows:
        question = official[row["question_id"]]
        assert row["prompt"] == f"<image>\n{question['question']}\nAnswer briefly."
        assert row["target"] == [question["answer"]]
        assert row["score"] in (0.0, 1.0)
        assert row["cluster"] == question["imageId"]


def test_limit_asks_the_first_and_says_so(place: Path) -> None:
    evaluate(Path("base"), ["tiny_colour", "tiny_text"], place / "all")
    made = evaluate(Path("base"), ["tiny_colour", "tiny_text"], place / "some", limit=5)
    assert made["limit"] == 5
    for task in ("tiny_colour", "tiny_text"):
        assert made["results"][task]["n"] == 5
        assert samples(place / "some", task) == samples(place / "all", task)[:5]


def test_fewer_new_tokens_give_shorter_answers(place: Path) -> None:
    evaluate(Path("base"), ["tiny_text"], place / "long")
    made = evaluate(Path("base"), ["tiny_text"], place / "short", max_new_tokens=2)
    assert made["decoding"]["max_new_tokens"] == 2
    pairs = zip(samples(place / "long", "tiny_text"), samples(place / "short", "tiny_text"), strict=True)
    for long, short in pairs:
        assert long["prediction"].startswith(short["prediction"])
        assert len(long["prediction"]) > len(short["prediction"])


def test_answers_alone_can_be_scored_to_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_right(model: object, protocol: object, questions: list[Question], *_: object) -> dict[str, str]:
        return {q.id: q.answers[0] if i % 2 else "nothing" for i, q in enumerate(questions)}

    monkeypatch.setattr("mmtune.evaluation.evaluate.generate_answers", half_right)
    evaluated = evaluate(Path("base"), TASKS, place / "scored")
    evaluate(Path("base"), TASKS, place / "answers", predict_only=True)
    assert not (place / "answers" / "results.json").exists()
    files = {
        "tiny_reading": "textvqa/TextVQA_0.5.1_test.json",
        "tiny_colour": "gqa/colour_test_questions.json",
        "tiny_text": "text/questions_test.jsonl",
        "tiny_iconqa": "iconqa/problems.json",
    }
    for task, file in files.items():
        answers = place / "answers" / f"samples_{task}.jsonl"
        assert set(samples(place / "answers", task)[0]) == {"question_id", "prompt", "text"}
        arguments = ["score", "--task", task, "--predictions", str(answers)]
        capsys.readouterr()
        assert main([*arguments, "--annotations", f"datasets/tiny/{file}"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said.pop("task") == task
        assert said == evaluated["results"][task]
        assert 0 < said["score"] < 100


def test_the_annotations_are_read_before_the_model(place: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        evaluate(place / "no model", ["tiny_text"], place, root=place)
    with pytest.raises(UserError, match="no such folder"):
        evaluate(place / "no model", ["tiny_text"], place)
    assert list(place.iterdir()) == []


def test_the_table_has_a_line_per_task(place: Path) -> None:
    made = evaluate(Path("base"), TASKS, place, limit=2)
    console = Console(file=StringIO(), width=100)
    print_results(made, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for task in TASKS:
        (line,) = [line for line in printed.splitlines() if task in line]
        assert f"{made['results'][task]['score']:.2f}" in line
        assert made["results"][task]["rule"] in line
