from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mmtune.evaluation.browser import TaskRows
from mmtune.evaluation.examples import Example, Given, plain
from mmtune.evaluation.page import points, render_page
from mmtune.evaluation.provenance import said
from mmtune.evaluation.report import make_report
from mmtune.evaluation.terminal import p_value
from mmtune.evaluation.thumbnails import Thumbnails
from tests import browser
from tests.made_up_runs import GROUPS, SOURCE, TASKS, TINY, base_of, world

VOID = {"meta", "link", "br", "wbr", "img", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> & {{ 7 * 7 }}"

NOTHING: tuple[dict[str, Any], dict[str, Any], Thumbnails] = (
    {task: [] for task in TASKS},
    {task: TaskRows({}, {}, None) for task in TASKS},
    Thumbnails(),
)


class Elements(HTMLParser):
    """Every element with its attributes and the text within; complains of tags that don't match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def names(self) -> list[str]:
        return [tag for tag, _ in self.found]


def page_of(folder: Path, groups: dict[str, tuple[float, float]], seeds: Sequence[int] = (0, 1)) -> str:
    make_report(base_of(folder), world(folder, groups, seeds), TINY, "test", folder / "out")
    return (folder / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A report of two methods with two seeds each, and its page."""
    folder = tmp_path_factory.mktemp("made")
    text = page_of(folder, GROUPS)
    return json.loads((folder / "out" / "report.json").read_text()), text


def words(page: Elements) -> str:
    return " ".join("".join(page.text).split())


def test_the_page_is_whole_and_needs_nothing_else(made: tuple[dict[str, Any], str]) -> None:
    text = made[1]
    page = Elements(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"iframe", "object", "embed", "base"} & set(page.names())
    links = [attributes[key] for _, attributes in page.found for key in ("href", "src") if key in attributes]
    assert all(str(link).startswith(("#", "data:,")) for link in links), links
    assert "http://" not in text and "https://" not in text and "@import" not in text
    policy = next(
        its["content"] for _, its in page.found if its.get("http-equiv") == "Content-Security-Policy"
    )
    script = text[text.index("<script>") + 8 : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in str(policy)
    assert page.names().count("script") == 2  # the data, and this one
    assert "noscript" in page.names() and ("div", {"id": "browser", "hidden": None}) in page.found
    assert all(found.startswith("url(#") for found in re.findall(r"url\([^)]*", text))
    identities = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(set(identities)) == len(identities)
    pointed = {link[1:] for link in map(str, links) if link.startswith("#")}
    pointed |= {str(its["aria-labelledby"]) for _, its in page.found if "aria-labelledby" in its}
    assert pointed | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(identities)


def test_readers_of_all_kinds_find_their_way(made: tuple[dict[str, Any], str]) -> None:
    page = Elements(made[1])
    assert ("html", {"lang": "en"}) in page.found
    assert any(its.get("name") == "viewport" for _, its in page.found)
    levels = [int(tag[1]) for tag in page.names() if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    headers = [attributes for tag, attributes in page.found if tag == "th"]
    assert headers and all(its.get("scope") for its in headers)
    for tag, its in page.found:
        assert tag != "svg" or its.get("aria-hidden") == "true" or its.get("aria-label")


def test_the_page_says_what_the_report_says(made: tuple[dict[str, Any], str]) -> None:
    report, text = made[0], words(Elements(made[1]))
    for group in report["groups"]:
        gained = group["target"]["mean"] - report["base"]["target"]
        lost = report["base"]["source"] - group["source"]["mean"]
        sentence = (
            f"{group['label']} gained {gained:.1f} ± {group['target']['sd']:.1f} on the target "
            f"and forgot {lost:.1f} ± {group['source']['sd']:.1f} of the source."
        )
        assert sentence in text
        assert f"{group['label']}: source {group['source']['mean']:.1f} ± " in text
        for task in SOURCE:
            form, flips = group["format"][task], group["flips"][task]
            turned = [flips[way]["mean"] for way in ("right_to_wrong", "wrong_to_right")]
            cell = f"{form['off_format']['mean']:.1f} %in the target's form{form['new']['mean']:.1f} % new"
            assert cell + "{:.0f} lost, {:.0f} won".format(*turned) in text
    for run in report["runs"]:
        for task in SOURCE:
            assert points(run["scores"][task]["score"]) + points(-run["drop"][task], sign=True) in text
        assert f"hash of {run['name']}" in text
    for task in TASKS:
        assert f"protocol {task}" in text and f"annotations {task}" in text
    assert "mmtune eval --model somewhere --tasks tiny_reading," in text
    assert "torch 2.11" in text and "float32" in text and "all of each set" in text


def test_nothing_a_model_or_a_file_says_becomes_markup(tmp_path: Path) -> None:
    harmless = page_of(tmp_path / "harmless", {"a": (40.0, 60.0), "b": (50.0, 50.0)}, seeds=(0,))
    folder = tmp_path / "hostile"
    name = "a\"'><img src=x onerror=alert(1)>&$x^"
    base, runs = base_of(folder), world(folder, {name: (40.0, 60.0), "b": (50.0, 50.0)}, seeds=(0,))
    for path in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"prediction": HOSTILE + "\0", "prompt": HOSTILE, "target": [HOSTILE]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in folder.rglob("results.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "environment": {"torch": HOSTILE}}))
    report = make_report(base, runs, TINY, "test", folder / "out")
    text = (folder / "out" / "report.html").read_text()
    page = Elements(text)
    assert "".join(page.text).count(HOSTILE) > 2 * len(TASKS)
    assert name in "".join(page.text)
    assert page.names().count("script") == 2 and "img" not in page.names()
    assert not [its for _, its in page.found if any(key.startswith("on") for key in its)]
    assert "\0" not in text and "alert(1)</script>" not in text
    # Apart from the examples, which are fewer here, the page has the elements of the harmless one.
    quiet = Elements(harmless).names()
    assert page.names().count("th") == quiet.count("th")
    assert set(page.names()) - {"bdi"} == set(quiet) - {"bdi"}
    report["warnings"] = [HOSTILE]
    warned = Elements(render_page(report, *NOTHING))
    assert HOSTILE in "".join(warned.text)
    assert warned.names().count("script") == 2


def test_chance_and_what_was_lost_stand_beside_the_scores(made: tuple[dict[str, Any], str]) -> None:
    report, text = made[0], words(Elements(made[1]))
    assert "Could it be chance?" in text
    for group in report["groups"]:
        change = group["change"]["source"]
        p = f"p {p_value(change.get('p_holm', change['p']))}"
        assert f"{points(change['difference'], True)}{p}seen from {points(change['detectable'])}" in text
        for task in SOURCE:
            assert f"{points(100 * group['retention'][task]['mean'])} % kept" in text
    (pair,) = report["between"]["pairs"]
    assert f"Against {pair['b']}, which has the best Mean" in text
    half = (pair["source"]["ci95"][1] - pair["source"]["ci95"][0]) / 2
    assert f"{pair['a']}{points(pair['source']['difference'], True)} ± {points(half)}" in text
    report = copy.deepcopy(report)
    parts = {"knowledge": {"mean": 12.3, "sd": None}, "format": {"mean": 4.56, "sd": None}}
    report["groups"][0]["lost"] = {SOURCE[0]: parts}
    report["groups"][0]["kl"] = {SOURCE[0]: {"mean": 0.1234, "sd": None}}
    text = words(Elements(render_page(report, *NOTHING)))
    assert text.count("12.3 knowledge, 4.6 format") == 1 and "KL 0.123" in text


def test_a_set_of_captions_is_not_out_of_a_hundred(made: tuple[dict[str, Any], str]) -> None:
    report = copy.deepcopy(made[0])
    for model in (report["base"], *report["runs"]):
        model["scores"][SOURCE[0]] |= {"unit": "CIDEr x 100", "score": 150.0, "stderr": 3.0}
    given = [Given("a cat", 0.85, ["base"])]
    examples = {task: [Example("q", "", [], given)] if task in SOURCE[:2] else [] for task in TASKS}
    page = render_page(report, examples, *NOTHING[1:])
    text = words(Elements(page))
    assert len(re.findall(r"\d+ lost, \d+ won", text)) == (len(SOURCE) - 1) * len(report["groups"])
    assert "200 questions, CIDEr x 100" in text and "but where a unit is given" in text
    assert "Source, Mean, H-mean and O-mean weigh unlike things" in text
    assert "weigh unlike things" not in made[1]
    assert text.count("right: a cat") == 1  # of the set that is no caption
    widths = [
        float(width) for width in re.findall(r'<rect class="(?:star|fill-\d)"[^>]* width="([\d.]+)%"', page)
    ]
    assert max(widths) < 100 and sum(width > 90 for width in widths) >= 3


def test_attribution_is_shown_where_there_is_some(made: tuple[dict[str, Any], str]) -> None:
    report = copy.deepcopy(made[0])
    assert "Where it sits" not in render_page(report, *NOTHING)
    cell = {"source": {"mean": 91.23, "sd": 0.5}, "target": {"mean": 11.0, "sd": None}}
    report["groups"][0]["attribution"] = {"language_off": cell}
    page = words(Elements(render_page(report, *NOTHING)))
    assert "Where it sits" in page
    assert "language put back" in page and "connector put back" not in page
    assert "91.2 ± 0.511.0" in page


def test_how_values_are_written() -> None:
    assert [points(value) for value in (-3.04, -0.01, None, 12.0)] == ["−3.0", "0.0", "", "12.0"]
    assert [points(value, sign=True) for value in (3.0, -0.04, 0.0)] == ["+3.0", "0.0", "0.0"]
    assert said({"greedy": True, "tokens": 1, "other": None}) == "greedy yes, tokens 1, other not said"
    assert said({}) == "not said"
    assert plain("a" * 500) == "a" * 400 + "… (100 more characters)"
    assert plain("a\x1b\ud800\x85b\n\t") == "a���b\n\t"


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium is installed")
def test_in_a_browser_it_is_quiet_and_never_wider_than_the_window(tmp_path: Path) -> None:
    many = {f"a_method_with_a_rather_long_name_{n}": (90.0 - n, 30.0 + n) for n in range(12)}
    for name, groups in (("few", GROUPS), ("many", many)):
        page_of(tmp_path / name, groups)
    with browser.browser(tmp_path / "profile") as page:
        for name in ("few", "many"):
            path = tmp_path / name / "out" / "report.html"
            for width in (400, 1400):
                for dark in (False, True):
                    page.open(path, width, 900, dark)
                    assert page.value("document.documentElement.scrollWidth") <= width
                    assert page.value("document.querySelectorAll('h1, h2').length") >= 4
                    ground = page.value("getComputedStyle(document.body).backgroundColor")
                    lightness = sum(map(int, re.findall(r"\d+", ground)[:3]))
                    assert (lightness < 200) is dark
                    assert page.logged() == []
                    assert page.requested() == [path.resolve().as_uri()]
