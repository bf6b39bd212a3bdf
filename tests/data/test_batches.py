"""Encoding, the order of batches, padding and collating."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.data.batches import Example, batch_order, collate, encode_samples, load_images, pad
from mmtune.data.chat import IGNORE, IMAGE, IMAGE_ID, Chat, Turn
from mmtune.data.image import ImageTransform
from mmtune.data.samples import MOST_FAULTS, Sample

TRANSFORM = ImageTransform(4, (0.5,) * 3, (0.5,) * 3)


def _example(name: object, length: int, pictures: int = 0) -> Example:
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = np.where(ids > length // 2, ids, IGNORE).astype(np.int32)
    return Example(str(name), ids, labels, (Path("a.png"),) * pictures)


# --- encoding ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(make_tokenizer: Any) -> Chat:
    return Chat(make_tokenizer("byte_level", "chatml"), "template", 5)


def _sample(name: str, answer: str, pictures: int = 0) -> Sample:
    turns = (Turn("user", IMAGE * pictures + "Q"), Turn("assistant", answer))
    return Sample(name, (Path("a.png"),) * pictures, turns)


def test_examples_are_what_the_chat_encodes(chat: Chat) -> None:
    samples = [_sample("a", "Yes", pictures=1), _sample("b", "No")]
    examples, skipped = encode_samples(samples, chat, max_length=100)
    assert skipped == []
    for sample, example in zip(samples, examples, strict=True):
        ids, labels = chat.encode(list(sample.turns))
        assert (example.id, example.images) == (sample.id, sample.images)
        assert (example.ids.tolist(), example.labels.tolist()) == (ids, labels)
        assert example.ids.dtype == example.labels.dtype == np.int32


def test_a_sample_that_is_too_long_is_an_error_or_skipped_but_never_cut(chat: Chat) -> None:
    samples = [_sample("short", "x"), _sample("long", "x x x x x x x x x x")]
    length = len(chat.encode(list(samples[1].turns))[0])
    assert len(encode_samples(samples, chat, max_length=length)[0]) == 2
    with pytest.raises(UserError, match=f"sample long: {length} tokens, more than max_length {length - 1}"):
        encode_samples(samples, chat, max_length=length - 1)
    examples, skipped = encode_samples(samples, chat, max_length=length - 1, too_long="skip")
    assert ([example.id for example in examples], skipped) == (["short"], ["long"])
    with pytest.raises(UserError, match="every sample is longer"):
        encode_samples(samples, chat, max_length=1, too_long="skip")


def test_faults_name_their_samples_all_at_once(chat: Chat) -> None:
    turn = Turn("assistant", "A")
    samples = [
        Sample("one", (), (turn,)),
        _sample("fine", "A"),
        Sample("two", (), (Turn("user", "Q"), turn, turn)),
    ]
    with pytest.raises(UserError) as caught:
        encode_samples(samples, chat, max_length=100)
    assert [fault.where for fault in caught.value.faults] == ["sample one", "sample two"]
    with pytest.raises(UserError) as caught:
        encode_samples([samples[0]] * 3 * MOST_FAULTS, chat, max_length=100)
    assert len(caught.value.faults) == MOST_FAULTS


# --- order ---------------------------------------------------------------------------------------------

datasets = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=120).map(
    lambda rows: [_example(i, length, int(picture)) for i, (length, picture) in enumerate(rows)]
)
sizes = st.integers(1, 9)
numbers = st.integers(0, 5)


@given(datasets, sizes, numbers, numbers)
def test_every_example_exactly_once_an_epoch(
    examples: list[Example], size: int, seed: int, epoch: int
) -> None:
    batches = batch_order(examples, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert len(batches) == -(-len(examples) // size)
    assert sum(len(batch) != size for batch in batches) <= 1


@given(datasets, sizes, numbers, numbers)
def test_the_longest_comes_at_once(examples: list[Example], size: int, seed: int, epoch: int) -> None:
    """The longest sample is in the first batch; where that one is small, the longest full batch is next."""
    lengths = [[len(examples[i].ids) for i in batch] for batch in batch_order(examples, size, seed, epoch)]
    assert max(lengths[0]) == max(len(example.ids) for example in examples)
    full = [i for i, batch in enumerate(lengths) if len(batch) == size]
    if full:
        assert full[0] <= 1
        assert max(lengths[full[0]]) == max(max(lengths[i]) for i in full)


@given(datasets, sizes, numbers, numbers)
def test_pictures_and_text_are_kept_apart(examples: list[Example], size: int, seed: int, epoch: int) -> None:
    """But for one batch of what is left over of both."""
    kinds = [{bool(examples[i].images) for i in batch} for batch in batch_order(examples, size, seed, epoch)]
    assert sum(len(kind) == 2 for kind in kinds) <= 1


@given(datasets, sizes, numbers, numbers)
def test_the_order_is_a_function_of_seed_and_epoch(
    examples: list[Example], size: int, seed: int, epoch: int
) -> None:
    first = batch_order(examples, size, seed, epoch)
    random.seed(1)
    torch.manual_seed(1)
    assert batch_order(examples, size, seed, epoch) == first


def test_epochs_and_seeds_differ() -> None:
    examples = [_example(i, 5 + i % 7) for i in range(200)]
    orders = [str(batch_order(examples, 4, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_the_order_of_a_seed_stays_what_it_is() -> None:
    """A resumed run relies on it, with another Python too; written down when first made."""
    examples = [_example(i, 3 + i % 5, i % 2) for i in range(11)]
    assert batch_order(examples, 3, seed=0, epoch=1) == [[4, 8, 2], [9, 3, 7], [6, 10, 0], [1, 5]]


def test_batches_hold_similar_lengths() -> None:
    generator = np.random.default_rng(0)
    examples = [_example(i, int(length)) for i, length in enumerate(generator.integers(1, 500, 4000))]
    batches = batch_order(examples, 16, 0, 0)
    padded = sum(max(len(examples[i].ids) for i in batch) * len(batch) for batch in batches)
    assert padded < 1.05 * sum(len(example.ids) for example in examples)


# --- padding -------------------------------------------------------------------------------------------

rows = st.lists(st.lists(st.integers(-200, 999), min_size=1, max_size=9), min_size=1, max_size=5)


@given(rows, st.booleans())
def test_padding(rows: list[list[int]], left: bool) -> None:
    batch = pad(rows, pad_id=1000, left=left)
    width = max(map(len, rows))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    for row, ids, mask in zip(rows, batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True):
        filler = width - len(row)
        assert ids == ([1000] * filler + row if left else row + [1000] * filler)
        assert mask == ([0] * filler + [1] * len(row) if left else [1] * len(row) + [0] * filler)


def test_collating(tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    ids = np.array([7, IMAGE_ID, IMAGE_ID, 8, 9], np.int32)
    labels = np.array([IGNORE, IGNORE, IGNORE, 8, 9], np.int32)
    examples = [
        Example("text", ids[3:], labels[3:], ()),
        Example("two", ids, labels, (tmp_path / "red.png", tmp_path / "blue.png")),
    ]
    batch = collate(examples, TRANSFORM, pad_id=0)
    assert batch.input_ids.tolist() == [[8, 9, 0, 0, 0], ids.tolist()]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert batch.labels is not None
    assert batch.labels.tolist() == [[8, 9, IGNORE, IGNORE, IGNORE], labels.tolist()]
    assert batch.sample_ids == ("text", "two")
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_a_batch_without_pictures() -> None:
    batch = collate([_example("a", 3)], TRANSFORM, pad_id=0)
    assert batch.images.shape == (0, 3, 4, 4)
    assert load_images([], TRANSFORM).dtype == torch.uint8


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.png"):
        load_images([tmp_path / "no.png"], TRANSFORM)
