"""Configs of known models, kept here so that a run's shapes can be checked before anything is downloaded.

A file of `configs/` holds the fields of a model's own config.json that decide its shapes; `_about` says
where they come from, and under which licence the weights are. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped
from mmtune.core.table import nearest

CONFIGS = Path(__file__).with_name("configs")

# A model's name on the hub, and its file.
KNOWN = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b-chat-v1.0.json",
    "liuhaotian/llava-v1.5-13b": "llava-v1.5-13b.json",
    "liuhaotian/llava-v1.5-7b": "llava-v1.5-7b.json",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b-hf.json",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b-hf.json",
    "lmsys/vicuna-13b-v1.5": "vicuna-13b-v1.5.json",
    "lmsys/vicuna-7b-v1.5": "vicuna-7b-v1.5.json",
    "openai/clip-vit-large-patch14-336": "clip-vit-large-patch14-336.json",
}


def config_of(model: str, file: str = "config.json") -> dict[str, Any]:
    """The config of a folder, in its `file`, or of a known model of the hub.

    Raises UserError where the folder holds none, or the name is not known here.
    """
    folder = shipped(model)
    if folder.is_dir():
        config = read_json(folder / file)
    elif model in KNOWN:
        config = read_json(CONFIGS / KNOWN[model])
        del config["_about"]
    else:
        raise UserError(
            "neither a folder nor a model whose config is known here",
            where=model,
            mend=f"{nearest(model, list(KNOWN))} Or name a folder with a {file}; it need hold no weights.",
        )
    if not isinstance(config, dict):
        raise UserError("not the config of a model", where=folder / file)
    return config
