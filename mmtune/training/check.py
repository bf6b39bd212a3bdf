"""Everything that can be wrong with a run, found before weights are loaded, and a look at what it trains on.

The model is put together without weights: configs, tokenizer and the shapes of tensors are all it takes to
encode the samples, to attach the tuners as training does, and to tell how much memory a GPU will need. With
`shapes`, configs are all there is: no tokenizer and no data is looked for; what stays unchecked is listed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.text import Text

from mmtune.core.config import Source, build, to_dict
from mmtune.core.errors import Fault, UserError
from mmtune.data.batches import Example, check_pictures, encode_samples
from mmtune.data.chat import FORMATS, IGNORE, IMAGE, IMAGE_ID, Chat
from mmtune.data.image import Picture, is_there, load_image
from mmtune.data.samples import MOST_FAULTS, Sample
from mmtune.evaluation.protocol import load_protocol, load_suite
from mmtune.parts.attention import attention_for, say_attention
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel
from mmtune.parts.outline import count, outline_of, outline_of_configs, unused_layers
from mmtune.parts.spec import PARTS, ModelOptions
from mmtune.run import (
    DataOptions,
    EvaluateOptions,
    ReplayOptions,
    RunOptions,
    Stage,
    TrainOptions,
    TuneOptions,
)
from mmtune.training.memory import Estimate, estimate, print_estimate, samples_at_once
from mmtune.training.plan import count_replay, count_steps, print_tuning_table, read_samples, say_replay
from mmtune.training.rehearsal import Shape
from mmtune.tuning.base import Row, Tuner

Key = tuple[str, ...]
MOST_COLUMNS = 10**6  # of a line that YAML is to leave in one
# Stands in for a faulty `train`, of which was told: it must be no reason to find anything.
NO_LIMITS = TrainOptions(batch_size=1, steps=1, max_length=10**9)


@dataclass
class Faults:
    """All that was found to be wrong."""

    source: Source
    found: list[Fault]

    def gather(self, key: Key, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns, None where it raises UserError. key: the block of the config it concerns."""
        try:
            return work(*arguments)
        except UserError as error:
            self.found += [_placed(fault, self.source, key) for fault in error.faults]
            return None


@dataclass
class DataFound:
    """Training data: the sound samples, encoded where a chat format is known. complete: all of them."""

    samples: list[Sample] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    complete: bool = False


@dataclass
class StageFound:
    """What is known of a stage: its tuning table, its samples, how many steps it takes, and its memory.

    sizes: parameters by part, and those of the tower's layers that are not loaded, where that is known.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    complete: bool = False
    skipped: list[str] = field(default_factory=list)
    decoded: int = 0
    pictures: int = 0
    pool: int = 0
    replayed: int = 0
    steps: int = 0
    chat: Chat | None = None
    models_chat: str = ""
    image_tokens: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)
    memory: Estimate | None = None


@dataclass(frozen=True)
class Gpus:
    """How many processes the memory is told for (None: 1 for the engine single, else 4), on GPUs of how many
    GiB.
    """

    processes: int | None = None
    memory: float = 24.0


def check_run(
    path: Path,
    overrides: Sequence[str] = (),
    samples: int = 3,
    pictures: int = 1000,
    shapes: bool = False,
    gpus: Gpus | None = None,
) -> None:
    """Prints what each stage of a run trains, on what, and the first `samples` as the model will see them.

    pictures: how many of them are decoded, spread evenly; all have to exist. shapes: from configs alone.
    Raises UserError with every fault of the config, the model's folder, the training data and the
    evaluation's files at once.
    """
    gpus = gpus or Gpus()
    source = Source(path, list(overrides))
    source.absent = [] if shapes else None
    options: RunOptions | None = build(RunOptions, source.tree, (), source)
    faults = Faults(source, list(source.faults))
    found = []
    model = options.model if options else _block(source, ModelOptions, "model")
    for key, stage in _stages(source, options):
        outline = faults.gather((), outline_of_configs if shapes else outline_of, model) if model else None
        found.append(check_stage(faults, key, stage, outline, options, None if shapes else pictures, gpus))
    evaluation = options.evaluate if options else _block(source, EvaluateOptions, "evaluate")
    if evaluation:
        faults.gather(("evaluate",), _check_protocols if shapes else _check_evaluation, evaluation)
    if options:
        for number, stage_found in enumerate(found, start=1):
            _print_stage(stage_found, number if len(found) > 1 else None, options, samples, gpus)
        if shapes:
            _print_unchecked(options, source.absent or [])
    if faults.found:
        raise UserError.of(dict.fromkeys(faults.found))  # stages share a model, and perhaps its faults


def check_stage(
    faults: Faults,
    key: Key,
    stage: Stage,
    model: VisionLanguageModel | None,
    options: RunOptions | None,
    pictures: int | None,
    gpus: Gpus,
) -> StageFound:
    """What is known of a stage before it runs; what is wrong with it goes to `faults`.

    model: its outline, to which the tuners are attached; None where there is none. options: the run, where
    it is sound. pictures: how many are decoded; None where no data is to be read.
    """
    found = StageFound(stage.name)
    if own := getattr(model, "chat", None):
        found.chat, found.models_chat = faults.gather(key, own.in_format, stage.chat), own.format
    tuners: dict[str, Tuner] = {part: getattr(stage.tune, part).make() for part in PARTS}
    attached = []
    if model:
        found.image_tokens = model.image_tokens
        found.sizes = {part: count(model.part(part)) for part in PARTS}
        if options and pictures is None:
            found.sizes["unused"] = unused_layers(options.model, model)
        with torch.device("meta"):
            for part, tuner in tuners.items():
                rows = faults.gather(key, tuner.attach, model, part)
                found.rows += rows or []
                if rows is not None:
                    attached.append(tuner)
        if options and pictures is not None:
            for part in model.attention:  # what trains itself is held in fp32, which the outline is not
                dtype = torch.float32 if tuners[part].exact else torch_dtype(options.model.dtype)
                chosen = faults.gather(key, attention_for, model.part(part), options.model.attention, dtype)
                found.attention[part] = chosen or ""

    settings = stage.train
    if pictures is not None:
        _check_stage_data(faults, key, stage, found, pictures)
    # A faulty sample changes how long an epoch is, but not a number of steps.
    if options and (settings.steps or found.complete):
        found.steps = settings.steps or count_steps(len(found.examples) + found.replayed, settings)
        for tuner in attached:
            faults.gather(key, tuner.start, found.steps, options.seed)
    if options and model and len(attached) == len(PARTS) and (pictures is None or found.examples):
        processes = gpus.processes or (1 if settings.engine == "single" else 4)
        shape = _shape(settings, processes, found.examples, model.image_tokens)
        found.memory = estimate(model, tuners, stage, options.model, shape, processes)
    return found


def _shape(settings: TrainOptions, processes: int, examples: list[Example], image_tokens: int) -> Shape:
    """The largest micro-batch: of the longest sample, or, where no data was read, of max_length."""
    count = samples_at_once(settings, processes)
    if examples:
        supervised = max(int((example.labels != IGNORE).sum()) for example in examples)
        pictures = max(len(example.images) for example in examples)
        return Shape(count, max(len(example.ids) for example in examples), count * pictures, supervised)
    one = 1 if settings.max_length > image_tokens else 0
    return Shape(count, settings.max_length, count * one, settings.max_length - one * image_tokens)


def _check_stage_data(faults: Faults, key: Key, stage: Stage, found: StageFound, pictures: int) -> None:
    settings = stage.train
    own = _check_data(faults, key, stage.data, found.chat, settings)
    pool = _check_data(faults, key, stage.replay.data if stage.replay else [], found.chat, settings)
    probe = _check_data(faults, key, (settings.probe and settings.probe.data) or [], found.chat, settings)
    found.examples, found.pool = own.examples, len(pool.samples)
    found.skipped = own.skipped + pool.skipped + probe.skipped
    shown = [
        *(own.examples or own.samples),
        *(pool.examples or pool.samples),
        *(probe.examples or probe.samples),
    ]
    faults.gather((), check_pictures, shown)
    paths = [path for path in dict.fromkeys(path for one in shown for path in one.images) if is_there(path)]
    found.pictures = len(paths)
    chosen = [paths[i * len(paths) // pictures] for i in range(pictures)] if pictures < len(paths) else paths
    found.decoded = len(chosen)
    faults.gather((), _decode, chosen)
    found.complete = own.complete
    if stage.replay and own.complete:
        found.replayed = faults.gather(key, count_replay, stage.replay, len(found.examples)) or 0


def _check_data(
    faults: Faults, key: Key, data: list[DataOptions], chat: Chat | None, settings: TrainOptions
) -> DataFound:
    found = DataFound()
    sound = True
    for part in data:
        read, broken = faults.gather((), read_samples, part) or ([], None)
        found.samples += read
        sound = sound and broken == []
        faults.found += broken or []
    if chat and found.samples:
        encoded = faults.gather(
            key, encode_samples, found.samples, chat, settings.max_length, settings.too_long
        )
        if encoded:
            found.examples, found.skipped = encoded
            found.complete = sound
    return found


def _decode(paths: Iterable[Picture]) -> None:
    faults: list[Fault] = []
    for path in paths:
        try:
            load_image(path)
        except UserError as error:
            faults += error.faults
        if len(faults) >= MOST_FAULTS:
            faults.append(Fault("there may be more pictures like these; these are the first"))
            break
    if faults:
        raise UserError.of(faults)


def _check_protocols(options: EvaluateOptions) -> None:
    """The suite and its tasks, but none of their files."""
    for task in load_suite(options.suite).given:
        load_protocol(task)


def _check_evaluation(options: EvaluateOptions) -> None:
    """The suite, each task's annotation file, and whether the pictures it names are there."""
    faults: list[Fault] = []
    for task in load_suite(options.suite).given:
        try:
            protocol = load_protocol(task)
            questions, file = protocol.questions(options.split, options.root)
        except UserError as error:
            faults += error.faults
            continue
        folder = (options.root or protocol.root) / protocol.images
        named = {image for question in questions[: options.limit] for image in question.images}
        missing = sorted(image for image in named if not (folder / image).is_file())
        if missing:
            what = f"{len(missing)} of {len(named)} pictures are missing, such as {folder / missing[0]}"
            faults.append(Fault(what, str(file)))
    if faults:
        raise UserError.of(faults)


# ---- A faulty config, block by block --------------------------------------------------------------------


def _stages(source: Source, options: RunOptions | None) -> Iterator[tuple[Key, Stage]]:
    """The stages with the keys their blocks stand under; of a faulty config what is sound in each."""
    tree = source.tree if isinstance(source.tree, dict) else {}
    staged = tree.get("stages")
    keys: list[Key] = [("stages", str(i)) for i in range(len(staged))] if isinstance(staged, list) else [()]
    if options:
        yield from zip(keys, options.all_stages(), strict=True)
        return
    for key in keys:
        listed = _at(source, *key, "data")
        count = len(listed) if isinstance(listed, list) else 0
        data = [_block(source, DataOptions, *key, "data", str(i)) for i in range(count)]
        yield (
            key,
            Stage(
                [each for each in data if each],
                _block(source, TrainOptions, *key, "train") or NO_LIMITS,
                _block(source, TuneOptions, *key, "tune") or TuneOptions(),
                _block(source, ReplayOptions, *key, "replay"),
                chat=chat if (chat := _at(source, *key, "chat")) in FORMATS else None,
            ),
        )


def _at(source: Source, *key: str) -> Any:
    tree = source.tree
    for name in key:
        if isinstance(tree, list):
            tree = tree[int(name)]
        else:
            tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _block(source: Source, cls: type, *key: str) -> Any:
    """One block of a faulty config by itself; None where it is missing or a fault is in it."""
    tree = _at(source, *key)
    before = len(source.faults)
    made = None if tree is None else build(cls, tree, key, source)
    del source.faults[before:]  # they were told of with the whole
    return made


def _placed(fault: Fault, source: Source, key: Key) -> Fault:
    """A fault of a config's entry, `tune.language.rank`, with the file and line where it stands."""
    top, *rest = fault.where.split(".")
    if top in ("tune", "train", "replay", "chat"):
        return Fault(fault.what, source.where((*key, top, *rest)), fault.mend)
    if top == "model":
        return Fault(fault.what, source.where((top, *rest)), fault.mend)
    return Fault(fault.what, fault.where or source.where(key), fault.mend)


# ---- What is printed ------------------------------------------------------------------------------------


def _print_stage(
    found: StageFound, number: int | None, options: RunOptions, samples: int, gpus: Gpus
) -> None:
    console = Console(highlight=False)
    stage = options.all_stages()[(number or 1) - 1]
    train = stage.train
    if number:
        console.print(f"\nStage {number}: {found.name}" if found.name else f"\nStage {number}", style="bold")
    if found.rows:
        print_tuning_table(found.rows, console)
    console.print("tune:")
    for part in PARTS:
        described = to_dict(getattr(stage.tune, part))
        line = yaml.safe_dump(described, default_flow_style=True, sort_keys=False, width=MOST_COLUMNS)
        console.print(f"  {part}: {line.strip()}", markup=False, soft_wrap=True)
    if found.chat:
        own = "" if found.chat.format == found.models_chat else f"; the model's own is {found.models_chat}"
        console.print(f"chat format: {found.chat.format}{own}")
    if found.sizes:
        console.print(_sizes(found), soft_wrap=True)
    if found.attention:
        console.print(f"{say_attention(found.attention)}, on this machine", soft_wrap=True)
    if found.examples and found.steps:
        _print_data(found, train, samples, console)
    if found.memory:
        tokens_from = "the longest sample's" if found.examples else "train.max_length, as no data was read"
        print_estimate(found.memory, options.model.dtype, gpus.memory, tokens_from, console)


def _sizes(found: StageFound) -> str:
    unused = f" (and {found.sizes['unused']:,} that are not loaded)" if found.sizes.get("unused") else ""
    named = [f"{part} {found.sizes[part]:,}{unused if part == 'vision' else ''}" for part in PARTS]
    whole = sum(found.sizes[part] for part in PARTS)
    return f"parameters: {', '.join(named)}; {whole:,} in all\na picture is {found.image_tokens:,} tokens"


def _print_unchecked(options: RunOptions, absent: list[Fault]) -> None:
    """What a check of shapes alone leaves open."""
    console = Console(highlight=False)
    console.print("\nNot checked, since only configs were read:", style="bold")
    lines = [
        "the weights: whether they are there, whole, and those that the config describes",
        "the tokenizer and the chat format",
        "the training data: samples, pictures, labels, lengths"
        + ("" if all(stage.train.steps for stage in options.all_stages()) else "; how many steps they take"),
    ]
    if options.evaluate:
        lines.append("the evaluation's annotation files and pictures")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)
    for fault in dict.fromkeys(absent):
        console.print(f"  {fault.where}: {fault.what}", markup=False, soft_wrap=True)
    console.print("Once they are there, mmtune check without --shapes checks them.", soft_wrap=True)


def _print_data(found: StageFound, train: TrainOptions, samples: int, console: Console) -> None:
    count = len(found.examples)
    seen = count + found.replayed
    epochs = found.steps * min(train.batch_size, seen) / seen
    lines = [
        f"{found.steps:,} steps of {train.batch_size} samples, {epochs:.3g} epochs",
        f"{count:,} samples, {sum(bool(e.images) for e in found.examples):,} with pictures",
        f"{found.pictures:,} pictures, {found.decoded:,} of them decoded",
        _lengths("tokens of a sample", [len(e.ids) for e in found.examples])
        + f"; max_length {train.max_length:,}",
        _lengths("of them supervised", [int((e.labels != IGNORE).sum()) for e in found.examples]),
    ]
    if found.replayed:
        lines.insert(2, say_replay(found.replayed, found.pool, count))
    if found.skipped:
        named = ", ".join(found.skipped[:10]) + (" ..." if len(found.skipped) > 10 else "")
        lines.insert(2, f"{len(found.skipped):,} more are skipped as too long: {named}")
    for line in lines:
        console.print(line, soft_wrap=True)
    assert found.chat
    for example in found.examples[:samples]:
        console.print(f"\nsample {example.id}", style="bold", markup=False)
        console.print(show(example, found.chat, console.is_terminal), soft_wrap=True)


def _lengths(what: str, lengths: list[int]) -> str:
    middle = statistics.median_low(lengths)
    return f"{what}: {min(lengths):,} at least, {middle:,} in the middle, {max(lengths):,} at most"


def show(example: Example, chat: Chat, colours: bool) -> Text:
    """A sample as the model gets it: special tokens written out, each picture as <image x576>.

    What is supervised stands in [[ ]], or, with `colours`, is bright while all else is dim.
    """
    text = Text()
    before: list[int] = []  # decoded along, since a token alone may lose the space at its front
    ids, supervised = example.ids.tolist(), (example.labels != IGNORE).tolist()
    for (picture, trained), run in groupby(
        zip(ids, supervised, strict=True), key=lambda pair: (pair[0] == IMAGE_ID, pair[1])
    ):
        tokens = [token for token, _ in run]
        if picture:
            one = f"{IMAGE[:-1]} x{chat.image_tokens}>"
            text.append(one * (len(tokens) // chat.image_tokens), style="blue")
            continue
        said = str(chat.tokenizer.decode([*before, *tokens])).removeprefix(str(chat.tokenizer.decode(before)))
        before += tokens
        if colours:
            text.append(said, style="bold green" if trained else "dim")
        else:
            text.append(f"[[{said}]]" if trained else said)
    return text
