"""Ctrl-C and SIGTERM: the step is finished, a checkpoint is written, and the user is told how to go on."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from mmtune.core.errors import UserError

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SECONDS_OF_GRACE = 20  # Slurm kills 30 seconds after SIGTERM, docker 10


class Interrupted(KeyboardInterrupt):
    """What a signal ends the command with; its text is for the user. exit_code: as shells count it."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class Signals:
    """A context, for the main thread, in which the signals of NAMES raise Interrupted.

    Between `hold` and `release` the first one waits instead, as `waiting`, and only a second one raises.
    Outside the context nothing is caught. go_on: the command that goes on where this one stops. twice:
    whether a second one raises; otherwise it does nothing.
    """

    def __init__(self, go_on: str = "", twice: bool = True) -> None:
        self.go_on = go_on
        self.twice = twice
        self.waiting: int | None = None
        self.holding = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in NAMES:
            # One that the caller ignores (nohup, a job in the background) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # A signal that went to the data loader's workers too may have ended these, and the step with them.
        if self.waiting is not None and isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._interrupted(self.waiting, "") from error

    def hold(self) -> None:
        """From now on a signal waits."""
        self.holding = True

    def release(self) -> None:
        """The end of `hold`. Raises Interrupted where a signal has waited."""
        self.holding = False
        if self.waiting is not None:
            self.stop("")

    def stop(self, done: str) -> None:
        """Raises Interrupted for the signal that waits. done: what was reached, such as "after step 4".

        Where none waits here, it came to another process of the run.
        """
        raise self._interrupted(signal.SIGTERM if self.waiting is None else self.waiting, done)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.waiting is not None and not self.twice:
            return
        if not self.holding or self.waiting is not None:
            raise self._interrupted(number, "")
        self.waiting = number
        # Not print(): a signal may come in the middle of one.
        again = b"; once more stops at once" if self.twice else b""
        os.write(2, b"\nmmtune: stopping after this step, with a checkpoint" + again + b"\n")

    def _interrupted(self, number: int, done: str) -> Interrupted:
        said = " ".join(filter(None, ["stopped by", NAMES[signal.Signals(number)], done]))
        return Interrupted(number, f"{said}; go on with\n    {self.go_on}")


def leave_to_parent(worker: int) -> None:
    """For a worker of the data loader: what is sent to all processes is the parent's to answer.

    A terminal sends Ctrl-C in this way, and a cluster SIGTERM; but by SIGTERM the parent itself ends a worker
    that hangs, so it is only put off, for as long as a step may take to finish.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_OF_GRACE))
