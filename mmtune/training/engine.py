"""Engines: how the processes of a run share the work. accelerate carries them.

One process and DDP are here. An engine takes the mean of the processes' gradients, so a loss that is to be
summed over them has to be multiplied by `count`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from mmtune.core.errors import UserError
from mmtune.core.processes import count
from mmtune.core.table import Table
from mmtune.parts.model import VisionLanguageModel
from mmtune.run import TrainOptions
from mmtune.tuning.shards import Shards

# Set by a config of `accelerate launch`; each would have the last word over the YAML.
LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": ("zero1", "zero2", "zero3"), "ACCELERATE_USE_FSDP": ("fsdp2",)}

ENGINES = Table(
    "engine",
    {
        "single": "mmtune.training.engine:Engine",
        "ddp": "mmtune.training.engine:Engine",
        "fsdp2": "mmtune.training.fsdp:Fsdp2Engine",
        "zero1": "mmtune.training.zero:ZeroEngine",
        "zero2": "mmtune.training.zero:ZeroEngine",
        "zero3": "mmtune.training.zero:ZeroEngine",
    },
)


class Engine:
    """One process, and DDP.

    rank, count: of the processes. model, optimizer: as they were given to `prepare`, or in their place.
    """

    shards: Shards
    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(self, settings: TrainOptions, dtype: str) -> None:
        self.clip = settings.clip
        self.accelerator = self._accelerator("bf16" if dtype == "bfloat16" else "no")
        self.device = self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes

    @classmethod
    def check(cls, settings: TrainOptions) -> None:
        """Raises UserError where this engine cannot be had as things are."""

    def _accelerator(self, precision: str, **plugins: Any) -> Accelerator:
        AcceleratorState._reset_state()  # of another run in this process, whose precision it would insist on
        return Accelerator(
            cpu=_no_accelerator(),
            mixed_precision=precision,
            # Said here, or an environment variable would have the last word and scale the loss.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            **plugins,
        )

    def prepare(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer) -> None:
        """Takes model and optimiser over; from then on `model` is what a forward pass is to be made with."""
        self.model, wrapped = self.accelerator.prepare(model, optimizer)
        self.optimizer = wrapped.optimizer
        self.shards = Shards(self.optimizer, self.rank, self.count)

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """A context for the passes of a micro-batch; last: of an optimiser step. Before that one nothing is
        sent, where an engine can do without.
        """
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds to the gradients; with the `last` loss of an optimiser step the processes' mean is taken."""
        loss.backward()

    def step(self) -> float:
        """Clips, steps and forgets the gradients. Returns their norm before they were clipped; where that is
        no number the weights stay as they are.
        """
        norm = self._clip()
        if norm == norm and abs(norm) != float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self) -> float:
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip))

    def close(self) -> None:
        self.accelerator.free_memory()


def open_processes() -> int:
    """Lets the processes that a launcher started find each other. Returns which of them this is."""
    return PartialState(cpu=_no_accelerator()).process_index


def _no_accelerator() -> bool:
    """Said outright: where accelerate has to guess, processes on CPUs don't find each other."""
    return not torch.accelerator.is_available()


def check_engine(settings: TrainOptions) -> None:
    """Raises UserError where the processes that were started are not what the engine asks for."""
    for variable, engines in LAUNCHED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1") and settings.engine not in engines:
            raise UserError(
                f"the launcher set {variable}, but the engine is {settings.engine}",
                where="train.engine",
                mend=f"Say train.engine={engines[-1]}, or launch without that setting (torchrun).",
            )
    if settings.engine == "single" and count() > 1:
        raise UserError(
            f"{count()} processes were started, but engine 'single' is one process",
            where="train.engine",
            mend="Say train.engine=ddp, or start mmtune without torchrun or accelerate launch.",
        )
    ENGINES.load(settings.engine).check(settings)
    micro = settings.micro_batch_size or 1
    if settings.batch_size % (micro * count()):
        raise UserError(
            f"batch_size {settings.batch_size} is no multiple of {count()} processes x {micro} samples",
            where="train.micro_batch_size" if settings.micro_batch_size else "train.batch_size",
            mend="Processes x micro_batch_size x accumulation must give batch_size, or results would differ.",
        )


def make_engine(settings: TrainOptions, dtype: str) -> Engine:
    """The engine of a stage. dtype: of the model, float32 or bfloat16. Raises UserError as `check_engine`."""
    check_engine(settings)
    alone = count() == 1  # nobody to share anything with
    made: Engine = ENGINES.load("single" if alone else settings.engine)(settings, dtype)
    return made
