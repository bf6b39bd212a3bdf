"""How long scoring takes: predictions per second of each rule, on one core, without torch.

Answers are made up from a seed: one to three words, some with capitals, punctuation and number words, ten to
a question for the VQA rules as people give them, five captions to a picture. No text is scored twice as
often as real ones are, so that what is remembered between questions helps no more than on real files.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtune.core.files import write_text
from mmtune.core.versions import versions
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.protocol import load_protocol
from mmtune.evaluation.score import score_file, score_predictions

VQA_RULES = ("m4c", "vqa2021", "vqa_legacy", "vlmevalkit")
CAPTIONS = 20  # a caption costs as much as so many short answers, so a benchmark has as many times fewer
LETTERS = "etaoinshrdlucmfwyp"


def bench_score(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row per rule: task, rule, predictions, seconds of processor time, predictions per second.

    The first row is a whole `mmtune score` of TextVQA's files: reading, matching, scoring, errors by picture.
    """
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(2, 9))) for _ in range(20_000)]
    words += ["the", "a", "two", "none", "dont", "it's", "3.5", "1,000", "O'Neill", "t-shirt"] * 200
    asked = [_ten_answers(draw, words, number) for number in range(count)]
    said = {question.id: draw.choice(question.answers) for question in asked}
    with TemporaryDirectory() as folder:
        rows = [_timed_files(Path(folder), asked, said)]
    rows += [_timed("textvqa", rule, asked, said) for rule in VQA_RULES]
    single = [Question(q.id, q.text, (q.answers[0].lower(),), q.image, q.cluster) for q in asked]
    rows.append(_timed("gqa", "gqa", single, said))
    options = [_with_options(draw, words, number) for number in range(count)]
    letters = {question.id: draw.choice("ABCD") for question in options}
    rows.append(_timed("iconqa_choose_txt", "letter", options, letters))
    pictures = [_captions(draw, words, number) for number in range(max(2, count // CAPTIONS))]
    told = {question.id: draw.choice(question.answers) for question in pictures}
    return [*rows, _timed("coco_caption", "cider", pictures, told)]


def _timed(
    task: str, rule: str, questions: Sequence[Question], predictions: dict[str, str]
) -> dict[str, Any]:
    began = time.process_time()
    score = score_predictions(questions, predictions, load_protocol(task), rule)
    return _row(task, rule, score.n, time.process_time() - began)


def _timed_files(folder: Path, questions: Sequence[Question], predictions: dict[str, str]) -> dict[str, Any]:
    rows = [
        {"question_id": q.id, "question": q.text, "image_id": q.cluster, "answers": list(q.answers)}
        for q in questions
    ]
    lines = [json.dumps({"question_id": name, "text": text}) for name, text in predictions.items()]
    write_text(folder / "annotations.json", json.dumps({"data": rows}))
    write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    began = time.process_time()
    score = score_file(
        load_protocol("textvqa"), folder / "predictions.jsonl", folder / "annotations.json", "m4c"
    )
    return _row("textvqa, from files", "m4c", score.n, time.process_time() - began)


def _row(task: str, rule: str, count: int, seconds: float) -> dict[str, Any]:
    return {
        "task": task,
        "rule": rule,
        "predictions": count,
        "seconds": seconds,
        "per_second": count / max(seconds, 1e-9),
    }


def _ten_answers(draw: random.Random, words: Sequence[str], number: int) -> Question:
    few = [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(3)]
    answers = tuple(draw.choice(few) + draw.choice(("", "", "", ".", " ", "?")) for _ in range(10))
    return Question(str(number), f"what is {number}?", answers, None, cluster=f"picture {number // 3}")


def _with_options(draw: random.Random, words: Sequence[str], number: int) -> Question:
    choices = tuple(draw.choices(words, k=4))
    right = draw.randrange(4)
    return Question(
        str(number), "which?", (choices[right],), None, str(number), choices=choices, answer_index=right
    )


def _captions(draw: random.Random, words: Sequence[str], number: int) -> Question:
    captions = tuple(" ".join(draw.choices(words, k=draw.randint(8, 14))) + "." for _ in range(5))
    return Question(str(number), "", captions, None, cluster=str(number))


def print_score(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A line per rule."""
    table = Table(title=f"Scoring on one core, Python {versions()['python']}")
    for heading in ("task", "rule", "predictions", "seconds", "per second"):
        table.add_column(heading, justify="left" if heading in ("task", "rule") else "right")
    for row in rows:
        numbers = f"{row['predictions']:,}", f"{row['seconds']:.1f}", f"{row['per_second']:,.0f}"
        table.add_row(row["task"], row["rule"], *numbers)
    console.print(table)
