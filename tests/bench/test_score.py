from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtune.cli import main


def test_bench_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "score", "--limit", "300", "--output_path", str(tmp_path / "score.json")]) == 0
    rows = json.loads((tmp_path / "score.json").read_text())["rules"]
    printed = capsys.readouterr().out
    assert {row["rule"] for row in rows} >= {"m4c", "vqa2021", "vqa_legacy", "vlmevalkit", "gqa", "cider"}
    for row in rows:
        assert row["predictions"] == (15 if row["rule"] == "cider" else 300)
        assert row["per_second"] == pytest.approx(row["predictions"] / max(row["seconds"], 1e-9))
        assert row["task"] in printed
