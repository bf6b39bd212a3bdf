"""What a run tells while it runs: metrics.jsonl, and a progress bar with an estimate."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmtune.core.files import writing

# What a line of metrics.jsonl tells of the time; all else in it is the same when a run is repeated.
SPEEDS = ("samples_per_s", "tokens_per_s")


class Meter:
    """A context around a stage. Without a terminal a line is printed now and then instead of the bar.

    quiet: says and writes nothing, on all processes of a run but the first.
    """

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, path: Path, name: str, first: int, last: int, quiet: bool = False) -> None:
        self.path, self.name, self.first, self.last = path, name, first, last
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.samples = self.tokens = 0
        self.began = self.window = self.stepped = self.spoke = time.perf_counter()

    def __enter__(self) -> Meter:
        self.progress.start()
        self.task = self.progress.add_task(self.name, total=self.last, completed=self.first, loss="-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float, samples: int, tokens: int) -> None:
        """Counts one optimiser step. tokens: all positions of text and pictures, without padding."""
        if self.quiet:
            return
        self.samples += samples
        self.tokens += tokens
        self.progress.update(self.task, completed=step, loss=f"{loss:.3f}")
        self.stepped = now = time.perf_counter()
        if not self.console.is_terminal and (
            now - self.spoke > self.SECONDS_BETWEEN_LINES or step == self.last
        ):
            self.spoke = now
            left = (now - self.began) / max(1, step - self.first) * (self.last - step)
            line = f"{self.name}: step {step} of {self.last}, loss {loss:.3f}, about {left / 60:.1f} min left"
            print(line, file=sys.stderr, flush=True)

    def log(self, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, with samples/s and tokens/s of the steps since the last one.

        What a probe took after the last step is not counted. It is on the disk before a checkpoint of its
        step is. Raises UserError where it cannot be written.
        """
        if self.quiet:
            return
        seconds = max(self.stepped - self.window, 1e-9)
        speeds = (round(self.samples / seconds, 2), round(self.tokens / seconds, 1))
        self.window, self.samples, self.tokens = time.perf_counter(), 0, 0
        line = json.dumps({**values, **dict(zip(SPEEDS, speeds, strict=True))}, allow_nan=False) + "\n"
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
