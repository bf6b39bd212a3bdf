"""Vision transformers of timm (VisionTransformer, Eva, Beit), from a folder or hub name in its own format.

The format: config.json beside model.safetensors or pytorch_model.bin, as timm's save_for_hf and
push_to_hf_hub write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors.torch import save_file
from torch import nn

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, replacing, write_json
from mmtune.core.table import nearest
from mmtune.data.image import Resample
from mmtune.parts.loading import own_weights, refusals, require_weights
from mmtune.parts.spec import MODEL_TYPES
from mmtune.parts.vision.base import (
    VisionTower,
    is_number,
    layers_up_to,
    require_tokens,
    require_whole_patches,
    side_of,
    unfit_colours,
)
from mmtune.parts.vision.stored import file_in, folder_of, read_tensors

try:
    import timm
    from timm.data import resolve_data_config
    from timm.layers import PatchEmbed
    from timm.models import build_model_with_cfg
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    raise UserError(
        f"timm cannot be imported: {str(error).splitlines()[0]}",
        where="model.vision.tower",
        mend="pip install 'mmtune[timm]'; torchvision has to be of the same build as torch.",
    ) from None

CONFIG, FILES = "config.json", ("model.safetensors", "pytorch_model.bin")
_MEND = f"Name a folder with {CONFIG} and {' or '.join(FILES)}, or a hub name such as timm/vit_..."
_WHOLE = "Correct the file, or copy the folder anew."
# The models taken, with the arguments by which timm makes one that ends with its last block. Of Beit there
# is none without a final norm.
_PLAIN: dict[type, dict[str, Any]] = {
    VisionTransformer: {"final_norm": False},
    Eva: {"use_post_transformer_norm": False, "use_fc_norm": False},
    Beit: {},
}
_FILES = ("vision_transformer", "deit", "eva", "beit")  # of timm, that make them
# For training a classifier and for the pooled feature alone, and here switched off.
_NO_EFFECT = {
    *("num_classes", "global_pool", "drop_rate", "patch_drop_rate"),
    *("final_norm", "fc_norm", "use_post_transformer_norm", "use_fc_norm"),
}
# What create_model does, and not the model: which weights it reads, from where.
_NOT_OF_MODELS = {*signature(timm.create_model).parameters, *signature(build_model_with_cfg).parameters}
_TRANSFORM = ("input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_OWN_FIT: dict[str, Any] = {"center": "crop", "squash": "squash"}


class TimmTower(VisionTower):
    """Patch features of a block's output, without class token and registers and before any final norm."""

    half_pixel = "even"

    def __init__(
        self, architecture: str, args: dict[str, Any], transform: dict[str, Any], where: str
    ) -> None:
        """args: those that timm's config calls model_args; transform: its pretrained_cfg, or nothing."""
        super().__init__()
        self.architecture = architecture
        self.args = {name: value for name, value in args.items() if name not in _NO_EFFECT}
        self.hf = _plain_model(architecture, self.args, transform, where)
        self.width = self.hf.embed_dim
        self.patch = side_of(self.hf.patch_embed.patch_size, "patch_size", where)
        self.prefix = self.hf.num_prefix_tokens
        self.has_cls = self.hf.cls_token is not None
        with refusals(where, "timm"):
            self.pixels = resolve_data_config(pretrained_cfg=self.hf.pretrained_cfg)
            self.mean, self.std = tuple(self.pixels["mean"]), tuple(self.pixels["std"])
        self.resample = self.pixels["interpolation"]
        faults = unfit_colours(self.mean, self.std)
        if self.resample not in get_args(Resample):
            faults.append(f"unknown interpolation {self.resample!r}")
        if not is_number(self.pixels["crop_pct"]) or self.pixels["crop_pct"] <= 0:
            faults.append(f"crop_pct {self.pixels['crop_pct']!r} is not a number above zero")
        if faults:
            raise UserError.of(Fault(what, where) for what in faults)
        self.own_fit = _OWN_FIT.get(self.pixels["crop_mode"])
        self.crop_pct = self.pixels["crop_pct"]

    @classmethod
    def load(cls, weights: str, layer: int, dtype: torch.dtype, image_size: int | None = None) -> Self:
        named = None if Path(weights).is_dir() else _named(weights)
        folder = folder_of(named.hf_hub_id if named else weights, CONFIG, FILES, _MEND)
        outline = torch.get_default_device().type == "meta"
        with torch.device("meta"):
            tower = cls._described(read_json(folder / CONFIG), layer, str(folder / CONFIG))
        stored = read_tensors(file_in(folder, FILES, _MEND))
        expected = tower.hf.state_dict()
        both = expected.keys() & stored.keys()
        mismatched = [name for name in both if stored[name].shape != expected[name].shape]
        require_weights(expected.keys() - both, mismatched, str(folder))
        if not outline:
            tower.hf.to_empty(device=torch.get_default_device())
            module: Any
            for module in tower.hf.modules():  # what timm works out instead of storing it, such as its RoPE
                if hasattr(module, "init_non_persistent_buffers"):
                    module.init_non_persistent_buffers()
            tower.hf.load_state_dict({name: stored[name] for name in expected})
        return tower._resized(image_size, weights).to(dtype)

    @classmethod
    def known_fields(cls, weights: str) -> dict[str, Any] | None:
        said = None if Path(weights).is_dir() else _named(weights)
        if said is None:
            return super().known_fields(weights)
        return {"architecture": said.architecture, "pretrained_cfg": said.to_dict()}

    @classmethod
    def create(cls, config: dict[str, Any], layer: int, image_size: int | None = None) -> Self:
        """config: what a config.json of timm says, or `architecture` with the arguments that timm takes."""
        where = "model.vision.config"
        return cls._described(config, layer, where)._resized(image_size, where)

    @classmethod
    def _described(cls, config: dict[str, Any], layer: int, where: str) -> Self:
        """The tower that a config describes, at its own size, up to `layer`."""
        fields = dict(config) if isinstance(config, dict) else {}
        architecture = fields.pop("architecture", None)
        if family := MODEL_TYPES.get(fields.get("model_type", "")):
            what = f"this is a {fields['model_type']} model, not a timm model"
            raise UserError(what, where=where, mend=f"Say tower: {family}.")
        if not isinstance(architecture, str):
            raise UserError("it names no architecture of timm", where=where, mend=_MEND)
        if not timm.is_model(architecture):
            mend = nearest(architecture, timm.list_models())
            raise UserError(f"timm knows no architecture '{architecture}'", where=where, mend=mend)
        file = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
        if file not in _FILES:
            raise _unfit(architecture, f"one of timm's {file} models", where)
        if "pretrained_cfg" in fields:
            args, transform = fields.get("model_args") or {}, fields["pretrained_cfg"]
            if not isinstance(args, dict) or not isinstance(transform, dict):
                raise UserError("model_args and pretrained_cfg hold fields", where=where, mend=_WHOLE)
        elif "input_size" in fields:  # as timm wrote it of old
            args, transform = {}, fields
        else:
            args, transform = fields, {}
            if useless := sorted(fields.keys() & _NO_EFFECT):
                what = f"{', '.join(useless)}: of no effect on the patches of a layer"
                raise UserError(what, where=where, mend="Leave it out.")
        if foreign := sorted((args.keys() & _NOT_OF_MODELS) - _NO_EFFECT):
            what = f"{', '.join(foreign)}: not an argument of a model, but of how timm loads one"
            raise UserError(what, where=where, mend="Leave it out.")
        tower = cls(architecture, args, transform, where)
        used = layers_up_to(layer, len(tower.hf.blocks), where)
        tower.hf.prune_intermediate_layers([used - 1], prune_norm=True)
        return tower

    def _resized(self, side: int | None, where: str) -> Self:
        """The tower for pictures of another side, its positions as timm's set_input_size makes them."""
        if side is not None and (side, side) != self.hf.patch_embed.img_size:
            require_whole_patches(side, self.patch, where)
            self.hf.set_input_size((side, side))
        self.image_size = side_of(self.hf.patch_embed.img_size, "input_size", where)
        # Rounded up where the model pads its pictures, else down.
        tokens = math.prod(self.hf.patch_embed.dynamic_feat_size(self.hf.patch_embed.img_size))
        self.tokens = require_tokens(tokens, self.image_size, self.patch, where)
        return self

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILES[0]) as temporary:
            save_file(own_weights(self.hf, tensors), temporary, metadata={"format": "pt"})
        side = self.image_size
        args = {"img_size": side, "depth": len(self.hf.blocks), "num_classes": 0, "global_pool": ""}
        config = {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": self.width,
            "model_args": {**self.args, **args, **_PLAIN[type(self.hf)]},
            "pretrained_cfg": {**self.pixels, "input_size": [3, side, side], "num_classes": 0},
        }
        write_json(folder / CONFIG, config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.hf(self.normalise(images, self.hf.patch_embed.proj.weight.dtype))[:, self.prefix :]

    def layers(self) -> list[nn.Module]:
        return list(self.hf.blocks)

    def checkpoint_activations(self, on: bool = True) -> None:
        self.hf.set_grad_checkpointing(on)  # non-reentrant unless timm is told otherwise

    def attend_by(self, implementation: str) -> None:
        for module in self.hf.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = implementation != "eager"


def _named(weights: str) -> Any:
    """timm's own config of a name, with tag or without, that it knows weights of; None of others. Raises
    UserError where those lie nowhere on the hub, or under the name of another architecture: there a config
    says what that one does, such as another activation.
    """
    name = weights.removeprefix("timm/")
    if not timm.is_model_pretrained(name):
        return None
    said: Any = timm.get_pretrained_cfg(name)
    lies = said.hf_hub_id or ""
    if lies.rpartition("/")[2] != f"{said.architecture}.{said.tag}":
        what = f"timm's weights of this name lie on the hub as {lies}" if lies else "not on the hub"
        mend = "Let timm write a folder: timm.models.save_for_hf(timm.create_model(NAME, True), FOLDER)."
        raise UserError(what, where=weights, mend=mend)
    return said


def _plain_model(architecture: str, args: dict[str, Any], transform: dict[str, Any], where: str) -> Any:
    """timm's model, without a head. Raises UserError for one whose features are not the output of equal
    blocks, a token per patch.
    """
    given = {name: value for name, value in transform.items() if name in _TRANSFORM}
    with refusals(where, "timm"):
        hf: Any = timm.create_model(architecture, pretrained_cfg=given, num_classes=0, global_pool="", **args)
    if type(hf) not in _PLAIN:
        raise _unfit(architecture, f"a {type(hf).__name__}", where)
    if type(hf.patch_embed) is not PatchEmbed:
        raise _unfit(architecture, "a vision transformer on a convolutional network", where)
    blocks = {tuple((name, p.shape) for name, p in block.named_parameters()) for block in hf.blocks}
    if len(blocks) > 1 or getattr(hf, "rope_mixed", False):
        raise _unfit(architecture, "a vision transformer whose blocks differ from each other", where)
    if hf.in_chans != 3:
        raise _unfit(architecture, f"for pictures of {hf.in_chans} channels", where)
    for module in hf.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # else `qkv` is not called: a LoRA on it would change nothing
    return hf


def _unfit(architecture: str, kind: str, where: str) -> UserError:
    return UserError(
        f"{architecture} is {kind}, not one of timm's plain vision transformers",
        where=where,
        mend="Choose a plain one, such as vit_base_patch16_224, a SigLIP, DINOv2, DINOv3, EVA-02 or BEiT.",
    )
