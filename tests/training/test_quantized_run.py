"""A run on a base in 4 or 8 bits: trained, stopped and resumed, evaluated against its base, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmtune.cli import main
from mmtune.parts.fingerprint import model_hash
from tests.world import FROZEN, FULL, PENALTY, SCULPT, greatest_difference, metrics, run_file, trained

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_whole_way(world: Path, tmp_path: Path, kind: str) -> None:
    path = run_file(
        world,
        tmp_path,
        model={"base": str(world / "base"), "quantize": kind},
        tune={
            "vision": FROZEN,
            "connector": {**FULL, "penalty": PENALTY},
            "language": {**SCULPT, "penalty": PENALTY},
        },
        kl={"weight": 0.1},
        train={"steps": 4, "checkpoint": {"every": 3}},
    )
    run, final = tmp_path / "run", tmp_path / "run" / "final"
    assert main(["check", str(path)]) == 0
    assert main(["train", str(path)]) == 0
    assert all(line["penalty_language"] > 0 for line in metrics(run)[1:])
    table = json.loads((run / "tuning_table.json").read_text())
    assert sum(row["pruned"] for row in table) == 14

    before = trained(final)
    assert all("connector" in name or "lora_" in name for name in before)
    shutil.rmtree(final)
    assert main(["train", str(path), "--resume"]) == 0  # from step 3, after the prune
    assert greatest_difference(before, trained(final)) == 0

    base = json.loads((final / "trained.json").read_text())["base"]
    assert base == model_hash(run / "base") != model_hash(world / "base")
    tiny = str(world / "datasets/tiny")
    asked: list[Any] = ["--tasks", "tiny_colour", "--data_root", tiny, "--limit", "4"]
    for number, variant in enumerate((["--kl"], ["--restore", "language"], ["--scale", "0.5"])):
        output = tmp_path / str(number)
        assert main(["eval", "--model", str(final), *asked, "--output_path", str(output), *variant]) == 0
        made = json.loads((output / "results.json").read_text())
        assert base in (made.get("base_hash"), made.get("kl_base"))
    assert main(["export", str(final), str(tmp_path / "merged"), "--to", "merged"]) == 0
