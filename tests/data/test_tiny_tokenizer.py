"""The tiny model's tokenizer: what it spells out, and that it is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmtune.data.tiny_tokenizer import train_tokenizer


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_capitals_and_digits_are_tokens_of_their_own(world: Path, tmp_path: Path) -> None:
    train_tokenizer(world / "datasets" / "tiny", tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in ("QXZ", "40713"):
        assert tokenizer.tokenize(text) == list(text)
    for text in ("What is written on the sign?", "<image>\n\u4f60 \U0001f408"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_one_that_is_there_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    train_tokenizer(world / "datasets" / "tiny", tmp_path)
    assert files(tmp_path) == {"tokenizer_config.json": b"{}"}


@pytest.mark.parametrize("left", ["", "tokenizer.json"], ids=["empty", "half"])
def test_what_an_interrupted_run_left_is_replaced(world: Path, tmp_path: Path, left: str) -> None:
    for folder in (tmp_path / "tokenizer", tmp_path / ".tokenizer.partial"):
        folder.mkdir()
        if left:
            (folder / left).write_text("{")
            (folder / "left over").write_text("")
    train_tokenizer(world / "datasets" / "tiny", tmp_path / "tokenizer")
    assert files(tmp_path / "tokenizer") == files(world / "datasets" / "tiny" / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_an_interrupted_run_leaves_no_tokenizer(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(world / "datasets" / "tiny", tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
