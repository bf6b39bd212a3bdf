"""The command: what it says, how it ends, and the whole way from a world to a report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli import main
from mmtune.data import tiny
from tests.world import PENALTY, SCULPT, SIZES, metrics, run_file

ROOT = Path(__file__).resolve().parents[1]
TEXTVQA = ROOT / "tests" / "data" / "textvqa"
SCORE = [
    "score",
    *("--task", "textvqa"),
    *("--predictions", str(TEXTVQA / "answers_llava-v1.5-13b_40.jsonl")),
    *("--annotations", str(TEXTVQA / "TextVQA_0.5.1_val_40.json")),
]
COMMANDS = ["train", "check", "eval", "score", "report", "sweep", "swap-tower", "bench", "bench generate"]
COMMANDS += ["data", "data prepare"]
# Seconds of CPU, not of the clock: a machine that is busy elsewhere makes nothing slower here.
MEASURED = """
import json, resource, sys
from mmtune.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
used = resource.getrusage(resource.RUSAGE_SELF)
found = {"code": code, "torch": "torch" in sys.modules, "seconds": used.ru_utime + used.ru_stime}
print(json.dumps(found), file=sys.stderr)
"""
Cli = Callable[..., tuple[int, str, str]]


def measured(*arguments: str, folder: Path = ROOT) -> tuple[dict[str, Any], str]:
    """Exit code, whether torch was imported and CPU seconds of the command in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    *_, last = ran.stderr.splitlines()
    assert last.startswith("{"), ran.stderr
    return json.loads(last), ran.stdout + ran.stderr


@pytest.fixture
def cli(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process, where the world is: exit code, stdout and stderr."""
    monkeypatch.chdir(world)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own faults
            code = int(error.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# ---- Quick, and without torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick(command: str) -> None:
    found, said = measured(*command.split(), "--help")
    assert (found["code"], found["torch"]) == (0, False)
    assert found["seconds"] < 2
    assert f"usage: mmtune {command}".strip() in said


def test_help_knows_every_command() -> None:
    _, said = measured("--help")
    for command in COMMANDS:
        assert command.split()[0] in said
    assert measured()[0]["code"] == 2


def test_the_faults_of_a_yaml_are_quick_and_all_named(world: Path, tmp_path: Path) -> None:
    path = run_file(
        world,
        tmp_path,
        tune={"language": {"tuner": "lorasculp", "lr": 1e-3}, "connector": {"tuner": "full"}},
        train={"batch_size": 0, "steps": 3},
        data=[{"card": "tiny_icon"}],
    )
    found, said = measured("train", str(path), "trian.clip=1")
    assert (found["code"], found["torch"]) == (2, False)
    assert found["seconds"] < 2
    assert "Traceback" not in said
    for fault in ("'lorasculp'", "'lr' is missing", "found 0", "'tiny_icon'", "unknown key 'trian'"):
        assert fault in said
    assert said.count(str(path)) >= 4  # each with its line


def test_the_faults_of_a_swap_are_quick_too(tmp_path: Path) -> None:
    path = tmp_path / "swap.yaml"
    stage = "{data: [{card: tiny_icon}], train: {steps: 1, batch_size: 0}}"
    towers = "{one: {tower: klip, weights: x}, two: {tower: clip}}"
    path.write_text(
        f"name: a\nmodel: {{base: data/tiny/model}}\ntowers: {towers}\nstages: [{stage}]\n"
        "evaluate: {suite: tiny}\n"
    )
    found, said = measured("swap-tower", str(path))
    assert (found["code"], found["torch"]) == (2, False)
    assert found["seconds"] < 2
    for fault in ("line 3, towers.one.tower: unknown vision tower 'klip'", "either 'weights'", "found 0"):
        assert fault in said
    assert said.count("'tiny_icon'") == 1  # what all runs share is said once


def official_scores() -> dict[str, float]:
    rows = [json.loads(line) for line in (TEXTVQA / "scores_40.jsonl").read_text().splitlines()]
    return {str(row["question_id"]): row["m4c"] for row in rows}


def test_score_needs_no_torch() -> None:
    found, said = measured(*SCORE)
    assert (found["code"], found["torch"]) == (0, False)
    official = list(official_scores().values())
    result = json.loads(said[: said.rindex("}\nmmtune: warning:") + 1])
    assert "textvqa: 40 questions, the official val file gives 5000" in said
    assert result["expected"] == 5000
    assert result["score"] == pytest.approx(100 * sum(official) / 40)
    assert (result["task"], result["n"], result["missing"], result["rule"]) == ("textvqa", 40, 0, "m4c")
    assert {"metric", "stderr"} <= result.keys()


def test_score_writes_a_line_per_question(cli: Cli, tmp_path: Path) -> None:
    code, _, _ = cli(*SCORE, "--per_sample", tmp_path / "lines.jsonl")
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert {line["question_id"]: line["score"] for line in lines} == official_scores()


def test_score_warns_of_missing_answers(cli: Cli, tmp_path: Path) -> None:
    answers = Path(SCORE[4]).read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join(answers[:30]))
    code, out, err = cli(*SCORE[:4], tmp_path / "some.jsonl", *SCORE[5:])
    assert code == 0
    assert (json.loads(out)["n"], json.loads(out)["missing"]) == (40, 10)
    assert "warning: 10 of 40 questions have no prediction" in err


# ---- The user's mistakes --------------------------------------------------------------------------------


def mistakes(world: Path, empty: Path) -> dict[str, tuple[list[object], str]]:
    """A name -> the arguments, and what must be said."""
    (empty / "base").mkdir()
    (empty / "base" / "config.json").write_text('{"model_type": "llava"}')
    (empty / "broken").mkdir()
    (empty / "broken" / "config.json").write_text("{")
    missing, tasks, out = empty / "missing", ["--tasks", "tiny_text"], ["--output_path", empty / "out"]
    run = run_file(world, empty, "good", train={"steps": 1})
    elsewhere = run_file(world, empty, "elsewhere", evaluate={"suite": "tiny", "root": str(missing)})
    shutil.copytree(world / "datasets/tiny", empty / "unseen", ignore=shutil.ignore_patterns("*.png"))
    unseen = run_file(world, empty, "unseen", evaluate={"suite": "tiny", "root": str(empty / "unseen")})
    split = run_file(world, empty, "split", evaluate={"suite": "tiny", "split": "trian"})
    suite = run_file(world, empty, "suite", evaluate={"suite": "tinny"})
    predictions, annotations = ["--predictions", SCORE[4]], ["--annotations", SCORE[6]]
    return {
        "no YAML": (["train", missing], "no such file"),
        "a folder for a YAML": (["train", empty], "this is a folder"),
        "no base to train": (["train", run, f"model.base={missing}"], "there is no folder"),
        "another's base": (["train", run, f"model.base={empty}/base"], "not the config of an mmtune model"),
        "broken base": (["train", run, f"model.base={empty}/broken"], "not valid JSON"),
        "no data": (["train", run, f"data.0.path={missing}"], "there is no file"),
        "no pictures": (["train", run, f"data.0.image_root={missing}"], str(missing)),
        "too long": (["train", run, "train.max_length=5"], "more than max_length 5"),
        "no evaluation data": (["train", elsewhere], "no such annotation file"),
        "no evaluation pictures": (["train", unseen], "pictures that are not there"),
        "no such split": (["train", split], "has no split 'trian'"),
        "no such suite": (["train", suite], "unknown suite 'tinny'"),
        "no model": (["eval", "--model", missing, *tasks, *out], "no such folder"),
        "another's model": (["eval", "--model", empty / "base", *tasks, *out], "not the config of an mmtune"),
        "unknown task": (["eval", "--model", "base", "--tasks", "tiny_txt", *out], "unknown task 'tiny_txt'"),
        "unknown split": (["eval", "--model", "base", *tasks, "--split", "x", *out], "has no split 'x'"),
        "no data root": (["eval", "--model", "base", *tasks, "--data_root", missing, *out], str(missing)),
        "gen_kwargs": (["eval", "--model", "base", *tasks, "--gen_kwargs", "top_p=1", *out], "--gen_kwargs"),
        "limit 0": (["eval", "--model", "base", *tasks, "--limit", 0, *out], "expected 1 or more, found 0"),
        "no limit": (["eval", "--model", "base", *tasks, "--limit", "a", *out], "--limit"),
        "no task": (["eval", "--model", "base", *out], "--tasks"),
        "score: task": (["score", "--task", "textvq", *predictions, *annotations], "unknown task 'textvq'"),
        "score: file": ([*SCORE[:3], "--predictions", missing, *annotations], "no such file"),
        "score: rule": ([*SCORE, "--rule", "letter"], "unknown rule 'letter'"),
        "score: split": ([*SCORE, "--split", "x"], "has no split 'x'"),
        "report: base": (["report", "--base", "base", missing, "--suite", "tiny", *out], "not evaluated"),
        "report: run": (["report", "--base", "base", missing, "--suite", "tiny", *out], "no finished run"),
        "sweep: file": (["sweep", missing], "no such file"),
        "world elsewhere": (["data", "prepare", "tiny", "--output_path", empty], "holds something else"),
        "a task twice": (["eval", "--model", "base", "--tasks", "tiny_text,tiny_text", *out], "given twice"),
        "no override": (["train", run, "--resume", "clip"], "unrecognized arguments: clip"),
        "an override of nothing": (
            ["eval", "--model", "base", *tasks, *out, "a=1"],
            "unrecognized arguments",
        ),
        "no base": (["eval", "--model", "base", *tasks, *out, "--restore", "language"], "no trained.json"),
        "no such part": (["eval", "--model", "base", *tasks, *out, "--restore", "tower"], "invalid choice"),
        "two parts": (
            ["eval", "--model", "base", *tasks, *out, "--restore", "language", "--restore", "connector"],
            "one part at a time",
        ),
        "no count": (["check", run, "--pictures", "all"], "expected a whole number, found 'all'"),
        "both": (
            ["eval", "--model", "base", *tasks, *out, "--predict_only", "--skip_done"],
            "not allowed with",
        ),
        "evaluate": (["train", run, "evaluate={suite: tiny, batch_size: 0}"], "expected 1 or more, found 0"),
        "unknown data": (["data", "prepare", "tinny"], "invalid choice"),
    }


def test_mistakes_end_with_2_and_one_clear_message(cli: Cli, world: Path, tmp_path: Path) -> None:
    wrong = []
    for name, (arguments, expected) in mistakes(world, tmp_path).items():
        try:
            code, out, err = cli(*arguments)
        except Exception as error:  # what escapes is printed with a traceback
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if code != 2 or expected not in err or "Traceback" in err:
            wrong.append(f"{name}: {code}, {err[-400:]}")
        if out:
            wrong.append(f"{name} printed {out[:200]}")
    assert not wrong, "\n".join(wrong)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_ours_is_no_mistake_of_the_user(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mmtune.evaluation.score.score_file", fail)
    with pytest.raises(ZeroDivisionError):  # Python's own exit code for it is 1
        cli(*SCORE)


def test_preparing_the_tiny_world_twice(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "generate", partial(tiny.generate, sizes=SIZES))
    place = tmp_path / "new" / "tiny"
    assert cli("data", "prepare", "tiny", "--output_path", place)[0] == 0
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert place / "tokenizer" / "tokenizer.json" in files
    code, out, _ = cli("data", "prepare", "tiny", "--output_path", place)
    assert (code, "nothing to do" in out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == files
    assert "tiny_iconqa" in out.rpartition("Chance")[2]
    assert cli("data", "prepare", "tiny", "--output_path", place, "--seed", 1)[0] == 2


# ---- Once more ------------------------------------------------------------------------------------------


def test_overrides_may_stand_anywhere(cli: Cli, world: Path, tmp_path: Path) -> None:
    path = run_file(world, tmp_path, "any", train={"steps": 1})
    assert cli("train", path, "train.clip=0.5", "--resume", "name=order", "train.clip=0.25")[0] == 0
    assert cli("train", "--resume", path, "name=second", "train.clip=0.25")[0] == 0
    for name in ("order", "second"):
        assert "clip: 0.25" in (tmp_path / name / "run.yaml").read_text()


def test_a_finished_run_says_so_without_torch(cli: Cli, world: Path, tmp_path: Path) -> None:
    changes = {"evaluate": {"suite": "tiny", "batch_size": 12}, "train": {"steps": 1}}
    path = run_file(world, tmp_path, "once", **changes)
    results = tmp_path / "once" / "eval" / "tiny-test" / "results.json"
    assert cli("train", path)[0] == 0
    first = json.loads(results.read_text())

    found, said = measured("train", str(path), "--resume", folder=world)
    assert (found["code"], found["torch"]) == (0, False)
    assert found["seconds"] < 3
    assert f"already done: {tmp_path / 'once' / 'final'}" in said
    assert f"already done: {results}" in said
    assert json.loads(results.read_text()) == first

    results.unlink()  # what is missing is made up for
    code, out, _ = cli("train", path, "--resume")
    assert (code, f"already done: {tmp_path / 'once' / 'final'}" in out) == (0, True)
    assert json.loads(results.read_text())["results"] == first["results"]

    found, said = measured("train", str(path), "train.steps=2", "--resume", folder=world)
    assert (found["code"], found["torch"]) == (2, False)
    assert "in: train.steps (1 before, 2 now)" in said
    assert "another name" in said and "--fresh" in said


def test_an_evaluation_that_is_done_is_skipped_without_torch(cli: Cli, world: Path, tmp_path: Path) -> None:
    command = [
        "eval",
        "--model",
        "base",
        "--tasks",
        "tiny_text",
        "--limit",
        "3",
        "--output_path",
        str(tmp_path),
    ]
    assert cli(*command, "--log_samples", "--seed", 7)[0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 7
    found, said = measured(*command, "--skip_done", folder=world)
    assert (found["code"], found["torch"]) == (0, False)
    assert found["seconds"] < 3
    assert f"already done: {tmp_path / 'results.json'}" in said
    assert "tiny_text" in said


def test_a_score_says_its_split(cli: Cli) -> None:
    assert json.loads(cli(*SCORE)[1])["split"] == "val"
    assert json.loads(cli(*SCORE, "--split", "train")[1])["split"] == "train"


# ---- The whole way --------------------------------------------------------------------------------------


def test_from_a_world_to_a_report(cli: Cli, world: Path, tmp_path: Path) -> None:
    tiny_world = world / "datasets" / "tiny"
    sculpt = {**SCULPT, "prune_at": 0.5, "penalty": {**PENALTY, "modules": "pruned"}}
    tuned = {
        "lora": {},
        "lorasculpt": {"tune": {"connector": {"tuner": "full", "lr": 2e-4}, "language": sculpt}},
    }
    runs = []
    for name, changes in tuned.items():
        data = [{"card": "tiny_iconqa", "root": str(tiny_world)}]
        evaluation = {"suite": "tiny", "batch_size": 12}
        steps = {"steps": 4, "log_every": 2}
        path = run_file(world, tmp_path, name, data=data, evaluate=evaluation, train=steps, **changes)
        code, out, _ = cli("train", path, "train.clip=0.5")
        assert code == 0
        runs.append(tmp_path / name)
        results = json.loads((runs[-1] / "eval" / "tiny-test" / "results.json").read_text())
        assert f"trained: {runs[-1] / 'final'}" in out
        for task, result in results["results"].items():
            assert {"score", "stderr", "n", "rule", "metric", "missing"} <= result.keys()
            assert task in out
        assert "clip: 0.5" in (runs[-1] / "run.yaml").read_text()
        assert [line["step"] for line in metrics(runs[-1])] == [1, 2, 4]
    base = tmp_path / "base"
    command = ["eval", "--model", "base", "--suite", "tiny", "--batch_size", 12]
    assert cli(*command, "--output_path", base / "eval" / "tiny-test")[0] == 0

    output = tmp_path / "report"
    code, out, _ = cli("report", "--base", base, *runs, "--suite", "tiny", "--output_path", output)
    assert code == 0
    assert "lorasculpt" in out
    report = json.loads((output / "report.json").read_text())
    assert report["base"]["name"] == "base"
    assert [run["name"] for run in report["runs"]] == list(tuned)
    for run in report["runs"]:
        keys = {"name", "tuner", "seed", "scores", "source", "target", "mean", "harmonic_mean", "drop"}
        assert keys <= run.keys()
        assert run["tuner"] == run["name"]
        for score in run["scores"].values():
            assert {"score", "stderr", "n", "rule"} <= score.keys()
        assert set(run["drop"]) == set(run["scores"]) - {"tiny_iconqa"}
    assert {"versions", "protocols", "config", "data", "commit"} <= report["made_with"].keys()
    with Image.open(output / "frontier.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
