"""A report as one self-contained page: nothing from the network, every text escaped, one script of its own.

Without JavaScript the page is whole but for the browser of single questions. A policy in the page lets no
other script run, whatever a model or a file's name says.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmtune.core.files import write_text
from mmtune.evaluation.browser import TaskRows, browser_data, notes, script_json
from mmtune.evaluation.examples import Example, plain
from mmtune.evaluation.forgetting import ci95, half_width, mean_sd, short_names, units_note
from mmtune.evaluation.frontier import (
    frontier_legend,
    frontier_svg,
    frontier_title,
    is_numbered,
    looks,
)
from mmtune.evaluation.provenance import made_box, said
from mmtune.evaluation.terminal import HEADINGS, p_value
from mmtune.evaluation.thumbnails import Thumbnails

TEMPLATE = "page.html.j2"  # with page.css and page.js in it


def write_page(
    report: dict[str, Any],
    examples: Mapping[str, Sequence[Example]],
    questions: Mapping[str, TaskRows],
    thumbnails: Thumbnails,
    path: Path,
) -> None:
    """Writes report.html: `report` as make_report makes it, examples of answers and all questions by task."""
    write_text(path, render_page(report, examples, questions, thumbnails))


def render_page(
    report: dict[str, Any],
    examples: Mapping[str, Sequence[Example]],
    questions: Mapping[str, TaskRows],
    thumbnails: Thumbnails,
) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "points": points,
        "plain": plain,
        "breakable": breakable,
        "said": said,
        "p_value": p_value,
        "half_width": half_width,
    }
    made = report["made_with"]
    tasks = [*made["source"], *made["target"]]
    short, look = short_names(tasks), looks(report)
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    box = made_box(report)
    browsed = browser_data(questions, thumbnails)
    browsed["tasks"] = [
        {"task": task, "name": short[task], "graded": is_graded(report, task), **its}
        for task, its in browsed["tasks"].items()
    ]
    browsed["methods"] = [
        {"name": group["label"], "look": look[group["label"]][0]} for group in report["groups"]
    ]
    return environment.get_template(TEMPLATE).render(
        report=report,
        made=made,
        base=report["base"],
        groups=[{**group, "look": look[group["label"]]} for group in report["groups"]],
        tasks=tasks,
        short=short,
        source_names=", ".join(short[task] for task in made["source"]),
        target_names=", ".join(short[task] for task in made["target"]),
        units=units_note(report["base"]["scores"], made["source"], made["target"]),
        title=frontier_title(report),
        legend=frontier_legend(report),
        wide=Markup(frontier_svg(report, narrow=False)),
        narrow=Markup(frontier_svg(report, narrow=True)),
        numbered={"wide": is_numbered(report, False), "narrow": is_numbered(report, True)},
        sets=[_set(report, task, look) for task in tasks],
        chances=lambda group: [
            *(group["change"][which] for which in ("source", "target")),
            *(group["change"]["tasks"][task] for task in tasks),
        ],
        rivals=[
            pair
            for pair in report.get("between", {}).get("pairs", [])
            if pair["b"] == report["between"]["best"]
        ],
        looks=look,
        scales=sorted({one["scale"] for group in report["groups"] for one in group.get("scales", [])}),
        variants=[
            name
            for name in HEADINGS
            if any(name in group.get("attribution", {}) for group in report["groups"])
        ],
        variant_names=HEADINGS,
        examples=examples,
        thumbnail=lambda task, name: thumbnails.uris.get((questions[task].images or "", name)),
        box=box,
        notes=notes(questions, thumbnails),
        graded={task: is_graded(report, task) for task in tasks},
        several_questions=sum(len(rows.before) for rows in questions.values()),
        css=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(script_json({**browsed, "made": box["text"]})),
    )


def points(value: float | None, sign: bool = False) -> str:
    """A number with one decimal and a true minus; nothing for None, and no zero below nothing."""
    if value is None:
        return ""
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return re.sub(r"^[+-](?=0\.0$)", "", text).replace("-", "−")


def breakable(name: str) -> Markup:
    """A name that may be broken after each underscore."""
    return Markup("_<wbr>").join(name.split("_"))  # join escapes the words


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
    ends = [row["score"] + (row["half"] or 0) for row in rows]
    full = max(100, base["score"] + (_half95(base) or 0), *ends)  # CIDEr x 100 has no highest
    return {"task": task, "base": base, "base_half": _half95(base), "rows": rows, "scale": 100 / full}


def is_graded(report: dict[str, Any], task: str) -> bool:
    """Whether a question's score says how right its answer is; CIDEr, which has no highest, does not."""
    return report["base"]["scores"][task].get("unit", "%") == "%"


def _half95(score: Mapping[str, Any]) -> float | None:
    return half_width(ci95(score["score"], score["stderr"]))
