"""Runs that read shards against the same runs from a training file and a folder: the same bytes come out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mmtune import run
from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.cards import Card
from mmtune.data.samples import read_llava
from mmtune.data.sharding import write_shards
from mmtune.training.loop import train
from mmtune.training.plan import read_samples
from tests.training.test_checkpoint import train_until
from tests.world import metrics, run_file, run_options


@pytest.fixture(scope="module")
def sharded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's training file, in several shards."""
    tiny = world / "datasets" / "tiny"
    file = tiny / "train_instructions.json"
    return write_shards(file, tiny, tmp_path_factory.mktemp("sharded") / "shards", 23)


def _weights(run: Path) -> dict[str, bytes]:
    files = sorted((run / "final").rglob("*.safetensors"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def _losses(run: Path) -> list[Any]:
    return [{key: line[key] for key in ("step", "loss")} for line in metrics(run)]


@pytest.mark.parametrize(
    "given",
    [
        {"train": {"epochs": 2, "steps": None, "batch_size": 32}},
        {"train": {"steps": 3, "workers": 2}},
        {"train": {"steps": 3}, "data": {"limit": 30, "image_first": True}},
        {"train": {"steps": 3}, "data": {"limit": 30}, "replay": 0.3},
    ],
    ids=["two epochs", "workers", "limit", "replay"],
)
def test_an_adapter_from_shards_is_the_one_from_a_folder(
    world: Path, sharded: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    tiny = world / "datasets" / "tiny"
    more = given.get("data", {})
    folder = {"path": str(tiny / "train_instructions.json"), "image_root": str(tiny), **more}
    made = []
    for name, data in (("folder", folder), ("shards", {"path": str(sharded), **more})):
        replay = {"replay": {"data": [data], "share": given["replay"]}} if "replay" in given else {}
        options = run_options(world, tmp_path, name, data=[data], train=given["train"], **replay)
        train(options)
        made.append((_weights(options.folder), _losses(options.folder)))
    assert made[0] == made[1]
    assert made[0][0]


def test_a_resumed_run_goes_on_with_the_same_samples(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"steps": 6, "checkpoint": {"every": 2}}
    given: dict[str, Any] = {"data": [{"path": str(sharded)}], "train": steps}
    whole = run_options(world, tmp_path, "whole", **given)
    train(whole)
    halved = run_options(world, tmp_path, "halved", **given)
    train_until(halved, 3, monkeypatch)
    train(halved, resume=True)
    assert _weights(halved.folder) == _weights(whole.folder)
    assert _losses(halved.folder) == _losses(whole.folder)


def test_a_run_whose_shards_were_changed_does_not_resume(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "a.tar"
    shutil.copy(sharded.parent / "train_instructions-000000.tar", copied)
    steps = {"steps": 4, "checkpoint": {"every": 1}}
    options = run_options(world, tmp_path, data=[{"path": str(copied)}], train=steps)
    train_until(options, 3, monkeypatch)
    shutil.copy(sharded.parent / "train_instructions-000001.tar", copied)
    with pytest.raises(UserError, match="data"):
        train(options, resume=True)


def test_check_looks_into_them(
    world: Path, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(run_file(world, tmp_path, data=[{"path": str(sharded)}]))]) == 0
    assert "of them decoded" in capsys.readouterr().out
    cut = tmp_path / "cut.tar"
    first = sharded.parent / "train_instructions-000000.tar"
    cut.write_bytes(first.read_bytes()[:20000])
    rooted = {"path": str(sharded), "image_root": str(tmp_path)}
    data = [{"path": str(cut)}, rooted, {"path": str(tmp_path / "no.tar")}]
    assert main(["check", str(run_file(world, tmp_path, data=data))]) == 2
    said = capsys.readouterr().err
    for message in ("cut.tar: this shard", "the pictures lie in the shards", f"no shard {tmp_path}/no.tar"):
        assert message in said


def test_a_card_may_name_shards(
    world: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card("mine", "about", "source", "licence", sharded.parent, {"train": sharded.name})
    monkeypatch.setattr(run, "load_card", lambda name: card)
    options = run_options(world, tmp_path, data=[{"card": "mine"}], train={"steps": 1})
    samples, faults = read_samples(options.all_stages()[0].data[0])
    assert samples == read_llava(sharded, tmp_path)
    assert not faults
