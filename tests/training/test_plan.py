"""Which samples make up which step, with and without replayed ones."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data.batches import Example, batch_order
from mmtune.parts import VisionLanguageModel
from mmtune.run import ReplayOptions, TrainOptions, data_hash
from mmtune.training.plan import (
    count_replay,
    count_supervised,
    draw_replay,
    idle_example,
    make_plan,
    read_replay,
    shared,
)
from tests.world import run_options


def examples(count: int, first: int = 0) -> list[Example]:
    """Of lengths from 5 to 14, every third with a picture."""
    return [
        Example(
            str(first + i),
            np.zeros(5 + i % 10, np.int32),
            np.zeros(5 + i % 10, np.int32),
            (Path("x"),) if i % 3 == 0 else (),
        )
        for i in range(count)
    ]


def test_without_replay_a_plan_is_the_epochs_in_their_order() -> None:
    own = examples(23)
    plan = make_plan(own, TrainOptions(batch_size=8, micro_batch_size=4, epochs=2), seed=5)
    order = [batch for epoch in (0, 1) for batch in batch_order(own, 8, 5, epoch)]
    assert plan == order


def test_every_epoch_has_all_of_its_own_and_other_replayed_ones() -> None:
    own, pool = examples(38), examples(25, 100)
    settings = TrainOptions(batch_size=8, epochs=5)
    plan = make_plan(own, settings, 0, pool, replayed=10)
    assert plan == make_plan(own, settings, 0, pool, replayed=10)
    assert len(plan) == 5 * 6  # 48 samples are 6 batches
    dealt: Counter[int] = Counter()
    for epoch in range(5):
        seen = [i for batch in plan[6 * epoch : 6 * epoch + 6] for i in batch]
        assert [i for i in sorted(seen) if i < 38] == list(range(38))
        replayed = [i - 38 for i in seen if i >= 38]
        assert sorted(replayed) == sorted(draw_replay(25, 10, 0, epoch))
        dealt.update(replayed)
    # 50 draws from 25: each twice, for none comes again before all have come.
    assert dealt == {i: 2 for i in range(25)}


def test_replay_is_mixed_into_the_batches() -> None:
    """About ten in every batch of forty."""
    plan = make_plan(examples(300), TrainOptions(batch_size=40, epochs=1), 0, examples(300, 500), 100)
    counts = [sum(i >= 300 for i in batch) for batch in plan]
    assert sum(counts) == 100 and min(counts) >= 2 and max(counts) <= 22


def test_no_sample_of_the_pool_comes_again_before_all_have_come() -> None:
    for pool, count in ((7, 3), (7, 7), (3, 8), (100, 1)):
        dealt = [i for epoch in range(3 * pool) for i in draw_replay(pool, count, 0, epoch)]
        for start in range(0, len(dealt) - pool + 1, pool):
            assert sorted(dealt[start : start + pool]) == list(range(pool))
    assert draw_replay(100, 20, 0, 0) != draw_replay(100, 20, 1, 0)
    assert draw_replay(100, 20, 0, 0) != sorted(draw_replay(100, 20, 0, 0))


@pytest.mark.parametrize(("share", "own", "count"), [(0.05, 6000, 316), (0.5, 40, 40), (0.8, 10, 40)])
def test_the_share_is_of_all_samples(share: float, own: int, count: int) -> None:
    assert count_replay(ReplayOptions([], share), own) == count
    assert count / (own + count) == pytest.approx(share, abs=0.5 / own)


def replaying(world: Path, folder: Path, share: float = 0.25, **changes: Any) -> Any:
    tiny = world / "datasets" / "tiny"
    data = [{"path": str(tiny / "train_iconqa.json"), "image_root": str(tiny)}]
    replay = {
        "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
        "share": share,
    }
    return run_options(world, folder, data=data, replay=replay, **changes)


def test_what_is_replayed_is_counted_and_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = VisionLanguageModel.from_pretrained(world / "base").chat
    (stage,) = replaying(world, tmp_path).all_stages()
    assert read_replay(chat, stage, own=30, seed=0)[1] == 10
    said = " ".join(capsys.readouterr().err.split())
    assert "replay: 10 of 92 samples in each epoch, beside 30 of the stage's own" in said
    with pytest.raises(UserError, match=r"a share of 0\.25 beside 1 samples comes to none"):
        read_replay(chat, stage, own=1, seed=0)
    stage.replay = None
    assert read_replay(chat, stage, own=30, seed=0) == ([], 0)


def test_no_more_of_a_pool_is_read_than_the_run_draws(world: Path, tmp_path: Path) -> None:
    """40 samples are 5 steps, of which 10 samples are replayed; 11 steps reach into the third epoch."""
    chat = VisionLanguageModel.from_pretrained(world / "base").chat
    (stage,) = replaying(world, tmp_path, train={"steps": 11}).all_stages()
    found = [[example.id for example in read_replay(chat, stage, 30, seed)[0]] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == len(found[0]) == 30
    stage.train.steps = 100
    assert len(read_replay(chat, stage, 30, 0)[0]) == 92


def test_what_is_replayed_counts_in_the_hash_of_the_data(world: Path, tmp_path: Path) -> None:
    (stage,) = replaying(world, tmp_path).all_stages()
    assert len(stage.all_data) == 2
    assert data_hash(stage.all_data) != data_hash(stage.data)


@given(size=st.integers(1, 40), micro=st.none() | st.integers(1, 9), count=st.integers(1, 5))
def test_processes_share_a_batch(size: int, micro: int | None, count: int) -> None:
    """Every sample is taken once, all have as many micro-batches, and none is larger than it may be."""
    batch = list(range(100, 100 + size))
    settings = TrainOptions(batch_size=size, micro_batch_size=micro, steps=1)
    shares = [shared(batch, settings, rank, count, idle=-1) for rank in range(count)]
    assert len({len(share) for share in shares}) == 1
    taken = [i for share in shares for micros in share for i in micros]
    assert sorted(i for i in taken if i >= 0) == batch
    assert max(len(micros) for share in shares for micros in share) <= (micro or math.ceil(size / count))
    assert all(len(micros) == 1 for share in shares for micros in share if -1 in micros)
    assert taken.count(-1) < count


def test_an_idle_example_counts_nothing() -> None:
    idle = idle_example(examples(5))
    assert len(idle.ids) == 5 and count_supervised(idle) == 0 and idle.id == ""
