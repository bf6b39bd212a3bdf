"""Evaluations that are killed and go on, alone and in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.errors import UserError
from mmtune.evaluation.evaluate import evaluate
from mmtune.evaluation.results import TIMES
from mmtune.evaluation.unfinished import Unfinished
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.model import VisionLanguageModel as Model

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["tiny_reading", "tiny_text", "tiny_iconqa"]


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, working where the world is."""
    monkeypatch.chdir(world)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """Name -> content; of results.json what differs between two evaluations is left out."""
    found = {path.name: path.read_text() for path in folder.iterdir()}
    if "results.json" in found:
        made = json.loads(found["results.json"])
        kept = {key: value for key, value in made.items() if key not in (*TIMES, "processes")}
        found["results.json"] = json.dumps(kept, indent=2)
    return found


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


def killed_after(calls: int, patched: pytest.MonkeyPatch) -> list[int]:
    """Lets `generate` end the evaluation at a later call; the list grows with each call."""
    generate, made = Model.generate, list[int]()

    def stop(self: VisionLanguageModel, *args: Any) -> list[list[int]]:
        made.append(len(args[0].input_ids))
        if len(made) > calls:
            raise Killed
        return generate(self, *args)

    patched.setattr(Model, "generate", stop)
    return made


@pytest.mark.parametrize("calls", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("predict_only", [False, True])
def test_a_killed_evaluation_goes_on_to_the_same_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch, calls: int, predict_only: bool
) -> None:
    how: dict[str, Any] = {"batch_size": 4, "predict_only": predict_only}
    evaluate(Path("base"), TASKS, place / "whole", **how)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(min(calls, 8), patched)
        evaluate(Path("base"), TASKS, place / "killed", **how)
    assert not (place / "killed" / "results.json").exists()
    if calls:
        last = sorted((place / "killed").glob("answers_*"))[-1]
        with open(last, "ab") as file:  # as a kill leaves a line that was being written
            file.write(b'{"question_id": "x", "te')
    with monkeypatch.context() as patched:
        made = killed_after(99, patched)
        evaluate(Path("base"), TASKS, place / "killed", **how)
    assert len(made) == 9 - min(calls, 8)
    assert files(place / "killed") == files(place / "whole")


def test_what_is_whole_needs_no_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(Path("base"), TASKS, place / "whole")

    def refuse(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("mmtune.evaluation.evaluate.write_json", refuse)
        evaluate(Path("base"), TASKS, place / "killed")
    monkeypatch.setattr("mmtune.parts.model.VisionLanguageModel.from_pretrained", refuse)
    evaluate(Path("base"), TASKS, place / "killed")
    assert files(place / "killed") == files(place / "whole")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_new_tokens": 3}, "decoding"),
        ({"split": "val"}, "data, split"),
        ({"limit": 11}, "limit"),
        ({"dtype": "bfloat16"}, "batch_size, precision"),
    ],
)
def test_another_request_begins_anew_and_says_so(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    named: str,
) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(1, patched)
        evaluate(Path("base"), ["tiny_text"], place / "killed", batch_size=4)
    capsys.readouterr()
    evaluate(Path("base"), ["tiny_text"], place / "killed", batch_size=4, **changes)
    said = capsys.readouterr().err
    assert f"answers made with another {named} lie here; begun anew" in said
    assert "already" not in said
    evaluate(Path("base"), ["tiny_text"], place / "whole", batch_size=4, **changes)
    assert files(place / "killed") == files(place / "whole")


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    (tmp_path / "answers_a.0.partial.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        Unfinished(tmp_path, "a", {})
    answers = Unfinished(tmp_path, "full", {})
    answers.path = Path("/dev/full")
    with pytest.raises(UserError, match="cannot be written: No space left"), answers:
        answers.add([{"question_id": "1", "text": "a"}])


@pytest.mark.parametrize("other", [{}, {"limit": 5}])
def test_a_second_evaluation_in_the_same_folder_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    generate, refused = Model.generate, list[UserError]()

    def second(self: VisionLanguageModel, *args: Any) -> list[list[int]]:
        if not refused:
            with pytest.raises(UserError, match="another process is writing") as caught:
                evaluate(Path("base"), ["tiny_text"], place / "out", batch_size=4, **other)
            refused.append(caught.value)
        return generate(self, *args)

    evaluate(Path("base"), ["tiny_text"], place / "alone", batch_size=4)
    monkeypatch.setattr(Model, "generate", second)
    evaluate(Path("base"), ["tiny_text"], place / "out", batch_size=4)
    assert refused and files(place / "out") == files(place / "alone")


def test_answers_that_are_gone_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unfinished, "add", lambda self, rows: None)
    with pytest.raises(UserError, match="task tiny_text: 12 answers were made and are not here"):
        evaluate(Path("base"), ["tiny_text"], place / "out")
    assert not (place / "out" / "results.json").exists()


def two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*start, "-m", "mmtune", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_take_up_what_one_left_and_write_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(Path("base"), TASKS, place / "whole", batch_size=16)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(6, patched)
        evaluate(Path("base"), TASKS, place / "killed", batch_size=3)
    asked = ["eval", "--model", "base", "--tasks", ",".join(TASKS), "--batch_size", 3]
    asked += ["--output_path", place / "killed"]
    ran = two_processes(*asked)
    assert ran.returncode == 0, ran.stderr
    assert "tiny_reading: 12 answers are there already" in ran.stderr
    made = json.loads((place / "killed" / "results.json").read_text())
    assert (made["processes"], made["batch_size"]) == (2, 3)
    here = {name: text for name, text in files(place / "killed").items() if name != "results.json"}
    alone = {name: text for name, text in files(place / "whole").items() if name != "results.json"}
    assert here == alone
    assert made["results"] == json.loads((place / "whole" / "results.json").read_text())["results"]


def test_a_fault_of_one_process_ends_all(place: Path) -> None:
    data = place / "data"
    data.symlink_to(Path("datasets/tiny").resolve())
    questions = json.loads((data / "gqa" / "colour_test_questions.json").read_text())
    broken = place / "broken"
    (broken / "gqa").mkdir(parents=True)
    (broken / "gqa" / "colour_test_questions.json").write_text(json.dumps(questions))
    (broken / "images" / "test").mkdir(parents=True)
    names = sorted(question["imageId"] for question in questions.values())
    for name in names[:-1]:
        (broken / "images" / "test" / f"{name}.png").symlink_to(data / "images" / "test" / f"{name}.png")
    (broken / "images" / "test" / f"{names[-1]}.png").write_text("no picture")
    asked = ["eval", "--model", "base", "--tasks", "tiny_colour", "--batch_size", 1, "--data_root", broken]
    ran = two_processes(*asked, "--output_path", place / "out")
    assert ran.returncode != 0
    assert f"{names[-1]}.png: this picture cannot be read" in ran.stderr
    assert not (place / "out" / "results.json").exists()


def test_how_answers_were_made_is_kept_with_them(tmp_path: Path) -> None:
    """For whoever finds all answers here and loads no model, which alone could tell."""
    answers = Unfinished(tmp_path, "task", {"model": "a"})
    with answers:
        answers.note({"attention": {"language": "eager"}})
        answers.add([{"question_id": "1", "text": "red"}])
    again = Unfinished(tmp_path, "task", {"model": "a"})
    assert again.made == {"attention": {"language": "eager"}}
    assert list(again.done) == ["1"]
    assert Unfinished(tmp_path, "task", {"model": "b"}).made == {}
