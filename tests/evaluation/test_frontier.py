from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from mmtune.evaluation.frontier import frontier_svg, looks
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "frontier.png",
        "report.html",
        "report.json",
    ]


def test_many_groups_are_numbered_and_have_a_key(tmp_path: Path) -> None:
    many = {f"method_{letter}": (90.0 - n, 30.0 + n) for n, letter in enumerate("abcdefghijkl")}
    report = make_report(base_of(tmp_path), world(tmp_path, many, (0, 1)), TINY, "test", tmp_path / "out")
    with Image.open(tmp_path / "out" / "frontier.png") as image:
        assert image.size == (1632, 848)  # the key stands beside the axes
    drawn = ElementTree.fromstring(frontier_svg(report, narrow=False))
    texts = [text.text for text in drawn.iter("text")]
    assert {str(number) for number in range(1, 13)} <= set(texts)
    assert "method_a" not in texts


@pytest.mark.parametrize("narrow", [False, True])
def test_the_svg_names_and_tells_its_points(tmp_path: Path, narrow: bool) -> None:
    groups = {"a<b>&$x^": (60.0, 50.0), "lorasculpt": (80.0, 40.0)}
    report = make_report(base_of(tmp_path), world(tmp_path, groups, (0, 1)), TINY, "test", tmp_path / "out")
    svg = frontier_svg(report, narrow)
    drawn = ElementTree.fromstring(svg)
    texts = [text.text for text in drawn.iter("text")]
    assert {"base", "a<b>&$x^", "lorasculpt", "nothing forgotten", "nothing gained"} <= set(texts)
    titles = [title.text for title in drawn.iter("title")]
    assert sorted(map(str, titles)) == sorted(
        [f"base: source {report['base']['source']:.1f}, target {report['base']['target']:.1f}"]
        + [
            f"{group['label']}: source {group['source']['mean']:.1f} ± {group['source']['sd']:.1f}, "
            f"target {group['target']['mean']:.1f} ± {group['target']['sd']:.1f} (2 seeds)"
            for group in report["groups"]
        ]
    )
    assert "#0072b2" not in svg.lower()
    assert {"var(--mark-0)", "var(--name-1)", "var(--ink)"} <= set(re.findall(r"var\(--[a-z0-9-]*\)", svg))
    # Where the points stand: x and y grow with Source and Target.
    place = {}
    for element in drawn.iter("g"):
        for use in element.iter("use"):
            place[element.get("id", "").partition("-")[2]] = float(use.attrib["x"]), float(use.attrib["y"])
    assert place["group-0"][0] < place["group-1"][0] < place["base"][0]
    assert place["group-0"][1] < place["group-1"][1] < place["base"][1]


def test_groups_of_one_series_share_their_colour() -> None:
    groups = [{"label": label} for label in ("high", "alone", "low", "middle")]
    series = [{"key": "tune.language.lr", "labels": ["low", "middle", "high"]}]
    found = looks({"groups": groups, "series": series})
    assert found["high"] == found["low"] == found["middle"] != found["alone"]
    many = looks({"groups": [{"label": str(number)} for number in range(36)], "series": []})
    assert len(set(many.values())) == 36
    eight = [{"label": f"{way}{number}"} for number in range(4) for way in "ab"]
    series = [{"key": "k", "labels": [f"{way}{number}" for number in range(3)]} for way in "ab"]
    apart = looks({"groups": [{"label": str(n)} for n in range(6)] + eight, "series": series})
    assert apart["a0"][0] != apart["b0"][0]
