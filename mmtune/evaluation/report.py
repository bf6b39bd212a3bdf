"""Forgetting against gain: report.json, a table for the terminal, and frontier.png."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.config import Source
from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, read_jsonl, replacing, write_json
from mmtune.evaluation.forgetting import (
    SUMMARIES,
    Answers,
    Evaluation,
    check_comparable,
    ci95,
    group_by_config,
    mean_sd,
    paired_drop,
    read_evaluation,
    retention,
    score_of,
    seed_mean,
    stderr_of_mean,
    summary,
)
from mmtune.evaluation.metrics.base import field

if TYPE_CHECKING:
    from mmtune.evaluation.protocol import Suite


def make_report(
    base: Path, runs: Sequence[Path], suite: Suite, split: str | None, output: Path
) -> dict[str, Any]:
    """Compares finished runs with their base on a suite; writes report.json and frontier.png to `output`.

    `base` and each run hold their evaluation under eval/SUITE-SPLIT (see Suite.folder). Raises UserError
    for evaluations that are missing (with the commands that make them) or cannot be compared, for runs that
    started from another model than the base, and for the same run twice.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"several runs of one name: {', '.join(twice)}", mend="Rename one of the folders.")
    _check_complete(base, runs, suite, split)
    place = suite.folder(split)
    baseline = read_evaluation(base / place, suite.tasks)
    evaluations = {
        name: read_evaluation(run / place, suite.tasks) for name, run in zip(names, runs, strict=True)
    }
    check_comparable(baseline, evaluations)
    configs = {name: _read_config(run) for name, run in zip(names, runs, strict=True)}
    trained = {name: read_json(run / "final" / "trained.json") for name, run in zip(names, runs, strict=True)}
    _check_models(baseline, evaluations, trained)
    hashes = {
        key: {name: field(trained[name], key, str, f"{name}/final/trained.json") for name in names}
        for key in ("config", "data")
    }
    rows = {name: _run_row(name, baseline, evaluations[name], suite) for name in names}
    for name, run in zip(names, runs, strict=True):
        rows[name] |= {"tuner": _language_tuner(configs[name]), "seed": configs[name]["seed"]}
        densities = _last_densities(run / "metrics.jsonl")
        rows[name] |= {"density": densities} if densities else {}
    groups = []
    for label, members in group_by_config(configs, hashes["data"]):
        for name in members:
            rows[name]["label"] = label
        answers = [evaluations[name].answers for name in members]
        groups.append(_group_row(label, [rows[name] for name in members], baseline, answers, suite))
    report = {
        "base": _model_row(_name_of(base), baseline, suite),
        "runs": list(rows.values()),
        "groups": groups,
        "warnings": _warnings(baseline, evaluations, trained),
        "files": {name: str(output / name) for name in ("report.json", "frontier.png")},
        "made_with": {
            "suite": suite.name,
            "split": split or "test",
            "splits": baseline.splits,
            "source": list(suite.source),
            "target": list(suite.target),
            **baseline.made_with,
            "protocols": baseline.protocols,
            "annotations": baseline.data,
            **hashes,
            "commit": {name: trained[name].get("commit") for name in names},
        },
    }
    write_json(output / "report.json", report)
    draw_frontier(report, output / "frontier.png")
    return report


def _check_complete(base: Path, runs: Sequence[Path], suite: Suite, split: str | None) -> None:
    faults = []
    place = suite.folder(split)
    for folder in (base, *runs):
        if folder is not base and not (folder / "final" / "trained.json").is_file():
            faults.append(
                Fault(
                    "this is no finished run: it has no final/trained.json",
                    str(folder),
                    "Give the run's folder, runs/NAME; mmtune train --resume finishes one.",
                )
            )
        elif not (folder / place / "results.json").is_file():
            model = folder / "final" if (folder / "final").is_dir() else folder
            command = f"mmtune eval --model {model} --suite {suite.name} --output_path {folder / place}"
            command += f" --split {split}" if split not in (None, "test") else ""
            what = f"there is no {place / 'results.json'}: it is not evaluated on suite {suite.name}"
            faults.append(Fault(what, str(folder), f"Run: {command}"))
    if faults:
        raise UserError.of(faults)


def _check_models(
    base: Evaluation, runs: Mapping[str, Evaluation], trained: Mapping[str, dict[str, Any]]
) -> None:
    """Raises UserError for a run that started from another model than the base, or has scores of another."""
    faults = []
    for name, run in runs.items():
        start, end = trained[name].get("base"), trained[name].get("model_hash")
        if start not in (None, base.model_hash):
            faults.append(
                Fault(
                    f"it started from model {start}, but the base is model {base.model_hash} ({base.model})",
                    name,
                    "Give --base the evaluation of the model that the run started from.",
                )
            )
        if end not in (None, run.model_hash):
            faults.append(
                Fault(
                    f"its final model is {end}, but {run.model_hash} ({run.model}) was evaluated",
                    name,
                    "Evaluate the run again.",
                )
            )
    if faults:
        raise UserError.of(faults)


def _name_of(base: Path) -> str:
    folder = base.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "run.yaml"
    config = Source(path).tree
    if not isinstance(config, dict):
        raise UserError("expected a mapping", where=path)
    return {"seed": 0, **config}


def _language_tuner(config: Mapping[str, Any]) -> str:
    """Of the last stage, where there are several."""
    last = config["stages"][-1] if config.get("stages") else config
    return str(last.get("tune", {}).get("language", {}).get("tuner", "frozen"))


def _last_densities(metrics: Path) -> dict[str, float]:
    if not metrics.is_file():
        return {}
    lines = [line for _, line in read_jsonl(metrics)]
    return {key: value for line in lines for key, value in line.items() if key.startswith("density")}


def _model_row(name: str, evaluation: Evaluation, suite: Suite) -> dict[str, Any]:
    scores = evaluation.scores
    row: dict[str, Any] = {"name": name, "scores": scores}
    row |= summary({task: scores[task]["score"] for task in scores}, suite.source, suite.target)
    for which, tasks in (("source", suite.source), ("target", suite.target)):
        stderr = stderr_of_mean([scores[task]["stderr"] for task in tasks])
        row |= {f"{which}_stderr": stderr, f"{which}_ci95": ci95(row[which], stderr)}
    return row


def _run_row(name: str, base: Evaluation, run: Evaluation, suite: Suite) -> dict[str, Any]:
    drops = {task: paired_drop(base.answers[task], run.answers[task], task) for task in suite.source}
    return _model_row(name, run, suite) | {
        "drop": {task: drop for task, (drop, _) in drops.items()},
        "drop_ci95": {task: ci95(*drop) for task, drop in drops.items()},
        "retention": {
            task: retention(base.scores[task]["score"], run.scores[task]["score"]) for task in suite.source
        },
    }


def _group_row(
    label: str,
    rows: Sequence[dict[str, Any]],
    base: Evaluation,
    answers: Sequence[Mapping[str, Answers]],
    suite: Suite,
) -> dict[str, Any]:
    """Mean and SD over seeds, and the 95 % interval that the questions leave to this mean."""
    mean = {task: seed_mean([each[task] for each in answers], task) for task in base.scores}
    group: dict[str, Any] = {
        "label": label,
        "tuner": rows[0]["tuner"],
        "runs": [row["name"] for row in rows],
        "seeds": [row["seed"] for row in rows],
    }
    group |= {key: mean_sd([row[key] for row in rows]) for key in SUMMARIES}
    for which, tasks in (("source", suite.source), ("target", suite.target)):
        stderr = stderr_of_mean([score_of(mean[task])[1] for task in tasks])
        group[which]["ci95"] = ci95(group[which]["mean"], stderr)
    group["drop"] = {
        task: {
            **mean_sd([row["drop"][task] for row in rows]),
            "ci95": ci95(*paired_drop(base.answers[task], mean[task], task)),
        }
        for task in suite.source
    }
    return group


def _warnings(
    base: Evaluation, runs: Mapping[str, Evaluation], trained: Mapping[str, dict[str, Any]]
) -> list[str]:
    warnings = [
        f"{name} started from no saved model as a whole, so the base cannot be checked"
        for name in runs
        if trained[name].get("base") is None
    ]
    if base.limit is not None:
        warnings.append(f"only the first {base.limit} questions of each task were asked")
    for name, evaluation in {"base": base, **runs}.items():
        for task, row in evaluation.scores.items():
            if row["missing"]:
                share = f"{row['missing']} of {row['n']}"
                warnings.append(f"{name}, {task}: {share} questions have no prediction and count as wrong")
        for key, value in evaluation.made_with.items():
            if value != base.made_with[key]:
                differs = _difference(value, base.made_with[key])
                warnings.append(f"{name} was evaluated with other {key} than the base: {differs}")
    return warnings


def _difference(its: Any, base: Any) -> str:
    if isinstance(its, dict) and isinstance(base, dict):
        keys = [key for key in {**its, **base} if its.get(key) != base.get(key)]
        return ", ".join(f"{key} {its.get(key)} instead of {base.get(key)}" for key in keys)
    return f"{its} instead of {base}"


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table of at most 100 columns, and below it how the scores were made."""
    made = report["made_with"]
    short = _short_names([*made["source"], *made["target"]])
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Gained and forgotten, suite {made['suite']}, {_splits(made, short)} (points)",
        title_justify="left",
        title_style="bold",
    )
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
    _add_intervals(table, "  ± 95 %, questions", [_half(base.get(f"{key}_ci95")) for key in columns])
    for group in report["groups"]:
        table.add_section()
        cells = [*(group[key] for key in columns), *(group["drop"][task] for task in made["source"])]
        table.add_row(
            Text(group["label"], style="bold"), *[Text(f"{cell['mean']:.1f}", style="bold") for cell in cells]
        )
        if len(group["seeds"]) > 1:
            _add_intervals(table, f"  ± SD, {len(group['seeds'])} seeds", [cell["sd"] for cell in cells])
        _add_intervals(table, "  ± 95 %, questions", [_half(cell.get("ci95")) for cell in cells])
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    console.print(table)
    for line in _notes(report, short):
        console.print(line)
    for warning in report["warnings"]:
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))
    console.print(Text("Written: " + ", ".join(report["files"].values())), soft_wrap=True)


def _splits(made: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """The split that was asked, or each task's own where they differ."""
    splits = made["splits"]
    if len(set(splits.values())) == 1:
        return f"split {next(iter(splits.values()))}"
    return "splits " + ", ".join(f"{short[task]} {split}" for task, split in splits.items())


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without the words that all of several begin with."""
    words = [name.split("_") for name in names]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    shared = min(len(list(same)), *(len(each) - 1 for each in words)) if len(names) > 1 else 0
    return {name: "_".join(name.split("_")[shared:]) for name in names}


def _half(interval: Sequence[float] | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / 2


def _add_intervals(table: Table, label: str, values: Sequence[float | None]) -> None:
    cells = ["" if value is None else f"{value:.1f}" for value in values]
    table.add_row(Text(label, style="dim"), *[Text(cell, style="dim") for cell in cells])


def _notes(report: dict[str, Any], short: Mapping[str, str]) -> list[Text]:
    made, base = report["made_with"], report["base"]
    by_rule: dict[str, list[str]] = {}
    for task in (*made["source"], *made["target"]):
        row = base["scores"][task]
        how = f"rule {row['rule']}, n={row['n']}"
        by_rule.setdefault(how, []).append(f"{short[task]} {row['score']:.1f}")
    scored = "; ".join(f"{', '.join(scores)} ({how})" for how, scores in by_rule.items())
    missing = sum(row["missing"] for model in (base, *report["runs"]) for row in model["scores"].values())
    notes = [
        f"Source: mean of {', '.join(short[task] for task in made['source'])}. "
        f"Target: {', '.join(short[task] for task in made['target'])}. "
        "Lost: points below the base, paired question by question.",
        "± 95 %, questions: had other questions been asked of these same models; nothing about seeds.",
    ]
    if any(len(group["seeds"]) > 1 for group in report["groups"]):
        notes.append("± SD, seeds: between trainings that differ in the seed alone; nothing about questions.")
    if any(len(group["seeds"]) == 1 for group in report["groups"]):
        notes.append("Without an SD: a single seed, so how far another seed would fall from it is unknown.")
    notes.append(f"Base: {scored}; predictions missing, all models: {missing}.")
    return [Text(note) for note in notes]


# Okabe and Ito's palette without black, which is the base's, and yellow, which is too pale on white;
# beside each colour a darker one of the same hue, for text.
COLOURS = (
    ("#0072B2", "#005D91"),
    ("#D55E00", "#A84A00"),
    ("#009E73", "#00694D"),
    ("#CC79A7", "#96437A"),
    ("#E69F00", "#825A00"),
    ("#56B4E9", "#1F6F9C"),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, PALE = "#222222", "#6b6b6b"
SMALLEST_SPAN = 8.0  # points; below it the axes would show noise as if it were a finding
Point = tuple[float, float]
DISTANCES = (9, 16, 26, 38, 52, 68, 86)  # of a label from its point
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Writes frontier.png: what each run kept (Source) against what it gained (Target)."""
    made, base, groups = report["made_with"], report["base"], report["groups"]
    figure = Figure(figsize=(7.5, 5.3), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(base["source"], color=PALE, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.axhline(base["target"], color=PALE, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.plot(base["source"], base["target"], "*", color=INK, markersize=14, zorder=4)
    points: list[Point] = [(base["source"], base["target"])]
    texts, bars = [("base", INK)], []
    short = _short_names([group["label"] for group in groups])
    for number, group in enumerate(groups):
        colour, dark = COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        several = len(group["seeds"]) > 1
        if several:
            mine = [row for row in report["runs"] if row["name"] in group["runs"]]
            at = [row["source"] for row in mine], [row["target"] for row in mine]
            axes.scatter(at[0], at[1], s=22, marker=marker, color=colour, alpha=0.4, linewidths=0, zorder=2)
        x, y = group["source"]["mean"], group["target"]["mean"]
        cells = (group["source"], group["target"])
        dx, dy = ((cell["sd"] if several else _half(cell["ci95"])) or 0.0 for cell in cells)
        axes.errorbar(x, y, xerr=dx, yerr=dy, color=colour, elinewidth=1.4, capsize=3, zorder=3)
        axes.plot(x, y, marker, color=colour, markersize=9, markeredgecolor="white", zorder=5)
        points.append((x, y))
        texts.append((short[group["label"]], dark))
        bars += [((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))]
    seeds = [(row["source"], row["target"]) for row in report["runs"]]
    _frame(axes, report, [*points, *seeds, *itertools.chain(*bars)])
    figure.suptitle(_title(made), x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_title(_legend(groups), loc="left", fontsize=8.5, color=PALE)
    canvas.draw()  # the labels' places depend on the final size of the axes
    figure.set_layout_engine("none")
    _place_labels(axes, points, texts, bars, seeds)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _title(made: Mapping[str, Any]) -> str:
    short = _short_names([*made["source"], *made["target"]])
    target, source = made["target"], made["source"]
    gained = short[target[0]] if len(target) == 1 else f"{_number(target)} target tasks"
    kept = short[source[0]] if len(source) == 1 else f"{_number(source)} source tasks"
    return f"What was gained on {gained} against what was kept of {kept}"


def _number(tasks: Sequence[str]) -> str:
    return NUMBERS[len(tasks)] if len(tasks) < len(NUMBERS) else str(len(tasks))


def _legend(groups: Sequence[dict[str, Any]]) -> str:
    lines = ["Further up and to the right is better."]
    if any(len(group["seeds"]) > 1 for group in groups):
        lines.append("Large: mean over seeds, bars ± SD between seeds. Small: single seeds.")
    if any(len(group["seeds"]) == 1 for group in groups):
        lines.append("One seed: bars are the 95 % interval of the questions, which says nothing about seeds.")
    return "\n".join(lines)


def _frame(axes: Axes, report: dict[str, Any], inside: Sequence[Point]) -> None:
    """Limits with everything `inside` them, and axis labels."""
    made = report["made_with"]
    axes.set_xlim(*_limits([x for x, _ in inside]))
    axes.set_ylim(*_limits([y for _, y in inside]))
    axes.set_xlabel(_axis_label("Source", made["source"], "upstream"), fontsize=10, color=INK)
    axes.set_ylabel(_axis_label("Target", made["target"], "target"), fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Some room on both sides, where labels go."""
    middle, span = (min(values) + max(values)) / 2, max(max(values) - min(values), SMALLEST_SPAN)
    return middle - 0.62 * span, middle + 0.62 * span


def _axis_label(name: str, tasks: Sequence[str], kind: str) -> str:
    if len(tasks) == 1:
        return f"{name}, {tasks[0]} (points)"
    return f"{name}, mean of {_number(tasks)} {kind} sets (points)"


def _place_labels(
    axes: Axes,
    points: Sequence[Point],
    texts: Sequence[tuple[str, str]],
    bars: Sequence[tuple[Point, Point]],
    seeds: Sequence[Point],
) -> None:
    """Says what the base's lines mean, and writes each text, in its colour, beside its point.

    The first point is the base. A label goes to the first place, on a widening ring, where it covers no
    marker, no bar and no other text, or else where it covers least; from afar a thin line leads back.
    """
    unit = axes.figure.dpi / 72  # pixels in a typographic point, in which labels are offset
    taken = [_box(axes, point, point, 6 * unit) for point in points]
    taken += [_box(axes, *bar, 3 * unit) for bar in bars]
    taken += [_box(axes, seed, seed, 3 * unit) for seed in seeds]
    source, target = points[0]
    _put(axes, _along_vertical(axes, source, "nothing forgotten"), taken)
    _put(axes, _along_horizontal(axes, target, "nothing gained"), taken)
    for point, (text, colour) in zip(points, texts, strict=True):
        label = _put(axes, _around(axes, point, text, colour), taken)
        right, up = label.xyann
        if max(abs(right), abs(up)) > DISTANCES[1]:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5}
            axes.annotate("", point, label.xyann, textcoords="offset points", arrowprops=line, zorder=3)


def _put(axes: Axes, candidates: Iterator[Annotation], taken: list[Bbox]) -> Annotation:
    """Keeps the first of the candidates that covers nothing, or the one that covers least."""
    tried: list[tuple[float, Annotation]] = []
    for label in candidates:
        extent = label.get_window_extent()
        outside = extent.width * extent.height - _overlap(extent, axes.bbox)
        tried.append((outside + sum(_overlap(extent, other) for other in taken), label))
        if tried[-1][0] == 0:
            break
    best = min(tried, key=lambda each: each[0])[1]
    for _, label in tried:
        if label is not best:
            label.remove()
    taken.append(best.get_window_extent())
    return best


def _around(axes: Axes, point: Point, text: str, colour: str) -> Iterator[Annotation]:
    for distance, (right, up) in itertools.product(DISTANCES, DIRECTIONS):
        yield axes.annotate(
            text,
            point,
            xytext=(distance * right, distance * up),
            textcoords="offset points",
            ha=("center", "left", "right")[right],
            va=("center", "bottom", "top")[up],
            fontsize=10,
            color=colour,
            zorder=6,
        )


def _along_vertical(axes: Axes, x: float, text: str) -> Iterator[Annotation]:
    for (y, va), (offset, ha) in itertools.product(
        ((0.99, "top"), *((share, "center") for share in (0.7, 0.5, 0.3)), (0.01, "bottom")),
        ((4, "left"), (-4, "right")),
    ):
        yield axes.annotate(
            text,
            (x, y),
            xycoords=("data", "axes fraction"),
            xytext=(offset, 0),
            textcoords="offset points",
            rotation=90,
            ha=ha,
            va=va,
            fontsize=8.5,
            color=PALE,
        )


def _along_horizontal(axes: Axes, y: float, text: str) -> Iterator[Annotation]:
    for (x, ha), (offset, va) in itertools.product(
        ((0.01, "left"), (0.5, "center"), (0.99, "right")), ((-4, "top"), (4, "bottom"))
    ):
        yield axes.annotate(
            text,
            (x, y),
            xycoords=("axes fraction", "data"),
            xytext=(0, offset),
            textcoords="offset points",
            ha=ha,
            va=va,
            fontsize=8.5,
            color=PALE,
        )


def _box(axes: Axes, low: Point, high: Point, margin: float) -> Bbox:
    """The pixels from one point of the data to another, and `margin` around them."""
    corners = axes.transData.transform([low, high])
    return Bbox(corners).padded(margin)


def _overlap(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else common.width * common.height
