"""Parameter groups, one per part that trains, and the schedule."""

from __future__ import annotations

import hashlib
import math

import torch

from mmtune.core.errors import UserError
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.spec import PARTS


def make_optimizer(
    model: VisionLanguageModel, rates: dict[str, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with a group for each part, named after it. `rates`: the learning rate of each part that trains.

    Raises UserError where nothing trains.
    """
    groups = []
    for part in PARTS:
        parameters = [p for p in model.part(part).parameters() if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "lr": rates[part], "rate": rates[part], "name": part})
    if not groups:
        raise UserError(
            "no part of the model trains", where="tune", mend="Give a part another tuner than frozen."
        )
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def check_rates(optimizer: torch.optim.Optimizer, rates: dict[str, float]) -> None:
    """Raises RuntimeError unless an engine's optimiser has a group with the rate of each part that trains."""
    found = {group.get("name"): (group.get("rate"), group["lr"]) for group in optimizer.param_groups}
    wanted = {part: (rate, rate) for part, rate in rates.items()}
    if found != wanted:
        raise RuntimeError(f"learning rates did not arrive: the optimiser has {found}, wanted were {wanted}")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets each group's learning rate to its own rate times `factor`. Returns them by lr_PART."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}


def schedule_factor(kind: str, step: int, steps: int, warmup: float) -> float:
    """What the learning rates are multiplied with at `step` (counted from 0) of `steps`.

    Linear warm-up over the fraction `warmup` of the run, then `cosine` or `linear` down to 0, or `constant`.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if kind == "linear" else 1.0


def seed_of(seed: int, step: int, rank: int) -> int:
    """The seed of one step on one process: a function of the arguments alone, so nothing has to be saved."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
