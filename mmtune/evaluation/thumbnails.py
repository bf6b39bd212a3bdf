"""The pictures of a report as small data URIs, so that its page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.core.files import inside
from mmtune.data.image import load_image

SIDE = 128  # pixels of the longer side, at most
BUDGET = 8_000_000  # bytes that all of them may take in the page
AT_ONCE = 32

Picture = tuple[str, str]
"""The folder of a task's pictures, and a path in it."""


@dataclass(frozen=True)
class Thumbnails:
    """Pictures by what they show, and why the others have none."""

    uris: dict[Picture, str] = field(default_factory=dict)
    budget: int = BUDGET
    over_budget: int = 0
    unreadable: dict[Picture, str] = field(default_factory=dict)
    """Picture -> what is wrong with it."""

    def warnings(self) -> list[str]:
        """Of pictures that were asked for and cannot be shown."""
        if not self.unreadable:
            return []
        (folder, name), fault = next(iter(self.unreadable.items()))
        several = f"{len(self.unreadable):,} of {len(self):,} pictures are not shown on the page"
        return [f"{several}, such as {name!r} in {folder}: {fault}"]

    def __len__(self) -> int:
        """All pictures that were asked for."""
        return len(self.uris) + self.over_budget + len(self.unreadable)


def make_thumbnails(pictures: Iterable[Picture], budget: int = BUDGET) -> Thumbnails:
    """The first pictures that fit into `budget` bytes, each made once, however often it is named.

    They are decoded as the models saw them: upright, in RGB, nothing from outside their folder. What cannot
    be read is told, never raised.
    """
    made = Thumbnails(budget=budget)
    wanted = list(dict.fromkeys(pictures))
    spent = 0
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(wanted), AT_ONCE) if budget else ():
            batch = wanted[start : start + AT_ONCE]
            for picture, (uri, fault) in zip(batch, pool.map(_thumbnail, batch), strict=True):
                if fault:
                    made.unreadable[picture] = fault
                elif spent + len(uri) <= budget:
                    made.uris[picture] = uri
                    spent += len(uri)
                else:
                    spent = budget
            if spent >= budget:
                break
    left = len(wanted) - len(made.uris) - len(made.unreadable)
    return replace(made, over_budget=left)


def _thumbnail(picture: Picture) -> tuple[str, str]:
    """A data URI, or what is wrong with the picture."""
    folder, name = picture
    try:
        small = load_image(inside(Path(folder), name))
    except UserError as error:
        return "", error.faults[0].what
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=60)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii"), ""
