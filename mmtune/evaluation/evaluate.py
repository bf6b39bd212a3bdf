"""A model on a list of tasks: generates, scores, and writes results that say how they were made.

Answers are kept on the disk as they come, so that the same command goes on where one was killed; several
processes may share them. Torch is imported only once there is something to generate.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from mmtune.core import processes
from mmtune.core.config import to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import alone_in, inside, read_json, write_json, write_text, writing
from mmtune.core.table import nearest
from mmtune.core.versions import versions
from mmtune.evaluation.divergence import SAME, add_kl
from mmtune.evaluation.metrics.base import Question, some
from mmtune.evaluation.protocol import Protocol, Suite, load_protocol
from mmtune.evaluation.restore import check_restorable, find_base
from mmtune.evaluation.results import run_header, sample_rows, samples_hash, task_row
from mmtune.evaluation.score import score_predictions
from mmtune.evaluation.unfinished import Unfinished
from mmtune.parts.fingerprint import changed_parts, model_hash

if TYPE_CHECKING:
    from mmtune.parts.model import VisionLanguageModel


class Asked(NamedTuple):
    """A task as it is asked: its questions, of `every` one of the file, and the folder of their pictures."""

    protocol: Protocol
    questions: list[Question]
    every: list[Question]
    images: Path


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
    scale: float | None = None,
    decode: str | None = None,
    question_files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Writes `results.json` and, for each task, `samples_TASK.jsonl` (or only the answers) to `output`.

    Every annotation file is read, and every picture looked for, before the model is loaded. split: of every
    task; by default each has its own reporting split. limit: the first so many questions of each task. seed:
    stamped, no more, for decoding is greedy. skip_done: where `output` holds these results of this very model
    already, they are returned. restore: a part that is put back as it is in `base`, the model folder that
    this one was trained from (by default where its run says). scale: only this part of the way from `base` to
    the model, 0 to 1. decode: `generate` or `likelihood`, instead of what the protocols say. question_files:
    task -> LLaVA's question file, whose prompts replace the protocol's. Among several processes all do their
    share, the first one scores and writes, and what the others return has no scores. Raises UserError.
    """
    if base is not None and restore is None and scale is None:
        raise UserError("a base is given, but nothing to do with it", mend="Give --restore, --scale or --kl.")
    if restore is not None and scale is not None:
        raise UserError("--restore and --scale exclude each other", mend="Give one of the two.")
    if output.exists() and not output.is_dir():
        raise UserError(
            "this is a file, no folder for results", where=output, mend="Give another --output_path."
        )
    began = time.perf_counter()
    protocols = _protocols(tasks, split, decode, question_files or {})
    asked = _read_all(protocols, split, root, limit)
    if restore is not None:
        base = find_base(model_folder, base)
        check_restorable(model_folder, restore, base)
    if scale is not None:
        base = find_base(model_folder, base)
    made: dict[str, Any] = {
        "results": {},
        **run_header(model_folder, protocols, batch_size, limit, max_new_tokens, dtype, seed, restore, scale),
        "configs": {p.task: {**to_dict(p), "hash": p.hash} for p in protocols},
        "data": {p.task: _content_hash(p.files(split or p.report_split, root)) for p in protocols},
        "question_files": {
            p.task: _content_hash([p.question_file(split or p.report_split, root)])
            for p in protocols
            if p.question_files
        },
        "images": {each.protocol.task: str(each.images.resolve()) for each in asked},
        "model": str(model_folder),
        "model_hash": model_hash(model_folder),
        "restored": restore,
        "scale": scale,
        "base": str(base) if base else None,
        "base_hash": model_hash(base) if base else None,
        "split": split or "test",
        "splits": {p.task: split or p.report_split for p in protocols},
        "limit": limit,
        "batch_size": batch_size,
        "processes": processes.count(),
        "padding": "left",
        "decoding": {"greedy": True, "max_new_tokens": max_new_tokens or "as the protocol says"},
        "precision": dtype,
        "attention": None,
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": versions(),
        "given": {
            "tasks": list(tasks),
            "decode": decode,
            "data_root": None if root is None else str(root),
        },
    }
    earlier = _finished(output, made) if skip_done and not predict_only else None
    if earlier is not None:
        if processes.rank() == 0:
            print(f"already done: {output / 'results.json'}")
        return earlier

    from mmtune.evaluation.generate import answer_in_batches, best_device
    from mmtune.evaluation.variant import load_variant

    first = processes.rank() == 0
    with processes.joined(), alone_in(output) if first else nullcontext():
        kept = {p.task: Unfinished(output, p.task, _decides(made, p)) for p in protocols}
        processes.wait()  # all have seen what lies here; only now may it change
        made["config"]["device"] = best_device().type
        model = None
        measured = first and dtype != "float32" and batch_size > 1  # in fp32 the batch size changes no answer
        if measured or any(
            q.id not in kept[each.protocol.task].done for each in asked for q in each.questions
        ):
            model = load_variant(model_folder, dtype, restore, base, scale)
        # Gone before the first samples are replaced, back after the last: the two never belong to two models.
        if first:
            with writing(output / "results.json", "removed"):
                (output / "results.json").unlink(missing_ok=True)
        for number, each in enumerate(asked, start=1):
            task = each.protocol.task
            if model is not None:
                name = f"{task} ({number} of {len(asked)})" if len(asked) > 1 else task
                what = (each.protocol, each.questions, each.images)
                batches = answer_in_batches(model, *what, batch_size, max_new_tokens, kept[task].done, name)
                with kept[task]:
                    kept[task].note({"attention": model.attention})
                    for rows in batches:
                        kept[task].add(rows)
            processes.wait()
            if first:
                said = kept[task].read()
                made |= kept[task].made
                _check_all_said(each, said, output)
                if measured and model is not None:
                    made.setdefault("changed_alone", {})[task] = _changed(
                        model, each, said, max_new_tokens, dtype
                    )
                rows = _scored(made, each, said, predict_only)
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(output / f"samples_{task}.jsonl", lines)
        made["total_evaluation_time_seconds"] = f"{time.perf_counter() - began:.1f}"
        if first:
            if not predict_only:
                write_json(output / "results.json", made)
            for answers in kept.values():
                answers.remove()
        processes.wait()
    return made


def evaluate_suite(
    model_folder: Path,
    suite: Suite,
    place: Path,
    split: str | None,
    attribution: bool = False,
    scales: Sequence[float] = (),
    kl: bool = False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Evaluates a run's model on a suite, under `place`, where `mmtune report` looks; done ones are kept.

    attribution: then again with each part that was trained put back as in the base, one at a time.
    scales: then again with each of these parts of the way from the base. kl: with the whole model's KL to it.
    how: as `evaluate` takes it. Raises UserError.
    """
    restored = changed_parts(model_folder, find_base(model_folder)) if attribution else []
    variants = [(None, None), *((part, None) for part in restored), *((None, scale) for scale in scales)]
    made = [
        evaluate(
            model_folder,
            suite.given,
            place / suite.folder(split, part, scale),
            split=split,
            skip_done=True,
            restore=part,
            scale=scale,
            **how,
        )
        for part, scale in variants
    ]
    if kl:
        add_kl(made[0], suite.given, place / suite.folder(split), root=how.get("root"))
    return made


def _protocols(
    tasks: Sequence[str], split: str | None, decode: str | None, question_files: Mapping[str, Path]
) -> list[Protocol]:
    """The tasks' protocols, with what the command says instead. Raises UserError."""
    protocols = [load_protocol(task) for task in tasks]
    names = [protocol.task for protocol in protocols]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"tasks are given twice: {some(twice)}", mend="Name each task once.")
    for task in question_files:
        if task not in names:
            raise UserError(
                f"task '{task}' is not among the tasks", where="--question_file", mend=nearest(task, names)
            )
    protocols = [
        p.asked_by(question_files[p.task], split) if p.task in question_files else p for p in protocols
    ]
    if decode is not None:
        protocols = [replace(protocol, decode=decode) for protocol in protocols]  # type: ignore[arg-type]
    return protocols


def check_data(tasks: Sequence[str], split: str | None, root: Path | None, limit: int | None) -> None:
    """Raises UserError, as `evaluate` would, where annotations or pictures of the tasks are missing."""
    _read_all(_protocols(tasks, split, None, {}), split, root, limit)


def _read_all(
    protocols: Sequence[Protocol], split: str | None, root: Path | None, limit: int | None
) -> list[Asked]:
    """What each task asks. Raises UserError with every task whose pictures or options are not all there."""
    asked = []
    for protocol in protocols:
        every, _ = protocol.questions(split, root)
        images = (root or protocol.root) / protocol.images
        asked.append(Asked(protocol, every[:limit], every, images))
        warning = protocol.other_count(split or protocol.report_split, len(every))
        if warning and processes.rank() == 0:
            print(f"mmtune: warning: {warning}", file=sys.stderr)
    faults = [fault for each in asked for fault in (*_choices_missing(each), *_pictures_missing(each))]
    if faults:
        raise UserError.of(faults)
    return asked


def _choices_missing(asked: Asked) -> Sequence[Fault]:
    """The first question without choices, where likelihood is to decide between them."""
    without = next((question for question in asked.questions if not question.choices), None)
    if asked.protocol.decode == "likelihood" and without is not None:
        try:
            asked.protocol.candidates(without)
        except UserError as error:
            return error.faults
    return []


def _pictures_missing(asked: Asked) -> list[Fault]:
    names = dict.fromkeys(image for question in asked.questions for image in question.images)
    missing = [name for name in names if not inside(asked.images, name).is_file()]
    if not missing:
        return []
    what = f"pictures that are not there ({len(missing)} of {len(names)}): {some(missing)}"
    mend = "Where do the pictures lie? Put them there, or say --data_root DIR."
    return [Fault(what, f"task {asked.protocol.task}, {asked.images}", mend)]


def _check_all_said(asked: Asked, said: Mapping[str, Any], output: Path) -> None:
    without = [question.id for question in asked.questions if question.id not in said]
    if without:
        raise UserError(
            f"task {asked.protocol.task}: {len(without)} answers were made and are not here: {some(without)}",
            where=output,
            mend="All processes have to write to one folder, and nobody may remove files from it.",
        )


def _changed(
    model: VisionLanguageModel,
    asked: Asked,
    said: Mapping[str, dict[str, Any]],
    max_new_tokens: int | None,
    dtype: str,
) -> dict[str, int]:
    """How many of some answers change where their question is asked alone: in the results, and said."""
    from mmtune.evaluation.generate import changed_alone

    texts = {name: row["text"] for name, row in said.items()}
    found = changed_alone(model, asked.protocol, asked.questions, asked.images, texts, max_new_tokens)
    print(
        f"{asked.protocol.task}: asked again one at a time in {dtype}, {found['changed']} of "
        f"{found['asked']} answers changed",
        file=sys.stderr,
        flush=True,
    )
    return found


def _decides(made: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """All that decides a task's answers: what was answered under another such header is not used."""
    keys = ("model_hash", "restored", "scale", "base_hash", "limit", "decoding", "precision", "environment")
    exact = made["precision"] == "float32" and protocol.decode == "generate"
    return {
        **{key: made[key] for key in keys},
        "task": protocol.task,
        "protocol": protocol.hash,
        "data": made["data"][protocol.task],
        "images": made["images"][protocol.task],
        "split": made["splits"][protocol.task],
        "batch_size": None if exact else made["batch_size"],  # in fp32 it changes no answer
    }


def _scored(
    made: dict[str, Any], asked: Asked, said: dict[str, dict[str, Any]], predict_only: bool
) -> list[dict[str, Any]]:
    """The rows of a task's samples; its score goes into `made`."""
    protocol, questions = asked.protocol, asked.questions
    prompts = {question.id: protocol.turns(question)[0].text for question in questions}
    if predict_only:
        rows = [{"question_id": q.id, "prompt": prompts[q.id], "text": said[q.id]["text"]} for q in questions]
    else:
        texts = {name: row["text"] for name, row in said.items()}
        score = score_predictions(questions, texts, protocol, among=asked.every)
        rows = sample_rows(questions, score, prompts)
        made["results"][protocol.task] = task_row(score)
        made["higher_is_better"][protocol.task] = {score.metric: True}
        made["n-samples"][protocol.task] = {"original": len(asked.every), "effective": len(questions)}
        made["task_hashes"][protocol.task] = samples_hash(rows)
    numbers = ("loglikelihood", "loglikelihood_per_token")
    return [
        {**row, **{key: said[row["question_id"]][key] for key in numbers if key in said[row["question_id"]]}}
        for row in rows
    ]


def _content_hash(files: Sequence[Path]) -> str:
    """The first 16 hex digits of the SHA-256 of the files, one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _finished(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The results that lie in `output`, where all that decides them is as wanted."""
    samples = [output / f"samples_{task}.jsonl" for task in wanted["configs"]]
    if not all(path.is_file() for path in (output / "results.json", *samples)):
        return None
    found: dict[str, Any] = read_json(output / "results.json")
    hashes = [{task: config["hash"] for task, config in each["configs"].items()} for each in (found, wanted)]
    decides = ["model_hash", "restored", "scale", "base_hash", *SAME]
    decides += ["batch_size"] if wanted["precision"] != "float32" else []
    # Results without their pictures' folders are of an older mmtune, whose samples lack them too.
    same = "images" in found and hashes[0] == hashes[1] and all(found.get(k) == wanted[k] for k in decides)
    return found if same else None


def print_results(made: dict[str, Any], console: Console) -> None:
    """A line per task: score, standard error, how it was scored, how many questions; then the warnings."""
    title, restored, scale = made["model"], made.get("restored"), made.get("scale")
    title += f", {restored} as in {made['base']}" if restored else ""
    title += "" if scale is None else f", {scale:g} of the way from {made['base']}"
    with_kl = "kl_base" in made
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("task", "split", "score", "stderr", "rule", "questions", "missing")
    for heading in (*headings, *(["KL"] if with_kl else [])):
        justify: Any = "left" if heading in ("task", "split", "rule") else "right"
        table.add_column(heading, justify=justify, overflow="fold")  # cut names would read alike
    for task, result in made["results"].items():
        stderr = "-" if result["stderr"] is None else f"{result['stderr']:.2f}"
        counts = [str(result["n"]), str(result["missing"])]
        counts += [f"{result['kl']:.4f}"] if with_kl else []
        table.add_row(task, made["splits"][task], f"{result['score']:.2f}", stderr, result["rule"], *counts)
    console.print(table)
    again = made.get("changed_alone", {}).values()
    if again:
        asked, changed = (sum(its[key] for its in again) for key in ("asked", "changed"))
        console.print(
            f"In {made['precision']} an answer can depend on its batch. Of {asked} questions asked again one "
            f"at a time {100 * changed / asked:.1f} % were answered otherwise ({changed})."
        )
    units = {task: row["unit"] for task, row in made["results"].items() if row.get("unit", "%") != "%"}
    if units:
        named = "; ".join(f"that of {task} is {unit}" for task, unit in units.items())
        console.print(f"Scores are per cent, but {named}.", markup=False, soft_wrap=True)
    for task, result in made["results"].items():
        for warning in result.get("warnings", ()):
            console.print(f"warning: {task}: {warning}", markup=False, soft_wrap=True)


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
