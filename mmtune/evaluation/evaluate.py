"""A model on a list of tasks: generates, scores, and writes results that say how they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtune.core.config import to_dict
from mmtune.core.files import write_json, write_text
from mmtune.core.versions import versions
from mmtune.evaluation.generate import best_device, generate_answers
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_predictions
from mmtune.parts.model import VisionLanguageModel


def evaluate(
    model_folder: Path,
    tasks: Sequence[str],
    output: Path,
    split: str = "test",
    batch_size: int = 32,
    limit: int | None = None,
    root: Path | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "float32",
    predict_only: bool = False,
) -> dict[str, Any]:
    """Writes `results.json` and, for each task, `samples_TASK.jsonl` (or only the answers) to `output`.

    Every annotation file is read before the model is loaded. limit: the first so many questions of each
    task; said in the results. Raises UserError.
    """
    protocols = [load_protocol(task) for task in tasks]
    asked = [(protocol, *protocol.questions(split, root)) for protocol in protocols]
    model = VisionLanguageModel.from_pretrained(model_folder, dtype=dtype).to(best_device())
    results: dict[str, Any] = {}
    for protocol, questions, _ in asked:
        questions = questions[:limit]
        images = (root or protocol.root) / protocol.images
        answers = generate_answers(model, protocol, questions, images, batch_size, max_new_tokens)
        prompts = {question.id: protocol.turns(question)[0].text for question in questions}
        if predict_only:
            rows: list[dict[str, Any]] = [
                {"question_id": name, "prompt": prompts[name], "text": text} for name, text in answers.items()
            ]
        else:
            score = score_predictions(questions, answers, protocol)
            results[protocol.task] = {k: v for k, v in score.summary().items() if k != "task"}
            targets = {question.id: list(question.answers) for question in questions}
            rows = [
                {**row, "prompt": prompts[row["question_id"]], "target": targets[row["question_id"]]}
                for row in score.per_question
            ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(output / f"samples_{protocol.task}.jsonl", lines)
    made = {
        "results": results,
        "configs": {p.task: {**to_dict(p), "hash": p.hash} for p in protocols},
        "data": {p.task: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for p, _, file in asked},
        "model": str(model_folder),
        "split": split,
        "limit": limit,
        "batch_size": batch_size,
        "padding": "left",
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens or "as the protocol says"},
        "precision": dtype,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    if not predict_only:
        write_json(output / "results.json", made)
    return made


def print_results(made: dict[str, Any], console: Console) -> None:
    """A line per task: score, standard error, how it was scored, how many questions."""
    table = Table(title=f"{made['model']}, {made['split']} split")
    for heading in ("task", "score", "stderr", "rule", "questions", "missing"):
        table.add_column(heading, justify="left" if heading in ("task", "rule") else "right")
    for task, result in made["results"].items():
        stderr = "-" if result["stderr"] is None else f"{result['stderr']:.2f}"
        counts = str(result["n"]), str(result["missing"])
        table.add_row(task, f"{result['score']:.2f}", stderr, result["rule"], *counts)
    console.print(table)
