"""Several processes that share one job, as torchrun starts them: which one this is, and
where they wait for each other. Alone, nothing here does anything, nor imports torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from mmtune.core.errors import UserError

PATIENCE = timedelta(days=2)  # the slowest process may be hours behind
FIRST_SPEAKS = 15  # seconds in which the first process has said what they all found
_groups: dict[str, Any] = {}


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def tell(text: str) -> None:
    """A line on stderr, once for all processes."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def said_once() -> Iterator[None]:
    """A context for what every process finds alike: of a mistake the first one tells, the others end."""
    try:
        yield
    except UserError:
        if rank() > 0:
            time.sleep(FIRST_SPEAKS)  # or the launcher would end the first one before it has spoken
            raise SystemExit(2) from None
        raise


@contextmanager
def joined() -> Iterator[None]:
    """A context in which the processes can wait for each other; left as it was found where one is open."""
    if count() == 1:
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    # gloo, also beside GPUs: what is exchanged goes through files, and waiting needs no accelerator.
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Returns once all processes are here. Raises UserError where one of them has ended: it says why."""
    if count() == 1:
        return
    import torch.distributed as dist

    try:
        dist.barrier(group=_patient())
    except RuntimeError:
        raise UserError(
            "another process of this job has ended before its share was done",
            where=f"process {rank()} of {count()}",
            mend="Its own message says why. The same command goes on from what is written; training needs "
            "--resume.",
        ) from None


def _patient() -> Any:
    """A group of all processes that waits for the slowest: an engine's own gives up after minutes."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if _groups.get("world") is not world:
        _groups.update(world=world, patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    return _groups["patient"]
