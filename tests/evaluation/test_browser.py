from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.evaluation.browser import (
    TaskRows,
    browser_data,
    flip,
    notes,
    pictures_in_order,
    rows_to_show,
    script_json,
)
from mmtune.evaluation.examples import Example, plain
from mmtune.evaluation.thumbnails import Thumbnails

TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["</script><script>", "<!--", "\u2028", "\ud800", "\u202e", "\0", "😀", "__proto__"]
)


def row(score: float, image: Any = None, prediction: str | None = "a", **more: Any) -> dict[str, Any]:
    return {"score": score, "prediction": prediction, "image": image, **more}


def test_what_became_of_a_question() -> None:
    assert flip(1.0, [1.0, 0.6]) == "right" and flip(0.3, [0.0, 0.4]) == "wrong"
    assert flip(0.5, [1.0, 0.4]) == "lost" and flip(0.4, [0.0, 0.5]) == "won"


def test_pictures_of_examples_come_first_then_of_questions_that_changed_sides() -> None:
    def task(folder: str | None, scores: list[tuple[float, float]]) -> TaskRows:
        before = {str(n): row(base, [f"{n}.png", f"{n}b.png"]) for n, (base, _) in enumerate(scores)}
        after = {str(n): row(its) for n, (_, its) in enumerate(scores)}
        return TaskRows(before, {"m": after}, folder)

    # By number: right, wrong, won, lost, and an example.
    scores = [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
    tasks = {"t": task("/t", scores), "u": task("/u", scores), "silent": task(None, scores)}
    ordered = pictures_in_order(tasks, {"t": [Example("4", "", [], [])]})
    numbers = [(folder, name) for folder, name in ordered if not name.endswith("b.png")]
    assert numbers == [
        ("/t", "4.png"),
        *((folder, f"{n}.png") for n in (3, 2, 1) for folder in ("/t", "/u")),
        ("/t", "0.png"),
        ("/u", "0.png"),
        ("/u", "4.png"),
    ]
    assert ordered[:2] == [("/t", "4.png"), ("/t", "4b.png")] and len(ordered) == 20


@given(
    st.lists(
        st.tuples(
            TEXTS,
            st.none() | TEXTS,
            st.lists(TEXTS, max_size=3),
            st.sampled_from([None, "p.png", ["p.png", "q.png"], []]),
            st.sampled_from(["", "one", ("one", "two")]),
            st.floats(0, 1),
        ),
        max_size=8,
    )
)
def test_the_data_says_what_the_rows_say(drawn: list[tuple[Any, ...]]) -> None:
    before, after = {}, {}
    for number, (prompt, answer, target, image, category, score) in enumerate(drawn):
        asked = {"prompt": prompt, "target": target, "image": image, "category": category}
        before[f"q{number}"] = row(score, prediction=answer) | asked
        after[f"q{number}"] = row(1 - score, prediction=prompt)
    tasks = {"t": TaskRows(before, {"m": after}, "/root")}
    written = script_json(browser_data(tasks, Thumbnails({("/root", "q.png"): "data:q"})))
    assert "<" not in written and written.isascii()
    data = json.loads(written)
    assert len(set(data["texts"])) == len(data["texts"])
    text = data["texts"]
    several = [data["tasks"]["t"].pop(key) for key in ("answers", "scores")]
    for number, (prompt, answer, target, image, category, score) in enumerate(drawn):
        its = {key: column[number] for key, column in data["tasks"]["t"].items()}
        answers, scores = ([column[number] for column in columns] for columns in several)
        assert its["ids"] == f"q{number}" and text[its["prompts"]] == plain(prompt)
        assert text[its["targets"]] == " / ".join(plain(each) for each in dict.fromkeys(target))
        assert (None if answers[0] == -1 else text[answers[0]]) == (None if answer is None else plain(answer))
        assert text[answers[1]] == plain(prompt)
        assert [text[place] for place in its["categories"]] == (
            [category] if category == "one" else list(category)
        )
        names = [image] if isinstance(image, str) else (image or [])
        shown = [data["pictures"][place] for place in its["pictures"]]
        assert [(text[name], uri) for name, uri in shown] == [
            (name, "data:q" if name == "q.png" else "") for name in names
        ]
        for hundredths, exact in zip(scores, (score, 1 - score), strict=True):
            assert abs(hundredths - 100 * exact) <= 1 and (hundredths >= 50) == (exact >= 0.5)


def test_the_marks_of_pictures_are_no_words_of_the_question() -> None:
    several = row(1.0, ["a", "b"], prompt="<image>\n<image>\nWhich <image> is it?")
    data = browser_data({"t": TaskRows({"q": several}, {}, "/r")}, Thumbnails())
    assert data["texts"][data["tasks"]["t"]["prompts"][0]] == "Which <image> is it?"


def test_the_page_says_how_many_pictures_it_lacks() -> None:
    tasks = {"t": TaskRows({}, {}, "/r"), "old": TaskRows({}, {}, None)}
    said = notes(tasks, Thumbnails({("/r", "a"): "data:"}, budget=2_500_000, over_budget=1234))
    assert "1,234 of 1,235 pictures are left out" in said[0] and "2.5 MB" in said[0]
    assert "pictures of old lie" in said[1] and len(said) == 2
    assert notes({"t": tasks["t"]}, Thumbnails()) == []


@pytest.mark.parametrize("images", [{"t": "/pictures"}, {}, None])
def test_older_evaluations_do_not_say_where_their_pictures_lie(tmp_path: Path, images: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"images": images}))
    sample = {"question_id": 7, "prediction": "a", "score": 1.0, "prompt": "q", "resps": ["a"]}
    (tmp_path / "samples_t.jsonl").write_text(json.dumps(sample) + "\n")
    rows = rows_to_show(tmp_path, {"m": tmp_path}, ["t"])["t"]
    assert rows.images == (images or {}).get("t")
    assert rows.before == {"7": {"prediction": "a", "score": 1.0, "prompt": "q"}}
    assert rows.after == {"m": {"7": {"prediction": "a", "score": 1.0}}}
