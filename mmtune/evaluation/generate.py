"""Answers to a task's questions: batched, longest prompts first, with progress, shared out over processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmtune.core import processes
from mmtune.core.errors import UserError
from mmtune.core.files import inside
from mmtune.data.batches import load_images, pad
from mmtune.evaluation.likelihood import Asked, likeliest, likelihoods
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import Protocol
from mmtune.parts.model import VisionLanguageModel

ALONE = 32
"""How many questions of a task are asked again by themselves, to see how many answers the batch changed."""


def generate_answers(
    model: VisionLanguageModel,
    protocol: Protocol,
    questions: Sequence[Question],
    image_root: Path,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> dict[str, str]:
    """Answers, question id -> text. As `answer_in_batches`, of which this gathers all."""
    batches = answer_in_batches(model, protocol, questions, image_root, batch_size, max_new_tokens)
    return {row["question_id"]: row["text"] for rows in batches for row in rows}


def answer_in_batches(
    model: VisionLanguageModel,
    protocol: Protocol,
    questions: Sequence[Question],
    image_root: Path,
    batch_size: int,
    max_new_tokens: int | None = None,
    done: Collection[str] = (),
    name: str = "",
) -> Iterator[list[dict[str, Any]]]:
    """The answers of a batch after the other: rows of `question_id` and `text`.

    Answers are greedy, or, where the protocol decodes by likelihood, the likeliest of the options; then
    `loglikelihood` and `loglikelihood_per_token` list those of all options. done: ids of questions that are
    answered already; a batch of nothing else is left out. What makes up a batch depends on neither `done` nor
    the number of processes, of which each takes its share of the batches. name: what the progress is called.

    Raises UserError for a picture that is missing or broken, and where prompt and answer might exceed the
    context.
    """
    prompts = {question.id: model.chat.prompt(protocol.turns(question)) for question in questions}
    answer = 1 if protocol.decode == "likelihood" else max_new_tokens or protocol.max_new_tokens
    _check_length(prompts, protocol, model.chat.context, answer)
    # Longest first: running out of memory shows at once, and a batch holds prompts of similar length.
    order = sorted(questions, key=lambda question: -len(prompts[question.id]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    missing = [batch for batch in batches if any(question.id not in done for question in batch)]
    share = missing[processes.rank() :: processes.count()]
    model.eval()
    with (
        _progress(name or protocol.task, sum(map(len, share))) as advance,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        decoding = [_decode(pool, model, image_root, batch) for batch in share[:1]]
        for number, batch in enumerate(share):
            # The next batch's pictures are decoded while the model is busy with these.
            decoding += [_decode(pool, model, image_root, later) for later in share[number + 1 : number + 2]]
            pictures = [picture.result() for picture in decoding.pop(0)]
            asked = [prompts[question.id] for question in batch]
            rows = _answer(model, protocol, batch, asked, pictures, batch_size, max_new_tokens)
            yield rows
            advance(len(rows))


def changed_alone(
    model: VisionLanguageModel,
    protocol: Protocol,
    questions: Sequence[Question],
    image_root: Path,
    said: Mapping[str, str],
    max_new_tokens: int | None = None,
) -> dict[str, int]:
    """`asked`: how many questions, spread evenly over all, were asked again one by one; `changed`: how many
    of them have another answer than in `said` (question id -> text). Raises UserError as `answer_in_batches`.
    """
    count = min(ALONE, len(questions))
    changed = 0
    for question in (questions[i * len(questions) // count] for i in range(count)):
        pictures = load_images([inside(image_root, image) for image in question.images], model.transform)
        prompt = model.chat.prompt(protocol.turns(question))
        (row,) = _answer(model, protocol, [question], [prompt], [pictures], 1, max_new_tokens)
        changed += row["text"] != said[question.id]
    return {"asked": count, "changed": changed}


def best_device() -> torch.device:
    """This process's accelerator where there is one, otherwise the CPU.

    Raises UserError where there are fewer accelerators than processes on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs",
            mend="Start no more processes than there are GPUs.",
        )
    return torch.device("cuda", local)


def _check_length(prompts: dict[str, list[int]], protocol: Protocol, context: float, answer: int) -> None:
    # Beyond its context a model babbles, or has no positions: no answer may run into that, however long.
    for name, ids in prompts.items():
        if len(ids) + answer > context:
            raise UserError(
                f"{len(ids)} tokens are asked and up to {answer} answered; the model's context has {context}",
                where=f"task {protocol.task}, question {name}",
                mend="Take a model with a longer context, or shorter answers: --gen_kwargs max_new_tokens=N.",
            )


def _decode(
    pool: ThreadPoolExecutor, model: VisionLanguageModel, image_root: Path, batch: Sequence[Question]
) -> list[Future[torch.Tensor]]:
    """The pictures [n, 3, S, S] of each question, decoded in threads; one that several share only once."""
    paths = {question.id: tuple(inside(image_root, image) for image in question.images) for question in batch}
    started = {each: pool.submit(load_images, each, model.transform) for each in set(paths.values())}
    return [started[paths[question.id]] for question in batch]


def _answer(
    model: VisionLanguageModel,
    protocol: Protocol,
    batch: Sequence[Question],
    prompts: list[list[int]],
    pictures: list[torch.Tensor],
    batch_size: int,
    max_new_tokens: int | None,
) -> list[dict[str, Any]]:
    if protocol.decode == "likelihood":
        return _choose(model, protocol, batch, pictures, batch_size)
    most = max_new_tokens or protocol.max_new_tokens
    return _generate(model, protocol.stop, batch, prompts, pictures, most)


def _generate(
    model: VisionLanguageModel,
    stop: list[str],
    batch: Sequence[Question],
    prompts: list[list[int]],
    pictures: list[torch.Tensor],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    padded = pad(prompts, model.language.pad_id, left=True)
    padded.images = torch.cat(pictures)
    device = next(model.parameters()).device
    produced = model.generate(padded.to(device), max_new_tokens, stop)
    texts = [str(model.language.tokenizer.decode(ids, skip_special_tokens=True)) for ids in produced]
    return [
        {"question_id": question.id, "text": cut(text, stop).strip()}
        for question, text in zip(batch, texts, strict=True)
    ]


def cut(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the strings."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]


def _choose(
    model: VisionLanguageModel,
    protocol: Protocol,
    batch: Sequence[Question],
    pictures: list[torch.Tensor],
    batch_size: int,
) -> list[dict[str, Any]]:
    asked = [
        Asked(question.id, protocol.turns(question), protocol.candidates(question), own)
        for question, own in zip(batch, pictures, strict=True)
    ]
    return [
        {
            "question_id": each.id,
            "text": each.options[likeliest(found)],
            "loglikelihood": [option.total for option in found],
            "loglikelihood_per_token": [option.per_token for option in found],
        }
        for each, found in zip(asked, likelihoods(model, asked, batch_size), strict=True)
    ]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, or, where nobody watches, a line at the end: of the first process."""
    console = Console(stderr=True)
    watched = console.is_terminal and processes.rank() == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if processes.count() > 1:
        name += f", process 1 of {processes.count()}"
    began, made = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not watched) as progress:
        bar = progress.add_task(name, total=total)

        def advance(count: int) -> None:
            nonlocal made
            made += count
            progress.update(bar, completed=made)

        yield advance
    if not watched and processes.rank() == 0:
        seconds = time.perf_counter() - began
        print(f"{name}: {made} answers in {seconds:.1f} s", file=sys.stderr, flush=True)
