"""Is a causal language model what mmtune takes it for? A few tokens through it tell.

mmtune puts embeddings in, among them a picture's, takes the hidden states out and applies the head by
itself. A family whose class in transformers does more (looks at token ids in every layer, looks ahead, or has
something of its own before or after the head) would train on another loss than it answers with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from mmtune.core.errors import Fault, UserError
from mmtune.parts.language import LanguageModel

TOKENS, PADDING, ANSWER = 8, 3, 8
# Of the largest logit: what another order of sums may make.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Found:
    """The largest difference of two sets of logits, as a part of the largest logit."""

    what: str
    difference: float
    tolerance: float

    @property
    def sound(self) -> bool:
        return self.difference <= self.tolerance


def require_plain(language: LanguageModel) -> None:
    """Raises UserError where the model is none that mmtune can train: head, embeddings or order are not as it
    takes them to be. Costs passes over a few tokens.
    """
    wrong = [found for found in _compared(language, (_head, _embeddings, _order)) if not found.sound]
    if wrong:
        kind = language.hf.config.model_type
        raise UserError.of(
            Fault(
                f"a {kind} cannot be trained by mmtune: {found.what} differ by {found.difference:.1e}",
                "model.language",
                "docs/add-a-language-model.md says what a language model has to be like.",
            )
            for found in wrong
        )


def prove(language: LanguageModel) -> list[Found]:
    """All that mmtune relies on, as `mmtune check --language` prints it."""
    return _compared(language, (_head, _embeddings, _order, _padding, _answers))


@torch.no_grad()
def _compared(language: LanguageModel, proofs: tuple[Callable[..., Any], ...]) -> list[Found]:
    weight = language.hf.get_input_embeddings().weight
    ids = torch.arange(TOKENS, device=weight.device).mul(weight.shape[0] // TOKENS).unsqueeze(0)
    tolerance = TOLERANCE[weight.dtype]
    made = []
    with _plain(language):
        for proof in proofs:
            one, other = (each.float() for each in proof(language, ids))
            difference = (one - other).abs().max() / other.abs().max()
            made.append(Found(proof.__doc__ or "", float(difference), tolerance))
    return made


def _head(language: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits by mmtune and by its own class"""
    embeddings = language.embed(ids)
    return _logits(language, embeddings), language.hf(inputs_embeds=embeddings).logits


def _embeddings(language: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits of embeddings and of token ids"""
    return _logits(language, language.embed(ids)), language.hf(input_ids=ids).logits


def _order(language: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits before and after a later token is another"""
    embeddings = language.embed(ids)
    other = torch.cat([embeddings[:, :-1], embeddings[:, :1]], dim=1)
    return _logits(language, other)[:, :-1], _logits(language, embeddings)[:, :-1]


def _padding(language: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits with padding on the left and without"""
    embeddings = language.embed(ids)
    padded = torch.cat([embeddings[:, :PADDING], embeddings], dim=1)
    mask = torch.ones_like(padded[..., 0], dtype=torch.long)
    mask[:, :PADDING] = 0
    found = language.logits(language.hidden(padded, mask))[:, PADDING:]
    return found, _logits(language, embeddings)


def _answers(language: LanguageModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits of an answer by the cache and of all of it at once"""
    embeddings = language.embed(ids)
    made: Any = language.hf.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    whole = torch.cat([embeddings, language.embed(made.sequences)], dim=1)
    return torch.stack(made.logits, dim=1), _logits(language, whole)[:, TOKENS - 1 : -1]


def _logits(language: LanguageModel, embeddings: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(embeddings[..., 0], dtype=torch.long)
    return language.logits(language.hidden(embeddings, mask))


@contextmanager
def _plain(language: LanguageModel) -> Iterator[None]:
    """In evaluation mode, and without what a checkpoint says of generation."""
    hf, training, own = language.hf, language.hf.training, language.hf.generation_config
    hf.eval()
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.train(training)
        hf.generation_config = own
