"""A report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.evaluation.forgetting import half_width, short_names, units_note

HEADINGS = {
    "language_off": "language put back",
    "connector_restored": "connector put back",
    "vision_restored": "vision put back",
}


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table of at most 100 columns, and below it how the scores were made."""
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    table = _table(f"Gained and forgotten, suite {made['suite']}, {_splits(made, short)} (points)")
    table.add_column("", overflow="fold")
    for heading in ("Source", "Target", "Mean", "H-mean"):
        table.add_column(heading, justify="right", min_width=6)
    for task in made["source"]:
        table.add_column(f"lost on\n{short[task]}", justify="right", min_width=6, overflow="fold")
    columns = ("source", "target", "mean", "harmonic_mean")
    base = report["base"]
    table.add_row(
        Text(f"base: {base['name']}", style="bold"),
        *[Text(f"{base[key]:.1f}", style="bold") for key in columns],
        *["" for _ in made["source"]],
    )
    _add_intervals(table, "  ± 95 %, questions", [half_width(base.get(f"{key}_ci95")) for key in columns])
    for group in report["groups"]:
        table.add_section()
        cells = [*(group[key] for key in columns), *(group["drop"][task] for task in made["source"])]
        table.add_row(
            Text(group["label"], style="bold"), *[Text(f"{cell['mean']:.1f}", style="bold") for cell in cells]
        )
        if len(group["seeds"]) > 1:
            _add_intervals(table, f"  ± SD, {len(group['seeds'])} seeds", [cell["sd"] for cell in cells])
        _add_intervals(table, "  ± 95 %, questions", [half_width(cell.get("ci95")) for cell in cells])
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    console.print(table)
    if any("attribution" in group for group in report["groups"]):
        console.print(_attribution(report))
    if any("scales" in group for group in report["groups"]):
        console.print(_scales(report))
    console.print(_chance(report, short))
    if report["between"]["pairs"]:
        console.print(_between(report))
    console.print(_answers(report, short))
    for line in _notes(report, short):
        console.print(line)
    for warning in report["warnings"]:
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))
    console.print(Text("Written: " + ", ".join(report["files"].values())), soft_wrap=True)


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
    )


def _chance(report: dict[str, Any], short: Mapping[str, str]) -> Table:
    """p of the change from the base, and the smallest change that would have been found."""
    made = report["made_with"]
    table = _table("Could it be chance? p of the change from the base, over the questions")
    table.add_column("", overflow="fold")
    for heading in ("Source", "Target", *(short[task] for task in made["source"])):
        table.add_column(heading, justify="right", min_width=6, overflow="fold")
    for group in report["groups"]:
        change = group["change"]
        cells = [change["source"], change["target"], *(change["tasks"][task] for task in made["source"])]
        table.add_section()
        table.add_row(
            Text(group["label"], style="bold"), *[p_value(cell.get("p_holm", cell["p"])) for cell in cells]
        )
        _add_intervals(table, "  seen from, points", [cell["detectable"] for cell in cells])
    return table


def _between(report: dict[str, Any]) -> Table:
    """Each method's Source and Target less those of the best."""
    best = report["between"]["best"]
    table = _table(
        f"Against {best}: difference ± 95 %, questions. It is the best by Mean here, so its lead is flattered"
    )
    table.add_column("", overflow="fold")
    pairs = [pair for pair in report["between"]["pairs"] if pair["b"] == best]
    several = any(pair["source"]["stderr_seeds"] is not None for pair in pairs)
    for heading in ("Source", "Target"):
        for column in (heading, "p", *(["± SE, seeds"] if several else [])):
            table.add_column(column, justify="right", min_width=6)
    for pair in pairs:
        cells = []
        for which in ("source", "target"):
            half, seeds = half_width(pair[which]["ci95"]), pair[which]["stderr_seeds"]
            cells.append(f"{pair[which]['difference']:+.1f}" + ("" if half is None else f" ± {half:.1f}"))
            cells.append(p_value(pair[which]["p_holm"]))
            cells += [] if not several else ["" if seeds is None else f"{seeds:.1f}"]
        table.add_row(Text(pair["a"], style="bold"), *cells)
    return table


def p_value(p: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _attribution(report: dict[str, Any]) -> Table:
    """Source / Target of the whole model and with each part put back."""
    groups = report["groups"]
    table = _table("Where it sits: Source / Target, whole and with one part put back as in the base")
    variants = [name for name in HEADINGS if any(name in group.get("attribution", {}) for group in groups)]
    table.add_column("", overflow="fold")
    for heading in ("whole", *(HEADINGS[name] for name in variants)):
        table.add_column(heading, justify="right")
    for group in groups:
        cells = [group, *(group.get("attribution", {}).get(name) for name in variants)]
        pairs = [(cell["source"], cell["target"]) if cell else () for cell in cells]
        means = [" / ".join(f"{each['mean']:.1f}" for each in pair) for pair in pairs]
        table.add_row(Text(group["label"], style="bold"), *means)
        if len(group["seeds"]) > 1:
            deviations = [" / ".join(f"{each['sd']:.1f}" for each in pair) for pair in pairs]
            label = f"  ± SD, {len(group['seeds'])} seeds"
            table.add_row(*[Text(text, style="dim") for text in (label, *deviations)])
    return table


def _scales(report: dict[str, Any]) -> Table:
    """Source / Target on the way from the base to the whole model."""
    groups = [group for group in report["groups"] if "scales" in group]
    table = _table("Part of the way: Source / Target with every change times a scale (0: the base, 1: whole)")
    table.add_column("", overflow="fold")
    scales = sorted({one["scale"] for group in groups for one in group["scales"]})
    for scale in scales:
        table.add_column(f"{scale:g}", justify="right")
    for group in groups:
        at = {one["scale"]: one for one in group["scales"]}
        cells = [
            f"{at[s]['source']['mean']:.1f} / {at[s]['target']['mean']:.1f}" if s in at else ""
            for s in scales
        ]
        table.add_row(Text(group["label"], style="bold"), *cells)
    return table


def _answers(report: dict[str, Any], short: Mapping[str, str]) -> Table:
    """What became of the answers to the source tasks, beside their score."""
    source = report["made_with"]["source"]
    table = _table("Answers to the source tasks")
    table.add_column("", overflow="fold")
    for task in source:
        table.add_column(short[task], justify="right", min_width=6, overflow="fold")
    for group in report["groups"]:
        forms = [group["format"][task] for task in source]
        turned = [
            [group["flips"][task][key]["mean"] for key in ("right_to_wrong", "wrong_to_right")]
            for task in source
        ]
        table.add_section()
        table.add_row(Text(group["label"], style="bold"))
        parts = [group["lost"].get(task) for task in source]
        for part in ("knowledge", "format"):
            cells = ["-" if its is None else f"{its[part]['mean']:.1f}" for its in parts]
            table.add_row(f"  lost: {part}, points", *cells)
        if group["kl"]:
            moved = [group["kl"].get(task) for task in source]
            cells = ["-" if its is None else f"{its['mean']:.3f}" for its in moved]
            table.add_row("  KL to the base, nats per token", *cells)
        table.add_row("  in the target's form, %", *[f"{form['off_format']['mean']:.1f}" for form in forms])
        table.add_row("  new, %", *[f"{form['new']['mean']:.1f}" for form in forms])
        kept = [group["retention"][task] for task in source]
        table.add_row(
            "  of the base's score, %", *["" if k is None else f"{100 * k['mean']:.1f}" for k in kept]
        )
        cells = [
            f"{lost:.0f} / {won:.0f}" if report["base"]["scores"][task]["unit"] == "%" else "-"
            for task, (lost, won) in zip(source, turned, strict=True)
        ]
        table.add_row("  questions lost / won", *cells)
    return table


def _splits(made: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """The split that was asked, or each task's own where they differ."""
    splits = made["splits"]
    if len(set(splits.values())) == 1:
        return f"split {next(iter(splits.values()))}"
    return "splits " + ", ".join(f"{short[task]} {split}" for task, split in splits.items())


def _add_intervals(table: Table, label: str, values: Sequence[float | None]) -> None:
    cells = ["" if value is None else f"{value:.1f}" for value in values]
    table.add_row(Text(label, style="dim"), *[Text(cell, style="dim") for cell in cells])


def _notes(report: dict[str, Any], short: Mapping[str, str]) -> list[Text]:
    made, base = report["made_with"], report["base"]
    by_rule: dict[str, list[str]] = {}
    for task in (*made["source"], *made["target"]):
        row = base["scores"][task]
        how = f"rule {row['rule']}, n={row['n']}" + (f", {row['unit']}" if row["unit"] != "%" else "")
        by_rule.setdefault(how, []).append(f"{short[task]} {row['score']:.1f}")
    scored = "; ".join(f"{', '.join(scores)} ({how})" for how, scores in by_rule.items())
    missing = sum(row["missing"] for model in (base, *report["runs"]) for row in model["scores"].values())
    notes = [
        f"Source: mean of {', '.join(short[task] for task in made['source'])}. "
        f"Target: {', '.join(short[task] for task in made['target'])}. "
        "Lost: points below the base, paired question by question.",
        "± 95 %, questions: had other questions been asked of these same models; nothing about seeds.",
    ]
    tests = {its["test"] for group in report["groups"] for its in group["change"]["tasks"].values()}
    notes.append(
        f"p: {'; '.join(sorted(tests))}; of Source and Target by the pictures of all their sets together. "
        "Adjusted by Holm: over the source sets, over the target sets, over the methods. Seen from: a true "
        "change of this size is found (p < 0.05 before Holm) four times in five. All of it is about these "
        "very models, their scores averaged over seeds; nothing about seeds."
    )
    units = units_note(base["scores"], made["source"], made["target"])
    notes += [units] if units else []
    notes.append(
        "Lost, knowledge: what a lenient reader misses too; format: what he regains, the rest of the drop "
        "(-: no lenient score, as of captions)."
    )
    notes.append(
        "New: answers that neither base nor annotations give to any question of that task. In the target's "
        "form: those of them that the run gives, rightly, to the target. Lost / won: against the base."
    )
    if any(len(group["seeds"]) > 1 for group in report["groups"]):
        notes.append("± SD, seeds: between trainings that differ in the seed alone; nothing about questions.")
    if any(len(group["seeds"]) == 1 for group in report["groups"]):
        notes.append("Without an SD: a single seed, so how far another seed would fall from it is unknown.")
    notes.append(f"Base: {scored}; predictions missing, all models: {missing}.")
    return [Text(note) for note in notes]
