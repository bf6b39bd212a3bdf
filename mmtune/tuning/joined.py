"""Penalties on weights, in closed form: they join the task's gradients in a step's last backward pass.

They depend on no data, so once per optimiser step is enough; and where the processes' gradients are averaged
anyway, each process computes its share of the modules and adds it `count` times: the mean makes the whole of
it, exactly, and nothing else is sent. Where frozen weights are split, each computes its share of every
module, and what is sent has the adapters' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.tuning.importance import MEASURED, Measured
from mmtune.tuning.penalty import RetentionMask, retention_mask, update_penalties
from mmtune.tuning.segments import Rows, Segment, make_masks
from mmtune.tuning.shards import even

if TYPE_CHECKING:
    from mmtune.tuning.base import PenaltyOptions
    from mmtune.tuning.shards import Shards

MOST_ENTRIES = 1 << 20  # of a weight that the contrast of its mask is taken over

Pair = tuple[nn.Parameter, nn.Parameter]


class WeightPenalty:
    """What both kinds share. `ready` holds, between the two calls, what joins each parameter's gradient, in
    the form and with the factor that `Shards.on_gradient` asks for. `measured`: what the masks are made from
    where that is not the weights alone, by the weights' names.
    """

    shards: Shards

    def __init__(self, options: PenaltyOptions) -> None:
        self.options = options
        self.measured: dict[str, Measured] = {}
        self.ready: dict[nn.Parameter, torch.Tensor] = {}
        self.kept: dict[nn.Parameter, torch.Tensor] = {}

    def frozen(self) -> dict[str, torch.Tensor]:
        """The weights that the masks are of, by name, whole; before an engine has the model."""
        raise NotImplementedError

    def watch(self, layers: Mapping[str, nn.Module], part: str) -> None:
        """Says whose inputs and outputs each weight of `frozen` has, where the masks are made from these.

        Raises UserError where that is no linear layer, or quantised weights have no gradient.
        """
        kind = self.options.kind
        if kind not in MEASURED:
            return
        for name, weight in self.frozen().items():
            plain = weight.is_floating_point() or kind == "activation"
            if not hasattr(layers[name], "in_features") or not plain:
                raise UserError(
                    f"{kind} cannot be measured of {name}: no linear layer, or its weights are quantised",
                    where=f"tune.{part}.penalty.kind",
                    mend="Use kind: conflict, or name other modules in penalty.modules.",
                )
            self.measured[name] = Measured(kind, layers[name], weight)

    def mask(self, name: str, weight: torch.Tensor) -> RetentionMask:
        """M of one of them."""
        if name in self.measured:
            return self.measured[name].mask(self.options.omega)
        return retention_mask(weight, self.options.omega, self.options.kind == "constant")

    def contrasts(self) -> dict[str, float]:
        """The standard deviation of M over its mean, by name: 0 where all entries are weighed alike.

        Of a large weight some rows stand for all, evenly spread.
        """
        return {name: contrast(self.mask(name, weight)) for name, weight in self.frozen().items()}

    def state(self) -> dict[str, torch.Tensor]:
        """What was measured, where it is small; the rest a resumed run measures again."""
        return {f"{one.kind}.{name}": one.score for name, one in self.measured.items() if one.score.ndim == 1}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` gave."""
        for name, one in self.measured.items():
            if one.score.ndim == 1:
                one.score.copy_(state[f"{one.kind}.{name}"])

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
            total = shards.gradient(parameter)
            mine = self.kept.get(parameter)
            if shards.before_mean and shards.count > 1:
                shape = shards.shape(parameter)
                mine = total.new_zeros(shape) if mine is None else mine.to(total.dtype, copy=True)
                mine = shards.sum(mine) / shards.count
            assert mine is not None
            if shards.before_mean:
                mine = shards.piece(parameter, mine)
            if parameter in masks:
                mine = mine.masked_fill(~shards.piece(parameter, masks[parameter]), 0)
            penalty.append(mine.double().square().sum())
            task.append((total.double() - mine).square().sum())
        self.kept = {}
        both = torch.stack([torch.stack(penalty).sum(), torch.stack(task).sum()])
        found = (shards.sum(both) if shards.split else both).tolist()
        return found[0], found[1]

    def _join(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        mine = self.ready.pop(parameter, None)
        return gradient if mine is None else gradient + mine.to(gradient.dtype)


class UpdatePenalty(WeightPenalty):
    """alpha times the mean (or sum) of ||M * (B A)||_F over modules.

    pair: A and B of each module by name, as they are now. weight: its frozen weight, likewise. scaling: alpha
    / r of all of them.
    """

    def __init__(
        self,
        options: PenaltyOptions,
        names: list[str],
        pair: Callable[[str], Pair],
        weight: Callable[[str], torch.Tensor],
        scaling: float,
    ) -> None:
        super().__init__(options)
        self.factor = options.factor(len(names), scaling)
        self.names = names
        self.pair = pair
        self.weight = weight
        self.masks: dict[str, RetentionMask] = {}
        self.segments: dict[str, Segment | Rows] = {}

    def frozen(self) -> dict[str, torch.Tensor]:
        return {name: self.weight(name) for name in self.names}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name in self.names for parameter in self.pair(name)]

    def make_ready(self) -> torch.Tensor:
        if self.shards.weights_split:
            return self._make_ready_together()
        shards, factor = self.shards, self.factor
        if not self.masks:
            sizes = {name: self.weight(name).numel() for name in self.names}
            for name in dealt(sizes, shards.count)[shards.rank]:
                self.masks[name] = self.mask(name, self.weight(name))
        values = [torch.zeros((), device=self.pair(self.names[0])[0].device)]
        pairs = [self.pair(name) for name in self.masks]
        made = update_penalties(list(self.masks.values()), pairs)
        for (a, b), (value, grad_a, grad_b) in zip(pairs, made, strict=True):
            values.append(factor * value)
            self.ready[a] = grad_a.mul_(factor * shards.count)
            self.ready[b] = grad_b.mul_(factor * shards.count)
        return torch.stack(values).sum()

    def _make_ready_together(self) -> torch.Tensor:
        """Every process does every module, with the entries of W that lie on it."""
        shards = self.shards
        if not self.segments:
            self._cut_masks()
        do = self._add_shares if shards.before_mean else self._add_rows
        sizes = {name: shards.shape(self.pair(name)[0]).numel() for name in self.names}
        values = [do(names) for names in bundles(sizes)]
        return self.factor * torch.stack(values).sum() / shards.count

    def _cut_masks(self) -> None:
        shards, omega, constant = self.shards, self.options.omega, self.options.kind == "constant"
        cut = []
        for name in self.names:
            weight = self.weight(name)
            found = None if name in self.measured else shards.segment(weight)
            if found is not None:
                cut.append(Segment(*found, shards.shape(weight)))
                self.segments[name] = cut[-1]
            else:  # quantised, or what was measured of it: whole on every process
                mask = self.mask(name, weight)
                self.segments[name] = Rows(mask, even(mask.shape[0], shards.rank, shards.count))
        if cut:
            make_masks(cut, omega, constant, shards.sum)

    def _add_shares(self, names: list[str]) -> torch.Tensor:
        """For gradients that are averaged later: a process adds its share `count` times. Returns sum(N)."""
        shards, pairs = self.shards, [self.pair(name) for name in names]
        wholes = shards.wholes([parameter for pair in pairs for parameter in pair])
        shares, squares = [], []
        for name, a, b in zip(names, wholes[::2], wholes[1::2], strict=True):
            segment = self.segments[name]
            b_g, g_a = segment.products(a, b[segment.rows])
            squares.append((b[segment.rows] * g_a).sum())
            shares.append((b_g, torch.zeros_like(b)))
            shares[-1][1][segment.rows] = g_a
        norms = shards.sum(torch.stack(squares)).clamp_min(0).sqrt()
        for pair, share, scale in zip(pairs, shares, self._scales(norms) * shards.count, strict=True):
            for parameter, gradient in zip(pair, share, strict=True):
                self.ready[parameter] = gradient.mul_(scale)
        return norms.sum()

    def _add_rows(self, names: list[str]) -> torch.Tensor:
        """For gradients that are averaged and cut into rows: those of B stay where their rows of W are, those
        of A are summed. Returns the sum of N.
        """
        shards, pairs = self.shards, [self.pair(name) for name in names]
        found, squares = [], []
        for name, (_, b), a in zip(names, pairs, shards.wholes([a for a, _ in pairs]), strict=True):
            rows = shards.local(b)
            b_g, g_a = self.segments[name].products(a, rows)
            squares.append((rows * g_a).sum())
            found.append((b_g, g_a))
        together = shards.sum(torch.cat([*(b_g.flatten() for b_g, _ in found), torch.stack(squares)]))
        norms = together[-len(names) :].clamp_min(0).sqrt()
        sums = together[: -len(names)].split([b_g.numel() for b_g, _ in found])
        for (a, b), (b_g, g_a), flat, scale in zip(pairs, found, sums, self._scales(norms), strict=True):
            self.ready[a] = shards.piece(a, flat.view_as(b_g)) * scale
            self.ready[b] = g_a.mul_(scale)
        return norms.sum()

    def _scales(self, norms: torch.Tensor) -> torch.Tensor:
        return torch.where(norms > 0, self.factor / norms, torch.zeros_like(norms))


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

    def frozen(self) -> dict[str, torch.Tensor]:
        return self.initial

    def parameters(self) -> list[nn.Parameter]:
        return [self.current(name) for name in self.initial]

    def make_ready(self) -> torch.Tensor:
        shards, factor = self.shards, self.options.factor(len(self.initial))
        if not self.pieces:
            for name, initial in self.initial.items():
                parameter = self.current(name)
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                square = self.mask(name, initial.to(dtype)).squared(slice(None), dtype)
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

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **{f"initial.{name}": initial for name, initial in self.initial.items()}}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes W0, too, from a checkpoint: the weights of a resumed run are no longer what it began with."""
        super().load_state(state)
        for name, mine in self.initial.items():
            mine.copy_(state[f"initial.{name}"])
        self.pieces = {}


def bundles(sizes: Mapping[str, int], most: int = 1 << 24) -> list[list[str]]:
    """The names in their order, in runs whose sizes add up to no more than `most` (64 MiB of fp32), or of one
    name: what is gathered and summed at a time.
    """
    made: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not made:
            made.append([])
            room = most
        made[-1].append(name)
        room -= size
    return made


def contrast(mask: RetentionMask) -> float:
    """The standard deviation of M over its mean, 0 where M is 0; over some `MOST_ENTRIES` entries at most."""
    rows, columns = mask.shape
    step = max(1, rows * columns // MOST_ENTRIES)
    values = torch.cat([mask.squared(slice(row, row + 1)) for row in range(0, rows, step)]).double().sqrt()
    mean = values.mean()
    return float(values.std(correction=0) / mean) if mean > 0 else 0.0


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
