"""mmtune export --to llava-hf: a folder that transformers' LlavaForConditionalGeneration and vLLM serve.

Tensors have the names of transformers 4.x, which vLLM and transformers 5.x read too.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, GenerationConfig, LlavaConfig

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, replacing_folder, write_json
from mmtune.core.versions import versions
from mmtune.interop.comparison import Compared, compare, logits, placed, probe, refuse_unlike
from mmtune.interop.llava_hf import own_logits, unfitting
from mmtune.interop.llava_hf_processor import compare_processor, prompts, write_processor
from mmtune.interop.merged import ROUNDED, SAME, export_merged
from mmtune.interop.source import widest
from mmtune.interop.weights import Stored, checkpoint, local, write_tensors
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.loading import load_config, torch_dtype
from mmtune.parts.model import VisionLanguageModel, read_options
from mmtune.parts.spec import PARTS, ModelOptions

MULTIPLE = 64  # of which the vocabulary is one, once it has to grow; as llava-hf's


def export_llava_hf(folder: Path, destination: Path, dtype: str | None = None) -> dict[str, Any]:
    """Writes a model folder as one of llava-hf. Adapters are merged in fp32, 4 and 8 bits dequantised.

    dtype: of every tensor; None: each as it is held, fp32 where it was merged. The vocabulary grows where the
    tokenizer has no token for a picture and no row is free; new rows are the mean of the others, so that they
    are never the likeliest. Compared with the model: the logits of transformers' class on what was written,
    and the ids and pixels of prompts that went through its processor and chat template. Returns what
    export.json says. Raises UserError for what transformers' Llava cannot hold and where anything differs;
    then nothing is written.
    """
    if destination.exists():
        raise UserError("this is there already", where=destination, mend="Give another name.")
    options = read_options(folder)
    config = llava_config(options, folder)
    rows: list[Compared] = []
    with replacing_folder(destination) as partial:
        plain = folder
        if to_merge(folder):
            plain = partial / "merged"
            merging = export_merged(folder, plain, dtype or "float32")
            rows += [Compared(**row) for row in merging["comparison"]]
        model = placed(VisionLanguageModel.from_pretrained(plain))
        ours = logits(model)
        if dtype:
            exact = ours
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch_dtype(dtype)).float()
            ours = logits(model)
            rows.append(compare(f"all in {dtype}", exact, ours, ROUNDED))
        batch, expected = probe(model), prompts(model)
        pixels = model.vision.normalise(batch.images, torch.float32)
        config.image_seq_length = model.image_tokens
        config.image_token_index = write_processor(model, partial)
        del model
        _write_weights(read_options(plain), partial, config, dtype)
        if plain != folder:
            shutil.rmtree(plain)
        theirs = own_logits(partial, batch, pixels)[:, : ours.shape[1]]
        rows.append(compare("transformers' class", ours, theirs, SAME))
        rows += compare_processor(partial, expected, config.image_token_index, pixels)
        for row in rows:
            refuse_unlike(row, str(folder), row.what.partition(",")[0] if "," in row.what else "the logits")
        made: dict[str, Any] = {
            "from": model_hash(folder),
            "dtype": dtype,
            "comparison": [row.to_dict() for row in rows],
            "versions": versions(),
        }
        write_json(partial / "export.json", made)
    return made


def llava_config(options: ModelOptions, folder: Path) -> Any:
    """The LlavaConfig of a model. Raises UserError with everything that transformers' Llava cannot hold."""
    vision, connector, language = options.vision, options.connector, options.language
    assert vision and connector and language
    faults = []
    if vision.tower != "clip":
        faults.append(f"the tower is {vision.tower}; transformers' Llava is written with CLIP towers alone")
    if vision.image_size is not None:
        faults.append(f"the tower is used at {vision.image_size} pixels, which is not its own size")
    if connector.kind != "mlp2x_gelu":
        faults.append(f"the connector is {connector.kind}; transformers' Llava has mlp2x_gelu alone")
    if language.chat == "plain":
        faults.append("chat format plain leaves out what users say, so there is no chat template for it")
    if not faults:
        assert vision.weights and language.weights
        tower: Any = load_config(vision.weights)
        tower = tower.vision_config if isinstance(tower, CLIPConfig) else tower
        text = load_config(language.weights)
        for each in (tower, text):
            each.architectures = each.dtype = None
            each.name_or_path = ""
        config = LlavaConfig(
            vision_config=tower,
            text_config=text,
            projector_hidden_act="gelu",
            vision_feature_layer=vision.layer,
            tie_word_embeddings=text.tie_word_embeddings,
        )
        config.architectures = ["LlavaForConditionalGeneration"]
        faults = [what for what, _ in unfitting(config)]
    if faults:
        raise UserError.of(Fault(what, str(folder)) for what in faults)
    return config


def to_merge(folder: Path) -> bool:
    """Whether a model folder has an adapter, or a part in 4 or 8 bits. Raises UserError."""
    described = read_json(folder / "config.json")
    return any("adapter" in described[part] or described[part].get("quantize") for part in PARTS)


def _write_weights(options: ModelOptions, folder: Path, config: Any, dtype: str | None) -> None:
    """model.safetensors, config.json and generation_config.json; `config` grows with its vocabulary."""
    places = {part: local(getattr(options, part).weights) for part in PARTS}
    merged = llava_config(options, places["language"])  # a trained tower was saved without the layers above
    config.vision_config, config.vision_feature_layer = merged.vision_config, merged.vision_feature_layer
    tensors: dict[str, Stored] = {}
    for name, stored in checkpoint(places["vision"]).items():
        if not name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
            tensors[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = stored
    for name, stored in checkpoint(places["connector"]).items():
        tensors[f"multi_modal_projector.{name}"] = stored
    rows = config.text_config.vocab_size
    if config.image_token_index >= rows:
        rows = -(-(config.image_token_index + 1) // MULTIPLE) * MULTIPLE
        config.text_config.vocab_size = rows
    for name, stored in checkpoint(places["language"]).items():
        if re.fullmatch(r"model\.embed_tokens\.weight|lm_head\.weight", name) and len(stored.outline) < rows:
            stored = stored.changed(lambda tensor: _grown(tensor, rows))
        tensors[f"language_model.{name}"] = stored
    if dtype:
        tensors = {
            name: stored.changed(lambda tensor: tensor.to(torch_dtype(dtype)))
            if stored.outline.is_floating_point()
            else stored
            for name, stored in tensors.items()
        }
    write_tensors(folder, tensors)
    config.dtype = widest(tensors)
    config.save_pretrained(folder)
    generation = places["language"] / "generation_config.json"
    if generation.is_file():
        write_json(folder / "generation_config.json", read_json(generation))
    else:
        GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
