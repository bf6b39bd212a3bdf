"""Evaluations of a random model on the small tiny world, files included."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.evaluation.evaluate import evaluate, evaluate_suite, parse_gen_kwargs, print_results
from mmtune.evaluation.protocol import Protocol, Suite, load_protocol, load_suite
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.model import VisionLanguageModel
from mmtune.training.loop import train
from tests.world import FULL, LORA, half_right, run_options

TASKS = ["tiny_reading", "tiny_colour", "tiny_text", "tiny_iconqa"]


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    text = (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, working where the world is."""
    monkeypatch.chdir(world)
    return tmp_path


def test_batch_size_changes_no_answer(place: Path) -> None:
    made = {size: evaluate(Path("base"), TASKS, place / str(size), batch_size=size) for size in (1, 3, 16)}
    said = {row["prediction"] for task in TASKS for row in samples(place / "1", task)}
    assert len(said) > 8  # a model that always says the same would prove nothing
    for task in TASKS:
        alone = samples(place / "1", task)
        assert len(alone) == 12
        for size in (3, 16):
            assert samples(place / str(size), task) == alone
            assert made[size]["results"][task] == made[1]["results"][task]


def test_what_the_batch_changes_in_bf16_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against whole evaluations in other batches; at most 32 questions are asked again, here all 12."""
    alone = evaluate(Path("base"), TASKS, place / "1", batch_size=1, dtype="bfloat16")
    made = evaluate(Path("base"), TASKS, place / "16", batch_size=16, dtype="bfloat16")
    exact = evaluate(Path("base"), ["tiny_text"], place / "exact")
    assert "changed_alone" not in alone and "changed_alone" not in exact
    said = {size: [r["prediction"] for t in TASKS for r in samples(place / size, t)] for size in ("1", "16")}
    changed = {}
    for number, task in enumerate(TASKS):
        own = slice(12 * number, 12 * number + 12)
        changed[task] = sum(a != b for a, b in zip(said["1"][own], said["16"][own], strict=True))
    assert made["changed_alone"] == {task: {"asked": 12, "changed": n} for task, n in changed.items()}
    assert json.loads((place / "16" / "results.json").read_text())["changed_alone"] == made["changed_alone"]
    total = sum(changed.values())
    assert total > 0
    console = Console(file=StringIO(), width=200)
    print_results(made, console)
    shares = f"Of 48 questions asked again one at a time {100 * total / 48:.1f} % were answered otherwise"
    assert shares in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{changed['tiny_text']} of 12 answers changed" in capsys.readouterr().err
    monkeypatch.setattr("mmtune.evaluation.generate.ALONE", 5)
    some = evaluate(Path("base"), ["tiny_text"], place / "some", batch_size=16, dtype="bfloat16")
    assert some["changed_alone"]["tiny_text"]["asked"] == 5


def test_in_bf16_another_batch_size_is_another_evaluation(place: Path) -> None:
    how: dict[str, Any] = {"limit": 2, "skip_done": True}
    for dtype, sizes in (("float32", [4, 4]), ("bfloat16", [4, 2])):
        made = [
            evaluate(Path("base"), ["tiny_text"], place, batch_size=b, dtype=dtype, **how) for b in (4, 2)
        ]
        assert [each["batch_size"] for each in made] == sizes


def test_results_say_how_they_were_made(place: Path) -> None:
    returned = evaluate(Path("base"), TASKS, place, batch_size=8)
    made = json.loads((place / "results.json").read_text())
    assert made == returned
    assert list(made["results"]) == TASKS
    for task in TASKS:
        result = made["results"][task]
        assert {"score", "stderr", "n", "rule", "metric", "missing"} <= result.keys()
        assert 0 <= result["score"] <= 100
        assert (result["n"], result["missing"]) == (12, 0)
        assert made["configs"][task]["hash"] == load_protocol(task).hash
        assert made["configs"][task]["prompt"] == load_protocol(task).prompt
        assert len(made["data"][task]) == 16
    assert (made["batch_size"], made["padding"], made["precision"]) == (8, "left", "float32")
    assert made["attention"] == {"vision": "sdpa", "language": "sdpa"}
    assert (made["model"], made["split"], made["limit"]) == ("base", "test", None)
    assert (made["model_hash"], made["seed"]) == (model_hash(Path("base")), 0)
    assert made["splits"] == dict.fromkeys(TASKS, "test")
    assert {"torch", "transformers", "peft", "mmtune"} <= made["environment"].keys()
    roots = {task: (Path("datasets/tiny") / load_protocol(task).images).resolve() for task in TASKS}
    assert made["images"] == {task: str(root) for task, root in roots.items()}


def test_samples_hold_prompt_target_and_score(place: Path) -> None:
    evaluate(Path("base"), ["tiny_colour"], place)
    rows = samples(place, "tiny_colour")
    official = json.loads(Path("datasets/tiny/gqa/colour_test_questions.json").read_text())
    for row in rows:
        question = official[row["question_id"]]
        assert row["prompt"] == f"<image>\n{question['question']}\nAnswer briefly."
        assert row["target"] == [question["answer"]]
        assert row["score"] in (0.0, 1.0)
        assert row["cluster"] == question["imageId"]


def test_a_question_file_replaces_the_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, _ = load_protocol("tiny_colour").questions("test", Path("datasets/tiny"))
    rows = [{"question_id": q.id, "image": q.image, "text": f"{q.text}\nIn one word."} for q in questions]
    file = place / "llava.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = evaluate(Path("base"), ["tiny_colour"], place / "own", limit=3)
    command = ["eval", "--model", "base", "--tasks", "tiny_colour", "--limit", "3", "--output_path"]
    assert main([*command, str(place / "out"), "--question_file", f"tiny_colour={file}"]) == 0
    asked = [row["prompt"] for row in samples(place / "out", "tiny_colour")]
    assert asked == [f"<image>\n{row['text']}" for row in rows[:3]]
    made = json.loads((place / "out" / "results.json").read_text())
    assert made["configs"]["tiny_colour"]["hash"] != own["configs"]["tiny_colour"]["hash"]
    assert made["data"]["tiny_colour"] != own["data"]["tiny_colour"]
    assert len(made["question_files"]["tiny_colour"]) == 16 and own["question_files"] == {}
    for given, said in (
        (["tiny_color=x"], "'tiny_color' is not among the tasks"),
        (["tiny_colour"], "'tiny_colour' names no file"),
        ([f"tiny_colour={file}"] * 2, "is given twice"),
    ):
        flags = [part for each in given for part in ("--question_file", each)]
        assert main([*command, str(place / "no"), *flags]) == 2
        assert said in capsys.readouterr().err


def test_limit_asks_the_first_and_says_so(place: Path) -> None:
    evaluate(Path("base"), ["tiny_colour", "tiny_text"], place / "all")
    made = evaluate(Path("base"), ["tiny_colour", "tiny_text"], place / "some", limit=5)
    assert made["limit"] == 5
    for task in ("tiny_colour", "tiny_text"):
        assert made["results"][task]["n"] == 5
        assert samples(place / "some", task) == samples(place / "all", task)[:5]


def test_fewer_new_tokens_give_shorter_answers(place: Path) -> None:
    evaluate(Path("base"), ["tiny_text"], place / "long")
    made = evaluate(Path("base"), ["tiny_text"], place / "short", max_new_tokens=2)
    assert made["decoding"]["max_new_tokens"] == 2
    pairs = zip(samples(place / "long", "tiny_text"), samples(place / "short", "tiny_text"), strict=True)
    for long, short in pairs:
        cut = short["prediction"].rstrip("\N{REPLACEMENT CHARACTER}")  # a character cut between its bytes
        assert long["prediction"].startswith(cut)
        assert len(long["prediction"]) > len(short["prediction"])


def test_answers_alone_can_be_scored_to_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.evaluation.generate.answer_in_batches", half_right)
    evaluated = evaluate(Path("base"), TASKS, place / "scored")
    evaluate(Path("base"), TASKS, place / "answers", predict_only=True)
    assert not (place / "answers" / "results.json").exists()
    files = {
        "tiny_reading": "textvqa/TextVQA_0.5.1_test.json",
        "tiny_colour": "gqa/colour_test_questions.json",
        "tiny_text": "text/questions_test.jsonl",
        "tiny_iconqa": "iconqa/problems.json",
    }
    for task, file in files.items():
        answers = place / "answers" / f"samples_{task}.jsonl"
        assert set(samples(place / "answers", task)[0]) == {"question_id", "prompt", "text"}
        arguments = ["score", "--task", task, "--predictions", str(answers)]
        capsys.readouterr()
        assert main([*arguments, "--annotations", f"datasets/tiny/{file}"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said.pop("task"), said.pop("split")) == (task, "test")
        assert said.items() <= evaluated["results"][task].items()
        assert 0 < said["score"] < 100


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded")


def test_what_is_done_is_skipped(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluate(Path("base"), ["tiny_text"], place, limit=3, skip_done=True)
    monkeypatch.setattr("mmtune.parts.model.VisionLanguageModel.from_pretrained", no_model)
    assert evaluate(Path("base"), ["tiny_text"], place, limit=3, batch_size=2, skip_done=True) == made
    assert f"already done: {place / 'results.json'}" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate(Path("base"), ["tiny_text"], place, limit=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 2},
        {"split": "val"},
        {"dtype": "bfloat16"},
        {"max_new_tokens": 3},
        {"tasks": ["tiny_text", "tiny_colour"]},
        {"protocol": "other"},
        {"data": "other"},
        {"model": "other"},
        {"samples": "gone"},
        {"shape": "older"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_was_made_otherwise_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"tasks": ["tiny_text"], "limit": 3}
    evaluate(Path("base"), output=place, **asked)
    results = json.loads((place / "results.json").read_text())
    stale: dict[str, dict[str, Any]] = {
        "protocol": {"configs": {"tiny_text": {"hash": "another"}}},
        "data": {"data": {"tiny_text": "another"}},
        "model": {"model_hash": "another"},
        "shape": {},
    }
    (kind,) = changes
    if kind in stale:
        if kind == "shape":
            del results["images"]
        (place / "results.json").write_text(json.dumps({**results, **stale[kind]}))
    elif kind == "samples":
        (place / "samples_tiny_text.jsonl").unlink()
    else:
        asked |= changes
    monkeypatch.setattr("mmtune.parts.model.VisionLanguageModel.from_pretrained", no_model)
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate(Path("base"), output=place, skip_done=True, **asked)


@pytest.fixture(scope="module")
def tuned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose connector has a LoRA and whose language model trained in full."""
    folder = tmp_path_factory.mktemp("tuned")
    tune = {"connector": {**LORA, "lr": 0.1}, "language": {**FULL, "lr": 0.01}}
    train(run_options(world, folder, tune=tune))
    return folder / "run"


def test_a_part_is_put_back_and_the_results_say_so(place: Path, tuned: Path) -> None:
    final, base = tuned / "final", Path("base")
    tasks = ["tiny_colour", "tiny_place", "tiny_iconqa"]

    def said(folder: str) -> list[list[dict[str, Any]]]:
        return [samples(place / folder, task) for task in tasks]

    for part, kept in (("language", "connector"), ("connector", "language")):
        made = evaluate(final, tasks, place / part, restore=part)
        assert (made["restored"], made["base_hash"]) == (part, model_hash(base))
        assert (made["base"], made["model_hash"]) == (str(base.resolve()), model_hash(final))
        console = Console(file=StringIO(), width=200)
        print_results(made, console)
        printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert f"{final}, {part} as in {base.resolve()}" in printed
        # The same model the other way round: the base with the other part tuned.
        by_hand = VisionLanguageModel.from_pretrained(base, instead={kept: final})
        by_hand.save_pretrained(place / f"{part} model")
        evaluate(place / f"{part} model", tasks, place / f"{part} by hand")
        assert said(part) == said(f"{part} by hand")
    evaluate(final, tasks, place / "whole")
    evaluate(base, tasks, place / "base")
    different = [said(name) for name in ("whole", "language", "connector", "base")]
    assert all(one != other for i, one in enumerate(different) for other in different[:i])


def test_a_restored_evaluation_is_another_one(
    place: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, asked = tuned / "final", {"tasks": ["tiny_text"], "limit": 3, "skip_done": True}
    made = evaluate(final, output=place, restore="language", **asked)  # type: ignore[arg-type]
    monkeypatch.setattr("mmtune.parts.model.VisionLanguageModel.from_pretrained", no_model)
    assert evaluate(final, output=place, restore="language", **asked) == made  # type: ignore[arg-type]
    for other in ("connector", None):
        with pytest.raises(AssertionError, match="was loaded"):
            evaluate(final, output=place, restore=other, **asked)  # type: ignore[arg-type]
    written = json.loads((place / "results.json").read_text())
    (place / "results.json").write_text(json.dumps({**written, "base_hash": "another"}))
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate(final, output=place, restore="language", **asked)  # type: ignore[arg-type]


def test_what_cannot_be_put_back_is_said_before_the_model_is_loaded(
    place: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.parts.model.VisionLanguageModel.from_pretrained", no_model)
    with pytest.raises(UserError, match="its vision did not train"):
        evaluate(tuned / "final", ["tiny_text"], place, restore="vision")
    with pytest.raises(UserError, match="but this is model"):
        evaluate(tuned / "final", ["tiny_text"], place, restore="language", base=tuned / "final")
    with pytest.raises(UserError, match="nothing to do with it"):
        evaluate(tuned / "final", ["tiny_text"], place, base=Path("base"))
    assert list(place.iterdir()) == []


def test_a_suite_with_attribution(place: Path, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = Suite("two", ["tiny_colour"], ["tiny_text"])
    assert [made["restored"] for made in evaluate_suite(tuned / "final", suite, place, "val")] == [None]
    made = evaluate_suite(tuned / "final", suite, place, "val", attribution=True, limit=2)
    assert [each["restored"] for each in made] == [None, "connector", "language"]
    again = evaluate_suite(tuned / "final", suite, place, "val", attribution=True, limit=2)
    assert again == made
    assert capsys.readouterr().out.count("already done") == 3
    folders = ["two-val", "two-val-restore-connector", "two-val-restore-language"]
    assert sorted(path.name for path in (place / "eval").iterdir()) == folders
    for each, folder in zip(made, folders, strict=True):
        assert json.loads((place / "eval" / folder / "results.json").read_text()) == each


def test_each_task_on_its_own_reporting_split(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"tiny_text": "val", "tiny_colour": "test"}

    def load(task: str) -> Protocol:
        return replace(load_protocol(task), report_split=own[task])

    monkeypatch.setattr("mmtune.evaluation.evaluate.load_protocol", load)
    made = evaluate(Path("base"), list(own), place)
    assert made["splits"] == own
    assert [made["results"][task]["n"] for task in own] == [5, 12]
    made = evaluate(Path("base"), list(own), place, split="val")
    assert made["splits"] == dict.fromkeys(own, "val")


def test_a_task_given_twice(place: Path) -> None:
    with pytest.raises(UserError, match="given twice: tiny_text"):
        evaluate(Path("base"), ["tiny_text", "tiny_colour", "tiny_text"], place)


def test_a_suite_with_a_task_of_ones_own(place: Path) -> None:
    """Its results stand under the task's own name, not under the path of its file."""
    own = place / "any_name.yaml"
    shipped = (share("eval") / "tiny_text.yaml").read_text()
    own.write_text(shipped.replace("task: tiny_text", "task: mine").replace("Answer briefly.", "Answer!"))
    suite_file = place / "suite.yaml"
    suite_file.write_text(f"name: both\nsource: [tiny_text]\ntarget: [{own}]\n")
    [made] = evaluate_suite(Path("base"), load_suite(str(suite_file)), place, "val", limit=2)
    assert list(made["results"]) == ["tiny_text", "mine"]
    rows = samples(place / "eval" / "both-val", "mine")
    assert [row["prompt"].endswith("\nAnswer!") for row in rows] == [True, True]
    with pytest.raises(UserError, match="given twice: mine"):
        evaluate(Path("base"), [str(own), str(own)], place)


def test_pictures_are_looked_for_before_the_model(place: Path) -> None:
    """All tasks' at once, but only those that are asked."""
    data = place / "data"
    shutil.copytree("datasets/tiny", data)
    for name in ("test_colour_00003", "test_shape_00002", "test_shape_00007"):
        (data / "images" / "test" / f"{name}.png").unlink()
    tasks = ["tiny_text", "tiny_colour", "tiny_shape"]
    with pytest.raises(UserError) as caught:
        evaluate(place / "no model", tasks, place / "out", root=data)
    assert [fault.what for fault in caught.value.faults] == [
        "pictures that are not there (1 of 12): images/test/test_colour_00003.png",
        "pictures that are not there (2 of 12): "
        "images/test/test_shape_00002.png, images/test/test_shape_00007.png",
    ]
    made = evaluate(Path("base"), tasks, place / "out", root=data, limit=2)
    assert [row["n"] for row in made["results"].values()] == [2, 2, 2]


def test_the_annotations_are_read_before_the_model(place: Path) -> None:
    with pytest.raises(UserError, match="no such annotation file"):
        evaluate(place / "no model", ["tiny_text"], place, root=place)
    with pytest.raises(UserError, match="no such folder"):
        evaluate(place / "no model", ["tiny_text"], place)
    assert list(place.iterdir()) == []


def test_of_some_images_a_caption_is_scored_as_of_all(place: Path) -> None:
    """CIDEr weighs a word by its rarity in the references of the whole file, also under --limit."""
    pictures = Path("datasets/tiny/images/test").resolve()
    images = [{"id": i, "file_name": path.name} for i, path in enumerate(sorted(pictures.iterdir())[:4])]
    (place / "mine.yaml").write_text(
        "{task: mine, about: '', format: captions, rule: cider, prompt: Say it., max_new_tokens: 8, "
        f"root: {place}, annotations: {{test: captions.json}}, images: {pictures}}}"
    )

    def written(captions: list[str]) -> None:
        rows = [{"image_id": i, "caption": caption} for i, caption in enumerate(captions)]
        (place / "captions.json").write_text(json.dumps({"images": images, "annotations": rows}))

    mine = [str(place / "mine.yaml")]
    written(["a cat"] * 4)
    evaluate(Path("base"), mine, place / "first", predict_only=True)
    said = [row["text"] for row in samples(place / "first", "mine")]
    written([*said[:2], "a cat", "a dog"])
    evaluate(Path("base"), mine, place / "all")
    evaluate(Path("base"), mine, place / "some", limit=2)
    scores = [row["score"] for row in samples(place / "all", "mine")[:2]]
    assert min(scores) > 0
    assert [row["score"] for row in samples(place / "some", "mine")] == scores


def test_the_table_has_a_line_per_task(place: Path) -> None:
    made = evaluate(Path("base"), TASKS, place, limit=2)
    console = Console(file=StringIO(), width=100)
    print_results(made, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for task in TASKS:
        (line,) = [line for line in printed.splitlines() if task in line]
        assert f"{made['results'][task]['score']:.2f}" in line
        assert made["results"][task]["rule"] in line
    assert "warning" not in printed and "per cent" not in printed
    made["results"][TASKS[0]]["unit"] = "CIDEr x 100"
    made["results"][TASKS[0]]["warnings"] = ["CIDEr of [one] image"]
    print_results(made, console)
    assert f"per cent, but that of {TASKS[0]} is CIDEr x 100." in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"warning: {TASKS[0]}: CIDEr of [one] image" in console.file.getvalue()  # type: ignore[attr-defined]


def test_gen_kwargs() -> None:
    assert parse_gen_kwargs("") is None
    assert parse_gen_kwargs("temperature=0") is None
    assert parse_gen_kwargs("max_new_tokens=5,temperature=0.0") == 5
    for text in (
        "max_new_tokens=0",
        "max_new_tokens=-1",
        "max_new_tokens",
        "temperature=0.7",
        "top_p=1",
        "x",
    ):
        with pytest.raises(UserError, match="is not understood") as caught:
            parse_gen_kwargs(text)
        assert "--gen_kwargs" in str(caught.value)


def test_results_never_stand_beside_the_answers_of_another_model(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that is stopped has replaced some of the samples already."""
    evaluate(Path("base"), TASKS[:2], place, limit=2)
    generate = VisionLanguageModel.generate
    calls: list[int] = []

    def stop(self: VisionLanguageModel, *args: Any) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(VisionLanguageModel, "generate", stop)
        evaluate(Path("base"), TASKS[:2], place, limit=3)
    assert not (place / "results.json").exists()
    assert len(samples(place, TASKS[0])) == 3
    assert len(samples(place, TASKS[1])) == 2
    again = evaluate(Path("base"), TASKS[:2], place, limit=2, skip_done=True)
    assert [len(samples(place, task)) for task in TASKS[:2]] == [2, 2]
    assert [result["n"] for result in again["results"].values()] == [2, 2]
