from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.evaluation.sequences import make_sequence, print_sequence, sequence_numbers
from tests.made_up_runs import level, rewrite, write_evaluation

ORDER = ["tiny_text", "tiny_place", "tiny_iconqa"]


def test_by_hand() -> None:
    scores = [[80.0, 30.0, 20.0], [90.0, 70.0, 25.0], [60.0, 65.0, 50.0]]
    found = sequence_numbers(scores, [50.0, 20.0, 10.0])
    assert found == {
        "acc": pytest.approx((60 + 65 + 50) / 3),
        "bwt": pytest.approx((60 - 80 + 65 - 70) / 2),
        "fwt": pytest.approx((30 - 20 + 25 - 10) / 2),
        "forgetting": pytest.approx((90 - 60 + 70 - 65) / 2),
        "maa": pytest.approx((80 + (90 + 70) / 2 + (60 + 65 + 50) / 3) / 3),
    }
    assert sequence_numbers([[7.0]], [1.0]) == {
        "acc": 7.0, "bwt": None, "fwt": None, "forgetting": None, "maa": 7.0
    }  # fmt: skip


def test_against_the_formulas_in_matrices() -> None:
    draw = np.random.default_rng(0)
    for count in (2, 3, 6):
        r, b = draw.uniform(0, 100, (count, count)), draw.uniform(0, 100, count)
        found = sequence_numbers(r.tolist(), b.tolist())
        below = np.tril(np.ones((count, count)))
        assert found["acc"] == pytest.approx(r[-1].mean())
        assert found["bwt"] == pytest.approx((r[-1] - np.diag(r))[:-1].mean())
        assert found["fwt"] == pytest.approx((np.diag(r, 1) - b[1:]).mean())
        assert found["forgetting"] == pytest.approx((r[:-1].max(axis=0) - r[-1])[:-1].mean())
        assert found["maa"] == pytest.approx(((r * below).sum(axis=1) / below.sum(axis=1)).mean())
        # What was forgotten since the best moment is no less than since its own stage.
        assert (found["forgetting"] or 0) >= -(found["bwt"] or 0) - 1e-9


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base's evaluation and one after each of three stages."""
    made = []
    for t, (source, target) in enumerate([(40, 20), (70, 25), (60, 30), (50, 70)]):
        made.append(tmp_path / f"stage {t}")
        write_evaluation(made[-1], level(source, target), seed=t, model=f"model {t}")
    return made


def test_evaluations_of_a_sequence(folders: list[Path], tmp_path: Path) -> None:
    report = make_sequence(folders[0], folders[1:], ORDER, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sequence.json").read_text()) == report
    said = [json.loads((each / "results.json").read_text())["results"] for each in folders]
    assert report["base"]["scores"] == [said[0][task]["score"] for task in ORDER]
    matrix = [stage["scores"] for stage in report["stages"]]
    assert matrix == [[each[task]["score"] for task in ORDER] for each in said[1:]]
    for key, value in sequence_numbers(matrix, report["base"]["scores"]).items():
        assert report[key] == value
    for key in ("acc", "bwt", "fwt"):
        low, high = report[f"{key}_ci95"]
        assert low < report[key] < high
        assert (low + high) / 2 == pytest.approx(report[key])
    assert report["warnings"] == []
    console = Console(file=StringIO(), width=80)
    print_sequence(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"backward transfer (BWT): {report['bwt']:.1f} points ± " in text
    row = next(line for line in text.splitlines() if "after place" in line)
    assert row.replace("│", " ").split() == ["after", "place", *[f"{score:.1f}" for score in matrix[1]]]


def test_the_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sequence", "--base", str(folders[0]), *map(str, folders[1:])]
    end = ["--tasks", ",".join(ORDER), "--output_path", str(tmp_path / "out")]
    assert main([*arguments, *end]) == 0
    assert "average over the whole way (MAA)" in capsys.readouterr().out
    assert main([*arguments[:-1], *end]) == 2
    assert "2 stages, but 3 tasks" in capsys.readouterr().err
    end[1] = "tiny_text,tiny_text,tiny_place"
    assert main([*arguments, *end]) == 2
    assert "task tiny_text is named twice" in capsys.readouterr().err


def test_what_is_odd_is_said(folders: list[Path], tmp_path: Path) -> None:
    trained: dict[str, Any] = {"base": "model 0"}
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "trained.json").write_text(json.dumps(trained))
    rewrite(folders[2] / "results.json", model=str(tmp_path / "final"))
    rewrite(folders[3] / "results.json", model_hash="model 2")
    report = make_sequence(folders[0], folders[1:], ORDER, tmp_path / "out")
    assert report["warnings"] == [
        f"{folders[2]}: its model did not start from that of {folders[1]}",
        f"{folders[3]} and {folders[2]} are of one and the same model",
    ]
    rewrite(folders[1] / "results.json", splits=dict.fromkeys(level(1, 1), "val"))
    with pytest.raises(UserError, match="the split differs"):
        make_sequence(folders[0], folders[1:], ORDER, tmp_path / "out")
