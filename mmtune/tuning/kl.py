"""KL to the base: on the task's own inputs the tuned model is held near what it would have said before.

The teacher is the model as the stage began: adapters off, parts that train in full as they were. At each
supervised position KL(base || tuned) = sum over the vocabulary of p_base (ln p_base - ln p_tuned), at
temperature 1 and in fp32; a step's value is the mean over its positions, however it is split.
Source: knowledge distillation with the untuned model as teacher (Hinton et al., arXiv 1503.02531; Li and
Hoiem, Learning without Forgetting, arXiv 1606.09282).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.core.config import Report
from mmtune.parts.spec import PARTS

if TYPE_CHECKING:
    import torch

    from mmtune.data.batches import Batch
    from mmtune.parts.model import VisionLanguageModel
    from mmtune.tuning.shards import Shards


@dataclass
class KlOptions:
    """weight: what KL(base || tuned), in nats per supervised token, is multiplied with in the loss."""

    weight: float

    def check(self, fault: Report) -> None:
        if self.weight <= 0:
            fault("weight", f"expected more than 0, found {self.weight}", "Leave 'kl' out to train without.")


class Teacher:
    """A model as it is now, with its tuners attached and before the first step or a resumed one's weights.

    Costs a copy of the weights that train, but for adapters, and a forward pass without gradients per batch.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        from mmtune.tuning.shards import Shards

        self.model = model
        self.bind(model, Shards())
        self.initial = {
            f"{part}.{name}": parameter.detach().clone()
            for part in PARTS
            if part not in model.adapters
            for name, parameter in model.part(part).named_parameters()
            if parameter.requires_grad
        }

    def bind(self, forward: Callable[..., Any], shards: Shards) -> None:
        """Called once an engine has taken the model. forward: the model as the engine wrapped it."""
        self.forward, self.shards = forward, shards

    def logits(self, batch: Batch) -> torch.Tensor:
        """What the base says at the supervised positions [n, vocabulary]; no dropout, no gradient."""
        import torch

        training = self.model.training
        self.model.eval()
        initial = {self.model.get_parameter(name): value for name, value in self.initial.items()}
        with torch.no_grad(), ExitStack() as as_it_was:
            for adapter in self.model.adapters.values():
                as_it_was.enter_context(adapter.disable_adapter())
            as_it_was.enter_context(self.shards.seen_as(initial))
            _, logits = self.forward(batch, True)
        self.model.train(training)
        return logits

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The task's loss and the KL, both summed over the supervised positions, from one pass."""
        base = self.logits(batch)
        loss, logits = self.forward(batch, True)
        return loss, kl_divergence(base, logits)


def kl_divergence(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """KL(base || tuned) in nats, summed over positions, from logits [n, vocabulary]; at least fp32."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    dtype = torch.promote_types(tuned.dtype, torch.float32)
    base, tuned = (log_softmax(logits.to(dtype), dim=-1) for logits in (base, tuned))
    return kl_div(tuned, base, reduction="sum", log_target=True)
