"""Which option does a model find likeliest? Log-likelihoods of given answers after a prompt, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtune.core.errors import UserError
from mmtune.data.batches import pad
from mmtune.data.chat import IGNORE, Turn
from mmtune.parts.model import VisionLanguageModel

DIGITS = 4
"""Decimals that are kept. In fp32 the batch size moves the sixth, which must decide between no options."""


@dataclass(frozen=True)
class Asked:
    """A prompt with its options. pictures: uint8 [n, 3, S, S], in the order of their places in `turns`."""

    id: str
    turns: list[Turn]
    options: list[str]
    pictures: torch.Tensor


@dataclass(frozen=True)
class Likelihood:
    """Of one option, in nats: the sum over its tokens and their mean.

    greedy: every token of it is the one that greedy decoding would take there.
    """

    total: float
    per_token: float
    greedy: bool


@torch.no_grad()
def likelihoods(
    model: VisionLanguageModel, asked: Sequence[Asked], batch_size: int
) -> list[list[Likelihood]]:
    """log p(option | prompt) of every option of every question, `batch_size` options at a time.

    An option counts as a whole turn of the assistant: the chat format's encoding of it, and with it the
    token that ends the turn, so that no option is the beginning of another one. Both numbers are rounded to
    DIGITS. Raises UserError where an option does not fit into the model's context.
    """
    rows = [(each, option) for each in asked for option in each.options]
    found: list[Likelihood] = []
    for start in range(0, len(rows), batch_size):
        found += _batch(model, rows[start : start + batch_size])
    ends = np.cumsum([len(each.options) for each in asked]).tolist()
    return [found[end - len(each.options) : end] for each, end in zip(asked, ends, strict=True)]


def likeliest(found: Sequence[Likelihood]) -> int:
    """The index of the option with the greatest sum; of several that are equal the first."""
    return max(range(len(found)), key=lambda i: found[i].total)


def _batch(model: VisionLanguageModel, rows: Sequence[tuple[Asked, str]]) -> list[Likelihood]:
    encoded = [model.chat.encode([*asked.turns, Turn("assistant", option)]) for asked, option in rows]
    for (asked, option), (ids, _) in zip(rows, encoded, strict=True):
        if len(ids) > model.chat.context:
            raise UserError(
                f"{len(ids)} tokens with its option '{option}', the model's context has {model.chat.context}",
                where=f"question {asked.id}",
                mend="Take a model with a longer context.",
            )
    batch = pad([ids for ids, _ in encoded], model.language.pad_id, left=False)
    batch.images = torch.cat([asked.pictures for asked, _ in rows])
    batch = batch.to(next(model.parameters()).device)
    labels = pad([labels for _, labels in encoded], IGNORE, left=False).input_ids.to(batch.input_ids.device)
    hidden = model.language.hidden(model.splice(batch), batch.attention_mask)[:, :-1]
    supervised = labels[:, 1:] != IGNORE
    logits = model.language.logits(hidden[supervised]).float()
    wanted = labels[:, 1:][supervised]
    of_token = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    counts = supervised.sum(1).tolist()
    sums = [math.fsum(tokens.tolist()) for tokens in of_token.split(counts)]
    greedy = [bool(tokens.all()) for tokens in (logits.argmax(-1) == wanted).split(counts)]
    return [
        Likelihood(round(total, DIGITS), round(total / count, DIGITS), taken)
        for total, count, taken in zip(sums, counts, greedy, strict=True)
    ]
