"""A fixed batch on which a run is looked at while it trains: its loss, and how far it is from its base.

Without dropout and gradients, so that the training is the same, bit by bit, with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mmtune.data.batches import Example, collate
from mmtune.run import TrainOptions
from mmtune.training.engine import Engine
from mmtune.training.plan import count_supervised, idle_example, shared
from mmtune.tuning.kl import Teacher, kl_divergence


class Probe:
    """teacher: the model as the stage began; it knows the model as it is, too."""

    def __init__(
        self,
        examples: Sequence[Example],
        settings: TrainOptions,
        teacher: Teacher,
        engine: Engine,
    ) -> None:
        self.teacher = teacher
        self.model = model = teacher.model
        self.engine = engine
        self.supervised = sum(map(count_supervised, examples))
        both = [*examples, idle_example(examples)]
        # No more samples at once than in training.
        micro = settings.micro_batch_size or settings.batch_size // engine.count
        small = replace(settings, micro_batch_size=micro)
        mine = shared([*range(len(examples))], small, engine.rank, engine.count, idle=len(examples))
        self.batches = [
            collate([both[i] for i in micro], model.transform, model.language.pad_id) for micro in mine
        ]

    def look(self) -> dict[str, float]:
        """The task's loss (`probe_loss`), KL(base || tuned) (`probe_kl`) and KL(tuned || base)
        (`probe_kl_reverse`), all in nats per supervised token. Every process calls it.
        """
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for batch in self.batches:
                there = batch.to(self.engine.device)
                base = self.teacher.logits(there)
                loss, tuned = self.engine.model(there, True)
                sums += torch.stack([loss, kl_divergence(base, tuned), kl_divergence(tuned, base)])
        self.model.train(training)
        names = ("probe_loss", "probe_kl", "probe_kl_reverse")
        return dict(zip(names, (self.engine.shards.sum(sums) / self.supervised).tolist(), strict=True))


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of the examples, or all where there are fewer, evenly over their order."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]
