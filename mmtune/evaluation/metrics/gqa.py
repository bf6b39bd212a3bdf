"""Accuracy on GQA's official question files, whose answers are in lower case.

* `official`: GQA's eval.py, which compares as it stands. A model that answers in capitals gets nothing.
* `gqa`: the same after what LLaVA does on the way there (scripts/convert_gqa_for_eval.py). `lorasculpt` is
  another name for it: LoRASculpt's script does the same.
* `vlmevalkit`: VLMEvalKit (vlmeval/dataset/utils/vqa_eval.py, `accuracy`): outer space and case are forgiven,
  a full stop is not.
* `lmms-eval`: lmms-eval's gqa task (`exact_match` with ignore_case and ignore_punctuation): case and ASCII
  punctuation anywhere are forgiven, a space is not.

Of the official figures, consistency, validity, plausibility and distribution are not computed: they need
further files. Accuracy on binary and open questions is.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics.base import (
    Question,
    Rule,
    an_object,
    checked,
    field,
    image_path,
    read_object,
    some,
)
from mmtune.evaluation.metrics.exact import stripped

METRIC = "accuracy"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def official(question: Question, prediction: str) -> float:
    """Equality, capitals and full stops included."""
    return float(prediction == question.answers[0])


def gqa(question: Question, prediction: str) -> float:
    """Equality with the lower-case answer, after what LLaVA does on the way to the official scorer.

    That is `rstrip(".")` and `lower()`, and no more: a space or newline at the end is wrong.
    """
    return float(prediction.rstrip(".").lower() == question.answers[0])


def lmms_eval(question: Question, prediction: str) -> float:
    """Equality but for case and ASCII punctuation, of prediction and answer."""
    said, answer = (text.lower().translate(_NO_PUNCTUATION) for text in (prediction, question.answers[0]))
    return float(said == answer)


RULES: dict[str, Rule] = {
    "gqa": gqa,
    "lorasculpt": gqa,
    "official": official,
    "vlmevalkit": stripped,
    "lmms-eval": lmms_eval,
}


def also(
    questions: Sequence[Question], predictions: Mapping[str, str], rule: str, scores: Sequence[float]
) -> dict[str, Any]:
    """Points on binary and on open questions, which GQA calls so by their structural type."""
    kinds: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        if question.category:
            kinds.setdefault("open" if question.category == "query" else "binary", []).append(score)
    return {kind: 100 * sum(found) / len(found) for kind, found in sorted(kinds.items())}


def read(path: Path, image: str = "{image_id}.jpg") -> list[Question]:
    """The questions of a file like testdev_balanced_questions.json, by their structural type.

    `image` says how a picture's path is made of its id. Raises UserError, naming file and id, for broken
    rows, and for a file with unbalanced questions, which the official accuracy leaves out.
    """
    content = read_object(path, "Give questions by their id, such as testdev_balanced_questions.json.")
    questions = []
    unbalanced = []
    for identity, row in content.items():
        where = f"{path}, question {identity}"
        row = an_object(row, where)
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
