"""Penalties on weights, in closed form: they join the task's gradients in a step's last backward pass.

They depend on no data, so once per optimiser step is enough; and where the processes' gradients are averaged
anyway, each process computes its share of the modules and adds it `count` times: the mean makes the whole of
it, exactly, and nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmtune.tuning.penalty import RetentionMask, retention_mask, update_penalty

if TYPE_CHECKING:
    from mmtune.tuning.base import PenaltyOptions
    from mmtune.tuning.shards import Shards

Pair = tuple[nn.Parameter, nn.Parameter]


class WeightPenalty:
    """What both kinds share. `ready` holds, between the two calls, what joins each parameter's gradient, in
    the form and with the factor that `Shards.on_gradient` asks for.
    """

    shards: Shards

    def __init__(self, options: PenaltyOptions) -> None:
        self.options = options
        self.ready: dict[nn.Parameter, torch.Tensor] = {}
        self.kept: dict[nn.Parameter, torch.Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def make_ready(self) -> torch.Tensor:
        """Fills `ready`; returns this process's share of the weighted penalty."""
        raise NotImplementedError

    def bind(self, shards: Shards) -> None:
        self.shards = shards
        for parameter in self.parameters():
            shards.on_gradient(parameter, partial(self._join, parameter))

    def before_backward(self, keep: bool) -> torch.Tensor:
        """As `Tuner.before_backward`."""
        value = self.make_ready()
        self.kept = dict(self.ready) if keep else {}
        return value

    def after_backward(self) -> None:
        """Raises RuntimeError where a gradient that was ready did not join any."""
        if self.ready:
            raise RuntimeError(f"the penalty's gradients of {len(self.ready)} tensors joined no others")

    def gradient_norms(self, masks: Mapping[nn.Parameter, torch.Tensor]) -> tuple[float, float]:
        """As `Tuner.gradient_norms`; masks: of the parameters whose gradients are cut to a support."""
        shards = self.shards
        penalty, task = [], []
        for parameter in self.parameters():
            total = shards.whole(parameter, shards.gradient(parameter))
            mine = self.kept.get(parameter)
            if not shards.before_mean:
                assert mine is not None
                mine = shards.whole(parameter, mine)
            elif shards.count > 1:
                mine = torch.zeros_like(total) if mine is None else mine.clone()
                mine = shards.sum(mine) / shards.count
            assert mine is not None
            if parameter in masks:
                mine = mine.masked_fill(~masks[parameter], 0)
            penalty.append(mine.double().square().sum())
            task.append((total.double() - mine).square().sum())
        self.kept = {}
        both = torch.stack([torch.stack(penalty).sum(), torch.stack(task).sum()]).tolist()
        return both[0], both[1]

    def _join(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        mine = self.ready.pop(parameter, None)
        return gradient if mine is None else gradient + mine.to(gradient.dtype)


class UpdatePenalty(WeightPenalty):
    """alpha times the mean of ||M * (B A)||_F over modules.

    pairs: A and B of each module by name, as they are now. weights: its frozen weight, likewise.
    """

    def __init__(
        self,
        options: PenaltyOptions,
        names: list[str],
        pair: Callable[[str], Pair],
        weight: Callable[[str], torch.Tensor],
    ) -> None:
        super().__init__(options)
        self.names = names
        self.pair = pair
        self.weight = weight
        self.masks: dict[str, RetentionMask] = {}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name in self.names for parameter in self.pair(name)]

    def make_ready(self) -> torch.Tensor:
        shards, factor = self.shards, self.options.weight / len(self.names)
        if not self.masks:
            sizes = {name: self.weight(name).numel() for name in self.names}
            for name in dealt(sizes, shards.count)[shards.rank]:
                constant = self.options.kind == "constant"
                self.masks[name] = retention_mask(self.weight(name), self.options.omega, constant)
        values = [torch.zeros((), device=self.pair(self.names[0])[0].device)]
        for name, mask in self.masks.items():
            a, b = self.pair(name)
            value, grad_a, grad_b = update_penalty(mask, a, b)
            values.append(factor * value)
            self.ready[a] = grad_a.mul_(factor * shards.count)
            self.ready[b] = grad_b.mul_(factor * shards.count)
        return torch.stack(values).sum()


class DriftPenalty(WeightPenalty):
    """beta times the mean of ||M0 * (W - W0)||_F over matrices that train in full.

    initial: W0 of each by name, whole. current: the parameter itself, as it is now.
    """

    def __init__(
        self,
        options: PenaltyOptions,
        initial: dict[str, torch.Tensor],
        current: Callable[[str], nn.Parameter],
    ) -> None:
        super().__init__(options)
        self.initial = initial
        self.current = current
        self.pieces: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def parameters(self) -> list[nn.Parameter]:
        return [self.current(name) for name in self.initial]

    def make_ready(self) -> torch.Tensor:
        shards, factor = self.shards, self.options.weight / len(self.initial)
        if not self.pieces:
            for name, initial in self.initial.items():
                mask = retention_mask(initial, self.options.omega, self.options.kind == "constant")
                parameter = self.current(name)
                square = mask.squared(slice(None), torch.promote_types(parameter.dtype, torch.float32))
                self.pieces[name] = shards.piece(parameter, initial), shards.piece(parameter, square)
        drifts, weighted = [], []
        for name, (initial, square) in self.pieces.items():
            drifts.append(shards.local(self.current(name)) - initial)
            weighted.append(drifts[-1] * square)
        squares = torch.stack([(g * d).sum() for g, d in zip(weighted, drifts, strict=True)])
        norms = (shards.sum(squares) if shards.split else squares).clamp_min(0).sqrt()
        for name, g, norm in zip(self.pieces, weighted, norms, strict=True):
            parameter = self.current(name)
            g.mul_(torch.where(norm > 0, factor / norm, torch.zeros_like(norm)))
            if shards.split and shards.before_mean:
                g = shards.spread(parameter, g).mul_(shards.count)
            self.ready[parameter] = g
        return factor * norms.sum() / shards.count

    def load_initial(self, initial: Mapping[str, torch.Tensor]) -> None:
        """Takes W0 from a checkpoint: the weights of a resumed run are no longer what it began with."""
        for name, mine in self.initial.items():
            mine.copy_(initial[name])
        self.pieces = {}


def dealt(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The names dealt to `count` processes so that each has about as much: the largest first, each to whom
    has least; a function of its arguments alone.
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        to = loads.index(min(loads))
        shares[to].append(name)
        loads[to] += sizes[name]
    return shares
