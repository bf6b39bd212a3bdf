"""Do a swap's towers fit the language model and the GPUs, from configs alone, before any download?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.config import Source
from mmtune.core.errors import Fault, UserError
from mmtune.evaluation.protocol import load_protocol, load_suite
from mmtune.experiments.swap_options import read_swap
from mmtune.parts.outline import outline_of_configs
from mmtune.run import RunOptions
from mmtune.training.check import Faults, Gpus, StageFound, check_stage

GIB = 2**30


@dataclass
class TowerFound:
    """What the configs say of one tower's run: each stage, with its shapes and its memory."""

    name: str
    run: RunOptions
    stages: list[StageFound]


def check_shapes(
    path: Path, overrides: list[str] | None = None, gpus: Gpus | None = None
) -> list[TowerFound]:
    """Every tower of a swap with a new connector, from configs of folders or of known models.

    Raises UserError with the faults of all towers: of the YAML, of parts that do not fit each other.
    """
    options, swaps = read_swap(path, overrides, absent=[])
    found: list[TowerFound] = []
    wrong: dict[Fault, None] = {}
    for name in options.towers:
        run = next(swap.run for swap in swaps if swap.tower == name)
        assert run.model.connector
        run.model.connector.weights = None  # a fitted one may not be there yet
        faults = Faults(Source(path, overrides), [])
        stages = []
        for place, stage in enumerate(run.all_stages()):
            outline = faults.gather((), outline_of_configs, run.model)
            key = ("stages", str(place))
            stages.append(check_stage(faults, key, stage, outline, run, None, gpus or Gpus()))
        wrong |= {Fault(f"{name}: {fault.what}", fault.where, fault.mend): None for fault in faults.found}
        found.append(TowerFound(name, run, stages))
    for task in load_suite(options.evaluate.suite).given:
        load_protocol(task)
    if wrong:
        raise UserError.of(wrong)
    return found


def print_shapes(found: list[TowerFound], gpus: Gpus, console: Console) -> None:
    """A line for each tower: its tokens, the parameters of the parts, and each stage's GiB on each GPU."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("tower", no_wrap=True)
    stages = [stage.name or f"stage {place}" for place, stage in enumerate(found[0].stages, start=1)]
    for heading in ("tokens", "tower", "unused", "connector", "language", *stages, "fits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        sizes = each.stages[0].sizes
        parts = [sizes["vision"], sizes["unused"], sizes["connector"], sizes["language"]]
        needed = [_bytes(stage) for stage in each.stages]
        fits = all(taken <= gpus.memory * GIB for taken in needed)
        table.add_row(
            each.name,
            f"{each.stages[0].image_tokens:,}",
            *(f"{size / 1e6:,.1f}" for size in parts),
            *(f"{taken / GIB:.2f}" for taken in needed),
            "yes" if fits else "NO",
        )
    console.print(table)
    console.print("tokens: of a picture. Parameters in millions; unused: of layers that are not loaded.")
    for stage in found[0].stages:
        made = stage.memory
        assert made
        pictures = "a picture" if made.shape.pictures else "no picture"
        kept = "checkpointed" if made.checkpointing else "all kept"
        console.print(
            f"{stage.name}: GiB on each of {made.processes} GPUs, {made.own.name}, {made.shape.samples} x "
            f"{made.shape.tokens:,} tokens at once, {pictures} in each, activations {kept}.",
            soft_wrap=True,
        )
    console.print(
        f"fits: {gpus.memory:g} GiB. From configs alone: weights, tokenizers and data are not looked for.",
        soft_wrap=True,
    )


def _bytes(stage: StageFound) -> int:
    assert stage.memory
    return stage.memory.own.total(stage.memory.passes[stage.memory.checkpointing])
