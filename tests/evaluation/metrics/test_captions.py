from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.metrics import captions
from mmtune.evaluation.metrics.base import Question, TaskScore
from mmtune.evaluation.metrics.coco_java import absent
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file, score_predictions

FIVE = json.loads((Path(__file__).parents[2] / "data" / "captions" / "scores_5.json").read_text())
REAL = Path(os.environ.get("MMTUNE_REAL_DATA", "/nowhere")) / "coco"
TASK = load_protocol("coco_caption")


def questions(references: dict[str, list[str]]) -> list[Question]:
    return [Question(image, "", tuple(several), None, image) for image, several in references.items()]


def scored(references: dict[str, list[str]], predictions: dict[str, str], rule: str = "cider") -> TaskScore:
    return score_predictions(questions(references), predictions, TASK, rule)


def by_image(score: TaskScore) -> dict[str, float]:
    return {row["question_id"]: row["score"] for row in score.per_question}


def test_scores_are_the_official_ones() -> None:
    score = scored(FIVE["references"], FIVE["predictions"])
    assert by_image(score) == pytest.approx(FIVE["CIDEr"], abs=1e-12)
    assert score.unit == "CIDEr x 100"
    assert score.score == pytest.approx(100 * math.fsum(FIVE["CIDEr"].values()) / 5)
    found = [score.also[f"BLEU-{n}"] for n in range(1, 5)]
    assert found == pytest.approx([100 * official for official in FIVE["BLEU"]], abs=1e-6)
    assert score.also["ROUGE-L"] == pytest.approx(100 * math.fsum(FIVE["ROUGE-L"].values()) / 5)
    assert score.also["tokenizer"] == "python"
    assert set(score.also["absent"]) == {"METEOR", "SPICE"}


@pytest.mark.skipif(not REAL.is_dir(), reason="MMTUNE_REAL_DATA has no coco")
def test_real_captions_score_what_the_official_scorer_gave() -> None:
    official = json.loads((REAL / "official_scores_126.json").read_text())["overall"]
    score = score_file(TASK, REAL / "results_126.json", REAL / "captions_126.json")
    assert score.n == 126
    assert score.score / 100 == pytest.approx(official["CIDEr"], abs=1e-9)
    for n in range(1, 5):
        assert score.also[f"BLEU-{n}"] / 100 == pytest.approx(official[f"Bleu_{n}"], abs=1e-9)
    assert score.also["ROUGE-L"] / 100 == pytest.approx(official["ROUGE_L"], abs=1e-9)


@pytest.mark.skipif(absent() is not None, reason=f"the official programs are not here: {absent()}")
def test_with_java_the_tokeniser_and_meteor_are_the_official_ones() -> None:
    score = scored(FIVE["references"], FIVE["predictions"], "cider_ptb")
    assert by_image(score) == pytest.approx(FIVE["CIDEr"], abs=1e-12)
    assert score.also["METEOR"] == pytest.approx(100 * FIVE["METEOR"])
    assert score.also["tokenizer"] == "ptb"
    assert ("SPICE" in score.also) != ("SPICE" in score.also.get("absent", {}))


@pytest.mark.skipif(absent() is None, reason="the official programs are here")
def test_without_java_or_the_package_the_rule_that_needs_them_is_refused() -> None:
    with pytest.raises(UserError, match=r"the official caption tokeniser cannot run: .*not installed"):
        scored(FIVE["references"], FIVE["predictions"], "cider_ptb")


def test_a_caption_that_is_the_only_reference_scores_ten() -> None:
    # An n-gram that is in every image's references weighs nothing: here none is.
    references = {"1": ["a red bus in the city"], "2": ["two small dogs on some grass"]}
    same = {image: several[0] for image, several in references.items()}
    score = scored(references, same)
    assert by_image(score) == pytest.approx({"1": 10, "2": 10})
    assert score.also["BLEU-4"] == pytest.approx(100)
    assert score.also["ROUGE-L"] == pytest.approx(100)


def test_cider_d_by_hand() -> None:
    # Three images; the caption shares "dog" (in the references of 2 images) and repeats it.
    references = {"1": ["dog runs"], "2": ["dog sits"], "3": ["cat"]}
    score = scored(references, {"1": "dog dog"})
    dog, runs = math.log(3 / 2), math.log(3)
    # Unigrams: weights of the caption {dog: 2 dog}, clipped to the reference's; no bigram is shared.
    unigram = dog * dog / (2 * dog * math.hypot(dog, runs))
    assert by_image(score)["1"] == pytest.approx(10 * unigram / 4)


def test_the_penalty_for_another_length() -> None:
    references = {"1": ["dog runs fast"], "2": ["cat"]}
    whole = by_image(scored(references, {"1": "dog runs fast"}))["1"]
    scorer = captions.CiderD([[("dog", "runs", "fast")], [("cat",)]])
    assert whole == pytest.approx(7.5)  # there are no 4-grams
    longer = scorer.score(("dog", "runs", "fast", "x"), [("dog", "runs", "fast")])
    # An unknown word weighs log 2 like all others here: cosines 3/sqrt(3*4), 2/sqrt(2*3), 1/sqrt(1*2).
    cosines = 3 / math.sqrt(12) + 2 / math.sqrt(6) + 1 / math.sqrt(2)
    assert longer == pytest.approx(10 * math.exp(-1 / 72) * cosines / 4)


def test_bleu_by_hand() -> None:
    # Papineni et al.'s own example of clipping, section 2.1: 2 of 7 unigrams.
    words = [("the",) * 7]
    references = [[("the", "cat", "is", "on", "the", "mat"), ("there", "is", "a", "cat", "on", "the", "mat")]]
    assert captions.bleu(words, references) == pytest.approx([2 / 7, 0, 0, 0])
    # References of 2 and 4 words are as near to 3: the shorter counts, so there is no brevity penalty.
    assert captions.bleu([("a", "b", "c")], [[("a", "b"), ("a", "b", "c", "d")]])[0] == 1
    assert captions.bleu([("a",)], [[("a", "b", "c")]])[0] == pytest.approx(math.exp(1 - 3))


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 2: "police kill the gunman" shares "police the gunman" with the reference.
    words = ("police", "kill", "the", "gunman")
    assert captions.rouge_l(words, [("police", "killed", "the", "gunman")]) == pytest.approx(0.75)
    # Precision 1/2 of the first reference, recall 1 of the second.
    both = captions.rouge_l(("a", "b"), [("a", "c", "d"), ("b",)])
    assert both == pytest.approx((1 + 1.44) * 0.5 * 1 / (1 + 1.44 * 0.5))


def test_missing_captions_score_zero_and_leave_the_others_as_they_are() -> None:
    whole = by_image(scored(FIVE["references"], FIVE["predictions"]))
    some = {image: text for image, text in FIVE["predictions"].items() if image != "1"}
    score = scored(FIVE["references"], some)
    assert by_image(score) == whole | {"1": 0.0}
    assert (score.n, score.missing) == (5, 1)
    # In the corpus scores it is an empty caption, as if it had been answered so.
    empty = scored(FIVE["references"], {**some, "1": ""})
    assert empty.also == score.also
    assert empty.missing == 0


def test_some_images_of_a_file_score_as_in_the_whole_file() -> None:
    whole = by_image(scored(FIVE["references"], FIVE["predictions"]))
    every = questions(FIVE["references"])
    for some in (every[:2], every[3:4]):
        said = {question.id: FIVE["predictions"][question.id] for question in some}
        score = score_predictions(some, said, TASK, among=every)
        assert by_image(score) == {question.id: whole[question.id] for question in some}
        assert score.warnings == ()
    assert by_image(score_predictions(every[:2], {}, TASK)) == dict.fromkeys(
        [each.id for each in every[:2]], 0.0
    )


def test_orders_change_nothing() -> None:
    expected = scored(FIVE["references"], FIVE["predictions"])
    rng = random.Random(0)
    for _ in range(5):
        images = list(FIVE["references"])
        rng.shuffle(images)
        references = {
            image: rng.sample(FIVE["references"][image], len(FIVE["references"][image])) for image in images
        }
        found = scored(references, FIVE["predictions"])
        assert by_image(found) == by_image(expected)
        assert (found.score, found.also) == (expected.score, expected.also)
    assert scored(FIVE["references"], FIVE["predictions"]).summary() == expected.summary()


@pytest.mark.parametrize("odd", ["\r", "\n", "\u2028", "\x85", "\x0b"])
def test_a_line_break_in_a_caption_shifts_nothing(odd: str) -> None:
    plain = scored(FIVE["references"], FIVE["predictions"])
    broken = {image: text.replace(" ", odd) for image, text in FIVE["predictions"].items()}
    references = {
        i: [text.replace(" ", odd, 1) for text in several] for i, several in FIVE["references"].items()
    }
    assert by_image(scored(references, broken)) == by_image(plain)


@pytest.mark.parametrize(
    "text", ["", " ", "...", "😀", "\0", "a" * 100_000, "dog " * 25_000, "\u202eabc", "|||"]
)
def test_odd_captions_crash_nothing(text: str) -> None:
    score = scored({"1": ["a dog"], "2": ["a cat", "", "..."]}, {"1": text, "2": text})
    assert all(0 <= row["score"] <= 10 for row in score.per_question)
    json.dumps(score.summary(), allow_nan=False)


def test_one_image_alone_is_warned_of() -> None:
    score = scored({"1": ["a dog"]}, {"1": "a dog"})
    assert score.score == 0
    assert "CIDEr of one image alone is 0" in score.warnings[0]
    assert not scored({"1": ["a dog"], "2": ["a cat"]}, {"1": "a", "2": "b"}).warnings


def written(tmp_path: Path, content: object, name: str = "captions.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "9.jpg"}, {"id": "x", "file_name": "x.jpg"}],
    "annotations": [
        {"image_id": "x", "id": 1, "caption": "a cat"},
        {"image_id": 9, "id": 2, "caption": "a dog"},
        {"image_id": "9", "id": 3, "caption": "the dog"},
    ],
}


def test_cocos_layout(tmp_path: Path) -> None:
    path = written(tmp_path, COCO)
    nine, x = captions.read(path)
    assert (nine.id, nine.answers, nine.image, nine.cluster) == ("9", ("a dog", "the dog"), "9.jpg", "9")
    assert (x.id, x.answers, x.image) == ("x", ("a cat",), "x.jpg")
    assert captions.read(path, image="{image_id}.png")[0].image == "9.png"
    # A file such as captions_test5k.json names no pictures: the protocol does.
    bare = {"images": [{"id": 391895}], "annotations": [{"image_id": 391895, "id": 1, "caption": "a"}]}
    (found,) = captions.read(written(tmp_path, bare), **TASK.for_split("test").options)
    assert found.image == "val2014/COCO_val2014_000000391895.jpg"


def karpathy(**names: object) -> dict[str, object]:
    return {
        "split": "test",
        "filename": "7.jpg",
        "imgid": 3,
        "sentences": [{"raw": "A dog.", "tokens": []}],
        **names,
    }


def test_karpathys_layouts(tmp_path: Path) -> None:
    rows = [karpathy(cocoid=7, filepath="val2014"), karpathy(cocoid=8, split="val")]
    (coco,) = captions.read(written(tmp_path, {"dataset": "coco", "images": rows}))
    assert (coco.id, coco.image, coco.answers) == ("7", "val2014/7.jpg", ("A dog.",))
    (flickr,) = captions.read(written(tmp_path, {"images": [karpathy()]}), split="test")
    assert (flickr.id, flickr.image) == ("7", "7.jpg")
    with pytest.raises(UserError, match=r"no images of split 'dev'(.|\n)*Known: test, val"):
        captions.read(written(tmp_path, {"images": rows}), split="dev")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "neither 'annotations' nor 'images'"),
        ({"images": []}, "no images of split"),
        ({"annotations": []}, "no questions in this file"),
        ({**COCO, "images": [{"id": 1}]}, r"annotations\[0\]: image x is not among 'images'"),
        ({**COCO, "images": [*COCO["images"], {"id": 5}]}, "images without captions: 5"),
        ({**COCO, "images": [*COCO["images"], {"id": "9"}]}, "image 9 occurs more than once"),
        ({"annotations": [{"image_id": 1}]}, r"annotations\[0\]: 'caption' is missing"),
        ({"annotations": [{"image_id": 1, "caption": None}]}, "'caption' should be str"),
        ({"annotations": [3]}, "expected an object, found int"),
        ({"images": [karpathy(sentences=[])]}, "image 7 has no sentences"),
        ({"images": [karpathy(sentences=["a"])]}, "expected an object, found str"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        captions.read(written(tmp_path, content))


def test_predictions_in_cocos_and_llavas_layouts(tmp_path: Path) -> None:
    annotations = written(tmp_path, COCO)
    rows: list[dict[str, Any]] = [{"image_id": 9, "caption": "a dog"}, {"image_id": "x", "caption": "a cat"}]
    expected = score_file(TASK, written(tmp_path, rows, "list.json"), annotations)
    assert expected.missing == 0 and expected.score > 0
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({**row, "model_id": "m"}) + "\n" for row in rows))
    assert score_file(TASK, lines, annotations).summary() == expected.summary()
    lines.write_text(
        "".join(json.dumps({"question_id": r["image_id"], "text": r["caption"]}) + "\n" for r in rows)
    )
    assert score_file(TASK, lines, annotations).summary() == expected.summary()
    lines.write_text(json.dumps(rows[0]) + "\n")
    assert score_file(TASK, lines, annotations).missing == 1
    with pytest.raises(UserError, match="more than one answer to a question: 9"):
        score_file(
            TASK, written(tmp_path, [rows[0], {"image_id": "9", "caption": ""}], "twice.json"), annotations
        )


def test_ngrams_are_counted_by_their_words() -> None:
    assert captions.ngrams(("a", "b", "a")) == Counter(
        {("a",): 2, ("b",): 1, ("a", "b"): 1, ("b", "a"): 1, ("a", "b", "a"): 1}
    )
