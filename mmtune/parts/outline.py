"""A model without its weights: every tensor has its shape and dtype, and no values (torch's meta device).

`outline_of` puts it together as for training, from folders that are all there. `outline_of_configs` takes
config.json alone, of folders or of known models: no weights, no tokenizer, so that it has no `chat`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING

from mmtune.core.errors import Fault, UserError
from mmtune.parts.attention import attention_for
from mmtune.parts.foreign import (
    LLAVA,
    LLAVA_HF,
    kind_of,
    layer_from_the_end,
    unfitting_llava,
    unfitting_llava_hf,
)
from mmtune.parts.known import config_of
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import FORMAT_VERSION, VisionLanguageModel, assemble, read_options
from mmtune.parts.shapes import (
    fitting_connector,
    language_of_config,
    of_family,
    tower_of_config,
    without_values,
)
from mmtune.parts.spec import PARTS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions

TEXT = {"model_type": "llama", "vocab_size": 32000}  # what a text_config of transformers' Llava may leave out


def outline_of(options: ModelOptions) -> VisionLanguageModel:
    """The model of a run without its weights. Raises UserError."""
    with without_values():
        model = assemble(options)
    return _cast(model, options.dtype)


def outline_of_configs(options: ModelOptions) -> VisionLanguageModel:
    """The same from config.json alone, without a tokenizer or a chat format.

    A base may be a folder of mmtune, of transformers (LlavaForConditionalGeneration) or of LLaVA, or the name
    of a known model. Raises UserError.
    """
    described = _described(options)
    vision, connector, language = described.vision, described.connector, described.language
    assert vision and connector and language
    with without_values():
        tower = tower_of_config(vision)
        tokens = language_of_config(language)
        joined = fitting_connector(connector, tower, tokens)
        model = VisionLanguageModel(tower, joined, tokens, described)
        dtype, wanted = torch_dtype(options.dtype), options.attention
        if wanted == "flash":  # its GPU and its package are a matter of the machine that trains
            for part in (tower, tokens):
                attention_for(part, wanted, dtype, here=False)
            wanted = "auto"
        model.attend_by(wanted, dict.fromkeys(PARTS, dtype))
    return _cast(model, options.dtype)


def unused_layers(options: ModelOptions, model: VisionLanguageModel) -> int:
    """How many parameters the tower's layers above the used one have, which are not loaded.

    model: the outline made from the same options' configs.
    """
    vision = _described(options).vision
    assert vision
    with without_values():
        whole = tower_of_config(replace(vision, layer=-1))
    return count(whole) - count(model.vision)


def count(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def _cast(model: VisionLanguageModel, dtype: str) -> VisionLanguageModel:
    """With parameters in the dtype they are loaded in; buffers stay as they are, as in loading."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch_dtype(dtype))
    return model


def _described(options: ModelOptions) -> ModelOptions:
    """The parts of a model, those of its base read from the base's config."""
    if options.base is None:
        return replace(options)
    base = _base(options.base)
    given = {part: getattr(options, part) or getattr(base, part) for part in PARTS}
    if given["language"] and options.quantize:
        given["language"] = replace(given["language"], quantize=options.quantize)
    return replace(options, base=None, **given)


def _base(name: str) -> ModelOptions:
    """The parts that a folder's or a known model's config describes, in whichever of the three formats."""
    config = config_of(name)
    if config.get("mmtune") == FORMAT_VERSION:
        return read_options(name)
    if kind_of(config) == LLAVA_HF:
        return _of_transformers(config, name)
    if kind_of(config) == LLAVA:
        return _of_llava(config, name)
    raise UserError(
        f"not the config of a vision-language model (model_type {config.get('model_type')!r})",
        where=name,
        mend="Name a folder of mmtune, a LlavaForConditionalGeneration or a LLaVA-1.5, or the parts by "
        "themselves.",
    )


def _of_transformers(config: dict[str, Any], where: str) -> ModelOptions:
    _must_fit(unfitting_llava_hf(config), where)
    vision = of_family({"model_type": "clip_vision_model", **config["vision_config"]})
    count = vision.get("num_hidden_layers", CONFIG_MAPPING["clip_vision_model"]().num_hidden_layers)
    layer = layer_from_the_end(config.get("vision_feature_layer", -2), count)
    return ModelOptions(
        vision=VisionOptions("clip", config=vision, layer=layer),
        connector=ConnectorOptions("mlp2x_gelu"),
        language=LanguageOptions(config={**TEXT, **config["text_config"]}, tokenizer=where),
    )


def _of_llava(config: dict[str, Any], where: str) -> ModelOptions:
    _must_fit(unfitting_llava(config), where)
    return ModelOptions(
        vision=VisionOptions(
            "clip", weights=config["mm_vision_tower"], layer=config["mm_vision_select_layer"]
        ),
        connector=ConnectorOptions(config.get("mm_projector_type", "linear")),
        language=LanguageOptions(config={**config, "model_type": "llama"}, tokenizer=where),
    )


def _must_fit(unfit: list[tuple[str, str]], where: str) -> None:
    if unfit:
        raise UserError.of(Fault(what, where, mend) for what, mend in unfit)
