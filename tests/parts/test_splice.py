"""The splice against a slow loop over tokens, for any pictures anywhere, and where its gradient goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.core.errors import UserError
from mmtune.data.batches import Batch, pad
from mmtune.data.chat import IGNORE, IMAGE_ID
from mmtune.parts import VisionLanguageModel
from tests import tiny_models as tiny

PAD_ID = 7  # an id of an ordinary token: padding is told by the mask alone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return tiny.model(tmp_path_factory.mktemp("splice"))


# A row is made of stretches: None for a picture, or the ids of a text, perhaps an empty one.
texts = st.lists(st.integers(len(tiny.SPECIAL), len(tiny.SPECIAL) + 255), max_size=4)
rows = st.lists(st.none() | texts, max_size=5).map(lambda stretches: [[1], *stretches])


@st.composite
def batches(draw: st.DrawFn, left: bool | None = None) -> Batch:
    """One to four rows, padded to either side."""
    made = []
    pictures = 0
    for stretches in draw(st.lists(rows, min_size=1, max_size=4)):
        ids: list[int] = []
        for stretch in stretches:
            ids += [IMAGE_ID] * tiny.IMAGE_TOKENS if stretch is None else stretch
            pictures += stretch is None
        made.append(ids)
    batch = pad(made, PAD_ID, left=draw(st.booleans()) if left is None else left)
    batch.images = tiny.pictures(pictures, draw(st.integers(0, 3)))
    return batch


def reference(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """Token by token: a text's embedding, or the next feature of the next picture, each encoded alone."""
    table = model.language.hf.get_input_embeddings().weight
    features = iter([f for image in batch.images for f in model.connector(model.vision(image[None]))[0]])
    return torch.stack(
        [
            torch.stack([next(features) if token == IMAGE_ID else table[token] for token in row])
            for row in batch.input_ids.tolist()
        ]
    )


@given(batch=batches())
@settings(max_examples=60)
def test_embeddings_are_those_of_a_loop_over_tokens(model: VisionLanguageModel, batch: Batch) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.splice(batch), reference(model, batch), rtol=1e-5, atol=1e-5)


@given(batch=batches(left=False))
@settings(max_examples=25)
def test_neither_side_of_the_padding_matters(model: VisionLanguageModel, batch: Batch) -> None:
    """Hidden states of the same rows, padded to the other side: mask and positions follow the tokens."""
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    other = pad(ids, PAD_ID, left=True)
    other.images = batch.images
    with torch.no_grad():
        hidden = [model.language.hidden(model.splice(b), b.attention_mask) for b in (batch, other)]
    real = [h[b.attention_mask.bool()] for h, b in zip(hidden, (batch, other), strict=True)]
    torch.testing.assert_close(real[0], real[1], rtol=1e-3, atol=1e-3)


@given(batch=batches(), places=st.data())
@settings(max_examples=25)
def test_gradient_flows_from_a_place_to_what_stands_there(
    model: VisionLanguageModel, batch: Batch, places: st.DataObject
) -> None:
    """The gradient of one position reaches its own embedding or its own picture, and no other."""
    row = places.draw(st.integers(0, len(batch.input_ids) - 1))
    column = places.draw(st.integers(0, batch.input_ids.shape[1] - 1))
    token = int(batch.input_ids[row, column])
    model.zero_grad()
    seen: list[torch.Tensor] = []

    def keep(_: object, __: object, features: torch.Tensor) -> None:
        features.retain_grad()
        seen.append(features)

    handle = model.connector.register_forward_hook(keep)
    try:
        model.splice(batch)[row, column].sum().backward()
    finally:
        handle.remove()
    table = model.language.hf.get_input_embeddings().weight
    touched = [] if table.grad is None else table.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == ([] if token == IMAGE_ID else [token])
    reached = [] if not seen or seen[0].grad is None else seen[0].grad.abs().sum(-1).nonzero().tolist()
    if token != IMAGE_ID:
        assert reached == []
    else:
        before = int((batch.input_ids.flatten()[: row * batch.input_ids.shape[1] + column] == IMAGE_ID).sum())
        assert reached == [[before // tiny.IMAGE_TOKENS, before % tiny.IMAGE_TOKENS]]


@given(batch=batches(left=False))
@settings(max_examples=20)
def test_what_is_padding_or_not_supervised_has_no_say_in_the_loss(
    model: VisionLanguageModel, batch: Batch
) -> None:
    last = batch.attention_mask.sum(dim=1) - 1
    labels = torch.full_like(batch.input_ids, IGNORE)
    for row, place in enumerate(last.tolist()):
        if place > 0 and batch.input_ids[row, place] != IMAGE_ID:
            labels[row, place] = batch.input_ids[row, place]
    batch.labels = labels
    with torch.no_grad():
        before = model(batch)
        batch.input_ids = batch.input_ids.masked_fill(batch.attention_mask == 0, PAD_ID + 1)
        torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)
        logits = model.language.logits(model.language.hidden(reference(model, batch), batch.attention_mask))
    expected = 0.0
    for row, place in (labels != IGNORE).nonzero().tolist():
        expected -= float(torch.log_softmax(logits[row, place - 1].double(), dim=0)[labels[row, place]])
    assert float(before) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_places_and_pictures_must_agree(model: VisionLanguageModel) -> None:
    batch = tiny.batch([1, 0])
    for count in (0, 2):
        batch.images = tiny.pictures(count)
        with pytest.raises(ValueError, match="places for"):
            model.splice(batch)


def test_no_feature_gets_into_another_s_place(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a class miscounts, there would be places for some features alone, filled in their order."""
    batch = pad([[1, *[IMAGE_ID] * 2, 5, *[IMAGE_ID] * 2]], PAD_ID, left=False)
    batch.images = tiny.pictures(2)
    monkeypatch.setattr(model, "image_tokens", 2)
    with pytest.raises(
        UserError, match=f"mlp2x_gelu, the connector, .* gives 2 .* gives {tiny.IMAGE_TOKENS}"
    ):
        model.splice(batch)
    monkeypatch.setattr(model.vision, "tokens", 2)
    with pytest.raises(UserError, match=f"ClipTower, the tower, .* gives 2 .* gives {tiny.IMAGE_TOKENS}"):
        model.splice(batch)
