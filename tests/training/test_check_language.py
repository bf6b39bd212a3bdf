"""mmtune check --language: what it prints of a model that fits, and what it says of one that doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtune.cli import main
from tests import tiny_models as tiny


def check(*arguments: str) -> int:
    return main(["check", *arguments])


def test_a_model_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--language", tiny.save_language(tmp_path, "gemma2")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "gemma2: 24,096 parameters, 2 layers, 32 wide, up to 256 tokens" in said
    assert "embeddings: 264, of them 3 without a token; the head is tied to the embeddings" in said
    assert "attention: eager" in said
    assert said.count("same") == 5 and "NOT" not in said
    assert "<|user|><image x1> Which colour is it?<|assistant|>[[Blue<|end|>]] several rounds: yes" in said
    assert "all-linear: 14 layers, model.layers.*.self_attn.q_proj" in said
    assert said.endswith("no faults")


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny.save_language(tmp_path, "bert", num_key_value_heads=4)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "''"))
    assert check("--language", weights) == 2
    said = capsys.readouterr()
    assert "NOT THE SAME" in said.out
    assert "logits before and after a later token is another differ" in said.err
    assert "chat template leaves out the user's turn" in said.err


def test_either_a_run_or_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert check() == 2 == check("run.yaml", "--language", "x")
    assert "give either a run's YAML or --language WEIGHTS" in capsys.readouterr().err
