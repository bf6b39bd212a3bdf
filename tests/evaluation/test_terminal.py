from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from mmtune.evaluation.report import make_report
from mmtune.evaluation.terminal import p_value, print_report
from tests.made_up_runs import GROUPS, SOURCE, TINY, base_of, level, rewrite, world, write_evaluation


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


def test_where_it_sits_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    plain = make_report(base, runs, TINY, "test", tmp_path / "out")
    assert "Where it sits" not in printed(plain)
    for run in runs[:2]:
        place = run / TINY.folder("test", "language")
        write_evaluation(place, level(90, 26), seed=len(str(place)), model=run.name)
        rewrite(place / "results.json", restored="language", base_hash="base model")
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    text = printed(report)
    table = text[text.index("Where it sits") : text.index("Could it be chance")]
    assert "language put back" in table and "connector" not in table
    whole, off = report["groups"][0], report["groups"][0]["attribution"]["language_off"]
    cells = [f"{each['source']['mean']:.1f} / {each['target']['mean']:.1f}" for each in (whole, off)]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in table.splitlines() if line.strip()}
    assert rows["lora"] == " ".join(cells)
    other = report["groups"][1]
    assert rows["lorasculpt"] == f"{other['source']['mean']:.1f} / {other['target']['mean']:.1f}"


def test_what_became_of_the_answers(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0, 1))
    for run, letters in zip(runs[:2], (60, 40), strict=True):
        for task in ("tiny_place", "tiny_iconqa"):
            path = run / TINY.folder("test") / f"samples_{task}.jsonl"
            said = path.read_text().replace('"prediction": "a"', '"prediction": "B"', letters)
            path.write_text(said)
    for folder in (base, *runs[:2]):  # of the first 20 wrong answers of each run a lenient reader takes
        path = folder / TINY.folder("test") / "samples_tiny_place.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        regained = 0 if folder is base else 20
        for row in rows:
            row["lenient"] = float(row["score"] or regained > 0)
            regained -= not row["score"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    text = printed(report)
    table = text[text.index("Answers to the source") : text.index("Source: mean of")]
    first, _ = table.split("lorasculpt")
    lines = {line.strip().split("  ")[0]: line.split() for line in first.splitlines() if line.strip()}
    assert lines["in the target's form, %"][-5:] == ["0.0", "0.0", "0.0", "25.0", "0.0"]
    assert lines["lost: format, points"][-5:] == ["-", "-", "-", "10.0", "-"]
    lost = report["groups"][0]["drop"]["tiny_place"]["mean"]
    assert lines["lost: knowledge, points"][-2] == f"{lost - 10:.1f}"
    assert lines["new, %"][-5:] == ["0.0", "0.0", "0.0", "25.0", "0.0"]
    turned = [report["groups"][0]["flips"][task] for task in SOURCE]
    counts = [
        f"{each['right_to_wrong']['mean']:.0f} / {each['wrong_to_right']['mean']:.0f}" for each in turned
    ]
    assert " ".join(lines["questions lost / won"][4:]) == " ".join(counts)


def test_chance_and_the_other_methods(tmp_path: Path) -> None:
    groups = {"lora": (40.0, 67.0), "mild": (91.0, 60.0), "lorasculpt": (80.0, 62.0)}
    report = make_report(base_of(tmp_path), world(tmp_path, groups, (0, 1)), TINY, "test", tmp_path / "out")
    text = printed(report)
    chance = text[text.index("Could it be chance") : text.index("Against lorasculpt")]
    rows = [line.split() for line in chance.splitlines() if line.strip()]
    mild = next(i for i, row in enumerate(rows) if row[0] == "mild")
    change = report["groups"][1]["change"]
    cells = [change["source"]["p"], *(change["tasks"][task]["p_holm"] for task in ("tiny_iconqa", *SOURCE))]
    assert rows[mild] == ["mild", *[p_value(p) for p in cells]]
    seen = [change["source"]["detectable"], change["target"]["detectable"]]
    assert rows[mild + 1][3:5] == [f"{points:.1f}" for points in seen]
    against = text[text.index("Against lorasculpt") : text.index("Answers to the source")]
    assert max(map(len, text.partition("Source: mean of")[0].splitlines())) <= 100
    row = next(line.split() for line in against.splitlines() if line.strip().startswith("lora "))
    pair = next(pair for pair in report["between"]["pairs"] if pair["a"] == "lora")
    assert row[1] == f"{pair['source']['difference']:+.1f}" and row[4] == "<0.001"


def test_points_of_other_units_are_named(tmp_path: Path) -> None:
    base, runs = base_of(tmp_path), world(tmp_path, GROUPS, seeds=(0,))
    for folder in (base, *runs):
        path = folder / "eval" / "tiny-test" / "results.json"
        results = json.loads(path.read_text())["results"]
        for task in ("tiny_iconqa", SOURCE[0]):
            results[task]["unit"] = "CIDEr x 100"
        rewrite(path, results=results)
    report = make_report(base, runs, TINY, "test", tmp_path / "out")
    text = " ".join(printed(report).split())
    assert "(rule exact, n=200, CIDEr x 100)" in text
    assert "points of tiny_reading, tiny_iconqa are CIDEr x 100" in text.replace(" reading", " tiny_reading")
    assert "Source, Mean, H-mean and O-mean weigh unlike things" in text
    assert text.count("questions lost / won - ") == len(report["groups"])


def test_p_value() -> None:
    assert [p_value(p) for p in (None, 0.0, 0.00099, 0.0314, 1.0)] == [
        "",
        "<0.001",
        "<0.001",
        "0.031",
        "1.000",
    ]
