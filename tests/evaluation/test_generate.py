from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch

from mmtune.core import processes
from mmtune.core.errors import UserError
from mmtune.data.image import load_image
from mmtune.evaluation import generate
from mmtune.evaluation.generate import answer_in_batches, generate_answers
from mmtune.evaluation.metrics.base import Question
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


def test_a_question_sees_its_options_pictures_in_order(
    world: Path, model: VisionLanguageModel, tmp_path: Path
) -> None:
    """Questions with two to four pictures in a batch, against the logits after each question by itself."""
    found = sorted((world / "datasets" / "tiny").rglob("*.png"))[:12]
    protocol = load_protocol("iconqa_choose_img")
    questions = []
    for i, count in enumerate((1, 3, 2, 1)):
        names = tuple(f"{i}/{name}.png" for name in ("image", *range(count)))
        (tmp_path / str(i)).mkdir()
        for place, picture in zip(names, found[3 * i :], strict=False):
            copyfile(picture, tmp_path / place)
        options = names[1:]
        questions.append(
            Question(str(i), "Which?", (options[0],), names[0], str(i), options, options, answer_index=0)
        )
    answers = generate_answers(model, protocol, questions, tmp_path, 3, max_new_tokens=4)
    swapped = [replace(question, choice_images=question.choice_images[::-1]) for question in questions]
    assert generate_answers(model, protocol, swapped, tmp_path, 3, max_new_tokens=4) != answers
    for question in questions:
        pictures = torch.stack(
            [torch.from_numpy(model.transform(load_image(tmp_path / name))) for name in question.images]
        )
        ids = model.chat.prompt(protocol.turns(question))
        said: list[int] = []
        with torch.no_grad():
            features = model.connector(model.vision(pictures)).flatten(0, 1)
            while len(said) < 4:
                row = torch.tensor([ids + said])
                embeddings = model.language.embed(row.clamp_min(0))
                embeddings[row < 0] = features
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


def test_an_answer_has_room_in_the_context(world: Path, model: VisionLanguageModel) -> None:
    protocol = load_protocol("tiny_text")
    questions, _ = protocol.questions("test", world / "datasets" / "tiny")
    longest = max(len(model.chat.prompt(protocol.turns(question))) for question in questions)
    room = int(model.chat.context) - longest
    assert len(generate_answers(model, protocol, questions[:2], world, 2, max_new_tokens=room)) == 2
    with pytest.raises(UserError, match=f"{longest} tokens are asked and up to {room + 1} answered"):
        generate_answers(model, protocol, questions, world, 2, max_new_tokens=room + 1)
    with pytest.raises(UserError, match="answered; the model's context has 512"):
        generate_answers(model, replace(protocol, prompt="long " * 600), questions, world, 2)


def test_answers_are_cut_at_the_first_stop_string(world: Path, model: VisionLanguageModel) -> None:
    protocol = load_protocol("tiny_text")
    questions, _ = protocol.questions("test", world / "datasets" / "tiny")
    whole = generate_answers(model, protocol, questions, world, 5)
    stop = [min(whole.values(), key=len)[1], sorted(whole.values())[-1][2:4]]
    cut = generate_answers(model, replace(protocol, stop=stop), questions, world, 5)
    for name, text in whole.items():
        assert cut[name] == min((text.split(string)[0] for string in stop), key=len).strip()
    assert cut != whole


def test_the_stop_strings_are_cut_whatever_comes_first() -> None:
    assert generate.cut("one. two\nthree", ["\n", ". "]) == "one"
    assert generate.cut("one", ["\n"]) == generate.cut("one", []) == "one"
    assert generate.cut("\none", ["\n"]) == ""


def test_processes_share_the_batches(
    world: Path, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question is one process's, and the batches are those of a single process."""
    protocol = load_protocol("tiny_colour")
    root = world / "datasets" / "tiny"
    questions, _ = protocol.questions("test", root)

    def batches() -> list[list[dict[str, Any]]]:
        return list(answer_in_batches(model, protocol, questions, root, 5))

    alone = batches()
    assert len(alone) == 3
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    assert batches() == alone[::2]
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert batches() == alone[1::2]
