from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import classification
from mmtune.evaluation.metrics.base import Question, TaskScore
from mmtune.evaluation.protocol import Protocol, load_protocol
from mmtune.evaluation.score import score_predictions

# Truth -> what was said -> how often. "?" is no label.
COUNTS = {
    "a": {"a": 5, "b": 2, "?": 1},
    "b": {"b": 3, "c": 1},
    "c": {"a": 1, "b": 1, "c": 7, "?": 2},
    "r": {"a": 1, "r": 4, "?": 1},
}
PAIRS = [(truth, said) for truth, row in COUNTS.items() for said, n in row.items() for _ in range(n)]
TASK = Protocol("mine", "", "classification", "label", 8, Path(), {"test": "questions.jsonl"}, "{question}")


def questions(tmp_path: Path, answers: list[Any], **options: Any) -> list[Question]:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": i, "image": f"{i}.png", "text": "?", "answer": a} for i, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return classification.read(path, **options)


def scored(tmp_path: Path, pairs: list[tuple[str, str]], rule: str = "label", **options: Any) -> TaskScore:
    asked = questions(tmp_path, [truth for truth, _ in pairs], **options)
    said = {str(i): text for i, (_, text) in enumerate(pairs)}
    return score_predictions(asked, said, TASK, rule)


def test_figures_are_scikit_learns(tmp_path: Path) -> None:
    """scikit-learn 1.9.1's precision_recall_fscore_support on these pairs."""
    score = scored(tmp_path, PAIRS, labels=["a", "b", "c", "d"], refusal=["r"])
    figures = score.also
    assert score.score == pytest.approx(100 * 19 / 29)
    assert list(figures["macro"].values()) == pytest.approx(
        [77.23214285714286, 66.95075757575756, 70.08771929824562]
    )
    assert list(figures["micro"].values()) == pytest.approx([76.0, 65.51724137931035, 70.37037037037037])
    classes = {
        label: [each["precision"], each["recall"], each["f1"], each["n"]]
        for label, each in figures["classes"].items()
    }
    assert classes["a"] == pytest.approx([71.42857142857143, 62.5, 66.66666666666666, 8])
    assert classes["b"] == pytest.approx([50, 75, 60, 4])
    assert classes["c"] == pytest.approx([87.5, 63.63636363636363, 73.68421052631578, 11])
    assert classes["d"] == [0, 0, 0, 0]
    assert classes["r"] == pytest.approx([100, 66.66666666666666, 80, 6])
    assert (figures["other"], figures["missing"]) == (4, 0)


def test_the_confusion_matrix(tmp_path: Path) -> None:
    asked = questions(tmp_path, [truth for truth, _ in PAIRS])
    said = {str(i): text for i, (_, text) in enumerate(PAIRS) if i != 0}
    score = score_predictions(asked, said, TASK)
    assert score.also["confusion"] == {
        "columns": ["a", "b", "c", "r", "(other)", "(missing)"],
        "rows": {
            "a": [4, 2, 0, 0, 1, 1],
            "b": [0, 3, 1, 0, 0, 0],
            "c": [1, 1, 7, 0, 2, 0],
            "r": [1, 0, 0, 4, 1, 0],
        },
    }
    assert (score.missing, score.also["missing"], score.also["other"]) == (1, 1, 4)


def test_many_classes_give_the_most_frequent_confusions_instead(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(51)]
    pairs = [
        ("class 3", "class 4"),
        ("class 3", "class 4"),
        ("class 5", "dog"),
        *((name, name) for name in names),
    ]
    figures = scored(tmp_path, pairs).also
    assert "confusion" not in figures
    assert figures["most_confused"] == [["class 3", "class 4", 2], ["class 5", "(other)", 1]]


def test_refusals(tmp_path: Path) -> None:
    pairs = [
        ("cat", "cat"),
        ("cat", "refuse"),
        ("dog", "I'm sorry, I cannot say."),
        ("dog", "dog"),
        ("dog", "cow"),
        ("refuse", "refuse"),
        ("unanswerable", "Unanswerable."),
        ("refuse", "cat"),
        ("refuse", "It is not possible to tell"),
    ]
    options: dict[str, Any] = {"refusal": ["refuse", "unanswerable"], "refusing": ["cannot", "not possible"]}
    figures = scored(tmp_path, pairs, **options).also["refusal"]
    assert figures == pytest.approx(
        {
            "to_refuse": 4,
            "valid": 5,
            "refused_of_to_refuse": 75,
            "refused_of_valid": 40,
            "precision": 60,
            "recall": 75,
            "f1": 2 * 60 * 75 / 135,
        }
    )
    # Without the expressions an answer that refuses in other words is outside the set.
    plain = scored(tmp_path, pairs, refusal=options["refusal"]).also
    assert plain["refusal"]["refused_of_valid"] == 20
    assert plain["other"] == 3
    assert "refusal" not in scored(tmp_path, pairs).also


def test_an_answer_that_is_a_label_is_never_read_as_a_refusal(tmp_path: Path) -> None:
    options: dict[str, Any] = {"labels": ["no dog", "dog"], "refusal": ["refuse"], "refusing": ["no"]}
    score = scored(tmp_path, [("no dog", "no dog"), ("dog", "no idea"), ("refuse", "refuse")], **options)
    assert score.also["confusion"]["rows"] == {
        "no dog": [1, 0, 0, 0, 0],
        "dog": [0, 0, 1, 0, 0],
        "refuse": [0, 0, 1, 0, 0],
    }


@pytest.mark.parametrize(
    ("text", "label", "letter"),
    [
        ("Dog", 1, 1),
        (" dog.\n", 1, 1),
        ("B", 0, 1),
        ("b. dog", 0, 1),
        ("B. cat", 0, 0),
        ("a dog", 0, 0),
        ("", 0, 0),
    ],
)
def test_rules(tmp_path: Path, text: str, label: float, letter: float) -> None:
    for rule, expected in (("label", label), ("letter", letter)):
        score = scored(tmp_path, [("dog", text), ("cat", "")], rule, labels=["cat", "dog"])
        assert score.per_question[0]["score"] == expected


def test_labels_are_shown_in_the_prompt_and_written_as_the_set_has_them(tmp_path: Path) -> None:
    (first, second) = questions(tmp_path, ["DOG", 7], labels=["dog", 7, "cat"])
    assert (first.answers, second.answers) == (("dog",), ("7",))
    assert first.choices == ("dog", "7", "cat")
    (first, _) = questions(tmp_path, ["dog", "cat"])
    assert first.choices == ("cat", "dog")


@pytest.mark.parametrize(
    ("answers", "options", "said"),
    [
        (["dog", "cow"], {"labels": ["dog"]}, "answers that are no label: cow"),
        (["dog"], {"labels": ["dog", "Dog."]}, "the labels 'dog' and 'Dog.' read the same"),
        (["dog", "Dog"], {}, "the labels 'Dog' and 'dog' read the same"),
        (["dog"], {"labels": [True, "dog"]}, r'labels: True is no text(.|\n)*Quote it: "yes", "no"'),
        (["dog"], {"labels": "dog"}, "labels: expected a list"),
        (["dog"], {"labels": ["dog", ""]}, "labels: '' is no text"),
        (["dog"], {"refusing": ["no"]}, "refusing is given without refusal"),
        (["dog"], {"refusal": ["r"], "refusing": ["("]}, r"refusing: '\(' is no regular expression"),
    ],
)
def test_faults_of_the_set_are_named(
    tmp_path: Path, answers: list[str], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        questions(tmp_path, answers, **options)


def test_the_order_of_questions_changes_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"labels": ["a", "b", "c"], "refusal": ["r"]}
    expected = scored(tmp_path, PAIRS, **options)
    rng = random.Random(0)
    for _ in range(3):
        found = scored(tmp_path, rng.sample(PAIRS, len(PAIRS)), **options)
        assert (found.score, found.also) == (expected.score, expected.also)
    again = scored(tmp_path, PAIRS, **options)
    assert again.summary() == expected.summary()


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "😀", "\u2028", "a" * 100_000, "(" * 1000, "(other)", "ﬁ", "İ"]
)
def test_odd_answers_crash_nothing_and_are_outside_the_set(tmp_path: Path, text: str) -> None:
    for rule in classification.RULES:
        score = scored(tmp_path, [("a", text), ("b", "b")], rule, refusal=["r"], refusing=["cannot"])
        assert (score.score, score.also["other"]) == (50, 1)
        json.dumps(score.summary(), allow_nan=False)


def test_scoring_a_task_of_ones_own_prints_a_row_of_the_matrix_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions(tmp_path, ["cat", "dog", "refuse"])
    (tmp_path / "mine.yaml").write_text(
        "task: mine\nabout: mine\nformat: classification\nrule: label\nprompt: '{question} {choices}'\n"
        f"max_new_tokens: 8\nroot: {tmp_path}\nannotations: {{test: questions.jsonl}}\n"
        "options: {labels: [dog, cat], refusal: [refuse], refusing: [cannot]}\n"
    )
    (tmp_path / "said.json").write_text('{"0": "cat", "1": "cat", "2": "I cannot"}')
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    asked, annotations = protocol.questions()
    assert protocol.turns(asked[0])[0].text == "<image>\n? dog, cat, refuse"
    arguments = ["--task", str(tmp_path / "mine.yaml"), "--annotations", str(annotations)]
    assert main(["score", *arguments, "--predictions", str(tmp_path / "said.json")]) == 0
    printed = capsys.readouterr().out
    assert '"dog": [0, 1, 0, 0, 0]\n' in printed.replace(",\n", "\n")
    assert json.loads(printed)["also"]["confusion"]["rows"]["refuse"] == [0, 0, 1, 0, 0]
