"""The contract of a tuner: how one part of the model is trained.

A tuner's file holds its options (a dataclass whose `tuner` is its name) and its class, and imports
torch and peft only inside functions, so that the faults of a config are found without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Literal

from mmtune.core.config import Report
from mmtune.core.errors import Fault, UserError
from mmtune.core.table import Table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mmtune.parts.model import VisionLanguageModel
    from mmtune.tuning.joined import WeightPenalty
    from mmtune.tuning.shards import Shards

# The options class of each tuner; its `make()` gives the tuner itself.
TUNERS = Table(
    "tuner",
    {
        "frozen": "mmtune.tuning.frozen:FrozenOptions",
        "full": "mmtune.tuning.full:FullOptions",
        "lora": "mmtune.tuning.lora:LoraOptions",
        "lorasculpt": "mmtune.tuning.sculpt:SculptOptions",
    },
)


@dataclass
class PenaltyOptions:
    """A penalty on weights, added to the task's loss with `weight` (alpha or beta of LoRASculpt).

    kind: how each entry is weighed. `conflict`: the paper's retention mask M, from |W|. `activation`: M from
    |W| x the root mean square of the layer's inputs; `gradient`: M from |W dL/dW|, both measured on samples
    of the stage as it begins. `constant`, the control, weighs all alike, with the root mean square of
    `conflict`'s M over the matrix, so that only the mask's shape is missing. omega: of M.
    modules: what it falls on: `all` modules that train, those that are
    `pruned`, or full module names under the part, with * for any part of a name. reduction: over several it
    is their `mean` or their `sum`. scaled: the update that is penalised is (alpha / r) B A, not B A alone.
    """

    weight: float
    kind: Literal["conflict", "activation", "gradient", "constant"] = "conflict"
    omega: float = 1.0
    modules: Literal["all", "pruned"] | list[str] = "all"
    reduction: Literal["mean", "sum"] = "mean"
    scaled: bool = False

    def check(self, fault: Report) -> None:
        if self.weight < 0:
            fault("weight", f"expected 0 or more, found {self.weight}")
        if self.omega <= 0:
            fault("omega", f"expected more than 0, found {self.omega}")
        if self.modules == []:
            fault("modules", "an empty list: nothing would be penalised")

    def factor(self, count: int, scaling: float = 1.0) -> float:
        """What the penalty of each of `count` modules weighs in the loss; scaling: alpha / r, if any."""
        return self.weight * (scaling if self.scaled else 1.0) / (count if self.reduction == "mean" else 1)

    def select(self, trained: Sequence[str], part: str) -> list[str]:
        """The modules among `trained` that the penalty falls on, for a tuner that prunes all of them or none.

        Raises UserError for a name that is none of them.
        """
        if isinstance(self.modules, str):
            return list(trained)
        return matching(trained, self.modules, "module that trains here", f"tune.{part}.penalty.modules")


@dataclass
class Row:
    """One line of the tuning table: a module, by its full name under the part, and how it is tuned.

    density: the fraction of its A and of its B that stays.
    """

    part: str
    module: str
    tuner: str
    parameters: int
    trained: int
    lr: float | None = None
    pruned: bool = False
    regularised: bool = False
    density: float | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Tuner:
    """Trains one part.

    The loop calls `attach` when the model is put together, `start` once the run's length is known, and `bind`
    once the engine has taken the model and the optimiser. In each optimiser step it calls `before_backward`
    before the last backward pass, `after_backward` after it, and `after_step` after the optimiser.

    exact: the part's own weights train, so they are loaded in fp32 whatever the model's dtype.
    """

    exact = False
    shards: Shards
    weight_penalty: WeightPenalty | None = None

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        """Chooses what trains, in place. Returns the part's rows of the tuning table."""
        raise NotImplementedError

    def start(self, steps: int, seed: int) -> None:
        """Called once the run's length in optimiser steps is known. Raises UserError where too short.

        seed: the run's, for what a tuner draws at random.
        """

    def bind(self, shards: Shards) -> None:
        """Called once parameters lie where they will train; what changes gradients is put in place here."""
        self.shards = shards
        if self.weight_penalty:
            self.weight_penalty.bind(shards)

    def before_backward(self, keep: bool = False) -> torch.Tensor | None:
        """Makes the penalty's gradients ready, which join the task's in the backward pass that follows.

        Returns this process's share of the weighted penalty, fp32, which the processes' shares add up to;
        None where there is no penalty. keep: `gradient_norms` will be asked for.
        """
        return self.weight_penalty.before_backward(keep) if self.weight_penalty else None

    def after_backward(self) -> None:
        """Called between the last backward pass of a step and the step, with the gradients unclipped."""
        if self.weight_penalty:
            self.weight_penalty.after_backward()

    def gradient_norms(self) -> tuple[float, float] | None:
        """The squared norms of the penalty's and of the task's gradient over the parameters that the penalty
        falls on; asked for, by every process, after `after_backward`. None where there is no penalty.
        """
        return self.weight_penalty.gradient_norms({}) if self.weight_penalty else None

    def after_step(self, step: int) -> None:
        """Called once `step` optimiser steps are done."""

    def densities(self) -> dict[str, float]:
        """What to log about sparsity. Every process has to call it."""
        return {}

    def update_norms(self) -> dict[str, float]:
        """What to log about the size of the update. Every process has to call it."""
        return {}

    def finish(self) -> None:
        """Called after the last step. Raises RuntimeError where what was promised did not happen."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors beside the weights that a resumed run needs, whole."""
        return self.weight_penalty.state() if self.weight_penalty else {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what `state` gave, after `bind`."""
        if self.weight_penalty:
            self.weight_penalty.load_state(state)


def matching(names: Sequence[str], patterns: Sequence[str], kind: str, where: str) -> list[str]:
    """The names that a pattern fits, in their own order; * in a pattern is any part of a name.

    Raises UserError with each pattern that fits none.
    """
    known = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    faults = [
        Fault(f"'{pattern}' is no {kind}", where, f"Known: {known}")
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if faults:
        raise UserError.of(faults)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def rows_of(
    part: str, core: nn.Module, tuner: str, lr: float | None, penalised: Collection[str] = ()
) -> list[Row]:
    """A row for each module that holds parameters of its own; `penalised`: the modules with a penalty."""
    rows = []
    for name, own in own_parameters(core):
        trained = sum(entries(p) for p in own if p.requires_grad)
        rows.append(
            Row(
                part,
                name,
                tuner,
                sum(map(entries, own)),
                trained,
                lr if trained else None,
                regularised=name in penalised,
            )
        )
    return rows


def entries(parameter: nn.Parameter) -> int:
    """How many weights it holds: bitsandbytes packs two of 4 bits into one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def own_parameters(core: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Each module with its own parameters; one that two modules share (a tied head) belongs to the first."""
    seen = set()
    for name, module in core.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        if own:
            yield name, own
