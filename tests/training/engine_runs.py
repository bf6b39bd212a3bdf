"""Runs a list of trainings in the processes that a launcher started, and looks on as they train.

`torchrun --nproc_per_node 2 -m tests.training.engine_runs JOBS.json`: each job is `{"yaml": ..., "name": ...,
"overrides": [...], "resume": false, "stop_at": null}`. Beside the YAML every process writes NAME.RANK.json
with what it saw: the masks' hashes, and how many entries outside them were other than 0 in forward passes and
after each step.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mmtune.run import read_run
from mmtune.training import loop
from mmtune.training.engine import open_processes
from mmtune.training.loop import train
from mmtune.training.meter import Meter
from mmtune.training.signals import Interrupted, Signals
from mmtune.tuning.sculpt import SculptTuner

seen: dict[str, Any] = {}


@contextmanager
def looking_on() -> Iterator[None]:
    """A context in which masks and what is outside them are recorded in `seen`."""
    hold, after_step = SculptTuner._hold, SculptTuner.after_step

    def holding(tuner: Any, masks: dict[str, torch.Tensor]) -> None:
        hold(tuner, masks)
        digests = {}
        for name, layer in tuner.layers.items():
            for which in ("lora_A", "lora_B"):
                mask = tuner.masks[f"{name}.{which}"]
                digests[f"{name}.{which}"] = hashlib.sha256(mask.cpu().numpy().tobytes()).hexdigest()[:16]
                getattr(layer, which)["default"].register_forward_pre_hook(partial(look, mask))
        seen["masks"] = digests

    def look(mask: torch.Tensor, module: torch.nn.Module, _: Any) -> None:
        weight: Any = module.weight
        assert weight.shape == mask.shape, "a forward pass that does not see the whole tensor"
        seen["outside_in_forward"] += int(weight.detach()[~mask].count_nonzero())
        seen["forward_passes"] += 1

    def stepped(tuner: Any, step: int) -> None:
        after_step(tuner, step)
        mine = sum(tuner.shards.local(parameter).numel() for _, parameter in tuner._tensors())
        whole = sum(mask.numel() for mask in tuner.masks.values())
        seen.update(shards=type(tuner.shards).__name__, part=mine / whole if whole else 0)
        for name, parameter in tuner._tensors() if tuner.masks else ():
            outside = ~tuner.shards.piece(parameter, tuner.masks[name])
            seen["outside_after_step"] += int(tuner.shards.local(parameter)[outside].count_nonzero())
            if tuner.options.hold == "grad":
                for moment in tuner.shards.moments(parameter).values():
                    seen["moments"] += moment.numel()
                    seen["moments_outside"] += int(moment[outside].count_nonzero())

    save = loop.save_model

    def saving(model: Any, shards: Any, *rest: Any) -> None:
        seen["held"] = held(model, shards)
        save(model, shards, *rest)

    with (
        patch.object(SculptTuner, "_hold", holding),
        patch.object(SculptTuner, "after_step", stepped),
        patch.object(loop, "save_model", saving),
    ):
        yield


def held(model: Any, shards: Any) -> dict[str, int]:
    """The bytes of this process's own tensors: weights that don't train, those that do with their masters,
    and moments.
    """

    def mine(tensor: Any) -> int:
        piece = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
        return int(piece.nbytes)

    every = [*dict.fromkeys(model.parameters()), *model.buffers()]
    zero = getattr(shards, "zero", None)
    masters = getattr(
        zero, "single_partition_of_fp32_groups", getattr(zero, "fp32_partitioned_groups_flat", [])
    )
    moments = [t for kept in shards.optimizer.state.values() for t in kept.values() if t.ndim]
    return {
        "frozen weights": sum(mine(t) for t in every if not t.requires_grad),
        "weights that train": sum(mine(t) for t in every if t.requires_grad) + sum(map(mine, masters)),
        "Adam's moments": sum(map(mine, moments)),
    }


@contextmanager
def stopped_after(step: int | None, signals: Signals) -> Iterator[None]:
    """A context in which a run stops after a step, as by a signal that comes to one process only."""
    count = Meter.step

    def stepped(meter: Any, number: int, *rest: Any) -> None:
        ahead = 1 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0  # the next step ends with it
        if number + ahead == step and int(os.environ.get("RANK", 0)) == 0:
            signals.waiting = signal.SIGTERM
        count(meter, number, *rest)

    with patch.object(Meter, "step", stepped):
        yield


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job; what was seen, or the error."""
    seen.clear()
    counts = ("outside_in_forward", "forward_passes", "outside_after_step", "moments_outside", "moments")
    seen.update(dict.fromkeys(counts, 0))
    signals = Signals()
    try:
        with looking_on(), stopped_after(job.get("stop_at"), signals):
            train(read_run(Path(job["yaml"]), job.get("overrides", [])), job.get("resume", False), signals)
    except Interrupted:
        seen["stopped"] = True
    except Exception as error:
        traceback.print_exc()
        seen["error"] = f"{type(error).__name__}: {error}"
    return dict(seen)


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rank = open_processes()
    for job in jobs:
        gc.freeze()  # what is imported by now: each run ends in two collections
        found = run(job)
        name = job.get("name") or Path(job["yaml"]).stem
        Path(job["yaml"]).with_name(f"{name}.{rank}.json").write_text(json.dumps(found))
        if rank == 0:
            print(f"{name}: {found.get('error', 'done')}", flush=True)
        if "error" in found:  # the other process may wait for this one for good
            sys.exit(1)
    gc.unfreeze()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
