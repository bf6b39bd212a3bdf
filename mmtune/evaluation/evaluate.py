"""A model on a list of tasks: generates, scores, and writes results that say how they were made.

Torch is imported only once there is something to generate.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtune.core.config import to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json, write_text, writing
from mmtune.core.versions import versions
from mmtune.evaluation.metrics.base import some
from mmtune.evaluation.protocol import Suite, load_protocol
from mmtune.evaluation.restore import check_restorable, find_base
from mmtune.evaluation.results import run_header, sample_rows, samples_hash, task_row
from mmtune.evaluation.score import score_predictions
from mmtune.parts.fingerprint import changed_parts, model_hash


def evaluate(
    model_folder: Path,
    tasks: Sequence[str],
    output: Path,
    split: str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    root: Path | None = None,
    max_new_tokens: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    predict_only: bool = False,
    skip_done: bool = False,
    restore: str | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Writes `results.json` and, for each task, `samples_TASK.jsonl` (or only the answers) to `output`.

    Every annotation file is read before the model is loaded. split: of every task; by default each has its
    own reporting split. limit: the first so many questions of each task. seed: stamped, no more, for
    decoding is greedy. skip_done: where `output` holds these results of this very model already, they are
    returned. restore: a part that is put back as it is in `base`, the model folder that this one was trained
    from (by default where its run says). Raises UserError.
    """
    if base is not None and restore is None:
        raise UserError("a base is given, but no part to put back", mend="Give --restore as well.")
    protocols = [load_protocol(task) for task in tasks]
    names = [protocol.task for protocol in protocols]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"tasks are given twice: {some(twice)}", mend="Name each task once.")
    if output.exists() and not output.is_dir():
        raise UserError(
            "this is a file, no folder for results", where=output, mend="Give another --output_path."
        )
    began = time.perf_counter()
    asked = [(protocol, *protocol.questions(split, root)) for protocol in protocols]
    if restore is not None:
        base = find_base(model_folder, base)
        check_restorable(model_folder, restore, base)
    results: dict[str, Any] = {}
    made: dict[str, Any] = {
        "results": results,
        **run_header(model_folder, protocols, batch_size, limit, max_new_tokens, dtype, seed, restore),
        "configs": {p.task: {**to_dict(p), "hash": p.hash} for p in protocols},
        "data": {p.task: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for p, _, file in asked},
        "images": {p.task: str(((root or p.root) / p.images).resolve()) for p in protocols},
        "model": str(model_folder),
        "model_hash": model_hash(model_folder),
        "restored": restore,
        "base": str(base) if base else None,
        "base_hash": model_hash(base) if base else None,
        "split": split or "test",
        "splits": {p.task: split or p.report_split for p in protocols},
        "limit": limit,
        "batch_size": batch_size,
        "padding": "left",
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens or "as the protocol says"},
        "precision": dtype,
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": versions(),
    }
    earlier = _finished(output, made) if skip_done and not predict_only else None
    if earlier is not None:
        print(f"already done: {output / 'results.json'}")
        return earlier

    from mmtune.evaluation.generate import best_device, generate_answers
    from mmtune.parts.model import VisionLanguageModel

    instead = {restore: base} if restore and base else {}
    model = VisionLanguageModel.from_pretrained(model_folder, dtype=dtype, instead=instead).to(best_device())
    made["config"]["device"] = best_device().type
    # Gone before the first samples are replaced, back after the last: the two never belong to two models.
    with writing(output / "results.json", "removed"):
        (output / "results.json").unlink(missing_ok=True)
    for protocol, every, _ in asked:
        questions = every[:limit]
        images = (root or protocol.root) / protocol.images
        answers = generate_answers(model, protocol, questions, images, batch_size, max_new_tokens)
        prompts = {question.id: protocol.turns(question)[0].text for question in questions}
        if predict_only:
            rows: list[dict[str, Any]] = [
                {"question_id": name, "prompt": prompts[name], "text": text} for name, text in answers.items()
            ]
        else:
            score = score_predictions(questions, answers, protocol)
            rows = sample_rows(questions, score, prompts)
            results[protocol.task] = task_row(score)
            made["higher_is_better"][protocol.task] = {score.metric: True}
            made["n-samples"][protocol.task] = {"original": len(every), "effective": len(questions)}
            made["task_hashes"][protocol.task] = samples_hash(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(output / f"samples_{protocol.task}.jsonl", lines)
    made["total_evaluation_time_seconds"] = f"{time.perf_counter() - began:.1f}"
    if not predict_only:
        write_json(output / "results.json", made)
    return made


def evaluate_suite(
    model_folder: Path, suite: Suite, place: Path, split: str | None, attribution: bool = False, **how: Any
) -> list[dict[str, Any]]:
    """Evaluates a run's model on a suite, under `place`, where `mmtune report` looks; done ones are kept.

    attribution: then again with each part that was trained put back as in the base, one at a time.
    how: as `evaluate` takes it. Raises UserError.
    """
    restored = changed_parts(model_folder, find_base(model_folder)) if attribution else []
    return [
        evaluate(
            model_folder,
            suite.given,
            place / suite.folder(split, part),
            split=split,
            skip_done=True,
            restore=part,
            **how,
        )
        for part in (None, *restored)
    ]


def _finished(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The results that lie in `output`, where all that decides them is as wanted."""
    samples = [output / f"samples_{task}.jsonl" for task in wanted["configs"]]
    if not all(path.is_file() for path in (output / "results.json", *samples)):
        return None
    found: dict[str, Any] = read_json(output / "results.json")
    hashes = [{task: config["hash"] for task, config in each["configs"].items()} for each in (found, wanted)]
    decides = ("model_hash", "restored", "base_hash", "data", "splits", "limit", "decoding", "precision")
    # Results without their pictures' folders are of an older mmtune, whose samples lack them too.
    same = "images" in found and hashes[0] == hashes[1] and all(found.get(k) == wanted[k] for k in decides)
    return found if same else None


def print_results(made: dict[str, Any], console: Console) -> None:
    """A line per task: score, standard error, how it was scored, how many questions."""
    restored = made.get("restored")
    table = Table(title=made["model"] + (f", {restored} as in {made['base']}" if restored else ""))
    for heading in ("task", "split", "score", "stderr", "rule", "questions", "missing"):
        table.add_column(heading, justify="left" if heading in ("task", "split", "rule") else "right")
    for task, result in made["results"].items():
        stderr = "-" if result["stderr"] is None else f"{result['stderr']:.2f}"
        counts = str(result["n"]), str(result["missing"])
        table.add_row(task, made["splits"][task], f"{result['score']:.2f}", stderr, result["rule"], *counts)
    console.print(table)


def parse_gen_kwargs(text: str) -> int | None:
    """`max_new_tokens=N`, as lm-eval writes it. Decoding is greedy, so `temperature=0` is accepted too."""
    tokens = None
    for entry in filter(None, text.split(",")):
        name, _, value = entry.partition("=")
        if name == "max_new_tokens" and value.isdigit() and int(value) > 0:
            tokens = int(value)
        elif not (name == "temperature" and value in ("0", "0.0")):
            raise UserError(
                f"'{entry}' is not understood",
                where="--gen_kwargs",
                mend="Decoding is greedy: temperature=0 and max_new_tokens=N are what can be said.",
            )
    return tokens
