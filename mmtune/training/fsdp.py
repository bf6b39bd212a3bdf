"""FSDP2: weights, gradients and moments are cut into rows, and gathered only where a layer needs them.

By torch's own `fully_shard`: accelerate's FSDP2 takes part on GPUs alone and on CPUs, without a word, trains
in DDP instead (accelerate 1.15). What is frozen stays bf16 and what trains fp32, under autocast, as on one
process; gradients are averaged in fp32.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmtune.parts.model import VisionLanguageModel
from mmtune.training.engine import Engine
from mmtune.tuning.fsdp_shards import FsdpShards


class Fsdp2Engine(Engine):
    """Several processes, each with some rows of every tensor."""

    def _accelerator(self, precision: str, **plugins: Any) -> Accelerator:
        # Of `accelerate launch --use_fsdp`: transformers would load weights on the first process only.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        return super()._accelerator(precision, **plugins)

    def prepare(self, model: VisionLanguageModel, optimizer: torch.optim.Optimizer) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        cut(model, self.device.type, self.count)
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[names[parameter]] for parameter in group["params"]]
        model.every_part = True
        self.optimizer = optimizer
        self.shards = FsdpShards(optimizer, self.rank, self.count)
        self.cut_model = model

        def forward(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return model(*inputs)

        self.model = forward

    def micro(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.cut_model.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()

    def _clip(self) -> float:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [self.shards.gradient(parameter) for parameter in trained]
        mine = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        norm = self.shards.sum(mine).sqrt()
        for gradient in gradients:
            gradient.mul_((self.clip / (norm + 1e-6)).clamp(max=1))
        return float(norm)


def cut(model: VisionLanguageModel, device: str, count: int) -> None:
    """Cuts every tensor into `count` pieces, in place; a layer's are gathered together and given up after it.

    What is no floating-point number (a quantised weight) stays whole on every process.
    """
    mesh = init_device_mesh(device, (count,))
    whole = {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
    for module in (*gathered(model), model):
        # Also the outermost: as long as a parameter is gathered, the model does not show the cut one.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def gathered(model: VisionLanguageModel) -> list[nn.Module]:
    """The modules whose weights are gathered together, each by itself; what is in none of them comes last."""
    groups: list[nn.Module] = [*model.vision.layers(), *model.language.layers()]
    ends = [model.language.hf.get_input_embeddings(), model.language.hf.get_output_embeddings()]
    if ends[0].weight is not ends[1].weight:  # tied ones have to be in one group, that of all that is left
        groups += ends
    return groups
