"""The model that ships: small, plain files, described, and able to do what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtune.core.files import share
from mmtune.data.tiny import Sizes, generate
from mmtune.evaluation.evaluate import evaluate
from mmtune.evaluation.protocol import load_suite
from mmtune.parts import VisionLanguageModel

MODEL = share("data") / "tiny" / "model"
SOURCE = load_suite("tiny").source
TARGETS = [*load_suite("tiny").target, *load_suite("tiny_letters").target]


def test_it_is_small_and_plain() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert MODEL / "config.json" in files
    assert sum(path.stat().st_size for path in files) <= 15 * 2**20
    # .jinja is the tokenizer's chat template, .md the card.
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_its_card_says_how_it_was_made_and_what_it_can_do() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "scripts/pretrain_tiny.sh" in card
    for word in ("seed", "minutes", "licence", *SOURCE, *TARGETS):
        assert word in card.lower(), word


def test_it_stands_on_its_own() -> None:
    """No part refers to a folder outside, and no adapter is left to merge."""
    model = VisionLanguageModel.from_pretrained(MODEL)
    assert not model.adapters
    for part in ("vision", "language", "connector"):
        assert Path(getattr(model.options, part).weights).is_relative_to(MODEL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 test questions of each task: the same as in the whole world of this seed."""
    folder = tmp_path_factory.mktemp("shipped") / "tiny"
    sizes = Sizes(
        train=1, text=1, val=1, test=20, downstream_train=1, downstream_val=1, downstream_test=20, simple=1
    )
    generate(folder, 0, sizes)
    return folder


def test_it_answers_source_questions_and_has_the_target_still_to_learn(world: Path, tmp_path: Path) -> None:
    """On 20 questions each; all of them give 90 % or more and 40 % or less (see its card)."""
    made = evaluate(MODEL, [*SOURCE, *TARGETS], tmp_path, root=world, batch_size=20)
    scores = {task: result["score"] for task, result in made["results"].items()}
    assert min(scores[task] for task in SOURCE) >= 80, scores
    assert max(scores[task] for task in TARGETS) <= 60, scores
