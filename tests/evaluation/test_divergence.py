"""The KL to the base against two models loaded whole, computed one question at a time in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.batches import load_images, pad
from mmtune.data.chat import Turn
from mmtune.evaluation.divergence import add_kl
from mmtune.evaluation.evaluate import evaluate, evaluate_suite
from mmtune.evaluation.metrics.base import clustered_stderr
from mmtune.evaluation.protocol import Suite, load_protocol
from mmtune.parts.model import VisionLanguageModel
from mmtune.training.loop import train
from tests.world import FULL, LORA, run_options

TASKS = ["tiny_colour", "tiny_text"]
TUNES = {
    "adapter and connector": {"connector": {**FULL, "lr": 0.01}, "language": {**LORA, "lr": 0.02}},
    "in full": {"connector": {**LORA, "lr": 0.1}, "language": {**FULL, "lr": 0.01}},
}


@pytest.fixture(scope="module", params=TUNES)
def tuned(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    train(run_options(world, folder, tune=TUNES[request.param]))
    return folder / "run" / "final"


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return tmp_path


def rows(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    lines = (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8").split("\n")
    return {str(row["question_id"]): row for row in map(json.loads, filter(None, lines))}


def naive(
    base: Path, tuned: Path, task: str, answers: dict[str, str], restore: str | None
) -> dict[str, float]:
    """Position after position, from two models that share nothing, in fp64, by the definition."""
    instead = {restore: base} if restore else {}
    models = [
        VisionLanguageModel.from_pretrained(base),
        VisionLanguageModel.from_pretrained(tuned, instead=instead),
    ]
    protocol = load_protocol(task)
    found = {}
    for question in protocol.questions()[0]:
        turns = protocol.turns(question)
        said = []
        for model in models:
            model.double()
            prompt = model.chat.prompt(turns)
            whole = model.chat.encode([*turns, Turn("assistant", answers[question.id])])[0]
            assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
            batch = pad([whole[:-1]], model.language.pad_id, left=False)
            paths = [Path("datasets/tiny") / protocol.images / question.image] if question.image else []
            batch.images = load_images(paths, model.transform)
            with torch.no_grad():
                hidden = model.language.hidden(model.splice(batch), batch.attention_mask)
                said.append(model.language.logits(hidden[0, len(prompt) - 1 :]).softmax(-1))
        p, q = said
        found[question.id] = float((p * (p.log() - q.log())).sum(-1).mean())
    return found


@pytest.mark.parametrize("restore", [None, "connector"])
def test_it_is_that_of_two_whole_models(place: Path, tuned: Path, restore: str | None) -> None:
    base = Path("base")
    evaluate(base, TASKS, place / "base", batch_size=5)
    made = evaluate(tuned, TASKS, place / "tuned", batch_size=5, restore=restore)
    before = {task: rows(place / "tuned", task) for task in TASKS}
    made = add_kl(made, TASKS, place / "tuned")
    assert json.loads((place / "tuned" / "results.json").read_text()) == made
    for task in TASKS:
        said = {name: row["prediction"] for name, row in rows(place / "base", task).items()}
        expected = naive(base, tuned, task, said, restore)
        found = rows(place / "tuned", task)
        assert {name: row["kl"] for name, row in found.items()} == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert [{k: v for k, v in row.items() if k != "kl"} for row in found.values()] == list(
            before[task].values()
        )
        result = made["results"][task]
        assert result["kl"] == pytest.approx(fmean(expected.values()), rel=1e-3) and result["kl"] > 1e-3
        clusters = [row["cluster"] for row in found.values()]
        assert result["kl_stderr"] == pytest.approx(
            clustered_stderr(list(expected.values()), clusters), rel=1e-2
        )


def test_the_bases_own_answers_are_taken_where_they_lie(
    place: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(Path("base"), TASKS, place / "base")
    one, other = (evaluate(tuned, TASKS, place / name) for name in ("one", "other"))
    add_kl(one, TASKS, place / "one")
    monkeypatch.setattr("mmtune.evaluation.generate.generate_answers", None)
    add_kl(other, TASKS, place / "other", base_results=place / "base")
    for task in TASKS:
        assert rows(place / "one", task) == rows(place / "other", task)
    again = add_kl(other, TASKS, place / "other")  # what is there is not made again
    assert again["results"] == one["results"]


def test_answers_of_another_model_are_refused(place: Path, tuned: Path) -> None:
    made = evaluate(tuned, ["tiny_text"], place / "tuned", limit=3)
    evaluate(Path("base"), ["tiny_text"], place / "more", limit=4)
    with pytest.raises(UserError, match="not results of the base"):
        add_kl(made, ["tiny_text"], place / "tuned", base_results=place / "tuned")
    with pytest.raises(UserError, match="made with other limit"):
        add_kl(made, ["tiny_text"], place / "tuned", base_results=place / "more")
    assert all("kl" not in row for row in rows(place / "tuned", "tiny_text").values())


def test_it_is_of_the_prompts_of_a_question_file(place: Path, tuned: Path) -> None:
    questions, _ = load_protocol("tiny_text").questions()
    lines = {}
    for name, more in (("same", "\nAnswer briefly."), ("other", "\nSay it at length, in a whole sentence.")):
        asked = [{"question_id": q.id, "text": q.text + more} for q in questions]
        lines[name] = place / f"{name}.jsonl"
        lines[name].write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = {}
    for name, file in (("none", None), *lines.items()):
        files = {"tiny_text": file} if file else None
        made = evaluate(tuned, ["tiny_text"], place / name, question_files=files)
        add_kl(made, ["tiny_text"], place / name, question_files=files)
        found[name] = [row["kl"] for row in rows(place / name, "tiny_text").values()]
    assert found["same"] == found["none"] and found["other"] != found["none"]


def test_it_is_zero_at_the_base_and_grows_on_the_way(place: Path, tuned: Path) -> None:
    values = []
    for scale in (0.0, 0.5, 1.0):
        output = place / str(scale)
        values.append(add_kl(evaluate(tuned, TASKS, output, scale=scale), TASKS, output)["results"])
    for task in TASKS:
        start, middle, end = (value[task]["kl"] for value in values)
        assert abs(start) < 1e-6 < middle < end


def test_the_ends_of_the_scale_give_the_answers_of_base_and_model(place: Path, tuned: Path) -> None:
    for folder, scale in ((tuned, 1.0), (Path("base"), 0.0)):
        evaluate(folder, TASKS, place / "plain")
        made = evaluate(tuned, TASKS, place / "scaled", scale=scale)
        assert (made["scale"], made["restored"]) == (scale, None)
        for task in TASKS:
            assert rows(place / "plain", task) == rows(place / "scaled", task)
    evaluate(tuned, TASKS, place / "half", scale=0.5)
    for other in (tuned, Path("base")):
        evaluate(other, TASKS, place / "other")
        assert any(rows(place / "half", task) != rows(place / "other", task) for task in TASKS)


def test_a_run_is_evaluated_along_the_way(
    place: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = Suite("two", ["tiny_colour"], ["tiny_text"])
    how: dict[str, Any] = {"scales": [0.25, 0.5], "kl": True, "limit": 2}
    made = evaluate_suite(tuned, suite, place, None, **how)
    assert [each["scale"] for each in made] == [None, 0.25, 0.5]
    assert "kl" in made[0]["results"]["tiny_text"] and "kl" not in made[1]["results"]["tiny_text"]
    folders = ["two-test", "two-test-scale-0.25", "two-test-scale-0.5"]
    assert sorted(path.name for path in (place / "eval").iterdir()) == folders
    assert evaluate_suite(tuned, suite, place, None, **how) == made
    assert capsys.readouterr().out.count("already done") == 3


def test_from_the_command_line(place: Path, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "eval",
        "--model",
        str(tuned),
        "--tasks",
        "tiny_text",
        "--limit",
        "2",
        "--output_path",
        str(place),
    ]
    assert main([*command, "--kl", "--scale", "0.5"]) == 0
    assert "0.5 of the way from" in " ".join(capsys.readouterr().out.split())
    assert "kl" in json.loads((place / "results.json").read_text())["results"]["tiny_text"]
    wrong = {
        "exclude each other": ["--scale", "0.5", "--restore", "language"],
        "Leave one of them out": ["--kl", "--predict_only"],
        "nothing to do with it": ["--base_results", str(place)],
        "nothing to do": ["--base", "base"],
        "it has no trained.json": ["--kl", "--model", "base"],
    }
    for said, flags in wrong.items():
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--scale", "1.5"])
    assert "expected 0 to 1, found 1.5" in capsys.readouterr().err
