"""Answers to a task's questions: batched, left-padded, longest prompts first, with progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmtune.core.errors import UserError
from mmtune.core.files import inside
from mmtune.data.batches import load_images, pad
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import Protocol
from mmtune.parts.model import VisionLanguageModel


def generate_answers(
    model: VisionLanguageModel,
    protocol: Protocol,
    questions: Sequence[Question],
    image_root: Path,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> dict[str, str]:
    """Greedy answers, question id -> text. Raises UserError for a picture that is missing or broken."""
    prompts = {question.id: model.chat.prompt(protocol.turns(question)) for question in questions}
    context = model.chat.context
    for question in questions:
        if len(prompts[question.id]) >= context:
            raise UserError(
                f"{len(prompts[question.id])} tokens are asked, the model's context has {context}",
                where=f"task {protocol.task}, question {question.id}",
                mend="Take a model with a longer context.",
            )
    # Longest first: running out of memory shows at once, and a batch holds prompts of similar length.
    order = sorted(questions, key=lambda question: -len(prompts[question.id]))
    device = next(model.parameters()).device
    answers: dict[str, str] = {}
    console = Console(stderr=True)
    columns = (TextColumn(protocol.task), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    model.eval()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(protocol.task, total=len(order))
        for start in range(0, len(order), batch_size):
            asked = order[start : start + batch_size]
            batch = pad([prompts[question.id] for question in asked], model.language.pad_id, left=True)
            paths = [inside(image_root, image) for question in asked for image in question.images]
            batch.images = load_images(paths, model.transform)
            produced = model.generate(batch.to(device), max_new_tokens or protocol.max_new_tokens)
            for question, ids in zip(asked, produced, strict=True):
                text = model.language.tokenizer.decode(ids, skip_special_tokens=True)
                answers[question.id] = str(text).strip()
            progress.update(bar, completed=len(answers))
    if not console.is_terminal:
        seconds = time.perf_counter() - began
        print(f"{protocol.task}: {len(answers)} answers in {seconds:.1f} s", file=sys.stderr, flush=True)
    return answers


def best_device() -> torch.device:
    """The accelerator where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
