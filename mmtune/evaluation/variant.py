"""A tuned model as it is evaluated: whole, with one part put back, or a part of the way from its base."""

from __future__ import annotations

from pathlib import Path

from mmtune.evaluation.generate import best_device
from mmtune.parts.between import scale_changes
from mmtune.parts.model import VisionLanguageModel


def load_variant(
    folder: Path,
    dtype: str,
    restore: str | None = None,
    base: Path | None = None,
    scale: float | None = None,
) -> VisionLanguageModel:
    """The model on this process's device. restore: a part that is taken from `base`. scale: s in
    W0 + s (W - W0) between base and model. Raises UserError.
    """
    instead = {restore: base} if restore and base else {}
    model = VisionLanguageModel.from_pretrained(folder, dtype=dtype, instead=instead)
    if scale is not None:
        assert base is not None
        scale_changes(model, folder, base, scale, dtype)
    return model.to(best_device())
