"""The picture of a report: what was kept against what was gained."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mmtune.core.files import replacing
from mmtune.evaluation.forgetting import half_width, short_names

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
    short = short_names([group["label"] for group in groups])
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
        dx, dy = ((cell["sd"] if several else half_width(cell["ci95"])) or 0.0 for cell in cells)
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
    short = short_names([*made["source"], *made["target"]])
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
