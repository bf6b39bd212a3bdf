from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmtune.evaluation.report import make_report
from tests.made_up_runs import TINY, base_of, world


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_frontier_is_a_whole_picture_also_of_points_on_top_of_each_other(
    tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    same = {f"{name}_rather_long_name": (91.5, 25.5) for name in "abcdefgh"}
    make_report(base_of(tmp_path), world(tmp_path, same, seeds), TINY, "test", tmp_path / "out")
    with Image.open(tmp_path / "out" / "frontier.png") as image:
        assert image.size == (1200, 848)
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frontier.png", "report.json"]
