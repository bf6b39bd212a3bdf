"""Which entries are important: of A and B, to choose the support, and of a frozen W, to weigh the penalty.

Support, one score per entry when it is cut: `magnitude` |w|; `movement` |w - its start|; `gradient` the sum
over the steps so far of |w dL/dw| (Michel et al., arXiv 1905.10650; L: task and penalties, gradients
unclipped and of the whole batch); `random`.
Mask, one score per entry of W before the first step: `activation` |W_ij| x the root mean square of the j-th
input (Wanda, Sun et al., arXiv 2306.11695); `gradient` the sum over samples of |W dL/dW|. Both are measured
on the base as the stage begins, on samples of the stage's own, one at a time, without dropout: so they do
not depend on how samples are batched or shared out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtune.data.chat import IGNORE
from mmtune.tuning.penalty import RetentionMask, retention_mask

if TYPE_CHECKING:
    from mmtune.data.batches import Batch
    from mmtune.parts.model import VisionLanguageModel
    from mmtune.tuning.shards import Shards

SAMPLES = 32  # that the penalty's mask is measured on
MEASURED = ("activation", "gradient")  # kinds of a penalty that need it

Pieces = dict[str, torch.Tensor]


# ---- Of the entries of A and B ---------------------------------------------------------------------------


class Magnitude:
    """Scores are |w|, as it is when the support is cut.

    tensors: the parameters by name, whole as they were attached. seed: the run's, known when it starts.
    """

    kept = ""  # what `pieces` are called in a checkpoint
    seed = 0

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        self.tensors = tensors
        self.pieces: Pieces = {}

    def bind(self, shards: Shards, tensors: Mapping[str, nn.Parameter]) -> None:
        """Called once parameters lie where they will train. tensors: the parameters as they are now."""
        self.shards, self.tensors = shards, tensors

    def after_backward(self) -> None:
        """Called between the last backward pass of a step and the step, until the support is cut."""

    def score(self, name: str) -> torch.Tensor:
        """Whole, in the tensor's shape. Every process asks, in the same order."""
        return self.shards.whole(self.tensors[name]).abs()

    def forget(self) -> None:
        """Called once the support is cut."""
        self.pieces = {}

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{self.kept}.{name}": self.shards.whole(self.tensors[name], piece)
            for name, piece in self.pieces.items()
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, piece in self.pieces.items():
            piece.copy_(self.shards.piece(self.tensors[name], state[f"{self.kept}.{name}"]))


class Movement(Magnitude):
    """Scores are |w - w0|. Costs a copy of A and B until the support is cut."""

    kept = "start"

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__(tensors)
        self.pieces = {name: parameter.detach().float().clone() for name, parameter in tensors.items()}

    def bind(self, shards: Shards, tensors: Mapping[str, nn.Parameter]) -> None:
        super().bind(shards, tensors)
        self.pieces = {
            name: shards.piece(self.tensors[name], whole.to(self.tensors[name].device)).clone()
            for name, whole in self.pieces.items()
        }

    def score(self, name: str) -> torch.Tensor:
        parameter = self.tensors[name]
        return self.shards.whole(parameter, self.shards.local(parameter) - self.pieces[name]).abs()


class Gradient(Magnitude):
    """Scores are sums of |w dL/dw|. Costs as much as A and B until the support is cut; sends nothing."""

    kept = "gradient"

    def bind(self, shards: Shards, tensors: Mapping[str, nn.Parameter]) -> None:
        super().bind(shards, tensors)
        self.pieces = {
            name: torch.zeros_like(shards.local(parameter)) for name, parameter in self.tensors.items()
        }

    def after_backward(self) -> None:
        for name, piece in self.pieces.items():
            parameter = self.tensors[name]
            piece += (self.shards.local(parameter) * self.shards.gradient(parameter)).abs()

    def score(self, name: str) -> torch.Tensor:
        return self.shards.whole(self.tensors[name], self.pieces[name])


class Drawn(Magnitude):
    """Scores are places in an order drawn from a seed and the tensor's name, apart from all else drawn."""

    def score(self, name: str) -> torch.Tensor:
        parameter = self.tensors[name]
        return drawn(self.shards.shape(parameter), f"{self.seed}/{name}").to(parameter.device)


def drawn(shape: torch.Size, seed: str) -> torch.Tensor:
    """The numbers from 1 on in a drawn order, int64."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order = torch.randperm(shape.numel(), generator=generator)
    scores = torch.empty_like(order)
    scores[order] = torch.arange(len(order), 0, -1)
    return scores.view(shape)


def support_importance(kind: str, tensors: Mapping[str, nn.Parameter]) -> Magnitude:
    """The scores of an option `support`; tensors as attached, before the first step."""
    kinds = {"magnitude": Magnitude, "movement": Movement, "gradient": Gradient, "random": Drawn}
    return kinds[kind](tensors)


# ---- Of the entries of a frozen W ------------------------------------------------------------------------


class ColumnMask(RetentionMask):
    """M from |W_ij| c_j: one more vector [q] beside the weight (p x q), however it is stored."""

    def __init__(self, weight: torch.Tensor, columns: torch.Tensor, omega: float = 1.0) -> None:
        self.plain = retention_mask(weight, omega)
        self.whole_rows = self.plain.whole_rows
        # Only ratios of scores count; on this scale their squares stay in the range of fp32.
        self.columns = columns / columns.max().clamp_min(torch.finfo(columns.dtype).tiny)
        super().__init__(weight, omega)

    def _shape(self) -> torch.Size:
        return self.plain.shape

    def importance(self, out: torch.Tensor, rows: slice, columns: slice) -> None:
        self.plain.importance(out, rows, columns)
        out.mul_(self.columns[columns].to(out.dtype))


class Measured:
    """What is measured of one linear layer: `score` is the sum of squares of each input [q] (`activation`),
    fp64, or the sum of |W dL/dW| [p, q] (`gradient`), fp32.

    module: whose input and output are the layer's, adapter and all. weight: p x q; may be quantised where
    activations are measured.
    """

    def __init__(self, kind: str, module: nn.Module, weight: torch.Tensor) -> None:
        self.kind = kind
        self.module = module
        self.weight = weight.detach()
        shape = (module.out_features, module.in_features)
        gradient = kind == "gradient"
        self.score = torch.zeros(
            shape if gradient else shape[1:],  # type: ignore[arg-type]
            dtype=torch.float32 if gradient else torch.float64,
            device=weight.device,
        )

    def mask(self, omega: float) -> RetentionMask:
        """M from the scores."""
        if self.kind == "gradient":
            return RetentionMask(self.score, omega)
        return ColumnMask(self.weight, self.score.sqrt(), omega)

    def watch(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """A forward hook."""
        x = inputs[0].detach().flatten(0, -2).float()
        if self.kind == "activation":
            self.score += x.square().sum(0, dtype=torch.float64)
        else:

            def add(gradient: torch.Tensor) -> None:
                of_weight = gradient.flatten(0, -2).float().T @ x
                self.score += of_weight.mul_(self.weight).abs_()

            output.register_hook(add)


def measure(
    model: VisionLanguageModel, watched: Sequence[Measured], batches: Iterable[Batch], precision: torch.dtype
) -> None:
    """Fills each `score`. batches: of one sample each. precision: that of training, float32 or bfloat16.

    Before any engine has the model: every process does all of it, so all find the same, and nothing is sent.
    `gradient` costs an fp32 matrix per layer and one more at a time. Leaves no gradient and draws no random
    number.
    """
    training = model.training
    model.eval()
    backward = any(one.kind == "gradient" for one in watched)
    device = next(model.parameters()).device
    for batch in batches:
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
        with _watching(watched), torch.set_grad_enabled(backward), mixed:
            loss = model(batch.to(device))
        if backward:
            assert batch.labels is not None
            (loss / (batch.labels[:, 1:] != IGNORE).sum()).backward()
            model.zero_grad(set_to_none=True)
    model.train(training)


def chosen(count: int, seed: int) -> list[int]:
    """Which of `count` samples the mask is measured on: a function of its arguments alone."""
    return random.Random(f"{seed}/importance").sample(range(count), min(SAMPLES, count))


@contextmanager
def _watching(watched: Sequence[Measured]) -> Iterator[None]:
    handles = [one.module.register_forward_hook(one.watch) for one in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
