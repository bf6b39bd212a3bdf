"""One part of a model alone, in its family's own format, its adapter merged: mmtune export --to PART."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtune.core.config import to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import replacing_folder, write_json
from mmtune.interop.comparison import compare, logits, placed, refuse_unlike
from mmtune.interop.merged import ROUNDED, SAME
from mmtune.parts.assembly import PART_FILE
from mmtune.parts.connector.base import new_connector
from mmtune.parts.language import LanguageModel
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel, load_vision

KEPT = {"vision": ("tower", "fit"), "connector": ("kind", "options"), "language": ("chat",)}


def export_part(folder: Path, destination: Path, part: str, dtype: str = "float32") -> dict[str, Any]:
    """Writes the part, and in part.json what of its options its own files don't say.

    The logits of the whole model are compared with those of the model that has the written part in its
    place. Returns the comparison. Raises UserError where they differ; then nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    model = placed(VisionLanguageModel.from_pretrained(folder))
    device = next(model.parameters()).device
    before = logits(model)
    if part == "language":
        model.dequantize()
    if part in model.adapters:
        model.merge_adapter(part)
    for parameter in model.part(part).parameters():  # and no buffers, as transformers loads them
        parameter.data = parameter.data.to(torch_dtype(dtype))
    options = getattr(model.options, part)
    options.weights = None
    with replacing_folder(destination) as partial:
        model.save_part(part, partial)
        said = {"part": part, **{name: to_dict(options).get(name) for name in KEPT[part]}}
        if part == "vision":
            said["layer"] = -1  # the layers above were never loaded
        write_json(partial / PART_FILE, {name: value for name, value in said.items() if value is not None})
        setattr(model, part, _written(partial, part, model).to(device))
        tolerance = SAME if dtype == "float32" else ROUNDED
        row = compare("with the written part", before, logits(model), tolerance)
        refuse_unlike(row, str(folder))
    return {"comparison": [row.to_dict()]}


def _written(folder: Path, part: str, model: VisionLanguageModel) -> nn.Module:
    """The part as it lies in `folder` now, in fp32 and evaluation mode."""
    options = model.options
    assert options.vision and options.connector and options.language
    made: nn.Module
    if part == "vision":
        options.vision = replace(options.vision, weights=str(folder), layer=-1, image_size=None)
        made = load_vision(options.vision, torch.float32)
    elif part == "language":
        made = LanguageModel.load(str(folder), None, torch.float32)
    else:
        connector = new_connector(options.connector, model.vision.width, model.language.width)
        connector.load(folder)
        made = connector
    return made.eval()
