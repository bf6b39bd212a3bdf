"""Where trained parameters lie under FSDP2: each process has some rows of every tensor, frozen ones too.

Parameters, moments and gradients are DTensors cut along their first dimension into `count` runs of equally
many rows; the last runs are shorter or empty where the rows do not come out even.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mmtune.tuning.shards import Change, Shards, even


class FsdpShards(Shards):
    """Values, moments and gradients as rows; a gradient is changed once in a step, when its mean is taken."""

    split = True
    before_mean = False
    weights_split = True

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        return _here(parameter.data)

    def piece(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        return whole[even(whole.shape[0], self.rank, self.count)]

    def spread(self, parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
        whole = piece.new_zeros(parameter.shape)
        self.piece(parameter, whole).copy_(piece)
        return whole

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self._state(parameter)
        return {name: _here(tensor) for name, tensor in state.items() if tensor.shape == parameter.shape}

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        return _here(parameter.grad)

    def on_gradient(self, parameter: nn.Parameter, change: Change) -> None:
        def changed(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            rows = _here(parameter.grad)
            rows.copy_(change(rows))

        # FSDP2 calls these itself, on the processes' mean.
        parameter.register_post_accumulate_grad_hook(changed)

    def as_gradient(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        return self.piece(parameter, whole)

    @contextmanager
    def seen_as(self, values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
        own = {parameter: self.local(parameter).clone() for parameter in values}
        for parameter, value in values.items():
            self.local(parameter).copy_(self.piece(parameter, value))
        try:
            yield
        finally:
            for parameter, rows in own.items():
                self.local(parameter).copy_(rows)

    def segment(self, weight: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        if not isinstance(weight, DTensor):
            return None
        first = even(weight.shape[0], self.rank, self.count).start
        return _here(weight.data).reshape(-1), first * (weight.numel() // weight.shape[0])

    def whole(self, parameter: nn.Parameter, piece: torch.Tensor | None = None) -> torch.Tensor:
        return self.wholes([parameter], None if piece is None else [piece])[0]

    def wholes(
        self, parameters: Sequence[nn.Parameter], pieces: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        pieces = [self.local(parameter) for parameter in parameters] if pieces is None else pieces
        sizes = [even(p.shape[0], 0, self.count).stop * (p.numel() // p.shape[0]) for p in parameters]
        mine = pieces[0].new_zeros(sum(sizes))
        for place, piece in zip(mine.split(sizes), pieces, strict=True):
            place[: piece.numel()].copy_(piece.reshape(-1))
        all_of_them = mine.new_empty(self.count, sum(sizes))
        dist.all_gather_into_tensor(all_of_them.view(-1), mine)
        return [
            column.reshape(-1)[: parameter.numel()].view(parameter.shape)
            for column, parameter in zip(all_of_them.split(sizes, dim=1), parameters, strict=True)
        ]

    def frozen(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.whole(parameter) if isinstance(parameter.data, DTensor) else parameter.data

    def saved_moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        return {
            name: self.whole(parameter, _here(tensor)) if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._state(parameter).items()
        }

    def load_moments(self, parameter: nn.Parameter, saved: Mapping[str, torch.Tensor]) -> None:
        assert self.optimizer is not None
        self.optimizer.state[parameter] = {
            name: self._like(parameter, tensor) if tensor.shape == parameter.shape else tensor.cpu()
            for name, tensor in saved.items()
        }

    def _state(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        assert self.optimizer is not None
        return self.optimizer.state.get(parameter, {})

    def _like(self, parameter: nn.Parameter, whole: torch.Tensor) -> DTensor:
        data = parameter.data
        assert isinstance(data, DTensor)
        rows = self.piece(parameter, whole).to(data.device, copy=True)
        return DTensor.from_local(
            rows, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
        )


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a DTensor that lie on this process, sharing its memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local().detach()
