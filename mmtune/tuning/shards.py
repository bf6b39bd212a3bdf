"""Where trained parameters lie: what of their values, moments and gradients is on this process.

Tuners look at whole tensors where they have to choose (which entries stay) and work on local pieces
everywhere else, so that holding a support costs no communication on any engine. An engine that splits
tensors has a class of its own with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

Change = Callable[[torch.Tensor], torch.Tensor]


def even(rows: int, rank: int, count: int) -> slice:
    """The rows that one of `count` processes has: as many as others, but the last ones fewer or none."""
    step = -(-rows // count)
    return slice(min(rank * step, rows), min((rank + 1) * step, rows))


class Shards:
    """All of every tensor on every process: one process alone, and DDP.

    rank, count: of the processes. split: whether `local` is only a part of a parameter. before_mean:
    whether `on_gradient` comes before the processes' mean is taken, so that what one of them alone adds
    has to be multiplied by `count`. weights_split: whether a frozen weight, too, lies on them in parts.
    """

    split = False
    before_mean = True
    weights_split = False

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, rank: int = 0, count: int = 1) -> None:
        self.optimizer = optimizer
        self.rank = rank
        self.count = count

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        """A parameter's own shape, also where only a piece of it is here."""
        return parameter.shape

    # ---- Pieces: no process waits for another -----------------------------------------------------------

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """The values that the optimiser updates on this process, to read and to write; may be empty.

        Under ZeRO they are the fp32 master's, and flat.
        """
        return parameter.data

    def piece(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """What of a tensor of the parameter's own shape lies where `local` does, in `local`'s shape."""
        return whole

    def spread(self, parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's own shape: this process's piece, and 0 elsewhere."""
        return piece

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Adam's moments by name, each like `local`, to read and to write; none before the first step."""
        state = self.saved_moments(parameter)
        return {name: tensor for name, tensor in state.items() if tensor.shape == parameter.shape}

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """The processes' mean gradient, like `local`; between the last backward pass and the step."""
        assert parameter.grad is not None
        return parameter.grad

    def zero_outside(self, parameter: nn.Parameter, mask: torch.Tensor) -> None:
        """Zeroes the entries where `mask`, of the parameter's own shape, is False: those that the optimiser
        updates, and those that the next forward pass sees.
        """
        self.local(parameter).masked_fill_(~self.piece(parameter, mask), 0)

    def on_gradient(self, parameter: nn.Parameter, change: Change) -> None:
        """From now on a gradient of the parameter is what `change` makes of it, before it is clipped.

        `change` is called in each backward pass, or, where `before_mean` is False, once in a step.
        """
        parameter.register_hook(change)

    def as_gradient(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """What of a tensor of the parameter's own shape stands for what `change` gets in `on_gradient`."""
        return whole

    def segment(self, weight: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """What of a frozen weight lies on this process: its entries one after the other [n], n may be 0, and
        the place of the first among all. None where the whole of it does.
        """
        return None

    @contextmanager
    def seen_as(self, values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
        """A context in which forward passes see these values, each of its parameter's own shape, instead."""
        own = {parameter: parameter.data for parameter in values}
        for parameter, value in values.items():
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in own.items():
                parameter.data = value

    # ---- Together: every process calls these, in the same order -----------------------------------------

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values

    def whole(self, parameter: nn.Parameter, piece: torch.Tensor | None = None) -> torch.Tensor:
        """The parameter's values, or what the processes' pieces make together, in its own shape."""
        piece = self.local(parameter) if piece is None else piece
        return self.sum(self.spread(parameter, piece)) if self.split else piece

    def wholes(
        self, parameters: Sequence[nn.Parameter], pieces: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """`whole` of each, in as few messages as the engine can."""
        found = [None] * len(parameters) if pieces is None else pieces
        return [self.whole(parameter, piece) for parameter, piece in zip(parameters, found, strict=True)]

    def frozen(self, parameter: nn.Parameter) -> torch.Tensor:
        """A weight that does not train, whole."""
        return parameter.data

    def saved_moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """What the optimiser knows of a parameter, by name and whole, Adam's `step` among it."""
        assert self.optimizer is not None
        return dict(self.optimizer.state.get(parameter, {}))

    def load_moments(self, parameter: nn.Parameter, saved: Mapping[str, torch.Tensor]) -> None:
        """Restores what `saved_moments` gave."""
        assert self.optimizer is not None
        self.optimizer.state[parameter] = {
            name: tensor.to(parameter.device if tensor.ndim else "cpu") for name, tensor in saved.items()
        }
