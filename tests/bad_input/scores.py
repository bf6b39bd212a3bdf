"""Files that are scored or reported: predictions, annotations, evaluations, runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.bench import Bench, Kind
from tests.made_up_runs import rewrite

FOLDER = Path(__file__).resolve().parents[1] / "data" / "textvqa"
PREDICTIONS = FOLDER / "answers_llava-v1.5-13b_40.jsonl"
ANNOTATIONS = FOLDER / "TextVQA_0.5.1_val_40.json"
ROWS = [json.loads(line) for line in PREDICTIONS.read_text().splitlines()]
FIRST, SECOND = (question["question_id"] for question in json.loads(ANNOTATIONS.read_text())["data"][:2])


def _score(bench: Bench, predictions: str | bytes | list[Any], *options: object) -> list[object]:
    """Scoring a file of predictions: a text, or rows to be written as JSONL."""
    if isinstance(predictions, list):
        predictions = "\n".join(map(json.dumps, predictions))
    path = bench.file("answers.jsonl", predictions)
    return ["score", "--task", "textvqa", "--predictions", path, "--annotations", ANNOTATIONS, *options]


def _against(bench: Bench, annotations: str, task: str = "textvqa") -> list[object]:
    path = bench.file("questions.json", annotations)
    return ["score", "--task", task, "--predictions", PREDICTIONS, "--annotations", path]


def _answer(question: Any = FIRST, **changes: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in {"question_id": question, "text": "a", **changes}.items()
        if value is not ...
    }


def _report(change: Callable[[Path, list[Path]], Any]) -> Callable[[Bench], list[object]]:
    """A report on made-up runs after `change(base, runs)`."""

    def command(bench: Bench) -> list[object]:
        base, runs = bench.runs()
        change(base, runs)
        return bench.report(base, runs)

    return command


def _edit_results(base: Path, runs: list[Path]) -> None:
    path = runs[0] / "eval" / "tiny-test" / "results.json"
    results = json.loads(path.read_text())["results"]
    results["tiny_text"]["score"] += 5
    rewrite(path, results=results)


def _drop_a_task(base: Path, runs: list[Path]) -> None:
    path = runs[0] / "eval" / "tiny-test" / "results.json"
    results = json.loads(path.read_text())["results"]
    results.pop("tiny_text")
    rewrite(path, results=results)


def _twice(base: Path, runs: list[Path]) -> None:
    path = runs[0] / "eval" / "tiny-test" / "samples_tiny_text.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0])


def _copy(base: Path, runs: list[Path]) -> None:
    runs.append(Path(shutil.copytree(runs[0], runs[0].parent / "copy")))


def _said(bench: Bench) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(bench.said.out)
    return made


KINDS = [
    # ---- Predictions
    Kind(
        "no predictions",
        lambda b: [*_score(b, "")[:4], "no.jsonl", "--annotations", ANNOTATIONS],
        "no such file",
        "no.jsonl",
        "path right",
    ),
    Kind(
        "an empty file of predictions",
        lambda b: _score(b, ""),
        "the file is empty",
        "answers.jsonl",
        "written whole?",
    ),
    Kind(
        "an empty list of predictions",
        lambda b: _score(b, "[]"),
        "no predictions",
        "answers.jsonl",
        "written whole?",
    ),
    Kind(
        "two answers to a question",
        lambda b: _score(b, [_answer(), _answer()]),
        f"more than one answer to a question: {FIRST}",
        "line 1, question_id",
        "Leave one",
    ),
    Kind(
        "two answers in a map",
        lambda b: _score(b, f'{{"{FIRST}": "a", "{FIRST}": "b"}}'),
        "more than one answer",
        "answers.jsonl",
        "Leave one",
    ),
    Kind(
        "an answer to an unknown question",
        lambda b: _score(b, [_answer(), _answer(999)]),
        "not in the annotation file: 999",
        "line 2",
        "were made for",
    ),
    Kind(
        "answers to another file's questions",
        lambda b: _score(b, [_answer(999)]),
        "none of its ids",
        "answers.jsonl",
        "need their 'prompt'",
    ),
    Kind(
        "answers that are missing",
        lambda b: _score(b, ROWS[:30]),
        then=lambda b: _said(b)["missing"] == 10 and "10 of 40" in b.said.err,
    ),
    Kind(
        "an answer without an id",
        lambda b: _score(b, [_answer(...), _answer()]),
        "no 'question_id'",
        "line 1",
        "Found: text",
    ),
    Kind(
        "an answer without a text",
        lambda b: _score(b, [_answer(text=...)]),
        "found none",
        f"question_id {FIRST}",
        "name the predicted text 'text'",
    ),
    Kind(
        "an answer with two texts",
        lambda b: _score(b, [_answer(answer="b")]),
        "found text and answer",
        f"question_id {FIRST}",
        "the predicted text 'text'",
    ),
    Kind(
        "a list for an answer",
        lambda b: _score(b, [_answer(text=["a"])]),
        'found ["a"]',
        f"question_id {FIRST}",
        "its letter",
    ),
    Kind(
        "a number for an answer",
        lambda b: _score(b, [_answer(text=3)]),
        then=lambda b: _said(b)["missing"] == 39,
    ),
    Kind(
        "a list of numbers for answers",
        lambda b: _score(b, "[1, 2]"),
        "found int",
        "answers.jsonl, [0]",
        "'question_id'",
    ),
    Kind(
        "a number of 5000 digits",
        lambda b: _score(b, f'{{"{FIRST}": {"9" * 5000}}}'),
        "not valid JSON",
        "line 1",
        "JSON object",
    ),
    Kind(
        "answers nested too deep",
        lambda b: _score(b, '{"a":' * 99999),
        "not valid JSON",
        "line 1",
        "JSON object",
    ),
    Kind(
        "half an emoji in an answer",
        lambda b: _score(b, [_answer(text="\ud83d")]),
        "half of a character",
        "line 1",
        "both halves",
    ),
    Kind(
        "answers with a BOM",
        lambda b: _score(b, ("\ufeff" + PREDICTIONS.read_text()).encode()),
        then=lambda b: _said(b)["missing"] == 0,
    ),
    Kind(
        "a folder for answers",
        lambda b: [*_score(b, "")[:4], b.here, "--annotations", ANNOTATIONS],
        "this is a folder",
        "mmtune: /",
        "Name a file in it",
    ),
    Kind(
        "an unknown rule",
        lambda b: _score(b, ROWS, "--rule", "m4"),
        "unknown rule 'm4'",
        "task 'textvqa'",
        "Known: lmms-eval, lorasculpt, m4c",
    ),
    # ---- Annotations
    Kind(
        "annotations of another task",
        lambda b: _against(b, "[]"),
        "no list 'data'",
        "questions.json",
        "A TextVQA annotation file",
    ),
    Kind(
        "annotations cut short",
        lambda b: _against(b, ANNOTATIONS.read_text()[:5000]),
        "not valid JSON",
        "questions.json, line",
        "written whole?",
    ),
    Kind(
        "annotations without questions",
        lambda b: _against(b, '{"data": []}'),
        "no questions",
        "questions.json",
        "written whole?",
    ),
    Kind(
        "predictions for annotations",
        lambda b: _against(b, PREDICTIONS.read_text()),
        "Extra data",
        "questions.json, line 2",
        ".jsonl",
    ),
    # ---- Reports
    Kind(
        "a run that is not finished",
        _report(lambda base, runs: (runs[0] / "final" / "trained.json").unlink()),
        "no finished run",
        "lora_s0",
        "mmtune train --resume",
    ),
    Kind(
        "a run that is not evaluated",
        _report(lambda base, runs: shutil.rmtree(runs[0] / "eval")),
        "not evaluated on suite tiny",
        "lora_s0",
        "Run: mmtune eval",
    ),
    Kind(
        "a run without its YAML",
        _report(lambda base, runs: (runs[0] / "run.yaml").unlink()),
        "no such file",
        "lora_s0/run.yaml",
        "path right",
    ),
    Kind(
        "a run of another base",
        _report(lambda base, runs: rewrite(runs[0] / "final" / "trained.json", base="another")),
        "started from model another",
        "lora_s0",
        "Give --base",
    ),
    Kind(
        "a score edited by hand",
        _report(_edit_results),
        "but results.json says",
        "samples_tiny_text.jsonl",
        "evaluate again",
    ),
    Kind(
        "a score that is missing",
        _report(_drop_a_task),
        "no score of tiny_text",
        "results.json",
        "Evaluate the whole suite",
    ),
    Kind(
        "an answer scored twice",
        _report(_twice),
        "occurs a second time",
        "samples_tiny_text.jsonl, line 201",
        "Evaluate again",
    ),
    Kind(
        "scores of another protocol",
        _report(
            lambda base, runs: rewrite(
                runs[0] / "eval" / "tiny-test" / "results.json",
                configs={
                    t: {"hash": "x"}
                    for t in json.loads((runs[0] / "eval" / "tiny-test" / "results.json").read_text())[
                        "configs"
                    ]
                },
            )
        ),
        "the protocol differs",
        "lora_s0",
        "Evaluate both again",
    ),
    Kind(
        "one run twice",
        _report(lambda base, runs: runs.append(runs[0])),
        "several runs of one name: lora_s0",
        "lora_s0",
        "Rename one",
    ),
    Kind("a copy of a run", _report(_copy), "the same config", "copy", "one run of each seed"),
    Kind(
        "a base that is not evaluated",
        lambda b: b.report(b.here, b.runs()[1]),
        "not evaluated on suite tiny",
        "eval/tiny-test",
        "Run: mmtune eval",
    ),
]
