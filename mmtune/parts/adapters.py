"""Saved LoRA adapters and the weights they change, read tensor by tensor: no model is put together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped
from mmtune.parts.model import read_options
from mmtune.parts.spec import PARTS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WHOLE = "Copy the folder anew from where it was trained; it must be whole."


class Tensors:
    """The tensors of the safetensors files in a folder, also where a model lies in several of them.

    Raises UserError where there is no such file, or one is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise UserError("no file of weights, *.safetensors, in this folder", where=folder)
        for file in found:
            with _opened(file) as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it was saved. Raises UserError."""
        with _opened(self.files[name]) as tensors:
            return tensors.get_tensor(name)


@dataclass(frozen=True)
class Pair:
    """An update scale * B A: a is r x q, b is p x r, both fp32; scale is alpha / r, or as rsLoRA has it."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass
class SavedAdapter:
    """The adapters of one model: those of all its parts, or one of peft's alone.

    modules: each adapted layer's full name -> the adapter it is in, and its name there. Names of the
    language model stand as they are; `vision/` or `connector/` goes before those of the other parts.
    left_out: tensors that are no linear layer's A or B, and so are not looked at. quantized: in what the
    language model was held under it, nf4 or int8.
    """

    name: str
    folder: Path
    modules: dict[str, tuple[_Part, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    quantized: str | None = None

    def pair(self, module: str) -> Pair:
        """A, B and scale of an adapted layer. Raises UserError."""
        part, name = self.modules[module]
        return part.pair(name)

    def weight(self, module: str) -> torch.Tensor | None:
        """The frozen W (p x q) under it, as it was saved; None where there is no base. Raises UserError."""
        part, name = self.modules[module]
        return part.weight(name)

    def bases(self) -> list[str]:
        """The folders of the frozen weights, as far as they are there."""
        parts = {id(part): part for part, _ in self.modules.values()}.values()
        return [str(part.base.folder) for part in parts if part.base]


class _Part:
    """One folder of peft's, and the tensors of its base."""

    def __init__(self, folder: Path, base: Tensors | None) -> None:
        for file in (CONFIG, TENSORS):
            if not (folder / file).is_file():
                raise UserError(f"no {file}", where=folder, mend=WHOLE)
        self.folder, self.base = folder, base
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        kind = self.config.get("peft_type")
        if kind != "LORA" or self.config.get("use_dora"):
            what = "DoRA" if kind == "LORA" else kind
            raise UserError(
                f"it is {what}, whose update is not B A", where=folder, mend="Only LoRA can be analysed."
            )
        self.tensors = Tensors(folder)
        self.keys: dict[str, dict[str, str]] = {}
        self.left_out: list[str] = []
        for key in self.tensors.files:
            found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
            if found:
                self.keys.setdefault(found[1], {})[found[2]] = key
            else:
                self.left_out.append(key)
        halves = [name for name, pair in self.keys.items() if len(pair) < 2]
        if halves:
            raise UserError(f"of {halves[0]} there is only A or only B", where=folder, mend=WHOLE)
        if not self.keys:
            raise UserError("it adapts no linear layer", where=folder)

    def pair(self, name: str) -> Pair:
        a, b = (self.tensors.read(self.keys[name][which]).float() for which in "AB")
        rank = a.shape[0]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != rank:
            raise UserError(f"A and B of {name} don't fit: {a.shape}, {b.shape}", where=self.folder)
        alpha = _by_pattern(self.config.get("alpha_pattern") or {}, name, self.config["lora_alpha"])
        return Pair(a, b, alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def weight(self, name: str) -> torch.Tensor | None:
        if self.base is None:
            return None
        weight = self.base.read(self._key(name))
        weight = weight.T if self.config.get("fan_in_fan_out") else weight
        shapes = [self.tensors.read(self.keys[name][which]).shape for which in "AB"]
        expected = (shapes[1][0], shapes[0][1])
        if tuple(weight.shape) != expected or not weight.is_floating_point():
            raise UserError(
                f"the weight of {name} is {_shape(weight.shape)} {weight.dtype}, its adapter is for one of "
                f"{_shape(expected)}",
                where=self.base.folder,
                mend="Give the weights the adapter was trained on, not quantised: --base DIR.",
            )
        return weight

    def _key(self, name: str) -> str:
        """The base's name of a layer's weight. transformers calls LLaVA's language model otherwise on disk
        than in memory, and a whole model's files hold a language model's layers under a longer name.
        """
        assert self.base is not None
        on_disk = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        packed = f"{name}_weight"  # open_clip's q, k and v
        for known in (f"{name}.weight", f"{on_disk}.weight", packed):
            if known in self.base.files:
                return known
        longer = [key for key in self.base.files if key.endswith(f".{name}.weight")]
        if len(longer) != 1:
            raise UserError(
                f"{len(longer) or 'no'} weights there could be that of {name}",
                where=self.base.folder,
                mend="Give the weights the adapter was trained on: --base DIR.",
            )
        return longer[0]


def read_adapter(folder: Path, base: Path | None = None) -> SavedAdapter:
    """The adapters of a run's folder (its final model), of a model folder, or of a folder of peft's.

    base: where the frozen weights lie, a model folder or one of transformers; by default where the model
    or peft's config says, and none where a folder of peft's names no folder that is there. Raises UserError.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, mend="Give a run, a model folder or an adapter.")
    if (folder / CONFIG).is_file():
        named = base or Path(str(read_json(folder / CONFIG).get("base_model_name_or_path") or ""))
        there = base is not None or (named != Path() and named.is_dir())
        part = _Part(folder, _base(named, "language") if there else None)
        modules = {name: (part, name) for name in part.keys}
        return SavedAdapter(_name(folder), folder, modules, part.left_out)
    final = folder / "final"
    if (folder / "run.yaml").is_file() and not final.is_dir():
        raise UserError("this run is not finished: it has no final model", where=folder)
    model = final if final.is_dir() else folder
    options = None if base else read_options(model)  # which wants to find the weights it names
    config = read_json(model / "config.json")
    made = SavedAdapter(_name(folder), folder)
    if "adapter" in config.get("language", {}):
        made.quantized = config["language"].get("quantize")
    for name in PARTS:
        if "adapter" in config.get(name, {}):
            place = base or Path(getattr(options, name).weights)
            part = _Part(model / config[name]["adapter"], _base(place, name))
            prefix = "" if name == "language" else f"{name}/"
            made.modules |= {f"{prefix}{module}": (part, module) for module in part.keys}
            made.left_out += part.left_out
    if not made.modules:
        raise UserError(
            "no part of this model has an adapter", where=model, mend="Was it tuned with lora or lorasculpt?"
        )
    return made


def named_apart(adapters: Sequence[SavedAdapter]) -> None:
    """Gives those of one name their whole path for a name. Raises UserError where a folder is given twice."""
    places = [{part.folder.resolve() for part, _ in adapter.modules.values()} for adapter in adapters]
    twice = [adapter for adapter, its in zip(adapters, places, strict=True) if places.count(its) > 1]
    if twice:
        raise UserError("this adapter is given twice", where=twice[-1].folder)
    names = [adapter.name for adapter in adapters]
    for adapter in adapters:
        if names.count(adapter.name) > 1:
            adapter.name = str(adapter.folder)


def _name(folder: Path) -> str:
    """The run's name, where the folder lies in one."""
    place = folder.resolve()
    run = next((above for above in (place, *place.parents[:3]) if (above / "run.yaml").is_file()), None)
    if run is None or place in (run, run / "final") or run / "final" in place.parents:
        return (run or place).name
    return f"{run.name}/{place.relative_to(run)}"


def _base(place: Path, part: str) -> Tensors:
    """The weights of a part: in a folder of transformers, a model folder, or a model of the hub."""
    folder = shipped(place)
    if not folder.is_dir():
        folder = _from_hub(str(place))
    config = folder / "config.json"
    if config.is_file() and "mmtune" in read_json(config):
        return _base(Path(getattr(read_options(folder), part).weights), part)
    return Tensors(folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"there is no folder {name}, and it is not to be had from the hub: {said}",
            mend="Give the folder of the weights the adapter was trained on: --base DIR.",
        ) from None


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """What peft's rank_pattern or alpha_pattern says of a layer: the first that its name ends with."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"not a whole safetensors file: {error}", where=file, mend=WHOLE) from None
