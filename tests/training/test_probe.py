"""A run that is looked at while it trains: what is measured, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.data.batches import collate, encode_samples
from mmtune.data.chat import IGNORE
from mmtune.data.samples import read_llava
from mmtune.parts import VisionLanguageModel
from mmtune.run import RunOptions
from mmtune.training.loop import train
from mmtune.training.meter import SPEEDS
from mmtune.training.probe import spread
from tests.training.test_checkpoint import train_until
from tests.world import FULL, PENALTY, SCULPT, greatest_difference, metrics, run_options, trained

# Every way of training at once, with dropout, whose stream of random numbers must go on as without a probe.
TUNE = {
    "vision": {**FULL, "lr": 1e-4},
    "connector": {**FULL, "penalty": PENALTY},
    "language": {**SCULPT, "prune_at": 3, "dropout": 0.2, "support": "gradient", "penalty": PENALTY},
}
TRAIN: dict[str, Any] = {
    "steps": 6,
    "log_every": 3,
    "micro_batch_size": 4,
    "checkpoint": {"every": 2, "keep": 1},
}
PROBED = ("probe_loss", "probe_kl", "probe_kl_reverse")


def options(world: Path, folder: Path, name: str, probe: dict[str, Any] | None, **changes: Any) -> RunOptions:
    return run_options(world, folder, name, tune=TUNE, train={**TRAIN, "probe": probe}, **changes)


@pytest.fixture(scope="module")
def probed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    made = options(world, tmp_path_factory.mktemp("probed"), "run", {"samples": 5, "every": 2})
    train(made)
    return made


@pytest.mark.parametrize("changes", [{}, {"kl": {"weight": 0.5}}], ids=["alone", "with KL in the loss"])
def test_the_training_is_the_same_without(
    world: Path, tmp_path: Path, probed: RunOptions, changes: dict[str, Any]
) -> None:
    looked = probed
    if changes:
        looked = options(world, tmp_path, "looked", {"samples": 5, "every": 2}, **changes)
        train(looked)
    plain = options(world, tmp_path, "plain", None, **changes)
    train(plain)
    assert greatest_difference(trained(looked.folder / "final"), trained(plain.folder / "final")) == 0
    without = {line["step"]: line for line in metrics(plain.folder)}
    lines = [line for line in metrics(looked.folder) if line["step"] in without]
    assert [line["step"] for line in lines] == [1, 3, 6]
    for line in lines:
        kept = {key: value for key, value in line.items() if key not in (*SPEEDS, *PROBED)}
        assert kept == {key: value for key, value in without[line["step"]].items() if key not in SPEEDS}


def test_a_probe_looks_at_its_own_steps(probed: RunOptions) -> None:
    lines = metrics(probed.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6]
    assert [line["step"] for line in lines if "probe_kl" in line] == [1, 2, 4, 6]


def test_the_last_look_is_at_the_model_that_is_saved(world: Path, probed: RunOptions) -> None:
    """Loss and both divergences, from the folders of base and result, summed sample by sample."""
    base, tuned = (VisionLanguageModel.from_pretrained(f) for f in (world / "base", probed.folder / "final"))
    tiny = world / "datasets/tiny"
    samples = read_llava(tiny / "train_instructions.json", tiny)
    examples = spread(encode_samples(samples, base.chat, 512)[0], 5)
    assert [example.id for example in examples] == [samples[i * len(samples) // 5].id for i in range(5)]
    loss = forward = reverse = count = 0.0
    for example in examples:
        batch = collate([example], base.transform, base.language.pad_id)
        assert batch.labels is not None
        with torch.no_grad():
            p, q = (model(batch, True)[1].double().log_softmax(-1) for model in (base, tuned))
        targets = batch.labels[0, 1:][batch.labels[0, 1:] != IGNORE]
        loss -= float(q[range(len(targets)), targets].sum())
        forward += float((p.exp() * (p - q)).sum())
        reverse += float((q.exp() * (q - p)).sum())
        count += len(targets)
    last = metrics(probed.folder)[-1]
    assert [last[key] for key in PROBED] == pytest.approx(
        [loss / count, forward / count, reverse / count], rel=1e-4
    )
    assert abs(forward - reverse) / count > 1e-6  # otherwise the two may be confused


def test_a_resumed_run_looks_back_to_the_same_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: RunOptions
) -> None:
    again = options(world, tmp_path, "run", {"samples": 5, "every": 2})
    train_until(again, 4, monkeypatch)
    train(again, resume=True)
    lines = [
        [{key: line[key] for key in line if key not in SPEEDS} for line in metrics(run.folder)]
        for run in (again, probed)
    ]
    assert lines[0] == lines[1]


def test_other_data_and_another_probe_in_the_same_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: RunOptions
) -> None:
    """It is no part of what a run is."""
    again = options(world, tmp_path, "run", {"samples": 5, "every": 2})
    train_until(again, 4, monkeypatch)
    tiny = world / "datasets/tiny"
    other = {"data": [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}], "every": 6}
    changed = options(world, tmp_path, "run", other)
    train(changed, resume=True)
    assert greatest_difference(trained(changed.folder / "final"), trained(probed.folder / "final")) == 0
    assert metrics(changed.folder)[-1]["probe_loss"] != metrics(probed.folder)[-1]["probe_loss"]
