"""TextVQA 0.5.1 files, with the OCR tokens of its Rosetta files where the prompt wants them.

`lmms-eval` (lmms_eval/tasks/textvqa/utils.py) and `lorasculpt` (which scores TextVQA with LLaVA's script) are
`m4c` here.
"""

from __future__ import annotations

from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import vqa
from mmtune.evaluation.metrics.base import Question, Rule, checked, field, image_path, some

METRIC = "soft_accuracy"
RULES: dict[str, Rule] = {
    **vqa.RULES,
    "vlmevalkit": vqa.vlmevalkit,
    "lmms-eval": vqa.m4c,
    "lorasculpt": vqa.m4c,
}


def read(path: Path, image: str = "{image_id}.jpg", ocr: str | None = None) -> list[Question]:
    """The questions of a file like TextVQA_0.5.1_val.json.

    `image` says how a picture's path is made of its id. `ocr` names a file beside the annotations like
    TextVQA_Rosetta_OCR_v0.2_val.json; where it is not there, the questions can be scored, not asked with
    tokens. Raises UserError, naming file, row and id, for rows without their fields or without ten answers
    (the official test file has none), and for pictures without OCR tokens.
    """
    path = Path(path)
    expected = "A TextVQA annotation file is expected, such as TextVQA_0.5.1_val.json."
    tokens = _read_ocr(path.parent / ocr) if ocr and (path.parent / ocr).is_file() else None
    questions = []
    without: dict[str, None] = {}
    for where, row in vqa.rows_of(path, "data", expected):
        identity = str(field(row, "question_id", (int, str), where))
        where = f"{where}, question_id {identity}"
        answers = vqa.ten_answers(row, where, None)
        image_id = str(field(row, "image_id", (int, str), where))
        if tokens is not None and image_id not in tokens:
            without[image_id] = None
        questions.append(
            Question(
                id=identity,
                text=field(row, "question", str, where),
                answers=answers,
                image=image_path(image, image_id),
                cluster=image_id,
                ocr=None if tokens is None else tokens.get(image_id, ()),
            )
        )
    if without:
        raise UserError(
            f"no OCR tokens of images: {some(without)}",
            where=path.parent / str(ocr),
            mend="Take the OCR file of the same split (a picture without text has an empty list).",
        )
    return checked(questions, path)


def files(path: Path, ocr: str | None = None, **_: object) -> list[Path]:
    """What is read beside the annotations, where it is there."""
    return [path.parent / ocr] if ocr and (path.parent / ocr).is_file() else []


def _read_ocr(path: Path) -> dict[str, tuple[str, ...]]:
    expected = "A Rosetta file is expected, such as TextVQA_Rosetta_OCR_v0.2_val.json."
    tokens = {}
    for where, row in vqa.rows_of(path, "data", expected):
        found = field(row, "ocr_tokens", list, where)
        if not all(isinstance(token, str) for token in found):
            raise UserError("'ocr_tokens' should be texts", where=where, mend=expected)
        tokens[str(field(row, "image_id", (int, str), where))] = tuple(found)
    return tokens
