"""Two folders of results side by side, question by question, and how each was made.

Unlike a report, which refuses scores of different protocols, this compares any two, lmms-eval's among them,
and says loudly wherein they differ: a difference may then be of the prompt or the rule and not of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import write_json
from mmtune.evaluation.folders import Folder, Row, Scored, open_folder
from mmtune.evaluation.forgetting import ci95, half_width
from mmtune.evaluation.metrics.base import some
from mmtune.evaluation.significance import detectable, holm, normal_p, paired
from mmtune.evaluation.terminal import p_value

Pairs = list[tuple[Row, Row]]
OTHERWISE_ALIKE = (
    *("part put back", "rule", "metric", "split", "annotation file", "data set", "longest answer", "limit"),
    *("batch size", "precision", "prompt"),
)
"""What has to be the same for a difference to be one of the models."""


def compare(a: Path, b: Path, named: Sequence[str] = (), output: Path | None = None) -> dict[str, Any]:
    """Compares two folders of results; writes compare.json to `output` where one is given.

    named: tasks, as `name` or `name_in_a=name_in_b`; by default those both have. Every difference is b less
    a, in points. Raises UserError where there are no results, no common task, or a task is not there.
    """
    folders = open_folder(a), open_folder(b)
    tasks = {}
    for ours, theirs in _tasks(*folders, named):
        name = ours if ours == theirs else f"{ours}={theirs}"
        tasks[name] = _compare(folders[0].read(ours), folders[1].read(theirs))
    adjusted = holm([row["p"] for row in tasks.values()])
    for row, p in zip(tasks.values(), adjusted, strict=True):
        row["p_holm"] = p
    made = {
        side: {"folder": str(each.path.parent), "kind": each.kind}
        for side, each in zip("ab", folders, strict=True)
    }
    report = {**made, "tasks": tasks}
    if output:
        write_json(output / "compare.json", report)
    return report


def _tasks(a: Folder, b: Folder, named: Sequence[str]) -> list[tuple[str, str]]:
    if not named:
        common = [task for task in a.tasks if task in b.tasks]
        if not common:
            raise UserError(
                f"no task is in both: {some(a.tasks)} against {some(b.tasks)}",
                mend="Say which belong together: --task textvqa=textvqa_val",
            )
        return [(task, task) for task in common]
    chosen = [(name.partition("=")[0], name.partition("=")[2] or name) for name in named]
    faults = [
        Fault(f"it has no task '{task}'", str(folder.path), f"It has: {', '.join(folder.tasks)}.")
        for pair in chosen
        for task, folder in zip(pair, (a, b), strict=True)
        if task not in folder.tasks
    ]
    if faults:
        raise UserError.of(faults)
    return chosen


def _compare(a: Scored, b: Scored) -> dict[str, Any]:
    pairs, by, how = match(a.rows, b.rows)
    row: dict[str, Any] = {
        side: {"score": each.score, "stderr": each.stderr, "n": each.n, "unit": each.unit}
        for side, each in (("a", a), ("b", b))
    }
    if pairs:
        row |= _paired(pairs) | {"only_a": a.n - len(pairs), "only_b": b.n - len(pairs)}
        if (a.unit, b.unit) != ("%", "%"):  # CIDEr has no highest, so no caption is right or wrong
            del row["flips"]
    else:
        row |= _unpaired(a, b)
    row |= {"matched_by": by, "matching": how, "made": _made(a, b, pairs)}
    return row


def _paired(pairs: Pairs) -> dict[str, Any]:
    clusters = [mine.cluster or its.cluster for mine, its in pairs]
    known = all(cluster is not None for cluster in clusters)
    of = [str(cluster) for cluster in clusters] if known else [str(i) for i in range(len(pairs))]
    right = [(mine.score >= 0.5, its.score >= 0.5) for mine, its in pairs]
    return paired([its.score - mine.score for mine, its in pairs], of) | {
        "paired": True,
        "clustered": known,
        "a_paired": 100 * math.fsum(mine.score for mine, _ in pairs) / len(pairs),
        "b_paired": 100 * math.fsum(its.score for _, its in pairs) / len(pairs),
        "flips": {
            "right_to_wrong": sum(before and not after for before, after in right),
            "wrong_to_right": sum(after and not before for before, after in right),
        },
    }


def _unpaired(a: Scored, b: Scored) -> dict[str, Any]:
    """As if the questions had nothing to do with each other: a far wider interval."""
    difference = b.score - a.score
    stderr = None if a.stderr is None or b.stderr is None else math.hypot(a.stderr, b.stderr)
    return {
        "paired": False,
        "difference": difference,
        "stderr": stderr,
        "ci95": ci95(difference, stderr),
        "p": normal_p(difference, stderr),
        "test": "two independent samples, central limit",
        "detectable": None if stderr is None else detectable(stderr),
        "n": 0,
    }


def match(a: Sequence[Row], b: Sequence[Row]) -> tuple[Pairs, str | None, str]:
    """The questions that both answered, by what they were matched, and in words how that went.

    In this order, whichever first matches half of the shorter side: the question's id, where most pairs read
    alike; picture and question; the place in the data set, where all pairs read alike; the question's text,
    where it is asked once. No pairs where none of them does.
    """
    if not a or not b:
        missing = " and ".join(side for side, rows in (("A", a), ("B", b)) if not rows)
        return [], None, f"unpaired, for there are no scores of single questions of {missing}"
    ways: list[tuple[str, float, Callable[[Row], Any]]] = [
        ("question id", 0.5, lambda row: row.question_id),
        ("picture and question", 0, lambda row: row.image and (_name(row.image), _question(row))),
        ("place in the data set", 1, lambda row: row.index),
        ("text of the question", 0, lambda row: _question(row) or None),
    ]
    for name, alike, key in ways:
        mine, its = _once(a, key), _once(b, key)
        pairs = [(mine[k], its[k]) for k in mine if k in its]
        enough = pairs and 2 * len(pairs) >= min(len(a), len(b))
        if enough and sum(_alike(*pair) for pair in pairs) >= alike * len(pairs):
            return pairs, name, f"matched by {name}"
    return [], None, "unpaired, for their questions could not be matched: neither ids nor texts agree"


def _once(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
    """The rows by key, without those whose key is unknown or not theirs alone."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return {k: its[0] for k, its in found.items() if k is not None and k != "" and len(its) == 1}


def _name(image: str) -> str:
    """A picture's file name, wherever its folder lies; a picture written out stands for itself."""
    return image if image.startswith("data:") else Path(image).name


def _question(row: Row) -> str:
    """The prompt's first line, as it is compared: what comes after it is how the answer should look."""
    lines = row.prompt.strip().splitlines()
    return _plain(lines[0]) if lines else ""


def _alike(a: Row, b: Row) -> bool:
    """Whether the question of one stands in the prompt of the other, which may put words around it.

    Nothing speaks against it where one of them is not known.
    """
    return any(_question(one) in _plain(other.prompt) for one, other in ((a, b), (b, a)))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _made(a: Scored, b: Scored, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """Setting -> `a`, `b` (None: not said) and whether they are the `same` (None where one is not said)."""
    settings: dict[str, dict[str, Any]] = {}
    for key in {**a.made, **b.made}:
        mine, its = a.made.get(key), b.made.get(key)
        settings[key] = {"a": mine, "b": its, "same": None if None in (mine, its) else mine == its}
    if any(mine.prompt or its.prompt for mine, its in pairs):
        differ = [(mine.prompt, its.prompt) for mine, its in pairs if mine.prompt != its.prompt]
        first = differ[0] if differ else (pairs[0][0].prompt, pairs[0][1].prompt)
        settings["prompt"] = {"a": first[0], "b": first[1], "same": not differ, "differ": len(differ)}
    return settings


def print_comparison(report: dict[str, Any], console: Console) -> None:
    """The differences as a table, how each was made, and loudly wherein they differ."""
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, 100)
    for side in "ab":
        line = f"{side.upper()}: {report[side]['folder']} ({report[side]['kind']})"
        console.print(Text(line), soft_wrap=True)
    table = Table(title="B less A (points)", title_justify="left")
    for heading in ("task", "A", "B", "B - A ± 95 %", "p", "seen from", "lost / won", "pairs"):
        table.add_column(heading, justify="left" if heading == "task" else "right", overflow="fold")
    for name, row in report["tasks"].items():
        half = half_width(row["ci95"])
        flips = row.get("flips")
        table.add_row(
            Text(name),
            f"{row['a']['score']:.2f}",
            f"{row['b']['score']:.2f}",
            f"{row['difference']:+.2f}" + ("" if half is None else f" ± {half:.2f}"),
            p_value(row["p_holm"]),
            "" if row["detectable"] is None else f"{row['detectable']:.2f}",
            f"{flips['right_to_wrong']} / {flips['wrong_to_right']}" if flips else "",
            str(row["n"]),
        )
    console.print(table)
    for name, row in report["tasks"].items():
        console.print(_settings(name, row))
    console.print(
        "p by Holm over the tasks. Seen from: a true difference of this size is found (p < 0.05 before Holm) "
        "four times in five. All of it is about the questions; nothing about seeds."
    )
    for name, row in report["tasks"].items():
        for line in _warnings(row):
            console.print(Text(f"WARNING: {name}: {line}", style="bold yellow"))


def _settings(name: str, row: dict[str, Any]) -> Table:
    table = Table(title=f"How {name} was made; {row['matching']}; p: {row['test']}", title_justify="left")
    for heading in ("", "", "A", "B"):
        table.add_column(heading, overflow="fold")
    for key, its in row["made"].items():
        mark = {True: "", False: "≠", None: "?"}[its["same"]]
        style = "bold yellow" if its["same"] is False and key in OTHERWISE_ALIKE else ""
        told = [Text("not said" if its[side] is None else _short(its[side]), style=style) for side in "ab"]
        table.add_row(Text(mark, style=style), Text(key, style=style), *told)
    return table


def _short(text: str, longest: int = 200) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= longest else f"{text[:longest]}…"


def _warnings(row: dict[str, Any]) -> list[str]:
    differs = [key for key, its in row["made"].items() if its["same"] is False and key in OTHERWISE_ALIKE]
    unsaid = [key for key, its in row["made"].items() if its["same"] is None and key in OTHERWISE_ALIKE]
    lines = []
    if differs:
        lines.append(f"not made in the same way ({', '.join(differs)}): the difference may come from that")
    if unsaid:
        lines.append(f"only one side says its {', '.join(unsaid)}")
    if row["a"]["unit"] != row["b"]["unit"]:
        lines.append(f"a point is {row['a']['unit']} in A and {row['b']['unit']} in B")
    if not row["paired"]:
        lines.append(f"{row['matching']}; the interval is wider than that of a paired comparison")
        return lines
    if row["only_a"] or row["only_b"]:
        lines.append(
            f"{row['only_a']} questions of A and {row['only_b']} of B have no partner; on the pairs alone A "
            f"scores {row['a_paired']:.2f} and B {row['b_paired']:.2f}, and the difference is of these"
        )
    if not row["clustered"]:
        lines.append("no side says which picture a question is about, so questions count as independent")
    return lines
