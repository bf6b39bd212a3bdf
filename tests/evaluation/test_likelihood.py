"""Log-likelihoods of options against the definition, written out one by one in fp64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.data.chat import Turn
from mmtune.evaluation.generate import answer_in_batches
from mmtune.evaluation.likelihood import Asked, Likelihood, likeliest, likelihoods
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.parts import VisionLanguageModel
from tests import tiny_models


@pytest.fixture(scope="module", params=["llama", "granite"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny_models.model(tmp_path_factory.mktemp("model"), request.param)


ASKED = [
    Asked("a", [Turn("user", "<image>\nHow many?")], ["one", "two", "seventeen"], tiny_models.pictures(1)),
    Asked("b", [Turn("user", "Which?")], ["A", "B"], tiny_models.pictures(0)),
    Asked("c", [Turn("user", "<image> or <image>, what do you say?")], ["", "x"], tiny_models.pictures(2, 3)),
]


def naive(model: VisionLanguageModel, asked: Asked, option: str) -> tuple[float, int]:
    """In fp64, one token after the other from the whole text before it: its sum and number of tokens."""
    prompt = model.chat.prompt(asked.turns)
    said = [*model.language.tokenizer(option, add_special_tokens=False).input_ids, 2]  # <|end|>
    features = model.connector(model.vision(asked.pictures)) if len(asked.pictures) else None
    total = 0.0
    for i, token in enumerate(said):
        row = torch.tensor([prompt + said[:i]])
        embeddings = model.language.embed(row.clamp_min(0))
        if features is not None:
            embeddings[row < 0] = features.flatten(0, 1)
        logits = model.language.hf(inputs_embeds=embeddings).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total, len(said)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_against_one_option_at_a_time(model: VisionLanguageModel, batch_size: int) -> None:
    found = likelihoods(model, ASKED, batch_size)
    model.double()
    try:
        with torch.no_grad():
            for asked, ours in zip(ASKED, found, strict=True):
                for option, one in zip(asked.options, ours, strict=True):
                    total, count = naive(model, asked, option)
                    assert one.total == pytest.approx(total, abs=2e-4)
                    assert one.per_token == pytest.approx(total / count, abs=2e-4)
                    assert total < -1  # a sure thing would prove nothing
    finally:
        model.float()


def test_the_batch_size_changes_nothing(model: VisionLanguageModel) -> None:
    assert likelihoods(model, ASKED, 1) == likelihoods(model, ASKED, 3) == likelihoods(model, ASKED, 16)


def test_of_equal_options_the_first(model: VisionLanguageModel) -> None:
    (found,) = likelihoods(model, [replace(ASKED[0], options=["two", "one", "two", "one"])], 3)
    assert (found[0], found[1]) == (found[2], found[3])
    assert likeliest(found) == (0 if found[0].total > found[1].total else 1)
    found = [Likelihood(total, mean, False) for total, mean in ((-3, -1), (-2, -2), (-2, -0.1))]
    assert likeliest(found) == 1


def test_options_beyond_the_context(model: VisionLanguageModel) -> None:
    with pytest.raises(UserError, match="the model's context has 256") as caught:
        likelihoods(model, [replace(ASKED[1], options=["A", "x" * 300])], 2)
    assert "question b" in str(caught.value)


def test_answers_are_the_likeliest_options(world: Path) -> None:
    model = VisionLanguageModel.from_pretrained(world / "base")
    root = world / "datasets" / "tiny"
    protocol = replace(load_protocol("tiny_iconqa"), decode="likelihood")
    questions, _ = protocol.questions("test", root)
    images = root / protocol.images
    batches = answer_in_batches(model, protocol, questions, images, 5)
    rows = {row["question_id"]: row for batch in batches for row in batch}
    assert rows.keys() == {question.id for question in questions}
    by_id = {question.id: question for question in questions}
    for name, row in rows.items():
        assert len(row["loglikelihood"]) == len(row["loglikelihood_per_token"]) > 1
        best = max(range(len(row["loglikelihood"])), key=row["loglikelihood"].__getitem__)
        assert row["text"] == by_id[name].choices[best]
        assert all(math.isfinite(value) and value < 0 for value in row["loglikelihood"])


QUESTION = Question("7", "How many?", ("two",), None, "7", choices=("one", "two"))


def test_what_stands_for_an_option() -> None:
    text, letters = load_protocol("tiny_iconqa"), load_protocol("tiny_letters")
    assert text.candidates(QUESTION) == ["one", "two"]
    assert letters.candidates(QUESTION) == ["A", "B"]
    assert replace(text, options_as="letter").candidates(QUESTION) == ["A", "B"]
    assert replace(letters, options_as="text").candidates(QUESTION) == ["one", "two"]
    with pytest.raises(UserError, match="no choices"):
        text.candidates(replace(QUESTION, choices=()))


def test_on_the_command_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    asked = ["eval", "--model", "base", "--decode", "likelihood", "--tasks"]
    assert main([*asked, "tiny_iconqa", "--output_path", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "results.json").read_text())
    config = made["configs"]["tiny_iconqa"]
    assert config["decode"] == "likelihood"
    assert config["hash"] != load_protocol("tiny_iconqa").hash
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "samples_tiny_iconqa.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row["prediction"] in row["doc"]["choices"]
        best = row["doc"]["choices"].index(row["prediction"])
        assert row["loglikelihood"][best] == max(row["loglikelihood"])
    capsys.readouterr()
    assert main([*asked, "tiny_text,tiny_iconqa,tiny_colour", "--output_path", str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert "task tiny_text, question" in said
    assert "task tiny_colour, question" in said
