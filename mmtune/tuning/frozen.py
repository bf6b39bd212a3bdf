"""Nothing of the part trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mmtune.tuning.base import Row, Tuner, rows_of

if TYPE_CHECKING:
    from mmtune.parts.model import VisionLanguageModel


@dataclass
class FrozenOptions:
    """No options."""

    tuner: Literal["frozen"] = "frozen"

    def make(self) -> FrozenTuner:
        return FrozenTuner()


class FrozenTuner(Tuner):
    """Switches the part's gradients off."""

    def attach(self, model: VisionLanguageModel, part: str) -> list[Row]:
        model.part(part).requires_grad_(False)
        return rows_of(part, model.core(part), "frozen", None)
