"""Accuracy on GQA's official question files."""

from __future__ import annotations

from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, image_path, some

METRIC = "accuracy"


def gqa(question: Question, prediction: str) -> float:
    """Equality with the lower-case answer, after what LLaVA does on the way to the official scorer.

    That is `rstrip(".")` and `lower()`, and no more: a space or newline at the end is wrong.
    """
    return float(prediction.rstrip(".").lower() == question.answers[0])


RULES: dict[str, Rule] = {"gqa": gqa}


def read(path: Path, image: str = "{image_id}.jpg") -> list[Question]:
    """The questions of a file like testdev_balanced_questions.json, by their structural type.

    `image` says how a picture's path is made of its id. Raises UserError, naming file and id, for broken
    rows, and for a file with unbalanced questions, which the official accuracy leaves out.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            "expected an object of questions by their id",
            where=path,
            mend="Such as testdev_balanced_questions.json.",
        )
    questions = []
    unbalanced = []
    for identity, row in content.items():
        where = f"{path}, question {identity}"
        if not isinstance(row, dict):
            raise UserError(
                f"expected an object, found {type(row).__name__}", where=where, mend="Fetch the file anew."
            )
        if not row.get("isBalanced", True):
            unbalanced.append(identity)
        image_id = str(field(row, "imageId", (str, int), where))
        types = row.get("types")
        questions.append(
            Question(
                id=identity,
                text=field(row, "question", str, where),
                answers=(field(row, "answer", str, where),),
                image=image_path(image, image_id),
                cluster=image_id,
                category=str(types.get("structural") or "") if isinstance(types, dict) else "",
            )
        )
    if unbalanced:
        raise UserError(
            f"questions that are not balanced: {some(unbalanced)}",
            where=path,
            mend="The official accuracy leaves them out; use the balanced file.",
        )
    return checked(questions, path)
