"""What a stage trains, on what and in which order: all that is known before its first step."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.errors import Fault, UserError
from mmtune.core.processes import tell
from mmtune.data.batches import Example, batch_order, check_pictures, encode_samples
from mmtune.data.chat import IGNORE, Chat
from mmtune.data.samples import Sample, image_first, read_sound, repeated_ids
from mmtune.evaluation.metrics.base import some
from mmtune.parts.spec import PARTS
from mmtune.run import DataOptions, ReplayOptions, Stage, TrainOptions
from mmtune.tuning.base import Row


def print_tuning_table(rows: list[Row], console: Console | None = None) -> None:
    """One line per part and way of tuning; every module is in tuning_table.json."""
    table = Table(title="What trains", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("part", "tuner", "modules", "trained", "of", "lr", "pruned", "penalised"):
        justify: Any = "left" if heading in ("part", "tuner") else "right"
        # At 80 columns the numbers of a large model leave room for the word `pruned` alone.
        table.add_column(heading, justify=justify, no_wrap=heading != "pruned", min_width=len(heading))
    for part in PARTS:
        for tuner in dict.fromkeys(row.tuner for row in rows if row.part == part):
            mine = [row for row in rows if row.part == part and row.tuner == tuner]
            table.add_row(
                part,
                tuner,
                str(len(mine)),
                f"{sum(row.trained for row in mine):,}",
                f"{sum(row.parameters for row in mine):,}",
                next((f"{row.lr:g}" for row in mine if row.lr is not None), "-"),
                _pruned(mine),
                str(sum(row.regularised for row in mine) or "-"),
            )
    (console or Console(stderr=True)).print(table)


def say_contrasts(part: str, contrasts: Sequence[float]) -> str:
    """The line that tells how much the masks of a penalty tell entries apart."""
    low, middle, high = min(contrasts), statistics.median(contrasts), max(contrasts)
    return (
        f"penalty on the {part}: std / mean of its mask {low:.3f} to {high:.3f}, {middle:.3f} in the "
        f"middle of {len(contrasts)} matrices (0: all entries weigh alike)"
    )


def _pruned(rows: list[Row]) -> str:
    """How many modules, and their density, or the lowest and the highest: 14 (0.1-0.3)."""
    found = sorted({row.density for row in rows if row.density is not None})
    ends = dict.fromkeys([*found[:1], *found[-1:]])
    return f"{sum(row.pruned for row in rows)} ({'-'.join(f'{d:g}' for d in ends)})" if found else "-"


def read_examples(chat: Chat, data: list[DataOptions], settings: TrainOptions) -> list[Example]:
    """Training data, encoded; what is skipped is counted and named on the terminal.

    Raises UserError where samples or their pictures are faulty.
    """
    return _encoded(_read(data), chat, settings)


def _read(data: list[DataOptions]) -> list[Sample]:
    samples = []
    for part in data:
        read, faults = read_samples(part)
        if faults:
            raise UserError.of(faults)
        samples += read
    return samples


def _encoded(samples: list[Sample], chat: Chat, settings: TrainOptions) -> list[Example]:
    examples, skipped = encode_samples(samples, chat, settings.max_length, settings.too_long)
    if again := repeated_ids(samples):
        tell(f"mmtune: several samples share an id: {some(again)}")
    if skipped:
        count = f"{len(skipped)} of {len(samples)}"
        tell(f"mmtune: {count} samples skipped as too long: {', '.join(skipped)}")
    check_pictures(examples)
    return examples


def read_samples(data: DataOptions) -> tuple[list[Sample], list[Fault]]:
    """The sound samples of one entry of `data`, pictures first where it says so, and the faults of others."""
    read, faults = read_sound(data.file(), data.images(), data.limit)
    return [image_first(sample) for sample in read] if data.image_first else read, faults


def read_replay(chat: Chat, stage: Stage, own: int, seed: int) -> tuple[list[Example], int]:
    """What a stage with `own` examples replays, and how many of them each epoch draws; counted and said.

    Of a large pool only as many are taken, from the seed, as the whole stage will draw. Raises UserError as
    `read_examples` does, and where the share comes to no sample.
    """
    if stage.replay is None:
        return [], 0
    count = count_replay(stage.replay, own)
    samples = _read(stage.replay.data)
    tell(say_replay(count, len(samples), own))
    per_epoch = math.ceil((own + count) / stage.train.batch_size)
    needed = count * math.ceil(count_steps(own + count, stage.train) / per_epoch)
    if needed < len(samples):
        samples = random.Random(f"{seed}/replay").sample(samples, needed)
    return _encoded(samples, chat, stage.train), count


def count_replay(replay: ReplayOptions, own: int) -> int:
    """How many samples of the pool join `own` of the stage in each epoch. Raises UserError for none."""
    count = round(replay.share / (1 - replay.share) * own)
    if count == 0:
        raise UserError(
            f"a share of {replay.share} beside {own} samples comes to none",
            where="replay.share",
            mend="Raise it, or leave 'replay' out.",
        )
    return count


def say_replay(count: int, pool: int, own: int) -> str:
    """The line that tells of it."""
    return f"replay: {count:,} of {pool:,} samples in each epoch, beside {own:,} of the stage's own"


def make_plan(
    examples: list[Example],
    settings: TrainOptions,
    seed: int,
    pool: Sequence[Example] = (),
    replayed: int = 0,
) -> list[list[int]]:
    """For each optimiser step its batch, as indices of examples and, after them, of the pool.

    Every epoch has all examples and `replayed` ones of the pool.
    """
    both = [*examples, *pool]
    steps = count_steps(len(examples) + replayed, settings)
    plan: list[list[int]] = []
    for epoch in itertools.count():
        drawn = [len(examples) + i for i in draw_replay(len(pool), replayed, seed, epoch)]
        present = [*range(len(examples)), *drawn]
        for places in batch_order([both[i] for i in present], settings.batch_size, seed, epoch):
            if len(plan) == steps:
                return plan
            plan.append([present[place] for place in places])
    raise AssertionError


def shared(batch: list[int], settings: TrainOptions, rank: int, count: int, idle: int) -> list[list[int]]:
    """The micro-batches of a step's batch that one of `count` processes takes; every one has as many.

    Where there are too few samples for all, a process gets `idle` instead, an example that counts nothing.
    """
    even = math.ceil(len(batch) / count)
    micro = min(settings.micro_batch_size or even, even)
    micros = [batch[start : start + micro] for start in range(0, len(batch), micro)]
    rounds = math.ceil(len(micros) / count)
    micros += [[idle]] * (rounds * count - len(micros))
    return micros[rank::count]


def idle_example(examples: Sequence[Example]) -> Example:
    """The shortest example without anything supervised: its loss is 0."""
    shortest = min(examples, key=lambda example: len(example.ids))
    return replace(shortest, id="", labels=np.full_like(shortest.labels, IGNORE))


def count_supervised(example: Example) -> int:
    """How many tokens of an example the loss is taken on."""
    return int((example.labels[1:] != IGNORE).sum())


def count_steps(samples: int, settings: TrainOptions) -> int:
    """How many optimiser steps a training on so many samples takes."""
    per_epoch = math.ceil(samples / settings.batch_size)
    return settings.steps or max(1, round(float(settings.epochs or 0) * per_epoch))


def draw_replay(pool: int, count: int, seed: int, epoch: int) -> list[int]:
    """The `count` indices below `pool` that an epoch replays: a function of the arguments alone.

    Epochs deal on from a shuffled pool; once all of it was dealt, it is shuffled anew.
    """
    dealt: list[int] = []
    for place in range(epoch * count, (epoch + 1) * count):
        if not dealt or place % pool == 0:
            order = list(range(pool))
            random.Random(f"{seed}/replay/{place // pool}").shuffle(order)
        dealt.append(order[place % pool])
    return dealt
