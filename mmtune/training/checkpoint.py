"""Checkpoints: a model folder, and under `training/` what a resumed run needs. Safetensors and JSON only.

Written under a temporary name, put on the disk and renamed, so a folder named step-N is whole; one that is
removed loses its name first.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, remove_folder, replacing_folder, write_json, write_text
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.model import VisionLanguageModel
from mmtune.tuning.base import Tuner


def save_checkpoint(
    folder: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    tuners: dict[str, Tuner],
    state: dict[str, Any],
) -> None:
    """Writes `folder` (named step-N). `state` holds step, stage, versions and hashes; the RNGs are added.

    Raises UserError where it cannot be written.
    """
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        training = partial / "training"
        training.mkdir()
        save_file(_moments(model, optimizer), training / "optimizer.safetensors")
        tensors = {f"{part}/{name}": t for part, tuner in tuners.items() for name, t in tuner.state().items()}
        save_file(tensors, training / "tuners.safetensors")
        write_json(training / "state.json", {**state, "rng": _rng_state()})


def save_model(model: VisionLanguageModel, folder: Path, trained: dict[str, Any]) -> None:
    """Writes the model a stage ends with. `trained`: what trained.json is to say beside the model's hash.

    Raises UserError where it cannot be written.
    """
    with replacing_folder(folder) as partial:
        model.save_pretrained(partial)
        write_json(partial / "trained.json", {**trained, "model_hash": model_hash(partial)})


def load_checkpoint(
    folder: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    tuners: dict[str, Tuner],
) -> dict[str, Any]:
    """Restores weights, moments, tuner state and RNGs into an attached model. Returns the saved state.

    Raises UserError where a file is missing or broken.
    """
    saved = VisionLanguageModel.from_pretrained(folder)  # fp32, so that no trained weight is rounded
    model.load_state_dict(saved.state_dict())
    training = folder / "training"
    moments = _load(training / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mine = {key.rpartition("/")[2]: t for key, t in moments.items() if key.rpartition("/")[0] == name}
            if mine:
                optimizer.state[parameter] = mine
    tensors = _load(training / "tuners.safetensors")
    for part, tuner in tuners.items():
        prefix = f"{part}/"
        tuner.load_state({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    state = read_json(training / "state.json")
    _set_rng_state(state["rng"])
    return state


def newest(folder: Path, stage: int | None = None) -> Path | None:
    """The checkpoint with the highest step under `folder`, of one stage or of any, or None."""
    for found in sorted(folder.glob("step-*"), key=_step, reverse=True):
        if stage is None or read_json(found / "training/state.json")["stage"] == stage:
            return found
    return None


def prune_old(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints. Raises UserError where one cannot be removed."""
    for old in sorted(folder.glob("step-*"), key=_step)[:-keep]:
        remove_folder(old)


def cut_metrics(path: Path, step: int) -> None:
    """Cuts metrics.jsonl back to what was logged up to `step`."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:  # the run ended while it was writing this line
            break
        kept.append(f"{line}\n")
    write_text(path, "".join(kept))


def _step(folder: Path) -> int:
    try:
        return int(folder.name.removeprefix("step-"))
    except ValueError:
        raise UserError("this is no checkpoint of ours", where=folder, mend="Move it elsewhere.") from None


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot be loaded: {error}",
            where=file,
            mend=f"Remove {file.parents[1]} to go on from the checkpoint before it.",
        ) from None


def _moments(model: VisionLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _rng_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
