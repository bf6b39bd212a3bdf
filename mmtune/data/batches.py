"""Samples -> batches: encoded once, ordered by length with the longest first, padded.

Padding is decided here and only here: to the right for training, to the left for generation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtune.core.errors import Fault, UserError
from mmtune.data.chat import IGNORE, Chat
from mmtune.data.image import ImageTransform, Picture, is_there, load_image
from mmtune.data.samples import MOST_FAULTS, Sample


@dataclass(frozen=True)
class Example:
    """An encoded sample: int32 ids and labels of equal length, and where its pictures lie."""

    id: str
    ids: np.ndarray
    labels: np.ndarray
    images: tuple[Picture, ...]


@dataclass
class Batch:
    """What the model takes. N pictures over all rows, in the order of their places in `input_ids`.

    input_ids, labels: int64 [B, T]; attention_mask: int64 [B, T]; images: uint8 [N, 3, S, S].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor | None = None
    sample_ids: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.images.to(device, non_blocking=True),
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            self.sample_ids,
        )


def encode_samples(
    samples: Sequence[Sample], chat: Chat, max_length: int, too_long: str = "error"
) -> tuple[list[Example], list[str]]:
    """Encodes all samples; returns the examples and the ids of those skipped for their length.

    A sample is never cut: one longer than `max_length` tokens, or than the chat's `context`, is an error,
    or is skipped where `too_long` is "skip". Raises UserError that names the samples.
    """
    if max_length <= chat.context:
        limit, most, mend = float(max_length), f"max_length {max_length}", "Raise train.max_length"
    else:
        limit, most = chat.context, f"the language model's context of {chat.context} tokens"
        mend = "Shorten it"
    examples: list[Example] = []
    skipped: list[str] = []
    faults: list[Fault] = []
    for sample in samples:
        try:
            ids, labels = chat.encode(list(sample.turns))
        except UserError as error:
            faults += [Fault(fault.what, sample.place, fault.mend) for fault in error.faults]
            if len(faults) >= MOST_FAULTS:
                break
            continue
        if len(ids) <= limit:
            examples.append(
                Example(sample.id, np.array(ids, np.int32), np.array(labels, np.int32), sample.images)
            )
        elif too_long == "skip":
            skipped.append(sample.id)
        else:
            faults.append(
                Fault(
                    f"{len(ids)} tokens, more than {most}",
                    sample.place,
                    f"{mend}, or set train.too_long to skip.",
                )
            )
            if len(faults) >= MOST_FAULTS:
                break
    if faults:
        raise UserError.of(faults)
    if not examples:
        raise UserError(f"every sample is longer than {most}", where="data", mend=f"{mend}.")
    return examples, skipped


def check_pictures(examples: Sequence[Example | Sample]) -> None:
    """Raises UserError with the first samples whose pictures are missing, before one of them is due."""
    missing: dict[Picture, str] = {}
    known: set[Picture] = set()
    for example in examples:
        for path in example.images:
            if path not in known and not is_there(path):
                missing[path] = example.id
            known.add(path)
    if missing:
        faults = [
            Fault(f"no such picture: {path}", f"sample {name}", "Is image_root right, and may you read it?")
            for path, name in list(missing.items())[:MOST_FAULTS]
        ]
        if len(missing) > MOST_FAULTS:
            faults.append(Fault(f"{len(missing)} of {len(known)} pictures are missing; these are the first"))
        raise UserError.of(faults)


def batch_order(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as lists of indices: a function of its arguments alone, so a run can resume.

    Samples of similar length share a batch, and those with pictures are kept from those without, but for
    one batch of what is left over of both. The longest sample comes in the first batch and the longest
    full batch no later than second, so that running out of memory shows at once. At most one batch is
    smaller; it comes last unless it holds the longest sample.
    """
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    generator.shuffle(order)
    chunk = batch_size * 50
    batches: list[list[int]] = []
    rest: list[int] = []
    for has_image in (True, False):
        kind = [i for i in order if bool(examples[i].images) == has_image]
        for start in range(0, len(kind), chunk):
            part = sorted(kind[start : start + chunk], key=lambda i: -len(examples[i].ids))
            end = len(part) - len(part) % batch_size
            batches += [part[i : i + batch_size] for i in range(0, end, batch_size)]
            rest += part[end:]
    batches += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    generator.shuffle(batches)
    small = [batch for batch in batches if len(batch) < batch_size]
    full = [batch for batch in batches if len(batch) == batch_size]

    def longest(batch: list[int]) -> int:
        return max(len(examples[i].ids) for i in batch)

    if full:
        full.insert(0, full.pop(max(range(len(full)), key=lambda b: longest(full[b]))))
    if small and full and longest(small[0]) > longest(full[0]):
        return small + full
    return full + small


def collate(examples: Sequence[Example], transform: ImageTransform, pad_id: int) -> Batch:
    """A right-padded training batch."""
    batch = pad([example.ids for example in examples], pad_id, left=False)
    width = batch.input_ids.shape[1]
    labels = torch.full((len(examples), width), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = torch.from_numpy(example.labels)
    batch.labels = labels
    pictures = []
    for example in examples:
        try:
            pictures.append(load_images(example.images, transform))
        except UserError as error:
            faults = [Fault(f.what, f"{f.where} (sample {example.id})", f.mend) for f in error.faults]
            raise UserError.of(faults) from None
    batch.images = torch.cat(pictures)
    batch.sample_ids = tuple(example.id for example in examples)
    return batch


def collate_or_error(
    examples: Sequence[Example], transform: ImageTransform, pad_id: int
) -> Batch | UserError:
    """`collate` for a worker process: what is raised there would come back as the text of a traceback."""
    try:
        return collate(examples, transform, pad_id)
    except UserError as error:
        return error


def pad(rows: Sequence[np.ndarray | list[int]], pad_id: int, left: bool) -> Batch:
    """Rows of ids as one batch without pictures or labels."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return Batch(ids, mask, torch.empty(0, 3, 0, 0, dtype=torch.uint8))


def load_images(paths: Sequence[Picture], transform: ImageTransform) -> torch.Tensor:
    """Pictures as uint8 [N, 3, S, S]; N may be 0."""
    if not paths:
        return torch.empty(0, 3, transform.size, transform.size, dtype=torch.uint8)
    return torch.from_numpy(np.stack([transform(load_image(path)) for path in paths]))
