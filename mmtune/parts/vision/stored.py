"""Checkpoints of open_clip and timm: one config and one file of weights, in a folder or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from mmtune.core.errors import UserError

_WHOLE = "Copy it anew; it must be whole."


def folder_of(weights: str, config: str, files: Sequence[str], mend: str) -> Path:
    """The folder `weights`, or that of a hub name: of it `config` is fetched, and the first of `files` there.

    Raises UserError with `mend` where there is neither.
    """
    if Path(weights).is_dir():
        return Path(weights)
    try:
        for file in files:
            folder = Path(snapshot_download(weights, allow_patterns=[config, file]))
            if (folder / file).is_file():
                break
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"no such folder, nor to be had from the hub: {said}", where=weights, mend=mend
        ) from None
    return folder


def file_in(folder: Path, files: Sequence[str], mend: str) -> Path:
    """The first of `files` that lies in a folder. Raises UserError where none does."""
    for file in files:
        if (folder / file).is_file():
            return folder / file
    raise UserError(f"neither {' nor '.join(files)}", where=folder, mend=mend)


def read_tensors(file: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, of a safetensors file or of a .bin or .pt, read as tensors alone.

    A training checkpoint's `state_dict` is found, and its names are taken without the `module.` of DDP.
    Raises UserError where the file is broken or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: opened.get_tensor(name) for name in names}
        stored = torch.load(file, map_location=torch.get_default_device(), weights_only=True)
        stored = stored.get("state_dict", stored)
        stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
        return {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    except Exception as error:  # a broken pickle raises nearly anything
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the weights cannot be read: {said}", where=file, mend=_WHOLE) from None
