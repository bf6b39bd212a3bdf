"""Full training of a part, and its penalty on drift."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtune.core.errors import UserError
from mmtune.parts import VisionLanguageModel
from mmtune.parts.model import assemble
from mmtune.parts.spec import PARTS, LanguageOptions
from mmtune.tuning.base import PenaltyOptions
from mmtune.tuning.full import FullOptions
from tests import tiny_models as tiny
from tests.tuning import lorasculpt_reference as reference
from tests.world import penalty_of


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny.model(tmp_path)


def penalised(weight: float = 0.3, omega: float = 2.0) -> FullOptions:
    return FullOptions(lr=1e-3, penalty=PenaltyOptions(weight, omega=omega))


@pytest.mark.parametrize("part", PARTS)
def test_every_trained_weight_gets_a_gradient(model: VisionLanguageModel, part: str) -> None:
    model.requires_grad_(False)
    FullOptions(lr=1e-3).make().attach(model, part)
    model.train()
    model(tiny.batch([1, 0, 2])).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    idle = [n for n, _ in model.part(part).named_parameters() if "post_layernorm" in n]
    assert len(trained) == len(list(model.part(part).parameters())) - len(idle)
    assert len(idle) == (2 if part == "vision" else 0)
    for name, parameter in trained:
        assert name.startswith(part) and parameter.grad is not None, name


def test_training_is_in_fp32(tmp_path: Path) -> None:
    parts = tiny.parts(tmp_path)
    parts.dtype = "bfloat16"
    model = assemble(parts)
    FullOptions(lr=1e-3).make().attach(model, "connector")
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert {p.dtype for p in model.vision.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("part", PARTS)
def test_rows_add_up(tmp_path: Path, part: str, tied: bool) -> None:
    parts = tiny.parts(tmp_path)
    parts.language = LanguageOptions(tiny.save_language(tmp_path / "lm2", tie_word_embeddings=tied))
    model = assemble(parts)
    rows = penalised().make().attach(model, part)
    parameters = list(model.part(part).parameters())
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in parameters)
    assert sum(row.trained for row in rows) == sum(p.numel() for p in parameters if p.requires_grad) > 0
    assert all((row.lr is None) == (row.trained == 0) for row in rows)
    for row in rows:
        own = model.core(part).get_submodule(row.module).parameters(recurse=False)
        assert row.regularised == any(p.ndim == 2 for p in own)


def test_what_a_tower_declares_unused_stays(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.vision), "unused", ("pre_layrnorm", "post_layernorm"))
    FullOptions(lr=1e-3).make().attach(model, "vision")
    idle = {name for name, p in model.core("vision").named_parameters() if not p.requires_grad}
    assert idle == {
        f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")
    }


def test_the_penalty_is_the_weighted_mean_over_matrices(model: VisionLanguageModel) -> None:
    tuner = penalised().make()
    tuner.attach(model, "connector")
    start, joining = penalty_of(tuner)
    assert start.item() == 0 and not any(gradient.any() for gradient in joining.values())
    matrices = [model.connector.get_parameter(f"linear_{i}.weight") for i in (1, 2)]
    initial = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for parameter in model.connector.parameters():  # the biases too: they must not count
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found, joining = penalty_of(tuner)
    expected = [reference.full_penalty(w, w0, 2.0) for w, w0 in zip(matrices, initial, strict=True)]
    mean = 0.3 * torch.stack(expected).mean()
    torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=0)
    assert joining.keys() == set(matrices)
    for matrix, theirs in zip(matrices, torch.autograd.grad(mean, matrices), strict=True):
        torch.testing.assert_close(joining[matrix], theirs, rtol=1e-4, atol=1e-8)


def test_a_constant_penalty_weighs_every_entry_alike(model: VisionLanguageModel) -> None:
    tuner = FullOptions(lr=1e-3, penalty=PenaltyOptions(0.3, kind="constant", omega=2.0)).make()
    tuner.attach(model, "connector")
    matrices = [model.connector.get_parameter(f"linear_{i}.weight") for i in (1, 2)]
    initial = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = [
        reference.retention_mask(w0, 2.0).square().mean().sqrt() * (w.double() - w0.double()).norm()
        for w, w0 in zip(matrices, initial, strict=True)
    ]
    found, _ = penalty_of(tuner)
    torch.testing.assert_close(found.double(), 0.3 * torch.stack(expected).mean(), rtol=1e-5, atol=0)


def test_a_penalty_falls_on_the_named_modules_alone(model: VisionLanguageModel) -> None:
    tuner = FullOptions(lr=1e-3, penalty=PenaltyOptions(1.0, modules=["*_2"])).make()
    rows = tuner.attach(model, "connector")
    assert {row.module: row.regularised for row in rows} == {"linear_1": False, "linear_2": True}
    weight = model.connector.get_parameter("linear_2.weight")
    initial = weight.detach().clone()
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found, _ = penalty_of(tuner)
    expected = reference.full_penalty(weight, initial, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(UserError, match=r"'linear_2\.weight' is no module that trains here"):
        FullOptions(1e-3, penalty=PenaltyOptions(1.0, modules=["linear_2.weight"])).make().attach(
            model, "connector"
        )


def test_no_penalty_unless_asked(model: VisionLanguageModel) -> None:
    tuner = FullOptions(lr=1e-3).make()
    tuner.attach(model, "connector")
    assert tuner.before_backward() is None and tuner.state() == {}


def test_state_brings_back_where_training_began(model: VisionLanguageModel, tmp_path: Path) -> None:
    """A resumed run attaches to trained weights, and must still measure drift from the first ones."""
    tuner = penalised().make()
    tuner.attach(model, "connector")
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "final")
    other = VisionLanguageModel.from_pretrained(tmp_path / "final")
    resumed = penalised().make()
    resumed.attach(other, "connector")
    before, _ = penalty_of(resumed)
    resumed.load_state({name: tensor.clone() for name, tensor in tuner.state().items()})
    after, expected = penalty_of(resumed)[0], penalty_of(tuner)[0]
    assert before.item() == 0 and expected.item() > 0
    torch.testing.assert_close(after, expected)


def test_a_trained_part_is_saved_with_the_model(model: VisionLanguageModel, tmp_path: Path) -> None:
    FullOptions(lr=1e-3).make().attach(model, "vision")
    with torch.no_grad():
        model.core("vision").get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(2)
    model.save_pretrained(tmp_path / "final")
    again = VisionLanguageModel.from_pretrained(tmp_path / "final")
    before, after = model.vision.state_dict(), again.vision.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_faulty_options() -> None:
    found: list[str] = []
    options = FullOptions(lr=-1.0, penalty=PenaltyOptions(1.0, modules="pruned"))
    options.check(lambda where, *_: found.append(where))
    assert found == ["lr", "penalty.modules"]
    found.clear()
    FullOptions(1e-3, penalty=PenaltyOptions(1.0, scaled=True)).check(lambda where, *_: found.append(where))
    assert found == ["penalty.scaled"]
