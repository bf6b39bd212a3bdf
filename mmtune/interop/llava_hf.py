"""LLaVA as transformers holds it (LlavaForConditionalGeneration): names, what of it mmtune can hold, import.

The names on disk are those of transformers 4.x (`language_model.model.`, `vision_tower.vision_model.`), which
5.x reads, those that 5.x writes (`vision_tower.` alone), and those in its memory (`model.language_model.`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.data.batches import Batch
from mmtune.data.chat import IMAGE_ID
from mmtune.interop.chat_templates import chat_format, taking_text, template_of
from mmtune.interop.comparison import placed
from mmtune.interop.source import Source, Wanted
from mmtune.interop.weights import Stored, checkpoint
from mmtune.parts.foreign import layer_from_the_end, unfitting_llava_hf
from mmtune.parts.language import load_tokenizer
from mmtune.parts.loading import load_config
from mmtune.parts.vision.pixels import image_processor

_NAMES = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), "vision", r"\1"),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "connector", r"\1"),
    (re.compile(r"language_model\.(model\..+|lm_head\..+)"), "language", r"\1"),
    (re.compile(r"model\.language_model\.(.+)"), "language", r"model.\1"),
    (re.compile(r"(lm_head\..+)"), "language", r"\1"),
)
_BICUBIC = 3  # PIL's number


def read(folder: Path, wanted: Wanted) -> Source:
    """The parts of a llava-hf folder. Raises UserError with everything that mmtune cannot hold."""
    config: Any = load_config(str(folder))
    unfit = [Fault(what, str(folder / "config.json"), mend) for what, mend in unfitting(config)]
    for flag, given in (("--base", wanted.base), ("--vision", wanted.vision)):
        if given is not None:
            unfit.append(
                Fault(f"{flag} is for folders of the original LLaVA that lack it; this is a whole one")
            )
    if unfit:
        raise UserError.of(unfit)
    fit, mean, std, notes = _pictures(folder, config.vision_config.image_size, wanted)
    tokenizer = load_tokenizer(str(folder))
    template = template_of(folder, tokenizer)
    chat = wanted.chat
    if chat is None:
        chat, note = chat_format(tokenizer, template, folder)
        notes.append(note)
    if template is not None:
        tokenizer.chat_template = taking_text(tokenizer, template)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    generation = folder / "generation_config.json"
    return Source(
        folder,
        config.vision_config,
        config.text_config,
        "mlp2x_gelu",
        _by_part(checkpoint(folder), folder),
        tokenizer,
        layer_from_the_end(config.vision_feature_layer, config.vision_config.num_hidden_layers),
        mean,
        std,
        fit,
        chat,
        lambda batch, pixels: own_logits(folder, batch, pixels),
        read_json(generation) if generation.is_file() else None,
        notes,
        files=[folder / "tokenizer.model"] if (folder / "tokenizer.model").is_file() else [],
    )


def unfitting(config: LlavaConfig) -> list[tuple[str, str]]:
    """What keeps mmtune's parts and transformers' Llava from being one model, and how to mend it."""
    text: Any = config.text_config
    found = unfitting_llava_hf(config.to_dict())
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found.append((f"transformers has no causal language model for a {text.model_type}", ""))
    return found


def own_logits(folder: Path, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' class on a llava-hf folder, in fp32: [n, vocabulary] on the CPU, at each
    position of the batch that is no padding. pixels: [N, 3, S, S], normalised.
    """
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return class_logits(placed(model.eval()), model.config.image_token_index, batch, pixels)


@torch.no_grad()
def class_logits(model: Any, image: int, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    """As `own_logits`, of a model in memory, also with peft's around it. image: the id of a picture."""
    device = next(model.parameters()).device
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, image)
    mask = batch.attention_mask
    made = model(input_ids=ids.to(device), attention_mask=mask.to(device), pixel_values=pixels.to(device))
    return made.logits[mask.bool().to(device)].float().cpu()


def _by_part(tensors: dict[str, Stored], folder: Path) -> dict[str, dict[str, Stored]]:
    found: dict[str, dict[str, Stored]] = {"vision": {}, "connector": {}, "language": {}}
    unknown = []
    for name, stored in tensors.items():
        for pattern, part, own in _NAMES:
            if match := pattern.fullmatch(name):
                found[part][match.expand(own)] = stored
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors belong to no part of a llava-hf model: {', '.join(unknown[:5])}",
            where=folder,
            mend="Is it another model, or were its tensors renamed?",
        )
    if not found["connector"]:
        raise UserError(
            "it has no projector (multi_modal_projector.*)", where=folder, mend="Copy the folder anew."
        )
    return found


def _pictures(
    folder: Path, side: int, wanted: Wanted
) -> tuple[Literal["pad", "crop"], tuple[float, ...], tuple[float, ...], list[str]]:
    """(fit, mean, std, notes) by its image processor. Raises UserError for what mmtune's pictures are not."""
    said, file = image_processor(str(folder)) or ({}, folder)
    if not said:
        raise UserError(
            "no image processor: neither preprocessor_config.json nor one in processor_config.json",
            where=folder,
            mend="Copy the folder anew; it must be whole.",
        )
    faults = []
    size, crop = said.get("size", {}), said.get("crop_size", {})
    sizes = {*(size.values() if isinstance(size, dict) else [size])}
    sizes |= {*(crop.values() if isinstance(crop, dict) else [crop])}
    if sizes != {side}:
        faults.append(f"pictures of {sorted(sizes)} pixels for a tower that takes {side}")
    if said.get("resample", _BICUBIC) != _BICUBIC:
        faults.append(f"resample {said['resample']}: mmtune resizes bicubically ({_BICUBIC})")
    if abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        faults.append(f"rescale_factor {said['rescale_factor']} is not 1/255")
    for name in ("image_mean", "image_std"):
        if len(said.get(name) or []) != 3:
            faults.append(f"{name} is missing")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if said.get(name, True) is not True:
            faults.append(f"{name} is off")
    fit: Literal["pad", "crop"] = "pad" if said.get("do_pad") else "crop"
    if fit == "crop" and said.get("do_center_crop", True) is not True:
        faults.append("do_center_crop is off")
    if fit == "crop" and "shortest_edge" not in size:
        faults.append("it squashes pictures to a square: mmtune pads or crops them")
    if faults:
        raise UserError.of(Fault(what, str(file)) for what in faults)
    notes = [f"pictures: {fit}, as its {file.name} says"]
    if fit == "crop":
        notes = [
            f"{notes[0]}. LLaVA-1.5 itself was trained and evaluated with pad: --fit pad does as it did."
        ]
    if wanted.fit and wanted.fit != fit:
        notes = [f"pictures: {wanted.fit}, as asked; its {file.name} says {fit}"]
    return wanted.fit or fit, tuple(said["image_mean"]), tuple(said["image_std"]), notes
