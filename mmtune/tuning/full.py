"""All weights of the part train, in fp32, with an optional penalty on what they drift from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.core.config import Report
from mmtune.tuning.base import PenaltyOptions, Row, Tuner, rows_of

if TYPE_CHECKING:
    import torch

    from mmtune.parts.model import VisionLanguageModel


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

    def make(self) -> FullTuner:
        return FullTuner(self)


class FullTuner(Tuner):
    """Trains every weight that has an effect on the output."""

    exact = True

    def __init__(self, options: FullOptions) -> None:
        self.options = options
        self.matrices: dict[str, tuple[torch.nn.Parameter, torch.Tensor]] = {}

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        core = model.core(part)
        core.requires_grad_(True).float()
        for name, parameter in core.named_parameters():
            if name.startswith(getattr(model.part(part), "unused", ())):
                parameter.requires_grad_(False)  # it would never get a gradient
        penalised: list[str] = []
        if self.options.penalty:
            matrices = {n: p for n, p in core.named_parameters() if p.requires_grad and p.ndim == 2}
            holders = list(dict.fromkeys(name.rpartition(".")[0] for name in matrices))
            penalised = self.options.penalty.select(holders, part)
            for name, parameter in matrices.items():
                if name.rpartition(".")[0] in penalised:
                    self.matrices[name] = (parameter, parameter.detach().clone())
        getattr(model.options, part).weights = None
        return rows_of(part, core, "full", self.options.lr, penalised)

    def penalty(self) -> torch.Tensor | None:
        import torch

        from mmtune.tuning.penalty import drift_penalty

        if not self.options.penalty or not self.matrices:
            return None
        options = self.options.penalty
        constant = options.kind == "constant"
        values = [drift_penalty(w, initial, options.omega, constant) for w, initial in self.matrices.values()]
        return options.weight * torch.stack(values).mean()

    def state(self) -> dict[str, torch.Tensor]:
        return {f"initial.{name}": initial for name, (_, initial) in self.matrices.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, (_, initial) in self.matrices.items():
            initial.copy_(state[f"initial.{name}"])
