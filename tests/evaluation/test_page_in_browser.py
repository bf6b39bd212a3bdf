"""The page's browser of questions, in a real one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.evaluation.report import make_report
from tests import browser
from tests.made_up_runs import GROUPS, TASKS, TINY, base_of, rewrite, world

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium is installed")

RUN = "window.ran=1"
HOSTILE = [
    f"</script><script>{RUN}</script>",
    f"<!--<script>{RUN}//-->",
    f"<img src=x onerror={RUN}>",
    f"\u2028{RUN}\u2029",
    f"\x00\x1b{RUN}\x9f",
    f"\u202e{RUN}",
    f"javascript:{RUN}",
    f"';{RUN};\"`${{{RUN}}}\\",
    "__proto__",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on answers, questions, file names and kinds that are markup, or the like of it."""
    folder = tmp_path_factory.mktemp("hostile")
    base = base_of(folder)
    runs = world(folder, {**GROUPS, "a\"'><img src=x onerror=window.ran=1>": (60.0, 40.0)}, (0,))
    (folder / "pictures").mkdir()
    for number, name in enumerate(HOSTILE[1:4]):
        Image.new("RGB", (20 + number, 20), "red").save(
            folder / "pictures" / (name.replace("/", "") + ".png")
        )
    drawn = random.Random(0)
    for path in sorted(folder.rglob("samples_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["prediction"] = drawn.choice([None, *HOSTILE])
            row["prompt"] = f"Question {number}: {HOSTILE[number % len(HOSTILE)]}"
            row["target"] = [HOSTILE[number % 7], "x"]
            row["category"] = [HOSTILE[number % 3], "odd"] if number % 2 else ""
            row["image"] = HOSTILE[1 + number % 5].replace("/", "") + ".png"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in folder.rglob("results.json"):
        rewrite(path, images=dict.fromkeys(TASKS, str(folder / "pictures")))
    make_report(base, runs, TINY, "test", folder / "out")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    lines = (folder / "eval" / "tiny-test" / f"samples_{task}.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def sides(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(one["score"], other["score"]) for one, other in zip(before, after, strict=True)]


def choose(tab: browser.Page, **values: str) -> None:
    for name, value in values.items():
        tab.value(
            f"(() => {{ const field = document.forms.filters.elements.namedItem({json.dumps(name)});"
            f"field.value = {json.dumps(value)};"
            "field.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )


def shown(tab: browser.Page) -> int:
    """How many questions the page says it shows."""
    text = tab.value("document.getElementById('count').textContent")
    return int(text.partition(" questions")[0].rpartition(" ")[2].replace(",", ""))


def test_whatever_is_said_stays_text(folder: Path, tab: browser.Page) -> None:
    tab.open(folder / "out" / "report.html", 1300, 900)
    prompts = "[...document.querySelectorAll('#found .question')].map((its) => its.textContent)"
    seen = set(tab.value(prompts))
    for _ in range(50):
        tab.value("document.querySelector('.pager button[value=\"1\"]').click()")
        seen |= set(tab.value(prompts))
    for text in (HOSTILE[0], HOSTILE[2], HOSTILE[5], HOSTILE[7]):
        assert any(text in prompt for prompt in seen)
    assert shown(tab) == 1200 and len(seen) == 200
    assert "page 50 of 50" in tab.value("document.querySelector('.where').textContent")
    assert tab.value("window.ran") is None
    assert tab.value("document.querySelectorAll('#found script, #found [onerror]').length") == 0
    assert tab.logged() == []
    assert all(url.startswith(("file:", "data:image/webp")) for url in tab.requested())
    assert len([url for url in tab.requested() if url.startswith("file:")]) == 1


def test_pictures_that_are_not_there_are_a_warning(folder: Path, tab: browser.Page) -> None:
    (warning,) = json.loads((folder / "out" / "report.json").read_text())["warnings"]
    assert warning.startswith("2 of 5 pictures are not shown on the page") and warning.isprintable()
    tab.open(folder / "out" / "report.html", 1300, 900)
    assert warning[:40] in tab.value("document.querySelector('.warnings').textContent")
    choose(tab, text="question 1:")
    assert tab.value("document.querySelectorAll('#found .picture img').length") == 6
    choose(tab, text="question 4:")
    assert tab.value("document.querySelectorAll('#found .picture.none').length") == 6


def test_the_policy_would_stop_what_slipped_through(folder: Path, tab: browser.Page) -> None:
    tab.open(folder / "out" / "report.html", 1300, 900)
    slipped = (
        "const made = document.createElement('div'); document.body.append(made);"
        "made.innerHTML = '<img src=x onerror=window.ran=1><img src=https://example.org/a.png>';"
        "const script = document.createElement('script'); script.textContent = 'window.ran=2';"
        "document.body.append(script)"
    )
    tab.value(f"(() => {{ {slipped} }})()")
    tab.wait(300)
    assert tab.value("window.ran") is None
    assert any("Content Security Policy" in line for line in tab.logged())
    failed = [event["params"] for event in tab.events if event["method"] == "Network.loadingFailed"]
    assert [its["blockedReason"] for its in failed] == ["csp", "csp"]  # both pictures


def test_the_filters_find_what_the_files_say(folder: Path, tab: browser.Page) -> None:
    tab.open(folder / "out" / "report.html", 1300, 900)
    base = {task: rows_of(folder / "base", task) for task in TASKS}
    runs = [{task: rows_of(folder / "runs" / f"{name}_s0", task) for task in TASKS} for name in GROUPS]
    pairs = [
        (b["score"], r["score"]) for task in TASKS for b, r in zip(base[task], runs[0][task], strict=True)
    ]
    choose(tab, method="1")
    for flip, wanted in (("lost", (1, 0)), ("won", (0, 1)), ("wrong", (0, 0)), ("right", (1, 1))):
        choose(tab, flip=flip)
        assert shown(tab) == pairs.count(wanted)
        counted = tab.value("document.forms.filters.elements.flip.selectedOptions[0].textContent")
        assert counted.endswith(f"({pairs.count(wanted)})")
    choose(tab, flip="lost", task="1")
    pairs = sides(base[TASKS[1]], runs[0][TASKS[1]])
    assert shown(tab) == pairs.count((1, 0))
    options = tab.value("[...document.forms.filters.elements.category.options].map((its) => its.textContent)")
    assert set(options) == {"all", "odd", *HOSTILE[:3]}
    odd = next(value for value in range(5000) if tab.value(f"({json.dumps(options)})[{value}]") == "odd")
    value = tab.value(f"document.forms.filters.elements.category.options[{odd}].value")
    choose(tab, category=value)
    assert shown(tab) == pairs[1::2].count((1, 0))
    choose(tab, flip="", category="", text="question 17:")
    assert shown(tab) == 1
    seventeenth = base[TASKS[1]][17]
    assert f"question {seventeenth['question_id']}" in tab.value(
        "document.querySelector('#found .from').textContent"
    )


def test_the_address_keeps_a_view(folder: Path, tab: browser.Page) -> None:
    path = folder / "out" / "report.html"
    tab.open(path, 1300, 900)
    choose(tab, task="2", flip="right", method="2", order="gain", text="question")
    tab.value("document.querySelector('.pager button[value=\"1\"]').click()")
    count, address = shown(tab), tab.value("location.hash")
    cards = "document.getElementById('found').textContent"
    before = tab.value(cards)
    assert "flip=right" in address and "task=tiny_shape" in address and "page=2" in address
    tab.open(path, 1300, 900)
    assert shown(tab) == 1200
    tab.value(f"location.hash = {json.dumps(address)}")
    tab.wait(100)
    assert shown(tab) == count and tab.value(cards) == before
    tab.value("location.hash = '#flip=constructor&task=<img>&page=-7&order=toString'")
    tab.wait(100)
    assert shown(tab) == 1200 and tab.logged() == []


def test_without_javascript_the_rest_is_whole(folder: Path, tab: browser.Page) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(folder / "out" / "report.html", 400, 900)
        text = tab.value("document.body.innerText")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "1,200 questions can be browsed where JavaScript is on" in text
    assert "Every run" in text and "Show all" not in text


def test_for_narrow_windows_keyboards_and_readers_and_to_copy(folder: Path, tab: browser.Page) -> None:
    tab.open(folder / "out" / "report.html", 400, 900, dark=True)
    tab.value("document.getElementById('made').open = true")
    assert tab.value("document.documentElement.scrollWidth") <= 400
    unnamed = (
        "[...document.querySelectorAll('select, input, button, [role=region], nav')].filter((its) =>"
        " !its.labels?.length && !its.textContent.trim() && !its.ariaLabel"
        " && !its.getAttribute('aria-labelledby')).length"
    )
    assert tab.value(unnamed) == 0
    reached = set()
    tab.value("document.forms.filters.elements.namedItem('task').focus()")
    for _ in range(9):
        reached.add(tab.value("document.activeElement.name || document.activeElement.textContent"))
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert {"task", "method", "flip", "category", "order", "text", "Show all", "Next"} <= reached
    tab.value("document.getElementById('copy').click()")
    tab.wait(200)
    text = tab.value("document.querySelector('textarea')?.value ?? ''")
    copied = tab.value("document.getElementById('copy')?.textContent") == "Copied"
    assert copied or "Suite: tiny: source tiny_reading" in text
