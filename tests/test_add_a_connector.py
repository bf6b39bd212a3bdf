"""docs/add-a-connector.md, done word for word: its files are written, its commands run."""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmtune.core import table
from mmtune.core.files import read_json
from tests.test_add_a_tower import BLOCK, run

DOC = Path(__file__).resolve().parents[1] / "docs" / "add-a-connector.md"


def test_the_walk(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "datasets").symlink_to(world / "datasets")
    done = []
    for file, language, text in BLOCK.findall(DOC.read_text()):
        if file:
            Path(file).write_text(text)
        for line in text.splitlines() if language == "bash" else []:
            if "pytest" in line:
                import_module("test_average_pool").test_blocks_are_averaged()
                continue
            if "eval" in line:  # another process, which has not seen the run's YAML
                monkeypatch.setattr(table, "_allowed", set())
            done.append(run(shlex.split(line), monkeypatch))
    assert done == ["prepare", "check", "train", "assemble", "eval"]
    assert "a picture is 4 tokens" in capsys.readouterr().out
    for model in (tmp_path / "runs" / "pooled" / "final", tmp_path / "assembled"):
        saved = read_json(model / "connector" / "config.json")
        assert saved["kind"] == "average_pool:AveragePool" and saved["options"] == {"side": 2}
    assert read_json(tmp_path / "eval" / "results.json")
    for module in ("average_pool", "test_average_pool"):
        sys.modules.pop(module, None)
