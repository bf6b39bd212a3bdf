"""Dataset cards (data/*.yaml): what a dataset is, where it comes from, and which files it consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import parse_named
from mmtune.core.files import share


@dataclass
class Card:
    """One dataset. `splits`: the LLaVA training file of each split; paths are relative to the data's root.

    task: the benchmark whose questions `mmtune data prepare` makes the files of, as its protocol words them;
    prompt, options: in place of the protocol's own. answer: the right one, the one that most annotators gave,
    or a sample for each of several that are all right. limit: so many samples, drawn by seed.
    """

    name: str
    about: str
    source: str
    licence: str
    root: Path
    splits: dict[str, str] = field(default_factory=dict)
    images: str = "."
    task: str = ""
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    answer: Literal["right", "majority", "each"] = "right"
    limit: int | None = None


def load_card(name: str) -> Card:
    """A card by name. Raises UserError that lists the known ones."""
    card: Card = parse_named(Card, "dataset card", share("data"), name)
    return card
