"""All weights of the part train, in fp32, with an optional penalty on what they drift from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.core.config import Report
from mmtune.core.errors import UserError
from mmtune.tuning.base import PenaltyOptions, Row, Tuner, rows_of

if TYPE_CHECKING:
    from mmtune.parts.model import VisionLanguageModel
    from mmtune.tuning.joined import DriftPenalty


@dataclass
class FullOptions:
    """lr: the part's own learning rate. penalty: on M0 * (W - W0) of its matrices (LoRASculpt's beta);
    its `modules` are those that hold a weight matrix.
    """

    lr: float
    tuner: Literal["full"] = "full"
    penalty: PenaltyOptions | None = None

    def check(self, fault: Report) -> None:
        if self.lr < 0:
            fault("lr", f"expected 0 or more, found {self.lr}")
        if self.penalty and self.penalty.modules == "pruned":
            fault("penalty.modules", "nothing is pruned by this tuner", "Use modules: all.")
        if self.penalty and self.penalty.scaled:
            fault("penalty.scaled", "weights that train in full have no alpha / r", "Leave it out.")

    def make(self) -> FullTuner:
        return FullTuner(self)


class FullTuner(Tuner):
    """Trains every weight that has an effect on the output."""

    exact = True
    weight_penalty: DriftPenalty | None = None

    def __init__(self, options: FullOptions) -> None:
        self.options = options

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        from mmtune.tuning.joined import DriftPenalty

        core = model.core(part)
        if quantize := getattr(getattr(model.options, part), "quantize", None):
            raise UserError(
                f"weights held in {quantize} cannot train",
                where=f"tune.{part}.tuner",
                mend="Use lora or lorasculpt, or leave 'quantize' out.",
            )
        core.requires_grad_(True).float()
        for name, parameter in core.named_parameters():
            if name.startswith(getattr(model.part(part), "unused", ())):
                parameter.requires_grad_(False)  # it would never get a gradient
        penalised: list[str] = []
        if self.options.penalty:
            matrices = {n: p for n, p in core.named_parameters() if p.requires_grad and p.ndim == 2}
            holders = list(dict.fromkeys(name.rpartition(".")[0] for name in matrices))
            penalised = self.options.penalty.select(holders, part)
            initial = {
                name: parameter.detach().clone()
                for name, parameter in matrices.items()
                if name.rpartition(".")[0] in penalised
            }
            self.weight_penalty = DriftPenalty(self.options.penalty, initial, core.get_parameter)
            self.weight_penalty.watch(
                {name: core.get_submodule(name.rpartition(".")[0]) for name in initial}, part
            )
        getattr(model.options, part).weights = None
        return rows_of(part, core, "full", self.options.lr, penalised)
