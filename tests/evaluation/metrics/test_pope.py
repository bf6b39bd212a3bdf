from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import pope
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file, score_predictions


def files(folder: Path, labels: str = "yn") -> Path:
    """Two questions about one picture in each of the three files."""
    folder.mkdir(exist_ok=True)
    for category in pope.CATEGORIES:
        rows = [
            {
                "question_id": i,
                "image": "COCO_val2014_000000310196.jpg",
                "text": f"Is there a {category} {i} in the image?",
                "label": {"y": "yes", "n": "no"}.get(label, label),
            }
            for i, label in enumerate(labels, start=1)
        ]
        (folder / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder / "coco_pope_random.json"


def test_the_three_files_are_read_together(tmp_path: Path) -> None:
    path = files(tmp_path)
    questions = pope.read(path)
    assert [question.id for question in questions] == [
        f"{category}/{i}" for category in pope.CATEGORIES for i in (1, 2)
    ]
    picture = "COCO_val2014_000000310196.jpg"
    assert questions[3] == Question(
        "popular/2", "Is there a popular 2 in the image?", ("no",), picture, picture, category="popular"
    )
    assert pope.read(path.with_name("coco_pope_adversarial.json")) == questions
    assert pope.read(path, categories=["popular"]) == questions[2:4]


def llava_file(folder: Path) -> Path:
    """LLaVA's question file: ids that run on, the prompt's suffix, no labels, another order of categories."""
    rows: list[dict[str, Any]] = []
    for category in ("adversarial", "random", "popular"):
        for i in (1, 2):
            text = (
                f"Is there a {category} {i} in the image?\nAnswer the question using a single word or phrase."
            )
            rows.append({"question_id": len(rows), "image": "x.jpg", "text": text, "category": category})
    path = folder / "llava_pope_test.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("beside", [".", "coco"])
def test_llavas_question_file_takes_the_labels_in_order(tmp_path: Path, beside: str) -> None:
    files(tmp_path / beside)
    path = llava_file(tmp_path)
    questions = pope.read(path)
    assert [question.id for question in questions] == list("012345")
    assert [question.answers for question in questions] == [("yes",), ("no",)] * 3
    assert questions[2].text == "Is there a random 1 in the image?"
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(json.dumps({"question_id": i, "text": "Yes"}) for i in range(6)))
    assert score_file(load_protocol("pope"), answers, path).score == 50.0
    path.write_text("\n".join(path.read_text().split("\n")[1:]))
    with pytest.raises(UserError, match=r"line 1: it is not the next question of .* 'adversarial'"):
        pope.read(path)


@pytest.mark.parametrize(
    ("prediction", "official", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        (" yes\n", "yes", "yes"),
        ("No", "no", "no"),
        ("no", "no", "no"),
        ("NO", "yes", "no"),
        ("No.", "no", None),
        ("No, there is none", "no", None),
        ("There is not a dog.", "no", None),
        ("There is none", "yes", None),
        ("Yes. No", "yes", None),
        ("nothing", "yes", None),
        ("no\n", "yes", "no"),  # the word is "no\n" to the official script
        ("", "yes", None),
    ],
)
def test_what_an_answer_is_taken_for(prediction: str, official: str, lmms_eval: str | None) -> None:
    for label in ("yes", "no"):
        question = Question("1", "Is there?", (label,), None, "1", category="random")
        assert pope.RULES["pope"](question, prediction) == (label == official)
        assert pope.RULES["lmms-eval"](question, prediction) == (label == lmms_eval)


CASES = st.lists(
    st.tuples(
        st.sampled_from(["random", "popular"]),
        st.sampled_from(["yes", "no"]),
        st.sampled_from(["Yes", "no", "No, none", "perhaps", "", None]),
    ),
    min_size=1,
    max_size=12,
)


@given(CASES, st.sampled_from(["pope", "lmms-eval"]))
def test_figures_agree_with_an_independent_count(cases: list[tuple[str, str, str | None]], rule: str) -> None:
    questions = [
        Question(str(i), "Is there?", (label,), None, str(i), category=category)
        for i, (category, label, _) in enumerate(cases)
    ]
    predictions = {str(i): said for i, (_, _, said) in enumerate(cases) if said is not None}
    score = score_predictions(questions, predictions, load_protocol("pope"), rule)

    def positive(label: str, said: str | None) -> bool | None:
        if said is None:
            return label == "no"
        if rule == "lmms-eval":
            return {"Yes": True, "no": False}.get(said)
        return said not in ("no", "No, none")

    def figures(chosen: list[tuple[str, str, str | None]]) -> Counter[str]:
        count = Counter((label == "yes", positive(label, said)) for _, label, said in chosen)
        hit, false_alarm, miss = count[True, True], count[False, True], count[True, False]
        return Counter(
            {
                "precision": 100 * hit / max(hit + false_alarm, 1),
                "recall": 100 * hit / max(hit + miss, 1),
                "f1": 100 * 2 * hit / max(2 * hit + false_alarm + miss, 1),
                "yes_ratio": 100 * (hit + false_alarm) / len(chosen),
            }
        )

    for name, value in figures(cases).items():
        assert score.also[name] == pytest.approx(value)
    each = {category: figures([case for case in cases if case[0] == category]) for category, _, _ in cases}
    for category, expected in each.items():
        assert score.also[category] == pytest.approx(dict(expected))
    assert score.also["f1_mean"] == pytest.approx(sum(row["f1"] for row in each.values()) / len(each))
    right = [positive(label, said) == (label == "yes") for _, label, said in cases]
    assert score.score == pytest.approx(100 * sum(right) / len(cases))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ("yx", {}, r"coco_pope_random\.json, line 2: 'label' is \"x\""),
        ("y", {"categories": ["rare"]}, "POPE has no rare"),
    ],
)
def test_faults_are_named(tmp_path: Path, labels: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pope.read(files(tmp_path, labels), **options)


def test_files_are_known_by_their_names(tmp_path: Path) -> None:
    path = files(tmp_path)
    path.with_name("coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match=r"coco_pope_popular\.json: no such file"):
        pope.read(path)
    path.rename(tmp_path / "questions.json")
    with pytest.raises(UserError, match="its name holds none of random, popular, adversarial"):
        pope.read(tmp_path / "questions.json")
