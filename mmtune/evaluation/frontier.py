"""The picture of a report, what was kept against what was gained, as a PNG and as SVG for a page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from mmtune.core.files import replacing
from mmtune.evaluation.forgetting import half_width, short_names, unit_of

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
INK, PALE, PAPER = "#222222", "#6b6b6b", "#ffffff"
SMALLEST_SPAN = 8.0  # points; below it the axes would show noise as if it were a finding
MOST_NAMES = 8  # more groups are numbered, since their names would cover one another
MOST_NAMES_NARROW = 4
Point = tuple[float, float]
DISTANCES = (9, 16, 26, 38, 52, 68, 86)  # of a label from its point
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SETTINGS: Any = {"text.parse_math": False, "svg.fonttype": "none"}  # names are text, never formulas
KEY_ROWS = 24


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Writes frontier.png: what each run kept (Source) against what it gained (Target)."""
    groups = report["groups"]
    numbered = len(groups) > MOST_NAMES
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10.2 if numbered else 7.5, 5.3), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        title = fill(frontier_title(report), 68)  # characters; the picture takes some 75
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_title("\n".join(frontier_legend(report)), loc="left", fontsize=8.5, color=PALE)
        _draw(figure, report, numbered, key=numbered)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def frontier_svg(report: dict[str, Any], narrow: bool) -> str:
    """The same picture as an <svg> element for a page, as wide as a phone or as a column of text.

    Without title and key, which are the page's. Its text is text, its colours are the page's variables --ink,
    --pale, --paper, and --mark-0, --name-0 and so on, and each point tells its numbers in a <title>.
    """
    width = "narrow" if narrow else "wide"
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": width}):
        figure = Figure(figsize=(3.9, 4.2) if narrow else (7.5, 5.3), dpi=72, layout="constrained")
        figure.add_subplot()
        _draw(figure, report, is_numbered(report, narrow), key=False)
        written = io.BytesIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    titles = {f"group-{number}": point_title(group) for number, group in enumerate(report["groups"])}
    base = report["base"]
    titles["base"] = f"{base['name']}: source {base['source']:.1f}, target {base['target']:.1f}"
    return _inline(
        written.getvalue().decode(), titles, frontier_title(report), "narrow" if narrow else "wide"
    )


def is_numbered(report: dict[str, Any], narrow: bool) -> bool:
    """Whether the picture has the groups' numbers, from 1, in the place of their names."""
    return len(report["groups"]) > (MOST_NAMES_NARROW if narrow else MOST_NAMES)


def looks(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Each group's colour and marker, by their numbers; the groups of one series look the same."""
    kin = {label: one["labels"][0] for one in reversed(report["series"]) for label in one["labels"]}
    families = {head: number for number, head in enumerate(dict.fromkeys(reversed(kin.values())))}
    found = {}
    for group in report["groups"]:
        family = families.setdefault(kin.get(group["label"], group["label"]), len(families))
        found[group["label"]] = (
            family % len(COLOURS),
            (family + family // len(COLOURS)) % len(MARKERS),
        )
    return found


def point_title(group: Mapping[str, Any]) -> str:
    """A group in one line: its name, Source and Target with their SD, its seeds."""
    cells = {which: group[which] for which in ("source", "target")}
    said = [
        f"{which} {cell['mean']:.1f}" + ("" if cell["sd"] is None else f" ± {cell['sd']:.1f}")
        for which, cell in cells.items()
    ]
    seeds = len(group["seeds"])
    return f"{group['label']}: {', '.join(said)} ({seeds} seed{'s' if seeds > 1 else ''})"


def _draw(figure: Figure, report: dict[str, Any], numbered: bool, key: bool) -> None:
    base, groups = report["base"], report["groups"]
    canvas = FigureCanvasAgg(figure)
    (axes,) = figure.axes
    axes.axvline(base["source"], color=PALE, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.axhline(base["target"], color=PALE, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.plot(base["source"], base["target"], "*", color=INK, markersize=14, zorder=4, gid="base")
    points: list[Point] = [(base["source"], base["target"])]
    texts, bars, handles = [("base", INK)], [], []
    short, look = short_names([group["label"] for group in groups]), looks(report)
    for number, group in enumerate(groups):
        (colour, dark), marker = COLOURS[look[group["label"]][0]], MARKERS[look[group["label"]][1]]
        several = len(group["seeds"]) > 1
        if several and not numbered:
            mine = [row for row in report["runs"] if row["name"] in group["runs"]]
            at = [row["source"] for row in mine], [row["target"] for row in mine]
            axes.scatter(at[0], at[1], s=22, marker=marker, color=colour, alpha=0.4, linewidths=0, zorder=2)
        x, y = group["source"]["mean"], group["target"]["mean"]
        cells = (group["source"], group["target"])
        dx, dy = ((cell["sd"] if several else half_width(cell["ci95"])) or 0.0 for cell in cells)
        axes.errorbar(
            x,
            y,
            xerr=dx,
            yerr=dy,
            color=colour,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
            alpha=0.5 if numbered else 1,
        )
        (point,) = axes.plot(
            x, y, marker, color=colour, markersize=7 if numbered else 9, markeredgecolor=PAPER, zorder=5,
            linestyle="none", gid=f"group-{number}",
        )  # fmt: skip
        points.append((x, y))
        texts.append((str(number + 1) if numbered else short[group["label"]], dark))
        handles.append((point, f"{number + 1}  {short[group['label']]}"))
        bars += [((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))]
    place = dict(zip((group["label"] for group in groups), points[1:], strict=True))
    for one in report["series"]:
        colour = COLOURS[look[one["labels"][0]][0]][0]
        xs, ys = zip(*(place[label] for label in one["labels"]), strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.6, zorder=2)
    ways = [point for group in groups for point in _way(axes, report, group, look)]
    seeds = [] if numbered else [(row["source"], row["target"]) for row in report["runs"]]
    _frame(axes, report, [*points, *seeds, *ways, *itertools.chain(*bars)])
    if key:
        figure.legend(
            *zip(*handles, strict=True), loc="outside right center", frameon=False, fontsize=8.5,
            ncols=-(-len(handles) // KEY_ROWS), labelcolor=INK,
        )  # fmt: skip
    canvas.draw()  # the labels' places depend on the final size of the axes
    figure.set_layout_engine("none")
    _place_labels(axes, points, texts, bars, [*seeds, *ways])


def _way(
    axes: Axes, report: dict[str, Any], group: Mapping[str, Any], look: Mapping[str, tuple[int, int]]
) -> list[Point]:
    """Draws a thin line from the base through a group's scales to its own point; the points between."""
    between = [(one["source"]["mean"], one["target"]["mean"]) for one in group.get("scales", [])]
    if between:
        ends = [(report["base"]["source"], report["base"]["target"])]
        whole = (group["source"]["mean"], group["target"]["mean"])
        colour = COLOURS[look[group["label"]][0]][0]
        xs, ys = zip(*ends, *between, whole, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1, linestyle=":", zorder=2)
        axes.plot(xs[1:-1], ys[1:-1], ".", color=colour, markersize=5, zorder=2)
    return between


def _inline(svg: str, titles: Mapping[str, str], name: str, prefix: str) -> str:
    """matplotlib's SVG as part of a page: no metadata, ids of its own, the page's font and colours."""
    variables = {INK: "--ink", PALE: "--pale", PAPER: "--paper"}
    for number, (colour, dark) in enumerate(COLOURS):
        variables |= {colour: f"--mark-{number}", dark: f"--name-{number}"}
    drawn = ElementTree.fromstring(svg)
    for parent in list(drawn.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in drawn.iter():
        element.tag = element.tag.rpartition("}")[2]
        title = titles.get(element.get("id", ""))
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            value = re.sub(r"^#|(?<=url\(#)", lambda found: f"{found[0]}{prefix}-", value)
            if key == "style":
                value = re.sub(r"font-family:[^;]*;?", "", value)
                for colour, variable in variables.items():
                    value = value.replace(colour.lower(), f"var({variable})")
            element.set(key.rpartition("}")[2], f"{prefix}-{value}" if key == "id" else value)
        if title is not None:
            element.insert(0, ElementTree.Element("title"))
            element[0].text = title
    del drawn.attrib["width"], drawn.attrib["height"], drawn.attrib["version"]
    drawn.set("role", "img")
    drawn.set("aria-label", name)
    return ElementTree.tostring(drawn, encoding="unicode", short_empty_elements=False)


def frontier_title(report: dict[str, Any]) -> str:
    """What the picture shows, in words."""
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    target, source = made["target"], made["source"]
    gained = short[target[0]] if len(target) == 1 else f"{_number(target)} target tasks"
    kept = short[source[0]] if len(source) == 1 else f"{_number(source)} source tasks"
    return f"What was gained on {gained} against what was kept of {kept}"


def _number(tasks: Sequence[str]) -> str:
    return NUMBERS[len(tasks)] if len(tasks) < len(NUMBERS) else str(len(tasks))


def frontier_legend(report: dict[str, Any]) -> list[str]:
    """How to read the picture, in one or more lines."""
    groups = report["groups"]
    lines = ["Further up and to the right is better."]
    if any(len(group["seeds"]) > 1 for group in groups):
        small = "" if is_numbered(report, narrow=False) else " Small: single seeds."
        lines.append(f"Large: mean over seeds, bars ± SD between seeds.{small}")
    if any(len(group["seeds"]) == 1 for group in groups):
        lines.append("One seed: bars are the 95 % interval of the questions, which says nothing about seeds.")
    scales = sorted({one["scale"] for group in groups for one in group.get("scales", [])})
    if scales:
        at = ", ".join(f"{scale:g}" for scale in scales)
        lines.append(f"Dotted: the way from the base to a run; its dots are {at} of the way.")
    if report["series"]:
        keys = dict.fromkeys(one["key"] for one in report["series"])
        lines.append(f"Joined by a line: runs that differ in {', or in '.join(keys)}, alone.")
    return lines


def _frame(axes: Axes, report: dict[str, Any], inside: Sequence[Point]) -> None:
    """Limits with everything `inside` them, and axis labels."""
    made = report["made_with"]
    axes.set_xlim(*_limits([x for x, _ in inside]))
    axes.set_ylim(*_limits([y for _, y in inside]))
    units = [unit_of(report["base"]["scores"], made[part]) for part in ("source", "target")]
    axes.set_xlabel(_axis_label("Source", made["source"], "upstream", units[0]), fontsize=10, color=INK)
    axes.set_ylabel(_axis_label("Target", made["target"], "target", units[1]), fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Some room on both sides, where labels go."""
    middle, span = (min(values) + max(values)) / 2, max(max(values) - min(values), SMALLEST_SPAN)
    return middle - 0.62 * span, middle + 0.62 * span


def _axis_label(name: str, tasks: Sequence[str], kind: str, unit: str) -> str:
    if len(tasks) == 1:
        return f"{name}, {tasks[0]} ({unit})"
    return f"{name}, mean of {_number(tasks)} {kind} sets ({unit})"


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
    (left, right_end), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    taken.append(_box(axes, (source, bottom), (source, top), 1 * unit))
    taken.append(_box(axes, (left, target), (right_end, target), 1 * unit))
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
