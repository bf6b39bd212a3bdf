"""What adapters did to the weights, as a picture: where they are large, where they fall, what they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtune.core.files import replacing
from mmtune.evaluation.analyse import kinds, layer_and_pattern
from mmtune.evaluation.frontier import COLOURS, INK, PALE, SETTINGS

ACROSS = 4  # maps in a row
MOST_NUMBERS = 40  # cells of a map, above which they are colours alone
SMALLEST_SPAN = 0.3  # of chance; below it the bars would show noise as if it were a finding
SIZE, SMALL = 9, 8  # of letters, in points


def draw_analysis(analysis: Mapping[str, Any], path: Path) -> None:
    """Writes analysis.png: a map of each adapter over layers and kinds of modules, and two panels below."""
    adapters = analysis["adapters"]
    across = min(ACROSS, len(adapters))
    down = math.ceil(len(adapters) / across)
    layers = max(len(_layers(adapter)) for adapter in adapters)
    tall = min(5.5, max(1.6, 0.26 * layers))
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(
            figsize=(8 if len(adapters) == 1 else 11, 3.9 + down * (tall + 0.9)),
            dpi=140,
            layout="constrained",
        )
        halves: Any = figure.subfigures(2, 1, height_ratios=[down * (tall + 0.9), 3.9])
        above, below = halves
        _maps(above, adapters, across, down)
        left, right = below.subplots(1, 2, width_ratios=[1.5, 1])
        _on_large(left, analysis)
        if len(analysis["pairs"]) > 1:
            _in_common(right, analysis)
        elif analysis["pairs"]:
            _two(right, analysis["pairs"][0]["all"])
        else:
            _densities(right, adapters[0])
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _maps(figure: Any, adapters: Sequence[Mapping[str, Any]], across: int, down: int) -> None:
    key = "relative" if all(adapter["all"]["relative"] is not None for adapter in adapters) else "norm"
    grids = [_grid(adapter, key) for adapter in adapters]
    largest = max(float(np.nanmax(grid)) for grid in grids) or 1.0
    of = "the update's norm, % of the weight's" if key == "relative" else "the update's norm"
    unit = 100 if key == "relative" else 1
    figure.suptitle(f"How large: {of}", x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    panels = figure.subplots(down, across, squeeze=False)
    colours = matplotlib.colormaps["YlGnBu"].with_extremes(bad="#f2f2f2")
    image = None
    for place, axes in enumerate(panels.flat):
        if place >= len(adapters):
            axes.set_axis_off()
            continue
        adapter, grid = adapters[place], grids[place]
        image = axes.imshow(unit * grid, cmap=colours, vmin=0, vmax=unit * largest, aspect="auto")
        whole = f"{unit * adapter['all'][key]:.3g}{' %' if key == 'relative' else ''} over all"
        axes.set_title(f"{adapter['name']}: {whole}", loc="left", fontsize=SIZE, color=INK)
        _label_map(axes, adapter, place % across == 0)
        if grid.size <= MOST_NUMBERS:
            _write_cells(axes, unit * grid, unit * largest, "{:.1f}" if key == "relative" else "{:.2g}")
    if image is not None and grids[0].size > MOST_NUMBERS:
        bar = figure.colorbar(image, ax=panels, shrink=0.8, aspect=30, pad=0.01)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=SMALL, colors=INK, length=0)


def _label_map(axes: Axes, adapter: Mapping[str, Any], first: bool) -> None:
    layers, columns = _layers(adapter), list(adapter["kinds"])
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_yticks(range(0, len(layers), step), ["-" if n is None else str(n) for n in layers[::step]])
    if first:
        axes.set_ylabel("layer", fontsize=SIZE, color=INK)
    _plain(axes)


def _layers(adapter: Mapping[str, Any]) -> list[int | None]:
    """The numbers of its layers, and None at the end where a module stands outside of them."""
    found = {layer_and_pattern(module)[0] for module in adapter["modules"]}
    return sorted(found, key=lambda number: (number is None, number))


def _grid(adapter: Mapping[str, Any], key: str) -> np.ndarray:
    """A figure of each module [layers, kinds]; NaN where there is none."""
    layers, columns, kind = _layers(adapter), list(adapter["kinds"]), kinds(adapter["modules"])
    grid = np.full((len(layers), len(columns)), np.nan)
    for module, row in adapter["modules"].items():
        grid[layers.index(layer_and_pattern(module)[0]), columns.index(kind[module])] = row[key]
    return grid


def _on_large(axes: Axes, analysis: Mapping[str, Any]) -> None:
    """Bars of the share of each adapter's update on the largest weights, by kind, about what chance gives."""
    adapters = [adapter for adapter in analysis["adapters"] if adapter["all"]["on_large"] is not None]
    chance = 100 * analysis["large"]
    _title(axes, f"Where it falls: % of the update on the {chance:.0f} % largest weights")
    if not adapters:
        axes.text(0.5, 0.5, "the weights are not at hand", ha="center", color=PALE, fontsize=SIZE)
        axes.set_axis_off()
        return
    columns = list(dict.fromkeys(kind for adapter in adapters for kind in adapter["kinds"]))
    width = 0.8 / len(adapters)
    span = SMALLEST_SPAN * chance
    for number, adapter in enumerate(adapters):
        rows = {**adapter["kinds"], "all": adapter["all"]}
        shares = [rows.get(kind, {}).get("on_large") for kind in (*columns, "all")]
        heights = [0.0 if share is None else 100 * share - chance for share in shares]
        at = [place + (number - (len(adapters) - 1) / 2) * width for place in range(len(columns) + 1)]
        colour = COLOURS[number % len(COLOURS)][0]
        # From the line of chance, up or down: that is what there is to be seen.
        axes.bar(
            at, heights, 0.92 * width, chance, color=colour, label=adapter["name"]
        )  # fmt: skip
        span = max(span, *map(abs, heights))
    axes.set_ylim(chance - 1.25 * span, chance + 1.25 * span)
    axes.axhline(chance, color=INK, linewidth=1)
    axes.text(
        1.005, chance, "chance", transform=axes.get_yaxis_transform(), fontsize=SMALL, color=INK, va="center"
    )
    axes.axvline(len(columns) - 0.5, color=PALE, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_xticks(
        range(len(columns) + 1), [*columns, "all"], rotation=35, ha="right", rotation_mode="anchor"
    )
    axes.set_xlim(-0.6, len(columns) + 0.6)
    _plain(axes)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, ncols=min(4, len(adapters)), loc="upper left")


def _in_common(axes: Axes, analysis: Mapping[str, Any]) -> None:
    """Overlap of the supports of B A below the diagonal, cosine of the updates above it."""
    names = [adapter["name"] for adapter in analysis["adapters"]]
    _title(axes, "What they share")
    overlaps, cosines = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    for pair in analysis["pairs"]:
        i, j = sorted((names.index(pair["a"]), names.index(pair["b"])))
        found, cosine = pair["all"]["ba"], pair["all"]["cosine"]
        if found and found["jaccard"] is not None and found["chance"] < 1:
            # Of what there is to gain above chance: two dense adapters have all in common and say nothing.
            overlaps[j, i] = (found["jaccard"] - found["chance"]) / (1 - found["chance"])
        cosines[i, j] = np.nan if cosine is None else cosine
        said = (
            "dense"
            if not found or found["chance"] == 1
            else (f"{100 * found['jaccard']:.0f} %\nchance {100 * found['chance']:.0f}")
        )
        dark = not math.isnan(overlaps[j, i]) and overlaps[j, i] > 0.55
        axes.text(i, j, said, ha="center", va="center", fontsize=SMALL, color="white" if dark else INK)
        dark = cosine is not None and abs(cosine) > 0.55
        axes.text(
            j, i, "-" if cosine is None else f"{cosine:.2f}", ha="center", va="center", fontsize=SMALL,
            color="white" if dark else INK,
        )  # fmt: skip
    axes.imshow(
        np.clip(overlaps, 0, 1),
        cmap=matplotlib.colormaps["Oranges"].with_extremes(bad=(1, 1, 1, 0)),
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    axes.imshow(
        np.abs(cosines),
        cmap=matplotlib.colormaps["Blues"].with_extremes(bad=(1, 1, 1, 0)),
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("above: cosine of the updates; below: overlap of supports", fontsize=SMALL, color=PALE)
    _plain(axes)


def _two(axes: Axes, pair: Mapping[str, Any]) -> None:
    """The overlaps of two adapters' supports, each beside what chance gives."""
    rows = {"A": pair["a"], "B": pair["b"], "B A": pair["ba"]}
    known = {name: found for name, found in rows.items() if found and found["jaccard"] is not None}
    cosine = "" if pair["cosine"] is None else f"; cosine {pair['cosine']:.2f}"
    _title(axes, f"What they share (%){cosine}")
    for offset, key, colour in ((-0.19, "jaccard", COLOURS[0][0]), (0.19, "chance", "#b8b8b8")):
        values = [100 * found[key] for found in known.values()]
        at = [place + offset for place in range(len(known))]
        label = "found" if key == "jaccard" else "by chance, at these densities"
        bars = axes.barh(at, values, 0.34, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=SMALL, color=INK)
    axes.set_yticks(range(len(known)), list(known))
    axes.set_xlim(0, 112)
    axes.set_ylim(len(known) - 0.4, -0.9)
    _plain(axes)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, ncols=2, loc="upper left")


def _densities(axes: Axes, adapter: Mapping[str, Any]) -> None:
    """The densities of one adapter's A, B and product, beside what independence predicts for it."""
    _title(axes, "How dense (%)")
    rows = {"A": "density_a", "B": "density_b", "B A": "density_ba", "B A, predicted": "density_ba_expected"}
    values = [100 * adapter["all"][key] for key in rows.values()]
    bars = axes.barh(list(rows), values, 0.6, color=[COLOURS[0][0]] * 3 + ["#b8b8b8"])
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=SMALL, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    _plain(axes)


def _write_cells(axes: Axes, grid: np.ndarray, largest: float, form: str) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            colour = "white" if value > 0.6 * largest else INK
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=SMALL, color=colour)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=SMALL, colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
