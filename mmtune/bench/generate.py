"""What this machine does, as ratios to the plain form of the same work: `mmtune bench`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core.files import inside
from mmtune.core.versions import versions
from mmtune.data.batches import load_images, pad
from mmtune.evaluation.generate import best_device, cut, generate_answers
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import Protocol, Suite, load_protocol
from mmtune.parts.model import VisionLanguageModel


def bench_generate(
    model_folder: Path, suite: Suite, limit: int | None, batch_size: int, root: Path | None = None
) -> dict[str, Any]:
    """The time each task of a suite takes, one question at a time and in batches; how many answers differ.

    Both are timed here and now, with the same fp32 model and questions: by the clock, and by the processor's
    time, which counts all threads and suffers less from what else the machine does. In bf16 the batched
    answers are compared with those in fp32 and with those of a batch of one. limit: the first so many
    questions of each task. Raises UserError.
    """
    model = VisionLanguageModel.from_pretrained(model_folder).to(best_device())
    half = VisionLanguageModel.from_pretrained(model_folder, dtype="bfloat16").to(best_device())
    tasks: dict[str, Any] = {}
    for task in suite.tasks:
        protocol = replace(load_protocol(task), decode="generate")
        questions = protocol.questions(None, root)[0][:limit]
        images = (root or protocol.root) / protocol.images
        one_at_a_time(model, protocol, questions[:2], images)  # what is slow only once is not timed
        generate_answers(model, protocol, questions[:batch_size], images, batch_size)
        alone, *of_alone = timed(partial(one_at_a_time, model, protocol, questions, images))
        in_batches = partial(generate_answers, model, protocol, questions, images, batch_size)
        batched, *of_batched = timed(in_batches)
        in_bf16 = generate_answers(half, protocol, questions, images, batch_size)
        tasks[protocol.task] = {
            "questions": len(questions),
            "seconds_alone": of_alone[0],
            "seconds_batched": of_batched[0],
            "processor_seconds_alone": of_alone[1],
            "processor_seconds_batched": of_batched[1],
            "different": differing(alone, batched),
            "bf16_unlike_fp32": differing(batched, in_bf16),
            "bf16_unlike_batch_of_one": differing(in_bf16, one_at_a_time(half, protocol, questions, images)),
        }
    return {
        "model": str(model_folder),
        "suite": suite.name,
        "batch_size": batch_size,
        "tasks": tasks,
        "all": {key: sum(task[key] for task in tasks.values()) for key in next(iter(tasks.values()))},
        "machine": {
            "device": best_device().type,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "environment": versions(),
    }


def one_at_a_time(
    model: VisionLanguageModel, protocol: Protocol, questions: list[Question], images: Path
) -> dict[str, str]:
    """Question id -> answer by the plain loop of LLaVA's evaluation (model_vqa_loader.py): a question after
    the other, its picture read when it is its turn, greedy with a KV cache.
    """
    answers = {}
    for question in questions:
        batch = pad([model.chat.prompt(protocol.turns(question))], model.language.pad_id, left=True)
        batch.images = load_images([inside(images, image) for image in question.images], model.transform)
        device = next(model.parameters()).device
        (ids,) = model.generate(batch.to(device), protocol.max_new_tokens, protocol.stop)
        text = str(model.language.tokenizer.decode(ids, skip_special_tokens=True))
        answers[question.id] = cut(text, protocol.stop).strip()
    return answers


def timed(work: Callable[[], dict[str, str]]) -> tuple[dict[str, str], float, float]:
    """What `work` returns, and the seconds it took: by the clock, and of the processor in all threads."""
    began, used = time.perf_counter(), time.process_time()
    made = work()
    return made, time.perf_counter() - began, time.process_time() - used


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    """How many questions have another answer."""
    return sum(other[name] != answer for name, answer in one.items())


def print_generate(made: dict[str, Any], console: Console) -> None:
    """A line per task, and one for all."""
    machine, size = made["machine"], made["batch_size"]
    where = f"{machine['device']} ({machine['processor']}, {machine['threads']} threads)"
    title = f"{made['model']} on {where}: questions per second, alone and in batches of {size}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("task", "asked", "alone", "batches", "times", "by CPU time", "differ")
    for heading in (*headings, "bf16 unlike fp32", f"bf16, {size} unlike 1"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    table.columns[0].no_wrap = True
    for task, row in {**made["tasks"], "all": made["all"]}.items():
        count, alone, batched = row["questions"], row["seconds_alone"], row["seconds_batched"]
        times = alone / batched, row["processor_seconds_alone"] / row["processor_seconds_batched"]
        shares = (row["bf16_unlike_fp32"] / count, row["bf16_unlike_batch_of_one"] / count)
        if task == "all":
            table.add_section()
        table.add_row(
            task,
            str(count),
            *(f"{count / seconds:.0f}" for seconds in (alone, batched)),
            *(f"{ratio:.1f}" for ratio in times),
            str(row["different"]),
            *(f"{100 * share:.1f} %" for share in shares),
        )
    console.print(table)
