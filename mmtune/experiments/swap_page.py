"""The report of a swap as tables for the terminal, and as one page with its picture in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.files import write_text
from mmtune.evaluation.forgetting import short_names
from mmtune.evaluation.page import points
from mmtune.evaluation.terminal import p_value
from mmtune.experiments.swap_words import difference

GIB = 1 << 30
UNLIKE = 1.5  # times as fast, at the same work
TEMPLATE = "swap.html.j2"
COSTS = (
    "image\ntokens",
    "tower,\nloaded, M",
    "tower,\nwhole, M",
    "connector,\nM",
    "aligned,\nsamples/s",
    "answers/s",
    "memory,\nGiB",
    "R²,\ntokens",
)


def print_swap(report: Mapping[str, Any], console: Console) -> None:
    """The report as tables of some 100 columns, and what they show in words."""
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 110)
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    scores = _table(f"Towers on suite {made['suite']} (points)")
    scores.add_column("", overflow="fold")
    for heading in ("Source", "Target", "Mean", *short.values()):
        scores.add_column(heading, justify="right", min_width=5, overflow="fold")
    for row in [*([report["base"]] if report["base"] else []), *report["rows"]]:
        cells = cells_of(row, made)
        scores.add_section()
        scores.add_row(Text(row["label"], style="bold"), *[Text(f"{c['mean']:.1f}") for c in cells])
        if len(row["seeds"]) > 1:
            _add(scores, f"  ± SD, {len(row['seeds'])} seeds", [cell["sd"] for cell in cells])
        for end, label in enumerate(("  95 %, questions: from", "  to")):
            _add(scores, label, [cell["ci95"] and cell["ci95"][end] for cell in cells])
    console.print(scores)
    costs = _table("What they cost")
    costs.add_column("", overflow="fold", min_width=min(30, max(len(row["label"]) for row in report["rows"])))
    for heading in COSTS:
        costs.add_column(heading, justify="right", overflow="fold")
    for row in report["rows"]:
        costs.add_row(Text(row["label"], style="bold"), *costs_of(row))
    console.print(costs)
    for which, heading in HEADINGS.items():
        if which in report["compared"]:
            console.print(_compared(report["compared"][which], heading.format(**report)))
    for line in (*report["words"], *notes(report)):
        console.print(Text(line))
    for warning in warnings(report):
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))
    console.print(Text("Written: " + ", ".join(report["files"].values())), soft_wrap=True)


HEADINGS = {
    "base": "Against the base as it is: difference ± 95 %, questions",
    "control": "Against {control}, started alike: difference ± 95 %, questions",
    "best": "Against the best by Mean, started alike, whose lead is flattered: difference ± 95 %, questions",
    "starts": "The fitted start against scratch: difference ± 95 %, questions",
}


def cells_of(row: Mapping[str, Any], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Source, Target, Mean and each set."""
    sets = [row["scores"][task] for task in (*made["source"], *made["target"])]
    return [row["source"], row["target"], row["mean"], *sets]


def costs_of(row: Mapping[str, Any]) -> list[str]:
    """What COSTS names, of one row."""
    facts = row["facts"]
    return [
        str(facts["image_tokens"]),
        f"{facts['parameters'] / 1e6:.3g}",
        f"{facts['whole'] / 1e6:.3g}",
        f"{facts['connector_parameters'] / 1e6:.3g}",
        f"{row['samples_per_s']:.3g}",
        f"{row['questions_per_s']:.3g}",
        " / ".join(f"{size / GIB:.3g}" for size in facts["memory"]),
        f"{row['fit']['r2']['image_tokens']:.3f}" if row["fit"] else "",
    ]


def notes(report: Mapping[str, Any]) -> list[str]:
    """How to read the tables."""
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    splits = ", ".join(sorted(set(made["splits"].values())))
    found = [
        f"Split {splits}. Source: mean of {', '.join(short[task] for task in made['source'])}. Target: "
        f"{', '.join(short[task] for task in made['target'])}. Mean: half of their sum.",
        "95 %, questions: had other questions been asked of these same models, pictures drawn whole; "
        "nothing about seeds. Of scores by Wilson, also at 0 and 100. A difference without ±: all questions "
        "moved alike. ± SD, seeds: between trainings that differ in the seed alone.",
        "Differences are paired question by question, each score averaged over seeds; p by Holm over the "
        "rows. Beyond chance: p below 0.05, and above 1.96 of the standard error that the seeds leave.",
        "Tower, loaded: millions of parameters up to the layer that is used; the others are not loaded. "
        "Memory: what each stage takes on a GPU as mmtune check estimates it, not measured. Answers/s: with "
        "loading.",
    ]
    if report["jobs"] > 1:
        found.append(f"Speeds are those of {report['jobs']} runs side by side.")
    if any(row["fit"] for row in report["rows"]):
        found.append(
            "R², tokens: how much of the base's image tokens the fitted connector gives before it is "
            "trained, on pictures that it was not fitted on."
        )
    if any(row["fit"] for row in report["rows"]) and not report["saved"]:
        found.append("Without train.probe in the first stage nothing is known of the steps that a fit saves.")
    if any(len(row["seeds"]) == 1 for row in report["rows"]):
        found.append("Without an SD: a single seed, so how far another seed would fall from it is unknown.")
    return found


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What is absent, and what makes a score another one."""
    found = [f"{tower} starts from scratch alone: {why}" for tower, why in report["no_fit"].items()]
    found += [f"{tower}: {said}" for tower, said in _unlike_speeds(report["rows"]).items()]
    if report["missing"]:
        found.append(f"not finished, so not in here: {', '.join(report['missing'])}")
    found += [
        f"{name}: {n} questions have no prediction and count as wrong"
        for name, n in report["unanswered"].items()
    ]
    if report["unlike"]:
        counts = "; ".join(f"{task} {counts}" for task, counts in report["unlike"].items())
        found.append(f"not the official data, so no score is comparable with published ones: {counts}")
    if report["made_with"]["limit"] is not None:
        found.append(f"only the first {report['made_with']['limit']} questions of each task were asked")
    return found


def _unlike_speeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Towers whose runs went at unlike paces, though their starts and seeds take the same work."""
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["tower"], []).extend(row["speeds"])
    return {
        tower: f"its alignments went at {min(speeds):.3g} to {max(speeds):.3g} samples/s, for the same work: "
        "the machine had other things to do, so speeds are not to be compared"
        for tower, speeds in of.items()
        if max(speeds) > UNLIKE * min(speeds)
    }


def _compared(pairs: Sequence[Mapping[str, Any]], title: str) -> Table:
    table = _table(title)
    table.add_column("", overflow="fold")
    table.add_column("less", overflow="fold")
    for heading in ("Source", "Target"):
        for column in (heading, "p", "± SE, seeds"):
            table.add_column(column, justify="right")
    for pair in pairs:
        table.add_row(Text(pair["a"], style="bold"), pair["b"], *compared_cells(pair))
    return table


def compared_cells(pair: Mapping[str, Any]) -> list[str]:
    """Difference, p and the seeds' standard error, of Source and of Target."""
    found = []
    for which in ("source", "target"):
        cell = pair[which]
        seeds = cell["stderr_seeds"]
        found += [difference(cell), p_value(cell["p_holm"]), "" if seeds is None else f"{seeds:.1f}"]
    return found


def _table(title: str) -> Table:
    style: Any = {"title_justify": "left", "title_style": "bold"}
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, **style)


def _add(table: Table, label: str, values: Sequence[float | None]) -> None:
    cells = ["" if value is None else f"{value:.1f}" for value in values]
    table.add_row(*[Text(cell, style="dim") for cell in (label, *cells)])


def write_swap_page(report: Mapping[str, Any], picture: Path, path: Path) -> None:
    """Writes the page, with the picture in it: nothing comes from the network, every text is escaped."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": points, "p_value": p_value}
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    text = environment.get_template(TEMPLATE).render(
        report=report,
        made=made,
        scored=[*([report["base"]] if report["base"] else []), *report["rows"]],
        headings=["Source", "Target", "Mean", *short.values()],
        cells=lambda row: cells_of(row, made),
        cost_headings=COSTS,
        costs=costs_of,
        compared=[(HEADINGS[which].format(**report), pairs) for which, pairs in report["compared"].items()],
        compared_cells=compared_cells,
        notes=notes(report),
        warnings=warnings(report),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        css=Markup((folder.parent / "evaluation" / "page.css").read_text(encoding="utf-8")),
    )
    write_text(path, text)
