from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from mmtune.evaluation.report import make_report
from mmtune.evaluation.terminal import print_report
from tests.made_up_runs import GROUPS, SOURCE, TINY, base_of, world


def printed(report: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=80)
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_is_plain_and_fits_100_columns_when_piped(tmp_path: Path) -> None:
    report = make_report(
        base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1)), TINY, "test", tmp_path / "out"
    )
    text = printed(report)
    table, _, notes = text.partition("Source: mean of")
    assert "\x1b" not in text
    assert max(map(len, table.splitlines())) <= 100
    assert "…" not in table
    row = next(line for line in table.splitlines() if line.strip().startswith("lorasculpt "))
    group = report["groups"][1]
    numbers = [group[key]["mean"] for key in ("source", "target", "mean", "harmonic_mean")]
    numbers += [group["drop"][task]["mean"] for task in SOURCE]
    assert row.split() == ["lorasculpt", *[f"{number:.1f}" for number in numbers]]
    assert "± SD, 2 seeds" in table
    assert "± 95 %, questions" in table
    assert "rule exact, n=200" in " ".join(notes.split())
    assert str(tmp_path / "out" / "frontier.png") in notes
    assert "WARNING" not in text
