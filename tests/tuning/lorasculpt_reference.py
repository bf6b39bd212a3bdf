"""LoRASculpt in its plainest form: fp64, dense tensors, plain autograd. Slow, but obviously right.

Everything here restates the definition of the method and nothing is shared with the package, so that an
agreement between the two says something. Notation: W (p x q) is a pretrained weight, its update is
(alpha / r) B A with B (p x r) and A (r x q).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # label of a token that carries no loss


# The mathematics


def retention_mask(weight: Tensor, omega: float = 1.0) -> Tensor:
    """M = tanh(omega * |1 / ln(|W| / ||W||_F + 1e-15)|), fp64, shape of `weight`, values in [0, 1].

    An all-zero W retains nothing: M = 0. A zero in a W that is not all zero has M = tanh(omega / 34.5), which
    is small but not 0. One non-zero entry holds the whole norm, its logarithm is about 0, and its M is 1.
    `omega` must be positive.
    """
    magnitude = weight.detach().double().abs()
    if not magnitude.any():
        return magnitude
    logarithm = (magnitude / magnitude.square().sum().sqrt() + 1e-15).log()
    return (omega * (1 / logarithm).abs()).tanh()


def frobenius_norm(matrix: Tensor) -> Tensor:
    """||X||_F as a scalar with a gradient; at X = 0 both are 0, where sqrt would give NaN."""
    squared = matrix.square().sum()
    return squared.sqrt() if squared > 0 else squared


def conflict_penalty(weight: Tensor, lora_a: Tensor, lora_b: Tensor, omega: float = 1.0) -> Tensor:
    """||M .* (B A)||_F with M from `weight` (p x q), A (r x q), B (p x r); not squared, no alpha / r."""
    return frobenius_norm(retention_mask(weight, omega) * (lora_b.double() @ lora_a.double()))


def full_penalty(weight: Tensor, weight0: Tensor, omega: float = 1.0) -> Tensor:
    """||M0 .* (W - W0)||_F for a matrix trained in full; M0 comes from `weight0`, where training began."""
    return frobenius_norm(retention_mask(weight0, omega) * (weight.double() - weight0.detach().double()))


def kept_entries(density: float, entries: int) -> int:
    """floor(density * entries), the product made by hand from the density's digits and exponent."""
    _, digits, exponent = Decimal(str(density)).as_tuple()
    assert isinstance(exponent, int)
    product = int("".join(map(str, digits))) * entries
    return product * 10**exponent if exponent >= 0 else product // 10**-exponent


def keep_mask(tensor: Tensor, density: float) -> Tensor:
    """True at the floor(density * numel) largest magnitudes of `tensor`, ties to the lowest flat index.

    The product is exact, of the density as it is written: 0.29 of 100 is 29. A kept value may be zero.
    """
    magnitude = tensor.detach().double().abs().flatten().tolist()
    order = sorted(range(len(magnitude)), key=lambda index: (-magnitude[index], index))
    mask = torch.zeros(len(magnitude), dtype=torch.bool)
    mask[order[: kept_entries(density, len(magnitude))]] = True
    return mask.reshape(tensor.shape)


def product_density(density_a: float, density_b: float, rank: int) -> float:
    """Expected share of non-zeros in B A, the supports of A and B being independent: 1 - (1 - s_A s_B)^r."""
    return 1 - (1 - density_a * density_b) ** rank


def deviation_bound(deviation: float, p: int, q: int, rank: int) -> float:
    """Upper bound of P(|density of B A - its expectation| >= deviation): 2 exp(-2 d^2 p q / (r (p + q)))."""
    return 2 * math.exp(-2 * deviation**2 * p * q / (rank * (p + q)))


# A training run of a toy network


@dataclass(frozen=True)
class Layer:
    """One linear layer y = W x + bias + (lora_alpha / r) B A x, given by its initial tensors.

    `tuner` says what is trained: nothing; W and the bias ("full"); or A and B ("lora").
    """

    part: Literal["connector", "language"]
    tuner: Literal["frozen", "full", "lora"]
    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_alpha: float = 1.0

    def tensors(self) -> dict[str, Tensor]:
        """fp64 copies of the tensors that are there: `weight`, `bias`, `lora_a`, `lora_b`."""
        given = {"weight": self.weight, "bias": self.bias, "lora_a": self.lora_a, "lora_b": self.lora_b}
        return {kind: value.detach().double().clone() for kind, value in given.items() if value is not None}

    def trained(self) -> list[str]:
        """Which of `tensors` are trained."""
        kinds = {"frozen": [], "full": ["weight", "bias"], "lora": ["lora_a", "lora_b"]}[self.tuner]
        return [kind for kind in kinds if kind in self.tensors()]


class StepRecord(TypedDict):
    """What one optimiser step saw and left behind. Tensors are keyed "layer.kind", trained ones only."""

    step: int  # steps completed, so 1 for the first
    loss: float  # task_loss + alpha * language_penalty + beta * connector_penalty, before the step
    task_loss: float  # mean over the supervised tokens of all micro-batches of the step
    language_penalty: float  # mean over the language model's matrices, unweighted
    connector_penalty: float
    grad_norm: float  # of the whole gradient, pruned entries at zero, before clipping
    weights: dict[str, Tensor]  # after the step, and after the prune if it fell here
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    masks: dict[str, Tensor]  # empty before the prune


Batch = tuple[Tensor, Tensor]  # inputs (tokens x features), labels (tokens), IGNORED where unsupervised


def train(
    layers: Mapping[str, Layer],
    batches: Sequence[Sequence[Batch]],
    *,
    learning_rates: Mapping[str, float],
    multipliers: Sequence[float],
    prune_at: int | None,
    density: float,
    alpha: float,
    beta: float,
    omega: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> list[StepRecord]:
    """Train a stack of linear layers with tanh between them and cross-entropy at the end; a record per step.

    `batches[t]` holds the micro-batches of step t and `multipliers[t]` what its learning rates, one for each
    part, are multiplied by. All trained tensors decay alike. After optimiser step number `prune_at` (None:
    never) A and B of every language layer are pruned, the connector never. Raises ValueError for a schedule
    of the wrong length, a prune that is not reached or has no effect, an all-zero tensor to prune, and a step
    without a supervised token.
    """
    if len(multipliers) != len(batches):
        raise ValueError(f"{len(multipliers)} multipliers for {len(batches)} steps")
    if prune_at is not None and not 1 <= prune_at <= len(batches):
        raise ValueError(f"a prune at step {prune_at} is never reached in {len(batches)} steps")

    tensors = {f"{name}.{kind}": t for name, layer in layers.items() for kind, t in layer.tensors().items()}
    part_of = {f"{name}.{kind}": layer.part for name, layer in layers.items() for kind in layer.trained()}
    prunable = [
        f"{name}.{kind}"
        for name, layer in layers.items()
        if layer.part == "language" and layer.tuner == "lora"
        for kind in ("lora_a", "lora_b")
    ]
    exp_avg = {key: torch.zeros_like(tensors[key]) for key in part_of}
    exp_avg_sq = {key: torch.zeros_like(tensors[key]) for key in part_of}
    masks: dict[str, Tensor] = {}
    records: list[StepRecord] = []

    for step, (micro_batches, multiplier) in enumerate(zip(batches, multipliers, strict=True), start=1):
        for key in part_of:
            tensors[key] = tensors[key].detach().requires_grad_()
        task = task_loss(layers, tensors, micro_batches)
        language = part_penalty(layers, tensors, "language", omega)
        connector = part_penalty(layers, tensors, "connector", omega)
        loss = task + alpha * language + beta * connector
        grads = dict(zip(part_of, torch.autograd.grad(loss, [tensors[key] for key in part_of]), strict=True))

        # Before clipping, so that entries which can no longer move have no say in the norm.
        for key, mask in masks.items():
            grads[key] = grads[key] * mask
        grad_norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        # The 1e-6 is torch.nn.utils.clip_grad_norm_'s, which every engine follows.
        factor = 1.0 if clip is None else min(1.0, clip / (grad_norm + 1e-6))

        for key, part in part_of.items():
            grad, rate = grads[key] * factor, learning_rates[part] * multiplier
            exp_avg[key] = betas[0] * exp_avg[key] + (1 - betas[0]) * grad
            exp_avg_sq[key] = betas[1] * exp_avg_sq[key] + (1 - betas[1]) * grad.square()
            mean = exp_avg[key] / (1 - betas[0] ** step)
            variance = exp_avg_sq[key] / (1 - betas[1] ** step)
            old = tensors[key].detach()
            tensors[key] = old - rate * weight_decay * old - rate * mean / (variance.sqrt() + eps)

        if step == prune_at:
            masks = {key: prune_mask(key, tensors[key], density) for key in prunable}
            if not masks:
                raise ValueError("no language layer has a LoRA to prune")
            for key, mask in masks.items():
                tensors[key] = tensors[key] * mask
                exp_avg[key] = exp_avg[key] * mask
                exp_avg_sq[key] = exp_avg_sq[key] * mask

        records.append(
            StepRecord(
                step=step,
                loss=loss.item(),
                task_loss=task.item(),
                language_penalty=language.item(),
                connector_penalty=connector.item(),
                grad_norm=grad_norm,
                weights={key: tensors[key].clone() for key in part_of},
                exp_avg={key: moment.clone() for key, moment in exp_avg.items()},
                exp_avg_sq={key: moment.clone() for key, moment in exp_avg_sq.items()},
                masks={key: mask.clone() for key, mask in masks.items()},
            )
        )
    return records


def forward(layers: Mapping[str, Layer], tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Logits (tokens x classes) of the stack in the order of `layers`, updates added to the weights."""
    hidden = inputs.double()
    for position, (name, layer) in enumerate(layers.items()):
        weight = tensors[f"{name}.weight"]
        if layer.tuner == "lora":
            lora_a, lora_b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            weight = weight + layer.lora_alpha / lora_a.shape[0] * (lora_b @ lora_a)
        hidden = (hidden if position == 0 else hidden.tanh()) @ weight.T
        if f"{name}.bias" in tensors:
            hidden = hidden + tensors[f"{name}.bias"]
    return hidden


def task_loss(layers: Mapping[str, Layer], tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> Tensor:
    """Mean cross-entropy over the supervised tokens of all micro-batches: each token weighs the same."""
    supervised = sum(int((labels != IGNORED).sum()) for _, labels in batches)
    if supervised == 0:
        raise ValueError("a step without a supervised token")
    total = torch.zeros((), dtype=torch.float64)
    for inputs, labels in batches:
        logits = forward(layers, tensors, inputs)
        total = total + functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / supervised


def part_penalty(
    layers: Mapping[str, Layer], tensors: Mapping[str, Tensor], part: str, omega: float = 1.0
) -> Tensor:
    """Mean penalty over the trained matrices of `part`; biases have none, a part without any has 0."""
    penalties = []
    for name, layer in layers.items():
        if layer.part != part:
            continue
        if layer.tuner == "lora":
            lora_a, lora_b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            penalties.append(conflict_penalty(layer.weight, lora_a, lora_b, omega))
        elif layer.tuner == "full":
            penalties.append(full_penalty(tensors[f"{name}.weight"], layer.weight, omega))
    return torch.stack(penalties).mean() if penalties else torch.zeros((), dtype=torch.float64)


def prune_mask(key: str, tensor: Tensor, density: float) -> Tensor:
    """`keep_mask`, refusing with ValueError a prune that has no meaning or no effect."""
    if not tensor.any():
        raise ValueError(f"{key} is all zero, so no entry is larger than another")
    mask = keep_mask(tensor, density)
    if mask.all() or not mask.any():
        raise ValueError(f"density {density} prunes {'nothing' if mask.all() else 'all'} of {key}")
    return mask
