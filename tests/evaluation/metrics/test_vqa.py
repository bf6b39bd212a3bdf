from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import FORMATS, textvqa, vqa
from mmtune.evaluation.metrics.base import Question, Rule

HERE = Path(__file__).parents[2] / "data" / "textvqa"
REAL = Path(os.environ.get("MMTUNE_REAL_DATA", "/nowhere")) / "textvqa"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="MMTUNE_REAL_DATA has no textvqa")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def check_pairs(path: Path, count: int) -> None:
    pairs = rows(path)
    assert len(pairs) == count
    for pair in pairs:
        assert vqa.normalise_m4c(pair["raw"]) == pair["m4c"]
        assert vqa.normalise_vqa(pair["raw"]) == pair.get("vqa", pair["m4c"])


def check_scores(annotations: Path, answers: Path, scores: Path, count: int) -> None:
    questions = textvqa.read(annotations)
    answered, expected = rows(answers), rows(scores)
    assert len(questions) == len(answered) == len(expected) == count
    for question, answer, official in zip(questions, answered, expected, strict=True):
        assert question.id == str(official["question_id"]) and question.cluster == answer["question_id"]
        for name, rule in vqa.RULES.items():
            assert rule(question, answer["text"]) == official[name], (name, question, answer["text"])


def test_normalisers_agree_with_the_official_ones() -> None:
    check_pairs(HERE / "normaliser_200.jsonl", 200)


def test_rules_agree_with_the_official_scorers() -> None:
    check_scores(
        HERE / "TextVQA_0.5.1_val_40.json",
        HERE / "answers_llava-v1.5-13b_40.jsonl",
        HERE / "scores_40.jsonl",
        40,
    )


@needs_real_data
def test_normalisers_agree_with_the_official_ones_on_3000() -> None:
    check_pairs(REAL / "normaliser_3000.jsonl", 3000)


@needs_real_data
def test_rules_agree_with_the_official_scorers_on_800() -> None:
    check_scores(
        REAL / "TextVQA_0.5.1_val_first800.json",
        REAL / "answers_llava-v1.5-13b_first800.jsonl",
        REAL / "scores_per_question_first800.jsonl",
        800,
    )


@pytest.mark.parametrize(
    ("raw", "m4c"),
    [
        ("A", ""),
        ("(A)", ""),
        ("A.", ""),
        ("None.", "0"),
        ("-5", "5"),
        ("1/2", "1 2"),
        ("50%", "50%"),
        ("a,b", "ab"),
        ("1,000-2,000", "1000 2000"),
        ("he's", "he 's"),
        ("he’s", "he’s"),
        ("twenty two", "twenty 2"),
        ("eleven", "eleven"),
        ("Im", "im"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("3.14", "3.14"),
        ("2012.", "2012"),
        ("line\nfeed\ttab", "line feed tab"),
        (". " * 33 + "x", ". x"),
    ],
)
def test_edge_cases_of_m4c(raw: str, m4c: str) -> None:
    assert vqa.normalise_m4c(raw) == m4c


@pytest.mark.parametrize(("raw", "official"), [("a,b", "b"), ("1,000-2,000", "10002000"), ("he's", "he's")])
def test_where_the_vqa_normaliser_differs(raw: str, official: str) -> None:
    assert vqa.normalise_vqa(raw) == official


def test_contractions_are_those_of_the_official_table() -> None:
    # The official tables have 120 entries: four are never found (Im, Ive, Id've, I'dve), and two change
    # nothing (let's, she's).
    assert len(vqa.CONTRACTIONS) == 114
    assert vqa.CONTRACTIONS["couldn'tve"] == vqa.CONTRACTIONS["couldnt've"] == "couldn't've"
    assert vqa.CONTRACTIONS["'ow'sat"] == "'ow's'at"


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_leaves_one_answer_out(matches: int, score: float) -> None:
    assert vqa.soft_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == score


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_soft_accuracy_is_the_mean_over_the_answers_left_out(answers: list[str], prediction: str) -> None:
    left_out = [min(1.0, (answers[:i] + answers[i + 1 :]).count(prediction) / 3) for i in range(len(answers))]
    assert vqa.soft_accuracy(prediction, answers) == pytest.approx(sum(left_out) / len(answers))


def question(*answers: str) -> Question:
    return Question("1", "what", answers, None, "1")


def test_the_rules_differ_where_all_answers_are_equal() -> None:
    same = question(*["The Cat"] * 10)
    scores = {name: rule(same, "the cat.") for name, rule in vqa.RULES.items()}
    assert scores == {"m4c": 1.0, "vqa2021": 0.0, "vqa_legacy": 0.0}
    assert vqa.vqa2021(same, "The Cat\n") == 1.0


def test_legacy_leaves_capitals_in_answers() -> None:
    mixed = question("Stop", "Stop", "Stop", "Stop", "Stop", *["go"] * 5)
    assert (vqa.m4c(mixed, "Stop"), vqa.vqa_legacy(mixed, "Stop"), vqa.vqa_legacy(mixed, "go.")) == (
        1.0,
        0.0,
        1.0,
    )


PIECES = ["Red", "red", "red.", "a red", "red ", "1,000", "two", "2", "dont", "it's", "", "😀", "A", "\u2028"]
EVERY_RULE = {
    f"{name}-{rule}": function
    for name in ("textvqa", "okvqa", "vqav2", "vizwiz")
    for rule, function in FORMATS.load(name).RULES.items()
}


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())
@given(st.lists(st.sampled_from(PIECES), min_size=10, max_size=10), st.sampled_from(PIECES), st.data())
@settings(max_examples=40)
def test_the_order_of_the_answers_changes_nothing(
    rule: Rule, answers: list[str], prediction: str, data: st.DataObject
) -> None:
    permuted = data.draw(st.permutations(answers))
    assert rule(question(*permuted), prediction) == pytest.approx(rule(question(*answers), prediction))


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())
@pytest.mark.parametrize("piece", ["a", "A. ", ".", "1,", "(", "'", "don't ", "two ", "😀", "\n", "e\u0301"])
def test_answers_of_100_kb(rule: Rule, piece: str) -> None:
    asked = question(*["red"] * 5, "Blue cat", "x.", "1,000", "it's", "7")
    began = time.process_time()
    assert rule(asked, piece * (100_000 // len(piece.encode()))) == 0.0
    assert time.process_time() - began < 5  # what grows with the square of the length takes minutes


@given(st.text(), st.lists(st.text(max_size=5), min_size=10, max_size=10))
def test_scores_lie_between_0_and_1_and_no_call_changes_the_next(prediction: str, answers: list[str]) -> None:
    tables = dict(vqa.NUMBERS), dict(vqa.CONTRACTIONS)
    for rule in vqa.RULES.values():
        first = rule(question(*answers), prediction)
        assert 0.0 <= first <= 1.0 and rule(question(*answers), prediction) == first
    assert tables == (vqa.NUMBERS, vqa.CONTRACTIONS)


def test_questions_carry_their_picture() -> None:
    first = textvqa.read(HERE / "TextVQA_0.5.1_val_40.json")[0]
    assert (first.id, first.image, first.cluster) == ("34651", "ef00f12063be7b07.jpg", "ef00f12063be7b07")
    assert len(first.answers) == 10
    placed = textvqa.read(HERE / "TextVQA_0.5.1_val_40.json", image="train_images/{image_id}.png")[0]
    assert placed.image == "train_images/ef00f12063be7b07.png"


ROW = {"question_id": 7, "question": "what", "image_id": "x", "answers": ["a"] * 10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no list 'data'"),
        ({"data": []}, "no questions"),
        ({"data": ["x"]}, r"data\[0\]: expected an object, found str"),
        ({"data": [ROW, ROW]}, "more than once: 7"),
        ({"data": [{**ROW, "answers": ["a"] * 9}]}, r"data\[0\], question_id 7: ten answers .* found 9"),
        ({"data": [{key: ROW[key] for key in ("question_id", "question", "image_id")}]}, "no 'answers'"),
        ({"data": [{**ROW, "question": None}]}, "'question' should be str, found NoneType"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        textvqa.read(path)
    assert "val.json" in str(error.value)
