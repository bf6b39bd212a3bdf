"""The picture of a swap: each tower's scores with their intervals, and its alignments from both starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mmtune.core.files import replacing
from mmtune.evaluation.forgetting import short_names
from mmtune.evaluation.frontier import COLOURS, INK, PALE, SETTINGS
from mmtune.experiments.swap_options import FITTED, SCRATCH

STARTS: dict[str, tuple[str, str]] = {SCRATCH: (COLOURS[0][0], "o"), FITTED: (COLOURS[1][0], "D")}
ACROSS = 4  # panels in a row
ROW, PANEL = 0.26, 2.0  # inches: of a tower in a panel of scores, of a panel of curves


def draw_swap(report: Mapping[str, Any], path: Path) -> None:
    """Writes swap.png. Above: Source, Target and each set, a row for each tower; below: its alignments."""
    made = report["made_with"]
    towers = list(dict.fromkeys(row["tower"] for row in report["rows"]))
    starts = list(dict.fromkeys(row["start"] for row in report["rows"]))
    panels = ["source", "target", *made["source"], *made["target"]]
    curved = [tower for tower in towers if any(_curves(report, tower).values())]
    score_rows, curve_rows = (math.ceil(len(each) / ACROSS) for each in (panels, curved))
    one = ROW * max(3, len(towers)) + 0.75
    heights = [score_rows * one + 0.7, curve_rows * PANEL + 0.5] if curved else [score_rows * one + 0.7]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11, sum(heights)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_scores(parts[0], report, panels, towers, starts)
        if curved:
            _draw_curves(parts[1], report, curved)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_scores(
    part: SubFigure,
    report: Mapping[str, Any],
    panels: Sequence[str],
    towers: Sequence[str],
    starts: Sequence[str],
) -> None:
    made = report["made_with"]
    short = short_names([*made["source"], *made["target"]])
    names = {"source": "Source", "target": "Target", **short}
    part.suptitle(
        f"{report['name']}: score of each tower, suite {made['suite']}; bars: 95 %, questions",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    rows = math.ceil(len(panels) / ACROSS)
    grid = part.subplots(rows, ACROSS, sharey=True, squeeze=False)
    shift = {start: (i - (len(starts) - 1) / 2) * 0.32 for i, start in enumerate(starts)}
    alone = [tower for tower in towers if sum(row["tower"] == tower for row in report["rows"]) == 1]
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        which = panels[place]
        _plain(axes)
        axes.set_title(
            names[which], loc="left", fontsize=9, color=INK, fontweight="bold" if place < 2 else None
        )
        if report["base"]:
            axes.axvline(_cell(report["base"], which)["mean"], color=INK, lw=1, ls=(0, (3, 2)), zorder=1)
        for row in report["rows"]:
            cell, y = _cell(row, which), float(towers.index(row["tower"]))
            y += 0 if row["tower"] in alone else shift[row["start"]]
            colour, marker = STARTS[row["start"]]
            if cell["ci95"]:
                axes.plot(cell["ci95"], [y, y], color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
            axes.plot(cell["mean"], y, marker, color=colour, ms=4.5, zorder=3, clip_on=False)
        axes.set_ylim(len(towers) - 0.4, -0.6)
        low, high = axes.get_xlim()
        low = min(low, high - 10) if low > 50 else low  # sets where all are right are not blown up
        units = {cell["unit"] for cell in report["rows"][0]["scores"].values()}
        axes.set_xlim(max(0, low), high if units != {"%"} else min(100, high))
        axes.set_xlabel("points", fontsize=8, color=PALE, labelpad=1)
        axes.set_yticks(range(len(towers)), towers, fontsize=8.5)
        axes.grid(axis="x", color="#e4e4e4", lw=0.6, zorder=0)
    said: list[str] = list(starts)
    handles = [Line2D([], [], color=STARTS[s][0], marker=STARTS[s][1], ms=4.5, lw=1.6) for s in starts]
    if report["base"]:
        handles.append(Line2D([], [], color=INK, lw=1, ls=(0, (3, 2))))
        said.append("base")
    part.legend(handles, said, loc="upper right", ncols=len(said), fontsize=8.5, frameon=False)


def _draw_curves(part: SubFigure, report: Mapping[str, Any], towers: Sequence[str]) -> None:
    part.suptitle(
        "Alignment: loss of the probe by step", x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK
    )
    rows = math.ceil(len(towers) / ACROSS)
    grid = part.subplots(rows, ACROSS, sharex=True, sharey=True, squeeze=False)
    every = [loss for row in report["rows"] for curve in row["curves"] for _, loss in curve]
    locator = LogLocator(subs=(1, 2, 5)) if max(every) > 4 * min(every) else MaxNLocator(4)
    for place, axes in enumerate(grid.flat):
        if place >= len(towers):
            axes.set_axis_off()
            continue
        _plain(axes)
        axes.set_title(towers[place], loc="left", fontsize=9, color=INK)
        lowest = place + ACROSS >= len(towers)
        axes.tick_params(labelbottom=lowest)
        if lowest:
            axes.set_xlabel("step", fontsize=8, color=PALE, labelpad=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(color="#e4e4e4", lw=0.6, which="major")
        for start, curves in _curves(report, towers[place]).items():
            for curve in curves:
                steps, losses = zip(*curve, strict=True)
                axes.plot(steps, losses, color=STARTS[start][0], lw=0.8, alpha=0.35 if len(curves) > 1 else 1)
            if len(curves) > 1 and len({tuple(s for s, _ in curve) for curve in curves}) == 1:
                means = [fmean(losses) for losses in zip(*([v for _, v in c] for c in curves), strict=True)]
                axes.plot([step for step, _ in curves[0]], means, color=STARTS[start][0], lw=1.8)


def _curves(report: Mapping[str, Any], tower: str) -> dict[str, list[Any]]:
    return {
        row["start"]: [curve for curve in row["curves"] if curve]
        for row in report["rows"]
        if row["tower"] == tower
    }


def _cell(row: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    return row[which] if which in row else row["scores"][which]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(labelsize=8, colors=PALE, length=2)
