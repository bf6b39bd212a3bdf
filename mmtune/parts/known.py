"""Configs of known models, kept here so that a run's shapes can be checked before anything is downloaded.

A file of `configs/` holds the fields of a model's own config.json, or open_clip_config.json, that decide its
shapes; `_about` says where they come from, and under which licence the weights are. No torch here.
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
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-instruct.json",
    "Qwen/Qwen3-8B": "qwen3-8b.json",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b-chat-v1.0.json",
    "facebook/dinov2-large": "dinov2-large.json",
    "facebook/dinov2-with-registers-large": "dinov2-with-registers-large.json",
    "google/siglip-so400m-patch14-384": "siglip-so400m-patch14-384.json",
    "google/siglip2-so400m-patch14-384": "siglip2-so400m-patch14-384.json",
    "google/siglip2-so400m-patch16-naflex": "siglip2-so400m-patch16-naflex.json",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip-vit-h-14-laion2b-s32b-b79k.json",
    "liuhaotian/llava-v1.5-13b": "llava-v1.5-13b.json",
    "liuhaotian/llava-v1.5-7b": "llava-v1.5-7b.json",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b-hf.json",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b-hf.json",
    "lmsys/vicuna-13b-v1.5": "vicuna-13b-v1.5.json",
    "lmsys/vicuna-7b-v1.5": "vicuna-7b-v1.5.json",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-instruct-v0.3.json",
    "openai/clip-vit-large-patch14-336": "clip-vit-large-patch14-336.json",
}


def is_known(model: str, file: str = "config.json") -> bool:
    """Whether `config_of` finds it."""
    folder = shipped(model)
    if folder.is_dir():
        return (folder / file).is_file()
    return model in KNOWN and file == _file_of(read_json(CONFIGS / KNOWN[model]))


def config_of(model: str, file: str = "config.json") -> dict[str, Any]:
    """The config of a folder, in its `file`, or of a known model of the hub.

    Raises UserError where the folder holds none, or the name is not known here, or not by this file.
    """
    folder = shipped(model)
    if folder.is_dir():
        config = read_json(folder / file)
    elif model in KNOWN:
        config = read_json(CONFIGS / KNOWN[model])
        del config["_about"]
        kept = _file_of(config)
        if kept != file:
            raise UserError(
                f"its {kept} is known here, not its {file}",
                where=model,
                mend="open_clip's take `tower: open_clip`, those of transformers their family's name.",
            )
    else:
        raise UserError(
            "neither a folder nor a model whose config is known here",
            where=model,
            mend=f"{nearest(model, list(KNOWN))} Or name a folder with a {file}; it need hold no weights.",
        )
    if not isinstance(config, dict):
        raise UserError("not the config of a model", where=folder / file)
    return config


def _file_of(config: dict[str, Any]) -> str:
    return "open_clip_config.json" if "model_cfg" in config else "config.json"
