"""The script for towers on four GPUs: end to end on stand-ins with two gloo processes; what a 7B needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from mmtune.core.errors import UserError
from mmtune.experiments.swap_shapes import check_shapes, print_shapes
from mmtune.experiments.swap_tower import plan_swap
from mmtune.training.check import Gpus
from tests import official, tiny_models
from tests.parts.towers import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "scripts/4x4090/swap.yaml"
TOWERS = ["clip", "siglip", "siglip2", "dinov2", "open_clip"]
TASKS = {"gqa", "iconqa_choose_txt"}
SUITE = "name: few\nsource: [gqa]\ntarget: [iconqa_choose_txt]\n"
SHORT = [
    f"stages.{stage}.train.{setting}"
    for stage in (0, 1)
    for setting in ("epochs=null", "steps=2", "batch_size=8", "micro_batch_size=2", "workers=0")
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Any) -> Path:
    """A checkout's scripts, the originals of the data, and a tower of each kind and two language models."""
    folder = tmp_path_factory.mktemp("swap") / "checkout"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("llava_pretrain", "llava_instruct", "iconqa", "gqa"):
        official.SETS[name](folder / "originals" / name, Random(0))
    for family in FAMILIES:
        if family.name in TOWERS:
            (folder / "hub" / family.name).mkdir(parents=True)
            family.save(folder / "hub" / family.name)
    for name, model, tokenizer in (
        ("vicuna", "llama", make_tokenizer("llama_first")),
        ("qwen", "qwen2", make_tokenizer("byte_level", "chatml", bos_token=None)),
    ):
        changes = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 1024}
        tiny_models.save_language(folder / "hub" / name, model, **changes)
        tokenizer.save_pretrained(folder / "hub" / name)
    (folder / "few.yaml").write_text(SUITE)
    return folder


def weights(checkout: Path) -> list[str]:
    """In the place of the published ones."""
    named = [f"towers.{tower}.weights={checkout / 'hub' / tower}" for tower in TOWERS]
    return [*named, "towers.dinov2.image_size=40"]


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VICUNA": str(checkout / "hub/vicuna"),
        "QWEN": str(checkout / "hub/qwen"),
        "SOURCES": str(checkout / "originals"),
        "SETS": "iconqa gqa",
        "SUITE": str(checkout / "few.yaml"),
        "ENGINE": "ddp",
        "GPUS": "2",
        "LIMIT": "4",
        "EVAL_BATCH": "4",
        "PARTIAL": "yes",
        **variables,
    }
    return subprocess.run(
        ["bash", "scripts/swap_tower_4x4090.sh", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def reported(checkout: Path) -> Path:
    """The folder of one tower's swap, made by the script."""
    given = [f"towers.siglip.weights={checkout / 'hub/siglip'}", *SHORT, "stages.1.tune.language.rank=4"]
    ran = run(checkout, "siglip", "qwen", *given)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-6000:]
    return checkout / "runs/swap/qwen"


def test_a_tower_from_the_published_files_to_the_report(reported: Path) -> None:
    report = json.loads((reported / "swap.json").read_text())
    (row,) = report["rows"]
    assert row["label"].startswith("siglip") and set(row["scores"]) == TASKS
    lines = (reported / "siglip_scratch_s0/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [(line["stage"], line["step"]) for line in (steps[0], steps[-1])] == [(1, 1), (2, 4)]
    assert (reported / "swap.html").is_file() and (reported / "swap.png").is_file()
    final = json.loads((reported / "siglip_scratch_s0/final/config.json").read_text())
    assert final["language"]["chat"] == "template"  # the model's own, though it was aligned in another


def test_every_tower_can_take_its_place(
    checkout: Path, reported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The parts' shapes, then the parts themselves and the data that the script has prepared."""
    monkeypatch.chdir(checkout)
    rank = ["stages.1.tune.language.rank=4", f"output={tmp_path}", f"evaluate.suite={checkout / 'few.yaml'}"]
    vicuna = f"model.language={{weights: {checkout / 'hub/vicuna'}, chat: vicuna_v1}}"
    given = [vicuna, *weights(checkout), *SHORT, *rank]
    given += [f"stages.{stage}.train.engine=single" for stage in (0, 1)]
    found = check_shapes(checkout / "scripts/4x4090/swap.yaml", given)
    grids = {each.name: each.stages[0].image_tokens for each in found}
    own = {family.name: family.grid**2 for family in FAMILIES if family.name in TOWERS}
    assert grids == {**own, "dinov2": 25}
    options, swaps = plan_swap(checkout / "scripts/4x4090/swap.yaml", given)
    assert [swap.tower for swap in swaps] == TOWERS
    facts = json.loads((options.folder / "towers.json").read_text())
    assert {name: known["image_tokens"] for name, known in facts.items()} == grids
    sizes = {each.name: each.stages[0].sizes for each in found}
    assert all(known["parameters"] == sizes[name]["vision"] for name, known in facts.items())


def test_parts_that_do_not_fit_are_told_together(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    config = json.loads((checkout / "hub/qwen/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config))
    given = [f"model.language={{weights: {tmp_path / 'short'}}}", *weights(checkout)]
    given += ["towers.clip.image_size=25", "towers.siglip.weights=nobody/knows"]
    with pytest.raises(UserError) as caught:
        check_shapes(YAML, given)
    said = [fault.what for fault in caught.value.faults]
    assert any(what.startswith("clip: ") and "25" in what for what in said)
    assert any(what.startswith("siglip: neither a folder nor a model") for what in said)


def test_the_heaviest_fits_24_gib(tmp_path: Path) -> None:
    """ViT-H has the most parameters and the fewest tokens, Qwen the largest vocabulary."""
    tower = "{tower: open_clip, weights: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, layer: -2}"
    heaviest = f"towers={{open_clip: {tower}}}"
    qwen = "model.language={weights: Qwen/Qwen2.5-7B-Instruct, chat: template}"
    gpus = Gpus(processes=4)
    found = check_shapes(YAML, [heaviest, qwen], gpus)
    with open(tmp_path / "said", "w") as file:
        print_shapes(found, gpus, Console(file=file, width=110))
    said = (tmp_path / "said").read_text()
    assert found[0].stages[0].image_tokens == 256
    assert " 256 " in said and " yes" in said and "align: GiB on each of 4 GPUs, DDP" in said


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["sglip"], {}, "unknown tower or language 'sglip'; known: all clip siglip siglip2 dinov2 open_clip"),
        ([], {"METHOD": "lorasculp"}, "unknown METHOD 'lorasculp'; known: lora lorasculpt"),
        (["clip", "seeds=[0, 1]"], {}, "'seeds=[0, 1]' is not for this script: set OUT, SEEDS"),
        (["clip", "output=elsewhere"], {}, "'output=elsewhere' is not for this script"),
    ],
)
def test_a_name_that_is_unknown(
    arguments: list[str], variables: dict[str, str], said: str, checkout: Path
) -> None:
    ran = run(checkout, *arguments, **variables)
    assert ran.returncode == 2 and said in ran.stderr


def test_a_tower_in_block_form_is_taken_and_one_given_twice_is_one(checkout: Path, tmp_path: Path) -> None:
    """As it would call mmtune, which here only says with what it was called."""
    shutil.copytree(checkout / "scripts", tmp_path / "scripts")
    yaml = tmp_path / "scripts/4x4090/swap.yaml"
    block = "\n  mine:\n    tower: clip\n    weights: my/tower   # of my own\nstages:\n"
    yaml.write_text(yaml.read_text().replace("\nstages:\n", block))
    said = tmp_path / "bin/mmtune"
    said.parent.mkdir()
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >&2\nexit 1\n')
    said.chmod(0o755)
    path = f"{said.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = run(tmp_path, "mine", "clip", "mine", PATH=path)
    (towers,) = [line for line in ran.stderr.splitlines() if line.startswith("towers={")]
    assert towers.startswith('towers={mine: {"tower": "clip", "weights": "my/tower"}, clip: {"tower": "clip"')
    assert towers.count("mine") == 1


def test_what_it_is_for(checkout: Path) -> None:
    ran = run(checkout, "--help")
    assert ran.returncode == 0 and "Usage: bash scripts/swap_tower_4x4090.sh [TOWER ...]" in ran.stdout
    assert 'METHOD="${METHOD:-lora}"' in ran.stdout and "set -euo" not in ran.stdout
