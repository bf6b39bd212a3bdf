"""Model folders of other projects: which kind one is, and the command that imports it. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json

LLAVA_HF, LLAVA = "llava-hf", "llava"
_SAID = {
    LLAVA_HF: "a model of transformers' class LlavaForConditionalGeneration (llava-hf)",
    LLAVA: "a model in the layout of the original LLaVA",
}


def kind_of(config: Any) -> str | None:
    """`llava-hf` or `llava` by what a config.json says; None for anything else.

    Both call themselves `llava` in model_type: the original's configs name their tower (mm_vision_tower),
    those of transformers hold its config.
    """
    if not isinstance(config, dict):
        return None
    if "mm_vision_tower" in config:
        return LLAVA
    named = "LlavaForConditionalGeneration" in (config.get("architectures") or [])
    return LLAVA_HF if named or (config.get("model_type") == "llava" and "text_config" in config) else None


def how_to_import(folder: Path) -> tuple[str, str] | None:
    """What a folder is and how to import it, for a message; None where it is nothing that mmtune imports."""
    try:
        kind = kind_of(read_json(folder / "config.json"))
    except UserError:
        return None
    if kind is None:
        return None
    return f"this is {_SAID[kind]}", f"Import it and name what that wrote: mmtune import {folder} DST."
