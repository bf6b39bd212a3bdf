"""A model of another project taken apart: what an importer finds, checked and written as a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import write_json
from mmtune.data.batches import Batch
from mmtune.interop.weights import COPY, Stored, shape, write_tensors
from mmtune.parts.loading import refusals
from mmtune.parts.model import write_options
from mmtune.parts.spec import (
    CONNECTORS,
    PARTS,
    ConnectorOptions,
    LanguageOptions,
    ModelOptions,
    VisionOptions,
)
from mmtune.parts.vision.base import layers_up_to

ORIGIN = "origin.json"  # beside a tower that is a copy: of what
# Buffers that older versions of transformers saved and newer ones work out.
_BUFFERS = ("rotary_emb.inv_freq", "position_ids")


@dataclass(frozen=True)
class Wanted:
    """What the user says of a model to be imported, where its files don't, or say otherwise.

    base: the folder or hub name of what a LoRA or a projector was trained on. vision: that of the tower.
    """

    fit: Literal["pad", "crop"] | None = None
    chat: str | None = None
    base: str | None = None
    vision: str | None = None


@dataclass
class Source:
    """A tower, a connector and a language model, their tensors under the names that mmtune's parts give them.

    vision, language: configs of transformers (a CLIPVisionConfig, that of a causal language model). tensors:
    by part and name, still in their files. layer: negative, whose output the connector takes. generation:
    the content of generation_config.json. notes: what was chosen and why, for the terminal. reference: logits
    of the source's own model, fp32 on the CPU, at each position of a batch that is no padding; it takes the
    batch and its pictures as the tower expects them, [N, 3, S, S]. tower_name: of what the tower is a copy.
    adapter: the tensors of a peft adapter of the language model, with its config. files: lie beside the
    tokenizer and are copied in place of what transformers would write.
    """

    folder: Path
    vision: Any
    language: Any
    connector: str
    tensors: dict[str, dict[str, Stored]]
    tokenizer: PreTrainedTokenizerBase
    layer: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["pad", "crop"]
    chat: str
    reference: Callable[[Batch, torch.Tensor], torch.Tensor]
    generation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    tower_name: str | None = None
    adapter_config: dict[str, Any] | None = None
    adapter: dict[str, Stored] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def check(self) -> None:
        """Raises UserError that names the tensors that are missing, unknown or of another shape; and for a
        layer or a chat template that is not there.
        """
        layers_up_to(self.layer, self.vision.num_hidden_layers, str(self.folder / "config.json"))
        if self.chat == "template" and not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template", where=self.folder, mend="Name another --chat."
            )
        with torch.device("meta"), refusals(str(self.folder)):
            made = {
                "vision": CLIPVisionModel(self.vision),
                "connector": CONNECTORS.load(self.connector)(
                    self.vision.hidden_size, self.language.hidden_size
                ),
                "language": AutoModelForCausalLM.from_config(self.language, trust_remote_code=False),
            }
        faults = []
        for part in PARTS:
            expected, found = made[part].state_dict(), self.tensors[part]
            tied = {"lm_head.weight"} if self.language.tie_word_embeddings and part == "language" else set()
            for name in sorted(expected.keys() - found.keys() - tied):
                faults.append(f"the {part} lacks {name}")
            for name in sorted(found.keys() - expected.keys()):
                if not name.endswith(_BUFFERS):
                    faults.append(f"the {part} has no place for {name}")
            for name in sorted(expected.keys() & found.keys()):
                if expected[name].shape != found[name].outline.shape:
                    shapes = shape(found[name].outline), shape(expected[name])
                    faults.append(f"the {part}'s {name} is {shapes[0]}, by the config {shapes[1]}")
        if self.adapter:
            places = self._adapter_places(made["language"])
            faults += [f"the adapter lacks {name}" for name in sorted(places - self.adapter.keys())]
            faults += [
                f"the adapter's config has no place for {name}"
                for name in sorted(self.adapter.keys() - places)
            ]
        if faults:
            shown = [Fault(fault, str(self.folder), COPY) for fault in faults[:10]]
            more = [Fault(f"and {len(faults) - 10} more")] if len(faults) > 10 else []
            raise UserError.of([*shown, *more])

    def _adapter_places(self, language: Any) -> set[str]:
        """The tensors that an adapter has by its config, as peft names them."""
        with torch.device("meta"), refusals(str(self.folder / "adapter_config.json"), "peft"):
            adapted = get_peft_model(language, PeftConfig.from_pretrained(str(self.folder)))
            return {*get_peft_model_state_dict(adapted)}

    def write(self, folder: Path) -> None:
        """Writes a model folder of its own, every tensor as it is in its file."""
        write_tensors(folder / "vision", self.tensors["vision"])
        self.vision.architectures = ["CLIPVisionModel"]
        self.vision.dtype = widest(self.tensors["vision"])
        self.vision.save_pretrained(folder / "vision")
        side = self.vision.image_size
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        write_json(folder / "vision" / "preprocessor_config.json", preprocessor)
        if self.tower_name:
            write_json(folder / "vision" / ORIGIN, {"copy_of": self.tower_name})
        write_tensors(folder / "connector", self.tensors["connector"])
        widths = {"vision_width": self.vision.hidden_size, "language_width": self.language.hidden_size}
        write_json(folder / "connector" / "config.json", {"kind": self.connector, **widths})
        write_tensors(folder / "language", self.tensors["language"])
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.language)]
        self.language.architectures = [causal.__name__]
        self.language.dtype = widest(self.tensors["language"])
        self.language.save_pretrained(folder / "language")
        self.tokenizer.save_pretrained(folder / "language")
        for file in self.files:
            shutil.copyfile(file, folder / "language" / file.name)
        if self.generation is not None:
            write_json(folder / "language" / "generation_config.json", self.generation)
        options = ModelOptions(
            vision=VisionOptions("clip", "vision", layer=self.layer, fit=self.fit),
            connector=ConnectorOptions(self.connector, "connector"),
            language=LanguageOptions("language", chat=self.chat),
        )
        if self.adapter_config is not None:
            adapter = folder / "adapter" / "language"
            adapter.mkdir(parents=True)
            write_json(adapter / "adapter_config.json", self.adapter_config)
            factors = {name: stored.read().clone() for name, stored in self.adapter.items()}
            save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        write_options(folder, options, ["language"] if self.adapter else [])


def widest(tensors: dict[str, Stored]) -> torch.dtype:
    """The floating-point type that holds what all of them hold, buffers apart."""
    weights = [stored.outline for name, stored in tensors.items() if not name.endswith(_BUFFERS)]
    return reduce(torch.promote_types, [each.dtype for each in weights if each.is_floating_point()])
