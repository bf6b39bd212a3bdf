"""DeepSpeed ZeRO as an engine.

Weights that train stay fp32 in the model and frozen ones in the run's dtype; DeepSpeed's own bf16 mode would
round the former. Forward passes run under its torch.autocast and gradients are reduced in fp32, so a step
means what it means on one process.

The processes are accelerate's, DeepSpeed's engine is made without it: accelerate's plugin makes transformers
split every model that is loaded from then on, sets an environment variable that outlives the run, and its
`backward` steps as well.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState

from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel
from mmtune.run import TrainOptions
from mmtune.training.engine import Engine, open_processes
from mmtune.training.zero_json import STAGES, zero_config
from mmtune.tuning.zero_shards import Zero3Shards, ZeroShards


class ZeroEngine(Engine):
    """ZeRO-1, 2, 3. `model` is DeepSpeed's engine; `optimizer`, the one given, now updates flat pieces."""

    def __init__(self, settings: TrainOptions, dtype: str) -> None:
        open_processes()
        state = PartialState()
        self.device, self.rank, self.count = state.device, state.process_index, state.num_processes
        self.stage = STAGES[settings.engine]
        self.config = zero_config(settings, dtype, self.count)

    @classmethod
    def check(cls, settings: TrainOptions) -> None:
        if find_spec("deepspeed") is None:
            raise UserError(
                f"engine {settings.engine} needs DeepSpeed, which is not installed",
                where="train.engine",
                mend="pip install mmtune[deepspeed]",
            )
        launched = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        own = settings.deepspeed
        if launched != "none" and (own is None or own.resolve() != Path(launched).resolve()):
            raise UserError(
                f"the launcher set a DeepSpeed config, {launched}; the run has {own or 'none'}",
                where="train.deepspeed",
                mend=f"Say train.deepspeed={launched}, or launch without it.",
            )

    def prepare(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        model.every_part = self.stage == 3  # its layers' weights come from all processes, so all have to ask
        groups = [group["params"] for group in optimizer.param_groups]
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.optimizer = optimizer
        shards = (Zero3Shards if self.stage == 3 else ZeroShards)(self.model, self.rank, self.count)
        self.shards = shards
        if [set(group) for group in shards.groups()] != [set(group) for group in groups]:
            raise RuntimeError("DeepSpeed put parameters into other groups than they came in")

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def step(self) -> float:
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def close(self) -> None:
        self.model.destroy()
