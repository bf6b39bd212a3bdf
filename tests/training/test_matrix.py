"""Towers, tuners and language models in the real loop: each pair of two of the three meets.

`pytest -s` prints the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtune.core.files import read_json
from mmtune.parts import VisionLanguageModel
from mmtune.training.loop import train
from tests import tiny_models as tiny
from tests.world import FROZEN, FULL, LORA, PENALTY, SCULPT, metrics, run_options

STEPS = 3
# The last layer but one of two blocks, 4 x 4 patches.
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": SIZES,
    "siglip": SIZES,
    "timm": {
        "architecture": "vit_tiny_patch16_224",
        "img_size": 64,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
    },
}
TUNERS: dict[str, dict[str, Any]] = {
    "frozen": {"tune": {"language": FROZEN}},
    "full": {"tune": {"language": FULL}},
    "lora": {"tune": {"language": LORA}},
    "lorasculpt": {"tune": {"language": {**SCULPT, "penalty": PENALTY}}},
    "kl": {"tune": {"language": LORA}, "kl": {"weight": 0.1}},
}
FAMILIES = ("llama", "qwen2", "phi", "gemma2", "gpt_neox")
CHAT = {"llama": "vicuna_v1", "gpt_neox": "plain"}
CELLS = [
    (family, tuner, list(TOWERS)[(row + column) % len(TOWERS)])
    for row, family in enumerate(FAMILIES)
    for column, tuner in enumerate(TUNERS)
]


@pytest.fixture(scope="module")
def matrix() -> Iterator[dict[tuple[str, str], str]]:
    """What stands in each cell; printed at the end."""
    cells: dict[tuple[str, str], str] = {}
    yield cells
    print(f"\n{'':12}" + "".join(f"{tuner:>24}" for tuner in TUNERS))
    for family in FAMILIES:
        row = (cells.get((family, tuner), "-") for tuner in TUNERS)
        print(f"{family:12}" + "".join(f"{cell:>24}" for cell in row))


@pytest.mark.parametrize(("family", "tuner", "tower"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_three_steps_with_any_tower(
    world: Path, tmp_path: Path, matrix: dict[tuple[str, str], str], family: str, tuner: str, tower: str
) -> None:
    matrix[family, tuner] = f"{tower}: FAULT"
    described = TUNERS[tuner]
    language = {**tiny.FAMILIES[family], "model_type": family, "max_position_embeddings": 512}
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        del language[name]  # those of the world's tokenizer
    tiny_world = world / "datasets/tiny"
    options = run_options(
        world,
        tmp_path,
        # As many as a batch holds: every step sees the same.
        data=[
            {"path": str(tiny_world / "train_instructions.json"), "image_root": str(tiny_world), "limit": 4}
        ],
        model={
            "vision": {"tower": tower, "config": TOWERS[tower], "layer": -1},
            "connector": {"kind": "mlp2x_gelu"},
            "language": {
                "config": {**language, "initializer_range": 0.1},
                "tokenizer": str(tiny_world / "tokenizer"),
                "chat": CHAT.get(family, "template"),
            },
        },
        tune={"vision": FROZEN, "connector": FULL, **described["tune"]},
        kl=described.get("kl"),
        train={"steps": STEPS, "batch_size": 4},
    )
    final = train(options)
    losses = [line["loss"] for line in metrics(options.folder)]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    kept = "eager" if family == "gemma2" else "sdpa"
    assert read_json(final / "trained.json")["attention"] == {"vision": "sdpa", "language": kept}
    model = VisionLanguageModel.from_pretrained(final)
    assert model.options.vision and model.options.vision.tower == tower
    assert model.language.hf.config.model_type == family
    matrix[family, tuner] = f"{tower}: ok, {losses[-1] - losses[0]:+.2f}"
