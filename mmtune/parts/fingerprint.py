"""Which model is this? A hash of a model folder's config and weights, its base's included. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped
from mmtune.parts.foreign import how_to_import
from mmtune.parts.spec import PARTS, ModelOptions

# What decides a part's answers: weights, configs, tokenizers, chat templates.
SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
FOREIGN = (
    "Name a folder that mmtune saved a model to; a tower or language model of transformers goes under "
    "model.vision.weights or model.language.weights."
)
REFERENCES = ("weights", "tokenizer", "adapter")
HELD = ("quantize", "image_size")  # options that change a part's weights as they are loaded
WHOLE = 64 * 2**20  # bytes up to which a file is hashed as a whole
EDGE = 2**20


def model_hash(folder: str | Path, quantize: str | None = None) -> str:
    """The first 16 hex digits of a SHA-256 of the model: its config, and every part, tokenizer and adapter.

    What the config refers to outside the folder counts by its content, so a project may be moved as a whole.
    A file above 64 MiB counts by its name, its size, its safetensors header and the first and last MiB of
    its data: training changes these too. A model of the hub counts by its name. quantize: in what its
    language model is to be held, instead of what the config says.
    Raises UserError where the folder is no model.
    """
    folder = shipped(folder)
    config = quantized_config(folder, quantize) if quantize else _config(folder)
    parts = {part: {**config[part], **_contents(folder, config[part])} for part in PARTS}
    described = json.dumps({**config, **parts}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def changed_parts(folder: str | Path, base: str | Path) -> list[str]:
    """The parts of a model whose weights, tokenizer or adapter are not those of another. Raises UserError."""
    folders = shipped(folder), shipped(base)
    configs = [_config(each) for each in folders]
    return [
        part
        for part in PARTS
        if _contents(folders[0], configs[0][part]) != _contents(folders[1], configs[1][part])
    ]


def same_weights(folder: str | Path, base: str | Path, part: str) -> bool:
    """Whether a part, its adapter apart, is the base's own, which has no adapter. Raises UserError."""
    folders = shipped(folder), shipped(base)
    own, its = (_contents(each, _config(each)[part]) for each in folders)
    return "adapter" not in its and all(own.get(key) == its.get(key) for key in ("weights", *HELD))


def start_hash(model: ModelOptions) -> str | None:
    """The hash of the model folder that a run starts from.

    None where there is no such folder: the run starts from nothing, or replaces a part of its base.
    """
    replaced = [part for part in PARTS if getattr(model, part) is not None]
    return model_hash(model.base, model.quantize) if model.base and not replaced else None


def weights_hash(weights: str) -> str:
    """The same of one part's weights, a folder; a model of the hub counts by its name."""
    return hashlib.sha256(json.dumps(_content(Path(weights), weights)).encode()).hexdigest()[:16]


def quantized_config(folder: str | Path, quantize: str) -> dict[str, Any]:
    """The config of a model folder with its language model held in nf4 or int8. Raises UserError."""
    config = _config(shipped(folder))
    return {**config, "language": {**config["language"], "quantize": quantize}}


def not_ours(folder: Path) -> UserError:
    """The error for a folder that is no mmtune model, with the command that imports it if there is one."""
    what, mend = how_to_import(folder) or ("not the config of an mmtune model", FOREIGN)
    return UserError(what, where=folder / "config.json", mend=mend)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, mend="Name a folder that mmtune saved a model to.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in PARTS):
        raise not_ours(folder)
    return config


def _contents(folder: Path, part: dict[str, Any]) -> dict[str, str | list[list[str]]]:
    """What a part's config refers to, by content, and how its weights are held."""
    held = {key: part[key] for key in HELD if part.get(key)}
    return held | {
        key: _content(folder.resolve() / name, name)
        for key, name in part.items()
        if key in REFERENCES and name
    }


def _content(place: Path, name: str) -> str | list[list[str]]:
    if place.is_file():
        return [[place.name, _file_hash(place)]]
    if not place.is_dir():
        return name
    return [
        [file.name, _file_hash(file)]
        for file in sorted(place.iterdir())
        if file.suffix in SUFFIXES and file.is_file()
    ]


def _file_hash(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
        digest.update(file.read(min(header, size) + EDGE))
        file.seek(-EDGE, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()
