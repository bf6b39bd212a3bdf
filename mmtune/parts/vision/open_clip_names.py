"""What open_clip knows by name: the configs of models, and where their published weights lie on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.core.errors import UserError
from mmtune.core.files import read_json
from mmtune.core.table import nearest

try:
    import open_clip
    import timm
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise UserError(
        f"open_clip cannot be imported: {str(error).splitlines()[0]}",
        where="model.vision.tower",
        mend="pip install 'mmtune[open_clip]'; torchvision has to be of the same build as torch.",
    ) from None


def model_named(name: str, where: str) -> dict[str, Any]:
    """The model_cfg of one of open_clip's names, such as ViT-B-16, or of a JSON file like open_clip's own.

    Raises UserError for an unknown name or a file that is none.
    """
    if name.endswith(".json"):
        model = read_json(Path(name))
        model = model.get("model_cfg", model) if isinstance(model, dict) else {}
    else:
        model = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if model is None:
            mend = f"{nearest(name, open_clip.list_models())} Or name a JSON file of such a config."
            raise UserError(f"open_clip knows no model '{name}'", where=where, mend=mend)
    if not isinstance(model.get("vision_cfg"), dict):
        raise UserError(
            "it holds no vision_cfg", where=name, mend="Name a model config as open_clip has them."
        )
    return model


def split_name(weights: str) -> tuple[str, str] | None:
    """A model of open_clip's and a tag, of `ViT-H-14/laion2b_s32b_b79k`; None for a folder or a hub name.

    Raises UserError where open_clip knows the model and not the tag.
    """
    model, _, tag = weights.partition("/")
    if Path(weights).exists() or model not in open_clip.list_models():
        return None
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        mend = f"{nearest(tag, tags)} Say {model}/TAG." if tags else "Choose another model."
        raise UserError(f"open_clip knows no weights '{tag}' of {model}", where=weights, mend=mend)
    return model, tag


def hub_name(model: str, tag: str) -> str:
    """Where open_clip finds these weights on the hub. Raises UserError where they lie elsewhere."""
    said = open_clip.get_pretrained_cfg(model, tag)
    if not said.get("hf_hub"):
        raise UserError(
            f"these weights are not on the hub: {said.get('url')}",
            where=f"{model}/{tag}",
            mend=f"Download that file, then name it as weights, with config: {{model: {model}}}.",
        )
    return said["hf_hub"].strip("/")


def model_of(weights: str) -> dict[str, Any] | None:
    """The model_cfg of published weights, by open_clip's name or their hub name; None of others."""
    named = split_name(weights)
    for model, tag in [named] if named else open_clip.list_pretrained():
        said = open_clip.get_pretrained_cfg(model, tag)
        if named or said.get("hf_hub", "").strip("/") == weights:
            return model_named(model, weights)
    return None


def with_timm(architecture: str) -> str:
    """How a tower that open_clip takes from timm is had from timm itself."""
    published = timm.list_models(f"{architecture}.*", pretrained=True)
    if not published or not architecture.startswith(("vit_", "eva", "beit")):
        return "Choose a plain one, such as those open_clip calls ViT-B-16, ViT-L-14 or ViT-H-14."
    names = " or ".join(f"timm/{name}" for name in published)
    return f"timm's towers take `tower: timm`, with weights: {names}."
