"""Which model is this? A hash of a model folder's config and weights, its base's included. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped
from mmtune.parts.spec import PARTS, ModelOptions

# What decides a part's answers: weights, configs, tokenizers, chat templates.
SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
REFERENCES = ("weights", "tokenizer", "adapter")
WHOLE = 64 * 2**20  # bytes up to which a file is hashed as a whole
EDGE = 2**20


def model_hash(folder: str | Path) -> str:
    """The first 16 hex digits of a SHA-256 of the model: its config, and every part, tokenizer and adapter.

    What the config refers to outside the folder counts by its content, so a project may be moved as a whole.
    A file above 64 MiB counts by its name, its size, its safetensors header and the first and last MiB of
    its data: training changes these too. A model of the hub counts by its name.
    Raises UserError where the folder is no model.
    """
    folder = shipped(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in PARTS):
        raise UserError("not the config of an mmtune model", where=folder / "config.json")
    described = dict(config)
    for part in PARTS:
        contents = {
            key: _content(folder.resolve() / name, name)
            for key, name in config[part].items()
            if key in REFERENCES and name
        }
        described[part] = {**config[part], **contents}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def start_hash(model: ModelOptions) -> str | None:
    """The hash of the model folder that a run starts from.

    None where there is no such folder: the run starts from nothing, or replaces a part of its base.
    """
    replaced = [part for part in PARTS if getattr(model, part) is not None]
    return model_hash(model.base) if model.base and not replaced else None


def _content(place: Path, name: str) -> str | list[list[str]]:
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
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, size) + EDGE))
        file.seek(-EDGE, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()
