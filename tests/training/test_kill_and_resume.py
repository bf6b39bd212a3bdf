"""A few kills and full disks; `python tests/kill_and_resume.py --kills 50 --faults 50` makes more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kill_and_resume import contents, differences

SCRIPT = Path(__file__).parents[1] / "kill_and_resume.py"


def test_a_killed_run_ends_as_one_that_was_not() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--faults", "1", "--seed", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 kills and 1 full disks" in ran.stdout
    assert ran.stdout.rstrip().endswith("all identical")


def test_a_difference_is_seen(tmp_path: Path) -> None:
    names = ("metrics.jsonl", "results.json", "model.safetensors")
    texts = ('{"step": 1, "samples_per_s": 2}\n', '{"date": "today", "score": 1}', "weights")
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    (tmp_path / names[0]).write_text(texts[0].replace("2", "3"))
    (tmp_path / names[1]).write_text(texts[1].replace("today", "tomorrow"))
    assert not differences(before, contents(tmp_path))
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).write_text(text.replace("1", "9").replace("weights", "weight"))
    (tmp_path / ".step-2.partial").mkdir()
    expected = [".step-2.partial is left over", *(f"{name} differs" for name in sorted(names))]
    assert differences(before, contents(tmp_path)) == expected
    assert differences(contents(tmp_path), before)[0] == ".step-2.partial is missing"
