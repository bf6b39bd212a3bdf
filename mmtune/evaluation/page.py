"""A report as one self-contained page: no scripts, nothing from the network, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmtune.core.files import write_text
from mmtune.evaluation.examples import Example
from mmtune.evaluation.forgetting import ci95, half_width, mean_sd, short_names
from mmtune.evaluation.frontier import (
    frontier_legend,
    frontier_svg,
    frontier_title,
    is_numbered,
    looks,
)
from mmtune.evaluation.terminal import HEADINGS

TEMPLATE = "page.html.j2"
LONGEST = 400  # characters of a question or an answer; a runaway answer is told by its beginning


def write_page(report: dict[str, Any], examples: Mapping[str, Sequence[Example]], path: Path) -> None:
    """Writes report.html: `report` as make_report makes it, and examples of answers by task."""
    write_text(path, render_page(report, examples))


def render_page(report: dict[str, Any], examples: Mapping[str, Sequence[Example]]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "plain": plain, "breakable": breakable, "said": said}
    made = report["made_with"]
    tasks = [*made["source"], *made["target"]]
    short, look = short_names(tasks), looks(report)
    return environment.get_template(TEMPLATE).render(
        report=report,
        made=made,
        base=report["base"],
        groups=[{**group, "look": look[group["label"]]} for group in report["groups"]],
        tasks=tasks,
        short=short,
        source_names=", ".join(short[task] for task in made["source"]),
        target_names=", ".join(short[task] for task in made["target"]),
        title=frontier_title(report),
        legend=frontier_legend(report),
        wide=Markup(frontier_svg(report, narrow=False)),
        narrow=Markup(frontier_svg(report, narrow=True)),
        numbered={"wide": is_numbered(report, False), "narrow": is_numbered(report, True)},
        sets=[_set(report, task, look) for task in tasks],
        variants=[
            name
            for name in HEADINGS
            if any(name in group.get("attribution", {}) for group in report["groups"])
        ],
        variant_names=HEADINGS,
        examples=examples,
    )


def points(value: float | None, sign: bool = False) -> str:
    """A number with one decimal and a true minus; nothing for None, and no zero below nothing."""
    if value is None:
        return ""
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return re.sub(r"^[+-](?=0\.0$)", "", text).replace("-", "−")


def plain(text: str) -> str:
    """A text as a page can hold it: shortened, what no page may contain replaced."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "�", text)
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]}… ({more} more characters)"


def breakable(name: str) -> Markup:
    """A name that may be broken after each underscore."""
    return Markup("_<wbr>").join(name.split("_"))  # join escapes the words


def said(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(its)}" for key, its in value.items()) or "not said"
    if value is None or isinstance(value, bool):
        return "not said" if value is None else ("yes" if value else "no")
    return str(value)


def _set(report: dict[str, Any], task: str, look: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A task's scores: the base's, and of each group the mean over seeds with the half-width of its bar."""
    base = report["base"]["scores"][task]
    rows = []
    for group in report["groups"]:
        scores = [run["scores"][task] for run in report["runs"] if run["name"] in group["runs"]]
        cell = mean_sd([score["score"] for score in scores])
        half = cell["sd"] if len(scores) > 1 else _half95(scores[0])
        rows.append(
            {"label": group["label"], "look": look[group["label"]], "score": cell["mean"], "half": half}
        )
    return {"task": task, "base": base, "base_half": _half95(base), "rows": rows}


def _half95(score: Mapping[str, Any]) -> float | None:
    return half_width(ci95(score["score"], score["stderr"]))
