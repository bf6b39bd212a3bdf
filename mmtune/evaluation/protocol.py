"""Protocols (eval/*.yaml) and suites (eval/suites/*.yaml): what a benchmark asks, how, and how it is scored.

The prompt is part of the score, so a protocol is a file and its hash is stamped into each result.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any, Literal

from mmtune.core.config import Report, Source, parse, parse_named, to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import share
from mmtune.core.table import nearest
from mmtune.data.chat import IMAGE, Turn
from mmtune.evaluation.metrics import FORMATS
from mmtune.evaluation.metrics.base import Question
from mmtune.evaluation.question_files import asked_from
from mmtune.evaluation.score import find_rule, read_questions

_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
PLACEHOLDERS = ("question", "question_capitalised", "choices", "options", "context", "ocr")


@dataclass(frozen=True)
class Protocol:
    """A benchmark.

    prompt: {question}, {choices} (texts with commas between) and {options} (lines `A. text`, or `A. <image>`
    where options are pictures) are filled in, {question_capitalised} as LLaVA's files have it (a capital, all
    else small), {context}: a line `Context: text` with its line break where a question has a context,
    otherwise nothing, and {ocr}, the picture's OCR tokens with commas between.
    annotations: the annotation file of each split; images: the pictures' folder; both relative to the
    data's root. report_split: the split whose score is reported: the test split, or the validation split
    where the test answers are not public. An annotation file may be a folder where the format reads one.
    options: further arguments of the format's reader, in which
    {split} is filled in. stop: strings at which a generated answer is cut; what it says from there on is
    left out. decode: `generate` asks for an answer in the model's own words, `likelihood` takes the choice
    that the model finds likeliest as the answer. options_as: what then stands for a choice, its letter or its
    text; by default its letter where the prompt shows lettered {options}. expect: how many questions the
    official file of a split gives. question_files: in place of a prompt, the file of each split that holds
    the whole prompt of every question, as LLaVA's do, relative to the root.
    """

    task: str
    about: str
    format: str
    rule: str
    max_new_tokens: int
    root: Path
    annotations: dict[str, str]
    prompt: str = ""
    report_split: str = "test"
    images: str = "."
    options: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    decode: Literal["generate", "likelihood"] = "generate"
    options_as: Literal["letter", "text"] | None = None
    expect: dict[str, int] = field(default_factory=dict)
    question_files: dict[str, str] = field(default_factory=dict)

    def check(self, fault: Report) -> None:
        if not _NAME.fullmatch(self.task):
            fault("task", f"'{self.task}' is no name", "Use letters, digits, - and _: files are named by it.")
        if self.format not in FORMATS.names():
            fault(
                "format", f"unknown annotation format '{self.format}'", nearest(self.format, FORMATS.names())
            )
            return
        try:
            find_rule(self)
        except UserError as error:
            fault("rule", error.faults[0].what, error.faults[0].mend)
        if self.report_split not in self.annotations:
            known = ", ".join(sorted(self.annotations))
            fault(
                "report_split", f"there are no annotations of split '{self.report_split}'", f"Known: {known}."
            )
        if "" in self.stop:
            fault("stop", "an empty string would end every answer before it begins", "Leave it out.")
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            fault("prompt", f"its braces don't match: {error}", "Write a brace that is meant as {{ or }}.")
            return
        for name in names:
            if name not in PLACEHOLDERS:
                fault("prompt", f"unknown placeholder {{{name}}}", nearest(name, list(PLACEHOLDERS)))
        if "ocr" in names and "ocr" not in self.options:
            fault(
                "prompt",
                "{ocr} is asked, but no file of OCR tokens is named",
                "Name it: options: {ocr: FILE}.",
            )
        if "options" in names and FORMATS.load(self.format).METRIC == "soft_accuracy":
            what = (
                f"its {{options}} ask for a letter, but the rule '{self.rule}' makes nothing of the letter A"
            )
            fault("prompt", what, "Ask for the answer in words.")
        if bool(self.prompt) == bool(self.question_files):
            both = "both are given" if self.prompt else "neither is given"
            fault(
                "prompt", f"the prompt comes from 'prompt' or from 'question_files', and {both}", "Give one."
            )
        elif self.question_files and self.report_split not in self.question_files:
            fault("question_files", f"there is none of the reporting split '{self.report_split}'", "Name it.")
        for key in ("expect", "question_files"):
            for split in getattr(self, key).keys() - self.annotations.keys():
                fault(f"{key}.{split}", "there are no annotations of this split", "Leave it out.")

    def for_split(self, split: str) -> Protocol:
        """The same protocol with {split} filled in. Raises UserError for a split it does not have."""
        if split not in self.annotations:
            known = ", ".join(sorted(self.annotations))
            raise UserError(f"task '{self.task}' has no split '{split}'", mend=f"Known: {known}.")
        filled = {
            k: v.replace("{split}", split) if isinstance(v, str) else v for k, v in self.options.items()
        }
        return replace(self, options=filled)

    def questions(self, split: str | None = None, root: Path | None = None) -> tuple[list[Question], Path]:
        """The questions of a split, the reporting one by default, and the file they come from.

        Raises UserError where it is missing.
        """
        split = split or self.report_split
        file = (root or self.root) / self.for_split(split).annotations[split]
        if not file.exists():
            raise UserError("no such annotation file", where=file, mend=self._where_it_comes_from())
        questions = read_questions(self.for_split(split), file)
        if self.question_files:
            questions = asked_from(self.question_file(split, root), questions)
        asked = self.for_split(split)
        for question in questions:  # what cannot be asked is said before a model is loaded
            asked.turns(question)
        return questions, file

    def _where_it_comes_from(self) -> str:
        prepare = f"mmtune data prepare {self.root.name}"
        if self.task.startswith("tiny_"):
            return f"{prepare} makes the tiny world."
        known = (share("data") / "originals" / f"{self.root.name}.yaml").is_file()
        return "Where does the data lie? Say --data_root DIR." + (
            f" {prepare} says where to get it." if known else ""
        )

    def question_file(self, split: str, root: Path | None = None) -> Path:
        """The file that holds the prompts of a split. Raises UserError where none is named."""
        if split not in self.question_files:
            known = ", ".join(sorted(self.question_files))
            raise UserError(
                f"task '{self.task}' has no question file of split '{split}'", mend=f"Known: {known}."
            )
        return (root or self.root) / self.question_files[split]

    def asked_by(self, file: Path, split: str | None = None) -> Protocol:
        """The same benchmark, its prompts from a question file instead: another protocol, another hash."""
        return replace(self, prompt="", question_files={split or self.report_split: str(file.resolve())})

    def files(self, split: str, root: Path | None = None) -> list[Path]:
        """What the questions of a split and their prompts are made of, the annotations first."""
        filled = self.for_split(split)
        annotations = (root or self.root) / self.annotations[split]
        scorer = FORMATS.load(self.format)
        beside = scorer.files(annotations, **filled.options) if hasattr(scorer, "files") else []
        problems = sorted(
            annotations.rglob("*.json")
        )  # where the annotations are a folder, as IconQA's may be
        own = problems if annotations.is_dir() else [annotations]
        return [*own, *beside, *([self.question_file(split, root)] if self.question_files else [])]

    def other_count(self, split: str, n: int) -> str | None:
        """A warning where `n` is not the number of questions that the split's official file has."""
        expected = self.expect.get(split, n)
        return (
            None
            if n == expected
            else f"{self.task}: {n} questions, the official {split} file gives {expected}"
        )

    def turns(self, question: Question) -> list[Turn]:
        """What the model is asked: the picture, if there is one, and the filled-in prompt.

        An option that is a picture stands as `A. <image>`. Raises UserError for a question whose own text
        holds `<image>`: there is no picture for that one; where a picture would not be shown; and where the
        text or the OCR tokens that the prompt wants were not in the files.
        """
        where = f"task {self.task}, question {question.id}"
        texts = (self.prompt, question.text, question.context, *question.choices, *(question.ocr or ()))
        if question.asked is not None:
            texts = (question.asked,)
        if any(IMAGE in text for text in texts):
            raise UserError(
                f"its text holds {IMAGE}, which stands for a picture",
                where=where,
                mend="Spell it in another way in the annotation file.",
            )
        if "{question" in self.prompt and not question.text:
            raise UserError(
                "it has no text", where=where, mend="Put the questions file beside the annotation file."
            )
        if "{ocr}" in self.prompt and question.ocr is None:
            raise UserError(
                "its picture has no OCR tokens",
                where=where,
                mend=f"Put {self.options.get('ocr')} beside the annotation file.",
            )
        shown = [IMAGE] * len(question.choice_images) or question.choices
        options = "\n".join(f"{mark}. {text}" for mark, text in zip(ascii_uppercase, shown, strict=False))
        text = question.asked or self.prompt.format(
            question=question.text,
            question_capitalised=question.text.capitalize(),
            choices=", ".join(shown),
            options=options,
            context=f"Context: {question.context}\n" if question.context else "",
            ocr=", ".join(question.ocr or ()),
        )
        if text.count(IMAGE) != len(question.choice_images):
            raise UserError(
                f"{text.count(IMAGE)} of its options' {len(question.choice_images)} pictures would be shown",
                where=where,
                mend="Where options are pictures, the prompt shows them by {options}, once.",
            )
        return [Turn("user", f"{IMAGE}\n{text}" if question.image else text)]

    def candidates(self, question: Question) -> list[str]:
        """What is said for each choice where likelihood decides, in their order.

        Raises UserError for a question that has no choices.
        """
        if not question.choices:
            raise UserError(
                "it has no choices, so no likelihood can decide between them",
                where=f"task {self.task}, question {question.id}",
                mend="Let it be answered in words: decode: generate.",
            )
        shown = "letter" if "{options}" in self.prompt or question.choice_images else "text"
        lettered = (self.options_as or shown) == "letter"
        return list(ascii_uppercase[: len(question.choices)] if lettered else question.choices)

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the SHA-256 of all that decides the score; where files lie does not."""
        indifferent = ("root", "about", "report_split", "expect")
        described = {name: value for name, value in to_dict(self).items() if name not in indifferent}
        # Which question file it is counts, not where it lies; what is in it is in the hash of the data.
        described["question_files"] = {split: Path(file).name for split, file in self.question_files.items()}
        # These came later: where they say nothing, hashes stay as they were.
        for name in ("stop", "decode", "options_as", "question_files"):
            if described.get(name) in ([], {}, "generate"):
                del described[name]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SuiteFile:
    """A suite as its YAML has it: each entry is a task's name, or the path of a protocol of one's own."""

    name: str
    source: list[str]
    target: list[str]

    def check(self, fault: Report) -> None:
        seen: set[str] = set()
        for key in ("source", "target"):
            if not getattr(self, key):
                fault(key, "an empty list", "A suite needs at least one source and one target task.")
            for i, task in enumerate(getattr(self, key)):
                name = task
                if is_path(task):
                    try:
                        name = load_protocol(task).task
                    except UserError as error:
                        for each in error.faults:
                            fault(f"{key}.{i}", f"{each.where}: {each.what}", each.mend)
                        continue
                elif task not in task_names():
                    fault(f"{key}.{i}", f"unknown task '{task}'", nearest(task, task_names()))
                if name in seen:
                    fault(f"{key}.{i}", f"task '{name}' is given twice", "Keep one of the two.")
                seen.add(name)


@dataclass(frozen=True)
class Suite:
    """Tasks the model could do before (source) and the ones it is tuned for (target), by their names.

    files: the protocol's path of each task that is the user's own. path: the suite's own, where it is.
    """

    name: str
    source: list[str]
    target: list[str]
    files: dict[str, str] = field(default_factory=dict)
    path: str | None = None

    @property
    def tasks(self) -> list[str]:
        """All of them, source first."""
        return [*self.source, *self.target]

    @property
    def given(self) -> list[str]:
        """All of them as `load_protocol` takes them: by name, the user's own by path."""
        return [self.files.get(task, task) for task in self.tasks]

    def folder(
        self, split: str | None = None, restored: str | None = None, scale: float | None = None
    ) -> Path:
        """Where the suite's evaluation lies under a run: eval/SUITE-SPLIT.

        Where each task is asked on its own reporting split (`split` is None) it is eval/SUITE-test.
        With a part put back as in the base it is eval/SUITE-SPLIT-restore-PART, and a part of the way from
        the base eval/SUITE-SPLIT-scale-S.
        """
        name = f"{self.name}-{split or 'test'}" + (f"-restore-{restored}" if restored else "")
        return Path("eval") / (name + ("" if scale is None else f"-scale-{scale:g}"))


def task_names() -> list[str]:
    return sorted(path.stem for path in share("eval").glob("*.yaml"))


def is_path(name: str) -> bool:
    """Whether a task or a suite is given by the path of its YAML, not by its name."""
    return name.endswith((".yaml", ".yml"))


def load_protocol(task: str) -> Protocol:
    """A task's protocol by name, or from a YAML file of the user's own.

    Raises UserError, which lists the known names, or names the file.
    """
    protocol: Protocol
    if not is_path(task):
        protocol = parse_named(Protocol, "task", share("eval"), task, "task")
        return protocol
    source = Source(Path(task))
    protocol = parse(Protocol, source)
    shipped = share("eval") / f"{protocol.task}.yaml"
    if shipped.is_file() and not shipped.samefile(task):
        raise UserError(
            f"it calls itself '{protocol.task}', which is a task of mmtune's own",
            where=source.where(("task",)),
            mend="Give it a name of its own: results are told apart by it.",
        )
    return protocol


def load_suite(name: str) -> Suite:
    """A suite by name, or from a YAML file of the user's own. Raises UserError."""
    found: SuiteFile
    if is_path(name):
        found = parse(SuiteFile, Source(Path(name)))
    else:
        found = parse_named(SuiteFile, "suite", share("eval") / "suites", name)
    names = {task: load_protocol(task).task for task in [*found.source, *found.target] if is_path(task)}
    return Suite(
        found.name,
        [names.get(task, task) for task in found.source],
        [names.get(task, task) for task in found.target],
        files={own: path for path, own in names.items()},
        path=name if is_path(name) else None,
    )
