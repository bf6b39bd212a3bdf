"""Dataset cards (data/*.yaml): what a dataset is, where it comes from, and which files it consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmtune.core.config import Source, parse
from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.core.table import nearest


@dataclass
class Card:
    """One dataset. `splits`: the LLaVA training file of each split; paths are relative to the data's root."""

    name: str
    about: str
    source: str
    licence: str
    root: Path
    splits: dict[str, str] = field(default_factory=dict)
    images: str = "."


def load_card(name: str) -> Card:
    """A card by name. Raises UserError that lists the known ones."""
    folder = share("data")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown dataset card '{name}'", mend=nearest(name, known))
    return parse(Card, Source(folder / f"{name}.yaml"))
