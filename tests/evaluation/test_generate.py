from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtune.core.errors import UserError
from mmtune.data.image import load_image
from mmtune.evaluation.generate import generate_answers
from mmtune.evaluation.protocol import load_protocol
from mmtune.parts import VisionLanguageModel


@pytest.fixture(scope="module")
def model(world: Path) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(world / "base")


@pytest.mark.parametrize("task", ["tiny_reading", "tiny_text", "tiny_iconqa"])
def test_answers_are_those_of_one_question_at_a_time_without_a_cache(
    world: Path, model: VisionLanguageModel, task: str
) -> None:
    """The greedy loop written out: no padding, no batch, no cache, the whole text again for each token."""
    protocol = load_protocol(task)
    root = world / "datasets" / "tiny"
    questions, _ = protocol.questions("test", root)
    answers = generate_answers(model, protocol, questions, root / protocol.images, 5, max_new_tokens=6)
    assert list(sorted(answers)) == sorted(question.id for question in questions)
    assert len(set(answers.values())) > 3
    for question in questions[:4]:
        pictures = []
        if question.image:
            picture = model.transform(load_image(root / protocol.images / question.image))
            pictures = [torch.from_numpy(picture)]
        ids = model.chat.prompt(protocol.turns(question))
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 6:
                row = torch.tensor([ids + said])
                embeddings = model.language.embed(row.clamp_min(0))
                if pictures:
                    features = model.connector(model.vision(torch.stack(pictures)))
                    embeddings[row < 0] = features.flatten(0, 1)
                token = int(model.language.hf(inputs_embeds=embeddings).logits[0, -1].argmax())
                if token == model.language.tokenizer.eos_token_id:
                    break
                said.append(token)
        text = str(model.language.tokenizer.decode(said, skip_special_tokens=True)).strip()
        assert answers[question.id] == text


def test_a_missing_picture_is_named(world: Path, model: VisionLanguageModel, tmp_path: Path) -> None:
    protocol = load_protocol("tiny_colour")
    questions, _ = protocol.questions("test", world / "datasets" / "tiny")
    with pytest.raises(UserError, match="test_colour_") as caught:
        generate_answers(model, protocol, questions, tmp_path, 4)
    assert str(tmp_path) in str(caught.value)
