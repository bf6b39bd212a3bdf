"""The KL to the base against its definition in fp64, and the teacher against an untouched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmtune.parts import VisionLanguageModel
from mmtune.tuning.full import FullOptions
from mmtune.tuning.kl import KlOptions, Teacher, kl_divergence
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny

BATCH = tiny.batch([1, 0, 2])


def defined(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """sum of p (ln p - ln q), p and q by their own exponentials."""
    p, q = (x.double().exp() / x.double().exp().sum(-1, keepdim=True) for x in (base, tuned))
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_value_and_gradient_are_the_definitions(dtype: torch.dtype, relative: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (3 * torch.randn(7, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    base, tuned = base.to(dtype), tuned.to(dtype).requires_grad_()
    found, expected = kl_divergence(base, tuned), defined(base, tuned)
    assert found.dtype == dtype and found > 1
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=0)
    (mine,), (theirs,) = torch.autograd.grad(found, tuned), torch.autograd.grad(expected, tuned)
    torch.testing.assert_close(mine, theirs, rtol=100 * relative, atol=relative)


def test_it_is_the_base_that_weighs() -> None:
    """KL(base || tuned), and not the other way round; bf16 logits are computed with in fp32."""
    base, tuned = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0]])
    torch.testing.assert_close(kl_divergence(base, tuned).double(), defined(base, tuned))
    assert (defined(base, tuned) - defined(tuned, base)).abs() > 0.1
    half = kl_divergence(base.bfloat16(), tuned.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, kl_divergence(base, tuned))


@pytest.fixture
def model(tmp_path: Path) -> VisionLanguageModel:
    return tiny.model(tmp_path / "parts").train()


def attached(model: VisionLanguageModel) -> torch.optim.Optimizer:
    """The tower and connector in full, the language model by an adapter with dropout."""
    for part in ("vision", "connector"):
        FullOptions(lr=1e-2).make().attach(model, part)
    LoraOptions(lr=1e-2, rank=4, alpha=8, dropout=0.2).make().attach(model, "language")
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_the_teacher_is_the_base_before_and_after_training(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        loss, expected = model.eval()(BATCH, True)
    model.train()
    optimizer = attached(model)
    teacher = Teacher(model)
    assert {name.split(".")[0] for name in teacher.initial} == {"vision", "connector"}
    _, kl = teacher.losses(BATCH)
    assert kl.item() == 0
    for _ in range(3):
        assert torch.equal(teacher.logits(BATCH), expected)
        task, kl = teacher.losses(BATCH)
        (task + kl).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(teacher.logits(BATCH), expected)
    model.eval()
    task, kl = teacher.losses(BATCH)
    with torch.no_grad():
        tuned = model(BATCH, True)[1]
    assert kl.item() > 0.01 and task.item() != loss.item()
    torch.testing.assert_close(kl.double(), defined(expected, tuned), rtol=1e-4, atol=0)


def test_the_teacher_has_no_dropout(model: VisionLanguageModel) -> None:
    for module in model.language.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # type: ignore[assignment]
    attached(model)
    with torch.no_grad():
        assert not torch.equal(model(BATCH, True)[1], model(BATCH, True)[1])
        teacher = Teacher(model)
        expected = model.eval()(BATCH, True)[1]
    model.train()
    assert torch.equal(teacher.logits(BATCH), expected)


def test_the_teacher_leaves_the_model_as_it_was(model: VisionLanguageModel) -> None:
    attached(model)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    teacher = Teacher(model)
    teacher.logits(BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1]) and parameter.grad is None
    model.eval()
    teacher.logits(BATCH)
    assert not any(module.training for module in model.modules())


def test_the_gradient_is_that_of_two_plain_models(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Of the connector's weights, the base being another model altogether."""
    base = tiny.model(tmp_path / "base").eval()
    model.eval().requires_grad_(False)
    FullOptions(lr=1e-2).make().attach(model, "connector")
    teacher = Teacher(model)
    weights = [p for p in model.connector.parameters() if p.ndim == 2]
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight) * 0.3)
    _, kl = teacher.losses(BATCH)
    found = torch.autograd.grad(kl, weights)

    def everywhere(each: VisionLanguageModel) -> torch.Tensor:
        made = each.language.hf(inputs_embeds=each.splice(BATCH), attention_mask=BATCH.attention_mask)
        assert BATCH.labels is not None
        return made.logits[:, :-1][BATCH.labels[:, 1:] != -100]

    with torch.no_grad():
        said = everywhere(base)
    expected = torch.autograd.grad(defined(said, everywhere(model)), weights)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 1e-3
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_an_adapter_of_the_connector_is_off_too(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        _, expected = model.eval()(BATCH, True)
    model.requires_grad_(False)
    tuner = LoraOptions(lr=1e-2, rank=2, alpha=8).make()
    tuner.attach(model, "connector")
    teacher = Teacher(model)
    for name in tuner.layers:
        nn.init.normal_(tuner.pair(name)[1])
    assert teacher.initial == {}
    assert torch.equal(teacher.logits(BATCH), expected)
    assert teacher.losses(BATCH)[1].item() > 0.01


@pytest.mark.parametrize(("weight", "faults"), [(0.0, ["weight"]), (-1.0, ["weight"]), (0.1, [])])
def test_a_weight_of_0_is_refused(weight: float, faults: list[Any]) -> None:
    found: list[str] = []
    KlOptions(weight).check(lambda where, *_: found.append(where))
    assert found == faults
