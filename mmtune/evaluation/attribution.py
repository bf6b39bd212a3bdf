"""Where gain and forgetting sit: what a run scores with one part put back as it was in the base.

Read from the evaluations that `mmtune eval --restore` and `evaluate.attribution` write; what was not
evaluated is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.core.errors import Fault, UserError
from mmtune.evaluation.forgetting import Evaluation, check_comparable, mean_sd, read_evaluation, summary
from mmtune.evaluation.restore import VARIANTS

if TYPE_CHECKING:
    from mmtune.evaluation.protocol import Suite


def read_attribution(
    run: Path, whole: Evaluation, base: Evaluation, suite: Suite, split: str | None
) -> dict[str, Evaluation]:
    """Part -> the run's evaluation with that part put back, as far as there are any.

    Raises UserError for one of another model or base than the run's own, and for one that was made in
    another way than the base's evaluation.
    """
    found = {}
    for part in VARIANTS:
        place = run / suite.folder(split, part)
        if not (place / "results.json").is_file():
            continue
        restored = read_evaluation(place, suite.tasks)
        command = f"mmtune eval --model {run / 'final'} --restore {part} --suite {suite.name}"
        command += f" --output_path {place}" + (f" --split {split}" if split not in (None, "test") else "")
        faults = [
            Fault(f"it was made {what} {its}, but the run {has} {ours}", str(place), f"Run: {command}")
            for what, its, has, ours in (
                ("of model", restored.model_hash, "is model", whole.model_hash),
                ("with a part of model", restored.base_hash, "started from", base.model_hash),
            )
            if its != ours
        ]
        if faults:
            raise UserError.of(faults)
        check_comparable(replace(base, restored=part), {str(place): restored})
        found[part] = restored
    return found


def attribution_row(restored: Mapping[str, Evaluation], suite: Suite) -> dict[str, dict[str, Any]]:
    """Variant -> `source`, `target` and `scores` (task -> points) of the run with that part put back."""
    row = {}
    for part, evaluation in restored.items():
        scores = {task: result["score"] for task, result in evaluation.scores.items()}
        means = summary(scores, suite.source, suite.target)
        row[VARIANTS[part]] = {"source": means["source"], "target": means["target"], "scores": scores}
    return row


def attribution_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same over seeds, each number as mean and SD; only of variants that every run of the group has."""
    each = [row.get("attribution", {}) for row in rows]
    return {
        variant: {
            "source": mean_sd([row[variant]["source"] for row in each]),
            "target": mean_sd([row[variant]["target"] for row in each]),
            "scores": {
                task: mean_sd([row[variant]["scores"][task] for row in each])
                for task in each[0][variant]["scores"]
            },
        }
        for variant in VARIANTS.values()
        if all(variant in row for row in each)
    }


def attribution_gaps(label: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each variant that only some runs of a group were evaluated in."""
    gaps = []
    for variant in VARIANTS.values():
        without = [row["name"] for row in rows if variant not in row.get("attribution", {})]
        if 0 < len(without) < len(rows):
            gaps.append(f"{label}: no mean of {variant}, which {', '.join(without)} was not evaluated in")
    return gaps
