"""Made-up evaluations and runs on the tiny suite, as reports read them: no model, no torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from mmtune.evaluation.protocol import Suite

SOURCE = [f"tiny_{name}" for name in ("reading", "colour", "shape", "place", "text")]
TINY = Suite("tiny", SOURCE, ["tiny_iconqa"])
TASKS = [*TINY.source, *TINY.target]


def write_evaluation(
    folder: Path, shares: Mapping[str, float], seed: int = 0, n: int = 200, model: str = "base model"
) -> None:
    """An evaluation in which about `shares[task]` of the n questions are right."""
    folder.mkdir(parents=True)
    results: dict[str, Any] = {}
    for task, share in shares.items():
        # Each question has a difficulty of its own, the same for every model, as real ones do.
        hard, luck = random.Random(task), random.Random(f"{task} {seed} {share}")
        rows = [
            {
                "question_id": i,
                "prediction": "a",
                "score": float(0.8 * hard.random() + 0.2 * luck.random() < share),
                "cluster": f"picture {i // 2}",
            }
            for i in range(n)
        ]
        (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores = [float(str(row["score"])) for row in rows]
        results[task] = {
            "score": 100 * fmean(scores),
            "stderr": 100 * stdev(scores) / n**0.5,
            "n": n,
            "missing": 0,
            "rule": "exact",
            "metric": "accuracy",
        }
    written = {
        "results": results,
        "configs": {task: {"hash": f"protocol {task}"} for task in shares},
        "model": "somewhere",
        "model_hash": model,
        "split": "test",
        "splits": dict.fromkeys(shares, "test"),
        "environment": {"torch": "2.11"},
        "versions": {task: f"protocol {task}" for task in shares},
        "precision": "float32",
        "batch_size": 32,
        "data": {task: f"annotations {task}" for task in shares},
    }
    (folder / "results.json").write_text(json.dumps(written))


def write_run(folder: Path, shares: Mapping[str, float], seed: int, rank: int = 4, n: int = 200) -> Path:
    tune = {"language": {"tuner": "lora", "rank": rank}}
    config = {"name": folder.name, "seed": seed, "tune": tune, "output": str(folder.parent)}
    write_evaluation(folder / "eval" / "tiny-test", shares, seed, n, model=folder.name)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "final").mkdir()
    trained = {"config": f"hash of {folder.name}", "data": "d", "versions": {}, "step": 9, "seed": seed}
    trained |= {"base": "base model", "model_hash": folder.name, "commit": "c-dirty"}
    (folder / "final" / "trained.json").write_text(json.dumps(trained))
    return folder


def level(source: float, target: float) -> dict[str, float]:
    return {task: source / 100 for task in SOURCE} | {"tiny_iconqa": target / 100}


def base_of(folder: Path) -> Path:
    write_evaluation(folder / "base" / "eval" / "tiny-test", level(92, 25))
    return folder / "base"


def world(folder: Path, groups: Mapping[str, tuple[float, float]], seeds: Sequence[int]) -> list[Path]:
    runs = []
    for rank, (name, (source, target)) in enumerate(groups.items()):
        for seed in seeds:
            wobble = random.Random(f"{name} {seed}")
            at = level(source + wobble.gauss(0, 1.5), target + wobble.gauss(0, 1.5))
            runs.append(write_run(folder / "runs" / f"{name}_s{seed}", at, seed, rank))
    return runs


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


GROUPS = {"lora": (40.0, 67.0), "lorasculpt": (80.0, 62.0)}
