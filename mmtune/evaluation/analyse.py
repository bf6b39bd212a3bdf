"""What an adapter did to the weights: how dense, how large, where it falls, and what several have in common.

Each matrix is looked at in tiles of rows, so nothing but one weight of the model is held at a time, and the
model itself is never put together.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.versions import versions
from mmtune.parts.adapters import Pair, SavedAdapter, named_apart, read_adapter
from mmtune.tuning.sculpt import expected_product_density

LARGE = 0.1  # of the entries of W, the largest by magnitude
TILE_ENTRIES = 1 << 20


def analyse(folders: Sequence[Path], base: Path | None = None) -> dict[str, Any]:
    """What analysis.json holds: `adapters`, each with its figures over `all`, by `kinds` of modules
    and of its `modules`, and `pairs`, what each two have in common.

    folders: runs, model folders or peft's. base: the frozen weights, instead of those that each names.
    Densities and shares are fractions. Raises UserError.
    """
    adapters = [read_adapter(folder, base) for folder in folders]
    named_apart(adapters)
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))
    rows: dict[str, dict[str, dict[str, Any]]] = {adapter.name: {} for adapter in adapters}
    both: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for module in sorted(modules, key=_natural):
        mine = [adapter for adapter in adapters if module in adapter.modules]
        updates = {adapter.name: _Update(adapter.pair(module)) for adapter in mine}
        for adapter in mine:
            rows[adapter.name][module] = _figures(updates[adapter.name], adapter.weight(module))
        for pair in itertools.combinations(updates, 2):
            one, other = (updates[name] for name in pair)
            if one.shape == other.shape:
                both.setdefault(pair, {})[module] = _overlap(one, other)
    return {
        "adapters": [
            {
                "name": adapter.name,
                "folder": str(adapter.folder),
                "bases": adapter.bases(),
                "left_out": adapter.left_out,
                "all": over(rows[adapter.name].values()),
                "kinds": _by_kind(rows[adapter.name]),
                "modules": rows[adapter.name],
            }
            for adapter in adapters
        ],
        "pairs": [
            {"a": a, "b": b, "all": over_pairs(shared.values()), "modules": shared}
            for (a, b), shared in both.items()
        ],
        "large": LARGE,
        "warnings": _warnings(adapters, both),
        "environment": versions(),
    }


class _Update:
    """scale * B A [p, q], and where A and B are not zero."""

    def __init__(self, pair: Pair) -> None:
        self.a, self.b, self.scale = pair.a, pair.b, pair.scale
        self.shape = (self.b.shape[0], self.a.shape[1])
        self.in_a, self.in_b = self.a != 0, self.b != 0
        self.dense = bool(self.in_a.all() and self.in_b.all())

    def rows(self, rows: slice) -> torch.Tensor:
        return self.scale * (self.b[rows] @ self.a)

    def support(self, rows: slice) -> torch.Tensor:
        """The support of some rows of B A: an entry is in it where any of its r products is."""
        if self.dense:
            return torch.ones(len(self.b[rows]), self.shape[1], dtype=torch.bool)
        return self.in_b[rows].float() @ self.in_a.float() > 0

    def singular_values(self) -> torch.Tensor:
        """Its at most r singular values, fp64, from the triangles of B and A."""
        triangles = [torch.linalg.qr(half.double(), mode="r").R for half in (self.b, self.a.T)]
        return abs(self.scale) * torch.linalg.svdvals(triangles[0] @ triangles[1].T)

    def dot(self, other: _Update) -> float:
        """<this, other>, over all entries, from products of r x r."""
        left = self.b.double().T @ other.b.double()
        right = self.a.double() @ other.a.double().T
        return self.scale * other.scale * float((left * right).sum())


def _figures(update: _Update, weight: torch.Tensor | None) -> dict[str, Any]:
    rank, densities = len(update.a), [_density(update.in_a), _density(update.in_b)]
    values = update.singular_values()
    norm = math.sqrt(float(values.square().sum()))
    large = None if weight is None else largest_entries(weight, LARGE)
    entries, in_support, on_large, of_weight = math.prod(update.shape), 0, 0.0, 0.0
    for rows in _tiles(update.shape):
        in_support += int(update.support(rows).count_nonzero())
        if weight is not None and large is not None:
            square = update.rows(rows).square_()
            magnitude = weight[rows].float().abs_()
            of_weight += float(torch.linalg.vector_norm(magnitude, dtype=torch.float64)) ** 2
            above, tied = magnitude > large.bound, magnitude == large.bound
            on_large += float((square * above).sum(dtype=torch.float64))
            on_large += large.share_of_ties * float((square * tied).sum(dtype=torch.float64))
    return {
        "shape": list(update.shape),
        "rank": rank,
        "density_a": densities[0],
        "density_b": densities[1],
        "density_ba": in_support / entries,
        "density_ba_expected": expected_product_density(densities[0], densities[1], rank),
        "norm": norm,
        "weight_norm": None if weight is None else math.sqrt(of_weight),
        "relative": None if weight is None else _ratio(norm, math.sqrt(of_weight)),
        "on_large": None if weight is None else _ratio(on_large, norm**2),
        "spectral_norm": float(values[0]),
        "effective_rank": effective_rank(values),
    }


def _overlap(one: _Update, other: _Update) -> dict[str, Any]:
    """What two updates of a weight have in common: sizes of supports, dot product and norms."""
    same_rank = one.a.shape == other.a.shape
    norms = [math.sqrt(max(update.dot(update), 0.0)) for update in (one, other)]
    dot = one.dot(other)
    return {
        "a": _common([(one.in_a, other.in_a)]) if same_rank else None,
        "b": _common([(one.in_b, other.in_b)]) if same_rank else None,
        "ba": _common((one.support(rows), other.support(rows)) for rows in _tiles(one.shape)),
        "dot": dot,
        "norms": norms,
        "cosine": _ratio(dot, math.prod(norms)),
    }


@dataclass(frozen=True)
class LargeEntries:
    """Those of magnitude above `bound`, and of those that equal it a share, so that k are meant exactly."""

    bound: float
    share_of_ties: float


def largest_entries(weight: torch.Tensor, share: float) -> LargeEntries:
    """The k = floor(share * numel) entries of largest magnitude; at least one."""
    k = max(1, math.floor(share * weight.numel()))
    tiles = [weight[rows] for rows in _tiles(weight.shape)]
    # Counted in two steps rather than sorted or selected, which take far longer where many are alike.
    upper = torch.stack([_counted(_bits(tile) >> 16) for tile in tiles]).sum(0)
    top, above = _reaching(upper, k)
    lower = torch.stack([_counted(bits[bits >> 16 == top] & 0xFFFF) for bits in map(_bits, tiles)]).sum(0)
    last, more = _reaching(lower, k - above)
    bound = torch.tensor(top << 16 | last, dtype=torch.int32).view(torch.float32)
    return LargeEntries(float(bound), (k - above - more) / int(lower[last]))


def _bits(tile: torch.Tensor) -> torch.Tensor:
    """The magnitudes' fp32 bits as whole numbers, which are in the same order as the magnitudes."""
    return tile.float().abs().contiguous().view(torch.int32)


def _counted(numbers: torch.Tensor) -> torch.Tensor:
    return torch.bincount(numbers.flatten(), minlength=1 << 16)


def _reaching(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The number at which k are reached, counted from the largest, and how many are larger than it."""
    reached = counts.flip(0).cumsum(0)
    place = int((reached < k).sum())
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for an update that is zero.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


def over(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several modules as one: densities over all entries, norms of all together.

    The effective rank is their mean, the spectral norm their largest. What one lacks all lack.
    """
    rows = list(rows)
    sizes = {
        "density_a": [row["rank"] * row["shape"][1] for row in rows],
        "density_b": [row["rank"] * row["shape"][0] for row in rows],
        "density_ba": [math.prod(row["shape"]) for row in rows],
    }
    sizes["density_ba_expected"] = sizes["density_ba"]
    means = {
        key: sum(row[key] * size for row, size in zip(rows, of, strict=True)) / sum(of)
        for key, of in sizes.items()
    }
    norm = math.hypot(*(row["norm"] for row in rows))
    known = all(row["weight_norm"] is not None for row in rows)
    weight_norm = math.hypot(*(row["weight_norm"] for row in rows)) if known else None
    on_large = sum((row["on_large"] or 0.0) * row["norm"] ** 2 for row in rows)
    return {
        "modules": len(rows),
        **means,
        "norm": norm,
        "weight_norm": weight_norm,
        "relative": None if weight_norm is None else _ratio(norm, weight_norm),
        "on_large": _ratio(on_large, norm**2) if known else None,
        "spectral_norm": max(row["spectral_norm"] for row in rows),
        "effective_rank": sum(row["effective_rank"] for row in rows) / len(rows),
    }


def over_pairs(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What two adapters have in common in several modules together.

    `a`, `b` and `ba`: `jaccard`, the intersection of their supports over the union, and `chance`, what
    independent supports of the same densities would have on average; None where shapes differ.
    """
    rows = list(rows)
    norms = [math.hypot(*(row["norms"][side] for row in rows)) for side in (0, 1)]
    found: dict[str, Any] = {
        which: _jaccard([row[which] for row in rows if row[which] is not None]) for which in ("a", "b", "ba")
    }
    dot = sum(row["dot"] for row in rows)
    return {"modules": len(rows), **found, "cosine": _ratio(dot, norms[0] * norms[1])}


def _common(supports: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, int]:
    """How many entries two supports have, each and both, and how many there are."""
    made = {"one": 0, "other": 0, "both": 0, "entries": 0}
    for one, other in supports:
        made["one"] += int(one.count_nonzero())
        made["other"] += int(other.count_nonzero())
        made["both"] += int((one & other).count_nonzero())
        made["entries"] += one.numel()
    return made


def _jaccard(counts: Sequence[Mapping[str, int]]) -> dict[str, float | None] | None:
    if not counts:
        return None
    both = sum(each["both"] for each in counts)
    by_chance = sum(each["one"] * each["other"] / each["entries"] for each in counts)
    sizes = sum(each["one"] + each["other"] for each in counts)
    return {"jaccard": _ratio(both, sizes - both), "chance": _ratio(by_chance, sizes - by_chance)}


def kinds(modules: Iterable[str]) -> dict[str, str]:
    """Each module's kind, its name without the number of its layer, in as few words as tell the kinds apart.

    `model.layers.3.mlp.up_proj` is of the kind `up_proj`.
    """
    patterns = {module: layer_and_pattern(module)[1] for module in modules}
    last = {pattern: re.split(r"[./]", pattern)[-1] for pattern in patterns.values()}
    names = list(last.values())
    short = {pattern: name if names.count(name) == 1 else pattern for pattern, name in last.items()}
    return {module: short[pattern] for module, pattern in patterns.items()}


def _by_kind(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    kind = kinds(rows)
    return {
        name: over(row for module, row in rows.items() if kind[module] == name)
        for name in dict.fromkeys(kind.values())
    }


def _by_layer(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The modules' rows under shorter names: `3 up_proj`."""
    kind = kinds(rows)
    layers = {module: layer_and_pattern(module)[0] for module in rows}
    return {f"{'' if layers[m] is None else f'{layers[m]} '}{kind[m]}": row for m, row in rows.items()}


def layer_and_pattern(module: str) -> tuple[int | None, str]:
    """The number of a module's layer, and its name with * in that number's place; None where it has none."""
    found = re.search(r"(?<=\.)\d+(?=\.)", module)
    return (int(found[0]), module[: found.start()] + "*" + module[found.end() :]) if found else (None, module)


def _warnings(adapters: Sequence[SavedAdapter], both: Mapping[tuple[str, str], Any]) -> list[str]:
    lines = []
    for adapter in adapters:
        if adapter.left_out:
            lines.append(
                f"{adapter.name}: {len(adapter.left_out)} tensors are no A or B of a linear layer, so not "
                f"counted: {', '.join(adapter.left_out[:3])}{' ...' if len(adapter.left_out) > 3 else ''}"
            )
        if not adapter.bases():
            lines.append(
                f"{adapter.name}: its frozen weights are not at hand (--base DIR), so nothing is said of them"
            )
        elif adapter.quantized:
            lines.append(
                f"{adapter.name}: it was trained on weights held in {adapter.quantized}; what is said of W "
                "is of W in full precision"
            )
    if len({tuple(adapter.bases()) for adapter in adapters if adapter.bases()}) > 1:
        lines.append("the adapters were not all trained on the same folder of weights")
    for one, other in itertools.combinations(adapters, 2):
        shared = len(both.get((one.name, other.name), ()))
        alone = len(one.modules) + len(other.modules) - 2 * shared
        if alone:
            lines.append(f"{one.name} and {other.name}: {alone} modules have no partner of the same shape")
    return lines


def _tiles(shape: Sequence[int]) -> Iterable[slice]:
    rows = max(1, TILE_ENTRIES // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def _density(support: torch.Tensor) -> float:
    return int(support.count_nonzero()) / support.numel()


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"[./]", name)]


def print_analysis(analysis: Mapping[str, Any], each: bool, console: Console) -> None:
    """Tables of at most 100 columns: each adapter's kinds of modules, or each module, and the pairs."""
    table = _table("What each adapter did (densities, and shares of norms, in %)")
    table.add_column("", overflow="fold")
    large = f"{100 * analysis['large']:.0f} %"
    headings = ("modules", "A", "B", "B A", "predicted", "norm", "of W's", f"on largest {large}", "eff. rank")
    for heading in headings:
        table.add_column(heading.replace(" largest", "\nlargest"), justify="right")
    for adapter in analysis["adapters"]:
        rows = _by_layer(adapter["modules"]) if each else adapter["kinds"]
        table.add_section()
        table.add_row(*(Text(cell, style="bold") for cell in _cells(adapter["name"], adapter["all"])))
        for name, row in rows.items():
            table.add_row(*map(Text, _cells(f"  {name}", row)))
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    console.print(table)
    console.print(
        f"predicted: the density of B A if A and B were independent. on largest: the share of the update's "
        f"squared norm on the {large} largest entries of |W|, where chance gives {large}. norm: of alpha / r "
        "B A, in Frobenius' norm; eff. rank: exp of the entropy of its singular values (mean of the modules)."
    )
    if analysis["pairs"]:
        console.print(_pairs(analysis["pairs"]))
        console.print(
            "Overlap: entries in both supports, of those in either; in brackets what independent supports of "
            "the same densities give. Cosine: of the updates."
        )
    for warning in analysis["warnings"]:
        console.print(Text(f"WARNING: {warning}", style="bold yellow"))


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("What two have in common (%)")
    table.add_column("", overflow="fold")
    for heading in ("modules", "overlap of A", "overlap of B", "overlap of B A", "cosine"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        row = pair["all"]
        table.add_row(
            Text(f"{pair['a']}, {pair['b']}"),
            str(row["modules"]),
            *(overlap_text(row[which]) for which in ("a", "b", "ba")),
            number(row["cosine"], "{:.3f}"),
        )
    return table


def overlap_text(found: Mapping[str, float | None] | None) -> str:
    """An overlap in percent, and in brackets that by chance; a dash where there is none."""
    if found is None or found["jaccard"] is None:
        return "-"
    return f"{100 * found['jaccard']:.1f} ({100 * (found['chance'] or 0):.1f})"


def number(value: float | None, form: str) -> str:
    """A figure in a form of str.format; a dash where there is none."""
    return "-" if value is None else form.format(value)


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    keys = ("density_a", "density_b", "density_ba", "density_ba_expected")
    percent = [None if row[key] is None else 100 * row[key] for key in (*keys, "relative", "on_large")]
    densities, (relative, on_large) = percent[:4], percent[4:]
    return [
        name,
        str(row.get("modules", "")),
        *(number(value, "{:.1f}") for value in densities),
        number(row["norm"], "{:.3g}"),
        number(relative, "{:.2f}"),
        number(on_large, "{:.1f}"),
        number(row["effective_rank"], "{:.1f}"),
    ]


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
    )
