"""docs/add-a-tower.md, done word for word: its files are written, its commands run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmtune.cli import main
from mmtune.core.files import read_json

DOC = Path(__file__).resolve().parents[1] / "docs" / "add-a-tower.md"
# A fenced block, and the file that the line before it names.
BLOCK = re.compile(r"(?:^`(\S+\.\w+)`:[^\n]*\n\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_walk(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "datasets").symlink_to(world / "datasets")
    done = []
    for file, language, text in BLOCK.findall(DOC.read_text()):
        if file:
            Path(file).write_text(text)
        for line in text.splitlines() if language == "bash" else []:
            done.append(run(shlex.split(line), monkeypatch))
    assert done == ["python", "pytest", "prepare", "check", "train", "eval"]
    final = read_json(tmp_path / "runs" / "ijepa" / "final" / "config.json")
    assert final["vision"]["tower"] == "ijepa_tower:IJepaTower"
    assert read_json(tmp_path / "eval" / "results.json")
    for module in ("ijepa_tower", "test_ijepa_tower"):
        sys.modules.pop(module, None)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """In this process, which saves the seconds that imports take. Returns what was run."""
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if words[:3] == ["python", "-m", "pytest"]:
        import_module(Path(words[-1]).stem).test_patch_tokens_are_those_of_transformers()
        return "pytest"
    if words[0] == "python":
        runpy.run_path(words[1])
        return "python"
    if words[1:] == ["data", "prepare", "tiny"]:  # the small world stands there already
        return "prepare"
    assert words[0] == "mmtune"
    assert main(words[1:]) in (None, 0)
    return words[1]
