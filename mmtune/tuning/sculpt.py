"""LoRASculpt: sparse LoRA. At `prune_at` each A and B keeps its largest entries and nothing else, ever.

Semantics: when `prune_at` optimiser steps are done, k = floor(density * numel) entries of largest
magnitude stay in each tensor (ties to the lowest index), the rest become zero in memory, so in the
next forward pass and in every file. Their Adam moments become zero too. From then on, with `hold: grad`,
their gradients are zero before clipping, so they cannot come back and do not weigh on the clip norm; with
`hold: project` they are zeroed after each step, and their gradients do.
Which entries stay is decided once, on whole tensors, by each process for itself from the same numbers;
holding them is done in place and sends nothing.
`support` says what "largest" is measured by: the entries themselves, how far they moved, their part in the
loss's gradient, or, as a control, nothing at all (tuning/importance.py); all else is the same.
Source: Liang et al., LoRASculpt, CVPR 2025, arXiv 2503.16843.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from mmtune.core.config import Report
from mmtune.core.errors import UserError
from mmtune.tuning.base import PenaltyOptions, Row, matching
from mmtune.tuning.lora import LoraTuner, check_lora

if TYPE_CHECKING:
    import torch

    from mmtune.parts.model import VisionLanguageModel
    from mmtune.tuning.shards import Shards


@dataclass
class SculptOptions:
    """LoRA's options and, beside them, density, prune_at, support and hold.

    density: the fraction kept of A and of B, one for all modules, or by their full names, with * for any part
    of a name; where several fit, the longest counts. prune_at: a number of optimiser steps, or a fraction of
    the run where it is below 1. support: which entries stay, those of largest `magnitude`, of largest
    `movement` from where they began, of largest `gradient` (the sum over the steps of |w dL/dw|), or as many
    `random` ones, drawn from the run's seed. hold: how the others stay zero, by their gradients (`grad`) or
    by zeroing them after each step (`project`).
    """

    lr: float
    tuner: Literal["lorasculpt"] = "lorasculpt"
    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    density: float | dict[str, float] = 0.1
    prune_at: float = 100
    support: Literal["magnitude", "movement", "gradient", "random"] = "magnitude"
    hold: Literal["grad", "project"] = "grad"
    penalty: PenaltyOptions | None = None

    def check(self, fault: Report) -> None:
        check_lora(self, fault)
        if self.lr == 0:
            fault("lr", "at rate 0 nothing moves, so there is nothing to prune")
        densities = self.density if isinstance(self.density, dict) else {"": self.density}
        for density in densities.values():
            if not 0 < density < 1:
                fault("density", f"expected more than 0 and less than 1, found {density}")
        if not densities:
            fault("density", "an empty mapping: nothing would be pruned")
        if self.prune_at <= 0 or (self.prune_at >= 1 and self.prune_at != int(self.prune_at)):
            fault("prune_at", f"expected a step (1 or more) or a fraction below 1, found {self.prune_at}")

    def make(self) -> SculptTuner:
        return SculptTuner(self)


class Product(NamedTuple):
    """The density of the support of one module's B A: as found, as predicted, and how far apart at most."""

    found: float
    expected: float
    bound: float


class SculptTuner(LoraTuner):
    """A LoRA whose support is cut once and then held."""

    def __init__(self, options: SculptOptions) -> None:
        super().__init__(options)
        self.prune_step = 0
        self.density: dict[str, float] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.products: list[Product] = []

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        if part != "language":
            raise UserError(
                f"lorasculpt prunes the language model only; the {part} is regularised, never pruned",
                where=f"tune.{part}.tuner",
                mend="Use full or lora there, with a penalty.",
            )
        from mmtune.tuning.importance import support_importance

        rows = super().attach(model, part)
        self.importance = support_importance(self.options.support, dict(self._tensors()))
        self.density = density_by_module(list(self.layers), self.options.density, f"tune.{part}.density")
        for row in rows:
            row.density = self.density.get(row.module)
        for name, parameter in self._tensors():
            density = self._density_of(name)
            if support_size(parameter.numel(), density) == 0:
                raise UserError(
                    f"density {density} keeps no entry of {name} ({parameter.numel()} entries)",
                    where=f"tune.{part}.density",
                    mend=f"Raise it to 1 / {parameter.numel()} or more.",
                )
        return rows

    def start(self, steps: int, seed: int) -> None:
        self.importance.seed = seed
        at = self.options.prune_at
        self.prune_step = int(at) if at >= 1 else math.ceil(round(at * steps, 6))
        if self.prune_step >= steps:
            raise UserError(
                f"prune_at is step {self.prune_step}, but the run ends after {steps}: no step would follow",
                where=f"tune.{self.part}.prune_at",
                mend="Prune earlier, or give a fraction of the run, for example 0.1.",
            )

    def bind(self, shards: Shards) -> None:
        super().bind(shards)
        self.importance.bind(shards, dict(self._tensors()))

    def after_backward(self) -> None:
        super().after_backward()
        if not self.masks:
            self.importance.after_backward()

    def after_step(self, step: int) -> None:
        if step == self.prune_step:
            self._prune(step)
        elif step > self.prune_step and self.options.hold == "project":
            self._zero_outside()

    def _prune(self, step: int) -> None:
        masks = {}
        for name, parameter in self._tensors():
            scores = self.importance.score(name)
            whole = self.shards.whole(parameter)
            if not whole.any() or not scores.any():
                of = f"the {self.options.support} of " if whole.any() else ""
                raise UserError(
                    f"{of}{name} is all zero at step {step}, so there is nothing to prune",
                    where=f"tune.{self.part}.prune_at",
                    mend="Prune later, once warm-up has moved the weights.",
                )
            masks[name] = largest(scores, self._density_of(name))
        self._hold(masks)
        self._zero_outside()
        for name, parameter in self._tensors():
            outside = ~self.shards.piece(parameter, masks[name])
            for moment in self.shards.moments(parameter).values():
                moment.masked_fill_(outside, 0)

    def _zero_outside(self) -> None:
        for name, parameter in self._tensors():
            self.shards.zero_outside(parameter, self.masks[name])

    def gradient_norms(self) -> tuple[float, float] | None:
        if self.weight_penalty is None:
            return None
        held = self.masks and self.options.hold == "grad"
        return self.weight_penalty.gradient_norms(
            {parameter: self.masks[name] for name, parameter in self._tensors()} if held else {}
        )

    def densities(self) -> dict[str, float]:
        """Densities of A and of B as they are, and of the support of B A next to what independence predicts:
        the means over the modules. `density_ba_bound`: further than that from the prediction chance leads at
        most 5 % of modules; `density_ba_outside`: how many are.
        """
        if not self.products:
            return {}
        a, b = (self._density(which) for which in ("lora_A", "lora_B"))
        found, expected, bound = (sum(each) / len(self.products) for each in zip(*self.products, strict=True))
        outside = sum(abs(one.found - one.expected) > one.bound for one in self.products)
        return {
            "density_a": a,
            "density_b": b,
            "density_ba": found,
            "density_ba_expected": expected,
            "density_ba_bound": bound,
            "density_ba_outside": outside,
        }

    def finish(self) -> None:
        if not self.masks:
            raise RuntimeError("the run ended and nothing was pruned")
        for name, parameter in self._tensors():
            outside = ~self.shards.piece(parameter, self.masks[name])
            if self.shards.local(parameter)[outside].any():
                raise RuntimeError(f"{name} has entries outside its support")

    def state(self) -> dict[str, torch.Tensor]:
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return {**super().state(), **(masks or self.importance.state())}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state(state)
        masks = {name.removeprefix("mask."): mask for name, mask in state.items() if name.startswith("mask.")}
        if masks:
            self._hold(masks)
        else:
            self.importance.load_state(state)

    def _hold(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks = masks
        self.importance.forget()
        for name, parameter in self._tensors():
            masks[name] = masks[name].to(parameter.device)
            if self.options.hold == "grad":
                held = self.shards.as_gradient(parameter, masks[name])
                self.shards.on_gradient(parameter, partial(_zero_outside, held))
        self.products = []
        for name in self.layers:
            a, b = masks[f"{name}.lora_A"], masks[f"{name}.lora_B"]
            found = (b.float() @ a.float() > 0).float().mean().item()
            rank, rows, columns = a.shape[0], b.shape[0], a.shape[1]
            expected = expected_product_density(a.float().mean().item(), b.float().mean().item(), rank)
            self.products.append(Product(found, expected, product_density_bound(rows, columns, rank)))

    def _density_of(self, tensor: str) -> float:
        return self.density[tensor.rpartition(".")[0]]

    def _density(self, which: str) -> float:
        import torch

        found = [(name, parameter) for name, parameter in self._tensors() if name.endswith(which)]
        kept = torch.stack([self.shards.local(parameter).count_nonzero() for _, parameter in found]).sum()
        if self.shards.split:
            self.shards.sum(kept)
        return int(kept) / sum(self.masks[name].numel() for name, _ in found)

    def _tensors(self) -> list[tuple[str, torch.nn.Parameter]]:
        pairs = [(name, self.pair(name)) for name in self.layers]
        return [
            (f"{name}.{which}", p)
            for name, pair in pairs
            for which, p in zip(("lora_A", "lora_B"), pair, strict=True)
        ]


def support_size(entries: int, density: float) -> int:
    """k = floor(density * entries), exactly, of the density as the decimal it is written as.

    The product of floats would be one short at times: 0.29 * 100 is 28.999...
    """
    return math.floor(Fraction(str(density)) * entries)


def largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """A bool mask of exactly `support_size` entries of largest magnitude, ties to the lowest flat index."""
    import torch

    order = torch.sort(tensor.abs().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[order[: support_size(tensor.numel(), density)]] = True
    return mask.view(tensor.shape)


def density_by_module(
    modules: Sequence[str], density: float | dict[str, float], where: str
) -> dict[str, float]:
    """The density of each module; of several patterns that fit, the longest counts.

    Raises UserError for a pattern that fits none, and for modules that none fits.
    """
    if not isinstance(density, dict):
        return dict.fromkeys(modules, density)
    found: dict[str, float] = {}
    for pattern in sorted(density, key=lambda pattern: (len(pattern), pattern)):
        found |= dict.fromkeys(matching(modules, [pattern], "module that is pruned", where), density[pattern])
    missing = [name for name in modules if name not in found]
    if missing:
        raise UserError(
            f"no density for {len(missing)} modules that are pruned, such as {missing[0]}",
            where=where,
            mend='Add "*" for all others.',
        )
    return found


def expected_product_density(density_a: float, density_b: float, rank: int) -> float:
    """E[density of B A] = 1 - (1 - s_A s_B)^r for independent supports (method section of the paper)."""
    return 1 - (1 - density_a * density_b) ** rank


def product_density_bound(rows: int, columns: int, rank: int, chance: float = 0.05) -> float:
    """The d for which P(|density of B A - E| >= d) <= 2 exp(-2 d^2 p q / (r (p + q))) is `chance`."""
    return math.sqrt(rank * (rows + columns) / (2 * rows * columns) * math.log(2 / chance))


def _zero_outside(mask: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(~mask, 0)
