"""Where trained parameters lie under DeepSpeed ZeRO: what is updated is a flat piece of each, in fp32.

Written for what `training/zero.py` sets up: weights that train are fp32 in the model, nothing is offloaded.
Then DeepSpeed's masters and moments are plain tensors of this process, and what is here are views of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmtune.tuning.shards import Shards

STEP = "step"  # Adam's counter, the one part of its state that is no tensor of the parameter's shape


class FlatShards(Shards):
    """What all stages share: a local piece is a span of the flattened parameter.

    engine: DeepSpeed's, already made.
    """

    split = True

    def __init__(self, engine: Any, rank: int, count: int) -> None:
        self.zero = engine.optimizer
        super().__init__(self.zero.optimizer, rank, count)

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        raise NotImplementedError

    def span(self, parameter: torch.Tensor) -> slice:
        """Which entries of the flattened parameter are this process's; it may be none."""
        raise NotImplementedError

    def master(self, parameter: nn.Parameter) -> tuple[torch.Tensor, slice]:
        """The flat fp32 tensor that the optimiser knows, and where in it this parameter's span lies."""
        raise NotImplementedError

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        flat, place = self.master(parameter)
        return flat.detach()[place]

    def piece(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        return whole.reshape(-1)[self.span(parameter)]

    def spread(self, parameter: nn.Parameter, piece: torch.Tensor) -> torch.Tensor:
        shape = self.shape(parameter)
        flat = piece.new_zeros(shape.numel())
        flat[self.span(parameter)] = piece
        return flat.view(shape)

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        flat, place = self.master(parameter)
        state = self._state(flat)
        return {name: tensor[place] for name, tensor in state.items() if name != STEP}

    def saved_moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        found = {name: self.whole(parameter, piece) for name, piece in self.moments(parameter).items()}
        state = self._state(self.master(parameter)[0])
        return found | {STEP: state[STEP].clone()} if state else {}

    def load_moments(self, parameter: nn.Parameter, saved: Mapping[str, torch.Tensor]) -> None:
        assert self.optimizer is not None
        flat, place = self.master(parameter)
        state = self.optimizer.state[flat]
        for name, tensor in saved.items():
            if name == STEP:
                state[STEP] = tensor.clone()
            else:
                state.setdefault(name, torch.zeros_like(flat, requires_grad=False))
                state[name][place] = self.piece(parameter, tensor).to(flat.device)

    def _state(self, flat: torch.Tensor) -> Mapping[str, torch.Tensor]:
        assert self.optimizer is not None
        return self.optimizer.state.get(flat, {})


class ZeroShards(FlatShards):
    """ZeRO-1 and ZeRO-2: weights lie whole on every process; each updates a piece of every group."""

    def __init__(self, engine: Any, rank: int, count: int) -> None:
        super().__init__(engine, rank, count)
        self.group = {p: i for i, group in enumerate(self.zero.bit16_groups) for p in group}

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each of the optimiser's groups."""
        return list(self.zero.bit16_groups)

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        return parameter.shape

    def span(self, parameter: torch.Tensor) -> slice:
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        return _slice(found.lp_fragment_address) if found else slice(0, 0)

    def master(self, parameter: nn.Parameter) -> tuple[torch.Tensor, slice]:
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        flat = self.zero.single_partition_of_fp32_groups[self.group[parameter]]
        return flat, _slice(found.hp_fragment_address) if found else slice(0, 0)

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        found = parameter._hp_mapping  # type: ignore[attr-defined]
        if not found:
            return parameter.data.new_empty(0)
        gradient = found.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return gradient.reshape(-1)

    def zero_outside(self, parameter: nn.Parameter, mask: torch.Tensor) -> None:
        super().zero_outside(parameter, mask)
        parameter.data.masked_fill_(~mask, 0)  # every process's whole copy: nothing has to be sent


class Zero3Shards(FlatShards):
    """ZeRO-3: every weight lies in flat pieces, also those that don't train; forward and backward passes
    gather them, and small ones (`stage3_param_persistence_threshold`) stay whole.
    """

    weights_split = True

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each of the optimiser's groups."""
        assert self.optimizer is not None
        found: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        for i, parameters in enumerate(self.zero.fp16_groups):
            found[self.zero.sub_group_to_group_id[i]] += parameters
        return found

    def shape(self, parameter: torch.Tensor) -> torch.Size:
        return parameter.ds_shape  # type: ignore[attr-defined]

    def span(self, parameter: torch.Tensor) -> slice:
        total, each = parameter.ds_numel, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        return slice(min(self.rank * each, total), min((self.rank + 1) * each, total))

    def master(self, parameter: nn.Parameter) -> tuple[torch.Tensor, slice]:
        group, start, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        span = self.span(parameter)
        return self.zero.fp32_partitioned_groups_flat[group], slice(start, start + span.stop - span.start)

    def segment(self, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        span = self.span(weight)
        return weight.ds_tensor.data[: span.stop - span.start], span.start  # type: ignore[attr-defined]

    def wholes(
        self, parameters: Sequence[nn.Parameter], pieces: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        if pieces is None and all(_is_gathered(parameter) for parameter in parameters):
            return [parameter.data for parameter in parameters]
        pieces = [self.local(parameter) for parameter in parameters] if pieces is None else pieces
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]  # type: ignore[attr-defined]
        mine = pieces[0].new_zeros(sum(sizes))
        for place, piece in zip(mine.split(sizes), pieces, strict=True):
            place[: len(piece)] = piece
        found = mine.new_empty(self.count, sum(sizes))
        dist.all_gather_into_tensor(found.view(-1), mine)
        shapes = [self.shape(parameter) for parameter in parameters]
        return [
            columns.reshape(-1)[: shape.numel()].view(shape)
            for columns, shape in zip(found.split(sizes, dim=1), shapes, strict=True)
        ]

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_grad

        span = self.span(parameter)
        return safe_get_local_grad(parameter)[: span.stop - span.start]

    def zero_outside(self, parameter: nn.Parameter, mask: torch.Tensor) -> None:
        super().zero_outside(parameter, mask)
        self.segment(parameter)[0].masked_fill_(~self.piece(parameter, mask), 0)
        if _is_gathered(parameter):
            parameter.data.masked_fill_(~mask, 0)

    @contextmanager
    def seen_as(self, values: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
        own = {p: (self.segment(p)[0].clone(), p.data.clone()) for p in values}
        for p, value in values.items():
            self._show(p, self.piece(p, value), value)
        try:
            yield
        finally:
            for p, (piece, gathered) in own.items():
                self._show(p, piece, gathered)

    def _show(self, parameter: nn.Parameter, piece: torch.Tensor, whole: torch.Tensor) -> None:
        """Puts values where forward passes take them from: this process's piece, or the gathered whole."""
        self.segment(parameter)[0].copy_(piece)
        if _is_gathered(parameter):
            if whole.numel() == parameter.numel():
                parameter.data.copy_(whole)
            else:
                parameter.partition()  # type: ignore[attr-defined]

    def frozen(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.whole(parameter, self.segment(parameter)[0])


def _slice(address: Any) -> slice:
    return slice(address.start, address.start + address.numel)


def _is_gathered(parameter: nn.Parameter) -> bool:
    """Whether a weight of ZeRO-3 lies whole on this process now, beside the pieces."""
    return parameter.numel() == parameter.ds_numel  # type: ignore[attr-defined]
