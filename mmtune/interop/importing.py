"""mmtune import: a model of another project becomes a model folder, and its logits stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, replacing_folder, write_json
from mmtune.core.table import Table
from mmtune.core.versions import versions
from mmtune.interop.comparison import compare, logits, placed, probe, refuse_unlike
from mmtune.interop.source import Source, Wanted
from mmtune.interop.weights import local
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.foreign import kind_of
from mmtune.parts.model import VisionLanguageModel

# Each reads a folder: (folder, wanted) -> Source.
LAYOUTS = Table("layout", {"llava-hf": "mmtune.interop.llava_hf:read", "llava": "mmtune.interop.llava:read"})
SAME = 1e-4  # of the largest logit: what the order of fp32 sums may make


def import_model(source: str, destination: Path, wanted: Wanted | None = None) -> dict[str, Any]:
    """Writes the model folder `destination` from a folder or hub name of a layout that mmtune knows. A file
    stands for the folder it lies in.

    Its config.json says which layout it is, its name nothing. Every tensor is written as it is in the source.
    The logits of what was written are compared with those of the source's own class, both in fp32. Returns
    what imported.json says. Raises UserError for a layout that is not known, for what mmtune's parts cannot
    hold, for files that are missing or broken, and where the logits differ; then nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    folder = Path(source).parent if Path(source).is_file() else local(source)
    layout = kind_of(read_json(folder / "config.json"))
    if layout not in LAYOUTS.names():
        raise UserError(
            "this is no model that mmtune can import",
            where=folder / "config.json",
            mend=f"Known layouts: {', '.join(LAYOUTS.names())}. A tower or a language model alone goes under "
            "model.vision.weights or model.language.weights.",
        )
    read: Callable[[Path, Wanted], Source] = LAYOUTS.load(layout)
    found = read(folder, wanted or Wanted())
    found.check()
    with replacing_folder(destination) as partial:
        found.write(partial)
        model = placed(VisionLanguageModel.from_pretrained(partial))
        batch = probe(model)
        pixels = model.vision.normalise(batch.images, torch.float32)
        ours = logits(model)
        del model
        row = compare("as imported", found.reference(batch, pixels), ours, SAME)
        refuse_unlike(row, str(folder))
        made: dict[str, Any] = {
            "from": source,
            "layout": layout,
            "model_hash": model_hash(partial),
            "notes": found.notes,
            "comparison": [row.to_dict()],
            "versions": versions(),
        }
        write_json(partial / "imported.json", made)
    return made
