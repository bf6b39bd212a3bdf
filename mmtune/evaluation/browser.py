"""Every question of a report with what each model answered, as data for the page's browser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.core.files import read_json
from mmtune.evaluation.examples import (
    RIGHT,
    Example,
    Row,
    Rows,
    images_of,
    plain,
    prompt_of,
    read_rows,
    targets_of,
)
from mmtune.evaluation.thumbnails import Picture, Thumbnails

FLIPS = ("lost", "won", "wrong", "right")  # by what is looked at first


@dataclass(frozen=True)
class TaskRows:
    """A task's questions: the base's rows, each method's by its label, and the folder of the pictures.

    images: None where the evaluation does not say it.
    """

    before: Rows
    after: Mapping[str, Rows]
    images: str | None


def rows_to_show(base: Path, models: Mapping[str, Path], tasks: Sequence[str]) -> dict[str, TaskRows]:
    """The answers of the base and of the methods, from the folders of their evaluations."""
    images = read_json(base / "results.json").get("images") or {}
    return {
        task: TaskRows(
            read_rows(base, task, base=True),
            {label: read_rows(folder, task, base=False) for label, folder in models.items()},
            images.get(task),
        )
        for task in tasks
    }


def flip(before: float, after: Iterable[float]) -> str:
    """What became of a question: lost or won by some model, or right or wrong with all of them."""
    right = [score >= RIGHT for score in after]
    if before >= RIGHT:
        return "right" if all(right) else "lost"
    return "won" if any(right) else "wrong"


def pictures_in_order(
    tasks: Mapping[str, TaskRows], examples: Mapping[str, Sequence[Example]]
) -> list[Picture]:
    """The pictures of all questions, those first that should be seen first: of the examples, then of
    questions that changed sides, the largest loss first; then the tasks in turn.
    """
    ordered = []
    for number, (task, rows) in enumerate(tasks.items()):
        if rows.images is None:
            continue
        shown = {example.question_id for example in examples.get(task, ())}
        for place, (question, row) in enumerate(rows.before.items()):
            scores = [answers[question]["score"] for answers in rows.after.values()]
            kind = flip(row["score"], scores)
            urgency = -1 if question in shown else FLIPS.index(kind)
            loss = sum(row["score"] - score for score in scores)
            ordered += [(urgency, -loss, place, number, (rows.images, name)) for name in images_of(row)]
    return [its[-1] for its in sorted(ordered, key=lambda each: each[:-1])]


class _Numbers:
    """Things numbered in the order they are first asked for."""

    def __init__(self) -> None:
        self.of: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self.of.setdefault(thing, len(self.of))


def browser_data(tasks: Mapping[str, TaskRows], thumbnails: Thumbnails) -> dict[str, Any]:
    """What the page's script shows, columns of small numbers: JSON that a browser reads in a moment.

    texts: each text once; everything else that names a text has its place in it. pictures: [path, data URI or
    ""]. Of a task: ids; prompts and targets; pictures and categories, several of each question; answers
    and scores, a column for the base and one for each method: -1 is no answer, a score is in hundredths.
    """
    texts, pictures = _Numbers(), _Numbers()
    columns = {}
    for task, rows in tasks.items():
        models = [rows.before, *rows.after.values()]
        columns[task] = {
            "ids": list(map(plain, rows.before)),
            "prompts": [texts(plain(prompt_of(row))) for row in rows.before.values()],
            "targets": [texts(" / ".join(map(plain, targets_of(row)))) for row in rows.before.values()],
            "pictures": [
                [pictures((rows.images or "", name)) for name in images_of(row)]
                for row in rows.before.values()
            ],
            "categories": [[texts(plain(name)) for name in _categories(row)] for row in rows.before.values()],
            "answers": [[_answer(model[question], texts) for question in rows.before] for model in models],
            "scores": [
                [_hundredths(model[question]["score"]) for question in rows.before] for model in models
            ],
        }
    shown = [[texts(plain(picture[1])), thumbnails.uris.get(picture, "")] for picture in pictures.of]
    return {"texts": list(texts.of), "pictures": shown, "tasks": columns}


def _answer(row: Row, texts: _Numbers) -> int:
    return -1 if row["prediction"] is None else texts(plain(row["prediction"]))


def _categories(row: Row) -> list[str]:
    category = row.get("category") or []
    several = [category] if isinstance(category, str) else category
    return [str(name) for name in several if name]


def _hundredths(score: float) -> int:
    """Rounded, but for a half, which decides whether an answer counts as right."""
    rounded = round(100 * score)
    return max(rounded, 50) if score >= RIGHT else min(rounded, 49)


def notes(tasks: Mapping[str, TaskRows], thumbnails: Thumbnails) -> list[str]:
    """Which pictures have no thumbnail though nothing is wrong with them."""
    said = []
    if thumbnails.over_budget:
        said.append(
            f"{thumbnails.over_budget:,} of {len(thumbnails):,} pictures are left out: all of them together "
            f"may take {thumbnails.budget / 1e6:g} MB, and those of questions that changed sides go first. "
            "mmtune report --thumbnails MB gives them more or less."
        )
    silent = [task for task, rows in tasks.items() if rows.images is None]
    if silent:
        said.append(f"Where the pictures of {', '.join(silent)} lie, the base's evaluation does not say.")
    return said


def script_json(data: Any) -> str:
    """JSON that can stand in a script element: ASCII, and no `<`, so that nothing in it ends the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
