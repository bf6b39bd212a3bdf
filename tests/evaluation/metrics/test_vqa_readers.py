"""The official files of TextVQA's relatives: OKVQA, VQAv2, VizWiz."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import okvqa, textvqa, vizwiz, vqa, vqav2
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file, score_predictions


def ten(*texts: str) -> list[dict[str, Any]]:
    return [
        {"answer": text, "raw_answer": f"{text}ing", "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(texts * (10 // len(texts)), start=1)
    ]


def annotation(number: int, *texts: str, **changes: Any) -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": 297147,
        "question_type": "what sport",
        "answer_type": "other",
        "confidence": 3,
        "answers": ten(*texts),
        **changes,
    }


def written(folder: Path, rows: list[dict[str, Any]], prefix: str = "", questions: bool = True) -> Path:
    """Annotations of these rows under their official name, with the questions' file where wanted."""
    path = folder / f"{prefix}mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"info": {}, "annotations": rows}))
    if questions:
        asked = [
            {"image_id": 1, "question": f"Q{r['question_id']}?", "question_id": r["question_id"]}
            for r in rows
        ]
        file = folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json"
        file.write_text(json.dumps({"questions": asked}))
    return path


ROWS = [
    annotation(1, "surf"),
    annotation(2, "frisbee", "disc", answer_type="number", question_type="how many"),
]


def test_okvqa_is_read_with_its_pictures_and_questions(tmp_path: Path) -> None:
    first, second = okvqa.read(written(tmp_path, ROWS))
    assert (first.id, first.text, first.cluster) == ("1", "Q1?", "297147")
    assert first.image == "COCO_val2014_000000297147.jpg"
    assert first.answers == ("surf",) * 10 and second.answers == ("frisbee", "disc") * 5
    assert (first.category, second.category) == (("what sport",), ("how many",))
    assert (
        okvqa.read(tmp_path / "mscoco_val2014_annotations.json", answers="raw_answer")[0].answers[0]
        == "surfing"
    )
    with pytest.raises(UserError, match="neither of answer and raw_answer"):
        okvqa.read(tmp_path / "mscoco_val2014_annotations.json", answers="stemmed")


def test_vqav2_counts_by_answer_type_and_question_type(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS, "v2_")
    first, second = vqav2.read(path)
    assert second.text == "Q2?" and second.category == ("number", "how many")
    score = score_predictions([first, second], {"1": "surf", "2": "disk"}, load_protocol("vqav2"))
    assert score.by_category == {
        "other": {"score": 100.0, "n": 1},
        "number": {"score": 0.0, "n": 1},
        "how many": {"score": 0.0, "n": 1},
        "what sport": {"score": 100.0, "n": 1},
    }


def test_the_annotations_alone_can_be_scored_but_not_asked(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS, questions=False)
    (tmp_path / "results.json").write_text(
        json.dumps([{"question_id": 1, "answer": "surf"}, {"question_id": 2, "answer": "disc"}])
    )
    protocol = load_protocol("okvqa")
    assert score_file(protocol.for_split("val"), tmp_path / "results.json", path).score == 100.0
    with pytest.raises(UserError, match=r"question 1: it has no text(.|\n)*questions file"):
        protocol.questions("val", tmp_path)


def test_questions_of_another_split_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", ROWS[:1]).parent / "OpenEnded_mscoco_val2014_questions.json"
    other.rename(tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"mine\.json: questions without their text: 2\n"):
        okvqa.read(path, questions="mine.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no questions"),
        ([ROWS[0], ROWS[0]], "more than once: 1"),
        (
            [annotation(1, "a", answers=ten("a")[:9])],
            r"annotations\[0\], question_id 1: ten answers .* found 9",
        ),
        ([annotation(1, "a", answers=[{}] * 10)], "each a text under 'answer'"),
        ([annotation(1, "a", image_id="x1")], "does not fit the id 'x1'"),
        ([annotation(1, "a", answer_type=3)], "'answer_type' should be str"),
    ],
)
def test_broken_vqa_files_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vqav2.read(written(tmp_path, rows, questions=False))


VIZWIZ = [
    {
        "image": f"VizWiz_val_0000000{number}.jpg",
        "question": "Can you tell me what this is?",
        "answers": [{"answer": text, "answer_confidence": "yes"} for text in texts],
        "answer_type": kind,
        "answerable": int(kind != "unanswerable"),
    }
    for number, texts, kind in ((0, ["soup"] * 10, "other"), (1, ["unanswerable"] * 10, "unanswerable"))
]


def test_vizwiz_scores_unanswerable_as_an_answer(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(VIZWIZ))
    first, second = vizwiz.read(tmp_path / "val.json")
    assert first.id == first.image == first.cluster == "VizWiz_val_00000000.jpg"
    assert (first.category, second.category) == ("other", "unanswerable")
    # The submission format of the challenge names the picture.
    rows = [{"image": row["image"], "answer": "Unanswerable."} for row in VIZWIZ]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    score = score_file(load_protocol("vizwiz"), tmp_path / "answers.json", tmp_path / "val.json")
    assert [row["score"] for row in score.per_question] == [0.0, 1.0]
    with pytest.raises(UserError, match=r"no list\n.*such as val\.json"):
        (tmp_path / "val.json").write_text("{}")
        vizwiz.read(tmp_path / "val.json")


@pytest.mark.parametrize(
    ("module", "rule", "same_as"),
    [
        (textvqa, "lmms-eval", vqa.m4c),
        (textvqa, "lorasculpt", vqa.m4c),
        (textvqa, "vlmevalkit", vqa.vlmevalkit),
        (okvqa, "lorasculpt", vqa.vqa_legacy),
        (okvqa, "lmms-eval", vqa.m4c),
        (vqav2, "lmms-eval", vqa.lmms_eval_vqav2),
        (vizwiz, "lmms-eval", vqa.m4c),
        (vizwiz, "vlmevalkit", vqa.vlmevalkit),
    ],
)
def test_a_project_names_its_rule_of_each_task(module: Any, rule: str, same_as: Any) -> None:
    assert module.RULES[rule] is same_as


@pytest.mark.parametrize(
    ("written_as", "stem"),
    [
        ("surfing", "surf"),
        ("Frisbees", "frisbee"),
        ("playing soccer", "play soccer"),
        ("teddy bears", "teddy bear"),
        ("skiing", "ski"),
        ("men", "man"),
        ("bus", "bus"),
        ("yes", "yes"),
        ("it was", "it was"),
        ("king", "king"),
        ("christmas", "christmas"),
        ("", ""),
    ],
)
def test_lemmas_are_okvqas_stems(written_as: str, stem: str) -> None:
    pytest.importorskip("lemminflect", reason="lemminflect is not installed")
    assert okvqa.lemmatiser()(written_as) == stem


def test_lemmatising_is_asked_for_and_said(tmp_path: Path) -> None:
    pytest.importorskip("lemminflect", reason="lemminflect is not installed")
    questions = okvqa.read(written(tmp_path, ROWS))
    predictions = {"1": "Surfing.", "2": "frisbees"}
    protocol = load_protocol("okvqa")
    as_they_are = score_predictions(questions, predictions, protocol)
    lemmas = score_predictions(questions, predictions, protocol, "lemmatised")
    assert (as_they_are.score, lemmas.score) == (0.0, 100.0)
    assert as_they_are.also == {} and lemmas.rule == "lemmatised"
    assert lemmas.also["lemmatiser"].startswith("lemminflect 0.")


def test_a_missing_lemmatiser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "lemminflect":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    okvqa.lemmatiser.cache_clear()
    with pytest.raises(UserError, match=r"needs the package lemminflect\n.*pip install lemminflect"):
        okvqa.lemmatiser()
