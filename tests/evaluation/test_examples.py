from __future__ import annotations

import json
from pathlib import Path

from mmtune.evaluation.examples import Example, choose_examples, read_rows


def samples(folder: Path, answers: dict[str, tuple[str | None, float]]) -> Path:
    folder.mkdir()
    rows = [
        {
            "question_id": q,
            "prediction": text,
            "score": score,
            "prompt": f"{q}?",
            "target": ["yes", "yes"],
        }
        for q, (text, score) in answers.items()
    ]
    (folder / "samples_t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def chosen_of(base: Path, models: dict[str, Path]) -> list[Example]:
    after = {label: read_rows(folder, "t", base=False) for label, folder in models.items()}
    return choose_examples(read_rows(base, "t", base=True), after)


def test_what_was_forgotten_what_was_learnt_and_the_most_answers(tmp_path: Path) -> None:
    same = ("yes", 1.0)
    no = ("no", 0.0)
    base = samples(
        tmp_path / "base", {"same": same, "once": same, "lost": same, "many": no, "won": no, "never": no}
    )
    models: dict[str, dict[str, tuple[str | None, float]]] = {
        "a": {"same": same, "once": no, "lost": no, "many": ("x", 0.0), "won": same, "never": no},
        "b": {"same": same, "once": same, "lost": (None, 0.0), "many": ("y", 0.0), "won": same, "never": no},
    }
    folders = {label: samples(tmp_path / label, answers) for label, answers in models.items()}
    chosen = chosen_of(base, folders)
    assert [example.question_id for example in chosen] == ["lost", "won", "many"]
    lost, won, many = chosen
    assert (lost.prompt, lost.targets) == ("lost?", ["yes"])
    assert [(given.text, given.right, given.by) for given in lost.given] == [
        ("yes", True, ["base"]),
        ("no", False, ["a"]),
        (None, False, ["b"]),
    ]
    assert [(given.text, given.right, given.by) for given in won.given] == [
        ("no", False, ["base"]),
        ("yes", True, ["a", "b"]),
    ]
    assert len(many.given) == 3


def test_models_that_answer_alike_are_shown_by_one_question(tmp_path: Path) -> None:
    base = samples(tmp_path / "start", {"q": ("yes", 1.0), "r": ("no", 0.0)})
    run = samples(tmp_path / "run", {"q": ("yes", 1.0), "r": ("no", 0.0)})
    chosen = chosen_of(base, {"base": run})
    assert [example.question_id for example in chosen] == ["q"]
    assert chosen[0].given[0].by == ["base", "base"]


def test_no_more_than_three_even_where_every_answer_differs(tmp_path: Path) -> None:
    base = samples(tmp_path / "base", {str(n): ("yes", 1.0) for n in range(9)})
    run = samples(tmp_path / "run", {str(n): (f"no {n}", 0.0) for n in range(9)})
    assert [example.question_id for example in chosen_of(base, {"run": run})] == ["0", "1", "2"]
