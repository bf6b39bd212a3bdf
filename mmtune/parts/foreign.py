"""Model folders of other projects: which kind one is, what of it mmtune cannot hold, and the command that
imports it. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json

LLAVA_HF, LLAVA = "llava-hf", "llava"
PROJECTORS = ("linear", "mlp2x_gelu")  # of LLaVA's mm_projector_type; mmtune's connectors of these names
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


def unfitting_llava(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What mmtune's parts cannot hold of a config.json of LLaVA's, and how to mend it."""
    found = []
    model_type = config.get("model_type")
    if model_type not in ("llava", "llava_llama"):
        found.append(
            (f"its language model ({model_type}) is no Llama or Vicuna; no other can be imported", "")
        )
    projector = config.get("mm_projector_type", "linear")
    if projector not in PROJECTORS:
        what = f"mmtune has no connector for mm_projector_type '{projector}'"
        found.append((what, f"Known: {', '.join(PROJECTORS)}."))
    layer = config.get("mm_vision_select_layer")
    if not isinstance(layer, int) or layer >= 0:
        what = f"mm_vision_select_layer is {layer!r}; a negative number is expected"
        found.append((what, "Count from the end: -2 is the layer before the last."))
    if config.get("mm_vision_select_feature", "patch") != "patch":
        what = f"mm_vision_select_feature '{config['mm_vision_select_feature']}' keeps the CLS token"
        found.append((what, "mmtune's towers leave it out, as LLaVA-1.5 does ('patch')."))
    if config.get("mm_use_im_start_end"):
        what = "mm_use_im_start_end: mmtune's chat formats don't put a picture between two tokens"
        found.append((what, "LLaVA-1.5 does not either."))
    ratio = config.get("image_aspect_ratio") or "square"
    if ratio not in ("pad", "square"):
        what = f"image_aspect_ratio '{ratio}' cuts a picture into several; mmtune's towers take one"
        found.append((what, "LLaVA-1.5 has 'pad'."))
    if config.get("mm_patch_merge_type", "flat") != "flat":
        found.append(
            (f"mm_patch_merge_type '{config['mm_patch_merge_type']}': only 'flat' can be imported", "")
        )
    if config.get("s2"):
        found.append(("s2: its tower sees a picture in several sizes, mmtune's in one", ""))
    return found


def unfitting_llava_hf(config: dict[str, Any]) -> list[tuple[str, str]]:
    """What mmtune's parts cannot hold of a config.json of transformers' Llava, and how to mend it."""
    text, vision = config["text_config"], config["vision_config"]
    found = []
    if config.get("quantization_config"):
        found.append(("its weights are stored quantised", "Import the model in full precision."))
    tower = vision.get("model_type", "clip_vision_model")
    if tower != "clip_vision_model":
        found.append((f"its tower is a {tower}; only CLIP towers can be imported", ""))
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        found.append((f"it joins the features of layers {layer}; mmtune takes those of one layer", ""))
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        what = f"vision_feature_select_strategy '{strategy}' keeps the CLS token"
        found.append((what, "mmtune's towers leave it out, as LLaVA does ('default')."))
    act, bias = config.get("projector_hidden_act", "gelu"), config.get("multimodal_projector_bias", True)
    if act != "gelu" or not bias:
        said = f"{act}, {'with' if bias else 'no'} bias"
        found.append((f"its projector ({said}) is not mlp2x_gelu: gelu, with bias", ""))
    kind = text.get("model_type", "llama")
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if text.get(name) is not None:
            what = f"{name} of a {kind}: transformers' Llava leaves it out, and mmtune does not"
            found.append((what, ""))
    return found


def layer_from_the_end(layer: int, count: int) -> int:
    """-1 for the last of a tower's `count` layers, of a number by which transformers may count from below."""
    return layer if layer < 0 else layer - count - 1
