"""A benchmark's questions as LLaVA training samples, in the words in which its protocol asks them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmtune.data.cards import Card
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import Protocol, load_protocol

VERSION = 1  # raise it whenever the same seed would give other files


def asking(card: Card) -> Protocol:
    """The protocol by which a card's samples are asked: its task's, with the card's prompt and options."""
    protocol = load_protocol(card.task)
    return replace(
        protocol, prompt=card.prompt or protocol.prompt, options={**protocol.options, **card.options}
    )


def samples(card: Card, protocol: Protocol, questions: Sequence[Question], seed: int) -> list[dict[str, Any]]:
    """LLaVA samples of the questions, in an order that the seed and their ids decide.

    So the first 10,000 are 10,000 drawn at random. A question without an answer gives no sample.
    """
    rows = []
    for question in questions:
        [turn] = protocol.turns(question)
        answers = [answer for answer in right_answers(card, protocol, question) if answer]
        for number, answer in enumerate(answers):
            rows.append(
                {
                    "id": question.id if card.answer != "each" else f"{question.id}_{number}",
                    "image": question.images[0] if len(question.images) == 1 else list(question.images),
                    "conversations": [
                        {"from": "human", "value": turn.text},
                        {"from": "gpt", "value": answer},
                    ],
                }
            )
    rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{row['id']}".encode()).digest())
    return rows[: card.limit]


def right_answers(card: Card, protocol: Protocol, question: Question) -> list[str]:
    """What the model is to say: an option as the prompt wants it, the answer itself, or each of several."""
    if question.answer_index is not None:
        return [protocol.candidates(question)[question.answer_index]]
    if card.answer == "majority":
        return [majority(question.answers)]
    return [answer.strip() for answer in question.answers[: None if card.answer == "each" else 1]]


def majority(answers: Sequence[str]) -> str:
    """The answer that most annotators gave, but for case and outer space, as the first of them wrote it.

    Of several given as often, the one that was given first.
    """
    written = [answer.strip() for answer in answers]
    counted = Counter(answer.casefold() for answer in written if answer)
    if not counted:
        return ""
    most = counted.most_common(1)[0][0]  # in the order in which they came first
    return next(answer for answer in written if answer.casefold() == most)


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """A LLaVA training file: a list in JSON, a sample to a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"
