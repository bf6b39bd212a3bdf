"""mmtune assemble: a model folder from parts that lie elsewhere, whose weights are not read."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtune.core.config import Source
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, replacing_folder, shipped, write_text
from mmtune.core.table import allow
from mmtune.parts.connector.base import new_connector, saved_connector
from mmtune.parts.known import config_of, is_known
from mmtune.parts.loading import load_config
from mmtune.parts.model import FORMAT_VERSION, VisionLanguageModel, read_options
from mmtune.parts.outline import count, outline_of
from mmtune.parts.spec import (
    MODEL_TYPES,
    PARTS,
    ConnectorOptions,
    LanguageOptions,
    ModelOptions,
    VisionOptions,
    options_in,
    saved_part,
)

PART_FILE = "part.json"  # what a part that was saved alone says of itself; see interop/part_export.py
ALIGN = """\
# Trains the connector alone, on LLaVA's 558k captions as LLaVA-1.5 does (mmtune data prepare llava_pretrain);
# for your own data write {{path: FILE.json, image_root: DIR}}. model.base is taken from where mmtune is run:
# correct it once the folder has moved.
name: {name}
model: {{base: {folder}}}
chat: plain
data:
  - {{card: llava_pretrain, split: train}}
tune:
  vision: {{tuner: frozen}}
  connector: {{tuner: full, lr: 1e-3}}
  language: {{tuner: frozen}}
train:
  epochs: 1
  batch_size: 256
  micro_batch_size: 8
  schedule: cosine
  warmup: 0.03
  clip: 1.0
  max_length: {length}
"""


@dataclass(frozen=True)
class Asked:
    """The command's arguments: parts by folder, hub name or kind, and what is said of tower and chat."""

    vision: str | None = None
    connector: str | None = None
    language: str | None = None
    base: str | None = None
    tower: str | None = None
    layer: int | None = None
    fit: str | None = None
    image_size: int | None = None
    chat: str | None = None


def assemble_folder(asked: Asked, destination: Path, seed: int = 0) -> VisionLanguageModel:
    """Writes a model folder: its config, which says where the tower and the language model come from, its
    connector, new from `seed` or as it was saved, and align.yaml, a run that trains the connector alone.

    Returns the model, of which the connector alone has values. Raises UserError where the parts don't fit.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    options = _options(asked)
    model = outline_of(options)
    described = model.options.connector
    assert described
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.connector = new_connector(described, model.vision.width, model.language.width)
    if described.weights is not None:
        model.connector.load(Path(described.weights))
        described.weights = None
    with replacing_folder(destination) as partial:
        model.save_pretrained(partial)
        length = int(min(2048, model.language.context))
        name = destination.resolve().name
        align = ALIGN.format(
            folder=json.dumps(str(destination)), name=json.dumps(name + "_aligned"), length=length
        )
        write_text(partial / "align.yaml", align)
    return model


def print_parts(model: VisionLanguageModel, asked: Asked, destination: Path, console: Console) -> None:
    """A line for each part, which says whether it is new, and what to do next."""
    tower, language = model.vision, model.language
    options = model.options
    assert options.vision and options.connector and options.language
    table = Table(title=Text(str(destination)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("part", "is", "from", "width", "tokens", "parameters"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left", overflow="fold")
    side = f"{tower.image_size} x {tower.image_size} pixels"
    kind = f"{options.vision.tower}, layer {options.vision.layer}, {side}"
    kept = {part: "kept, from " if getattr(asked, part) is None else "" for part in PARTS}
    made = asked.connector if asked.connector and Path(asked.connector).is_dir() else "new"
    connector = f"{kept['connector']}{asked.base}" if asked.connector is None else made
    held = language.hf.config.model_type
    rows = [
        ("vision", kind, f"{kept['vision']}{options.vision.weights}", f"{tower.width}", f"{tower.tokens}"),
        (
            "connector",
            options.connector.kind,
            connector,
            f"{tower.width} to {language.width}",
            f"{model.image_tokens}",
        ),
        (
            "language",
            held,
            f"{kept['language']}{options.language.weights}",
            f"{language.width}",
            f"{language.context:.0f} at most",
        ),
    ]
    for part, *cells in rows:
        table.add_row(part, *map(Text, cells), f"{count(model.part(part)):,}")
    console.print(table)
    others = [part for part in ("vision", "language") if not kept[part]]
    if kept["connector"] and others:
        said = f"The connector is the base's, aligned with another {' and '.join(others)} part: train it."
        console.print(said, highlight=False)
    console.print("Next, train the connector alone, once its data are there:", highlight=False)
    for command in ("check", "train"):
        line = f"  mmtune {command} {shlex.quote(f'{destination}/align.yaml')}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _options(asked: Asked) -> ModelOptions:
    said = {"tower": asked.tower, "layer": asked.layer, "fit": asked.fit, "image_size": asked.image_size}
    given = {name: value for name, value in said.items() if value is not None}
    if given and asked.vision is None:
        raise UserError(f"--{next(iter(given))} goes with --vision", mend="Name the tower as well.")
    if asked.chat and asked.language is None:
        raise UserError("--chat goes with --language", mend="Name the language model as well.")
    if asked.base:
        for part in PARTS:
            if getattr(asked, part) is None and saved_part(asked.base, part).get("adapter"):
                mend = f"Merge it first: mmtune export {asked.base} DST --to merged."
                raise UserError(f"its {part} has an adapter", where=asked.base, mend=mend)
    options = ModelOptions(
        asked.base,
        _vision(asked.vision, given) if asked.vision else None,
        _connector(asked.connector) if asked.connector else None,
        _language(asked.language, asked.chat) if asked.language else None,
    )
    missing = [f"--{part}" for part in PARTS if getattr(options, part) is None]
    if missing and not asked.base:
        raise UserError(f"{' and '.join(missing)} not given", mend="Name all three parts, or --base.")
    return options


def _vision(name: str, given: dict[str, Any]) -> VisionOptions:
    if (part := _saved(name, "vision")) is not None:
        return replace(part, **given)
    tower = given.get("tower") or _family(name)
    if ":" in tower:
        allow(tower)
    return VisionOptions(**{**given, "tower": tower, "weights": name})


def _language(name: str, chat: str | None) -> LanguageOptions:
    part = _saved(name, "language") or LanguageOptions(name)
    return replace(part, chat=chat or part.chat)


def _connector(text: str) -> ConnectorOptions:
    """A kind, `kind:{option: value}`, a saved connector's folder, or a model folder."""
    if Path(text).is_dir():
        if (part := _saved(text, "connector")) is not None:
            return part
        kind = saved_connector(Path(text))["kind"]
        return _checked("connector", {"kind": kind, "weights": text}, Path(text) / "config.json")
    match = re.fullmatch(r"([^{]+?)(?::\s*(\{.*\}))?", text, re.DOTALL)
    try:
        options = yaml.safe_load(match[2]) if match and match[2] else None
    except yaml.YAMLError:
        match = None
    if not match or not (options is None or isinstance(options, dict)):
        what = f"'{text}' is neither a folder nor a kind of connector"
        raise UserError(what, where="--connector", mend="Write for example 'resampler:{queries: 64}'.")
    if ":" in match[1]:
        allow(match[1])
    if options is not None:
        options = {str(name): value for name, value in options.items()}  # YAML has numbers for names too
    made = ConnectorOptions(match[1], options=options)
    faults: list[UserError] = []
    made.check(lambda key, what, mend="", **_: faults.append(UserError(what, where="--connector", mend=mend)))
    if faults:
        raise faults[0]
    return made


def _saved(name: str, part: str) -> Any:
    """The options of a part of a model folder, or of one that was saved alone; None for anything else."""
    folder = shipped(name)
    if (folder / PART_FILE).is_file():
        tree = read_json(folder / PART_FILE)
        found = tree.pop("part", None) if isinstance(tree, dict) else None
        if found != part:
            what = f"this is a part '{found}', not '{part}'" if found in PARTS else f"this is no {part} part"
            raise UserError(what, where=folder / PART_FILE)
        return _checked(part, {**tree, "weights": name}, folder / PART_FILE)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(config, dict) or config.get("mmtune") != FORMAT_VERSION:
        return None
    if saved_part(name, part).get("adapter"):
        mend = f"Merge it first: mmtune export {name} DST --to {part}."
        raise UserError(f"its {part} has an adapter", where=name, mend=mend)
    return getattr(read_options(name), part)


def _checked(part: str, fields: dict[str, Any], file: Path) -> Any:
    source = Source.parsed(file, fields)
    options = options_in(part, fields, source)
    source.finish()
    return options


def _family(name: str) -> str:
    """Which tower takes a folder or hub name, by its config. Raises UserError where that is not known."""
    if not is_known(name, "config.json") and is_known(name, "open_clip_config.json"):
        return "open_clip"
    config = config_of(name) if is_known(name) else load_config(name).to_dict()
    family = MODEL_TYPES.get(str(config.get("model_type")))
    if family is None and is_known(name, "open_clip_config.json"):
        family = "open_clip"
    if family is None and "architecture" in config:
        family = "timm"
    if family is None:
        what = f"no tower is known to take a model of type {config.get('model_type')}"
        mend = "Say which with --tower; known by themselves: " + ", ".join(sorted(MODEL_TYPES)) + "."
        raise UserError(what, where=name, mend=mend)
    return family
