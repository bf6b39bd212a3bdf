"""The memory table: its bytes are those of the tensors of a real run, and it says what fits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.outline import outline_of
from mmtune.parts.spec import PARTS, ModelOptions
from mmtune.run import RunOptions
from mmtune.training import loop, memory
from mmtune.training.engine import Engine
from mmtune.training.memory import GIB, Column, Estimate, estimate, packed_bytes, print_estimate
from mmtune.training.rehearsal import Passes, Shape
from mmtune.tuning.base import Tuner
from mmtune.tuning.joined import DriftPenalty
from mmtune.tuning.sculpt import SculptTuner
from tests.world import FROZEN, FULL, LORA, PENALTY, SCULPT, run_options

SHAPE = Shape(samples=2, tokens=40, pictures=2, supervised=7)
TUNES: list[dict[str, Any]] = [
    {"vision": FROZEN, "connector": FULL, "language": LORA},
    {"vision": FROZEN, "connector": {**FULL, "penalty": PENALTY}, "language": {**SCULPT, "penalty": PENALTY}},
    {"vision": FULL, "connector": FROZEN, "language": FULL},
]


def estimated(options: RunOptions, processes: int = 1) -> Estimate:
    stage = options.all_stages()[0]
    model = outline_of(options.model)
    tuners: dict[str, Tuner] = {part: getattr(stage.tune, part).make() for part in PARTS}
    with torch.device("meta"):
        for part, tuner in tuners.items():
            tuner.attach(model, part)
    return estimate(model, tuners, stage, options.model, SHAPE, processes)


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_real_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: dict[str, Any], dtype: str
) -> None:
    model = {"base": str(world / "base"), "dtype": dtype}
    options = run_options(world, tmp_path, model=model, tune=tune, train={"steps": 4})
    found: dict[str, int] = {}
    save, clip = loop.save_model, Engine._clip
    tuners: list[Tuner] = []

    def look(model: VisionLanguageModel, shards: Any, *rest: Any) -> None:
        every = dict.fromkeys([*model.parameters(), *model.buffers()])
        found["frozen weights"] = sum(t.nbytes for t in every if not t.requires_grad)
        found["weights that train"] = sum(t.nbytes for t in every if t.requires_grad)
        state = [t for kept in shards.optimizer.state.values() for t in kept.values() if t.ndim]
        found["Adam's moments"] = sum(t.nbytes for t in state)
        save(model, shards, *rest)

    def look_at_gradients(engine: Engine) -> float:
        found["gradients"] = sum(p.grad.nbytes for p in engine.model.parameters() if p.grad is not None)
        return clip(engine)

    monkeypatch.setattr(loop, "save_model", look)
    monkeypatch.setattr(Engine, "_clip", look_at_gradients)
    for kind in (SculptTuner, Tuner):
        monkeypatch.setattr(kind, "finish", partialmethod(_note, tuners, kind.finish))
    loop.train(options)
    found["masks, penalties, W0"] = sum(map(_kept, tuners))
    lines = estimated(options).own.lines
    assert {name: lines[name] for name in found} == found
    assert lines["the engine's buffers"] == 0


def _note(tuner: Tuner, tuners: list[Tuner], finish: Callable[[Tuner], None]) -> None:
    tuners.append(tuner)
    finish(tuner)


def _kept(tuner: Tuner) -> int:
    """Masks, W0 and M^2 as they lie there, and the gradients that a penalty has ready for each of its own."""
    total = sum(mask.nbytes for mask in tuner.masks.values()) if isinstance(tuner, SculptTuner) else 0
    penalty = tuner.weight_penalty
    if penalty is not None:
        total += sum(4 * parameter.numel() for parameter in penalty.parameters())
    if isinstance(penalty, DriftPenalty):
        assert set(penalty.pieces) == set(penalty.initial)
        total += sum(tensor.nbytes for pair in penalty.pieces.values() for tensor in pair)
    return total


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_take_what_bitsandbytes_holds(world: Path, kind: Any) -> None:
    pytest.importorskip("bitsandbytes")
    base = ModelOptions(base=str(world / "base"), dtype="bfloat16")
    held = assemble(replace(base, quantize=kind))
    real = 0
    for parameter in held.language.parameters():
        real += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2
            real += sum(t.nbytes for t in (state.absmax, state.code, state.offset, inner.absmax, inner.code))
        elif (scale := getattr(parameter, "SCB", None)) is not None:
            real += scale.nbytes
    plain = outline_of(base)
    rest = sum(p.nbytes for p in plain.language.parameters()) - sum(
        weight.nbytes for weight in memory._packable(plain)
    )
    packed, largest = memory._packed(plain, kind)
    assert rest + packed == real
    assert largest == 2 * 48 * 32
    assert packed_bytes(4096, 4096, "nf4") / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-3)


def column(engine: str, quantize: str | None, weights: float) -> Column:
    return Column(engine, quantize, {"frozen weights": int(weights * GIB), "gradients": 0}, working=0)


def printed(made: Estimate, width: int = 80, limit: float = 24) -> str:
    out = io.StringIO()
    print_estimate(made, "bfloat16", limit, "train.max_length", Console(file=out, width=width))
    return out.getvalue()


def test_what_does_not_fit_is_told_what_does() -> None:
    columns = [column("ddp", None, 22), column("zero3", None, 6), column("ddp", "nf4", 5)]
    passes = {True: Passes(GIB, 2 * GIB), False: Passes(20 * GIB, 21 * GIB)}
    made = Estimate(columns, passes, Shape(4, 640, 4, 64), processes=4, checkpointing=True)
    out = printed(made)
    needed = (22 + 2) * 1.04 + 0.75
    assert f"This run, DDP, checkpointed: {needed:.2f} GiB, does not fit." in out
    assert "What does: ZeRO-3, checkpointed; DDP nf4, checkpointed." in out
    assert "A smaller train.micro_batch_size takes less" in out
    assert "Nothing in the table does." in printed(made, limit=4)
    fits = printed(replace(made, columns=columns[1:]))
    assert "This run, ZeRO-3, checkpointed: 9.07 GiB, fits." in fits and "What does" not in fits


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_room(width: int) -> None:
    columns = [column(engine, None, 123) for engine in ("zero1", "ddp", "zero2", "zero3", "fsdp2")]
    columns.append(column("ddp", "nf4", 123))
    made = Estimate(columns, dict.fromkeys((True, False), Passes(0, 0)), Shape(1, 2048, 1, 64), 4, True)
    table = printed(made, width).split("For 4 processes")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "DDP nf4" in table and table.count("123.00") == 6 and "…" not in table


def test_the_runs_own_way_comes_first_and_all_are_told_apart(world: Path, tmp_path: Path) -> None:
    def ways(processes: int, language: dict[str, Any] = LORA, **train: Any) -> list[str]:
        tune = {"vision": FROZEN, "connector": FULL, "language": language}
        stage = run_options(world, tmp_path, tune=tune, train=train).all_stages()[0]
        return [Column(*way, {}, 0).name for way in memory._ways(stage, None, processes)]

    assert ways(1) == ["one GPU", "one GPU nf4"]
    assert ways(2, engine="ddp") == ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "DDP nf4"]
    assert ways(2, engine="zero1")[:3] == ["ZeRO-1", "DDP", "ZeRO-2"]
    assert ways(2, language=FULL, engine="fsdp2") == ["FSDP2", "DDP", "ZeRO-2", "ZeRO-3"]


def test_overlapping_takes_a_second_bucket(world: Path, tmp_path: Path) -> None:
    found = {}
    for overlap in (False, True):
        zero = {"stage": 2, "overlap_comm": overlap, "reduce_bucket_size": 1000}
        file = tmp_path / f"{overlap}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        train = {"engine": "zero2", "deepspeed": str(file)}
        found[overlap] = estimated(run_options(world, tmp_path, train=train), processes=2)
    buffers = {overlap: made.own.lines["the engine's buffers"] for overlap, made in found.items()}
    assert buffers == {False: 4000, True: 8000}
