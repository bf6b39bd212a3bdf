"""What FSDP2 alone might stumble over: pieces without a row, weights that can't be cut, tied embeddings.

Three processes and a rank of 2, so that one of them has no row of any A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmtune.parts.model import VisionLanguageModel
from tests.training.test_engines import TUNE, described, launch, near, one_process, said
from tests.world import LORA, PENALTY

SCULPT: dict[str, Any] = {**TUNE["language"], "rank": 2, "prune_at": 3}
CONSTANT = {**PENALTY, "kind": "constant"}
VARIANTS = ["adapters", "control", "activation", "gradient", "nf4", "tied"]


def measured(kind: str, support: str) -> dict[str, Any]:
    """A tuner whose penalty's mask and whose support are made from more than sizes."""
    return {**SCULPT, "support": support, "penalty": {**PENALTY, "kind": kind}}


def tied(world: Path, folder: Path) -> Path:
    """The world's model with the embeddings as its head."""
    model = VisionLanguageModel.from_pretrained(world / "base")
    model.language.hf.config.tie_word_embeddings = True
    model.language.hf.tie_weights()
    model.options.language.weights = None  # type: ignore[union-attr]
    model.save_pretrained(folder / "tied_base")
    return folder / "tied_base"


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, trained."""
    folder = tmp_path_factory.mktemp("fsdp")
    variants: dict[str, dict[str, Any]] = {
        # Parameters of the root group that train, seen as they were by the teacher's pass.
        "adapters": {
            "tune": {**TUNE, "language": SCULPT, "connector": {**LORA, "rank": 2, "penalty": PENALTY}},
            "kl": {"weight": 0.3},
        },
        "control": {"tune": {**TUNE, "language": {**SCULPT, "penalty": CONSTANT}}},
        "activation": {"tune": {**TUNE, "language": measured("activation", "movement")}},
        "gradient": {"tune": {**TUNE, "language": measured("gradient", "gradient")}},
        "nf4": {
            "tune": {**TUNE, "language": SCULPT},
            "model": {"base": str(world / "base"), "quantize": "nf4"},
        },
        "tied": {"tune": {**TUNE, "language": SCULPT}, "model": {"base": str(tied(world, folder))}},
    }
    jobs = []
    for variant, changes in variants.items():
        train = {"steps": 6, "batch_size": 6, "activation_checkpointing": variant == "tied"}
        one_process(described(world, folder, f"{variant}_single", "single", train=dict(train), **changes))
        jobs.append(described(world, folder, variant, "fsdp2", train=dict(train), **changes))
    launch(jobs, folder, count=3)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_processes_train_what_one_does(folder: Path, variant: str) -> None:
    assert near(folder / f"{variant}_single/final", folder / f"{variant}/final") < 1e-5
    masks = [process["masks"] for process in said(folder, variant)]
    assert len(masks) == 3
    assert all(mask == said(folder, f"{variant}_single")[0]["masks"] for mask in masks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_support_holds(folder: Path, variant: str) -> None:
    for process in said(folder, variant):
        assert process["forward_passes"] > 0
        assert (
            process["outside_in_forward"] == process["outside_after_step"] == process["moments_outside"] == 0
        )
