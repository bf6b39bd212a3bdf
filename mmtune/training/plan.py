"""What a stage trains, on what and in which order: all that is known before its first step."""

from __future__ import annotations

import itertools
import math

from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.errors import Fault, UserError
from mmtune.data.batches import Example, batch_order, check_pictures, encode_samples
from mmtune.data.chat import Chat
from mmtune.data.samples import Sample, image_first, read_sound
from mmtune.parts.spec import PARTS
from mmtune.run import DataOptions, Stage, TrainOptions
from mmtune.tuning.base import Row


def print_tuning_table(rows: list[Row], console: Console | None = None) -> None:
    """One line per part and way of tuning; every module is in tuning_table.json."""
    table = Table(title="What trains", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("part", "tuner", "modules", "trained", "of", "lr", "pruned", "regularised"):
        table.add_column(heading, justify="left" if heading in ("part", "tuner") else "right")
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
                str(sum(row.pruned for row in mine) or "-"),
                str(sum(row.regularised for row in mine) or "-"),
            )
    (console or Console(stderr=True)).print(table)


def read_examples(chat: Chat, stage: Stage) -> list[Example]:
    """A stage's training data, encoded; what is skipped is named on the terminal.

    Raises UserError where samples or their pictures are faulty.
    """
    samples = []
    for data in stage.data:
        read, faults = read_samples(data)
        if faults:
            raise UserError.of(faults)
        samples += read
    examples, skipped = encode_samples(samples, chat, stage.train.max_length, stage.train.too_long)
    if skipped:
        named = ", ".join(skipped[:10]) + (" ..." if len(skipped) > 10 else "")
        Console(stderr=True).print(f"{len(skipped)} of {len(samples)} samples skipped as too long: {named}")
    check_pictures(examples)
    return examples


def read_samples(data: DataOptions) -> tuple[list[Sample], list[Fault]]:
    """The sound samples of one entry of `data`, pictures first where it says so, and the faults of others."""
    read, faults = read_sound(data.file(), data.images(), data.limit)
    return [image_first(sample) for sample in read] if data.image_first else read, faults


def make_plan(examples: list[Example], settings: TrainOptions, seed: int) -> list[list[list[int]]]:
    """For each optimiser step its micro-batches, as indices of examples."""
    steps = count_steps(len(examples), settings)
    micro = settings.micro_batch_size or settings.batch_size
    plan: list[list[list[int]]] = []
    for epoch in itertools.count():
        for batch in batch_order(examples, settings.batch_size, seed, epoch):
            if len(plan) == steps:
                return plan
            plan.append([batch[i : i + micro] for i in range(0, len(batch), micro)])
    raise AssertionError


def count_steps(samples: int, settings: TrainOptions) -> int:
    """How many optimiser steps a training on so many samples takes."""
    per_epoch = math.ceil(samples / settings.batch_size)
    return settings.steps or max(1, round(float(settings.epochs or 0) * per_epoch))
