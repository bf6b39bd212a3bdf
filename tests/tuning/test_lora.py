"""LoRA: what it lands on, what it leaves alone, and its penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts import VisionLanguageModel
from mmtune.parts.model import assemble
from mmtune.parts.spec import PARTS, LanguageOptions
from mmtune.tuning.base import PenaltyOptions
from mmtune.tuning.lora import LoraOptions, LoraTuner
from tests import tiny_models as tiny
from tests.tuning import lorasculpt_reference as reference
from tests.world import penalty_of

PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PROJECTIONS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny.model(tmp_path)


def options(**changes: Any) -> LoraOptions:
    return LoraOptions(**{"lr": 1e-3, "rank": 2, "alpha": 6, **changes})


def attached(model: VisionLanguageModel, part: str = "language", **changes: Any) -> LoraTuner:
    tuner = options(**changes).make()
    tuner.attach(model, part)
    return tuner


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [f"model.layers.{i}.{p}" for i in (0, 1) for p in PROJECTIONS]),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.*.mlp.up_proj"], [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]),
        (
            ["model.layers.0.self_attn.?_proj", "lm_head"],
            [*(f"model.layers.0.{p}" for p in PROJECTIONS[:4]), "lm_head"],
        ),
    ],
    ids=["all linear", "full name", "wildcard", "several"],
)
def test_targets(model: VisionLanguageModel, targets: Any, expected: list[str]) -> None:
    tuner = attached(model, targets=targets)
    assert sorted(tuner.layers) == sorted(expected)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("language")}
    assert trained == {
        f"language.hf.{name}.lora_{which}.default.weight" for name in expected for which in "AB"
    }


def test_a_gpt_neox_has_its_own_names(tmp_path: Path) -> None:
    tuner = attached(tiny.model(tmp_path, "gpt_neox"))
    assert "gpt_neox.layers.0.attention.query_key_value" in tuner.layers
    assert not any("embed" in name or name == "lm_head" for name in tuner.layers)


@pytest.mark.parametrize("name", ["q_proj", "layers.0.self_attn.q_proj", "model.layers.0", "model.norm"])
def test_unknown_targets_are_named_with_what_there_is(model: VisionLanguageModel, name: str) -> None:
    """A suffix is no full name, and a module that is not linear is no target."""
    with pytest.raises(UserError) as caught:
        attached(model, targets=[name, "model.layers.*.mlp.up_proj", "nothing"])
    assert [fault.what for fault in caught.value.faults] == [
        f"'{name}' is no linear layer of this part",
        "'nothing' is no linear layer of this part",
    ]
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "tune.language.targets" in str(caught.value)
    assert not model.adapters


def test_a_rank_above_a_layers_own(model: VisionLanguageModel) -> None:
    """k_proj of this model is 16 x 32."""
    attached(model, rank=16)
    with pytest.raises(UserError, match=r"rank 17 is more than model\.layers\.0.*\(16 x 32\)"):
        attached(model, rank=17)


@pytest.mark.parametrize("part", PARTS)
def test_the_other_parts_are_left_alone(model: VisionLanguageModel, part: str) -> None:
    before = {name: list(model.part(name).state_dict()) for name in PARTS}
    attached(model, part)
    for name in PARTS:
        found = [key for key in model.part(name).state_dict() if "lora" in key]
        assert bool(found) == (name == part)
        if name != part:
            assert list(model.part(name).state_dict()) == before[name]
            assert all(p.requires_grad for p in model.part(name).parameters())


def test_a_part_without_linear_layers(model: VisionLanguageModel) -> None:
    model.connector = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(UserError, match="no linear layer"):
        attached(model, "connector")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("part", PARTS)
def test_rows_add_up(tmp_path: Path, part: str, tied: bool) -> None:
    parts = tiny.parts(tmp_path)
    parts.language = LanguageOptions(tiny.save_language(tmp_path / "lm2", tie_word_embeddings=tied))
    model = assemble(parts)
    tuner = options(penalty=PenaltyOptions(0.1)).make()
    rows = tuner.attach(model, part)
    parameters = list(model.part(part).parameters())
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in parameters)
    assert sum(row.trained for row in rows) == sum(p.numel() for p in parameters if p.requires_grad) > 0
    assert len({row.module for row in rows}) == len(rows)
    adapted = [row for row in rows if row.tuner == "lora"]
    assert [row.module for row in adapted] == list(tuner.layers)
    assert all(row.lr == 1e-3 and row.regularised and not row.pruned for row in adapted)
    assert all(row.lr is None and not row.regularised for row in rows if row.tuner == "frozen")


def test_the_update_is_alpha_over_rank_times_b_a(model: VisionLanguageModel) -> None:
    name = "model.layers.0.mlp.up_proj"
    tuner = attached(model, targets=[name])
    a, b = tuner.pair(name)
    assert not b.any()
    nn.init.normal_(b)
    x = torch.randn(3, tiny.WIDTH)
    weight = tuner.layers[name].get_base_layer().weight
    torch.testing.assert_close(tuner.layers[name](x), x @ (weight + 6 / 2 * b @ a).T, rtol=1e-4, atol=1e-4)


def test_factors_are_fp32_on_a_bf16_model(tmp_path: Path) -> None:
    parts = tiny.parts(tmp_path)
    parts.dtype = "bfloat16"
    model = assemble(parts)
    tuner = attached(model)
    for name, layer in tuner.layers.items():
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        assert {factor.dtype for factor in tuner.pair(name)} == {torch.float32}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_is_the_weighted_mean_or_sum_over_layers(
    model: VisionLanguageModel, reduction: Literal["mean", "sum"], scaled: bool
) -> None:
    """Of B A, or with the alpha / r that the layers themselves give it."""
    tuner = attached(model, penalty=PenaltyOptions(0.3, omega=2.0, reduction=reduction, scaled=scaled))
    zero, joining = penalty_of(tuner)
    assert zero.item() == 0 and not any(gradient.any() for gradient in joining.values())
    for name in tuner.layers:
        nn.init.normal_(tuner.pair(name)[1])
    found, joining = penalty_of(tuner)
    expected = [
        reference.conflict_penalty(layer.get_base_layer().weight, *tuner.pair(name), 2.0)
        for name, layer in tuner.layers.items()
    ]
    mean = 0.3 * (torch.stack(expected).mean() if reduction == "mean" else torch.stack(expected).sum())
    if scaled:
        mean = next(iter(tuner.layers.values())).scaling["default"] * mean
    torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=0)
    factors = [factor for name in tuner.layers for factor in tuner.pair(name)]
    for factor, theirs in zip(factors, torch.autograd.grad(mean, factors), strict=True):
        torch.testing.assert_close(joining[factor], theirs, rtol=1e-4, atol=1e-7)


def test_a_penalty_falls_on_the_named_modules_alone(model: VisionLanguageModel) -> None:
    options_ = options(
        penalty=PenaltyOptions(1.0, modules=["model.layers.0.mlp.*", "model.layers.1.mlp.up_proj"])
    )
    tuner = options_.make()
    rows = tuner.attach(model, "language")
    meant = [
        f"model.layers.{name}"
        for name in ("0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.up_proj")
    ]
    assert [row.module for row in rows if row.regularised] == meant
    for name in tuner.layers:
        nn.init.normal_(tuner.pair(name)[1])
    found, _ = penalty_of(tuner)
    expected = [
        reference.conflict_penalty(tuner.layers[name].get_base_layer().weight, *tuner.pair(name), 1.0)
        for name in meant
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)


def test_a_constant_penalty_weighs_every_entry_alike(model: VisionLanguageModel) -> None:
    """As much as the mask's root mean square over each layer's weight."""
    tuner = attached(model, penalty=PenaltyOptions(0.3, kind="constant", omega=2.0))
    for name in tuner.layers:
        nn.init.normal_(tuner.pair(name)[1])
    for _ in range(2):  # the second time with what was kept
        found, _ = penalty_of(tuner)
        expected = []
        for name, layer in tuner.layers.items():
            a, b = tuner.pair(name)
            c = reference.retention_mask(layer.get_base_layer().weight, 2.0).square().mean().sqrt()
            expected.append(c * (b.double() @ a.double()).norm())
        torch.testing.assert_close(found.double(), 0.3 * torch.stack(expected).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "modules", [["model.layers.0.self_attn.o_proj"], ["mlp.up_proj"], ["*.q_proj", "lm_head"]]
)
def test_a_penalty_on_a_module_without_an_adapter(model: VisionLanguageModel, modules: list[str]) -> None:
    with pytest.raises(UserError, match="is no module that trains here") as caught:
        attached(model, targets=["*.q_proj", "*.up_proj"], penalty=PenaltyOptions(1.0, modules=modules))
    assert "tune.language.penalty.modules" in str(caught.value)
    assert modules[-1] in caught.value.faults[0].what
    assert not model.adapters


def test_no_penalty_unless_asked(model: VisionLanguageModel) -> None:
    assert attached(model).before_backward() is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": -1.0}, "lr"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": "q_proj"}, "targets"),
        ({"targets": []}, "targets"),
        ({"penalty": PenaltyOptions(1.0, modules="pruned")}, "penalty.modules"),
    ],
)
def test_faulty_options(changes: dict[str, Any], key: str) -> None:
    found: list[str] = []
    options(**changes).check(lambda where, *_: found.append(where))
    assert found == [key]


def test_faulty_penalties() -> None:
    found: list[str] = []
    PenaltyOptions(-1.0, omega=0.0, modules=[]).check(lambda where, *_: found.append(where))
    assert found == ["weight", "omega", "modules"]
