"""Kills runs at random moments, resumes them, and compares every file with a run that was never interrupted.

    python tests/kill_and_resume.py --kills 50 --faults 50 --seed 0

A run has two stages (the connector alone; LoRASculpt with both penalties and dropout), accumulates over
micro-batches, writes checkpoints and evaluates itself. It is killed with SIGKILL, each run up to four times,
at a moment drawn from its whole life or at a chosen place (KINDS). A fault is a disk that is full from some
write on: the run must end with exit code 2 and one message, and go on once there is room. All runs are forks
of one process that has imported everything and computed nothing, so a start costs little.

Compared is every byte of every file, but for what tells the time: the speeds in metrics.jsonl, and the date
and seconds in results.json. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import functools
import gc
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.sabotage import MOMENTS, Die, sabotage, watch  # noqa: E402

# How often a kill is of each kind. time: any moment. write: before, in or after a call that changes a file.
SHARES = "time 8, write 7, micro-step 2, prune 2, optimiser 1, evaluation 2, stage 1, resume 2"
KINDS = {kind: int(share) for kind, share in (entry.split() for entry in SHARES.split(", "))}
RUN = Path("runs") / "run"
SECONDS = 300  # after which a run counts as hung


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--faults", type=int, default=0, help="full disks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        finish(fork(place, lambda die: build_world(place)), place)
        warm(place)
        whole, lengths = uninterrupted(place)
        told = f"{lengths['seconds']:.1f} s; changes files {lengths['write']:.0f} times"
        print(f"an uninterrupted run: {told}; another one is identical")
        print(f"{'':>4} {'run':>4} {'step':>4}  {'kind':<11} {'identical':<9}  where it died", flush=True)
        dice = random.Random(options.seed)
        done = wrong = runs = 0
        while done < options.kills:
            runs += 1
            folder = place / f"run-{runs}"
            kills = min(dice.randint(1, 4), options.kills - done)
            died = kill_and_finish(folder, place, dice, lengths, kills)
            wrong += report(died, runs, done, differences(whole, contents(folder / RUN)))
            done += len(died)
        for _ in range(options.faults):
            runs += 1
            folder = place / f"run-{runs}"
            died = fill_and_finish(
                folder, place, dice.randrange(int(lengths["write"])), dice.choice(MOMENTS[:2])
            )
            wrong += report(died, runs, done, differences(whole, contents(folder / RUN)))
            done += len(died)
    gc.unfreeze()
    said = "all identical" if not wrong else f"{wrong} runs differ"
    counted = f"{options.kills} kills and {options.faults} full disks in {runs} runs"
    print(f"{counted}, {time.perf_counter() - began:.0f} s: {said}")
    return 1 if wrong else 0


Died = list[tuple[str, str, str]]  # for each time: the last step that was logged, the kind, and where


def report(died: Died, run: int, done: int, different: list[str]) -> bool:
    """Prints a line for each time that a run died, and how it differs in the end. Returns whether it does."""
    same = "NO" if different else "yes"
    for number, (step, kind, where) in enumerate(died, start=done + 1):
        print(f"{number:>4} {run:>4} {step:>4}  {kind:<11} {same:<9}  {where}", flush=True)
    for line in different:
        print(f"     run {run}: {line}")
    return bool(different)


# ---- A run ----------------------------------------------------------------------------------------------


def build_world(place: Path) -> None:
    """The tiny world, a random model, and the YAML of the run."""
    from tests.world import FROZEN, FULL, PENALTY, SCULPT, build, run_file

    build(place)
    tiny = place / "datasets" / "tiny"
    block = {
        "data": [{"path": str(tiny / "train_instructions.json"), "image_root": str(tiny)}],
        "train": {"batch_size": 6, "micro_batch_size": 2, "log_every": 1, "max_length": 512},
    }
    connector = {**FULL, "penalty": PENALTY}
    sculpt = {**SCULPT, "prune_at": 4, "dropout": 0.2, "penalty": {**PENALTY, "modules": "pruned"}}
    lengths = (
        {"steps": 3, "checkpoint": {"every": 2, "keep": 1}},
        {"steps": 8, "checkpoint": {"every": 2, "keep": 2}},
    )
    tunes = (
        {"vision": FROZEN, "connector": connector, "language": FROZEN},
        {"vision": FROZEN, "connector": connector, "language": sculpt},
    )
    stages = [
        {**block, "train": {**block["train"], **length}, "tune": tune}  # type: ignore[dict-item]
        for length, tune in zip(lengths, tunes, strict=True)
    ]
    evaluation = {"suite": "tiny", "root": str(tiny), "limit": 3, "batch_size": 3}
    path = run_file(place, place, "run", stages=stages, evaluate=evaluation)
    path.write_text(path.read_text().replace(f"output: {place}", "output: runs"))
    (place / "modules").write_text("\n".join(sys.modules))


at_end: list[Callable[[], object]] = []  # of a child; os._exit runs nothing of Python's own


def start(folder: Path, place: Path, sabotage: Callable[[Die], None]) -> int:
    """Forks a process that trains, or goes on, in `folder`. Returns its process id."""
    folder.mkdir(exist_ok=True)

    def train(die: Die) -> None:
        import torch

        from mmtune.cli import main as mmtune

        os.chdir(folder)
        torch.set_num_threads(1)
        sabotage(die)
        code = mmtune(["train", str(place / "run.yaml"), "--resume"])
        for last in at_end:
            last()
        os._exit(code)

    return fork(folder, train)


def fork(folder: Path, work: Callable[[Die], None]) -> int:
    """A child that does `work`, its output in `folder`/log; SIGUSR1 tells `folder`/where what it is doing."""
    (folder / "where").write_text("")
    child = os.fork()
    if child:
        return child
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    where = os.open(folder / "where", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=where, all_threads=False)

    def die(what: str) -> NoReturn:
        os.write(where, what.encode())
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    try:
        work(die)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def finish(
    child: int, folder: Path, expected: tuple[int, ...] = (0, -signal.SIGKILL, -signal.SIGUSR1)
) -> int:
    """Waits for a child. Returns its exit code, below 0 for a signal; raises where another is expected."""
    deadline = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"a run hangs:\n{log(folder)}")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    if code not in expected:
        raise RuntimeError(f"a run ended with exit code {code}:\n{log(folder)}")
    return code


def log(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def uninterrupted(place: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """Two uninterrupted runs, the second in a process of its own, as a user's is. Returns their files, and
    the seconds and the number of places of each kind of the first.
    """
    lengths: dict[str, float] = {}

    def count(die: Die) -> None:
        seen: dict[str, int] = {}

        def look(kind: str, moment: str, what: str) -> None:
            if moment == "before":
                seen[kind] = seen.get(kind, 0) + 1

        watch(look)
        at_end.append(lambda: (place / "counts").write_text(json.dumps(seen)))

    first, second = place / "first", place / "second"
    began = time.perf_counter()
    finish(start(first, place, count), first, (0,))
    lengths |= json.loads((place / "counts").read_text())
    lengths["seconds"] = time.perf_counter() - began
    second.mkdir()
    command = [sys.executable, "-m", "mmtune.cli", "train", str(place / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=second, env=environment, capture_output=True, check=True, timeout=SECONDS)
    differing = differences(contents(first / RUN), contents(second / RUN))
    if differing:
        raise RuntimeError(f"two uninterrupted runs differ: {differing}")
    return contents(first / RUN), lengths


def warm(place: Path) -> None:
    """Imports here what making the world and its model imported, and the rest of mmtune and peft."""
    ours = ["mmtune.training.loop", "mmtune.evaluation.evaluate", "mmtune.evaluation.generate", "peft"]
    for name in ours + (place / "modules").read_text().splitlines():
        if name.partition(".")[0] not in ("__main__", "__mp_main__"):
            try:
                importlib.import_module(name)
            except Exception:
                continue  # some are made up by their package and cannot be imported by name
    gc.freeze()  # no child has to look through it


# ---- Killing --------------------------------------------------------------------------------------------


def kill_and_finish(
    folder: Path, place: Path, dice: random.Random, lengths: dict[str, float], kills: int
) -> Died:
    """Kills a run up to `kills` times and lets it finish."""
    died: Died = []
    for number in range(kills):
        kinds = {kind: share for kind, share in KINDS.items() if number or kind != "resume"}
        (kind,) = dice.choices(list(kinds), list(kinds.values()))
        early = dice.random() ** (1 + number)  # there is less and less left to do
        if kind == "time":
            child = start(folder, place, lambda die: None)
            time.sleep(early * lengths["seconds"])
            os.kill(child, signal.SIGUSR1)
            time.sleep(0.02)
            os.kill(child, signal.SIGKILL)
        else:
            at = int(early * lengths[kind])
            child = start(folder, place, functools.partial(sabotage, kind, at, dice.choice(MOMENTS)))
        if finish(child, folder) == 0:
            return died  # it was quicker
        died.append((step(folder), kind, told(folder)))
    finish(start(folder, place, lambda die: None), folder, (0,))
    return died


def fill_and_finish(folder: Path, place: Path, at: int, moment: str) -> Died:
    """Lets the disk of a run be full from the `at`-th write on, then lets the run finish with room again.

    Raises RuntimeError where the full disk is not told in one message.
    """

    def fill(die: Die) -> None:
        seen = 0
        full = False

        def look(kind: str, when: str, what: str) -> None:
            nonlocal seen, full
            if kind != "write":
                return
            if full or (seen == at and when == moment) or (seen > at and when == "before"):
                if not full:
                    print(f"full: {when} {what}", file=sys.stderr, flush=True)
                full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            seen += when == "after"

        watch(look)

    code = finish(start(folder, place, fill), folder, (0, 2))
    said = log(folder)
    first = re.findall(r"^full: (.*)", said, re.MULTILINE)
    if not first:
        return []  # there was nothing left to write
    messages = [line for line in said.splitlines() if line.startswith("mmtune: ")]
    if code != 2 or len(messages) != 1 or "cannot be" not in messages[0] or "Traceback" in said:
        raise RuntimeError(f"a full disk was told of in this way, with exit code {code}:\n{said}")
    died = [(step(folder), "full disk", f"{first[0]}: {messages[0].removeprefix('mmtune: ')}")]
    finish(start(folder, place, lambda die: None), folder, (0,))
    return died


def step(folder: Path) -> str:
    """The last step that is in metrics.jsonl."""
    path = folder / RUN / "metrics.jsonl"
    found = re.findall(r'"step": (\d+), .*}', path.read_text()) if path.is_file() else []
    return found[-1] if found else "-"


def told(folder: Path) -> str:
    """What a process last told of where it was: in our words, or a stack, innermost call first."""
    text = (folder / "where").read_text()
    calls = re.findall(r'File "([^"]+)", line \d+ in (\S+)', text)
    if not calls:
        return text or "as it started"
    ours = next((f"{Path(file).stem}.{name}" for file, name in calls if "/mmtune/" in file), "before mmtune")
    inside = f"{Path(calls[0][0]).stem}.{calls[0][1]}"
    return ours if inside == ours else f"{ours}, in {inside}"


# ---- Comparing ------------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, bytes]:
    """Each file of a run without what tells the time."""
    from mmtune.evaluation.results import TIMES
    from mmtune.training.meter import SPEEDS

    found = {}
    for path in sorted(run.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]).encode()
        if path.name == "results.json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in TIMES}).encode()
        found[str(path.relative_to(run))] = data
    return found


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """The files in which two runs differ, and how."""
    said = []
    for name in sorted(one.keys() | other.keys()):
        if name not in other or name not in one:
            said.append(f"{name} is {'missing' if name not in other else 'left over'}")
        elif one[name] != other[name]:
            said.append(f"{name} differs")
    return said


if __name__ == "__main__":
    sys.exit(main())
