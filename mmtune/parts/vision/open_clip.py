"""Vision transformers of open_clip, from its hub format or from a checkpoint of its training.

The hub format: a folder or hub name with open_clip_config.json beside open_clip_model.safetensors or
open_clip_pytorch_model.bin, as push_to_hf_hub writes them. A checkpoint is a file; `config` says of which
model. The text tower is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, replacing, write_json
from mmtune.core.table import nearest
from mmtune.parts.loading import own_weights, refusals, require_weights
from mmtune.parts.vision.base import (
    VisionTower,
    layers_up_to,
    require_tokens,
    require_whole_patches,
    side_of,
    unfit_colours,
)
from mmtune.parts.vision.open_clip_names import hub_name, model_named, model_of, split_name, with_timm
from mmtune.parts.vision.stored import file_in, folder_of, read_tensors

# After open_clip_names, which says what to do where open_clip is not to be had.
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # isort: skip
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed  # isort: skip

CONFIG = "open_clip_config.json"
WEIGHTS, PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_OWN_FIT: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}
_MEND = (
    f"Name a folder with {CONFIG} and {WEIGHTS} or {PICKLED}, a hub name such as laion/CLIP-..., or a model "
    "and tag of open_clip's such as ViT-H-14/laion2b_s32b_b79k."
)
_WHOLE = "Copy the folder anew; it must be whole."
# For training as CLIP does and for the pooled feature alone, and here switched off.
_NO_EFFECT = {
    "attentional_pool": False,
    "final_ln_after_pool": False,
    "output_tokens": False,
    "patch_dropout": 0.0,
    "pool_type": "none",
}
_CUSTOM = {
    *("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads"),
    *("scale_attn_inner", "scale_attn", "scale_fc"),
}


class OpenClipTower(VisionTower):
    """Patch features of a block's output, without the class token and before any final norm.

    How a picture is laid on its square is `fit`'s to say, whatever resize_mode the tower was trained with.

    Tensors have open_clip's names, but for `attn.in_proj.weight`, which is `attn.in_proj_weight` there.
    """

    has_cls = True
    prefix = 1
    config_file = CONFIG
    half_pixel = "even"

    def __init__(self, vision_cfg: CLIPVisionCfg, quick_gelu: bool, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.vision_cfg = vision_cfg
        self.quick_gelu = quick_gelu
        self.visual: Any = _build_vision_tower(1, vision_cfg, quick_gelu)
        self.visual.ln_post, self.visual.proj = nn.Identity(), None
        for block in self.visual.transformer.resblocks:
            block.attn = _Attention(block.attn)
        positions = self.visual.positional_embedding
        if not positions.requires_grad:  # sines and cosines: a tuner is not to find them
            del self.visual.positional_embedding
            self.visual.register_buffer("positional_embedding", positions.data)
        self.width = vision_cfg.width
        self.image_size = self.visual.image_size[0]
        self.patch = self.visual.patch_size[0]
        self.tokens = (self.image_size // self.patch) ** 2
        self._prepared(preprocess)

    @classmethod
    def load(
        cls,
        weights: str,
        layer: int,
        dtype: torch.dtype,
        image_size: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> OpenClipTower:
        """config: what `create` takes, where weights is a file, and only there."""
        if Path(weights).suffix in _SUFFIXES and not Path(weights).exists():
            raise UserError("no such file", where=weights, mend="Is the path right?")
        if config is not None or Path(weights).is_file():
            file, where = Path(weights), "model.vision.config"
            if config is None or not file.is_file():
                raise _one_without_the_other(config, weights)
            fields, said = cls._expanded(config), {}
        else:
            if named := split_name(weights):
                _cut(model_named(named[0], weights)["vision_cfg"], layer, weights)
            folder = folder_of(hub_name(*named) if named else weights, CONFIG, (WEIGHTS, PICKLED), _MEND)
            where = str(folder / CONFIG)
            stated = read_json(folder / CONFIG)
            fields, said = cls.fields(stated, where), _preprocessing(stated, where)
            file = file_in(folder, (WEIGHTS, PICKLED), _MEND)
        outline = torch.get_default_device().type == "meta"
        with torch.device("meta"):
            tower = cls._made(fields, layer, image_size, said, where)
        if config is not None:
            tower.given_config = fields
        stored = read_tensors(file, "visual.")
        if tower.image_size != fields.get("image_size", CLIPVisionCfg.image_size):
            _resize(stored, tower)
        stored = {name.replace(".in_proj_", ".in_proj."): tensor for name, tensor in stored.items()}
        expected = tower.state_dict()
        both = expected.keys() & stored.keys()
        mismatched = [name for name in both if stored[name].shape != expected[name].shape]
        require_weights(expected.keys() - both, mismatched, str(file))
        if not outline:
            tower.load_state_dict({name: stored[name].to(dtype) for name in expected}, assign=True)
        return tower.to(dtype)

    @classmethod
    def fields(cls, config: dict[str, Any], where: str) -> dict[str, Any]:
        model = config.get("model_cfg") if isinstance(config, dict) else None
        if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
            raise UserError("it holds no model_cfg with a vision_cfg", where=where, mend=_MEND)
        used = {name: value for name, value in model["vision_cfg"].items() if name not in _NO_EFFECT}
        return {**used, "quick_gelu": model.get("quick_gelu", False)}

    @classmethod
    def known_fields(cls, weights: str) -> dict[str, Any] | None:
        model = model_of(weights)
        return super().known_fields(weights) if model is None else cls.fields({"model_cfg": model}, weights)

    @classmethod
    def create(cls, config: dict[str, Any], layer: int, image_size: int | None = None) -> OpenClipTower:
        """config: fields of open_clip's vision_cfg, and quick_gelu, which open_clip keeps beside it; or
        `model`, a name of open_clip's or the path of a JSON file like open_clip's.
        """
        return cls._made(cls._expanded(config), layer, image_size, {}, "model.vision.config")

    @classmethod
    def _expanded(cls, config: dict[str, Any]) -> dict[str, Any]:
        where = "model.vision.config"
        if "model" in config:
            if len(config) > 1:
                what = f"beside 'model' stand {', '.join(sorted(config.keys() - {'model'}))}"
                raise UserError(what, where=where, mend="Name a model, or give all fields of its vision_cfg.")
            return cls.fields({"model_cfg": model_named(str(config["model"]), where)}, where)
        if useless := sorted(config.keys() & _NO_EFFECT.keys()):
            what = f"{', '.join(useless)}: of no effect on the patches of a layer"
            raise UserError(what, where=where, mend="Leave it out.")
        return config

    @classmethod
    def _made(
        cls, fields: dict[str, Any], layer: int, side: int | None, preprocess: dict[str, Any], where: str
    ) -> OpenClipTower:
        quick_gelu = fields.get("quick_gelu", False)
        if not isinstance(quick_gelu, bool):
            raise UserError(f"quick_gelu: expected true or false, found {quick_gelu!r}", where=where)
        vision_cfg = _cut({k: v for k, v in fields.items() if k != "quick_gelu"}, layer, where)
        if side is not None and side != vision_cfg.image_size:
            require_whole_patches(side, int(vision_cfg.patch_size), where)
            vision_cfg.image_size = side
        shown, patch = int(vision_cfg.image_size), int(vision_cfg.patch_size)
        require_tokens((shown // patch) ** 2, shown, patch, where)
        with refusals(where, "open_clip"):
            return cls(vision_cfg, quick_gelu, preprocess)

    def take_transform(self, folder: str) -> None:
        file = Path(folder) / CONFIG
        if file.is_file():
            self._prepared(_preprocessing(read_json(file), str(file)))

    def _prepared(self, preprocess: dict[str, Any]) -> None:
        self.preprocess = preprocess
        self.mean = tuple(preprocess.get("mean", OPENAI_DATASET_MEAN))
        self.std = tuple(preprocess.get("std", OPENAI_DATASET_STD))
        # open_clip draws `random` only while it trains; evaluating, it takes bicubic.
        self.resample = "bilinear" if preprocess.get("interpolation") == "bilinear" else "bicubic"
        self.own_fit = _OWN_FIT.get(preprocess.get("resize_mode", "shortest"))

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held = {
            name.replace(".in_proj.", ".in_proj_"): tensor
            for name, tensor in own_weights(self, tensors).items()
        }
        with replacing(folder / WEIGHTS) as temporary:
            save_file(held, temporary, metadata={"format": "pt"})
        config = {
            "model_cfg": {"quick_gelu": self.quick_gelu, "vision_cfg": asdict(self.vision_cfg)},
            "preprocess_cfg": {
                **self.preprocess,
                **{"mean": list(self.mean), "std": list(self.std), "interpolation": self.resample},
            },
        }
        write_json(folder / CONFIG, config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(self.normalise(images, self.visual.conv1.weight.dtype))[:, self.prefix :]

    def layers(self) -> list[nn.Module]:
        return list(self.visual.transformer.resblocks)

    def checkpoint_activations(self, on: bool = True) -> None:
        self.visual.set_grad_checkpointing(on)  # non-reentrant since open_clip 3

    def attend_by(self, implementation: str) -> None:
        for block in self.visual.transformer.resblocks:
            block.attn.eager = implementation == "eager"


class _Attention(nn.Module):
    """torch's MultiheadAttention with both projections as layers that are called.

    There they are bare parameters: a LoRA on them would change nothing, and ZeRO-3 would not gather them.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.eager = False
        self.in_proj = nn.Linear(packed.embed_dim, 3 * packed.embed_dim)  # rows of q, then of k, then of v
        self.in_proj.weight, self.in_proj.bias = packed.in_proj_weight, packed.in_proj_bias
        self.out_proj = nn.Linear(packed.embed_dim, packed.embed_dim)
        self.out_proj.weight, self.out_proj.bias = packed.out_proj.weight, packed.out_proj.bias

    def forward(self, x: torch.Tensor, *_: torch.Tensor, **__: Any) -> tuple[torch.Tensor]:
        """[N, L, width] -> ([N, L, width],); open_clip gives x again as key and value, and no mask."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.eager:
            mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return (self.out_proj(mixed.transpose(1, 2).flatten(2)),)


def _cut(fields: dict[str, Any], layer: int, where: str) -> CLIPVisionCfg:
    """The config of a plain vision transformer up to `layer`. Raises UserError where it is none."""
    known = list(asdict(CLIPVisionCfg()))
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UserError.of(Fault(f"unknown field '{name}'", where, nearest(name, known)) for name in unknown)
    vision_cfg = CLIPVisionCfg(**{**fields, **_NO_EFFECT})
    kind = ""
    if vision_cfg.timm_model_name:
        kind = f"timm's {vision_cfg.timm_model_name}"
    elif isinstance(vision_cfg.layers, list | tuple):
        kind = "a ResNet"
    elif custom := [name for name in _CUSTOM if fields.get(name) not in (None, False, "default")]:
        kind = f"a transformer with blocks of its own ({', '.join(custom)})"
    if kind:
        raise UserError(
            f"it is {kind}, not one of open_clip's plain vision transformers",
            where=where,
            mend=with_timm(vision_cfg.timm_model_name or ""),
        )
    if not isinstance(vision_cfg.layers, int):
        raise UserError(f"layers: expected a whole number, found {vision_cfg.layers!r}", where=where)
    vision_cfg.image_size = side_of(vision_cfg.image_size, "image_size", where)
    vision_cfg.patch_size = side_of(vision_cfg.patch_size, "patch_size", where)
    vision_cfg.layers = layers_up_to(layer, vision_cfg.layers, where)
    return vision_cfg


def _preprocessing(config: dict[str, Any], where: str) -> dict[str, Any]:
    stated = config.get("preprocess_cfg") or {}
    if not isinstance(stated, dict):
        raise UserError("preprocess_cfg holds fields", where=where, mend=_WHOLE)
    said = {name: value for name, value in stated.items() if value is not None}
    if faults := unfit_colours(said.get("mean", OPENAI_DATASET_MEAN), said.get("std", OPENAI_DATASET_STD)):
        raise UserError.of(Fault(what, where, _WHOLE) for what in faults)
    if said.get("interpolation", "bicubic") not in ("bicubic", "bilinear", "random"):
        raise UserError(f"unknown interpolation {said['interpolation']!r}", where=where, mend=_WHOLE)
    return said


def _resize(stored: dict[str, torch.Tensor], tower: OpenClipTower) -> None:
    """Interpolates the positions as open_clip does it for another image size."""
    positions = stored.get("visual.positional_embedding")
    if positions is not None:
        stored["visual.positional_embedding"] = positions.float()
        resize_pos_embed(stored, tower)


def _one_without_the_other(config: dict[str, Any] | None, weights: str) -> UserError:
    if config is None:
        mend = "Add config: {model: NAME}, a name of open_clip's such as ViT-B-16 or a JSON file of yours."
        return UserError(
            "a file of weights alone, which doesn't say of which model", where=weights, mend=mend
        )
    return UserError(
        "config belongs to a file of weights, and this is none",
        where=weights,
        mend="Leave it out: a folder or a name has a config of its own. Or correct the path of the file.",
    )
