from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtune.bench import train as bench
from mmtune.bench.train import BenchOptions
from mmtune.cli import main
from mmtune.core.errors import UserError
from mmtune.parts.spec import PARTS
from mmtune.tuning.sculpt import SculptTuner

SMALL: dict[str, Any] = {"width": 128, "layers": 1, "tokens": 192, "length": 48, "rows": 2, "rank": 4}


def test_bench_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    path = tmp_path / "train.json"
    assert main(["bench", "train", *asked, "--steps", "2", "--output_path", str(path)]) == 0
    made = json.loads(path.read_text())
    assert list(made["tuners"]) == ["lora", "lorasculpt"]
    for name, rows in made["tuners"].items():
        for phase in ("before the prune", "after the prune"):
            row = rows[phase]
            assert row["seconds"] > 0 and row["processor_seconds"] > 0
            assert row["tokens_per_s"] == pytest.approx(192 / row["seconds"])
            assert row["samples_per_s"] == pytest.approx(4 / row["seconds"])
            assert (row["ratio"] == 1) == (name == "lora")
            assert 0 <= row["tuners_share"] < (0.05 if name == "lora" else 1)
            assert row["mfu"] is None or 0 < row["mfu"] < 1
    printed = capsys.readouterr().out
    assert "lorasculpt, before" in printed and "lora, after" in printed


def test_what_each_run_holds_and_does() -> None:
    """The frozen weights are there once; each run trains its own, accumulates and prunes at its step."""
    options = BenchOptions(**SMALL, steps=1, density=0.3)
    torch.manual_seed(0)
    one = bench._Run(options, "lora", None)
    other = bench._Run(options, "lorasculpt", one.base)
    assert len(one.batches) == 2
    mine, its, bases = (
        {p.data_ptr() for p in model.parameters()} for model in (one.model, other.model, one.base)
    )
    trained = {
        p.data_ptr() for run in (one, other) for p in run.model.parameters() if p.requires_grad
    }  # fmt: skip
    assert not trained & mine & its and not trained & bases
    frozen = {p.data_ptr() for p in one.model.parameters() if not p.requires_grad}
    assert frozen <= mine & its & bases
    before = [p.detach().clone() for p in one.model.connector.parameters()]
    for _ in range(bench._prune_step(options)):
        one.step()
        other.step()
    assert all(not torch.equal(p, q) for p, q in zip(one.model.connector.parameters(), before, strict=True))
    sculpt = other.tuners["language"]
    assert isinstance(sculpt, SculptTuner) and sculpt.masks
    a, _ = sculpt.pair("model.layers.0.mlp.up_proj")
    assert int(a.count_nonzero()) == int(0.3 * a.numel())
    other.step()
    sculpt.finish()
    assert set(one.tuners) == set(PARTS)


def test_the_operations_of_a_step() -> None:
    """Against torch's own count, of a whole attention where ours is causal and so half as much."""
    options = BenchOptions(**SMALL)
    model = bench._random_model(options, torch.device("cpu")).requires_grad_(False)
    model.language.hf.set_attn_implementation("eager")
    rows = options.tokens // options.length
    inputs = torch.randn(rows, options.length, options.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.language.hidden(inputs, torch.ones(rows, options.length, dtype=torch.long)).sum().backward()
    linear = [m for m in model.language.hf.base_model.modules() if isinstance(m, torch.nn.Linear)]
    parameters = sum(m.weight.numel() for m in linear)
    attention = options.tokens * 6 * options.width * options.length * options.layers
    assert counter.get_total_flops() == pytest.approx(bench.step_flop(options, parameters) + attention)
    assert bench._Run(options, "lora", model).parameters == parameters


def test_a_ratio_is_of_the_same_round() -> None:
    """The machine is three times as slow in one round: no ratio changes."""
    rounds = [
        [bench._Step(9.0, slow * 2.0, 0.0, 5), bench._Step(9.0, slow * ratio * 2.0, slow * ratio * 0.5, 7)]
        for slow, ratio in ((1, 1.1), (3, 1.2), (1, 1.3))
    ]
    row = bench._figures(rounds, 1, torch.device("cpu"))
    assert row["ratio"] == pytest.approx(1.2) and row["peak_bytes"] == 7
    assert row["tuners_share"] == pytest.approx(0.25)
    assert row["seconds"] == 9 and row["processor_seconds"] == pytest.approx(2.6)


def test_what_does_not_fit() -> None:
    for changes in (
        {"tuners": ["lora", "xyz"]},
        {"tuners": ["lora", "lora"]},
        {"width": 100},
        {"tokens": 100},
    ):
        with pytest.raises(UserError):
            BenchOptions(**{**SMALL, **changes}).check()
    with pytest.raises(UserError, match="no linear layer of this part"):
        bench._Run(BenchOptions(**{**SMALL, "targets": ["x_proj"]}), "lora", None)
