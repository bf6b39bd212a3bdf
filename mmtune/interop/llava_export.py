"""mmtune export --to llava: a folder that the original LLaVA-1.5 opens by its own loader.

That is llava/model/builder.py (1.2.2) under transformers 4.37, so configs and tensors have the names of that
version: its CLIPVisionModel would leave a tower without the prefix `vision_model.` at random weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, replacing_folder, write_json
from mmtune.core.versions import versions
from mmtune.interop.comparison import Compared, compare, logits, placed, probe, refuse_unlike
from mmtune.interop.llava import CONNECTOR_NAMES, TOKENIZER, read, tower_tensors
from mmtune.interop.merged import ROUNDED, SAME, export_merged
from mmtune.interop.source import ORIGIN, Wanted, widest
from mmtune.interop.weights import Stored, checkpoint, local, write_tensors
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.loading import load_config, torch_dtype
from mmtune.parts.model import VisionLanguageModel, read_options
from mmtune.parts.spec import PARTS, ModelOptions, saved_part
from mmtune.parts.vision.pixels import said_of

TOWER = "vision_tower"  # the folder of a tower that has no name elsewhere
# What a config.json of LLaVA-1.5 says beside what differs from model to model.
_V15 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "model_type": "llava_llama",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}
_LLAMA = (
    *("attention_bias", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "tie_word_embeddings"),
    *("use_cache", "vocab_size"),
)


def export_llava(folder: Path, destination: Path, dtype: str | None = None) -> dict[str, Any]:
    """Writes a model folder as one of LLaVA-1.5. Adapters are merged in fp32, 4 and 8 bits dequantised.

    dtype: of every tensor; None: as each is stored, fp32 where it was merged. A tower that is the copy of a
    named one is only named; another goes to DST/vision_tower and is named by that path. What was written is
    read as `mmtune import` reads it, and its logits are compared with the model's. Returns what export.json
    says. Raises UserError for what LLaVA-1.5 cannot hold, and where the logits differ: nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    said = {name: saved_part(str(folder), name) for name in PARTS}
    changed = [name for name in PARTS if said[name].get("adapter") or said[name].get("quantize")]
    options = read_options(folder)
    if faults := [Fault(what, str(folder), mend) for what, mend in unfitting(options)]:
        raise UserError.of(faults)
    rows: list[Compared] = []
    with replacing_folder(destination) as partial:
        plain = folder
        if changed:
            plain = partial / "merged"
            rows += [Compared(**r) for r in export_merged(folder, plain, dtype or "float32")["comparison"]]
            for name in changed:
                setattr(options, name, getattr(read_options(plain), name))
        assert options.vision and options.vision.weights and options.connector
        tower = None if "vision" in changed else _name_of_tower(options.vision.weights)
        model = placed(VisionLanguageModel.from_pretrained(plain))
        batch = probe(model)
        pixels = model.vision.normalise(batch.images, torch.float32)
        ours = logits(model)
        if dtype:
            exact = ours
            for name in [name for name in PARTS if name != "vision" or tower is None]:
                for parameter in model.part(name).parameters():
                    parameter.data = parameter.data.to(torch_dtype(dtype)).float()
            ours = logits(model)
            rows.append(compare(f"all rounded to {dtype}", exact, ours, ROUNDED))
        tensors = {name: _tensors(getattr(options, name).weights, dtype) for name in PARTS}
        write_tensors(partial, _as_llava(tensors, options.connector.kind))
        if tower is None:
            _write_tower(partial / TOWER, options.vision.weights, tensors["vision"], model)
        named = tower or str(destination.resolve() / TOWER)
        config = _config(options, widest(tensors["language"]), named, model.vision.width)
        write_json(partial / "config.json", config)
        notes = [f"vision: named {named}", *_write_tokenizer(partial, options)]
        del model
        if plain != folder:
            shutil.rmtree(plain)
        written = read(partial, Wanted())
        written.check()
        rows.append(compare("LLaVA's order of things", ours, written.reference(batch, pixels), SAME))
        for row in rows:
            refuse_unlike(row, str(folder))
        made = {
            "from": model_hash(folder),
            "dtype": dtype,
            "notes": notes,
            "comparison": [row.to_dict() for row in rows],
            "versions": versions(),
        }
        write_json(partial / "export.json", made)
    return made


def unfitting(options: ModelOptions) -> list[tuple[str, str]]:
    """What LLaVA-1.5 cannot hold of a model's parts, and how to mend it."""
    assert options.vision and options.connector and options.language
    language: Any = load_config(str(options.language.weights))
    found = []
    if options.vision.tower != "clip":
        found.append((f"LLaVA-1.5 opens CLIP towers of transformers, and this is {options.vision.tower}", ""))
    if options.vision.image_size is not None:
        found.append((f"a tower used at {options.vision.image_size} pixels, which is not its own size", ""))
    if options.vision.fit not in ("pad", "crop"):
        mend = "Say pad or crop in the model's config.json; answers change with it."
        found.append((f"LLaVA-1.5 does not lay out pictures by {options.vision.fit}", mend))
    if options.connector.kind not in CONNECTOR_NAMES:
        what = f"LLaVA-1.5 has no projector that is as the connector {options.connector.kind}"
        found.append((what, f"It has {', '.join(CONNECTOR_NAMES)}."))
    if language.model_type != "llama":
        found.append((f"LLaVA-1.5's language model is a Llama, and this is a {language.model_type}", ""))
        return found
    newer = "is newer than LLaVA-1.5's transformers (4.37)"
    if language.rope_parameters["rope_type"] not in ("default", "linear", "dynamic"):
        found.append((f"rope_type {language.rope_parameters['rope_type']} {newer}", ""))
    if language.head_dim != language.hidden_size // language.num_attention_heads:
        found.append((f"a head_dim of its own, {language.head_dim}, {newer}", ""))
    if language.mlp_bias:
        found.append((f"mlp_bias {newer}", ""))
    return found


def _config(options: ModelOptions, dtype: torch.dtype, tower: str, width: int) -> dict[str, Any]:
    """config.json, the language model's fields named as in transformers 4.37."""
    assert options.vision and options.connector and options.language
    language: Any = load_config(str(options.language.weights))
    rope = language.rope_parameters
    plain = rope["rope_type"] == "default"
    fields = {
        **{name: getattr(language, name, None) for name in _LLAMA},
        **_V15,
        "image_aspect_ratio": "pad" if options.vision.fit == "pad" else "square",
        "mm_hidden_size": width,
        "mm_projector_type": options.connector.kind,
        "mm_vision_select_layer": options.vision.layer,
        "mm_vision_tower": tower,
        "rope_scaling": None if plain else {"type": rope["rope_type"], "factor": rope["factor"]},
        "rope_theta": rope["rope_theta"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return dict(sorted(fields.items()))


def _tensors(weights: str, dtype: str | None) -> dict[str, Stored]:
    """Those of a part as they are stored, or rounded."""
    stored = tower_tensors(local(weights))
    if dtype is None:
        return stored
    return {
        name: each.changed(lambda tensor: tensor.to(torch_dtype(dtype)))
        if each.outline.is_floating_point()
        else each
        for name, each in stored.items()
    }


def _as_llava(tensors: dict[str, dict[str, Stored]], kind: str) -> dict[str, Stored]:
    names = CONNECTOR_NAMES[kind].items()
    projector = {f"model.mm_projector.{name}": tensors["connector"][own] for name, own in names}
    return {**tensors["language"], **projector}


def _name_of_tower(weights: str) -> str | None:
    """The name by which LLaVA itself opens a tower that lies elsewhere: of the hub, or of a folder whose
    tensors have the names of transformers 4.x. None where it has none.
    """
    origin = Path(weights) / ORIGIN
    named = str(read_json(origin)["copy_of"]) if origin.is_file() else weights
    if Path(named).is_dir():
        return named if any(name.startswith("vision_model.") for name in checkpoint(Path(named))) else None
    return None if Path(named).is_absolute() else named


def _write_tower(folder: Path, weights: str, tensors: dict[str, Stored], model: VisionLanguageModel) -> None:
    write_tensors(folder, {f"vision_model.{name}": tensor for name, tensor in tensors.items()})
    config: Any = load_config(weights)
    config = config.vision_config if isinstance(config, CLIPConfig) else config
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    said = said_of(model.vision.transform("crop"))
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **said})


def _write_tokenizer(folder: Path, options: ModelOptions) -> list[str]:
    """Copies the tokenizer's files. Returns what there is to say of it and of the chat format."""
    assert options.language and options.language.weights
    weights = local(options.language.weights)
    tokenizer = local(options.language.tokenizer) if options.language.tokenizer else weights
    files = [tokenizer / name for name in (*TOKENIZER, "tokenizer.json")]
    for file in (*files, weights / "generation_config.json"):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    notes = []
    if not (folder / "tokenizer.model").is_file():
        notes.append("tokenizer: it has no tokenizer.model, and LLaVA's loader asks for the slow tokenizer")
    if options.language.chat != "vicuna_v1":
        notes.append(f"chat: {options.language.chat}; LLaVA's files name none, its scripts take vicuna_v1")
    return notes
