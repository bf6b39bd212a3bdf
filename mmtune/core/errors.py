"""One exception for every mistake a user can make: what was wrong, where, and how to mend it.

The command line prints it and ends with exit code 2; anything else that escapes is a fault of
mmtune's own (exit code 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What was wrong, where (file, line, key or sample id) and how to mend it."""

    what: str
    where: str = ""
    mend: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.mend:
            lines.append(f"    {self.mend}")
        return "\n".join(lines)


class UserError(Exception):
    """A mistake of the user's, or several found together; `faults` lists them all."""

    def __init__(self, what: str, *, where: object = "", mend: str = "") -> None:
        self.faults = [Fault(what, str(where), mend)]
        super().__init__(what)

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> UserError:
        """One error for several faults, so that they can all be mended in one go."""
        faults = list(faults)
        error = cls(faults[0].what)
        error.faults = faults
        return error

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)
