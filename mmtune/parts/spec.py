"""What a model is made of: the options of each part and the tables of names. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mmtune.core.config import Path_, Report, Source, build
from mmtune.core.files import read_json, shipped
from mmtune.core.table import Table, nearest, refuse_unasked
from mmtune.data.chat import FORMATS
from mmtune.parts.foreign import how_to_import

PARTS = ("vision", "connector", "language")
Quantization = Literal["nf4", "int8"]

TOWERS = Table(
    "vision tower",
    {
        "clip": "mmtune.parts.vision.clip:ClipTower",
        "siglip": "mmtune.parts.vision.siglip:SiglipTower",
        "siglip2": "mmtune.parts.vision.siglip2:Siglip2Tower",
        "dinov2": "mmtune.parts.vision.dinov2:Dinov2Tower",
        "dinov3": "mmtune.parts.vision.dinov3:Dinov3Tower",
        "open_clip": "mmtune.parts.vision.open_clip:OpenClipTower",
        "timm": "mmtune.parts.vision.timm:TimmTower",
    },
    contract="mmtune.parts.vision.base:VisionTower",
    group="mmtune.towers",
)
# What transformers calls a model, alone or as a part of a whole one -> the tower that takes it.
MODEL_TYPES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
    "timm_wrapper": "timm",
}
CONNECTORS = Table(
    "connector",
    {
        "linear": "mmtune.parts.connector.linear:LinearConnector",
        "mlp2x_gelu": "mmtune.parts.connector.mlp:MlpConnector",
        "mlpNx_gelu": "mmtune.parts.connector.mlp:mlp",
        "pixel_shuffle": "mmtune.parts.connector.pixel_shuffle:PixelShuffleConnector",
        "resampler": "mmtune.parts.connector.resampler:ResamplerConnector",
    },
    contract="mmtune.parts.connector.base:Connector",
    group="mmtune.connectors",
)


@dataclass
class VisionOptions:
    """A vision tower: `weights` (a folder or hub name) or, from scratch, `config` (its own config's fields).
    Both for a checkpoint of open_clip's training, which is a file and doesn't say of which model it is.

    layer: whose output is taken; -1 is the last, -2 the one before it (LLaVA-1.5). fit: how a picture becomes
    a square; `own` as the tower's own transform does it. image_size: another side than the tower's own, in
    pixels; its positions are interpolated.
    """

    tower: str
    weights: str | None = None
    config: dict[str, Any] | None = None
    layer: int = -2
    fit: Literal["pad", "crop", "squash", "own"] = "pad"
    image_size: int | None = None

    def __post_init__(self) -> None:
        self.weights = _found(self.weights)

    def check(self, fault: Report) -> None:
        if self.tower not in TOWERS:
            fault("tower", f"unknown vision tower '{self.tower}'", TOWERS.nearest(self.tower))
        if self.tower in ("open_clip", "timm") and find_spec(self.tower) is None:
            fault("tower", f"{self.tower} is not installed", f"pip install 'mmtune[{self.tower}]'")
        if self.layer >= 0:
            fault("layer", f"expected a negative number, found {self.layer}", "-2 is LLaVA-1.5's choice.")
        if self.image_size is not None and self.image_size < 1:
            fault("image_size", f"expected a number of pixels, found {self.image_size}")
        if self.tower != "open_clip" or not self.weights:  # whose checkpoints come without a config
            _weights_or_config(self.weights, self.config, fault)


@dataclass
class ConnectorOptions:
    """A connector: new and random, or with `weights` (a folder written by mmtune).

    options: those of its kind (for a resampler `queries`); None: its defaults, or those of its weights.
    """

    kind: str
    weights: str | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.weights = _found(self.weights)

    def check(self, fault: Report) -> None:
        if self.kind not in CONNECTORS:
            fault("kind", f"unknown connector '{self.kind}'", CONNECTORS.nearest(self.kind))


@dataclass
class LanguageOptions:
    """A causal language model of transformers: `weights`, or from scratch `config` with `tokenizer`.

    quantize: in what its linear layers but the head are held, through bitsandbytes.
    """

    weights: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat: str = "template"
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        self.weights = _found(self.weights)
        self.tokenizer = _found(self.tokenizer)

    def check(self, fault: Report) -> None:
        if self.chat not in FORMATS:
            fault("chat", f"unknown chat format '{self.chat}'", nearest(self.chat, list(FORMATS)))
        _weights_or_config(self.weights, self.config, fault)
        if self.config is not None and self.tokenizer is None:
            fault("", "a language model from scratch needs a 'tokenizer'")
        if self.config is not None and self.quantize:
            fault("quantize", "a language model from scratch has to train, which quantised weights cannot")
        _check_quantize(self.quantize, fault)


@dataclass
class ModelOptions:
    """A model folder as `base`, or the three parts; a part given beside `base` takes its place.

    quantize: the language model's linear layers but the head are held in 4 bits (nf4) or 8 (int8); `weights`
    are quantised as they are loaded. attention: how tower and language model compute it; auto takes for each
    the first of flash, sdpa and eager that is there (parts/attention.py). On a CPU in bfloat16 the backward
    pass of sdpa is slow: a training step of the tiny model takes 0.34 s with it, 0.18 s with eager.
    """

    base: str | None = None
    vision: VisionOptions | None = None
    connector: ConnectorOptions | None = None
    language: LanguageOptions | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    quantize: Quantization | None = None

    def check(self, fault: Report) -> None:
        if self.base is None:
            for part in PARTS:
                if getattr(self, part) is None:
                    fault(
                        "", f"neither 'base' nor '{part}' is given", "Name a base model, or all three parts."
                    )
        elif not os.path.isdir(shipped(self.base)):
            mend = "Name a folder that mmtune saved a model to."
            fault("base", f"there is no folder {self.base}", mend, absent=True)
        elif not os.path.isfile(shipped(self.base) / "config.json"):
            fault("base", f"{self.base} holds no config.json", "Name a folder that mmtune saved a model to.")
        elif foreign := how_to_import(shipped(self.base)):
            fault("base", f"{self.base}: {foreign[0]}", foreign[1], absent=True)
        _check_quantize(self.quantize, fault)
        if self.language and self.language.quantize not in (None, self.quantize or self.language.quantize):
            what = f"{self.quantize}, but language.quantize is {self.language.quantize}"
            fault("quantize", what, "Give one of the two.")


def options_in(part: str, fields: Any, source: Source, key: Path_ = ()) -> Any:
    """A part's options as a file of a model's or a part's folder has them, under `key`; None with faults
    gathered in `source`.

    Raises UserError where they name code outside the package which nobody here has named: the folder may come
    from anywhere, and opening it must not run what it says.
    """
    for option in ("tower", "kind"):
        if isinstance(fields, dict):
            refuse_unasked(str(fields.get(option)), source.path)
    return build(_OPTIONS[part], fields, key, source)


_OPTIONS = {"vision": VisionOptions, "connector": ConnectorOptions, "language": LanguageOptions}


def quantization(model: ModelOptions) -> Any:
    """In what the language model's linear layers are to be held, nf4 or int8; None: as they are stored.

    Raises UserError for a base whose config cannot be read.
    """
    if model.quantize or model.language or model.base is None:
        return model.quantize or (model.language.quantize if model.language else None)
    language = saved_part(model.base, "language")
    return language.get("quantize")


def saved_part(base: str, part: str) -> dict[str, Any]:
    """What the config of a model folder says of one part; nothing where there is none, or it is broken."""
    file = shipped(base) / "config.json"
    config = read_json(file) if file.is_file() else {}
    described = config.get(part) if isinstance(config, dict) else None
    return described if isinstance(described, dict) else {}


def _check_quantize(quantize: str | None, fault: Report) -> None:
    if quantize and find_spec("bitsandbytes") is None:
        fault("quantize", "bitsandbytes is not installed", "pip install 'mmtune[quantized]'")


def _found(name: str | None) -> str | None:
    """What ships with mmtune under `name`, where nothing of that name is here; otherwise `name` as it is."""
    place = shipped(name) if name else None
    return name if place is None or place == Path(str(name)) else str(place)


def _weights_or_config(weights: str | None, config: dict[str, Any] | None, fault: Report) -> None:
    if (weights is None) == (config is None):
        fault("", "give either 'weights' or, to start from scratch, 'config'")
