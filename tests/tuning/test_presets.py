"""The presets that ship: what they hold, and that what is given beside them comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmtune.core.config import Source, leaves, parse, to_dict
from mmtune.core.errors import UserError
from mmtune.run import TuneOptions
from mmtune.training.check import check_run
from tests.world import run_file

# The released scripts: ours-train.sh, trainconfig_lora.sh and the trainer's own defaults.
RELEASED = {
    "connector.lr": 2e-5,
    "language.lr": 2e-4,
    "language.rank": 32,
    "language.alpha": 64,
    "language.dropout": 0.05,
    "language.density": 0.1,
    "language.prune_at": 100,
    "language.support": "magnitude",
    "language.penalty.weight": 1e-3,
    "language.penalty.omega": 1,
    "language.penalty.modules": ["*.q_proj", "*.k_proj", "*.v_proj"],
}


def read(folder: Path, text: str) -> dict[str, Any]:
    file = folder / "tune.yaml"
    file.write_text(text)
    made: dict[str, Any] = to_dict(parse(TuneOptions, Source(file)))
    return made


def at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def test_reference_is_what_the_released_scripts_do(tmp_path: Path) -> None:
    made = read(tmp_path, "preset: reference")
    assert {key: at(made, key) for key in RELEASED} == RELEASED
    assert "penalty" not in made["connector"]
    assert made["vision"] == {"tuner": "frozen"}


def test_paper_asks_for_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, "preset: paper")
    assert [fault.what for fault in raised.value.faults] == ["'weight' is missing"] * 2
    made = read(
        tmp_path, "preset: paper\nlanguage: {penalty: {weight: 2}}\nconnector: {penalty: {weight: 5}}"
    )
    assert (made["language"]["penalty"]["weight"], made["connector"]["penalty"]["weight"]) == (2, 5)
    assert made["language"]["penalty"]["modules"] == "pruned"


def test_default_asks_for_the_rates(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, "preset: default")
    assert [fault.what for fault in raised.value.faults] == ["'lr' is missing"] * 2
    made = read(tmp_path, "preset: default\nlanguage: {lr: 4e-3}\nconnector: {lr: 2e-4}")
    tiny = yaml.safe_load(Path("scripts/tiny/lorasculpt.yaml").read_text())["tune"]
    tiny["language"]["lr"], tiny["connector"]["lr"] = 4e-3, 2e-4  # YAML's own reader takes them for text
    given = leaves(tiny)
    assert {key: value for key, value in leaves(made).items() if key in given} == given


def test_check_shows_what_a_preset_comes_to(
    tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(world, tmp_path, tune={"preset": "reference", "language": {"rank": 4, "prune_at": 2}})
    check_run(path, samples=0)
    said = capsys.readouterr().out
    assert "connector: {lr: 2.0e-05, tuner: full}" in said
    assert "rank: 4, alpha: 64" in said
    assert "density: 0.1, prune_at: 2" in said
