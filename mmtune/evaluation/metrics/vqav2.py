"""VQAv2's official files, a layout that OKVQA shares: annotations, and the questions in a file of their own.

`lmms-eval` is the rule of lmms_eval/tasks/vqav2/utils.py. LLaVA submits its VQAv2 answers to a server after
m4c's normaliser, which the validation split's `m4c` comes nearest to.
"""

from __future__ import annotations

from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import vqa
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, image_path, some

METRIC = "soft_accuracy"
RULES: dict[str, Rule] = {**vqa.RULES, "lmms-eval": vqa.lmms_eval_vqav2}


def read(
    path: Path, image: str = "COCO_val2014_{image_id:012d}.jpg", questions: str | None = None
) -> list[Question]:
    """The questions of a file like v2_mscoco_val2014_annotations.json, by answer type and question type.

    `image` says how a picture's path is made of its id. `questions` names the file with the questions' texts,
    beside the annotations; by default it is that of the official name. Where it is not there, the texts are
    empty: predictions can be scored, but nothing asked. Raises UserError, naming file, row and id.
    """
    return read_layout(path, image, questions, "answer", ("answer_type", "question_type"))


def files(path: Path, questions: str | None = None, **_: object) -> list[Path]:
    """What is read beside the annotations, where it is there."""
    file = _questions_file(Path(path), questions)
    return [file] if file.is_file() and file != path else []


def read_layout(
    path: Path, image: str, questions: str | None, answers: str, categories: tuple[str, ...]
) -> list[Question]:
    """The same for any file of the layout; `answers` is the key of an answer's text."""
    path = Path(path)
    expected = "An annotation file in VQA's layout is expected, such as mscoco_val2014_annotations.json."
    texts = _read_texts(path, questions)
    found = []
    for where, row in vqa.rows_of(path, "annotations", expected):
        identity = str(field(row, "question_id", (int, str), where))
        where = f"{where}, question_id {identity}"
        image_id = field(row, "image_id", (int, str), where)
        found.append(
            Question(
                id=identity,
                text="" if texts is None else texts.get(identity, ""),
                answers=vqa.ten_answers(row, where, answers),
                image=image_path(image, image_id),
                cluster=str(image_id),
                category=tuple(field(row, key, str, where) for key in categories if key in row),
            )
        )
    if texts is not None and (without := [question.id for question in found if question.id not in texts]):
        raise UserError(
            f"questions without their text: {some(without)}",
            where=_questions_file(path, questions),
            mend="Take the questions of the same split.",
        )
    return checked(found, path)


def _questions_file(path: Path, questions: str | None) -> Path:
    official = path.name.replace("mscoco", "OpenEnded_mscoco").replace("annotations", "questions")
    return path.parent / (questions or official)


def _read_texts(path: Path, questions: str | None) -> dict[str, str] | None:
    file = _questions_file(path, questions)
    if file == path or not file.is_file():
        return None
    expected = "A questions file is expected, such as v2_OpenEnded_mscoco_val2014_questions.json."
    texts: dict[str, str] = {}
    for where, row in vqa.rows_of(file, "questions", expected):
        texts[str(field(row, "question_id", (int, str), where))] = field(row, "question", str, where)
    return texts
