"""Tables of exact names: no substring matching, no duplicates, and an unknown name lists the known ones."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from typing import Any

from mmtune.core.errors import UserError


def nearest(name: str, known: list[str]) -> str:
    """A sentence that helps with a mistyped name: the nearest known one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(sorted(known))}."


class Table:
    """Maps a name to something that lives at `module:attribute`, imported only when it is asked for.

    Importing late keeps `--help`, `score` and the faults of a config free of torch.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, str] = {}
        for name, target in entries.items():
            self.add(name, target)

    def add(self, name: str, target: str) -> None:
        """Adds `name` for the object at `module:attribute`. Raises ValueError for a name that is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is already in the table, as {self._entries[name]}")
        self._entries[name] = target

    def names(self) -> list[str]:
        return sorted(self._entries)

    def load(self, name: str) -> Any:
        """The object behind `name`. Raises UserError that lists the known names."""
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}'", mend=nearest(name, self.names()))
        module, attribute = self._entries[name].split(":")
        return getattr(importlib.import_module(module), attribute)
