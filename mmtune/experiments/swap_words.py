"""What the table of a swap shows, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mmtune.evaluation.forgetting import half_width
from mmtune.evaluation.metrics.base import some
from mmtune.evaluation.page import points
from mmtune.evaluation.significance import Z95

LEVEL = 0.05


def is_beyond(cell: Mapping[str, Any]) -> bool:
    """Whether a difference is beyond chance: by Holm's p over the questions and by 1.96 SE over seeds."""
    spread = Z95 * (cell["stderr_seeds"] or 0.0)
    return cell["p_holm"] is not None and cell["p_holm"] < LEVEL and abs(cell["difference"]) > spread


def difference(cell: Mapping[str, Any]) -> str:
    """A difference ± half its interval; without it where all questions moved alike: none can be told."""
    half = half_width(cell["ci95"])
    return points(cell["difference"], sign=True) + (f" ± {half:.1f}" if half else "")


def words(report: Mapping[str, Any]) -> list[str]:
    """What differs from the control, what the fitted start saves, and what no tower could move."""
    found = []
    rows = report["compared"].get("control", [])
    for which in ("source", "target") if rows else ():
        for how, wanted in (("beyond chance", True), ("within it", False)):
            named = [
                f"{row['a']} {difference(row[which])}" for row in rows if is_beyond(row[which]) is wanted
            ]
            found.append(
                f"{which.capitalize()} less {report['control']}'s, {how}: {'; '.join(named) or 'none'}."
            )
    for label, why in report["uncontrolled"].items():
        found.append(f"{label} is not held against {report['control']}: {why}.")
    for row in report["compared"].get("starts", []):
        tower = next(r["tower"] for r in report["rows"] if r["label"] == row["a"])
        less = ", ".join(f"{which} {difference(row[which])}" for which in ("source", "target"))
        found.append(f"{tower}, fitted less scratch: {less}.{_steps(report['saved'].get(tower, []))}")
    return [*found, *_unmoved(report)]


def _unmoved(report: Mapping[str, Any]) -> list[str]:
    """What the numbers hold that is not the towers' doing."""
    found, made = [], report["made_with"]
    blind = [task for task in made["without_pictures"] if task in made["source"]]
    if report["alignment_only"] and blind:
        found.append(
            f"Source holds sets without pictures ({some(blind)}): no tower moves what the language model, "
            "which did not train, says to them."
        )
    if report["alignment_only"]:
        found.append(
            "No stage after the alignment: the connector alone trained, not for the target, so half of Mean "
            f"is of what was not tuned for ({some(made['target'])}). Read Source."
        )
    return found


def _steps(saved: Sequence[Mapping[str, Any]]) -> str:
    """What the fitted start saves, as the mean over seeds."""
    if not saved:
        return ""
    means = ("first", "first_loss", "last", "last_loss")
    look, first, steps, last = (fmean(one[key] for one in saved) for key in means)
    begins, ends = ([one[key] for one in saved] for key in ("scratch_at", "fitted_at"))
    if not any(begins) and all(end == one["first"] for end, one in zip(ends, saved, strict=True)):
        return (
            f" More than {steps:.0f} steps saved: scratch does not reach in {steps:.0f} steps what the "
            f"fitted start has after step {look:.0f} (a probe's loss of {first:.3f} against {last:.3f} at "
            "the end)."
        )
    less = "" if None in ends else f": {steps - fmean(ends):.0f} of {steps:.0f} steps saved"
    return (
        f" Its probe has a loss of {first:.3f} after step {look:.0f}, which scratch reaches {_at(begins)}; "
        f"it reaches scratch's last loss, {last:.3f}, {_at(ends)}{less}."
    )


def _at(steps: Sequence[float | None]) -> str:
    known = [step for step in steps if step is not None]
    if len(known) == len(steps):
        return f"at step {fmean(known):.0f}"
    return f"with {len(known)} of {len(steps)} seeds only" if known else "not at all"
