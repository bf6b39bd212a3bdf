"""Runs trained and evaluated, one after the other or side by side: what a sweep and a swap of towers share.

A failure stops no other run; what is finished is skipped, so that the same command goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import writing
from mmtune.evaluation.protocol import Suite
from mmtune.experiments.estimate import Progress
from mmtune.run import EvaluateOptions, RunOptions
from mmtune.training.signals import Signals

_stopping: list[int] = []  # in a process of its own: the signals that came between two runs


def run_all(
    runs: list[RunOptions],
    how: EvaluateOptions,
    suite: Suite,
    jobs: int,
    logs: Path,
    signals: Signals | None = None,
) -> list[Fault]:
    """Trains and evaluates what is not finished yet; returns what went wrong with the others.

    how: in what way all of them are evaluated, whatever their own configs say. jobs: so many at a time, each
    in a process of its own with its share of the cores, what it prints in `logs`/NAME.log. Where there is one
    job, that file has the traceback of a run that failed by no mistake in its config, for want of memory for
    example, and signals are as in `train`.
    """
    if jobs == 1:
        return _run_in_turn(runs, how, suite, logs, signals)
    return _run_side_by_side(runs, how, suite, jobs, logs)


def evaluate_as(how: EvaluateOptions, model: Path, suite: Suite, place: Path) -> None:
    """Evaluates a model as `how` says, under `place`; what is done is kept. Raises UserError."""
    from mmtune.evaluation.evaluate import evaluate_suite

    evaluate_suite(
        model,
        suite,
        place,
        how.split,
        how.attribution,
        how.scales,
        how.kl,
        batch_size=how.batch_size,
        limit=how.limit,
        root=how.root,
        dtype=how.dtype,
    )


def _run_one(run: RunOptions, how: EvaluateOptions, suite: Suite, signals: Signals | None) -> None:
    from mmtune.training.folder import open_run

    if not open_run(run, resume=True):
        from mmtune.training.loop import train

        train(run, resume=True, signals=signals)
    evaluate_as(how, run.folder / "final", suite, run.folder)


def _run_in_turn(
    runs: list[RunOptions], how: EvaluateOptions, suite: Suite, logs: Path, signals: Signals | None
) -> list[Fault]:
    faults: list[Fault] = []
    progress = Progress(runs)
    for run in runs:
        before = len(faults)
        try:
            _run_one(run, how, suite, signals)
        except UserError as error:
            faults.append(Fault(str(error), run.name))
        except Exception as error:
            log = logs / f"{run.name}.log"
            with writing(log):
                logs.mkdir(parents=True, exist_ok=True)
                with open(log, "a", encoding="utf-8") as file:
                    traceback.print_exc(file=file)
            faults.append(Fault(_reason(error), run.name, f"See {log}."))
        failed = len(faults) > before
        if failed:
            print(f"mmtune: {run.name} FAILED", file=sys.stderr)
        progress.tell(run, failed)
    return faults


def _reason(error: Exception) -> str:
    """What no check foresaw, such as a GPU that is full, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _run_side_by_side(
    runs: list[RunOptions], how: EvaluateOptions, suite: Suite, jobs: int, logs: Path
) -> list[Fault]:
    """Runs in `jobs` processes, each with its share of the cores, what it prints in logs/NAME.log."""
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the processes when they start
    faults = []
    progress = Progress(runs)
    # Spawned, not forked: a process that has used threads cannot be forked safely.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_leave_to_parent) as pool:
        waiting: dict[Future[str | None], RunOptions] = {
            pool.submit(_run_logged, run, how, suite, logs / f"{run.name}.log"): run for run in runs
        }
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                if failure := future.result():
                    faults.append(Fault(failure, run.name, f"See {logs / run.name}.log."))
                progress.tell(run, failed=bool(failure))
        except BrokenProcessPool:
            raise UserError(
                "one of the processes was killed, perhaps for want of memory",
                where=logs,
                mend="The same command goes on; with fewer jobs it needs less memory.",
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # each writes a checkpoint first
            pool.shutdown(cancel_futures=True)
            raise
    return faults


def _leave_to_parent() -> None:
    """For a process of a sweep: Ctrl-C is its parent's to answer, SIGTERM between two runs ends the next."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _stopping.append(number))


def _run_logged(run: RunOptions, how: EvaluateOptions, suite: Suite, log: Path) -> str | None:
    """`_run_one` in a process of its own. Returns what went wrong, or None."""
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            # What is sent to all processes comes twice, the second time from the parent.
            with Signals("the command of the sweep", twice=False) as signals:
                if _stopping:
                    return "not begun, since SIGTERM came before"
                _run_one(run, how, suite, signals)
        except UserError as error:
            print(error)
            return str(error)
        except Exception as error:
            traceback.print_exc()
            return _reason(error)
        except KeyboardInterrupt as stopped:
            print(stopped)
            _stopping.append(signal.SIGTERM)
            return str(stopped)
    return None
