"""Whole runs with replayed data, the KL to the base and a random support."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmtune.core.errors import UserError
from mmtune.data.batches import batch_order, collate, encode_samples
from mmtune.data.chat import IGNORE
from mmtune.data.samples import read_llava
from mmtune.parts import VisionLanguageModel
from mmtune.run import RunOptions
from mmtune.training.loop import train
from mmtune.tuning import kl
from tests.training.test_checkpoint import assert_same_run, train_until
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

# Every way of training at once: weights of their own, an adapter with dropout, a support that is cut.
TUNE = {
    "vision": {**FULL, "lr": 1e-4},
    "connector": {**FULL, "penalty": {**PENALTY, "kind": "constant"}},
    "language": {**SCULPT, "prune_at": 3, "dropout": 0.2, "support": "random", "penalty": PENALTY},
}
SPEEDS = {"samples_per_s", "tokens_per_s"}


def options(world: Path, folder: Path, name: str = "run", share: float = 0.3, **changes: Any) -> RunOptions:
    """Trains on the downstream set, replays the upstream sets, and is held to the base."""
    tiny = world / "datasets" / "tiny"
    mixed = {
        "data": [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}],
        "replay": {
            "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
            "share": share,
        },
        "kl": {"weight": 0.5},
        "tune": TUNE,
        **changes,
    }
    return run_options(world, folder, name, **mixed)


# Long enough to replay other samples in the second epoch; checkpoints after every second step.
LONG = {"steps": 12, "micro_batch_size": 4, "schedule": "cosine", "checkpoint": {"every": 2, "keep": 1}}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    made = options(world, tmp_path_factory.mktemp("whole"), train=LONG)
    train(made)
    return made


@pytest.mark.parametrize("stops", [[1], [3], [5], [4, 11]], ids=str)
def test_a_resumed_run_is_the_same_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: RunOptions, stops: list[int]
) -> None:
    again = options(world, tmp_path, train=LONG)
    for number, step in enumerate(stops):
        train_until(again, step, monkeypatch, resume=number > 0)
    torch.rand(7)
    train(again, resume=True)
    assert_same_run(again, whole)


def test_the_kl_starts_at_0_and_is_logged(whole: RunOptions) -> None:
    found = [line["kl"] for line in metrics(whole.folder)]
    assert found[0] == 0 and all(value > 0 for value in found[1:])


def test_so_it_does_in_bf16(world: Path, tmp_path: Path) -> None:
    """The teacher goes through the same autocast as the student."""
    base = {"base": str(world / "base"), "dtype": "bfloat16"}
    made = options(world, tmp_path, model=base, tune={**TUNE, "language": LORA})
    train(made)
    found = [line["kl"] for line in metrics(made.folder)]
    assert found[0] == 0 and found[2] > 0


def test_micro_batches_change_nothing(world: Path, tmp_path: Path) -> None:
    found = {}
    tune = {**TUNE, "language": LORA}
    for micro in (8, 2):
        made = options(world, tmp_path, f"micro{micro}", tune=tune, train={"micro_batch_size": micro})
        found[micro] = trained(train(made)), metrics(made.folder)
    assert greatest_difference(found[8][0], found[2][0]) < 1e-5
    for one, other in zip(found[8][1], found[2][1], strict=True):
        for key in one.keys() - SPEEDS:
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key


def test_activation_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    found = {}
    for on in (False, True):
        made = options(world, tmp_path, f"on_{on}", train={"steps": 5, "activation_checkpointing": on})
        found[on] = trained(train(made)), [(line["loss"], line["kl"]) for line in metrics(made.folder)]
    assert found[True][1] == found[False][1]
    assert greatest_difference(found[True][0], found[False][0]) == 0


def test_a_plain_loop_comes_to_the_same(world: Path, tmp_path: Path) -> None:
    """Connector in full, the base a second model, every position's logits from transformers' own head."""
    tune = {"vision": FROZEN, "connector": FULL, "language": FROZEN}
    made = options(
        world, tmp_path, tune=tune, replay=None, train={"steps": 4, "micro_batch_size": 4, "clip": 1e9}
    )
    tuned = VisionLanguageModel.from_pretrained(train(made))

    model = VisionLanguageModel.from_pretrained(world / "base").train()
    base = deepcopy(model).eval()
    (stage,) = made.all_stages()
    samples = read_llava(stage.data[0].file(), stage.data[0].images())
    examples, _ = encode_samples(samples, model.chat, 512)
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=FULL["lr"], weight_decay=0.0)
    expected = []
    for places in batch_order(examples, 8, made.seed, 0)[:4]:
        batch = collate([examples[i] for i in places], model.transform, model.language.pad_id)
        assert batch.labels is not None
        targets = batch.labels[:, 1:].flatten()
        chosen = targets != IGNORE
        said = []
        for each in (model, base):
            whole = each.language.hf(inputs_embeds=each.splice(batch), attention_mask=batch.attention_mask)
            said.append(whole.logits[:, :-1].flatten(0, 1)[chosen].double().log_softmax(-1))
        before = said[1].detach()
        divergence = (before.exp() * (before - said[0])).sum(-1).mean()
        (cross_entropy(said[0], targets[chosen]) + 0.5 * divergence).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(divergence.item())
    assert [line["kl"] for line in metrics(made.folder)] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert greatest_difference(tuned.connector.state_dict(), model.connector.state_dict()) < 1e-5


def test_a_strong_kl_keeps_the_base(world: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (1e-6, 30.0):
        made = options(
            world,
            tmp_path,
            f"w{weight}",
            kl={"weight": weight},
            train={"steps": 20},
            tune={**TUNE, "language": LORA},
        )
        train(made)
        found[weight] = metrics(made.folder)[-1]["kl"]
    assert found[30.0] < 0.5 * found[1e-6]


def test_each_stage_is_held_to_where_it_began(world: Path, tmp_path: Path) -> None:
    """The teacher of a second stage is the model the first one ended with."""
    (stage,) = options(world, tmp_path, "single", tune={**TUNE, "language": LORA}).all_stages()
    block = {
        "data": [{"path": str(stage.data[0].path), "image_root": str(stage.data[0].image_root)}],
        "tune": {"vision": FROZEN, "connector": FULL, "language": LORA},
        "train": {"steps": 2, "batch_size": 8, "log_every": 1, "max_length": 512},
        "kl": {"weight": 0.1},
    }
    made = run_options(world, tmp_path, "staged", stages=[block, block])
    train(made)
    found = [line["kl"] for line in metrics(made.folder)]
    assert found[0] == found[2] == 0 and found[1] > 0 and found[3] > 0


def test_a_kl_that_is_no_number_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        return tuned.sum() * float("nan")

    monkeypatch.setattr(kl, "kl_divergence", broken)
    with pytest.raises(UserError, match=r"KL to the base is nan at step 1; the samples were"):
        train(options(world, tmp_path, tune={**TUNE, "language": LORA}))


def test_changed_replay_data_does_not_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = world / "datasets" / "tiny"
    rows = tmp_path / "rows.json"
    rows.write_bytes((tiny / "train_instructions.json").read_bytes())
    replay = {"data": [{"path": str(rows), "image_root": str(tiny)}], "share": 0.3}
    made = options(world, tmp_path, replay=replay, train=LONG)
    train_until(made, 3, monkeypatch)
    rows.write_bytes((tiny / "train_iconqa.json").read_bytes())
    with pytest.raises(UserError, match="training data is not what this run was started with"):
        train(made, resume=True)
