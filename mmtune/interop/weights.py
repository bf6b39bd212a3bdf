"""Checkpoints of other projects, tensor by tensor: read without loading them whole, written in shards."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json, write_json

COPY = "Copy the folder anew from where it came; it must be whole."
SHARD = 5 * 10**9  # bytes, as transformers
# Configs, tokenizers, chat templates; and what LLaVA keeps in .bin whatever the rest is in.
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "mm_projector.bin", "non_lora_trainables.bin")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")


@dataclass(frozen=True)
class Stored:
    """A tensor that still lies in its file. `outline` has its shape and dtype, on the meta device."""

    outline: torch.Tensor
    read: Callable[[], torch.Tensor]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Stored:
        """As `change` makes it once it is read; the change must work on the meta device too."""
        return Stored(change(self.outline), lambda: change(self.read()))


def checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder by name: of `model.safetensors`, of `pytorch_model.bin`, or of
    several such files with their index; .safetensors come before .bin, which are loaded by weights alone.

    Raises UserError that names every file that is missing or broken, and tensors of the index that no file
    holds.
    """
    for ending in ("safetensors", "bin"):
        index = next(iter(sorted(folder.glob(f"*.{ending}.index.json"))), None)
        stem = "model" if ending == "safetensors" else "pytorch_model"
        files = sorted(folder.glob(f"{stem}*.{ending}"))
        if index or files:
            return _indexed(index) if index else _all_of(files)
    raise UserError("no weights: neither model*.safetensors nor pytorch_model*.bin", where=folder, mend=COPY)


def tensors_of(file: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors or .bin file by name. Raises UserError where it is missing or broken."""
    if not file.is_file():
        raise UserError("no such file", where=file, mend=COPY)
    return _safetensors(file) if file.suffix == ".safetensors" else _bin(file)


def write_tensors(folder: Path, tensors: Mapping[str, Stored], shard: int = SHARD) -> None:
    """Writes `model.safetensors`, or several such files with their index, each of at most `shard` bytes. No
    more than one of them is in memory at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(
        {name: stored.outline for name, stored in tensors.items()}, max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        # Cloned, since tensors of one .bin may share their memory, which safetensors refuses.
        held = {name: tensors[name].read().clone(memory_format=torch.contiguous_format) for name in names}
        save_file(held, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def local(name: str | Path) -> Path:
    """A folder as it is, or the copy of a model of the hub: its small files and its weights, .bin only where
    it has no .safetensors. Raises UserError where it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*_SMALL, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*_SMALL, "*.bin"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no such folder, and it is not to be had from the hub: {str(error).splitlines()[0]}",
            where=name,
            mend="Is the path right? A model of the hub is named as OWNER/NAME and needs a network.",
        ) from None
    return folder


def shape(tensor: torch.Tensor) -> str:
    """For messages: 4096 x 1024."""
    return " x ".join(map(str, tensor.shape)) or "a number"


def _indexed(index: Path) -> dict[str, Stored]:
    said = read_json(index)
    weight_map = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("it names no file of weights (weight_map)", where=index, mend=COPY)
    found = _read_all([index.parent / file for file in sorted(set(weight_map.values()))])
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise UserError(
            f"{len(missing)} tensors are in no file that it names: {', '.join(missing[:5])}",
            where=index,
            mend=COPY,
        )
    return found


def _all_of(files: list[Path]) -> dict[str, Stored]:
    """Of files without an index, which may be numbered."""
    numbered = [match for file in files if (match := _NUMBERED.fullmatch(file.name))]
    parts = {
        files[0].parent / f"{match[1]}-{number:05d}-of-{match[3]}.{match[4]}"
        for match in numbered
        for number in range(1, int(match[3]) + 1)
    }
    return _read_all(sorted({*files, *parts}))


def _read_all(files: list[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    faults: list[Fault] = []
    for file in files:
        try:
            found |= tensors_of(file)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError.of(faults)
    return found


def _safetensors(file: Path) -> dict[str, Stored]:
    def read(name: str) -> torch.Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    try:
        with safe_open(file, "pt") as opened:
            return {
                name: Stored(opened.get_tensor(name).to("meta"), lambda name=name: read(name))  # type: ignore[misc]
                for name in opened.keys()  # noqa: SIM118, it is no mapping
            }
    except (OSError, SafetensorError) as error:
        raise UserError(f"not a whole safetensors file: {error}", where=file, mend=COPY) from None


def _bin(file: Path) -> dict[str, Stored]:
    try:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # a file of torch before 1.6 cannot be mapped
                raise
            held = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"not a whole file of tensors alone: {said}",
            where=file,
            mend=f"{COPY} A file that holds more than tensors is not loaded.",
        ) from None
    if not isinstance(held, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        raise UserError("it holds no tensors by name", where=file, mend=COPY)
    return {
        name: Stored(tensor.to("meta"), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in held.items()
    }
