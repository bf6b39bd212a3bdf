from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmtune.core.errors import UserError
from mmtune.parts import VisionLanguageModel
from mmtune.training.optim import make_optimizer, schedule_factor, set_rates


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedule_after_warm_up_is_that_of_transformers(kind: str, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer, num_warmup_steps=5, num_training_steps=50)  # type: ignore[operator]
    for step in range(50):
        if step >= 5:
            assert schedule_factor(kind, step, 50, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_in_even_steps_and_wastes_none(kind: str) -> None:
    factors = [schedule_factor(kind, step, 20, 0.2) for step in range(20)]
    # Transformers starts at 0, a step without an effect; here the first of 4 has a fifth.
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors[4:]) == 1


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert schedule_factor("cosine", 0, 1, 0.0) == 1
    assert [schedule_factor("constant", step, 3, 0.0) for step in range(3)] == [1, 1, 1]


def test_a_group_for_each_part_that_trains(world: Path) -> None:
    model = VisionLanguageModel.from_pretrained(world / "base")
    model.vision.requires_grad_(False)
    optimizer = make_optimizer(model, {"connector": 2e-5, "language": 2e-4}, weight_decay=0.1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["connector", "language"]
    assert [group["lr"] for group in groups.values()] == [2e-5, 2e-4]
    assert {group["weight_decay"] for group in groups.values()} == {0.1}
    for name, group in groups.items():
        assert set(group["params"]) == set(model.part(name).parameters())
    set_rates(optimizer, 0.5)
    set_rates(optimizer, 0.25)  # of the part's own rate, not of what was set last
    assert [group["lr"] for group in groups.values()] == [2e-5 / 4, 2e-4 / 4]


def test_a_model_of_which_nothing_trains_is_refused(world: Path) -> None:
    model = VisionLanguageModel.from_pretrained(world / "base").requires_grad_(False)
    with pytest.raises(UserError, match="no part of the model trains"):
        make_optimizer(model, {}, 0.0)
