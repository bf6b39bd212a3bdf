from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data import tiny
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.score import read_predictions, read_questions, score_file, score_predictions

TEXTVQA = Path(__file__).parents[1] / "data" / "textvqa"
ANNOTATIONS = TEXTVQA / "TextVQA_0.5.1_val_40.json"
ANSWERS = TEXTVQA / "answers_llava-v1.5-13b_40.jsonl"


@dataclass(frozen=True)
class Task:
    task: str
    format: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)


READING = Task("textvqa", "textvqa", "m4c")
SUMS = Task("sums", "llava_jsonl", "exact")
QUESTIONS = [
    Question(str(i), "Sum?", (str(i),), None, f"image {i // 2}", category=("odd", "all") if i % 2 else "all")
    for i in range(6)
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def written(folder: Path, content: object, name: str = "predictions.jsonl") -> Path:
    path = folder / name
    if isinstance(content, list) and name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return path


def own_ids() -> list[dict[str, Any]]:
    """LLaVA's answers under the questions' own ids, without their prompts."""
    official = rows(TEXTVQA / "scores_40.jsonl")
    return [
        {"question_id": score["question_id"], "text": answer["text"]}
        for score, answer in zip(official, rows(ANSWERS), strict=True)
    ]


@pytest.mark.parametrize(("rule", "mean"), [("m4c", 71.0), ("vqa2021", 53.5), ("vqa_legacy", 57.75)])
def test_llava_answers_are_joined_by_image_and_question(rule: str, mean: float) -> None:
    score = score_file(READING, ANSWERS, ANNOTATIONS, rule)
    official = {str(row["question_id"]): row[rule] for row in rows(TEXTVQA / "scores_40.jsonl")}
    assert {row["question_id"]: row["score"] for row in score.per_question} == official
    assert score.score == pytest.approx(mean, abs=1e-12)
    assert (score.task, score.rule, score.metric) == ("textvqa", rule, "soft_accuracy")
    assert (score.n, score.missing, score.warnings) == (40, 0, ())


def test_every_layout_of_predictions_scores_the_same(tmp_path: Path) -> None:
    expected = score_file(READING, ANSWERS, ANNOTATIONS)
    ids = own_ids()
    layouts = [
        written(tmp_path, ids, "lines.jsonl"),
        written(tmp_path, ids, "list.json"),
        written(tmp_path, {str(row["question_id"]): row["text"] for row in ids}, "map.json"),
        written(tmp_path, [{"question_id": r["question_id"], "answer": r["text"]} for r in ids], "vqa.json"),
        written(
            tmp_path, [{"questionId": r["question_id"], "prediction": r["text"]} for r in ids], "gqa.json"
        ),
        written(tmp_path, expected.per_question, "per_sample.jsonl"),
    ]
    for path in layouts:
        assert score_file(READING, path, ANNOTATIONS) == expected, path.name


def test_missing_predictions_are_wrong_and_warned_of(tmp_path: Path) -> None:
    full = score_file(READING, ANSWERS, ANNOTATIONS)
    part = score_file(READING, written(tmp_path, rows(ANSWERS)[:30]), ANNOTATIONS)
    assert (part.n, part.missing) == (40, 10)
    assert part.score == pytest.approx(100 * sum(row["score"] for row in full.per_question[:30]) / 40)
    assert part.per_question[35]["prediction"] is None and part.per_question[35]["score"] == 0.0
    [warning] = part.warnings
    assert warning.startswith("10 of 40 questions have no prediction") and "(10 in all)" in warning
    written(tmp_path, part.per_question, "again.jsonl")
    assert score_file(READING, tmp_path / "again.jsonl", ANNOTATIONS) == part


PREDICTIONS = st.dictionaries(st.sampled_from("012345"), st.sampled_from("012345"))


@given(PREDICTIONS, st.data())
def test_a_missing_prediction_never_raises_the_score(
    predictions: dict[str, str], data: st.DataObject
) -> None:
    kept = {key: text for key, text in predictions.items() if data.draw(st.booleans())}
    whole, part = (score_predictions(QUESTIONS, given, SUMS) for given in (predictions, kept))
    assert part.score <= whole.score
    assert part.missing == 6 - len(kept) and part.n == whole.n == 6


@given(PREDICTIONS, st.randoms())
def test_the_order_of_predictions_does_not_matter(predictions: dict[str, str], random: Any) -> None:
    shuffled = list(predictions.items())
    random.shuffle(shuffled)
    assert score_predictions(QUESTIONS, dict(shuffled), SUMS) == score_predictions(
        QUESTIONS, predictions, SUMS
    )


def test_categories_and_clusters() -> None:
    score = score_predictions(QUESTIONS, {"0": "0", "1": "1", "3": "x"}, SUMS)
    assert score.by_category == {
        "all": {"score": pytest.approx(100 / 3), "n": 6},
        "odd": {"score": pytest.approx(100 / 3), "n": 3},
    }
    # Residuals by picture: 2 * 2/3, twice -2/3; each pair's product counts twice.
    plain, pairs = (4 / 3) / 30, 2 * (4 / 9 + 1 / 9 + 1 / 9) / 36
    assert score.stderr == pytest.approx(100 * (plain + pairs) ** 0.5)
    assert json.loads(json.dumps(score.summary()))["missing"] == 3
    assert json.loads(json.dumps(score.summary()))["warnings"] == list(score.warnings) != []


def test_one_question_has_no_standard_error() -> None:
    assert score_predictions(QUESTIONS[:1], {"0": "0"}, SUMS).stderr is None


ANSWER = {"question_id": 34651, "text": "california"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ANSWER, ANSWER], r"\(line 1, .*line 2, .*\): more than one answer to a question: 34651"),
        ('{"34651": "a", "34651": "b"}', "more than one answer to a question: 34651"),
        (
            [ANSWER, {**ANSWER, "question_id": 1}],
            r"line 2, question_id 1: answers to questions that are not .*: 1",
        ),
        ([{**ANSWER, "question_id": "ef00f12063be7b07"}], r"none of its ids is a question's(.|\n)*'prompt'"),
        (
            [{**ANSWER, "question_id": "ef00f12063be7b07", "prompt": "Why?"}],
            "line 1.*not in the annotation file",
        ),
        ([{**ANSWER, "question_id": 1.0}], r"line 1: its id should be a whole number or a text, found 1\.0"),
        ([{"text": "a"}, ANSWER], r"line 1: it has no 'question_id'\n.*Found: text"),
        ([{"question_id": 34651}], "line 1, question_id 34651: expected one of 'text', .* found none"),
        ([{**ANSWER, "answer": "b"}], "found text and answer"),
        ([{**ANSWER, "text": ["a"]}], r"should be a text, found \[\"a\"\]"),
        ('{"question_id": 34651, "text": "a"}\n{"question_id": ', "line 2: not valid JSON"),
        ('[{"question_id": 34651,\n "text": }]', "line 2"),
        ("[]", "no predictions"),
        ("[3]", r"\[0\]: expected an object, found int"),
        ("", "the file is empty"),
    ],
)
def test_faults_of_predictions_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        score_file(READING, written(tmp_path, content), ANNOTATIONS)
    assert "predictions.jsonl" in str(error.value)


def test_one_line_of_jsonl_is_an_answer(tmp_path: Path) -> None:
    score = score_file(READING, written(tmp_path, [ANSWER]), ANNOTATIONS)
    assert (score.missing, score.per_question[0]["prediction"]) == (39, "california")


def test_an_ambiguous_join_is_refused(tmp_path: Path) -> None:
    twins = [Question(identity, "Sum?", ("1",), "x.png", "x") for identity in ("1", "2")]
    path = written(tmp_path, [{"question_id": "x", "prompt": "sum?\nBriefly.", "text": "1"}])
    with pytest.raises(UserError, match=r"line 1, question_id x: its answer fits several questions: 1, 2"):
        read_predictions(path, twins)
    assert read_predictions(path, twins[:1]) == {"1": "1"}


def test_faults_of_the_request_are_named() -> None:
    with pytest.raises(
        UserError, match=r"unknown rule 'm4'.*\n.*lorasculpt, m4c, vlmevalkit, vqa2021, vqa_legacy"
    ):
        score_file(READING, ANSWERS, ANNOTATIONS, "m4")
    with pytest.raises(UserError, match="unknown annotation format 'textvqua'"):
        score_file(Task("t", "textvqua", "m4c"), ANSWERS, ANNOTATIONS)
    with pytest.raises(UserError, match="task textvqa: annotation format 'textvqa' has no option 'split'"):
        score_file(Task("textvqa", "textvqa", "m4c", {"split": "val"}), ANSWERS, ANNOTATIONS)
    with pytest.raises(UserError, match=r"not in the annotation file: 9\n"):
        score_predictions(QUESTIONS, {"9": "9"}, SUMS)
    with pytest.raises(UserError, match="no questions"):
        score_predictions([], {}, SUMS)


def test_split_chooses_the_problems(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "ques_type": "choose_txt"}
    written(tmp_path, {"1": problem, "2": problem}, "problems.json")
    written(tmp_path, {"choose_txt_test": ["1"], "choose_txt_val": ["2"]}, "pid_splits.json")
    written(tmp_path, {"2": "B"}, "predictions.json")
    val, test = (
        Task("iconqa_choose_txt", "iconqa", "choice", {"task": "choose_txt", "split": split})
        for split in ("val", "test")
    )
    files = tmp_path / "predictions.json", tmp_path / "problems.json"
    assert score_file(val, *files).score == 100.0
    with pytest.raises(UserError, match="none of its ids"):
        score_file(test, *files)


def test_scoring_imports_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'transformers'}"
    code = f"import sys, mmtune.evaluation.score; print({heavy} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set()\n"
    )


def test_true_answers_of_the_tiny_world_score_100(tmp_path: Path) -> None:
    world = tmp_path / "world"
    tiny.generate(world, seed=0, sizes=tiny.Sizes(6, 4, 4, 20, 4, 4, 20, 2))
    png = "images/test/{image_id}.png"
    tasks = [
        (Task("tiny_reading", "textvqa", "m4c", {"image": png}), "textvqa/TextVQA_0.5.1_test.json", world),
        (Task("tiny_colour", "gqa", "gqa", {"image": png}), "gqa/colour_test_questions.json", world),
        (Task("tiny_place", "gqa", "gqa", {"image": png}), "gqa/place_test_questions.json", world),
        (Task("tiny_text", "llava_jsonl", "exact"), "text/questions_test.jsonl", world),
        (Task("tiny_iconqa", "iconqa", "choice"), "iconqa/problems.json", world / "iconqa"),
    ]
    for task, file, root in tasks:
        questions = read_questions(task, world / file)
        assert len(questions) == 20, task
        assert all(question.image is None or (root / question.image).is_file() for question in questions), (
            task
        )
        truth = {
            question.id: max(set(question.answers), key=question.answers.count) for question in questions
        }
        score = score_predictions(questions, truth, task)
        assert score.score == 100.0 and score.stderr == 0.0, task
