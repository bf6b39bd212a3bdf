"""The tiny world: small pictures with known contents, written in the layouts of the real benchmarks.

A picture is 64 x 64 pixels, a grid of 4 x 4 cells with coloured shapes in some of them and, on every
third, a sign of two or three letters. Five upstream tasks (reading, colour, shape, place, and text without
pictures) and two downstream sets (counting and comparing, answered in words or with an option's letter)
are asked about such scenes. A seed and a table of sizes fix every file; every split and purpose draws
from a random stream of its own, so that changing the size of one leaves the others as they are.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, read_jsonl

VERSION = 8  # part of the stamp: raise it whenever the same seed would give other files

GRID = 4  # cells along each side
CELL = 16  # pixels along each side of a cell
SIDE = GRID * CELL

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 80, 230),
    "yellow": (240, 200, 20),
    "purple": (160, 40, 180),
    "black": (20, 20, 20),
}
INKS = ((20, 20, 20), (90, 10, 10), (10, 70, 20), (15, 15, 100))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The TextVQA rule drops articles and turns number words into digits: no sign may say one of these.
NOT_A_SIGN = frozenset({"AN", "THE", "ONE", "TWO", "SIX", "TEN"})

BRIEFLY = "\nAnswer briefly."
ONE_CHOICE = "\nAnswer with one choice."
ONE_LETTER = "\nAnswer with the option's letter."
DESCRIBE = "Describe the picture."
TRANSCRIBE = "Describe each cell."
NAME = "Name each thing."
READING_QUESTIONS = ("What does the sign say?", "What is written on the sign?")
COUNTS = (1, 2, 3, 4, 5)

# Twenty-six capitals of 5 x 7 dots, thirteen side by side.
FONT = """
.###. ####. .###. ###.. ##### ##### .###. #...# .###. ..### #...# #.... #...#
#...# #...# #...# #..#. #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #..#. #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ###.. ##### #.... .#### #...# .###. .##.. #...# ##### #...#

#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #.#.# #.#.. ....# ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#...
#..## #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
"""


@dataclass(frozen=True)
class Sizes:
    """How many of everything: pictures for train, questions per task for val and test."""

    train: int = 24_000
    text: int = 10_000
    val: int = 150
    test: int = 300
    downstream_train: int = 6_000
    downstream_val: int = 200
    downstream_test: int = 400
    simple: int = 6_000


FULL_SIZES = Sizes()


# ---- Scenes -------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Cell(NamedTuple):
    """Counted from 0 here and from 1, row 1 on top, wherever a person or a model reads it."""

    row: int
    column: int

    def __str__(self) -> str:
        return f"row {self.row + 1} column {self.column + 1}"


@dataclass(frozen=True)
class Scene:
    """Objects by cell, and perhaps a sign: a word whose first letter stands in `sign_at`."""

    objects: dict[Cell, Kind]
    word: str = ""
    sign_at: Cell | None = None


KINDS = tuple(Kind(shape, colour) for shape in SHAPES for colour in COLOURS)
CELLS = tuple(Cell(row, column) for row in range(GRID) for column in range(GRID))


def held_out(word: str) -> bool:
    """Whether a word is kept for val and test: about every fifth is, and with it the word turned round.

    By a hash, so that the words of training share no pattern that tells them from the others.
    """
    return hashlib.sha256(min(word, word[::-1]).encode()).digest()[0] % 5 == 0


def random_word(rng: random.Random, length: int, held: bool) -> str:
    """`length` random capitals that every scorer leaves alone, held out of training or from training."""
    while True:
        word = "".join(rng.choices(LETTERS, k=length))
        if word not in NOT_A_SIGN and held_out(word) == held:
            return word


def object_scene(rng: random.Random) -> Scene:
    """Two to five objects, no two of the same shape and colour."""
    count = rng.randint(2, 5)
    return Scene(dict(zip(rng.sample(CELLS, count), rng.sample(KINDS, count), strict=True)))


def sign_scene(rng: random.Random, held: bool) -> Scene:
    """A word in neighbouring cells of one row, and up to two objects elsewhere. held: see random_word."""
    word = random_word(rng, rng.randint(2, 3), held)
    start = Cell(rng.randrange(GRID), rng.randint(0, GRID - len(word)))
    free = [c for c in CELLS if c.row != start.row or not 0 <= c.column - start.column < len(word)]
    count = rng.randint(0, 2)
    objects = dict(zip(rng.sample(free, count), rng.sample(KINDS, count), strict=True))
    return Scene(objects, word, start)


def simple_scene(rng: random.Random) -> Scene:
    """One object, or one letter, in an otherwise empty picture."""
    cell = rng.choice(CELLS)
    if rng.random() < 1 / 3:
        return Scene({}, rng.choice(LETTERS), cell)
    return Scene({cell: rng.choice(KINDS)})


def caption(scene: Scene) -> str:
    """Everything in the scene in reading order; a sign stands where its first letter does."""
    parts = {cell: f"{cell} {kind}" for cell, kind in scene.objects.items()}
    if scene.sign_at:
        parts[scene.sign_at] = f"{scene.sign_at} sign {scene.word}"
    return ", ".join(parts[cell] for cell in sorted(parts))


def names(scene: Scene, rng: random.Random) -> str:
    """Each thing in random order: its shape, then its colour, then its place.

    Said in this order, each word but the first is what a question asks for: the colour of a shape, the
    place of an object.
    """
    things = [f"{kind.shape} {kind.colour} {cell}" for cell, kind in sorted(scene.objects.items())]
    if scene.sign_at:
        things.append(f"sign {scene.word} {scene.sign_at}")
    rng.shuffle(things)
    return ", ".join(things)


def cells(scene: Scene) -> str:
    """What stands in each cell, empty ones included, a line to a row."""
    found = {cell: str(kind) for cell, kind in scene.objects.items()}
    if scene.sign_at:
        row, column = scene.sign_at
        found |= {Cell(row, column + i): letter for i, letter in enumerate(scene.word)}
    rows = ([found.get(Cell(row, column), "-") for column in range(GRID)] for row in range(GRID))
    return "\n".join(" | ".join(row) for row in rows)


# ---- Drawing ------------------------------------------------------------------------------------------


@cache
def letter_mask(letter: str) -> Image.Image:
    """One letter of 10 x 14 pixels, each dot of the font doubled."""
    rows = FONT.strip().splitlines()
    band, place = divmod(LETTERS.index(letter), 13)
    mask = Image.new("1", (5, 7))
    for y in range(7):
        for x in range(5):
            mask.putpixel((x, y), rows[band * 8 + y][place * 6 + x] == "#")
    return mask.resize((10, 14), Image.Resampling.NEAREST)


@cache
def shape_mask(shape: str, size: int) -> Image.Image:
    """One shape that fills a box of `size` x `size` pixels."""
    mask = Image.new("1", (size, size))
    draw = ImageDraw.Draw(mask)
    end, middle, arm = size - 1, (size - 1) / 2, 2 * size // 5
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=1)
    elif shape == "square":
        draw.rectangle((0, 0, end, end), fill=1)
    elif shape == "triangle":
        draw.polygon(((middle, 0), (end, end), (0, end)), fill=1)
    elif shape == "cross":
        draw.rectangle((arm, 0, end - arm, end), fill=1)
        draw.rectangle((0, arm, end, end - arm), fill=1)
    else:
        draw.polygon(((middle, 0), (end, middle), (middle, end), (0, middle)), fill=1)
    return mask


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: 64 x 64 RGB. `rng` gives the tones, sizes and small shifts."""
    red, green, blue = (rng.randint(236, 255) for _ in "RGB")
    picture = Image.new("RGB", (SIDE, SIDE), (red, green, blue))
    draw = ImageDraw.Draw(picture)

    def stamp(cell: Cell, mask: Image.Image, fill: tuple[int, int, int]) -> None:
        left = cell.column * CELL + (CELL - mask.width) // 2 + rng.randint(-1, 1)
        top = cell.row * CELL + (CELL - mask.height) // 2 + rng.randint(-1, 1)
        draw.bitmap((left, top), mask, fill)

    for cell, kind in scene.objects.items():
        stamp(cell, shape_mask(kind.shape, rng.randint(11, 13)), COLOURS[kind.colour])
    if scene.sign_at:
        ink = rng.choice(INKS)
        for step, letter in enumerate(scene.word):
            stamp(Cell(scene.sign_at.row, scene.sign_at.column + step), letter_mask(letter), ink)
    return picture


# ---- Upstream questions -------------------------------------------------------------------------------


class Question(NamedTuple):
    skill: str
    text: str
    answer: str
    about: str = ""  # the object of the question, as the question names it


def questions_about(scene: Scene, cell: Cell) -> list[Question]:
    """Every question about the object in `cell` that has one right answer in this scene."""
    kind = scene.objects[cell]
    shape, colour = kind
    kinds = scene.objects.values()
    found = [Question("place", f"Where is the {kind}?", str(cell), str(kind))]
    if sum(other.shape == shape for other in kinds) == 1:
        found.append(Question("colour", f"What colour is the {shape}?", colour, shape))
    if sum(other.colour == colour for other in kinds) == 1:
        found.append(Question("shape", f"What shape is the {colour} object?", shape, f"{colour} object"))
    return found


def conversation(scene: Scene, rng: random.Random) -> list[Question]:
    """A question about each thing in the scene, the sign among them, in random order.

    One question only about each: the answer to a second one would stand in the first.
    """
    asked = [Question("reading", rng.choice(READING_QUESTIONS), scene.word)] if scene.word else []
    asked += [rng.choice(questions_about(scene, cell)) for cell in sorted(scene.objects)]
    rng.shuffle(asked)
    return asked


def places(scene: Scene, rng: random.Random) -> list[Question]:
    """Where each object is, in random order."""
    kinds = [(str(cell), str(kind)) for cell, kind in sorted(scene.objects.items())]
    rng.shuffle(kinds)
    return [Question("place", f"Where is the {kind}?", cell, kind) for cell, kind in kinds]


def text_question(rng: random.Random, held: bool) -> Question:
    """A question without a picture: a sum of two digits, or three letters to be turned round.

    held: see random_word. Of sums there are only 100, and none is held out.
    """
    if rng.random() < 0.5:
        left, right = rng.randint(0, 9), rng.randint(0, 9)
        return Question("plus", f"What is {left} plus {right}?", str(left + right))
    word = random_word(rng, 3, held)
    return Question("backwards", f"What is {word} backwards?", word[::-1])


def text_questions(rng: random.Random, count: int) -> list[Question]:
    """`count` different questions without pictures, with words held out of training; at most a third sums."""
    room = {"plus": min(100, count // 3)}
    room["backwards"] = count - room["plus"]
    found: dict[str, Question] = {}
    while len(found) < count:
        question = text_question(rng, held=True)
        if room[question.skill] and question.text not in found:
            found[question.text] = question
            room[question.skill] -= 1
    return list(found.values())


def ten_answers(word: str, rng: random.Random) -> list[str]:
    """What ten people typed: the word with stray capitals and spaces, and up to three misreadings."""
    wrong = rng.choices((0, 1, 2, 3), weights=(6, 2, 1, 1))[0]
    typed = (word, word, word, word.lower(), word.title(), f"{word} ")
    answers = rng.choices(typed, k=10 - wrong)
    while len(answers) < 10:
        place = rng.randrange(len(word))
        misread = word[:place] + rng.choice(LETTERS) + word[place + 1 :]
        if misread != word and misread not in NOT_A_SIGN:
            answers.append(misread)
    rng.shuffle(answers)
    return answers


# ---- Downstream problems ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    skill: str
    question: str
    choices: tuple[str, ...]
    answer: int  # index into choices
    scene: Scene


def crowd(rng: random.Random, counts: dict[Kind, int]) -> Scene:
    """So many objects of each kind, in random cells."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return Scene(dict(zip(rng.sample(CELLS, len(kinds)), kinds, strict=True)))


def share_out(rng: random.Random, total: int, kinds: Sequence[Kind]) -> dict[Kind, int]:
    """`total` objects over the kinds, at least one of each."""
    cuts = [0, *sorted(rng.sample(range(1, total), len(kinds) - 1)), total]
    return {kind: cuts[i + 1] - cuts[i] for i, kind in enumerate(kinds)}


def counting(rng: random.Random) -> Problem:
    """How many of one shape, of one colour, or of both: one to five among three to nine objects.

    The choices are four of the five possible counts, which makes each equally likely to a blind guesser.
    """
    shape, colour = rng.choice(KINDS)
    noun, fits = rng.choice(
        [
            (PLURAL[shape], lambda kind: kind.shape == shape),
            (f"{colour} objects", lambda kind: kind.colour == colour),
            (f"{colour} {PLURAL[shape]}", lambda kind: kind == (shape, colour)),
        ]
    )
    wanted = [kind for kind in KINDS if fits(kind)]
    others = [kind for kind in KINDS if not fits(kind)]
    if len(wanted) == 1:  # the rest must look alike, or the colour or the shape alone would do
        others = [kind for kind in others if kind.shape == shape or kind.colour == colour]

    count = rng.choice(COUNTS)
    wanted = rng.sample(wanted, rng.randint(1, min(2, count, len(wanted))))
    others = rng.sample(others, rng.randint(1, 3 - len(wanted)))
    rest = rng.randint(max(len(others), 3 - count), 9 - count)
    scene = crowd(rng, share_out(rng, count, wanted) | share_out(rng, rest, others))

    numbers = [count, *rng.sample([other for other in COUNTS if other != count], 3)]
    rng.shuffle(numbers)
    return Problem(
        "counting", f"How many {noun} are there?", tuple(map(str, numbers)), numbers.index(count), scene
    )


def comparing(rng: random.Random) -> Problem:
    """More of one shape or of another, of one colour or of another, or the same; each equally often."""
    by_shape = rng.random() < 0.5
    values = rng.sample(SHAPES if by_shape else tuple(COLOURS), 3)
    kinds = [
        Kind(value, rng.choice(tuple(COLOURS))) if by_shape else Kind(rng.choice(SHAPES), value)
        for value in values
    ]
    low = rng.randint(1, 3)
    high = low + rng.randint(1, 3)
    right = rng.randrange(3)
    first, second = ((high, low), (low, high), (low, low))[right]
    rest = rng.randint(max(0, 3 - first - second), min(3, 9 - first - second))
    scene = crowd(rng, dict(zip(kinds, (first, second, rest), strict=True)))

    names = [PLURAL[value] if by_shape else value for value in values[:2]]
    question = f"Are there more {names[0]} or {names[1]}" + ("?" if by_shape else " objects?")
    choices = [*names, "the same"]
    answer = choices[right]
    rng.shuffle(choices)
    return Problem("comparing", question, tuple(choices), choices.index(answer), scene)


# ---- Files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Where one generated world goes and what it is made of."""

    folder: Path
    seed: int
    sizes: Sizes

    def stream(self, split: str, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{split}/{purpose}")

    def count(self, split: str) -> int:
        return {"train": self.sizes.train, "val": self.sizes.val, "test": self.sizes.test}[split]


def save_picture(picture: Image.Image, path: Path) -> None:
    picture.save(path, compress_level=1)  # about as small as level 6 on flat colours, and faster


def save_text(text: str, path: Path) -> None:
    """Plainly, not by way of a temporary name: the whole folder is renamed once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def save_list(rows: list[dict[str, Any]], path: Path) -> None:
    """A JSON list, a row to a line."""
    save_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", path)


def save_mapping(value: dict[str, Any], path: Path) -> None:
    """A JSON object, an entry to a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
    save_text("{\n" + ",\n".join(lines) + "\n}\n", path)


def llava_row(name: str, image: str | None, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One row of LLaVA training JSON from (prompt, answer) pairs; the picture opens the first prompt."""
    row: dict[str, Any] = {"id": name}
    mark = ""
    if image is not None:
        row["image"] = image
        mark = "<image>\n"
    row["conversations"] = []
    for prompt, answer in turns:
        row["conversations"] += [{"from": "human", "value": mark + prompt}, {"from": "gpt", "value": answer}]
        mark = ""
    return row


def instruction_row(name: str, image: str | None, turns: list[Question]) -> dict[str, Any]:
    row = llava_row(name, image, [(turn.text + BRIEFLY, turn.answer) for turn in turns])
    return row | {"skills": [turn.skill for turn in turns]}


def write_simple(world: World) -> None:
    """Pictures of a single thing, each with its caption and, in another file, with a question."""
    scenes, drawing, asking = (world.stream("simple", purpose) for purpose in ("scenes", "drawing", "asking"))
    pictures = world.folder / "images" / "simple"
    pictures.mkdir(parents=True)
    captions, questions = [], []
    for number in range(world.sizes.simple):
        scene = simple_scene(scenes)
        name = f"simple_{number:06d}"
        save_picture(draw_scene(scene, drawing), pictures / f"{name}.png")
        image = f"images/simple/{name}.png"
        captions.append(llava_row(name, image, [(DESCRIBE, caption(scene))]))
        questions.append(instruction_row(name, image, conversation(scene, asking)))
    save_list(captions, world.folder / "train_simple.json")
    save_list(questions, world.folder / "train_simple_questions.json")


def write_train(world: World) -> None:
    """The train pictures, described, named, asked for places and in conversations, and rows without one."""
    scenes, drawing, asking = (world.stream("train", purpose) for purpose in ("scenes", "drawing", "asking"))
    pictures = world.folder / "images" / "train"
    pictures.mkdir(parents=True)
    naming, placing = world.stream("train", "naming"), world.stream("train", "placing")
    transcripts, captions, named, placed, instructions = [], [], [], [], []
    for number in range(world.sizes.train):
        scene = sign_scene(scenes, held=False) if scenes.random() < 1 / 3 else object_scene(scenes)
        name = f"train_{number:06d}"
        save_picture(draw_scene(scene, drawing), pictures / f"{name}.png")
        image = f"images/train/{name}.png"
        transcripts.append(llava_row(name, image, [(TRANSCRIBE, cells(scene))]))
        captions.append(llava_row(name, image, [(DESCRIBE, caption(scene))]))
        named.append(llava_row(name, image, [(NAME, names(scene, naming))]))
        if scene.objects:
            placed.append(instruction_row(f"{name}_places", image, places(scene, placing)))
        for which in ("a", "b"):
            instructions.append(instruction_row(f"{name}_{which}", image, conversation(scene, asking)))

    chatting = world.stream("train", "text")
    for number in range(world.sizes.text):
        turns = [text_question(chatting, held=False) for _ in range(chatting.randint(1, 3))]
        instructions.append(instruction_row(f"text_{number:06d}", None, turns))
    world.stream("train", "order").shuffle(instructions)

    save_list(transcripts, world.folder / "train_cells.json")
    save_list(captions, world.folder / "train_captions.json")
    save_list(named, world.folder / "train_names.json")
    save_list(placed, world.folder / "train_places.json")
    save_list(instructions, world.folder / "train_instructions.json")


def write_reading(world: World, split: str) -> None:
    """Signs in the layout of TextVQA 0.5.1."""
    rng = world.stream(split, "reading")
    rows = []
    for number in range(world.count(split)):
        scene = sign_scene(rng, held=True)
        image = f"{split}_reading_{number:05d}"
        save_picture(draw_scene(scene, rng), world.folder / "images" / split / f"{image}.png")
        question = rng.choice(READING_QUESTIONS)
        rows.append(
            {
                "question_id": question_number(split, "reading", number),
                "image_id": image,
                "question": question,
                "question_tokens": question.lower().rstrip("?").split(),
                "image_classes": [],
                "image_width": SIDE,
                "image_height": SIDE,
                "answers": ten_answers(scene.word, rng),
                "set_name": split,
            }
        )
    head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    save_mapping(head | {"data": rows}, world.folder / "textvqa" / f"TextVQA_0.5.1_{split}.json")


def write_gqa(world: World, split: str, skill: str) -> None:
    """One skill in the layout of GQA's question files: colour, shape or place."""
    rng = world.stream(split, skill)
    rows = {}
    for number in range(world.count(split)):
        scene, question = scene_for(rng, skill)
        image = f"{split}_{skill}_{number:05d}"
        save_picture(draw_scene(scene, rng), world.folder / "images" / split / f"{image}.png")
        name = str(question_number(split, skill, number))
        rows[name] = {
            "semantic": [
                {"operation": "select", "dependencies": [], "argument": question.about},
                {"operation": "query", "dependencies": [0], "argument": skill},
            ],
            "entailed": [],
            "equivalent": [name],
            "question": question.text,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": skill, "local": f"{question.about}-{skill}"},
            "answer": question.answer,
            "semanticStr": f"select: {question.about}->query: {skill} [0]",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": skill, "semantic": "attr", "structural": "query"},
            "fullAnswer": full_answer(question),
        }
    save_mapping(rows, world.folder / "gqa" / f"{skill}_{split}_questions.json")


def scene_for(rng: random.Random, skill: str) -> tuple[Scene, Question]:
    """A scene of objects with a question of this skill that has one right answer."""
    while True:
        scene = object_scene(rng)
        cells = rng.sample(sorted(scene.objects), len(scene.objects))
        for question in (q for cell in cells for q in questions_about(scene, cell)):
            if question.skill == skill:
                return scene, question


def full_answer(question: Question) -> str:
    """GQA's answer in a sentence."""
    between = {"colour": "is", "shape": "is a", "place": "is in"}[question.skill]
    return f"The {question.about} {between} {question.answer}."


def question_number(split: str, task: str, number: int) -> int:
    """A number no other question of the world has."""
    tasks = ("reading", "colour", "shape", "place", "text")
    return ("val", "test").index(split) * 1_000_000 + (tasks.index(task) + 1) * 100_000 + number


def write_text(world: World, split: str) -> None:
    """Questions without pictures, in LLaVA's question JSONL with the answer inside."""
    rows = [
        {
            "question_id": question_number(split, "text", number),
            "text": question.text,
            "answer": question.answer,
            "category": question.skill,
        }
        for number, question in enumerate(text_questions(world.stream(split, "text"), world.count(split)))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    save_text(lines, world.folder / "text" / f"questions_{split}.jsonl")


def write_iconqa(world: World) -> None:
    """Problems whose answer is the text of one of the choices."""

    def prompt(problem: Problem) -> str:
        return f"{problem.question}\nChoices: {', '.join(problem.choices)}{ONE_CHOICE}"

    write_problems(world, "iconqa", prompt, lambda problem: problem.choices[problem.answer])


def write_letters(world: World) -> None:
    """Problems of the same kinds, drawn apart, whose answer is the letter of one of the options."""

    def prompt(problem: Problem) -> str:
        lettered = zip(LETTERS, problem.choices, strict=False)
        options = "\n".join(f"{letter}. {text}" for letter, text in lettered)
        return f"{problem.question}\n{options}{ONE_LETTER}"

    write_problems(world, "letters", prompt, lambda problem: LETTERS[problem.answer])


def write_problems(
    world: World, name: str, prompt: Callable[[Problem], str], answer: Callable[[Problem], str]
) -> None:
    """A downstream set as IconQA publishes choose_txt, and its train split as LLaVA training JSON.

    prompt and answer: what a training row of a problem says.
    """
    sizes = world.sizes
    counts = {"train": sizes.downstream_train, "val": sizes.downstream_val, "test": sizes.downstream_test}
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {}
    train = []
    for split, count in counts.items():
        rng = world.stream(split, name)
        here = splits[f"choose_txt_{split}"] = []
        for _ in range(count):
            problem = rng.choice((counting, comparing))(rng)
            pid = str(len(problems) + 1)
            here.append(pid)
            problems[pid] = {
                "question": problem.question,
                "choices": list(problem.choices),
                "answer": problem.answer,
                "ques_type": "choose_txt",
                "grade": "prek",
                "label": problem.skill,
            }
            relative = f"{name}/iconqa/{split}/choose_txt/{pid}"
            place = world.folder / relative
            place.mkdir(parents=True)
            save_picture(draw_scene(problem.scene, rng), place / "image.png")
            save_mapping(problems[pid], place / "data.json")
            if split == "train":
                turns = [(prompt(problem), answer(problem))]
                row = llava_row(f"{name}_{pid}", f"{relative}/image.png", turns)
                train.append(row | {"skills": [problem.skill]})

    save_mapping(problems, world.folder / name / "problems.json")
    save_mapping(splits, world.folder / name / "pid_splits.json")
    skills = {pid: [problem["label"]] for pid, problem in problems.items()}
    save_mapping(skills, world.folder / name / "pid2skills.json")
    save_list(train, world.folder / f"train_{name}.json")


def annotation_files(folder: Path) -> list[Path]:
    """The files of questions and answers: all JSON at the top and one folder down."""
    return sorted([*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob("*/*.jsonl")])


def generate(folder: Path, seed: int = 0, sizes: Sizes = FULL_SIZES) -> None:
    """Writes the tiny world of this seed and these sizes to `folder`, which must not hold anything else.

    A world that is there already is left alone. The files grow in `folder`.partial, which is renamed at the
    end, so a world is whole or absent. Raises UserError where `folder` holds something else or cannot be
    written.
    """
    stamp = {"version": VERSION, "seed": seed, "sizes": asdict(sizes)}
    if folder.exists():
        if holds(folder, stamp):
            print(f"{folder} holds this world already; nothing to do.")
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(
                "holds something else than this world",
                where=folder,
                mend="Give another folder, or delete this one.",
            )
        folder.rmdir()

    partial = folder.with_name(folder.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left by a run that was interrupted
        write_world(World(partial, seed, sizes), stamp)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=folder) from error


def write_world(world: World, stamp: dict[str, Any]) -> None:
    """Everything that belongs to a world, its stamp last."""
    folder = world.folder
    write_simple(world)
    write_train(world)
    for split in ("val", "test"):
        (folder / "images" / split).mkdir()
        write_reading(world, split)
        for skill in ("colour", "shape", "place"):
            write_gqa(world, split, skill)
        write_text(world, split)
    write_iconqa(world)
    write_letters(world)
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in annotation_files(folder)
    }
    pictures = sum(1 for _ in folder.rglob("*.png"))
    save_mapping(stamp | {"pictures": pictures, "sha256": hashes}, folder / "world.json")


def holds(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether `folder` is stamped as a world of this version, seed and sizes."""
    if not (folder / "world.json").is_file():
        return False
    found = read_json(folder / "world.json")
    return isinstance(found, dict) and all(found.get(key) == value for key, value in stamp.items())


# ---- Chance -------------------------------------------------------------------------------------------


def chance(folder: Path) -> dict[str, float]:
    """Percent right of the best guess on each task's test split that looks at neither picture nor question.

    That guess is the most frequent answer, and for tiny_iconqa, where the choices are given, the better of
    that and a random choice.
    """
    signs = read_json(folder / "textvqa" / "TextVQA_0.5.1_test.json")["data"]
    given = [[answer.strip().lower() for answer in sign["answers"]] for sign in signs]
    answers = {"tiny_reading": [most_frequent(ten)[0] for ten in given]}
    for skill in ("colour", "shape", "place"):
        questions = read_json(folder / "gqa" / f"{skill}_test_questions.json").values()
        answers[f"tiny_{skill}"] = [question["answer"] for question in questions]
    answers["tiny_text"] = [row["answer"] for _, row in read_jsonl(folder / "text" / "questions_test.jsonl")]
    problems = test_problems(folder / "iconqa")
    answers["tiny_iconqa"] = [problem["choices"][problem["answer"]] for problem in problems]
    answers["tiny_letters"] = [LETTERS[problem["answer"]] for problem in test_problems(folder / "letters")]

    percent = {task: 100 * most_frequent(right)[1] / len(right) for task, right in answers.items()}
    random_choice = 100 * sum(1 / len(problem["choices"]) for problem in problems) / len(problems)
    percent["tiny_iconqa"] = max(percent["tiny_iconqa"], random_choice)
    return percent


def test_problems(folder: Path) -> list[dict[str, Any]]:
    """The test split of a downstream set."""
    problems = read_json(folder / "problems.json")
    return [problems[pid] for pid in read_json(folder / "pid_splits.json")["choose_txt_test"]]


def most_frequent(values: Iterable[str]) -> tuple[str, int]:
    """The most frequent value and how often it comes."""
    return Counter(values).most_common(1)[0]
