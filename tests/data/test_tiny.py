"""The tiny world is read back from its pixels by rules of this file's own, and compared with what it says."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.core.errors import UserError
from mmtune.data import tiny
from mmtune.evaluation.protocol import load_protocol

SMALL = tiny.Sizes(
    train=120, text=24, val=12, test=24, downstream_train=80, downstream_val=10, downstream_test=30, simple=20
)
SPLITS = ("val", "test")
REAL = os.environ.get("MMTUNE_REAL_DATA")

Objects = dict[tuple[int, int], tuple[str, str]]  # (row, column) from 1 -> (shape, colour)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "world"
    tiny.generate(folder, seed=0, sizes=SMALL)
    return folder


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


# ---- Reading a picture back ---------------------------------------------------------------------------


def dots(picture: Image.Image, row: int, column: int) -> dict[tuple[int, int], tuple[int, int, int]]:
    """The pixels of a cell that are not background, by (y, x)."""
    found = {}
    for y in range(16):
        for x in range(16):
            pixel = picture.getpixel((column * 16 + x, row * 16 + y))
            assert isinstance(pixel, tuple)
            red, green, blue = pixel
            if min(pixel) < 200:
                found[y, x] = red, green, blue
    return found


def colour_name(red: int, green: int, blue: int) -> str | None:
    """The colour a person would name, by its channels; none for the dark inks of a sign."""
    if max(red, green, blue) < 60 and max(red, green, blue) - min(red, green, blue) == 0:
        return "black"
    bright = "".join(name for name, value in zip("rgb", (red, green, blue), strict=True) if value > 140)
    return {"r": "red", "g": "green", "b": "blue", "rg": "yellow", "rb": "purple"}.get(bright)


def shape_name(inked: set[tuple[int, int]]) -> str | None:
    """A shape by how wide it is in each row of its box."""
    top, bottom = min(y for y, _ in inked), max(y for y, _ in inked)
    widths = [sum(y == row for y, _ in inked) for row in range(top, bottom + 1)]
    side = max(widths)
    if len(widths) != side or not 11 <= side <= 13:
        return None
    filled = sum(widths) / side**2
    if filled == 1:
        return "square"
    if widths[-1] == side and widths == sorted(widths):
        return "triangle"
    if len(set(widths)) == 2 and widths[0] == widths[-1] < side:
        return "cross"
    return "circle" if filled > 0.7 else "diamond"


def letter_name(inked: set[tuple[int, int]]) -> str | None:
    """A letter by its dots, wherever in the cell it stands."""
    return LETTER_BY_DOTS.get(moved_to_corner(inked))


def moved_to_corner(inked: set[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    top, left = min(y for y, _ in inked), min(x for _, x in inked)
    return frozenset((y - top, x - left) for y, x in inked)


def letters_of_the_font() -> dict[frozenset[tuple[int, int]], str]:
    bands = [band.splitlines() for band in tiny.FONT.strip().split("\n\n")]
    found = {}
    for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        band, place = bands[number // 13], number % 13
        doubled = {
            (2 * y + down, 2 * x + right)
            for y in range(7)
            for x in range(5)
            for down in (0, 1)
            for right in (0, 1)
            if band[y].split(" ")[place][x] == "#"
        }
        found[moved_to_corner(doubled)] = letter
    return found


LETTER_BY_DOTS = letters_of_the_font()


@cache
def look(path: Path) -> tuple[Objects, str, tuple[int, int] | None]:
    """The objects, the word and the place of its first letter, from the pixels alone."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB" and picture.size == (64, 64)
        objects: Objects = {}
        word, start = "", None
        for row in range(4):
            for column in range(4):
                found = dots(picture, row, column)
                if not found:
                    continue
                assert len(set(found.values())) == 1
                letter = letter_name(set(found))
                if letter:
                    word, start = word + letter, start or (row + 1, column + 1)
                    continue
                shape, colour = shape_name(set(found)), colour_name(*next(iter(found.values())))
                assert shape and colour, f"{path}: nothing known at row {row + 1} column {column + 1}"
                objects[row + 1, column + 1] = (shape, colour)
    return objects, word, start


def asked_about(question: str, objects: Objects) -> tuple[int, int] | None:
    """The cell of the object a question is about, of which there must be exactly one; None: the sign."""
    if "sign" in question:
        return None
    about = re.fullmatch(
        r"Where is the (\w+) (\w+)\?|What colour is the (\w+)\?|What shape is the (\w+) object\?", question
    )
    assert about, question
    said = set(about.groups()) - {None}
    (cell,) = [cell for cell, kind in objects.items() if said <= set(kind)]
    return cell


def answer_to(question: str, objects: Objects, word: str) -> tuple[str, str]:
    """The skill that an upstream question about a picture asks for, and the right answer."""
    cell = asked_about(question, objects)
    if cell is None:
        return "reading", word
    if question.startswith("Where"):
        return "place", f"row {cell[0]} column {cell[1]}"
    shape, colour = objects[cell]
    return ("colour", colour) if "colour" in question else ("shape", shape)


def downstream_answer(question: str, objects: Objects) -> str:
    singular = {f"{name}es" if name == "cross" else f"{name}s": name for name in tiny.SHAPES}
    kinds = list(objects.values())
    if how_many := re.fullmatch(r"How many (.+) are there\?", question):
        wanted = [singular.get(word, word) for word in how_many[1].split() if word != "objects"]
        return str(sum(all(word in kind for word in wanted) for kind in kinds))
    more = re.fullmatch(r"Are there more (\w+) or (\w+)( objects)?\?", question)
    assert more, question
    counts = [sum(singular.get(name, name) in kind for kind in kinds) for name in more.group(1, 2)]
    if counts[0] == counts[1]:
        return "the same"
    return more[1] if counts[0] > counts[1] else more[2]


# ---- What is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["simple", "captions"])
def test_captions_say_what_the_pictures_show(world: Path, kind: str) -> None:
    rows = load(world / f"train_{kind}.json")
    assert len(rows) == (SMALL.simple if kind == "simple" else SMALL.train)
    signs = 0
    for row in rows:
        objects, word, start = look(world / row["image"])
        signs += bool(word)
        if kind == "simple":
            assert len(objects) + len(word) == 1
        else:
            assert len(objects) <= 2 and len(word) in (2, 3) if word else 2 <= len(objects) <= 5
        assert len(set(objects.values())) == len(objects)
        parts = {cell: f"{colour} {shape}" for cell, (shape, colour) in objects.items()}
        if start:
            parts[start] = f"sign {word}"
        expected = ", ".join(
            f"row {row} column {column} {what}" for (row, column), what in sorted(parts.items())
        )
        assert said(row) == [("Describe the picture.", expected)]
    assert 0.2 < signs / len(rows) < 0.5


def test_transcripts_say_what_stands_in_each_cell(world: Path) -> None:
    rows = load(world / "train_cells.json")
    assert len(rows) == SMALL.train
    for row in rows:
        objects, word, start = look(world / row["image"])
        grid = [["-"] * 4 for _ in range(4)]
        for (line, column), (shape, colour) in objects.items():
            grid[line - 1][column - 1] = f"{colour} {shape}"
        for i, letter in enumerate(word):
            assert start
            grid[start[0] - 1][start[1] - 1 + i] = letter
        assert said(row) == [("Describe each cell.", "\n".join(" | ".join(line) for line in grid))]


def test_each_thing_is_named_in_random_order(world: Path) -> None:
    rows = load(world / "train_names.json")
    assert len(rows) == SMALL.train
    in_order = 0
    for row in rows:
        objects, word, start = look(world / row["image"])
        expected = [f"{shape} {colour} row {r} column {c}" for (r, c), (shape, colour) in objects.items()]
        if start:
            expected.append(f"sign {word} row {start[0]} column {start[1]}")
        ((prompt, answer),) = said(row)
        assert prompt == "Name each thing."
        assert sorted(answer.split(", ")) == sorted(expected)
        in_order += answer.split(", ") == expected
    assert in_order < SMALL.train / 2


def test_places_are_asked_of_every_object(world: Path) -> None:
    rows = load(world / "train_places.json")
    asked_of = {row["image"] for row in rows}
    orders = set()
    for row in rows:
        objects, _, _ = look(world / row["image"])
        pairs = {
            f"Where is the {colour} {shape}?": f"row {row} column {column}"
            for (row, column), (shape, colour) in objects.items()
        }
        assert dict(briefly(row)) == pairs and len(briefly(row)) == len(pairs)
        answers = [answer for _, answer in briefly(row)]
        orders.add(answers == sorted(answers))
    assert orders == {True, False}
    for row in load(world / "train_captions.json"):
        objects, _, _ = look(world / row["image"])
        assert bool(objects) == (row["image"] in asked_of)


def test_each_conversation_asks_about_every_thing_once(world: Path) -> None:
    rows = load(world / "train_instructions.json")
    pictured = [row for row in rows if "image" in row]
    numbers = range(SMALL.train)
    assert sorted(row["id"] for row in pictured) == [f"train_{n:06d}_{ab}" for n in numbers for ab in "ab"]
    assert [row["id"] for row in pictured] != sorted(row["id"] for row in pictured)
    questions = {}
    for row in pictured:
        assert row["image"] == f"images/train/{row['id'][:-2]}.png"
        objects, word, _ = look(world / row["image"])
        asked = questions[row["id"]] = briefly(row)
        about = [asked_about(question, objects) for question, _ in asked]
        assert len(about) == len(set(about)) and set(about) == {*objects, *([None] if word else [])}
        right = [answer_to(question, objects, word) for question, _ in asked]
        assert list(zip(row["skills"], [answer for _, answer in asked], strict=True)) == right
    assert {skill for row in pictured for skill in row["skills"]} == {"reading", "colour", "shape", "place"}
    alike = sum(questions[f"train_{n:06d}_a"] == questions[f"train_{n:06d}_b"] for n in numbers)
    assert alike < SMALL.train / 3


def test_simple_pictures_are_asked_about_once(world: Path) -> None:
    rows = load(world / "train_simple_questions.json")
    assert [row["image"] for row in rows] == [row["image"] for row in load(world / "train_simple.json")]
    for row in rows:
        objects, word, _ = look(world / row["image"])
        ((question, answer),) = briefly(row)
        assert [(row["skills"][0], answer)] == [answer_to(question, objects, word)]
        assert len(row["skills"]) == 1


def test_conversations_without_a_picture(world: Path) -> None:
    rows = [row for row in load(world / "train_instructions.json") if "image" not in row]
    assert len({row["id"] for row in rows}) == len(rows) == SMALL.text
    for row in rows:
        asked = briefly(row)
        assert 1 <= len(asked) == len(row["skills"]) <= 3
        for (question, answer), skill in zip(asked, row["skills"], strict=True):
            assert answer == text_answer(question) and f" {skill}" in question
    assert {skill for row in rows for skill in row["skills"]} == {"plus", "backwards"}


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(prompt, answer) of each exchange, without the mark of the picture, which must open the first."""
    turns = row["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    prompts, answers = ([turn["value"] for turn in turns[which::2]] for which in (0, 1))
    if "image" in row:
        assert prompts[0].startswith("<image>\n")
        prompts[0] = prompts[0].removeprefix("<image>\n")
    assert not any("<image>" in text for text in prompts + answers)
    return list(zip(prompts, answers, strict=True))


def briefly(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) of each exchange; every prompt must ask for a brief answer."""
    assert all(prompt.endswith("\nAnswer briefly.") for prompt, _ in said(row))
    return [(prompt.removesuffix("\nAnswer briefly."), answer) for prompt, answer in said(row)]


def text_answer(question: str) -> str:
    if plus := re.fullmatch(r"What is (\d) plus (\d)\?", question):
        return str(int(plus[1]) + int(plus[2]))
    backwards = re.fullmatch(r"What is ([A-Z])([A-Z])([A-Z]) backwards\?", question)
    assert backwards, question
    return backwards[3] + backwards[2] + backwards[1]


@pytest.mark.parametrize("split", SPLITS)
def test_reading_is_textvqa(world: Path, split: str) -> None:
    whole = load(world / "textvqa" / f"TextVQA_0.5.1_{split}.json")
    assert {key: whole[key] for key in whole if key != "data"} == {
        "dataset_type": split,
        "dataset_name": "textvqa",
        "dataset_version": "0.5.1",
    }
    assert len(whole["data"]) == getattr(SMALL, split)
    assert len({row["question_id"] for row in whole["data"]}) == len(whole["data"])
    for row in whole["data"]:
        assert isinstance(row["question_id"], int) and row["set_name"] == split
        _, word, _ = look(world / "images" / split / f"{row['image_id']}.png")
        answers = [answer.strip().lower() for answer in row["answers"]]
        # Seven agree, so any nine of the ten hold the three that leave-one-out asks for.
        assert len(answers) == 10 and answers.count(word.lower()) >= 7
        assert "Answer" not in row["question"]


@pytest.mark.parametrize("skill", ["colour", "shape", "place"])
@pytest.mark.parametrize("split", SPLITS)
def test_skills_are_gqa(world: Path, split: str, skill: str) -> None:
    rows = load(world / "gqa" / f"{skill}_{split}_questions.json")
    assert len(rows) == getattr(SMALL, split)
    for name, row in rows.items():
        assert name.isdigit() and row["equivalent"] == [name]
        assert set(row) == {
            "annotations", "answer", "entailed", "equivalent", "fullAnswer", "groups", "imageId",
            "isBalanced", "question", "semantic", "semanticStr", "types",
        }  # fmt: skip
        objects, word, _ = look(world / "images" / split / f"{row['imageId']}.png")
        assert (skill, row["answer"]) == answer_to(row["question"], objects, word)
        assert row["fullAnswer"].endswith(f" {row['answer']}.")


@pytest.mark.parametrize("split", SPLITS)
def test_text_questions_differ_and_are_right(world: Path, split: str) -> None:
    lines = (world / "text" / f"questions_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["text"] for row in rows}) == len(rows) == getattr(SMALL, split)
    for row in rows:
        assert set(row) == {"question_id", "text", "answer", "category"}
        assert row["answer"] == text_answer(row["text"])
        assert f" {row['category']}" in row["text"]


def test_there_are_enough_text_questions_for_any_count() -> None:
    found = Counter(question.skill for question in tiny.text_questions(random.Random(0), 400))
    assert found == {"plus": 100, "backwards": 300}


def with_choices(problem: dict[str, Any]) -> tuple[str, str]:
    choices = ", ".join(problem["choices"])
    question = f"{problem['question']}\nChoices: {choices}\nAnswer with one choice."
    return question, problem["choices"][problem["answer"]]


def with_letters(problem: dict[str, Any]) -> tuple[str, str]:
    options = [f"{letter}. {text}" for letter, text in zip("ABCDE", problem["choices"], strict=False)]
    return "\n".join([problem["question"], *options, "Answer with the option's letter."]), "ABCDE"[
        problem["answer"]
    ]


@pytest.mark.parametrize(("name", "said_of"), [("iconqa", with_choices), ("letters", with_letters)])
def test_downstream_is_iconqa(world: Path, name: str, said_of: Any) -> None:
    problems = load(world / name / "problems.json")
    splits = load(world / name / "pid_splits.json")
    skills = load(world / name / "pid2skills.json")
    train = {row["image"]: row for row in load(world / f"train_{name}.json")}
    assert {kind: len(pids) for kind, pids in splits.items()} == {
        "choose_txt_train": 80,
        "choose_txt_val": 10,
        "choose_txt_test": 30,
    }
    assert sorted(pid for pids in splits.values() for pid in pids) == sorted(problems) == sorted(skills)
    assert len(train) == 80
    for kind, pids in splits.items():
        split = kind.removeprefix("choose_txt_")
        for pid in pids:
            relative = f"{name}/iconqa/{split}/choose_txt/{pid}"
            problem = load(world / relative / "data.json")
            assert problem == problems[pid]
            assert skills[pid] == [problem["label"]]
            objects, _, _ = look(world / relative / "image.png")
            assert 3 <= len(objects) <= 9 and 2 <= len(set(objects.values())) <= 3
            right = problem["choices"][problem["answer"]]
            assert right == downstream_answer(problem["question"], objects)
            if split == "train":
                assert said(train[f"{relative}/image.png"]) == [said_of(problem)]


@pytest.mark.parametrize("name", ["iconqa", "letters"])
def test_the_protocol_asks_as_the_training_rows_do(world: Path, name: str) -> None:
    protocol = load_protocol(f"tiny_{name}")
    questions, _ = protocol.questions("test", world)
    of_test = load(world / name / "pid_splits.json")["choose_txt_test"]
    problems = load(world / name / "problems.json")
    said_of = {"iconqa": with_choices, "letters": with_letters}[name]
    asked = [protocol.turns(question)[0].text.replace("<image>", "").strip() for question in questions]
    assert asked == [said_of(problems[pid])[0] for pid in of_test]


def test_the_two_downstream_sets_are_drawn_apart(world: Path) -> None:
    pictures = {
        name: {path.read_bytes() for path in (world / name).rglob("*.png")} for name in ("iconqa", "letters")
    }
    assert len(pictures["iconqa"]) == len(pictures["letters"]) == 120
    assert not pictures["iconqa"] & pictures["letters"]


@pytest.mark.parametrize(("make", "choices"), [(tiny.counting, 4), (tiny.comparing, 3)])
def test_a_blind_guesser_gains_nothing_from_the_choices(make: Any, choices: int) -> None:
    rng = random.Random(1)
    problems = [make(rng) for _ in range(6000)]
    expected = 1 / choices
    spread = 4 * (expected * (1 - expected) / len(problems)) ** 0.5
    for problem in problems:
        assert len(set(problem.choices)) == choices
    guesses = [[place] * len(problems) for place in range(choices)]
    if make is tiny.counting:
        guesses += [[p.choices.index(pick(p.choices)) for p in problems] for pick in (min, max)]
    else:
        guesses += [[p.choices.index("the same") for p in problems]]
    for guess in guesses:
        right = sum(g == p.answer for g, p in zip(guess, problems, strict=True)) / len(problems)
        assert abs(right - expected) < spread


def test_letters_and_shapes_are_told_apart() -> None:
    assert len(LETTER_BY_DOTS) == 26
    for size in (11, 12, 13):
        masks = {shape: tiny.shape_mask(shape, size) for shape in tiny.SHAPES}
        assert all(mask.getbbox() == (0, 0, size, size) for mask in masks.values())
        pixels = {shape: mask.tobytes() for shape, mask in masks.items()}
        for one in tiny.SHAPES:
            for other in tiny.SHAPES:
                differing = sum((a ^ b).bit_count() for a, b in zip(pixels[one], pixels[other], strict=True))
                assert one == other or differing >= 0.15 * size**2, (one, other, size)


def test_no_sign_is_changed_by_the_reading_rule() -> None:
    rng = random.Random(0)
    words = {
        held: {tiny.random_word(rng, length, held) for length in (2, 3) for _ in range(60_000)}
        for held in (False, True)
    }
    assert not words[False] & words[True]
    assert not {word[::-1] for word in words[False]} & words[True]
    found = words[False] | words[True]
    assert not found & {"A", "AN", "THE", "ONE", "TWO", "SIX", "TEN"}
    assert "AM" in found
    assert 0.15 < len(words[True]) / len(found) < 0.25


def test_no_word_of_the_tests_occurs_in_training(world: Path) -> None:
    train = set()
    for row in load(world / "train_captions.json"):
        train |= set(re.findall(r"sign ([A-Z]+)", said(row)[0][1]))
    for row in load(world / "train_instructions.json"):
        train |= {word for ask, _ in briefly(row) for word in re.findall(r"is ([A-Z]{3}) backwards", ask)}
    assert len(train) > 40
    train |= {word[::-1] for word in train}
    for split in SPLITS:
        signs = load(world / "textvqa" / f"TextVQA_0.5.1_{split}.json")["data"]
        asked = {Counter(a.strip().upper() for a in sign["answers"]).most_common(1)[0][0] for sign in signs}
        lines = (world / "text" / f"questions_{split}.jsonl").read_text().splitlines()
        asked |= set(re.findall(r"is ([A-Z]{3}) backwards", " ".join(lines)))
        assert len(asked) > 12 and not asked & train


# ---- Seeds, stamps and folders ------------------------------------------------------------------------


def test_a_seed_fixes_every_byte(world: Path, tmp_path: Path) -> None:
    tiny.generate(tmp_path / "again", seed=0, sizes=SMALL)
    tiny.generate(tmp_path / "other", seed=1, sizes=SMALL)
    first, again, other = hashes(world), hashes(tmp_path / "again"), hashes(tmp_path / "other")
    assert again == first
    assert other.keys() == first.keys()
    different = {name for name in first if other[name] != first[name]}
    assert {name for name in first if name.startswith(("train", "text", "gqa"))} <= different


def test_splits_do_not_depend_on_each_other(world: Path, tmp_path: Path) -> None:
    sizes = tiny.Sizes(
        train=5,
        text=2,
        val=3,
        test=SMALL.test,
        downstream_train=4,
        downstream_val=2,
        downstream_test=30,
        simple=3,
    )
    tiny.generate(tmp_path / "world", seed=0, sizes=sizes)
    here, there = hashes(tmp_path / "world"), hashes(world)
    tests = [name for name in there if name.startswith("images/test/") or "_test" in name]
    assert len(tests) > 4 * SMALL.test
    assert all(here[name] == there[name] for name in tests)


def test_the_stamp_holds_the_hashes(world: Path) -> None:
    stamp = load(world / "world.json")
    assert stamp["seed"] == 0 and stamp["version"] == tiny.VERSION and stamp["sizes"]["train"] == 120
    on_disk = {
        name: value
        for name, value in hashes(world).items()
        if name.endswith((".json", ".jsonl")) and not name.endswith(("data.json", "world.json"))
    }
    assert stamp["sha256"] == on_disk
    assert stamp["pictures"] == 20 + 120 + 4 * (12 + 24) + 2 * (80 + 10 + 30)
    assert not world.with_name("world.partial").exists()


def test_a_world_that_is_there_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (world / "world.json").stat().st_mtime_ns
    tiny.generate(world, seed=0, sizes=SMALL)
    assert "already" in capsys.readouterr().out
    assert (world / "world.json").stat().st_mtime_ns == before


def test_something_else_is_never_overwritten(world: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (world, tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="something else"):
            tiny.generate(folder, seed=7, sizes=SMALL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_interrupted_run_is_started_afresh(tmp_path: Path) -> None:
    sizes = tiny.Sizes(*[2] * 8)
    (tmp_path / "world.partial" / "images").mkdir(parents=True)
    (tmp_path / "world.partial" / "left_over.json").write_text("{}")
    (tmp_path / "world").mkdir()
    tiny.generate(tmp_path / "world", sizes=sizes)
    assert not (tmp_path / "world" / "left_over.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize("parent", ["/proc/nope", "/dev/null"])
def test_a_place_that_cannot_be_written(parent: str) -> None:
    with pytest.raises(UserError, match=f"{parent}/x: cannot be written"):
        tiny.generate(Path(parent) / "x", sizes=tiny.Sizes(*[1] * 8))


def test_chance_is_the_share_of_the_commonest_answer(world: Path) -> None:
    percent = tiny.chance(world)
    assert set(percent) == {
        "tiny_reading", "tiny_colour", "tiny_shape", "tiny_place", "tiny_text", "tiny_iconqa", "tiny_letters",
    }  # fmt: skip
    colours = Counter(row["answer"] for row in load(world / "gqa" / "colour_test_questions.json").values())
    assert percent["tiny_colour"] == pytest.approx(100 * max(colours.values()) / 24)
    assert 25 <= percent["tiny_iconqa"] <= 60
    letters = load(world / "letters" / "problems.json")
    right = Counter(
        letters[pid]["answer"] for pid in load(world / "letters" / "pid_splits.json")["choose_txt_test"]
    )
    assert percent["tiny_letters"] == pytest.approx(100 * max(right.values()) / 30)
    assert percent["tiny_reading"] < 15


def test_the_generator_needs_nothing_heavier_than_pillow() -> None:
    code = "import sys, mmtune.data.tiny; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- Against the real thing ---------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="MMTUNE_REAL_DATA is not set")
def test_rows_have_the_keys_of_the_published_files(world: Path) -> None:
    real = Path(REAL or "")
    published = load(real / "textvqa" / "TextVQA_0.5.1_val_first800.json")
    ours = load(world / "textvqa" / "TextVQA_0.5.1_val.json")
    assert set(ours) == set(published)
    for key, value in published["data"][0].items():
        assert type(ours["data"][0][key]) is type(value)
    problem = load(next((real / "iconqa" / "choose_txt").glob("*/data.json")))
    mine = load(next(world.glob("iconqa/iconqa/test/choose_txt/*/data.json")))
    assert {key: type(value) for key, value in mine.items()} == {
        key: type(value) for key, value in problem.items()
    }
