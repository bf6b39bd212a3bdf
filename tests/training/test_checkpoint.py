"""Runs that are stopped and resumed, and what lies in their folders."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmtune.core.errors import UserError
from mmtune.core.versions import commit
from mmtune.evaluation.evaluate import evaluate
from mmtune.parts import VisionLanguageModel
from mmtune.parts.fingerprint import model_hash
from mmtune.run import RunOptions, config_hash
from mmtune.training.checkpoint import cut_metrics, newest, prune_old
from mmtune.training.loop import train
from mmtune.training.meter import SPEEDS, Meter
from tests.world import (
    FROZEN,
    FULL,
    LORA,
    PENALTY,
    SCULPT,
    greatest_difference,
    metrics,
    run_options,
    trained,
)

# Dropout draws at random, so a resumed step that drew other numbers would show in the losses.
TUNE = {
    "vision": FROZEN,
    "connector": {**FULL, "penalty": PENALTY},
    "language": {**SCULPT, "prune_at": 3, "dropout": 0.2, "penalty": PENALTY},
}
TRAIN = {
    "steps": 6,
    "micro_batch_size": 4,
    "schedule": "cosine",
    "checkpoint": {"every": 2, "keep": 1},
}


class PowerCut(Exception):
    pass


def train_until(
    options: RunOptions, step: int, monkeypatch: pytest.MonkeyPatch, resume: bool = False
) -> None:
    """Trains and stops right after the line of `step` is written."""
    log = Meter.log

    def stop(self: Meter, values: dict[str, Any]) -> None:
        log(self, values)
        if values["step"] == step:
            raise PowerCut

    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        patched.setattr(Meter, "log", stop)
        train(options, resume=resume)


def assert_same_run(one: RunOptions, other: RunOptions) -> None:
    """Bit for bit, but for the speeds."""
    assert greatest_difference(trained(one.folder / "final"), trained(other.folder / "final")) == 0
    lines = [
        [{k: v for k, v in line.items() if k not in SPEEDS} for line in metrics(run.folder)]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    """A run of 6 steps without interruption, pruned after 3."""
    options = run_options(world, tmp_path_factory.mktemp("whole"), "whole", tune=TUNE, train=TRAIN)
    train(options)
    return options


# Checkpoints are written after steps 2 and 4.
@pytest.mark.parametrize(
    "stops",
    [[1], [3], [4], [5], [3, 5]],
    ids=["before any checkpoint", "before the prune", "at a checkpoint", "after the prune", "twice"],
)
def test_a_resumed_run_is_the_same_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunOptions, stops: list[int]
) -> None:
    options = run_options(world, tmp_path, "whole", tune=TUNE, train=TRAIN)
    for number, step in enumerate(stops):
        train_until(options, step, monkeypatch, resume=number > 0)
    torch.rand(7)  # the state of this process means nothing to the resumed run
    train(options, resume=True)
    assert_same_run(options, whole)


def test_a_seed_decides(world: Path, tmp_path: Path, whole: RunOptions) -> None:
    other = run_options(world, tmp_path, "whole", tune=TUNE, train=TRAIN, seed=1)
    train(other)
    assert greatest_difference(trained(other.folder / "final"), trained(whole.folder / "final")) > 1e-4


def test_workers_change_nothing(world: Path, tmp_path: Path, whole: RunOptions) -> None:
    options = run_options(world, tmp_path, "whole", tune=TUNE, train={**TRAIN, "workers": 1})
    train(options)
    assert_same_run(options, whole)


@pytest.mark.parametrize("stop", [2, 4, 6], ids=["in the first", "early in the second", "late in the second"])
def test_resuming_across_stages(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    tiny = world / "datasets" / "tiny"
    block = {
        "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
        "train": {"steps": 3, "batch_size": 8, "log_every": 1, "checkpoint": {"every": 2}},
    }
    align = {"vision": FROZEN, "connector": FULL, "language": FROZEN}
    second = {**TUNE, "language": {**TUNE["language"], "prune_at": 1}}
    stages = [{**block, "tune": align}, {**block, "tune": second}]
    runs = [run_options(world, tmp_path / name, "staged", stages=stages) for name in ("whole", "cut")]
    train(runs[0])
    train_until(runs[1], stop, monkeypatch)
    train(runs[1], resume=True)
    assert_same_run(*runs)


def test_resuming_a_finished_run_does_nothing(
    world: Path, whole: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    assert train(whole, resume=True) == whole.folder / "final"
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


# ---- What is in the folder ------------------------------------------------------------------------------


def test_nothing_in_a_run_is_pickled(whole: RunOptions) -> None:
    files = [path for path in whole.folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    # .jinja is the tokenizer's chat template, .md the card that peft writes.
    known = {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".md"}
    assert {path.suffix for path in files} <= known
    assert not [path for path in files if "partial" in str(path)]


def test_the_newest_checkpoints_are_kept(whole: RunOptions, tmp_path: Path) -> None:
    # Of those after steps 2 and 4. None after the last step: that is `final`.
    assert [path.name for path in (whole.folder / "checkpoints").iterdir()] == ["step-4"]
    for step in (2, 4, 10, 100, 20):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / ".step-200.partial").mkdir()
    assert newest(tmp_path) == tmp_path / "step-100"
    prune_old(tmp_path, keep=2)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-20", "step-100"}
    assert newest(tmp_path / "nowhere") is None


def test_a_folder_of_somebody_else_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-old").mkdir()
    with pytest.raises(UserError, match="no checkpoint of ours"):
        newest(tmp_path)


def test_the_final_model_says_where_it_comes_from(world: Path, whole: RunOptions) -> None:
    record = json.loads((whole.folder / "final" / "trained.json").read_text())
    assert record["base"] == model_hash(world / "base")
    assert record["model_hash"] == model_hash(whole.folder / "final") != record["base"]
    assert (record["config"], record["seed"], record["step"]) == (config_hash(whole), 0, 6)
    assert (record["commit"] is None) == (commit() is None)


def test_a_checkpoint_holds_all_that_was_trained(whole: RunOptions) -> None:
    folder = whole.folder / "checkpoints" / "step-4"
    state = json.loads((folder / "training/state.json").read_text())
    assert (state["step"], state["stage"], state["stage_step"]) == (4, 1, 4)
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0] or state["versions"]["torch"]
    assert {"config", "data"} <= state.keys()
    moments = load_file(folder / "training/optimizer.safetensors")
    tensors = load_file(folder / "training/tuners.safetensors")
    adapter = load_file(folder / "adapter/language/adapter_model.safetensors")
    masks = {name: mask for name, mask in tensors.items() if name.startswith("language/mask.")}
    assert len(masks) == len(adapter) == 28
    assert len([name for name in tensors if name.startswith("connector/initial.")]) == 2
    # Two moments and a step for each of 28 adapter tensors and 4 of the connector.
    assert len(moments) == 3 * 32
    for name, mask in masks.items():
        inner = name.removeprefix("language/mask.")
        weight = adapter[f"base_model.model.{inner}.weight"]
        assert not weight[~mask].any()
        module, _, which = inner.rpartition(".")
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = moments[f"language.hf.{module}.{which}.default.weight/{kind}"]
            assert moment[mask].any()
            assert not moment[~mask].any()


def test_a_checkpoint_is_a_model(world: Path, whole: RunOptions, tmp_path: Path) -> None:
    """Also under another name and in another place of the same depth: its config says what it is."""
    folder = whole.folder / "checkpoints" / "step-4"
    model = VisionLanguageModel.from_pretrained(folder)
    assert set(model.adapters) == {"language"}
    made = evaluate(folder, ["tiny_text"], tmp_path / "eval", root=world / "datasets/tiny", limit=2)
    assert made["results"]["tiny_text"]["n"] == 2
    moved = folder.with_name("something")
    shutil.copytree(folder, moved)
    try:
        again = VisionLanguageModel.from_pretrained(moved)
    finally:
        shutil.rmtree(moved)
    assert greatest_difference(again.state_dict(), model.state_dict()) == 0


# ---- What is refused ------------------------------------------------------------------------------------


def test_an_existing_run_is_not_written_over(whole: RunOptions) -> None:
    before = trained(whole.folder / "final")
    with pytest.raises(UserError, match="already holds a run") as caught:
        train(whole)
    assert "--resume" in str(caught.value)
    assert greatest_difference(trained(whole.folder / "final"), before) == 0


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "finished"])
def test_a_changed_config_does_not_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    options = run_options(world, tmp_path, tune=TUNE, train=TRAIN)
    if stopped:
        train_until(options, 3, monkeypatch)
    else:
        train(options)
    language = {**TUNE["language"], "density": 0.2}
    changed = run_options(world, tmp_path, tune={**TUNE, "language": language}, train=TRAIN, seed=3)
    for resume in (True, False):
        with pytest.raises(UserError) as caught:
            train(changed, resume=resume)
        (fault,) = caught.value.faults
        changes = "seed (0 before, 3 now), tune.language.density (0.1 before, 0.2 now)"
        assert fault.what.endswith(f"in: {changes}")
        assert "another name" in fault.mend


def test_what_decides_no_result_may_change(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_options = {"steps": 2, "checkpoint": {"every": 1}}
    options = run_options(world, tmp_path, train=train_options, evaluate={"suite": "tiny"})
    train_until(options, 1, monkeypatch)
    monkeypatch.chdir(tmp_path)
    others = {"log_every": 2, "workers": 1, "checkpoint": {"every": 5, "keep": 3}}
    evaluation = {"suite": "tiny", "batch_size": 4}
    other = run_options(world, Path("."), train={**train_options, **others}, evaluate=evaluation)
    assert (other.folder, config_hash(other)) == (Path("run"), config_hash(options))
    train(other, resume=True)
    assert "workers: 1" in (options.folder / "run.yaml").read_text()


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n"])
def test_a_config_that_was_damaged(world: Path, tmp_path: Path, whole: RunOptions, text: str) -> None:
    options = run_options(world, tmp_path, "whole", tune=TUNE, train=TRAIN)
    shutil.copytree(whole.folder, options.folder)
    (options.folder / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        train(options, resume=True)


def test_another_starting_model_does_not_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    model = {"base": str(tmp_path / "base")}
    runs = [run_options(world, tmp_path, name, train=TRAIN, model=model) for name in ("stopped", "finished")]
    train_until(runs[0], 3, monkeypatch)
    train(runs[1])
    first = json.loads((runs[1].folder / "final" / "trained.json").read_text())["base"]
    assert first == model_hash(tmp_path / "base")
    config = tmp_path / "base" / "language" / "config.json"
    config.write_text(config.read_text() + " ")
    for run in runs:
        with pytest.raises(UserError, match=f"the model this run started from was {first}"):
            train(run, resume=True)


def test_changed_data_does_not_resume(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = world / "datasets" / "tiny"
    file = tmp_path / "train.json"
    rows = json.loads((tiny / "train_instructions.json").read_text())
    file.write_text(json.dumps(rows))
    data = [{"path": str(file), "image_root": str(tiny)}]
    options = run_options(world, tmp_path, tune={**TUNE, "language": LORA}, train=TRAIN, data=data)
    train_until(options, 3, monkeypatch)
    done = run_options(world, tmp_path, "done", tune={**TUNE, "language": LORA}, train=TRAIN, data=data)
    train(done)
    file.write_text(json.dumps(rows[::-1]))
    for run in (options, done):
        with pytest.raises(UserError, match="training data is not what this run was started with"):
            train(run, resume=True)


@pytest.mark.parametrize("name", ["optimizer", "tuners"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunOptions, name: str, damage: str
) -> None:
    options = run_options(world, tmp_path, "whole", tune=TUNE, train={**TRAIN, "checkpoint": {"every": 2}})
    train_until(options, 5, monkeypatch)
    file = options.folder / "checkpoints" / "step-4" / "training" / f"{name}.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        train(options, resume=True)
    assert f"Remove {file.parents[1]} to go on" in str(caught.value)
    shutil.rmtree(file.parents[1])
    train(options, resume=True)
    assert_same_run(options, whole)


def test_checkpoints_alone_are_a_run_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options(world, tmp_path, tune=TUNE, train=TRAIN)
    train_until(options, 3, monkeypatch)
    (options.folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="config differs"):
        train(run_options(world, tmp_path, tune=TUNE, train=TRAIN, seed=1))


def test_every_random_stream_of_a_stage_starts_from_the_seed(world: Path, tmp_path: Path) -> None:
    """Or a second stage would depend on whether the first ran in the same process."""
    drawn: list[tuple[float, ...]] = []
    for _ in range(2):
        train(run_options(world, tmp_path / str(len(drawn)), train={"steps": 1}))
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_metrics_are_cut_back_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    path.write_text('{"step": 1}\n{"st')
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
