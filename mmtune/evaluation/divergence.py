"""How far a tuned model has moved from its base on a task: KL(base || tuned) along the base's own answers.

At each position of the base's greedy answer, its end included, both models are given the prompt and what the
base has said so far. The mean over the positions is a question's value, in nats per token; a task's is the
mean over its questions, its standard error clustered by picture. It is 0 for the base itself, and tells of a
model that moves though its answers are still the same. See tuning/kl.py for the divergence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl, write_json, write_text
from mmtune.evaluation.metrics.base import Question, clustered_stderr
from mmtune.evaluation.protocol import Protocol, load_protocol
from mmtune.evaluation.restore import find_base
from mmtune.parts.fingerprint import model_hash

if TYPE_CHECKING:
    from torch import nn

    from mmtune.parts.model import VisionLanguageModel

SAME = ("splits", "data", "limit", "decoding", "precision")
"""The keys of results that have to be the same, beside the model and the protocols, for the same answers."""


def add_kl(
    made: dict[str, Any],
    tasks: Sequence[str],
    output: Path,
    base: Path | None = None,
    base_results: Path | None = None,
    root: Path | None = None,
    question_files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Adds `kl` and `kl_stderr` to each task of finished results, and `kl` to each row of their samples.

    made: what `evaluate` returned for `tasks` and wrote to `output`. base: by default where the run says.
    base_results: a folder with the base's own evaluation, whose answers are taken; without it they are
    generated. question_files: as `evaluate` had them.
    What is there already is kept. Raises UserError.
    """
    folder = Path(made["model"])
    base = find_base(folder, base)
    if made.get("kl_base") == model_hash(base) and all("kl" in row for row in made["results"].values()):
        return made
    said = {} if base_results is None else _said(base_results, made, base)

    from mmtune.evaluation.generate import generate_answers
    from mmtune.evaluation.variant import load_variant
    from mmtune.parts.between import as_base, base_parts

    model = load_variant(folder, made["precision"], made["restored"], base, made.get("scale"))
    beside = base_parts(model, folder, base, made["precision"], made["restored"])
    batch_size, most = made["batch_size"], made["decoding"]["max_new_tokens"]
    for protocol in map(load_protocol, tasks):
        task, row = protocol.task, made["results"][protocol.task]
        if question_files and task in question_files:
            protocol = protocol.asked_by(question_files[task], made["splits"][task])
        protocol = replace(protocol, decode=made["configs"][task]["decode"])
        assert protocol.hash == made["configs"][task]["hash"]  # both models are asked what was scored
        images = (root or protocol.root) / protocol.images
        questions = protocol.questions(made["splits"][task], root)[0][: made["limit"]]
        if task not in said:
            with as_base(model, beside):
                limit = most if isinstance(most, int) else None
                said[task] = generate_answers(model, protocol, questions, images, batch_size, limit)
        found = divergences(model, beside, protocol, questions, images, said[task], batch_size)
        stderr = clustered_stderr([found[q.id] for q in questions], [q.cluster for q in questions])
        row |= {"kl": fmean(found.values()), "kl_stderr": stderr}
        path = output / f"samples_{task}.jsonl"
        rows = [{**sample, "kl": found[str(sample["question_id"])]} for _, sample in read_jsonl(path)]
        write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in rows))
        print(f"{task}: KL to the base {row['kl']:.4f} nats per token", file=sys.stderr, flush=True)
    made["kl_base"] = model_hash(base)
    write_json(output / "results.json", made)
    return made


def divergences(
    model: VisionLanguageModel,
    beside: Mapping[str, nn.Module | None],
    protocol: Protocol,
    questions: Sequence[Question],
    image_root: Path,
    answers: Mapping[str, str],
    batch_size: int,
) -> dict[str, float]:
    """Question id -> the mean of KL(base || model) over the positions of an answer and its end, in nats.

    beside: the base's parts, as `base_parts` gives them. Raises UserError for a picture that is missing.
    """
    import numpy as np
    import torch

    from mmtune.core.files import inside
    from mmtune.data.batches import Example, collate
    from mmtune.data.chat import IGNORE, Turn
    from mmtune.parts.between import as_base
    from mmtune.tuning.kl import kl_divergence

    examples = []
    for question in questions:
        turns = [*protocol.turns(question), Turn("assistant", answers[question.id])]
        ids, labels = model.chat.encode(turns)
        pictures = tuple(inside(image_root, image) for image in question.images)
        examples.append(Example(question.id, np.array(ids, np.int32), np.array(labels, np.int32), pictures))
    examples.sort(key=lambda example: -len(example.ids))
    device = next(model.parameters()).device
    found: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], model.transform, model.language.pad_id)
            batch = batch.to(device)
            tuned = model(batch, True)[1]
            with as_base(model, beside):
                base = model(batch, True)[1]
            assert batch.labels is not None
            sizes = (batch.labels[:, 1:] != IGNORE).sum(1).tolist()
            pairs = zip(batch.sample_ids, base.split(sizes), tuned.split(sizes), strict=True)
            found |= {name: kl_divergence(b, t).item() / len(b) for name, b, t in pairs}
    return found


def _said(folder: Path, made: dict[str, Any], base: Path) -> dict[str, dict[str, str]]:
    """Task -> the base's answers in its own evaluation. Raises UserError where it was made otherwise."""
    results = read_json(folder / "results.json")
    mend = "Evaluate the base in the same way, or leave its results out: it is then asked."
    if results.get("model_hash") != model_hash(base) or results.get("restored") or results.get("scale"):
        raise UserError(f"these are not results of the base, {base}", where=folder, mend=mend)
    hashes = [{task: config["hash"] for task, config in each["configs"].items()} for each in (results, made)]
    other = [key for key in SAME if results.get(key) != made[key]] + ["protocols"] * (hashes[0] != hashes[1])
    if other:
        raise UserError(f"made with other {', '.join(other)}", where=folder, mend=mend)
    return {
        task: {
            str(row["question_id"]): row["prediction"] or ""
            for _, row in read_jsonl(folder / f"samples_{task}.jsonl")
        }
        for task in made["results"]
    }
