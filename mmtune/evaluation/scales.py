"""The way from the base to a tuned model: what a run scores at several parts of it (WiSE-FT's dial).

Read from the evaluations that `mmtune eval --scale` and `evaluate.scales` write. A curve that bends up and
to the right of the straight line between base and run says that a part of the change was enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.core.errors import Fault, UserError
from mmtune.evaluation.forgetting import Evaluation, check_comparable, mean_sd, read_evaluation, summary

if TYPE_CHECKING:
    from mmtune.evaluation.protocol import Suite


def read_scales(
    run: Path, whole: Evaluation, base: Evaluation, suite: Suite, split: str | None
) -> dict[float, Evaluation]:
    """Scale -> the run's evaluation at it, in rising order, as far as there are any.

    Raises UserError for one of another model or base than the run's own, and for one that was made in
    another way than the base's evaluation.
    """
    found: dict[float, Evaluation] = {}
    start = suite.folder(split)
    for place in (run / start).parent.glob(f"{start.name}-scale-*"):
        if not (place / "results.json").is_file():
            continue
        scaled = read_evaluation(place, suite.tasks)
        mend = "Evaluate it again, or remove the folder."
        faults = [
            Fault(what, str(place), mend)
            for what, wrong in (
                ("it does not say at what scale it was made", scaled.scale is None),
                ("it is of another model than the run's", scaled.model_hash != whole.model_hash),
                ("it starts from another model than the base", scaled.base_hash != base.model_hash),
            )
            if wrong
        ]
        if faults:
            raise UserError.of(faults)
        assert scaled.scale is not None
        check_comparable(replace(base, scale=scaled.scale), {str(place): scaled})
        found[scaled.scale] = scaled
    return dict(sorted(found.items()))


def scale_rows(scaled: Mapping[float, Evaluation], suite: Suite) -> list[dict[str, Any]]:
    """`scale`, `source`, `target` and `scores` (task -> points) at each scale."""
    rows = []
    for scale, evaluation in scaled.items():
        scores = {task: result["score"] for task, result in evaluation.scores.items()}
        means = summary(scores, suite.source, suite.target)
        rows.append({"scale": scale, "source": means["source"], "target": means["target"], "scores": scores})
    return rows


def scale_group(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same over seeds, each number as mean and SD; only at scales that every run of the group has."""
    each = [{one["scale"]: one for one in row.get("scales", [])} for row in rows]
    return [
        {
            "scale": scale,
            **{key: mean_sd([run[scale][key] for run in each]) for key in ("source", "target")},
            "scores": {
                task: mean_sd([run[scale]["scores"][task] for run in each])
                for task in each[0][scale]["scores"]
            },
        }
        for scale in each[0]
        if all(scale in run for run in each)
    ]
