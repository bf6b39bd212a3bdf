"""A tuned model as plain weights: adapters merged in fp32, quantised weights dequantised for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mmtune.core.errors import UserError
from mmtune.core.files import replacing_folder, shipped, write_json
from mmtune.core.versions import versions
from mmtune.interop.comparison import Compared, compare, logits, placed, refuse_unlike
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel, read_options
from mmtune.parts.spec import PARTS

# Of the largest logit: what the order of fp32 sums may make, and what rounding every weight to bf16 may.
SAME, ROUNDED = 1e-4, 0.1


def export_merged(folder: Path, destination: Path, dtype: str = "float32") -> dict[str, Any]:
    """Writes a model folder without adapters, W + (alpha / r) B A in their places, and without 4 or 8 bits.

    The sums are made in fp32 whatever the base is held in; dtype: of the merged parts' files. Other parts
    that lie in `folder` are copied, those that come from elsewhere stay there and are named. The logits are
    compared before and after, again once rounded to bf16, and these with those of the written files. Returns
    what merged.json says. Raises UserError where there is nothing to merge, and where the logits differ; then
    nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    language = read_options(folder).language
    held = language.quantize if language else None
    rows = []
    as_it_runs = logits(_load(folder)) if held else None
    model = _load(folder, dequantize=True)
    merged = [*model.adapters]
    if not merged and not held:
        raise UserError("it has no adapter, and nothing in 4 or 8 bits", where=folder, mend="It is merged.")
    before = logits(model)
    if as_it_runs is not None:
        rows.append(compare(f"{held}, dequantised", as_it_runs, before, None))
    lost = lost_to_rounding(model, torch_dtype(dtype))
    for name in merged:
        model.merge_adapter(name)
    after = logits(model)
    rows.append(_checked(compare("merged in fp32", before, after, SAME), folder))
    parts = {*merged, *(["language"] if held else [])}
    changed = [parameter for name in parts for parameter in model.part(name).parameters()]
    if dtype != "float32":
        for parameter in changed:
            parameter.data = parameter.data.to(torch_dtype(dtype)).float()
        after = logits(model)
        rows.append(_checked(compare(f"rounded to {dtype}", before, after, ROUNDED), folder))
    for parameter in changed:  # and no buffers: those were not compared rounded
        parameter.data = parameter.data.to(torch_dtype(dtype))
    for name in PARTS:
        options = getattr(model.options, name)
        if options.weights and Path(options.weights).is_relative_to(shipped(folder).resolve()):
            options.weights = None
    with replacing_folder(destination) as partial:
        model.save_pretrained(partial)
        del model, changed, parameter
        written = logits(_load(partial))
        rows.append(_checked(compare(f"as written, {dtype}", after, written, SAME), folder))
        made: dict[str, Any] = {
            "from": model_hash(folder),
            "model_hash": model_hash(partial),
            "merged": merged,
            "dequantized": held,
            "dtype": dtype,
            "update_lost_to_rounding": lost,
            "comparison": [row.to_dict() for row in rows],
            "versions": versions(),
        }
        write_json(partial / "merged.json", made)
    return made


@torch.no_grad()
def lost_to_rounding(model: VisionLanguageModel, dtype: torch.dtype) -> float:
    """The part of all updates D = (alpha / r) B A that is gone once W + D is rounded to `dtype`:
    ||round(W + D) - round(W) - D||_F / ||D||_F; 0 where there is none.
    """
    gone = whole = 0.0
    for adapter in model.adapters.values():
        for layer in adapter.modules():
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                assert isinstance(base, nn.Linear)
                update: Any = layer.get_delta_weight("default")  # type: ignore[operator]
                kept = (base.weight + update).to(dtype).float() - base.weight.to(dtype).float()
                gone += float((kept - update).double().square().sum())
                whole += float(update.double().square().sum())
    return (gone / whole) ** 0.5 if whole else 0.0


def _load(folder: Path, dequantize: bool = False) -> VisionLanguageModel:
    return placed(VisionLanguageModel.from_pretrained(folder, dequantize=dequantize))


def _checked(compared: Compared, folder: Path) -> Compared:
    refuse_unlike(compared, str(folder))
    return compared
