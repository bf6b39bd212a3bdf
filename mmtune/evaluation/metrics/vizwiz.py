"""VizWiz-VQA's official files: questions that blind people asked, "unanswerable" among the answers.

`lmms-eval` (lmms_eval/tasks/vizwiz_vqa/utils.py) is `m4c`, `vlmevalkit` the rule of its VizWiz class.
"""

from __future__ import annotations

from pathlib import Path

from mmtune.evaluation.metrics import vqa
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, image_path

METRIC = "soft_accuracy"
RULES: dict[str, Rule] = {**vqa.RULES, "vlmevalkit": vqa.vlmevalkit, "lmms-eval": vqa.m4c}


def read(path: Path, image: str = "{image_id}") -> list[Question]:
    """The questions of a file like val.json, by answer type; a picture's file name is the question's id.

    `image` says how a picture's path is made of that name. Raises UserError, naming file, row and id.
    """
    questions = []
    for where, row in vqa.rows_of(Path(path), "", "VizWiz's annotation file is one list, such as val.json."):
        name = field(row, "image", str, where)
        where = f"{where}, image {name}"
        questions.append(
            Question(
                id=name,
                text=field(row, "question", str, where),
                answers=vqa.ten_answers(row, where, "answer"),
                image=image_path(image, name),
                cluster=name,
                category=field(row, "answer_type", str, where) if "answer_type" in row else "",
            )
        )
    return checked(questions, path)
