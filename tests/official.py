"""Small stand-ins of the real benchmarks, in the official layouts, for tests without the real files.

`make(folder, seed)` writes what a user has after downloading and unpacking: folder/iconqa, textvqa, okvqa,
ocrvqa, gqa, coco, llava_pretrain and llava_instruct, with the published file names and fields, and a few
dozen questions about drawn discs.
Nothing of it is copied from the sets. Their counts are not the official ones: prepare them with --partial.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 80, 230), "black": (20, 20, 20)}
WORDS = ("STOP", "BAR", "EXIT", "TEA", "OPEN")
NUMBERS = ("one", "two", "three", "four", "five")
SKILLS = ("counting", "scene")
SIDE = 96


@dataclass(frozen=True)
class Scene:
    """So many discs of one colour and a word beneath them."""

    count: int
    colour: str
    word: str

    def draw(self, path: Path) -> None:
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        pencil = ImageDraw.Draw(picture)
        for place in range(self.count):
            x, y = 8 + place % 3 * 28, 8 + place // 3 * 28
            pencil.ellipse((x, y, x + 22, y + 22), fill=COLOURS[self.colour])
        pencil.text((8, SIDE - 26), self.word, fill=(40, 40, 40), font=ImageFont.load_default(20))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    @property
    def caption(self) -> str:
        discs = "disc" if self.count == 1 else "discs"
        return f"{NUMBERS[self.count - 1].capitalize()} {self.colour} {discs} above the word {self.word}."


def make(folder: Path, seed: int = 0) -> None:
    """Writes all eight sets under `folder`; the same seed writes the same files."""
    for name, write in SETS.items():
        write(folder / name, random.Random(f"{seed}/{name}"))


def _scene(rng: random.Random) -> Scene:
    return Scene(rng.randint(1, 5), rng.choice(sorted(COLOURS)), rng.choice(WORDS))


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# ---- IconQA -------------------------------------------------------------------------------------------


def iconqa(folder: Path, rng: random.Random) -> None:
    """problems.json, pid_splits.json, pid2skills.json and iconqa/SPLIT/TASK/PID with its pictures."""
    sizes = {"train": 24, "val": 6, "test": 12}
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {}
    for split, size in sizes.items():
        for task in ("choose_img", "choose_txt", "fill_in_blank"):
            pids = [str(len(problems) + place) for place in range(size)]
            splits[f"{task}_{split}"] = pids
            for pid in pids:
                problems[pid] = _problem(task, folder / "iconqa" / split / task / pid, rng)
            if split != "test":
                splits[f"{task}_mini{split}"] = pids[: size // 3]
    _json(folder / "problems.json", problems)
    _json(folder / "pid_splits.json", splits)
    _json(folder / "pid2skills.json", {pid: [SKILLS[int(pid) % 2]] for pid in problems})


def _problem(task: str, folder: Path, rng: random.Random) -> dict[str, Any]:
    scene = _scene(rng)
    scene.draw(folder / "image.png")
    problem: dict[str, Any]
    described = {"ques_type": task, "grade": "prek", "label": "A1"}
    if task == "fill_in_blank":
        problem = {"question": "How many discs are there? (_)", "answer": str(scene.count), **described}
    elif task == "choose_txt":
        choices = [str(count) for count in sorted(rng.sample(range(1, 6), 3))]
        if str(scene.count) not in choices:
            choices[rng.randrange(3)] = str(scene.count)
        answer = choices.index(str(scene.count))
        problem = {"question": "How many discs are there?", "choices": choices, "answer": answer, **described}
    else:
        counts = rng.sample(range(1, 6), rng.randint(2, 4))
        answer = rng.randrange(len(counts))
        if scene.count in counts:
            answer = counts.index(scene.count)
        else:
            counts[answer] = scene.count
        names = [f"choice_{place}.png" for place in range(len(counts))]
        for name, count in zip(names, counts, strict=True):
            Scene(count, scene.colour, "").draw(folder / name)
        question = "Which picture has as many discs?"
        problem = {"question": question, "choices": names, "answer": answer, **described}
    _json(folder / "data.json", problem)
    return problem


# ---- TextVQA ------------------------------------------------------------------------------------------


def textvqa(folder: Path, rng: random.Random) -> None:
    """TextVQA_0.5.1_SPLIT.json, their Rosetta files, and train_images, which holds val's pictures too."""
    questions = iter(range(10_000))
    for split, size in {"train": 12, "val": 8}.items():
        rows: list[dict[str, Any]] = []
        tokens: list[dict[str, Any]] = []
        for place in range(size):
            scene, image_id = _scene(rng), f"{split[0]}{place:015x}"
            scene.draw(folder / "train_images" / f"{image_id}.jpg")
            tokens.append({"image_id": image_id, "ocr_tokens": [scene.word], "ocr_info": []})
            asked = {"what does the sign say?": scene.word, "What colour are the Discs?": scene.colour}
            for question, answer in asked.items():
                rows.append(
                    {
                        "question": question,
                        "image_id": image_id,
                        "image_classes": ["Sign"],
                        "image_width": SIDE,
                        "image_height": SIDE,
                        "answers": [answer.lower()] * 6 + [f" {answer.capitalize()}"] * 2 + ["disc"] * 2,
                        "question_tokens": question.lower().rstrip("?").split(),
                        "question_id": next(questions),
                        "set_name": split,
                    }
                )
        head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        _json(folder / f"TextVQA_0.5.1_{split}.json", {**head, "data": rows})
        _json(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {**head, "data": tokens})


# ---- OKVQA and COCO -----------------------------------------------------------------------------------

COCO_IMAGES = {"train": range(9, 29), "val": range(42, 62)}


def _coco_scene(image_id: int) -> Scene:
    """The same picture for COCO and for OKVQA, which asks about it."""
    return _scene(random.Random(image_id))


def okvqa(folder: Path, rng: random.Random) -> None:
    """Questions and annotations of both splits. The pictures are COCO's."""
    for split, images in COCO_IMAGES.items():
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in images[:10]:
            scene = _coco_scene(image_id)
            asked = {
                "What is done at a place with this sign?": ("waiting", "wait"),
                "Which colour has the paint?": (scene.colour, scene.colour),
            }
            for place, (question, (raw, stemmed)) in enumerate(asked.items()):
                question_id = image_id * 10 + place
                named = {"image_id": image_id, "question_id": question_id}
                questions.append({**named, "question": question})
                annotations.append(
                    {
                        **named,
                        "answer_type": "other",
                        "question_type": rng.choice(("one", "four")),
                        "confidence": 3,
                        "answers": [
                            {
                                "answer_id": number + 1,
                                "answer": stemmed if number < 6 else "no",
                                "raw_answer": raw if number < 6 else "no",
                                "answer_confidence": "yes",
                            }
                            for number in range(10)
                        ],
                    }
                )
        head = {"info": {"version": "1.1"}, "license": {}, "data_subtype": f"{split}2014"}
        _json(folder / f"OpenEnded_mscoco_{split}2014_questions.json", {**head, "questions": questions})
        _json(folder / f"mscoco_{split}2014_annotations.json", {**head, "annotations": annotations})


def coco(folder: Path, rng: random.Random) -> None:
    """Karpathy's dataset_coco.json and the pictures of 2014, five captions to a picture."""
    rows: list[dict[str, Any]] = []
    sentences = iter(range(10_000))
    for official, images in COCO_IMAGES.items():
        for place, image_id in enumerate(images):
            scene = _coco_scene(image_id)
            name = f"COCO_{official}2014_{image_id:012d}.jpg"
            scene.draw(folder / f"{official}2014" / name)
            # Karpathy drew val and test out of COCO's val and left the rest for training.
            split = "train" if official == "train" else ("test", "test", "val", "restval")[place % 4]
            several = [scene.caption, scene.caption.lower(), f"A picture of {scene.count} discs"]
            several += [f"{scene.colour.capitalize()} discs.", f"The word {scene.word} below some discs."]
            ids = [next(sentences) for _ in several]
            rows.append(
                {
                    "filepath": f"{official}2014",
                    "filename": name,
                    "imgid": len(rows),
                    "split": split,
                    "sentids": ids,
                    "sentences": [
                        {
                            "tokens": raw.lower().strip(".").split(),
                            "raw": raw,
                            "imgid": len(rows),
                            "sentid": i,
                        }
                        for i, raw in zip(ids, several, strict=True)
                    ],
                    "cocoid": image_id,
                }
            )
    rng.shuffle(rows)
    _json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})


# ---- OCR-VQA ------------------------------------------------------------------------------------------


def ocrvqa(folder: Path, rng: random.Random) -> None:
    """dataset.json and a cover for each book; the last one's is no .jpg."""
    books: dict[str, Any] = {}
    for split, size in {1: 10, 2: 4, 3: 8}.items():
        for place in range(size):
            scene = _scene(rng)
            name, kind = f"{split}{place:09d}", "png" if place == size - 1 else "jpg"
            scene.draw(folder / "images" / f"{name}.{kind}")
            books[name] = {
                "imageURL": f"http://ecx.images-amazon.com/images/I/{name}.{kind}",
                "questions": ["What is the title of this book?", "Is this a book about discs?"],
                "answers": [f"{scene.word.capitalize()}, & {scene.count} Discs", "Yes"],
                "title": scene.word.capitalize(),
                "authorName": "",
                "genre": rng.choice(("Travel", "Calendars")),
                "split": split,
            }
    _json(folder / "dataset.json", books)


# ---- GQA ----------------------------------------------------------------------------------------------


def gqa(folder: Path, rng: random.Random) -> None:
    """The balanced questions of three splits and images."""
    for number, (split, size) in enumerate({"train": 12, "val": 5, "testdev": 8}.items()):
        questions: dict[str, Any] = {}
        for place in range(size):
            scene, image_id = _scene(rng), str(2_300_000 + 1_000 * number + place)
            scene.draw(folder / "images" / f"{image_id}.jpg")
            red = "yes" if scene.colour == "red" else "no"
            asked = {
                "What color are the discs?": (scene.colour, "query", f"The discs are {scene.colour}."),
                "Are the discs red?": (red, "verify", f"{red.capitalize()}."),
            }
            for question, (answer, kind, sentence) in asked.items():
                identity = f"{number + 1:02d}{len(questions):07d}"
                questions[identity] = {
                    "semantic": [],
                    "entailed": [identity],
                    "equivalent": [identity],
                    "question": question,
                    "imageId": image_id,
                    "isBalanced": True,
                    "groups": {"global": None, "local": None},
                    "answer": answer,
                    "semanticStr": "",
                    "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
                    "types": {"detailed": "colour", "semantic": "attr", "structural": kind},
                    "fullAnswer": sentence,
                }
        _json(folder / f"{split}_balanced_questions.json", questions)


# ---- LLaVA's training data ----------------------------------------------------------------------------


def _asked(question: str, answer: str, *more: str) -> list[dict[str, str]]:
    """A conversation in LLaVA's format, the human first."""
    return [
        {"from": ("human", "gpt")[place % 2], "value": value}
        for place, value in enumerate((question, answer, *more))
    ]


def llava_pretrain(folder: Path, rng: random.Random) -> None:
    """blip_laion_cc_sbu_558k.json and images; the picture stands before or after the request."""
    rows = []
    for place in range(24):
        scene, name = _scene(rng), f"{place:09d}"
        scene.draw(folder / "images" / name[:5] / f"{name}.jpg")
        request = ("<image>\nDescribe the image concisely.", "Give a brief description.\n<image>")[place % 2]
        turns = _asked(request, scene.caption.lower())
        rows.append({"id": name, "image": f"{name[:5]}/{name}.jpg", "conversations": turns})
    _json(folder / "blip_laion_cc_sbu_558k.json", rows)


FOLDERS = {
    "coco": "coco/train2017",
    "gqa": "gqa/images",
    "ocr_vqa": "ocr_vqa/images",
    "textvqa": "textvqa/train_images",
    "vg": "vg/VG_100K",
}


def llava_instruct(folder: Path, rng: random.Random) -> None:
    """llava_v1_5_mix665k.json and the pictures of its sets, with what is odd in it.

    A cover was saved as .gif, an id is there twice, a conversation starts with the assistant, and one without
    a picture speaks of `<image>`.
    """
    rows: list[dict[str, Any]] = []
    for place, where in enumerate(sorted(FOLDERS.values()) * 4):
        scene, name = _scene(rng), f"{place // 2:012d}"
        ending = "gif" if where == FOLDERS["ocr_vqa"] and place > 15 else "jpg"
        scene.draw(folder / where / f"{place:012d}.{ending}")
        turns = _asked("<image>\nWhich colour?", scene.colour, "Which word?", scene.word)
        rows.append({"id": name, "image": f"{where}/{place:012d}.jpg", "conversations": turns})
    (folder / "vg/VG_100K_2").mkdir(parents=True)
    late = [{"from": "gpt", "value": "As I said, yes."}, *_asked("Thanks. What is HTML?", "A language.")]
    rows.append({"id": "late_0", "model": "", "conversations": late})
    rows.append(
        {"id": "tag_0", "model": "", "conversations": _asked("What is <image> in SVG?", "An element.")}
    )
    _json(folder / "llava_v1_5_mix665k.json", rows)


SETS = {
    "iconqa": iconqa,
    "textvqa": textvqa,
    "okvqa": okvqa,
    "ocrvqa": ocrvqa,
    "gqa": gqa,
    "coco": coco,
    "llava_pretrain": llava_pretrain,
    "llava_instruct": llava_instruct,
}
