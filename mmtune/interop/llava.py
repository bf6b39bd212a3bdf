"""Folders of the original LLaVA-1.5 (haotian-liu/LLaVA): a whole model, a projector alone, or a LoRA.

What lies where under which names follows llava/model/builder.py, llava/model/llava_arch.py and
llava/train/train.py (1.2.2). A whole model is a LlamaForCausalLM with `model.mm_projector` among its tensors,
and `model.vision_tower.vision_tower` where the tower was tuned; config.json names the tower. Stage one leaves
`mm_projector.bin`, LoRA peft's adapter and `non_lora_trainables.bin`; both need what they were trained on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPConfig, CLIPVisionConfig, LlamaConfig

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.interop.llava_forward import own_logits
from mmtune.interop.source import Source, Wanted
from mmtune.interop.weights import COPY, Stored, checkpoint, local, shape, tensors_of
from mmtune.parts.foreign import unfitting_llava
from mmtune.parts.language import load_tokenizer
from mmtune.parts.loading import load_config, refusals

PROJECTOR, NON_LORA, ADAPTER = "mm_projector.bin", "non_lora_trainables.bin", "adapter_config.json"
# The projector's tensors as LLaVA names them (nn.Linear, nn.Sequential), and as our connectors do.
CONNECTOR_NAMES = {
    "linear": {"weight": "linear.weight", "bias": "linear.bias"},
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight",
        "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight",
        "2.bias": "linear_2.bias",
    },
}
# Beside a tokenizer's model; LLaVA and transformers 4.x read these.
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WRAPPED = re.compile(r"(?:module\.|base_model\.model\.)*")  # what engines and peft put before a name
_PARTS = (
    ("connector", re.compile(r"(?:model\.)?mm_projector\.(.+)")),
    ("vision", re.compile(r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")),
    ("language", re.compile(r"((?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+)")),
)
_LORA = re.compile(r"((?:model\.layers\.\d+\..+|lm_head))\.lora_([AB])(?:\.default)?\.weight")
_NOT_PLAIN = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
# Fields of config.json that are not the language model's own.
_MULTIMODAL = re.compile(r"(?:.*_)?mm_.*|image_.*|tokenizer_.*|model_type|architectures|_name_or_path")


def read(folder: Path, wanted: Wanted) -> Source:
    """The parts of a folder of LLaVA's. Raises UserError with everything that mmtune cannot hold."""
    config = read_json(folder / "config.json")
    where = str(folder / "config.json")
    faults = [Fault(what, where, mend) for what, mend in unfitting_llava(config)]
    named = wanted.vision or config["mm_vision_tower"]
    if not isinstance(named, str) or not named:
        faults.append(
            Fault(f"mm_vision_tower is {named!r} and names no tower", where, "--vision DIR names it.")
        )
    if faults:
        raise UserError.of(faults)
    base = _base(folder, config, wanted)
    tensors = _by_part(folder, base, config.get("mm_projector_type", "linear"))
    adapter_config, adapter = _adapter(folder, tensors["language"])
    tower, name = _place(named, folder, "--vision")
    vision = _vision_config(tower)
    tuned = bool(tensors["vision"])
    notes = [
        f"vision: {'the tower that lies in the model; all but its tensors from ' if tuned else ''}{name}"
    ]
    if not tuned:
        tensors["vision"] = tower_tensors(tower)
    with refusals(where):
        language = LlamaConfig(**_language_fields(config))
    mean, std = _normalisation(tower)
    fit: Literal["pad", "crop"] = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
    said = f"image_aspect_ratio is {config.get('image_aspect_ratio')!r}"
    notes.append(f"pictures: {wanted.fit or fit}; {said}")
    if wanted.chat is None:
        notes.append("chat: vicuna_v1, which is LLaVA-1.5's; its files name none. --chat names another")
    generation = base / "generation_config.json"
    found = Source(
        folder,
        vision,
        language,
        config.get("mm_projector_type", "linear"),
        tensors,
        load_tokenizer(str(base), language),
        config["mm_vision_select_layer"],
        mean,
        std,
        wanted.fit or fit,
        wanted.chat or "vicuna_v1",
        lambda batch, pixels: own_logits(found, batch, pixels),
        generation=read_json(generation) if generation.is_file() else None,
        notes=notes,
        tower_name=None if tuned else name,
        adapter_config=adapter_config,
        adapter=adapter,
        files=[base / file for file in TOKENIZER if (base / file).is_file()],
    )
    return found


def _base(folder: Path, config: dict[str, Any], wanted: Wanted) -> Path:
    """Where language model and tokenizer lie: in a whole model itself, else in what it was trained on."""
    if any(any(folder.glob(names)) for names in ("model*.safetensors*", "pytorch_model*.bin*")):
        if wanted.base is not None:
            raise UserError(
                "--base is for a LoRA or a projector without its model; this is whole", where=folder
            )
        return folder
    if (folder / ADAPTER).is_file():
        config = _fields(folder / ADAPTER)
    elif not (folder / PROJECTOR).is_file():
        raise UserError(
            f"no weights: neither a whole model, nor {ADAPTER}, nor {PROJECTOR}", where=folder, mend=COPY
        )
    named = wanted.base or config.get("base_model_name_or_path") or config.get("_name_or_path")
    if not named:
        raise UserError(
            "its config doesn't say what it was trained on", where=folder, mend="--base DIR says it."
        )
    return _place(str(named), folder, "--base")[0]


def _place(named: str, beside: Path, flag: str) -> tuple[Path, str]:
    """The folder that a config names, also as seen from its own, or a model of the hub; and a name for it
    that holds from anywhere. Raises UserError.
    """
    for folder in (Path(named), beside / named, beside / Path(named).name):
        if folder.is_dir():
            return folder, str(folder.resolve())
    try:
        return local(named), named
    except UserError as error:
        mend = f"{flag} DIR names another folder, or model of the hub."
        raise UserError(error.faults[0].what, where=named, mend=mend) from None


def _by_part(folder: Path, base: Path, projector: str) -> dict[str, dict[str, Stored]]:
    """The tensors of the base, and over them what was trained. Raises UserError for those of no part."""
    stored = checkpoint(base)
    if base != folder:
        trained = tensors_of(folder / (NON_LORA if (folder / ADAPTER).is_file() else PROJECTOR))
        stored |= {_WRAPPED.sub("", name, count=1): tensor for name, tensor in trained.items()}
    found: dict[str, dict[str, Stored]] = {part: {} for part, _ in _PARTS}
    unknown = []
    for name, tensor in stored.items():
        for part, pattern in _PARTS:
            if match := pattern.fullmatch(name):
                own = CONNECTOR_NAMES[projector].get(match[1], match[1]) if part == "connector" else match[1]
                found[part][own] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} tensors belong to no part of LLaVA-1.5: {', '.join(unknown[:5])}",
            where=folder,
            mend="Is it another model, or were its tensors renamed?",
        )
    if not found["connector"]:
        raise UserError(
            "it has no projector: no tensor is named mm_projector",
            where=folder,
            mend="A language model alone goes under model.language.weights; a LoRA's projector lies in its "
            f"{NON_LORA}, that of stage one in {PROJECTOR}.",
        )
    return found


def _adapter(folder: Path, language: dict[str, Stored]) -> tuple[dict[str, Any] | None, dict[str, Stored]]:
    """peft's config and tensors of a LoRA on the language model, under the names that peft saves; none where
    there is no adapter. Raises UserError for anything else that an adapter may be.
    """
    if not (folder / ADAPTER).is_file():
        return None, {}
    config = _fields(folder / ADAPTER)
    more = [name for name in _NOT_PLAIN if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or more:
        said = ", ".join(more) or f"{config.get('peft_type')} with bias {config.get('bias', 'none')}"
        raise UserError(f"only plain LoRA can be imported, and this has {said}", where=folder / ADAPTER)
    rank = config.get("r")
    if not isinstance(rank, int):
        raise UserError(f"r, the rank, is {rank!r}; a number is expected", where=folder / ADAPTER, mend=COPY)
    file = folder / "adapter_model.safetensors"
    file = file if file.is_file() else file.with_suffix(".bin")
    found: dict[str, Stored] = {}
    faults = []
    for name, tensor in tensors_of(file).items():
        match = _LORA.fullmatch(_WRAPPED.sub("", name, count=1))
        weight = language.get(f"{match[1]}.weight") if match else None
        if match is None or weight is None:
            faults.append(f"{name} is no LoRA on a linear layer of the language model")
            continue
        p, q = weight.outline.shape
        expected = torch.Size([rank, q] if match[2] == "A" else [p, rank])
        if tensor.outline.shape != expected:
            faults.append(f"{name} is {shape(tensor.outline)}, expected {expected[0]} x {expected[1]}")
        found[f"base_model.model.{match[1]}.lora_{match[2]}.weight"] = tensor
    for name in found:
        other = (
            name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name
            else name.replace(".lora_B.", ".lora_A.")
        )
        if other not in found:
            faults.append(f"{name} is there, {other} is not")
    if faults:
        raise UserError.of(Fault(what, str(file)) for what in faults[:10])
    return config, found


def _fields(file: Path) -> dict[str, Any]:
    said = read_json(file)
    if not isinstance(said, dict):
        raise UserError("fields and their values are expected, { ... }", where=file, mend=COPY)
    return said


def _language_fields(config: dict[str, Any]) -> dict[str, Any]:
    fields = {name: said for name, said in config.items() if not _MULTIMODAL.fullmatch(name)}
    if fields.get("rope_scaling", "") is None:
        del fields["rope_scaling"]  # the name is on its way out of transformers, which warns of it
    return fields


def _vision_config(tower: Path) -> CLIPVisionConfig:
    """Of a CLIPVisionModel, or of a whole CLIP."""
    config: Any = load_config(str(tower))
    config = config.vision_config if isinstance(config, CLIPConfig) else config
    if not isinstance(config, CLIPVisionConfig):
        raise UserError(f"its tower is a {config.model_type}; only CLIP towers can be imported", where=tower)
    return config


def tower_tensors(folder: Path) -> dict[str, Stored]:
    """Of a CLIPVisionModel, also out of a whole CLIP, by the names transformers 5 gives them."""
    stored = checkpoint(folder)
    inside = {n.removeprefix("vision_model."): t for n, t in stored.items() if n.startswith("vision_model.")}
    return inside or stored


def _normalisation(tower: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the tower's pictures. Raises UserError where its folder does not say."""
    said = _fields(tower / "preprocessor_config.json")
    if any(len(said.get(name) or []) != 3 for name in ("image_mean", "image_std")):
        raise UserError("no image_mean and image_std", where=tower / "preprocessor_config.json", mend=COPY)
    return tuple(said["image_mean"]), tuple(said["image_std"])
