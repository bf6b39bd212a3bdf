"""What the tables of bad input share: a kind, and the place where its files are made and its command runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mmtune.data.samples import Sample, read_llava
from mmtune.parts.model import VisionLanguageModel
from tests import made_up_runs
from tests.world import run_file

TEXT_TASK = ["--tasks", "tiny_text"]


@dataclass
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


class Bench:
    """`world`: a small tiny world and its model, to be read. `here`: an empty folder for one kind's files."""

    def __init__(self, world: Path, here: Path) -> None:
        self.world = world
        self.here = here
        self.said = Said(0, "", "")

    def file(self, name: str, content: str | bytes = "") -> Path:
        """A file under `here`; a text is written as UTF-8, its line ends as they are."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def picture(self, name: str = "a.png", size: tuple[int, int] = (64, 64)) -> Path:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 30, 30)).save(path, format="PNG")
        return path

    def train(self, *overrides: object, **changes: Any) -> list[object]:
        """The command for a run of one step on the world's data; `changes` replace blocks of its YAML."""
        train = {"steps": 1, "batch_size": 2, **changes.pop("train", {})}
        path = run_file(self.world, self.here, "run", train=train, **changes)
        return ["train", path, *overrides]

    def yaml(self, text: str | bytes) -> list[object]:
        """The command for a run whose YAML is `text`."""
        return ["train", self.file("run.yaml", text)]

    def data(self, *rows: Any, name: str = "data.json", **changes: Any) -> list[object]:
        """A run of one step on these samples; the picture `a.png` lies beside them."""
        return self.written(json.dumps(list(rows)), name, **changes)

    def written(self, text: str | bytes, name: str = "data.json", **changes: Any) -> list[object]:
        """A run of one step on a data file that holds `text`."""
        self.picture()
        path = self.file(name, text)
        data = [{"path": str(path), "image_root": str(self.here)}]
        return self.train(**{"data": data, **changes})

    def model(self) -> Path:
        """A copy of the world's model, to be broken."""
        return Path(shutil.copytree(self.world / "base", self.here / "model"))

    def describe(self, **changes: Any) -> list[object]:
        """The evaluation of a copy of the model whose config.json says `changes`."""
        config = self.model() / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        return self.eval("model")

    def eval(self, model: str = "base", *options: object) -> list[object]:
        """The evaluation of two questions; `model` lies here, `base` in the world."""
        folder = (self.world if model == "base" else self.here) / model
        return [
            *("eval", "--model", folder, "--limit", 2, "--output_path", self.here / "out"),
            *(options if "--tasks" in options or "--suite" in options else (*TEXT_TASK, *options)),
        ]

    def cut(self, file: str, keep: float = 0.5) -> list[object]:
        """The evaluation of a copy of the model of which one file is cut short; `keep` 0 removes it."""
        path = self.model() / file
        if keep:
            os.truncate(path, int(path.stat().st_size * keep))
        else:
            path.unlink()
        return self.eval("model")

    def runs(self) -> tuple[Path, list[Path]]:
        """The evaluation of a base, and two finished runs, all made up."""
        base = made_up_runs.base_of(self.here)
        return base, made_up_runs.world(self.here, {"lora": (60, 50)}, [0, 1])

    def report(self, base: Path, runs: list[Path]) -> list[object]:
        return ["report", "--base", base, *runs, "--suite", "tiny", "--output_path", self.here / "report"]

    # ---- what a command that ended well is asked

    @cached_property
    def sample(self) -> Sample:
        """The first sample of the data file, as it was read."""
        (path,) = [path for path in self.here.glob("*.json*") if path.name.startswith("data")]
        return read_llava(path, self.here)[0]

    @cached_property
    def language(self) -> VisionLanguageModel:
        return VisionLanguageModel.from_pretrained(self.world / "base")


@dataclass(frozen=True)
class Kind:
    """One kind of bad input: its name, and the command, made on a bench.

    Either the command ends with 2 and a message that says `what`, `where` and how to `mend` it, or, where
    `then` is given, it ends with 0 and `then` holds: it was read rightly, or named as skipped.
    """

    name: str
    command: Callable[[Bench], list[object]]
    what: str = ""
    where: str = ""
    mend: str = ""
    then: Callable[[Bench], bool] | None = None


def sample(
    ask: str = "<image>\nHow many?", answer: str = "two", image: Any = "a.png", **changes: Any
) -> dict[str, Any]:
    """A row of a LLaVA training file; `image` or any other key of `changes` that is `...` is left out."""
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    row = {"id": "s1", "image": image, "conversations": turns, **changes}
    return {key: value for key, value in row.items() if value is not ...}


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    """A row without a picture in which these speak."""
    return sample(image=..., conversations=[{"from": who, "value": text} for who, text in said])
