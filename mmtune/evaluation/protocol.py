"""Protocols (eval/*.yaml) and suites (eval/suites/*.yaml): what a benchmark asks, how, and how it is scored.

The prompt is part of the score, so a protocol is a file and its hash is stamped into each result.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmtune.core.config import Source, parse, to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.core.table import nearest
from mmtune.data.chat import IMAGE, Turn
from mmtune.evaluation.metrics import FORMATS
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.score import find_rule, read_questions


@dataclass(frozen=True)
class Protocol:
    """A benchmark.

    prompt: {question}, {choices} (texts with commas between) and {options} (lines `A. text`) are filled in.
    annotations: the annotation file of each split; images: the pictures' folder; both relative to the
    data's root. options: further arguments of the format's reader, in which {split} is filled in.
    """

    task: str
    about: str
    format: str
    rule: str
    prompt: str
    max_new_tokens: int
    root: Path
    annotations: dict[str, str]
    images: str = "."
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, fault: Any) -> None:
        if self.format not in FORMATS.names():
            fault(
                "format", f"unknown annotation format '{self.format}'", nearest(self.format, FORMATS.names())
            )
            return
        try:
            find_rule(self)
        except UserError as error:
            fault("rule", error.faults[0].what, error.faults[0].mend)

    def for_split(self, split: str) -> Protocol:
        """The same protocol with {split} filled in. Raises UserError for a split it does not have."""
        if split not in self.annotations:
            known = ", ".join(sorted(self.annotations))
            raise UserError(f"task '{self.task}' has no split '{split}'", mend=f"Known: {known}.")
        filled = {
            k: v.replace("{split}", split) if isinstance(v, str) else v for k, v in self.options.items()
        }
        return replace(self, options=filled)

    def questions(self, split: str, root: Path | None = None) -> tuple[list[Question], Path]:
        """The questions of a split and the file they come from. Raises UserError where it is missing."""
        file = (root or self.root) / self.for_split(split).annotations[split]
        if not file.is_file():
            mend = "mmtune data prepare tiny makes the tiny world." if self.task.startswith("tiny_") else ""
            raise UserError(
                "no such annotation file",
                where=file,
                mend=mend or "Where does the data lie? Say --data_root DIR.",
            )
        return read_questions(self.for_split(split), file), file

    def turns(self, question: Question) -> list[Turn]:
        """What the model is asked: the picture, if there is one, and the filled-in prompt."""
        lettered = zip(ascii_uppercase, question.choices, strict=False)
        options = "\n".join(f"{letter}. {text}" for letter, text in lettered)
        text = self.prompt.format(
            question=question.text, choices=", ".join(question.choices), options=options
        )
        return [Turn("user", f"{IMAGE}\n{text}" if question.image else text)]

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of all that decides the score; where files lie does not."""
        described = {name: value for name, value in to_dict(self).items() if name not in ("root", "about")}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Suite:
    """Tasks the model could do before (source) and the ones it is tuned for (target)."""

    name: str
    source: list[str]
    target: list[str]

    def check(self, fault: Any) -> None:
        for key in ("source", "target"):
            for i, task in enumerate(getattr(self, key)):
                if task not in task_names():
                    fault(f"{key}.{i}", f"unknown task '{task}'", nearest(task, task_names()))


def task_names() -> list[str]:
    return sorted(path.stem for path in share("eval").glob("*.yaml"))


def load_protocol(task: str) -> Protocol:
    """A task's protocol by name. Raises UserError that lists the known ones."""
    if task not in task_names():
        raise UserError(f"unknown task '{task}'", mend=nearest(task, task_names()))
    return parse(Protocol, Source(share("eval") / f"{task}.yaml"))


def load_suite(name: str) -> Suite:
    """A suite by name, or from a YAML file of the user's own. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return parse(Suite, Source(Path(name)))
    folder = share("eval") / "suites"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown suite '{name}'", mend=nearest(name, known))
    return parse(Suite, Source(folder / f"{name}.yaml"))
