from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.bench import generate as bench
from mmtune.cli import main
from mmtune.evaluation.generate import generate_answers
from mmtune.evaluation.protocol import load_protocol
from mmtune.parts import VisionLanguageModel


def test_the_plain_loop_gives_the_answers_of_the_batched_one(world: Path) -> None:
    model = VisionLanguageModel.from_pretrained(world / "base")
    root = world / "datasets" / "tiny"
    protocol = load_protocol("tiny_colour")
    questions, _ = protocol.questions("test", root)
    alone = bench.one_at_a_time(model, protocol, questions, root)
    assert alone == generate_answers(model, protocol, questions, root, 5)
    others = {**alone, questions[0].id: "x", questions[3].id: "y"}
    assert bench.differing(alone, others) == 2


def test_bench_generate(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    (tmp_path / "two.yaml").write_text("name: two\nsource: [tiny_text]\ntarget: [tiny_iconqa]\n")
    asked = ["bench", "generate", "--model", "base", "--suite", str(tmp_path / "two.yaml"), "--limit", "6"]
    assert main([*asked, "--batch_size", "3", "--output_path", str(tmp_path / "bench.json")]) == 0
    made: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert list(made["tasks"]) == ["tiny_text", "tiny_iconqa"]
    assert (made["all"]["questions"], made["all"]["different"]) == (12, 0)
    for row in made["tasks"].values():
        assert row["seconds_alone"] > 0 and row["seconds_batched"] > 0
        assert 0 <= row["bf16_unlike_fp32"] <= row["questions"] == 6
    # A model with random weights is unsure, so rounding to bf16 changes some of its answers.
    assert made["all"]["bf16_unlike_fp32"] > 0
    printed = capsys.readouterr().out
    assert "tiny_text" in printed and "all" in printed
