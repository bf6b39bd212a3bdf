"""A folder of results as one shape, whether `mmtune eval` or lmms-eval wrote it.

lmms-eval (0.7.3, loggers/evaluation_tracker.py) writes DIR/MODEL/DATE_results.json and, with --log_samples,
DATE_samples_TASK.jsonl beside it. Its samples name their question by a running number and the prompt; some
metrics carry the dataset's question_id along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl
from mmtune.evaluation.metrics.base import field, some


@dataclass(frozen=True)
class Row:
    """One question and what became of it."""

    score: float
    """As its scorer gives it: 0 to 1, but for CIDEr."""
    prompt: str
    """What the model was asked, without the picture's placeholder."""
    index: int
    """Its place in the data set."""
    question_id: str | None
    image: str | None
    cluster: str | None
    """What its score depends on, where that is known."""


@dataclass(frozen=True)
class Scored:
    """What one model scored on one task, and how that was made."""

    score: float
    stderr: float | None
    """In points, 100 times the mean over its questions."""
    n: int
    unit: str
    rows: list[Row]
    """The questions; none where there are no samples, or their mean is not the score."""
    made: dict[str, str]
    """Setting -> in words; what was not said is not there."""


@dataclass(frozen=True)
class Folder:
    path: Path
    """The file with the scores."""
    kind: str
    """mmtune or lmms-eval."""
    tasks: list[str]
    results: dict[str, Any]

    def read(self, task: str) -> Scored:
        """One of its tasks. Raises UserError where a key or a file is missing or broken."""
        return _ours(self, task) if self.kind == "mmtune" else _lmms_eval(self, task)


def open_folder(folder: Path) -> Folder:
    """The results in a folder, the newest of lmms-eval's. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, mend="Give the folder that holds the results.")
    own = folder / "results.json"
    files = [own] if own.is_file() else _dated(folder)
    if not files:
        raise UserError(
            "there are no results here: neither results.json nor a *_results.json of lmms-eval",
            where=folder,
            mend="Give the folder that mmtune eval or lmms-eval had as --output_path.",
        )
    if len({file.parent for file in files}) > 1:
        raise UserError(
            f"it holds the results of several models: {some(sorted({file.parent.name for file in files}))}",
            where=folder,
            mend="Give the folder of one of them.",
        )
    path = files[-1]
    results = read_json(path)
    if not isinstance(results, dict):
        raise UserError(f"expected an object, found {type(results).__name__}", where=path)
    rows = field(results, "results", dict, str(path))
    scored = [task for task, row in rows.items() if isinstance(row, dict)]
    return Folder(path, "mmtune" if path == own else "lmms-eval", scored, results)


def _dated(folder: Path) -> list[Path]:
    """lmms-eval's files in a folder, or else in those it made for a model (one level, or two: owner/name)."""
    for pattern in ("*_results.json", "*/*_results.json", "*/*/*_results.json"):
        found = sorted(folder.glob(pattern), key=lambda path: (str(path.parent), path.name))
        if found:
            return found
    return []


def _ours(folder: Folder, task: str) -> Scored:
    results, where = folder.results, f"{folder.path}, {task}"
    row = field(results["results"], task, dict, str(folder.path))
    path = folder.path.with_name(f"samples_{task}.jsonl")
    rows = []
    for index, (line, sample) in enumerate(read_jsonl(path)):
        at = f"{path}, line {line}"
        rows.append(
            Row(
                score=field(sample, "score", (int, float), at),
                prompt=_asked(str(sample.get("prompt") or "")),
                index=int(sample.get("doc_id", index)),
                question_id=str(field(sample, "question_id", (str, int), at)),
                image=_text(sample.get("image")),
                cluster=str(field(sample, "cluster", (str, int), at)),
            )
        )
    score = field(row, "score", (int, float), where)
    if abs(100 * fmean(each.score for each in rows) - score) > 0.01:
        raise UserError(
            "its samples have another mean than results.json says",
            where=path,
            mend="The files are of different evaluations: evaluate again.",
        )
    config = field(results, "configs", dict, str(folder.path)).get(task, {})
    decoding = results.get("decoding", {})
    longest = decoding.get("max_new_tokens")
    made = {
        "made by": "mmtune",
        "model": results.get("model"),
        "part put back": results.get("restored"),
        "rule": row.get("rule"),
        "metric": row.get("metric"),
        "split": results.get("splits", {}).get(task),
        "annotation file": results.get("data", {}).get(task),
        "protocol": config.get("hash"),
        "longest answer": longest if isinstance(longest, int) else config.get("max_new_tokens"),
        "limit": results.get("limit") or "none",
        "batch size": results.get("batch_size"),
        "precision": results.get("precision"),
    }
    unit, stderr = str(row.get("unit", "%")), row.get("stderr")
    return Scored(score, stderr, len(rows), unit, rows, _said(made))


def _lmms_eval(folder: Folder, task: str) -> Scored:
    results, row = folder.results, folder.results["results"][task]
    date = folder.path.name.removesuffix("_results.json")
    path = folder.path.with_name(f"{date}_samples_{task}.jsonl")
    samples = [sample for _, sample in read_jsonl(path)] if path.is_file() else []
    figures = {
        tuple(key.split(",", 1)): value
        for key, value in row.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    }
    if not figures:
        raise UserError(
            f"there is no score of {task} in it: {some(row)}",
            where=folder.path,
            mend="Was it run with --predict_only? Score its answers first.",
        )
    # The figure that is the mean of its samples, or else the first: only the former can be paired.
    metric, rows = next(
        ((key, rows) for key, value in figures.items() if (rows := _rows(samples, key[0], value))),
        (next(iter(figures)), []),
    )
    name = ",".join(metric)
    stderr = row.get(f"{metric[0]}_stderr_clustered,{metric[1]}", row.get(f"{metric[0]}_stderr,{metric[1]}"))
    config, asked = results.get("configs", {}).get(task, {}), results.get("config", {})
    arguments = str(asked.get("model_args") or "")
    precision = re.search(r"\b(?:torch_)?dtype['\"]?[=:] ?['\"]?(\w+)", arguments)
    version = results.get("lmms_eval_version")
    made = {
        "made by": f"lmms-eval {version}" if version else "lmms-eval",
        "model": arguments or asked.get("model"),
        "rule": "lmms-eval",
        "metric": name,
        "split": config.get("test_split"),
        "data set": " ".join(filter(None, [config.get("dataset_path"), config.get("dataset_name")])),
        "longest answer": (config.get("generation_kwargs") or {}).get("max_new_tokens"),
        "limit": asked.get("limit") or "none",
        "batch size": asked.get("batch_size"),
        "precision": precision[1] if precision else None,
    }
    return Scored(
        score=100 * figures[metric],
        stderr=100 * stderr if isinstance(stderr, (int, float)) else None,
        n=len(rows) or int(results.get("n-samples", {}).get(task, {}).get("effective") or 0),
        unit="%",
        rows=rows,
        made=_said(made),
    )


def _rows(samples: list[dict[str, Any]], metric: str, mean: float) -> list[Row]:
    """The samples as rows, where a metric scores each of them and `mean` is their mean; none otherwise."""
    rows = []
    for index, sample in enumerate(samples):
        value = sample.get(metric)
        value = value.get("score") if isinstance(value, dict) else value
        if not isinstance(value, (int, float)):
            return []
        media = sample.get("input_media")
        image = _text(_look_up(sample, ("image_id", "imageId")))
        image = image or (" ".join(map(str, media)) if isinstance(media, list) else None) or None
        rows.append(
            Row(
                score=float(value),
                prompt=_asked(_text(sample.get("input")) or ""),
                index=int(sample.get("doc_id", index)),
                question_id=_text(_look_up(sample, ("question_id", "questionId"))),
                image=image,
                cluster=image,
            )
        )
    return rows if rows and abs(fmean(row.score for row in rows) - mean) < 1e-4 else []


def _look_up(sample: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """What one of the keys holds, in a sample, its doc or one of its metrics."""
    for place in (sample, *_mappings(sample)):
        for key in keys:
            if isinstance(place.get(key), (str, int)):
                return place[key]
    return None


def _mappings(sample: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for value in sample.values():
        if isinstance(value, Mapping):
            yield value


def _asked(prompt: str) -> str:
    return prompt.replace("<image>", "").strip()


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _said(made: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in made.items() if value not in (None, "")}
