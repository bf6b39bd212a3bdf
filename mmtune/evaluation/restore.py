"""Attribution: which part of a tuned model can be put back as it was in the base, and where that base is.

What a score becomes with one part put back says how much of the gain and of the forgetting sits in that
part. No torch here.
"""

from __future__ import annotations

from pathlib import Path

from mmtune.core.config import Source
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped
from mmtune.parts.fingerprint import changed_parts, model_hash

QUANTIZED_BASE = "base"
"""Where in a run's folder its base lies as a model folder, if the run itself has it quantised."""
VARIANTS = {"language": "language_off", "connector": "connector_restored", "vision": "vision_restored"}
"""What a report calls the model with a part put back."""


def find_base(model: Path, base: Path | None = None) -> Path:
    """The model folder that `model` was trained from: `base`, or by default what the run's run.yaml names.

    Raises UserError where that is not known, or what is there is not that model.
    """
    record = model / "trained.json"
    if not record.is_file():
        raise UserError(
            "it does not say what it was trained from: it has no trained.json",
            where=model,
            mend="Give the final folder of a run, runs/NAME/final.",
        )
    start = read_json(record).get("base")
    if start is None:
        raise UserError(
            "this run started from no saved model as a whole, so no part can be put back",
            where=record,
            mend="Only a run with model.base alone has a base.",
        )
    place = base or _named_by_run(model)
    if place is None:
        raise UserError(
            f"the model it was trained from, {start}, is not known to lie anywhere",
            where=model,
            mend="Give that model's folder: --base DIR.",
        )
    if base is None and not shipped(place).is_dir():
        raise UserError(
            f"the model it was trained from is no longer at {place}",
            where=model,
            mend="Give that model's folder: --base DIR.",
        )
    found = model_hash(place)
    if found != start:
        raise UserError(
            f"{model} was trained from model {start}, but this is model {found}",
            where=place,
            mend="Give the folder of the model that the run started from: --base DIR.",
        )
    return place


def check_restorable(model: Path, part: str, base: Path) -> None:
    """Raises UserError where a part is the same in the model as in its base: there is nothing to put back."""
    changed = changed_parts(model, base)
    if part not in changed:
        raise UserError(
            f"its {part} did not train, so there is nothing to put back",
            where=model,
            mend=f"What trained: {', '.join(changed) or 'nothing'}.",
        )


def _named_by_run(model: Path) -> Path | None:
    config = model.resolve().parent / "run.yaml"
    if not config.is_file():
        return None
    tree = Source(config).tree
    described = tree.get("model") if isinstance(tree, dict) else None
    named = described.get("base") if isinstance(described, dict) else None
    if isinstance(described, dict) and described.get("quantize"):  # then the base is in the run's own folder
        return config.parent / QUANTIZED_BASE
    return Path(named) if isinstance(named, str) else None
