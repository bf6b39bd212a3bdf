"""`mmtune analyse` against the whole matrices in fp64, put together and looked at entry by entry."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from mmtune.cli import main
from mmtune.evaluation import analyse as analysed
from mmtune.evaluation.analyse import analyse, effective_rank, kinds, largest_entries

SHAPES = {"q": (40, 30), "up": (70, 30)}
RANK, ALPHA = 4, 6.0


def write(
    folder: Path, seed: int, density: float = 0.4, alpha: float = ALPHA
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A sparse adapter of two layers of two kinds; A and B of each module."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    pairs = {}
    for layer in range(2):
        for kind, (p, q) in SHAPES.items():
            name = f"model.layers.{layer}.mlp.{kind}"
            a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, q), (p, RANK)))
            for half in (a, b):
                half[torch.rand(half.shape, generator=generator) > density] = 0
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            pairs[name] = (a.double().numpy(), b.double().numpy())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return pairs


def write_base(folder: Path) -> dict[str, np.ndarray]:
    """16-bit weights, so that many have the same magnitude."""
    generator = torch.Generator().manual_seed(9)
    weights = {
        f"model.layers.{layer}.mlp.{kind}.weight": torch.randn(shape, generator=generator).bfloat16()
        for layer in range(2)
        for kind, shape in SHAPES.items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return {name.removesuffix(".weight"): weight.double().numpy() for name, weight in weights.items()}


def test_each_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysed, "TILE_ENTRIES", 200)  # several tiles, the last one smaller
    pairs, weights = write(tmp_path / "one", 0), write_base(tmp_path / "base")
    (made,) = analyse([tmp_path / "one"], tmp_path / "base")["adapters"]
    assert list(made["modules"]) == list(pairs) and made["name"] == "one"
    squares, of_weights, on_large, nonzero, entries = 0.0, 0.0, 0.0, 0, 0
    for name, (a, b) in pairs.items():
        row, update, weight = made["modules"][name], ALPHA / RANK * b @ a, weights[name]
        support = np.any([np.outer(b[:, k] != 0, a[k] != 0) for k in range(RANK)], axis=0)
        values = np.linalg.svd(update, compute_uv=False)[:RANK]
        order = np.argsort(-np.abs(weight), axis=None)
        k = weight.size // 10
        bound = np.abs(weight).flat[order[k - 1]]
        tied = np.abs(weight) == bound
        above = np.abs(weight) > bound
        share = (update**2 * above).sum() + (k - above.sum()) / tied.sum() * (update**2 * tied).sum()
        assert row["density_a"] == np.mean(a != 0) and row["density_b"] == np.mean(b != 0)
        assert row["density_ba"] == np.mean(support)
        predicted = 1 - (1 - row["density_a"] * row["density_b"]) ** RANK
        assert row["density_ba_expected"] == pytest.approx(predicted)
        assert row["norm"] == pytest.approx(np.linalg.norm(update), rel=1e-6)
        assert row["weight_norm"] == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        relative = np.linalg.norm(update) / np.linalg.norm(weight)
        assert row["relative"] == pytest.approx(relative, rel=1e-6)
        assert row["on_large"] == pytest.approx(share / (update**2).sum(), rel=1e-5)
        assert row["spectral_norm"] == pytest.approx(values[0], rel=1e-6)
        shares = values / values.sum()
        assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
        squares += (update**2).sum()
        of_weights += (weight**2).sum()
        on_large += share
        nonzero += support.sum()
        entries += support.size
    whole = made["all"]
    assert whole["modules"] == 4
    assert whole["norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert whole["relative"] == pytest.approx(math.sqrt(squares / of_weights), rel=1e-6)
    assert whole["on_large"] == pytest.approx(on_large / squares, rel=1e-5)
    assert whole["density_ba"] == pytest.approx(nonzero / entries)
    assert set(made["kinds"]) == {"q", "up"}
    two = [made["modules"][f"model.layers.{layer}.mlp.q"]["norm"] for layer in range(2)]
    assert made["kinds"]["q"]["norm"] == pytest.approx(math.hypot(*two))


def test_what_two_have_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysed, "TILE_ENTRIES", 200)
    pairs = [write(tmp_path / "one", 0), write(tmp_path / "other", 1, alpha=-0.5)]
    (found,) = analyse([tmp_path / "one", tmp_path / "other"])["pairs"]
    updates = [
        np.concatenate([(alpha * b @ a).ravel() for a, b in each.values()])
        for alpha, each in zip((ALPHA, -0.5), pairs, strict=True)
    ]
    cosine = updates[0] @ updates[1] / np.linalg.norm(updates[0]) / np.linalg.norm(updates[1])
    assert found["all"]["cosine"] == pytest.approx(cosine, rel=1e-5)
    halves = [np.concatenate([a.ravel() for a, _ in each.values()]) != 0 for each in pairs]
    jaccard = (halves[0] & halves[1]).sum() / (halves[0] | halves[1]).sum()
    assert found["all"]["a"]["jaccard"] == pytest.approx(jaccard)
    products = [
        np.concatenate([(np.abs(b) @ np.abs(a) > 0).ravel() for a, b in each.values()]) for each in pairs
    ]
    jaccard = (products[0] & products[1]).sum() / (products[0] | products[1]).sum()
    assert found["all"]["ba"]["jaccard"] == pytest.approx(jaccard)


def test_chance_is_what_independent_supports_have() -> None:
    """Drawn many times over, the overlap of two random supports is what is said to be chance."""
    generator = torch.Generator().manual_seed(3)
    drawn = [
        [(torch.rand(50, 40, generator=generator) < density) for density in (0.3, 0.6)] for _ in range(200)
    ]
    counts = [analysed._common([(one, other)]) for one, other in drawn]
    found = analysed._jaccard(counts)
    assert found is not None and found["jaccard"] is not None
    assert found["jaccard"] == pytest.approx(found["chance"], abs=0.003)
    assert found["chance"] == pytest.approx(0.18 / 0.72, abs=0.003)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=60), st.floats(0.01, 1))
def test_the_largest_entries_are_k_also_where_many_are_alike(values: list[int], share: float) -> None:
    weight = torch.tensor([values], dtype=torch.bfloat16)
    k = max(1, math.floor(share * len(values)))
    large = largest_entries(weight, share)
    magnitudes = sorted((abs(value) for value in values), reverse=True)
    assert large.bound == magnitudes[k - 1]
    meant: float = sum(m > large.bound for m in magnitudes)
    meant += large.share_of_ties * sum(m == large.bound for m in magnitudes)
    assert meant == pytest.approx(k)
    assert 0 < large.share_of_ties <= 1


def test_the_largest_entries_of_fp32_weights() -> None:
    weight = torch.randn(120, 90, generator=torch.Generator().manual_seed(1)).mul(1e-3)
    expected = weight.abs().flatten().sort(descending=True).values[1079]
    assert largest_entries(weight, 0.1) == analysed.LargeEntries(float(expected), 1.0)


def test_effective_rank() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(4)) == 0


def test_an_update_of_zero_has_no_shares(tmp_path: Path) -> None:
    """B before its first step: densities and norms are 0, and what would be 0 / 0 is None, also in JSON."""
    write(tmp_path / "zero", 0, density=0.0)
    write_base(tmp_path / "base")
    made = analyse([tmp_path / "zero"], tmp_path / "base")["adapters"][0]["all"]
    assert made["norm"] == made["density_ba"] == made["relative"] == made["effective_rank"] == 0
    assert made["on_large"] is None
    asked = ["analyse", str(tmp_path / "zero"), "--base", str(tmp_path / "base")]
    assert main([*asked, "--output_path", str(tmp_path / "out")]) == 0


def test_kinds() -> None:
    names = ["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "connector/linear_1"]
    assert list(kinds(names).values()) == ["up_proj", "up_proj", "linear_1"]
    both = ["a.layers.0.attn.q", "a.layers.0.cross.q"]
    assert list(kinds(both).values()) == ["a.layers.*.attn.q", "a.layers.*.cross.q"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int) -> None:
    write_base(tmp_path / "base")
    for seed in range(count):
        write(tmp_path / f"run_{seed}", seed)
    folders = [str(tmp_path / f"run_{seed}") for seed in range(count)]
    asked = ["analyse", *folders, "--base", str(tmp_path / "base")]
    assert main([*asked, "--output_path", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:10])) <= 100
    assert "run_0" in printed and "up" in printed and ("overlap of B A" in printed) == (count > 1)
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(saved["adapters"]) == count and len(saved["pairs"]) == count * (count - 1) // 2
    with Image.open(tmp_path / "out" / "analysis.png") as image:
        assert image.width > 1000
    assert main([*asked, "--modules"]) == 0
    assert "\n   1 up " in capsys.readouterr().out


def test_what_it_warns_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", 0)
    assert main(["analyse", str(tmp_path / "one"), "--output_path", str(tmp_path / "out")]) == 0
    assert "WARNING: one: its frozen weights are not at hand" in capsys.readouterr().out


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_it_warns_of_a_base_that_was_held_in_4_bits(tmp_path: Path, quantize: str | None) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write(model / "adapter", 0)
    write_base(model / "language")
    elsewhere = {"vision": {"tower": "clip", "weights": "v"}, "connector": {"kind": "linear", "weights": "c"}}
    language = {"weights": "language", "adapter": "adapter"} | ({"quantize": quantize} if quantize else {})
    (model / "config.json").write_text(json.dumps({"mmtune": 1, **elsewhere, "language": language}))
    warnings = analyse([tmp_path / "model"])["warnings"]
    assert [line for line in warnings if "held in" in line] == (
        ["model: it was trained on weights held in nf4; what is said of W is of W in full precision"]
        if quantize
        else []
    )
