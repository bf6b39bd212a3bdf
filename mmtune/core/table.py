"""Tables of exact names: no substring matching, no duplicates, and an unknown name lists the known ones.

A table that has a contract also takes parts from outside the package, by `module:Class` or by a name that an
installed package gives in the table's group of entry points.
"""

from __future__ import annotations

import importlib
import os
import re
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from mmtune.core.errors import UserError

ALLOW = "MMTUNE_ALLOW"  # names, with commas between, that a model folder may have imported

_OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_NUMBERED = re.compile(r"(\D*)([1-9][0-9]?)(\D*)")
_allowed: set[str] = set()


def nearest(name: str, known: list[str]) -> str:
    """A sentence that helps with a mistyped name: the nearest known one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(sorted(known))}."


def allow(name: str) -> None:
    """From now on a model folder may name the part `module:Class`, which is imported as it is opened."""
    _allowed.add(name)


def refuse_unasked(name: str, where: object) -> None:
    """Raises UserError where `name`, read from a model folder, would import code that nobody here named."""
    if _OUTSIDE.fullmatch(name) and name not in {*_allowed, *os.environ.get(ALLOW, "").split(",")}:
        raise UserError(
            f"it names code outside mmtune, {name}, which would run as the folder is opened",
            where=where,
            mend=f"If you know that code: {ALLOW}={name} mmtune ...; or install it with an entry point.",
        )


class Table:
    """Maps a name to something that lives at `module:attribute`, imported only when it is asked for.

    Importing late keeps `--help`, `score` and the faults of a config free of torch. An N in a name stands
    for any whole number from 1 to 99: what lies at its target is called with the number. contract: the
    `module:Class` that a part from outside has to be a subclass of. group: of entry points.
    """

    def __init__(self, kind: str, entries: dict[str, str], contract: str = "", group: str = "") -> None:
        self.kind = kind
        self.contract = contract
        self.group = group
        self._entries: dict[str, str] = {}
        for name, target in entries.items():
            self.add(name, target)

    def add(self, name: str, target: str) -> None:
        """Adds `name` for the object at `module:attribute`. Raises ValueError for a name that is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is already in the table, as {self._entries[name]}")
        self._entries[name] = target

    def names(self) -> list[str]:
        return sorted([*self._entries, *self._installed()])

    def __contains__(self, name: str) -> bool:
        """Whether it is known where to look for it; nothing is imported."""
        if self.contract and _OUTSIDE.fullmatch(name):
            return True
        return self._is_own(name) or self._family(name) is not None or name in self._installed()

    def nearest(self, name: str) -> str:
        """A sentence that helps with an unknown name."""
        numbered = _NUMBERED.fullmatch(name)
        said = nearest(
            name, list({own.replace("N", numbered[2] if numbered else "2") for own in self.names()})
        )
        if self.contract and ":" in name:
            said = "Write MODULE:CLASS, as Python would import it: my_package.my_module:MyClass."
        return said

    def load(self, name: str, where: str = "") -> Any:
        """The object behind `name`. where: what named it, for a message.

        Raises UserError that lists the known names, or says what a part from outside lacks.
        """
        family = self._family(name)
        self._refuse_clash(name, self._is_own(name) or family is not None, where)
        if self._is_own(name):
            return _at(self._entries[name])
        if family:
            return _at(self._entries[family[0]])(family[1])
        if name not in self:
            raise UserError(f"unknown {self.kind} '{name}'", where=where, mend=self.nearest(name))
        made = _imported(self._installed().get(name, [name])[0], where)
        contract = _at(self.contract)
        if not isinstance(made, type) or not issubclass(made, contract):
            raise UserError(
                f"{name} is no subclass of {self.contract.replace(':', '.')}",
                where=where,
                mend=f"A {self.kind} follows that contract.",
            )
        return made

    def _is_own(self, name: str) -> bool:
        return name in self._entries and "N" not in name

    def _family(self, name: str) -> tuple[str, int] | None:
        match = _NUMBERED.fullmatch(name)
        family = f"{match[1]}N{match[3]}" if match else ""
        return (family, int(match[2])) if match and family in self._entries else None

    def _installed(self) -> dict[str, list[str]]:
        return _entry_points(self.group) if self.group else {}

    def _refuse_clash(self, name: str, ours: bool, where: str) -> None:
        theirs = self._installed().get(name, [])
        if len(theirs) + ours > 1:
            also = "mmtune's own and also " if ours else ""
            raise UserError(
                f"the {self.kind} '{name}' is {also}what installed packages call {' and '.join(theirs)}",
                where=where,
                mend=f"Write {theirs[0]} for that one; or uninstall what gives the name in {self.group}.",
            )


@cache
def _entry_points(group: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for point in entry_points(group=group):
        if point.value not in found.setdefault(point.name, []):
            found[point.name].append(point.value)
    return found


def _at(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


def _imported(target: str, where: str) -> Any:
    """The same of code that is not ours. Raises UserError."""
    module, attribute = target.split(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise _unimportable(module, error, where) from error
        raise UserError(
            f"there is no module {error.name}",
            where=where,
            mend="Install the package that holds it, or put the folder it lies in on PYTHONPATH.",
        ) from None
    except Exception as error:
        raise _unimportable(module, error, where) from error
    if not hasattr(found, attribute):
        known = [name for name in vars(found) if not name.startswith("_")]
        raise UserError(f"{module} has no {attribute}", where=where, mend=nearest(attribute, known))
    return getattr(found, attribute)


def _unimportable(module: str, error: Exception, where: str) -> UserError:
    said = " ".join(str(error).split())
    return UserError(
        f"{module} cannot be imported: {type(error).__name__}: {said}",
        where=where,
        mend=f"Mend it until this works: python -c 'import {module}'.",
    )
