"""Weights in and out of files without silence: what is missing is an error, not a random tensor."""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import read_json
from mmtune.core.table import nearest

# peft imports bitsandbytes wherever it is installed, and that warns of a kernel it can do without.
getLogger("bitsandbytes.backends").setLevel(ERROR)

_FILES = ("model.safetensors", "pytorch_model.bin")  # or their shards, named by NAME.index.json
_COPY = "Copy the folder anew; it must be whole."
_NOWHERE = "There is no such folder, and no such model on the hub."
BRINGS_CODE = "it needs code that it brings along, which mmtune does not run"


def from_pretrained(cls: Any, weights: str, **options: Any) -> Any:
    """`cls.from_pretrained` of safetensors or, where there are none, of .bin files, read as tensors alone.

    Raises UserError where the folder is missing or broken, or a weight is missing or has another shape.
    Weights in the file that the model has no use for (a CLIP text tower, layers above the one that is
    used) are left unread. Within `torch.device("meta")` all are: the model then has shapes and nothing
    else, and the files of a folder are only looked at, whether they are there and whole.
    """
    if torch.get_default_device().type == "meta":
        return _outline(cls, weights, options.get("config"))
    if Path(weights).is_dir():
        _require_whole_files(Path(weights))
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = cls.from_pretrained(
            weights,
            weights_only=True,
            trust_remote_code=False,  # left out, transformers would ask on stdin
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise unloadable(weights, error) from None
    except UnpicklingError:  # its message advises to trust the file
        raise UserError(
            "a .bin file that is broken or holds more than tensors, which is not loaded",
            where=weights,
            mend="Copy the folder anew, or take one with safetensors.",
        ) from None
    finally:
        logging.set_verbosity(before)
    require_weights(report["missing_keys"], (str(entry[0]) for entry in report["mismatched_keys"]), weights)
    return model


def require_weights(missing: Iterable[str], mismatched: Iterable[str], where: str) -> None:
    """Raises UserError where weights are missing from a file, or have another shape than the config says."""
    for kind, names in (
        ("missing", sorted(missing)),
        ("of another shape than the config says", sorted(mismatched)),
    ):
        if names:
            raise UserError(
                f"{len(names)} weights are {kind}: {', '.join(names[:5])}",
                where=where,
                mend="Config and weights must be of one model: copy the folder anew.",
            )


def load_adapter(core: nn.Module, folder: Path) -> Any:
    """The peft model of a module and a saved adapter. Raises UserError where a file or a tensor is missing,
    broken or of another shape.
    """
    from peft import PeftModel

    with _whole_adapter(folder):
        return PeftModel.from_pretrained(core, str(folder))


def load_adapter_weights(adapter: Any, folder: Path) -> None:
    """Takes the tensors of a saved adapter into a peft model like it. Raises UserError as `load_adapter`."""
    with _whole_adapter(folder):
        found = adapter.load_adapter(str(folder), adapter.active_adapter, is_trainable=True)
        if differing := [*found.missing_keys, *found.unexpected_keys]:
            raise ValueError(f"missing or unknown: {', '.join(differing[:5])}")


@contextmanager
def _whole_adapter(folder: Path) -> Iterator[None]:
    mend = "Copy the folder anew from where it was trained; it must be whole."
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"no {file}", where=folder, mend=mend)
    try:
        with warnings.catch_warnings():
            # What the file lacks, peft leaves at its start with a warning.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, Warning) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter cannot be loaded: {said}", where=folder, mend=mend) from None


def refuse_absent(weights: str) -> None:
    """Raises UserError for a path that is not there and that no name on the hub can be, without asking it."""
    local = weights.startswith((".", "/", "~")) or weights.count("/") > 1
    if local and not Path(weights).exists():
        raise UserError("no such folder", where=weights, mend="Correct the path.")


def load_config(weights: str) -> PretrainedConfig:
    """The transformers config of a folder or hub name. Raises UserError where there is none."""
    refuse_absent(weights)
    try:
        return AutoConfig.from_pretrained(weights, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unloadable(weights, error) from None
    except Exception as error:  # values of another type raise nearly anything
        said = " ".join(str(error).split())
        raise UserError(
            f"its config makes no sense: {type(error).__name__}: {said}",
            where=weights,
            mend="Correct its config.json, or copy the folder anew.",
        ) from None


def new_config(cls: Any, fields: dict[str, Any], where: str, **preset: Any) -> Any:
    """A transformers config from a user's `fields`, which come before `preset`.

    Raises UserError for values that are refused and for fields the config does not have: transformers
    keeps those without a word, and the default takes the place of what was meant.
    """
    with refusals(where):
        made, default = cls(**{**preset, **fields}), cls()
    # A field of an older version is not there by default either, but it is turned into another, not kept.
    unknown = [name for name in fields if name in vars(made) and not hasattr(default, name)]
    if unknown:
        known = [name for name in (*vars(default), *cls.attribute_map) if not name.startswith("_")]
        raise UserError.of(Fault(f"unknown field '{name}'", where, nearest(name, known)) for name in unknown)
    return made


@contextmanager
def refusals(where: str, by: str = "transformers") -> Iterator[None]:
    """For making a thing of a library from a user's values alone: whatever it raises is theirs to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"refused by {by}: {type(error).__name__}: {said}",
            where=where,
            mend="Correct the value; the fields are those of the family's own config.json.",
        ) from error


def own_weights(
    part: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The part's tensors by the names of its own format, without those of a LoRA attached to it.

    tensors: stand for the part's own, under the names of its state dict.
    """
    return {
        name.replace(".base_layer.", "."): tensor.contiguous()
        for name, tensor in (part.state_dict() if tensors is None else tensors).items()
        if ".lora_" not in name
    }


def split_layers(hf: Any) -> list[nn.Module]:
    """The blocks of a transformers model that belong on one device."""
    names = set(getattr(hf, "_no_split_modules", None) or ())
    return [module for module in hf.modules() if type(module).__name__ in names]


def recompute_activations(hf: Any, on: bool = True) -> None:
    """Lets a model of transformers recompute each layer in the backward pass, non-reentrant; or no longer."""
    # The second name goes with transformers 6, the first came after 5.17.
    word = "activation" if hasattr(hf, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(hf, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(hf, f"{word}_checkpointing_disable")()


def torch_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16 by name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _outline(cls: Any, weights: str, config: PretrainedConfig | None) -> Any:
    if Path(weights).is_dir() and not _require_whole_files(Path(weights)):
        raise UserError(f"no file of weights, {' or '.join(_FILES)}, in this folder", where=weights)
    make = getattr(cls, "from_config", cls)
    with refusals(weights):
        return make(config or load_config(weights))


def _require_whole_files(folder: Path) -> list[Path]:
    """The files that transformers takes the weights from: the first of _FILES, or the shards its index names.

    Raises UserError where one is missing or was cut short, from what stands at its head or at its end.
    """
    files: list[Path] = []
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            stated = read_json(index)
            shards = stated.get("weight_map") if isinstance(stated, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise UserError("it names no file of weights (weight_map)", where=index, mend=_COPY)
            files = [folder / shard for shard in sorted({*shards.values()})]
        if files:
            break
    faults = [Fault(what, str(file), _COPY) for file in files if (what := _unreadable(file))]
    if faults:
        raise UserError.of(faults)
    return files


def _unreadable(file: Path) -> str:
    """Why a file of weights cannot be whole, or nothing."""
    if not file.is_file():
        return "cannot be loaded: no such file, which the index names"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):  # reads the header, which says how long the file has to be
                return ""
        except (OSError, SafetensorError) as error:
            return f"cannot be loaded, not a whole safetensors file: {error}"
    with file.open("rb") as opened:
        head = opened.read(2)
    # torch's format is a zip, whose directory stands at its end, and was a pickle before.
    whole = zipfile.is_zipfile(file) if head == b"PK" else head[:1] == b"\x80"
    return "" if whole else "cannot be loaded, not a whole .bin file"


def unloadable(weights: str, error: Exception) -> UserError:
    """The error for a folder or a model of the hub of which a file cannot be had or read."""
    if "trust_remote_code" in str(error):
        return UserError(BRINGS_CODE, where=weights, mend="Name a model of a family that transformers has.")
    there = Path(weights).exists()
    mend = _COPY if there else _NOWHERE
    return UserError(f"cannot be loaded: {str(error).splitlines()[0]}", where=weights, mend=mend)
