from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mmtune.bench import penalty as bench
from mmtune.cli import main
from tests.tuning import lorasculpt_reference as reference


def test_the_plain_form_is_the_reference() -> None:
    weight, a, b = bench.drawn(40, 30, 4)
    value, grad_a, grad_b = bench.plain(weight.double(), a.double(), b.double())
    leaves = a.double().requires_grad_(), b.double().requires_grad_()
    expected = reference.conflict_penalty(weight, *leaves)
    torch.testing.assert_close(value, expected.detach())
    for mine, theirs in zip((grad_a, grad_b), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bench_penalty() -> None:
    made = bench.bench_penalty([(512, 384)], [4, 8], repeats=2)
    rows = {(row["rank"], row["form"]): row for row in made["rows"]}
    assert {form for _, form in rows} >= set(bench.FORMS[:4])
    for (_, form), row in rows.items():
        assert row["seconds"] > 0
        assert (row["seconds_mask"] is None) == form.startswith("plain")
        assert row["error"] < (3e-2 if form == "plain bf16" else 1e-2 if form == "plain fp32" else 1e-5)
    assert rows[8, "plain bf16"]["error"] > 1e-4
    console = Console(file=io.StringIO(), width=200)
    bench.print_penalty(made, console)
    assert "512 x 384" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_extra_memory_is_what_a_call_takes() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        return (torch.ones(4 << 20) + torch.ones(4 << 20),)  # three of 16 MiB

    assert bench._apart("plain fp32", bench.drawn(8, 8, 2), bench.plain(*bench.drawn(8, 8, 2)), 1) is not None
    extra, _ = bench._extra_memory(call)
    assert extra is not None and 46 << 20 < extra < 60 << 20


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="mat"):
        bench._apart("plain fp32", (torch.ones(4, 4), torch.ones(2, 4), torch.ones(4, 3)), (), 1)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK", (((64, 48),), (2,), 1))
    assert main(["bench", "penalty", "--quick", "--output_path", str(tmp_path / "penalty.json")]) == 0
    made: dict[str, Any] = json.loads((tmp_path / "penalty.json").read_text())
    assert made["machine"]["threads"] == 1
    assert {row["rank"] for row in made["rows"]} == {2}
    assert "64 x 48" in capsys.readouterr().out
