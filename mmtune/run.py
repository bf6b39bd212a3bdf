"""A whole run: its schema, put together from the parts' own options, and how its YAML is read. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import Report, Source, chosen_by, leaves, parse, presets_in, to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.core.table import allow, nearest
from mmtune.data.cards import load_card
from mmtune.data.chat import FORMATS
from mmtune.data.shards import hash_shards, is_shards, shard_files
from mmtune.parts.spec import PARTS, ModelOptions, quantization, saved_part
from mmtune.training.zero_json import json_faults
from mmtune.tuning.base import TUNERS
from mmtune.tuning.frozen import FrozenOptions
from mmtune.tuning.kl import KlOptions


@dataclass
class DataOptions:
    """Training data: a split of a card, or by `path` a LLaVA training file or webdataset shards of such rows.

    root: where the card's files lie, instead of the card's own. limit: the first so many samples.
    image_first: moves `<image>` to the front of its turn, as LLaVA-1.5 does with its data.
    """

    card: str | None = None
    split: str = "train"
    root: Path | None = None
    path: Path | None = None
    image_root: Path | None = None
    limit: int | None = None
    image_first: bool = False

    def check(self, fault: Report) -> None:
        if (self.card is None) == (self.path is None):
            fault("", "give either 'card' or 'path'")
            return
        if self.limit is not None and self.limit < 1:
            fault("limit", f"expected 1 or more, found {self.limit}")
        if self.card is not None:
            try:
                card = load_card(self.card)
            except UserError as error:
                fault("card", error.faults[0].what, error.faults[0].mend)
                return
            if self.split not in card.splits:
                mend = nearest(self.split, list(card.splits)) if card.splits else "It has none to train on."
                fault("split", f"the card {self.card} has no split '{self.split}'", mend)
                return
        file = self.file()
        key = "card" if self.card else "path"
        if is_shards(file):
            if self.image_root is not None:
                fault("image_root", "the pictures lie in the shards", "Leave image_root out.")
            try:
                shard_files(file)
            except UserError as error:
                for found in error.faults:
                    fault(key, found.what, found.mend, absent=True)
        elif not os.path.isfile(file):
            mend = f"It is {load_card(self.card).source}." if self.card else "Is the path right?"
            fault(key, f"there is no file {file}", mend, absent=True)

    def file(self) -> Path:
        """The LLaVA training file, or the shards' common name."""
        if self.path is not None:
            return self.path
        card = load_card(str(self.card))
        return (self.root or card.root) / card.splits[self.split]

    def images(self) -> Path:
        """The folder the file's picture paths are relative to."""
        if self.image_root is not None:
            return self.image_root
        if self.path is not None:
            return self.path.parent
        card = load_card(str(self.card))
        return (self.root or card.root) / card.images


@dataclass
class ReplayOptions:
    """Samples of other data, mixed into a stage's own so that the model goes on seeing what it knew.

    share: the fraction of an epoch's samples that are drawn from `data`; the stage's own are all kept.
    """

    data: list[DataOptions]
    share: float

    def check(self, fault: Report) -> None:
        if not self.data:
            fault("data", "an empty list: nothing would be replayed")
        if not 0 < self.share < 1:
            mend = "Leave 'replay' out to train without." if self.share == 0 else ""
            fault("share", f"expected more than 0 and less than 1, found {self.share}", mend)


@dataclass
class TuneOptions:
    """A tuner for each part. preset: where to start from, one of mmtune/tuning/presets; what is given beside
    it comes first.
    """

    preset: str | None = field(
        default=None, metadata=presets_in(Path(__file__).parent / "tuning" / "presets")
    )
    vision: Any = field(default_factory=FrozenOptions, metadata=chosen_by("tuner", TUNERS, "frozen"))
    connector: Any = field(default_factory=FrozenOptions, metadata=chosen_by("tuner", TUNERS, "frozen"))
    language: Any = field(default_factory=FrozenOptions, metadata=chosen_by("tuner", TUNERS, "frozen"))


@dataclass
class CheckpointOptions:
    """A checkpoint every so many optimiser steps, of which the newest `keep` stay."""

    every: int = 200
    keep: int = 2

    def check(self, fault: Report) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                fault(name, f"expected 1 or more, found {getattr(self, name)}")


@dataclass
class ProbeOptions:
    """A fixed batch on which the run is looked at every so many optimiser steps; it changes nothing else.

    data: by default the stage's own. samples: so many of them, evenly over their order.
    """

    data: list[DataOptions] | None = None
    samples: int = 32
    every: int = 50

    def check(self, fault: Report) -> None:
        for name in ("samples", "every"):
            if getattr(self, name) < 1:
                fault(name, f"expected 1 or more, found {getattr(self, name)}")
        if self.data == []:
            fault("data", "an empty list: there is nothing to look at", "Leave it out for the stage's own.")


@dataclass
class TrainOptions:
    """How long, in what batches, on what schedule.

    batch_size: samples per optimiser step, over all processes. micro_batch_size: samples per forward
    pass and process; by default a process takes its share of a batch at once. warmup: fraction of the run.
    max_length: tokens, pictures included. too_long: what happens to a longer sample; it is never cut.
    engine: how the processes that torchrun, `accelerate launch` or `deepspeed` start share the work; what
    comes out is the same. deepspeed: a DeepSpeed JSON of one's own for the zero engines, in place of
    mmtune's. probe: measures loss and KL to the base on a fixed batch as the run goes on.
    """

    batch_size: int
    micro_batch_size: int | None = None
    epochs: float | None = None
    steps: int | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    clip: float = 1.0
    weight_decay: float = 0.0
    max_length: int = 2048
    too_long: Literal["error", "skip"] = "error"
    log_every: int = 10
    workers: int = 0
    activation_checkpointing: bool = False
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    probe: ProbeOptions | None = None
    engine: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    deepspeed: Path | None = None

    def check(self, fault: Report) -> None:
        if (self.epochs is None) == (self.steps is None):
            fault("", "give either 'epochs' or 'steps'")
        for name in ("batch_size", "micro_batch_size", "steps", "max_length", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fault(name, f"expected 1 or more, found {value}")
        for name in ("epochs", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                fault(name, f"expected more than 0, found {value}")
        if self.workers < 0:
            fault("workers", f"expected 0 or more, found {self.workers}")
        if self.weight_decay < 0:
            fault("weight_decay", f"expected 0 or more, found {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            fault("warmup", f"expected 0 to below 1, found {self.warmup}")
        micro = self.micro_batch_size or self.batch_size
        if micro >= 1 and self.batch_size % micro:
            fault(
                "micro_batch_size",
                f"batch_size {self.batch_size} is no multiple of {micro}",
                "One process times micro_batch_size times accumulation must give batch_size.",
            )
        if self.deepspeed is not None:
            self._check_deepspeed(fault)

    def _check_deepspeed(self, fault: Report) -> None:
        if not self.engine.startswith("zero"):
            fault("deepspeed", f"a DeepSpeed JSON is for zero1, zero2 and zero3, the engine is {self.engine}")
        try:
            for found in json_faults(read_json(Path(str(self.deepspeed))), self):
                fault("deepspeed", f"{self.deepspeed}: {found.where}: {found.what}", found.mend)
        except UserError as error:
            fault("deepspeed", f"{error.faults[0].where}: {error.faults[0].what}", error.faults[0].mend)


@dataclass
class EvaluateOptions:
    """The suite to run; at_end: when the training is done.

    split: of every task; by default each has its own reporting split. limit: the first so many questions
    of each task. root: where the data lies, instead of the protocols' own. dtype: float32 whatever the
    model trained in, since only there the size of a batch changes no answer. attribution: evaluates again
    with each part that trained put back as in the base, to see where gain and forgetting sit. scales: and
    again with only these parts of the way from the base. kl: measures KL(base || tuned) on each task.
    """

    suite: str
    at_end: bool = True
    split: str | None = None
    batch_size: int = 32
    limit: int | None = None
    root: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attribution: bool = False
    scales: list[float] = field(default_factory=list)
    kl: bool = False

    def check(self, fault: Report) -> None:
        check_scales(self.scales, fault)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                fault(name, f"expected 1 or more, found {value}")


@dataclass
class Stage:
    """One training: data, tuners, schedule; replayed data and a term that holds it to the base, if wanted.

    chat: the format its samples are tokenised in, where that is not the model's: LLaVA aligns its connector
    with plain. The model that comes out keeps its own.
    """

    data: list[DataOptions]
    train: TrainOptions
    tune: TuneOptions = field(default_factory=TuneOptions)
    replay: ReplayOptions | None = None
    kl: KlOptions | None = None
    chat: str | None = None
    name: str = ""

    def check(self, fault: Report) -> None:
        _check_chat(self.chat, fault)

    @property
    def all_data(self) -> list[DataOptions]:
        """Its own data, then what it replays."""
        return self.data + (self.replay.data if self.replay else [])


@dataclass
class RunOptions:
    """A run: a model, and one training or a list of `stages`, each of which starts from the one before."""

    name: str
    model: ModelOptions
    seed: int = 0
    data: list[DataOptions] | None = None
    tune: TuneOptions | None = None
    replay: ReplayOptions | None = None
    kl: KlOptions | None = None
    chat: str | None = None
    train: TrainOptions | None = None
    stages: list[Stage] | None = None
    evaluate: EvaluateOptions | None = None
    output: Path = Path("runs")

    def check(self, fault: Report) -> None:
        if self.stages is None:
            for name in ("data", "tune", "train"):
                if not getattr(self, name):
                    fault("", f"'{name}' is missing", "Or give 'stages'.")
        else:
            for name in ("data", "tune", "train", "replay", "kl", "chat"):
                if getattr(self, name) is not None:
                    fault(name, f"'{name}' and 'stages' exclude each other")
            if not self.stages:
                fault("stages", "an empty list")
        for where, stage in self._stages_by_place() if self.stages or (self.data and self.train) else ():
            check_prune(stage, where, fault)
        check_name(self.name, fault)
        _check_chat(self.chat, fault)
        whole = self.model.base and not any(getattr(self.model, part) for part in PARTS)
        for name in ("attribution", "scales", "kl"):
            if self.evaluate and getattr(self.evaluate, name) and not whole:
                mend = f"Start from model.base alone, or leave {name} out."
                fault(f"evaluate.{name}", "there is no base model to go back to", mend)
        self._check_quantized(fault)
        if not 0 <= self.seed < 2**32:
            fault("seed", f"expected 0 to {2**32 - 1}, found {self.seed}")

    def _check_quantized(self, fault: Report) -> None:
        """What a language model held in 4 or 8 bits excludes."""
        try:
            held = quantization(self.model)
            adapted = bool(self.model.base and saved_part(self.model.base, "language").get("adapter"))
        except UserError:  # a broken base, of which is told elsewhere
            return
        if not held:
            return
        if adapted and not self.model.language:
            mend = f"Merge it first: mmtune export {self.model.base} DST --to merged."
            fault("model.base", f"its language model has an adapter, which {held} would round away", mend)
        blocks: list[tuple[str, Stage | RunOptions]] = [("", self)]
        if self.stages:
            blocks = [(f"stages.{i}.", stage) for i, stage in enumerate(self.stages)]
        for number, (key, block) in enumerate(blocks, start=1):
            tuner = block.tune.language.tuner if block.tune else "frozen"
            if tuner == "full":
                mend = "Use lora or lorasculpt, or leave 'quantize' out."
                fault(f"{key}tune.language.tuner", f"weights held in {held} cannot train", mend)
            elif tuner != "frozen" and number < len(blocks):
                what = f"the next stage starts with this adapter merged, which {held} would round away"
                mend = "Adapt it in the last stage, or make two runs with mmtune export between them."
                fault(f"{key}tune.language.tuner", what, mend)
            if block.train and block.train.engine == "zero3":
                what = f"zero3 splits every frozen weight, and those held in {held} don't split"
                mend = "Use fsdp2, which leaves these whole and splits the others, or ddp, zero1 or zero2."
                fault(f"{key}train.engine", what, mend)

    def _stages_by_place(self) -> list[tuple[str, Stage]]:
        """Each stage with what stands before its keys."""
        if self.stages is None:
            assert self.data and self.train
            return [("", Stage(self.data, self.train, self.tune or TuneOptions()))]
        return [(f"stages.{i}.", stage) for i, stage in enumerate(self.stages)]

    @property
    def folder(self) -> Path:
        return self.output / self.name

    def all_stages(self) -> list[Stage]:
        """The stages, also where there is only one."""
        if self.stages is not None:
            return self.stages
        assert self.data and self.train and self.tune
        return [Stage(self.data, self.train, self.tune, self.replay, self.kl, self.chat)]


def check_prune(stage: Stage, where: str, fault: Report) -> None:
    """Reports a prune that will never come: of a part that is not pruned, or after the last step."""
    for part in PARTS:
        options = getattr(stage.tune, part)
        if getattr(options, "tuner", "") != "lorasculpt":
            continue
        if part != "language":
            mend = "Use full or lora there, with a penalty."
            what = f"lorasculpt prunes the language model only; the {part} is regularised, never pruned"
            fault(f"{where}tune.{part}.tuner", what, mend)
        elif stage.train.steps and options.prune_at >= stage.train.steps:
            what = f"prune_at is step {options.prune_at:g}, but the run ends after {stage.train.steps}"
            fault(f"{where}tune.{part}.prune_at", what, "Prune earlier, or give a fraction of the run.")


def check_scales(scales: Sequence[float], fault: Report) -> None:
    """Reports those that are no part of the way from the base, and those given twice."""
    for i, scale in enumerate(scales):
        if not 0 <= scale <= 1:
            fault(f"scales.{i}", f"expected 0 to 1, found {scale}", "0 is the base, 1 the tuned model.")
        if scale in scales[:i]:
            fault(f"scales.{i}", f"{scale} is given twice")


def _check_chat(chat: str | None, fault: Report) -> None:
    if chat is not None and chat not in FORMATS:
        fault("chat", f"unknown chat format '{chat}'", nearest(chat, list(FORMATS)))


def check_name(name: str, fault: Report) -> None:
    """The faults of a name that a folder is to have."""
    if not name or "/" in name or name.startswith(".") or len(name.encode()) > 200:
        mend = "Take up to 200 letters, without a slash and without a dot in front."
        fault("name", f"'{name}' cannot be the name of a folder", mend)


def read_run(path: Path, overrides: list[str] | None = None) -> RunOptions:
    """A run from its YAML and `key=value` overrides. Raises UserError with every fault at once.

    Parts from outside the package that it names may be named by its own model folders from then on.
    """
    run: RunOptions = parse(RunOptions, Source(path, overrides))
    for part, name in ((run.model.vision, "tower"), (run.model.connector, "kind")):
        if part:
            allow(getattr(part, name))
    return run


# What changes no result: names and places, how often is logged and saved, how the work is split, and the
# evaluation, which says itself how it was made.
SPLIT = "log_every|workers|engine|deepspeed|micro_batch_size|activation_checkpointing"
INDIFFERENT = re.compile(
    rf"(stages\.\d+\.)?(name|train\.({SPLIT}|(checkpoint|probe)\..*))|output|evaluate(\..*)?"
)


def deciding(config: Any) -> dict[str, Any]:
    """The entries of a run's config, as plain dicts, that its result depends on, by dotted key."""
    return {key: value for key, value in leaves(config).items() if not INDIFFERENT.fullmatch(key)}


def config_hash(options: RunOptions) -> str:
    """The first 16 hex digits of the SHA-256 of everything in a config that decides the result."""
    described = json.dumps(deciding(to_dict(options)), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def data_hash(data: list[DataOptions]) -> str:
    """The first 16 hex digits of the SHA-256 of the training files, in their order; pictures are not read."""
    digest = hashlib.sha256()
    for part in data:
        file = part.file()
        digest.update(hash_shards(file) if is_shards(file) else file.read_bytes())
    return digest.hexdigest()[:16]
