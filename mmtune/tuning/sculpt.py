"""LoRASculpt: sparse LoRA. At `prune_at` each A and B keeps its largest entries and nothing else, ever.

Semantics: when `prune_at` optimiser steps are done, k = floor(density * numel) entries of largest
magnitude stay in each tensor (ties to the lowest index), the rest become zero in memory, so in the
next forward pass and in every file. Their Adam moments become zero too. From then on, with `hold: grad`,
their gradients are zero before clipping, so they cannot come back and do not weigh on the clip norm; with
`hold: project` they are zeroed after each step, and their gradients do.
Which entries stay is decided once, on whole tensors, by each process for itself from the same numbers;
holding them is done in place and sends nothing.
With `support: random`, the control, k entries drawn at random stay instead; all else is the same.
Source: Liang et al., LoRASculpt, CVPR 2025, arXiv 2503.16843.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from mmtune.core.config import Report
from mmtune.core.errors import UserError
from mmtune.tuning.base import PenaltyOptions, Row
from mmtune.tuning.lora import LoraTuner, check_lora

if TYPE_CHECKING:
    import torch

    from mmtune.parts.model import VisionLanguageModel


@dataclass
class SculptOptions:
    """LoRA's options and, beside them, density (the fraction kept of A and of B), prune_at, support and hold.

    prune_at: a number of optimiser steps, or a fraction of the run where it is below 1. support: which
    entries stay, those of largest `magnitude`, or as many `random` ones, drawn from the run's seed. hold: how
    the others stay zero, by their gradients (`grad`) or by zeroing them after each step (`project`).
    """

    lr: float
    tuner: Literal["lorasculpt"] = "lorasculpt"
    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    density: float = 0.1
    prune_at: float = 100
    support: Literal["magnitude", "random"] = "magnitude"
    hold: Literal["grad", "project"] = "grad"
    penalty: PenaltyOptions | None = None

    def check(self, fault: Report) -> None:
        check_lora(self, fault)
        if not 0 < self.density < 1:
            fault("density", f"expected more than 0 and less than 1, found {self.density}")
        if self.prune_at <= 0 or (self.prune_at >= 1 and self.prune_at != int(self.prune_at)):
            fault("prune_at", f"expected a step (1 or more) or a fraction below 1, found {self.prune_at}")

    def make(self) -> SculptTuner:
        return SculptTuner(self)


class SculptTuner(LoraTuner):
    """A LoRA whose support is cut once and then held."""

    def __init__(self, options: SculptOptions) -> None:
        super().__init__(options)
        self.part = ""
        self.prune_step = 0
        self.seed = 0
        self.masks: dict[str, torch.Tensor] = {}
        self.product_density: tuple[float, float] | None = None

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        if part != "language":
            raise UserError(
                f"lorasculpt prunes the language model only; the {part} is regularised, never pruned",
                where=f"tune.{part}.tuner",
                mend="Use full or lora there, with a penalty.",
            )
        self.part = part
        rows = super().attach(model, part)
        for name, parameter in self._tensors():
            if support_size(parameter.numel(), self.options.density) == 0:
                raise UserError(
                    f"density {self.options.density} keeps no entry of {name} ({parameter.numel()} entries)",
                    where=f"tune.{part}.density",
                    mend=f"Raise it to 1 / {parameter.numel()} or more.",
                )
        return rows

    def start(self, steps: int, seed: int) -> None:
        self.seed = seed
        at = self.options.prune_at
        self.prune_step = int(at) if at >= 1 else math.ceil(round(at * steps, 6))
        if self.prune_step >= steps:
            raise UserError(
                f"prune_at is step {self.prune_step}, but the run ends after {steps}: no step would follow",
                where=f"tune.{self.part}.prune_at",
                mend="Prune earlier, or give a fraction of the run, for example 0.1.",
            )

    def after_step(self, step: int) -> None:
        if step == self.prune_step:
            self._prune(step)
        elif step > self.prune_step and self.options.hold == "project":
            self._zero_outside()

    def _prune(self, step: int) -> None:
        masks = {}
        for name, parameter in self._tensors():
            whole = self.shards.whole(parameter)
            if not whole.any():
                raise UserError(
                    f"{name} is all zero at step {step}, so there is nothing to prune",
                    where=f"tune.{self.part}.prune_at",
                    mend="Prune later, once warm-up has moved the weights.",
                )
            if self.options.support == "random":
                masks[name] = drawn(whole, self.options.density, f"{self.seed}/{name}")
            else:
                masks[name] = largest(whole, self.options.density)
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
        """Densities of A, of B and of the support of B A, next to what independence predicts for it."""
        if self.product_density is None:
            return {}
        a, b = (self._density(which) for which in ("lora_A", "lora_B"))
        product, expected = self.product_density
        return {"density_a": a, "density_b": b, "density_ba": product, "density_ba_expected": expected}

    def finish(self) -> None:
        if not self.masks:
            raise RuntimeError("the run ended and nothing was pruned")
        for name, parameter in self._tensors():
            outside = ~self.shards.piece(parameter, self.masks[name])
            if self.shards.local(parameter)[outside].any():
                raise RuntimeError(f"{name} has entries outside its support")

    def state(self) -> dict[str, torch.Tensor]:
        return {f"mask.{name}": mask for name, mask in self.masks.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self._hold({name.removeprefix("mask."): mask for name, mask in state.items()})

    def _hold(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks = masks
        for name, parameter in self._tensors():
            masks[name] = masks[name].to(parameter.device)
            if self.options.hold == "grad":
                held = self.shards.as_gradient(parameter, masks[name])
                self.shards.on_gradient(parameter, partial(_zero_outside, held))
        products, expected = [], []
        for name in self.layers:
            a, b = masks[f"{name}.lora_A"], masks[f"{name}.lora_B"]
            products.append((b.float() @ a.float() > 0).float().mean().item())
            expected.append(
                expected_product_density(a.float().mean().item(), b.float().mean().item(), a.shape[0])
            )
        self.product_density = (sum(products) / len(products), sum(expected) / len(expected))

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
    """k = floor(density * entries)."""
    return math.floor(density * entries)


def largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """A bool mask of exactly `support_size` entries of largest magnitude, ties to the lowest flat index."""
    import torch

    order = torch.sort(tensor.abs().flatten(), descending=True, stable=True).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    mask[order[: support_size(tensor.numel(), density)]] = True
    return mask.view(tensor.shape)


def drawn(tensor: torch.Tensor, density: float, seed: str) -> torch.Tensor:
    """A bool mask of `support_size` entries of `tensor`, drawn uniformly; no other random number changes."""
    import torch

    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order = torch.randperm(tensor.numel(), generator=generator)
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[order[: support_size(tensor.numel(), density)]] = True
    return mask.view(tensor.shape).to(tensor.device)


def expected_product_density(density_a: float, density_b: float, rank: int) -> float:
    """E[density of B A] = 1 - (1 - s_A s_B)^r for independent supports (method section of the paper)."""
    return 1 - (1 - density_a * density_b) ** rank


def _zero_outside(mask: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(~mask, 0)
