"""results.json and samples_TASK.jsonl: mmtune's own keys, and beside them lmms-eval's, so that its readers
read them too.

Names and shapes follow what lmms-eval 0.7.3 writes (evaluator.py, loggers/evaluation_tracker.py). Nothing
here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.core.versions import commit
from mmtune.evaluation.metrics.base import Question, TaskScore
from mmtune.evaluation.protocol import Protocol

TIMES = ("date", "total_evaluation_time_seconds")
"""The keys of results.json that differ between two evaluations of one model."""


def run_header(
    model_folder: Path,
    protocols: Sequence[Protocol],
    batch_size: int,
    limit: int | None,
    max_new_tokens: int | None,
    dtype: str,
    seed: int,
    restore: str | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """What lmms-eval's results.json says of a run as a whole, but for the scores, the numbers of questions
    and the times.

    versions: task -> the hash of its protocol (lmms-eval: the task's version).
    """
    arguments = [f"pretrained={model_folder}", f"dtype={dtype}"]
    arguments += [f"restore={restore}"] if restore else []
    arguments += [] if scale is None else [f"scale={scale:g}"]
    tasks = [protocol.task for protocol in protocols]
    return {
        "group_subtasks": {task: [] for task in tasks},
        "versions": {protocol.task: protocol.hash for protocol in protocols},
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {},
        "n-samples": {},
        "task_hashes": {},
        "config": {
            "model": "mmtune",
            "model_args": ",".join(arguments),
            "batch_size": batch_size,
            "batch_sizes": [],
            "limit": limit,
            "gen_kwargs": {"max_new_tokens": max_new_tokens} if max_new_tokens else {},
            "random_seed": seed,
            "numpy_seed": seed,
            "torch_seed": seed,
            "fewshot_seed": seed,
        },
        "git_hash": commit(),
        "model_source": "mmtune",
        "model_name": str(model_folder),
        "model_name_sanitized": str(model_folder).replace("/", "__"),
    }


def task_row(score: TaskScore) -> dict[str, Any]:
    """A task's row of `results`: the points, and under lmms-eval's names the fractions.

    "METRIC,none" is the mean of the questions' scores: a fraction, for captions CIDEr as coco-caption prints
    it. "METRIC_stderr,none" is in the same unit and clustered by picture; "N/A", as lmms-eval writes, for one
    question alone.
    """
    stderr = "N/A" if score.stderr is None else score.stderr / 100
    summary = {key: value for key, value in score.summary().items() if key != "task"}
    return {
        "alias": score.task,
        f"{score.metric},none": score.score / 100,
        f"{score.metric}_stderr,none": stderr,
        f"{score.metric}_stderr_clustered,none": stderr,
        "samples": score.n,
        **summary,
    }


def sample_rows(
    questions: Sequence[Question], score: TaskScore, prompts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The rows of samples_TASK.jsonl, a question each, in the annotation file's order.

    target: all accepted answers (lmms-eval: their text). image: relative to the task's image root, which
    results.json has under `images`; a list where there are several. prompts: question id -> what the model
    was asked.
    """
    rows = []
    for index, (question, row) in enumerate(zip(questions, score.per_question, strict=True)):
        prompt, text, target = prompts[question.id], row["prediction"], list(question.answers)
        doc = {
            "question_id": question.id,
            "question": question.text,
            "image": question.image,
            "answers": target,
            "choices": list(question.choices),
            "choice_images": list(question.choice_images),
            "category": question.category,
        }
        rows.append(
            {
                **row,
                "prompt": prompt,
                "target": target,
                "image": list(question.images) if len(question.images) > 1 else question.image,
                "category": question.category,
                "doc_id": index,
                "doc": doc,
                "input": prompt,
                "arguments": [prompt],
                "resps": [] if text is None else [text],
                "filtered_resps": text or "",
                "doc_hash": _hash(doc),
                "prompt_hash": _hash(prompt),
                "target_hash": _hash(target),
                score.metric: row["score"],
            }
        )
    return rows


def samples_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """One hash for all questions of a task, as lmms-eval makes its `task_hashes`."""
    return _hash("".join(f"sample_{index}{row['doc_hash']}" for index, row in enumerate(rows)))


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
