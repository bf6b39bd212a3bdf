"""POPE: is there a dog in the image? Accuracy as the score, precision, recall and F1 of `yes` beside it.

Three files ask of the same pictures: objects that are not there are drawn at random, by how often they occur
(popular), or by how often they occur together with those that are there (adversarial).

* `pope`: the official evaluate.py and LLaVA's eval_pope.py. Of what stands before the first full stop, commas
  apart, the words `No`, `no` or `not` make it a no; anything else, an empty answer too, is a yes.
* `lmms-eval`: lmms-eval's pope task. Only `yes` and `no` count, but for case and outer space; another answer
  is neither: wrong, but in no precision and no recall.

LLaVA's tables print F1 averaged over the three files: `f1_mean`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_jsonl
from mmtune.evaluation.metrics.base import Question, Rule, checked, field

METRIC = "accuracy"
CATEGORIES = ("random", "popular", "adversarial")


def said_pope(prediction: str) -> str | None:
    """What the official rule takes an answer for: `yes` or `no`."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def said_lmms_eval(prediction: str) -> str | None:
    """What lmms-eval's rule takes an answer for: `yes`, `no`, or None for anything else."""
    bare = prediction.lower().strip()
    return bare if bare in ("yes", "no") else None


def _rule(said: Callable[[str], str | None]) -> Rule:
    return lambda question, prediction: float(said(prediction) == question.answers[0])


SAID = {"pope": said_pope, "lmms-eval": said_lmms_eval}
RULES: dict[str, Rule] = {name: _rule(said) for name, said in SAID.items()}


def also(
    questions: Sequence[Question], predictions: Mapping[str, str], rule: str, scores: Sequence[float]
) -> dict[str, Any]:
    """Precision, recall, F1 and share of `yes` in points: over all, and under each category's name.

    A missing prediction is counted as the wrong one of the two. What has no denominator is 0.
    """
    wrong = {"yes": "no", "no": "yes"}
    said = [
        SAID[rule](predictions[question.id]) if question.id in predictions else wrong[question.answers[0]]
        for question in questions
    ]
    pairs: dict[str, list[tuple[str, str | None]]] = {}
    for question, answer in zip(questions, said, strict=True):
        assert isinstance(question.category, str)
        pairs.setdefault(question.category, []).append((question.answers[0], answer))
    each = {category: _figures(found) for category, found in pairs.items()}
    mean = sum(figures["f1"] for figures in each.values()) / len(each)
    return {**_figures([pair for found in pairs.values() for pair in found]), "f1_mean": mean, **each}


def _figures(pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    """Of (label, answer) pairs."""
    right = pairs.count(("yes", "yes"))
    precision = _points(right, right + pairs.count(("no", "yes")))
    recall = _points(right, right + pairs.count(("yes", "no")))
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "yes_ratio": _points(sum(answer == "yes" for _, answer in pairs), len(pairs)),
    }


def _points(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def read(path: Path, categories: Sequence[str] = CATEGORIES) -> list[Question]:
    """The questions of POPE's files, which lie side by side; `path` is one of them, or LLaVA's question file.

    Official, such as coco_pope_random.json: JSONL of question_id, image, text, label. Its ids begin anew in
    each file, so a question's id is CATEGORY/ID. LLaVA's llava_pope_test.jsonl has ids of its own and no
    labels: these are taken from the official files beside it or in the folder coco, in the order of each
    category, as LLaVA's scorer does.
    Raises UserError, naming file and line.
    """
    rows = read_jsonl(path)
    if all("label" not in row and "category" in row for _, row in rows):
        return checked(_of_llava(path, rows), path)
    named = [name for name in CATEGORIES if name in path.name]
    if len(named) != 1:
        raise UserError(
            f"its name holds none of {', '.join(CATEGORIES)}, by which POPE's files are known",
            where=path,
            mend="Such as coco_pope_random.json.",
        )
    unknown = sorted(set(categories) - set(CATEGORIES))
    if unknown:
        raise UserError(f"categories: POPE has no {unknown[0]}", mend=f"Known: {', '.join(CATEGORIES)}.")
    questions = []
    for category in categories:
        file = path.with_name(path.name.replace(named[0], category))
        for line, row in read_jsonl(file):
            where = f"{file}, line {line}"
            identity = f"{category}/{field(row, 'question_id', (int, str), where)}"
            questions.append(_question(row, identity, category, where))
    return checked(questions, path)


def files(path: Path, categories: Sequence[str] = CATEGORIES, **_: object) -> list[Path]:
    """What is read beside `path`: the other categories; beside LLaVA's question file all that label it."""
    named = [name for name in CATEGORIES if name in path.name]
    if len(named) == 1:
        others = [path.with_name(path.name.replace(named[0], category)) for category in categories]
    else:
        others = [_labels(path, category) for category in CATEGORIES]
    return [file for file in others if file != path and file.is_file()]


def _labels(path: Path, category: str) -> Path:
    """The official file of a category: beside LLaVA's question file, or in the folder coco."""
    file = path.with_name(f"coco_pope_{category}.json")
    return file if file.is_file() else path.parent / "coco" / file.name


def _question(row: dict[str, Any], identity: str, category: str, where: str) -> Question:
    label = field(row, "label", str, where)
    if label not in ("yes", "no"):
        raise UserError(f"'label' is {json.dumps(label)}", where=where, mend="POPE's labels are yes and no.")
    image = field(row, "image", str, where)
    return Question(
        id=identity,
        text=field(row, "text", str, where),
        answers=(label,),
        image=image,
        cluster=image,
        category=category,
    )


def _of_llava(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Question]:
    unasked: dict[str, Iterator[tuple[str, dict[str, Any]]]] = {}
    questions = []
    for line, row in rows:
        where = f"{path}, line {line}"
        category = field(row, "category", str, where)
        if category not in CATEGORIES:
            raise UserError(f"unknown category '{category}'", where=where, mend="Is it POPE's file?")
        if category not in unasked:
            file = _labels(path, category)
            unasked[category] = iter(
                [(f"{file}, line {number}", found) for number, found in read_jsonl(file)]
            )
        place, labelled = next(unasked[category], (str(path), {}))
        text = field(row, "text", str, where).split("\n", 1)[0]
        if str(labelled.get("text")).lower() != text.lower():
            raise UserError(
                f"it is not the next question of the official file of category '{category}'",
                where=where,
                mend="Labels are taken in order: both files have to be whole and as they were published.",
            )
        identity = str(field(row, "question_id", (str, int), where))
        questions.append(_question(labelled, identity, category, place))
    return questions
