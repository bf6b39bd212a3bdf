"""mmtune export --to peft: the language model's adapter as a folder of peft's, for that model alone or, with
`--for llava-hf`, for transformers' LlavaForConditionalGeneration around it (4.52 or newer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, replacing_folder, write_json
from mmtune.core.versions import versions
from mmtune.interop.comparison import compare, logits, placed, probe, refuse_unlike
from mmtune.interop.llava_hf import class_logits
from mmtune.interop.llava_hf_export import llava_config
from mmtune.interop.merged import SAME
from mmtune.parts.loading import load_adapter
from mmtune.parts.model import VisionLanguageModel, read_options
from mmtune.parts.spec import PARTS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# In the memory of transformers' class since 4.52, which is what peft's names are taken from.
LANGUAGE, CONNECTOR = "model.language_model.", "model.multi_modal_projector"


def export_peft(folder: Path, destination: Path, for_llava_hf: bool = False) -> dict[str, Any]:
    """Writes the language model's adapter with plain names, every tensor as it is, so that zeros stay zeros.

    for_llava_hf: keys and targets are full names in transformers' Llava, so that they hit its language model
    and never its tower; the connector goes along in modules_to_save, since it may have been trained, here or
    before. At the end peft loads what was written, onto the language model or onto transformers' class around
    it, and the logits are compared. Returns what export.json says. Raises UserError where there is no such
    adapter, where the model has more of its own than peft's folder can hold, and where the logits differ;
    then nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    options = read_options(folder)
    described = read_json(folder / "config.json")
    own = {part for part in PARTS if Path(getattr(options, part).weights).is_relative_to(folder.resolve())}
    adapted = {part for part in PARTS if "adapter" in described[part]}
    _refuse_more(folder, own, adapted, for_llava_hf)
    source = folder / described["language"]["adapter"]
    config, tensors = read_json(source / CONFIG), load_file(source / TENSORS)
    assert options.vision and options.connector and options.connector.weights and options.language
    config["base_model_name_or_path"] = options.language.weights
    notes = [f"It was trained on {options.language.weights}."]
    if for_llava_hf:
        config, tensors = _for_llava_hf(config, tensors)
        config["base_model_name_or_path"] = None
        config["modules_to_save"] = [CONNECTOR]
        connector = load_file(Path(options.connector.weights) / "model.safetensors")
        tensors |= {f"base_model.model.{CONNECTOR}.{name}": tensor for name, tensor in connector.items()}
        notes = [
            "Load it on the llava-hf model of its base: PeftModel.from_pretrained(llava, DST). "
            "Where there is none, mmtune export BASE DST --to llava-hf makes it.",
            f"The connector travels with it; the tower has to be {options.vision.weights}, "
            f"the language model {options.language.weights}.",
        ]
    elif beside := sorted((adapted | own) - {"language"}):
        notes.append(f"Not in here: the model's own {' and '.join(beside)}, left in {folder}.")
    if options.language.quantize:
        notes.append(f"The base was held in {options.language.quantize}; in full precision it is another.")
    with replacing_folder(destination) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        write_json(partial / CONFIG, config)
        model = placed(VisionLanguageModel.from_pretrained(folder))
        ours = logits(model)
        model.adapters.pop("language").unload()
        if for_llava_hf:
            what = "transformers and peft"
            theirs = _llava_logits(model, folder, partial)
        else:
            what = "with peft"
            load_adapter(model.language.hf, partial)
            theirs = logits(model)
        row = compare(what, ours, theirs, SAME)
        refuse_unlike(row, str(folder))
        made: dict[str, Any] = {"comparison": [row.to_dict()], "notes": notes, "versions": versions()}
        write_json(partial / "export.json", made)
    return made


def _refuse_more(folder: Path, own: set[str], adapted: set[str], for_llava_hf: bool) -> None:
    if "language" not in adapted:
        raise UserError(
            "its language model has no adapter", where=folder, mend="Export it whole: --to llava-hf."
        )
    if "language" in own and for_llava_hf:
        raise UserError(
            "the language model that its adapter rests on lies in this folder alone, so there is no llava-hf "
            "model to load the adapter on",
            where=folder,
            mend="Export it whole: --to llava-hf. Or leave out --for llava-hf: --to peft names that language "
            "model.",
        )
    tuned = sorted((adapted | own) & {"vision"} | adapted & {"connector"})
    if tuned and for_llava_hf:
        raise UserError(
            f"{' and '.join(tuned)} tuned too, which an adapter of the language model cannot hold",
            where=folder,
            mend="Export it whole: --to llava-hf.",
        )


def _for_llava_hf(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    prefix = "base_model.model."
    renamed = {prefix + _in_llava(key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}
    targets = sorted({key.removeprefix(prefix).rpartition(".lora_")[0] for key in renamed})
    patterns = {
        name: {_in_llava(key): value for key, value in config[name].items()}
        for name in ("rank_pattern", "alpha_pattern")
    }
    return {**config, "target_modules": targets, **patterns}, renamed


def _in_llava(name: str) -> str:
    """A name in a causal language model as it is in the Llava around it: the head lies beside the model."""
    return LANGUAGE + name.removeprefix("model.") if name.startswith("model.") else name


def _llava_logits(model: VisionLanguageModel, folder: Path, adapter: Path) -> torch.Tensor:
    """Of transformers' class around the base's tower and language model, with the adapter that peft loads
    from a folder. Its connector starts from zeros, so that it has to come with the adapter.
    """
    batch = probe(model)
    pixels = model.vision.normalise(batch.images, torch.float32)
    config = llava_config(read_options(folder), folder)
    tower: Any = model.vision.hf
    config.vision_config, config.vision_feature_layer = tower.config, -1  # the layers above were not loaded
    used = set(batch.input_ids.flatten().tolist())
    config.image_token_index = next(i for i in range(config.text_config.vocab_size) if i not in used)
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = tower
    llava.model.language_model = model.language.hf.base_model
    llava.lm_head = model.language.hf.get_output_embeddings()
    projector = {name: torch.zeros_like(tensor) for name, tensor in model.connector.state_dict().items()}
    llava.model.multi_modal_projector.load_state_dict(projector, assign=True)
    attached: nn.Module = load_adapter(llava, adapter)
    assert isinstance(attached, PeftModel)
    return class_logits(attached.eval(), config.image_token_index, batch, pixels)
