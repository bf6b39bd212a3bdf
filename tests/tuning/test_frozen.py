"""A frozen part does not train, and says so in the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtune.parts.spec import PARTS
from mmtune.tuning.base import TUNERS
from mmtune.tuning.frozen import FrozenOptions
from tests import tiny_models as tiny


@pytest.mark.parametrize("part", PARTS)
def test_only_this_part_is_frozen(tmp_path: Path, part: str) -> None:
    model = tiny.model(tmp_path)
    tuner = FrozenOptions().make()
    rows = tuner.attach(model, part)
    for name in PARTS:
        assert {p.requires_grad for p in model.part(name).parameters()} == {name != part}
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.part(part).parameters())
    assert all((row.part, row.tuner, row.trained, row.lr) == (part, "frozen", 0, None) for row in rows)
    assert tuner.before_backward() is None and tuner.state() == {} and tuner.densities() == {}


def test_each_tuners_name_is_its_options_tuner() -> None:
    for name in TUNERS.names():
        assert TUNERS.load(name).tuner == name
