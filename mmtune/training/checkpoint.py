"""Checkpoints: a model folder, and under `training/` what a resumed run needs. Safetensors and JSON only.

What is in them is whole, however the processes shared it, so a run goes on on another engine or with
another number of processes. Written under a temporary name, put on the disk and renamed, so a folder named
step-N is whole; one that is removed loses its name first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, remove_folder, replacing_folder, write_json, write_text
from mmtune.core.processes import wait
from mmtune.parts.fingerprint import model_hash
from mmtune.parts.loading import load_adapter_weights
from mmtune.parts.model import VisionLanguageModel, load_part
from mmtune.parts.spec import PARTS
from mmtune.tuning.base import Tuner
from mmtune.tuning.shards import Shards


def save_checkpoint(
    folder: Path,
    model: VisionLanguageModel,
    shards: Shards,
    tuners: dict[str, Tuner],
    state: dict[str, Any],
) -> None:
    """Writes `folder` (named step-N). `state` holds step, stage, versions and hashes.

    Every process has to call it; the first one writes. Raises UserError where it cannot be written.
    """
    weights = gather(model, shards)
    moments: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for kind, tensor in shards.saved_moments(parameter).items():
                moments[f"{name}/{kind}"] = _kept(tensor, shards)
    for part, tuner in tuners.items():
        tensors |= {f"{part}/{name}": _kept(tensor, shards) for name, tensor in tuner.state().items()}
    if shards.rank == 0:
        with replacing_folder(folder) as partial:
            model.save_pretrained(partial, weights)
            training = partial / "training"
            training.mkdir()
            save_file(moments, training / "optimizer.safetensors")
            save_file(tensors, training / "tuners.safetensors")
            write_json(training / "state.json", state)
    wait()


def save_model(model: VisionLanguageModel, shards: Shards, folder: Path, trained: dict[str, Any]) -> None:
    """Writes the model a stage ends with. `trained`: what trained.json is to say beside the model's hash.

    Every process has to call it; the first one writes. Raises UserError where it cannot be written.
    """
    weights = gather(model, shards)
    if shards.rank == 0:
        with replacing_folder(folder) as partial:
            model.save_pretrained(partial, weights)
            write_json(partial / "trained.json", {**trained, "model_hash": model_hash(partial)})
    wait()


def gather(model: VisionLanguageModel, shards: Shards) -> dict[str, torch.Tensor]:
    """The tensors that a model folder holds, by name in the model and whole; every process calls it."""
    gathered: dict[nn.Parameter, torch.Tensor] = {}  # two names of one tensor stay one
    found = {}
    for name, tensor in model.own_tensors().items():
        if isinstance(tensor, nn.Parameter):
            if tensor not in gathered:
                whole = shards.whole(tensor) if tensor.requires_grad else shards.frozen(tensor)
                gathered[tensor] = _kept(whole.detach(), shards)
            found[name] = gathered[tensor]
        else:
            found[name] = tensor
    return found


def _kept(whole: torch.Tensor, shards: Shards) -> torch.Tensor:
    """Off the device at once, and only where it is written: all of them together may not fit on one."""
    return whole.cpu() if shards.rank == 0 else torch.empty(0)


def load_weights(folder: Path, model: VisionLanguageModel) -> dict[str, Any]:
    """Restores the weights of a model with tuners attached that no engine has taken yet; exactly, for they
    are saved as they train. Returns the saved state. Raises UserError where a file is missing or broken.
    """
    held = model.own_tensors()
    for part in PARTS:
        # What lies elsewhere is there already: a base of 28 GB is not built again for an adapter on it.
        if getattr(model.options, part).weights is None:
            given = load_part(folder, part, model).state_dict()  # fp32, so that no trained weight is rounded
            names = [name.removeprefix(f"{part}.") for name in held if name.startswith(f"{part}.")]
            model.part(part).load_state_dict({name: given[name] for name in names}, strict=False)
        elif part in model.adapters:
            load_adapter_weights(model.adapters[part], folder / "adapter" / part)
    state: dict[str, Any] = read_json(folder / "training" / "state.json")
    return state


def load_progress(folder: Path, model: VisionLanguageModel, shards: Shards, tuners: dict[str, Tuner]) -> None:
    """Restores moments and tuner state, once the tuners are bound. Raises UserError as `load_weights`."""
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _load(folder / "training/optimizer.safetensors").items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = tensor
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in moments:
            shards.load_moments(parameter, moments[name])
    tensors = _load(folder / "training/tuners.safetensors")
    for part, tuner in tuners.items():
        prefix = f"{part}/"
        tuner.load_state({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})


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
