"""VisionLanguageModel: a tower, a connector and a language model, spliced together.

A model folder holds `config.json` and, for each part, either its own folder of safetensors or the
name of where its weights come from; peft adapters lie under `adapter/PART`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from mmtune.core.config import Source, to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, shipped, write_json
from mmtune.data.batches import Batch
from mmtune.data.chat import IGNORE, IMAGE_ID, Chat, Turn
from mmtune.parts.attention import IMPLEMENTATIONS, attention_for
from mmtune.parts.connector.base import Connector, miscounted, new_connector
from mmtune.parts.fingerprint import not_ours, quantized_config
from mmtune.parts.language import LanguageModel
from mmtune.parts.loading import load_adapter, torch_dtype
from mmtune.parts.shapes import require_fit
from mmtune.parts.spec import (
    PARTS,
    TOWERS,
    LanguageOptions,
    ModelOptions,
    VisionOptions,
    options_in,
    quantization,
)
from mmtune.parts.vision.base import VisionTower

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT_VERSION = 1
REFERENCES = {"weights", "tokenizer"}  # options that name a folder or a model of the hub


class VisionLanguageModel(nn.Module):
    """The three parts and nothing else that has weights.

    options: what each part is and where its weights came from; a part's `weights` is None once the part
    was trained, and is then saved with the model. adapters: the peft model of each part that has one.
    attention: how tower and language model compute it, `flash`, `sdpa` or `eager`.
    chat: not there in an outline made from configs alone (parts/outline.py), which has no tokenizer.
    every_part: whether every forward pass goes through every part, as processes that gather each other's
    weights have to.
    """

    def __init__(
        self, vision: VisionTower, connector: Connector, language: LanguageModel, options: ModelOptions
    ) -> None:
        super().__init__()
        if connector.vision_width != vision.width or connector.language_width != language.width:
            raise UserError(
                f"the connector takes {connector.vision_width} and gives {connector.language_width}, but the "
                f"tower is {vision.width} wide and the language model {language.width}",
                where="model",
                mend="Leave out the connector's weights to start a new one.",
            )
        assert options.vision and options.language
        self.vision = vision
        self.connector = connector
        self.language = language
        self.options = options
        self.adapters: dict[str, PeftModel] = {}
        self.attention: dict[str, str] = {}
        self.every_part = False
        self.image_tokens = connector.tokens(vision.tokens)
        self.transform = vision.transform(options.vision.fit)
        if language.tokenizer is not None:
            self.chat = Chat(language.tokenizer, options.language.chat, self.image_tokens, language.context)

    def part(self, name: str) -> nn.Module:
        """The module a tuner works on: inside it names are those of the part's own format."""
        return {"vision": self.vision, "connector": self.connector, "language": self.language}[name]

    def core(self, name: str) -> nn.Module:
        """The module whose names a part's adapter uses: the transformers model itself, or the part."""
        part = self.part(name)
        return getattr(part, "hf", part)

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """As torch has it, but that a tower of which nothing trains stays in evaluation mode: the features of
        one picture are always the same, without the drop path of its own training.
        """
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision.parameters()):
            self.vision.eval()
        return self

    def attend_by(self, wanted: str, dtypes: Mapping[str, torch.dtype]) -> None:
        """Chooses how tower and language model compute attention. wanted: as `model.attention` in a YAML has
        it. dtypes: what each part is held in. Raises UserError where what is wanted cannot be had.
        """
        for name in ("vision", "language"):
            part: Any = self.part(name)
            self.attention[name] = attention_for(part, wanted, dtypes[name])
            part.attend_by(IMPLEMENTATIONS[self.attention[name]])

    def splice(self, batch: Batch) -> torch.Tensor:
        """Embeddings [B, T, width] with the pictures' features in the places of IMAGE_ID.

        While the tower or the connector trains, and with `every_part`, a batch without pictures sends a blank
        one through them, times zero: every parameter then has a gradient on every process.
        Raises ValueError where pictures and places differ in number, and UserError where tower or connector
        give another number of features than they say.
        """
        places = batch.input_ids == IMAGE_ID
        expected = len(batch.images) * self.image_tokens
        if int(places.sum()) != expected:
            raise ValueError(
                f"{int(places.sum())} places for {len(batch.images)} pictures of {self.image_tokens} tokens"
            )
        embeddings = self.language.embed(batch.input_ids.masked_fill(places, 0))
        if len(batch.images):
            features = self._seen(batch.images)
            return embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings.dtype))
        trains = self.training and torch.is_grad_enabled() and self._sees_gradient()
        if trains or self.every_part:
            side = self.transform.size
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=embeddings.device)
            return embeddings + 0 * self._seen(blank).sum().to(embeddings.dtype)
        return embeddings

    def _seen(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S] -> [N, image_tokens, width]."""
        features = self.vision(images)
        if features.shape[1] != self.vision.tokens:
            raise miscounted(
                f"{type(self.vision).__name__}, the tower", features.shape[1], self.vision.tokens
            )
        embeddings: torch.Tensor = self.connector(features)
        if embeddings.shape[1] != self.image_tokens:
            what = f"{self.connector.kind}, the connector"
            raise miscounted(what, embeddings.shape[1], self.image_tokens)
        return embeddings

    def forward(
        self, batch: Batch, with_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy summed over the supervised tokens, fp32; head and loss run on those alone.

        with_logits: beside it, their logits [n, vocabulary].
        """
        assert batch.labels is not None
        hidden = self.language.hidden(self.splice(batch), batch.attention_mask)
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE
        logits = self.language.logits(hidden[:, :-1][supervised])
        loss = nn.functional.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        return (loss, logits) if with_logits else loss

    def _sees_gradient(self) -> bool:
        return any(p.requires_grad for part in (self.vision, self.connector) for p in part.parameters())

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
        """Greedy answers to left-padded prompts, without the end token.

        stop: a row ends with the token that completes one of these strings, which is left in.
        """
        hf, ends = self.language.hf, self.end_ids
        stops = [_Stop(self.language.tokenizer, stop)] if stop else []
        own = hf.generation_config
        # A checkpoint may bring a repetition penalty or a list of suppressed words: not greedy any more.
        hf.generation_config = GenerationConfig()
        try:
            answers = hf.generate(
                inputs_embeds=self.splice(batch),
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=self.language.pad_id,
                stopping_criteria=StoppingCriteriaList(stops),
            )
        finally:
            hf.generation_config = own
        return [_until(row.tolist(), ends) for row in answers]

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: the one the chat format teaches, and the tokenizer's own."""
        labels = self.chat.encode([Turn("user", "a"), Turn("assistant", "b")])[1]
        taught = [label for label in labels if label != IGNORE][-1]
        own = self.language.tokenizer.eos_token_id
        return [taught] if own in (None, taught) else [taught, own]

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What a folder of this model holds itself: parts without weights elsewhere, and adapters."""
        held = {name for name in PARTS if getattr(self.options, name).weights is None}
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if name.partition(".")[0] in held or ".lora_" in name
        }

    def save_pretrained(self, folder: str | Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes a model folder: what was trained, the adapters, and where everything else comes from.

        tensors: stand for those of `own_tensors`, which an engine may have split.
        """
        folder = Path(folder)
        tensors = self.own_tensors() if tensors is None else tensors
        folder.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = {"mmtune": FORMAT_VERSION}
        for name in PARTS:
            options = to_dict(getattr(self.options, name))
            for key in ("quantize", "image_size", "config"):
                if options.get(key, "") is None:
                    del options[key]
            if options.get("weights") is None:
                self.part(name).save(folder / name, self._named_by(name, tensors))  # type: ignore[operator]
                for key in ("tokenizer", "config"):
                    options.pop(key, None)
                options["weights"] = name
                if name == "vision":  # as it was loaded: without the layers above, at the size it has now
                    options["layer"] = -1
                    options.pop("image_size", None)
            else:
                for key in options.keys() & REFERENCES:
                    options[key] = options[key] and _relative(options[key], folder)
            if name in self.adapters:
                _save_adapter(self.adapters[name], folder / "adapter" / name, self._named_by(name, tensors))
                options["adapter"] = f"adapter/{name}"
            described[name] = options
        write_json(folder / "config.json", described)

    def _named_by(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of a part, by the names its core gives them."""
        prefix = f"{name}." if self.core(name) is self.part(name) else f"{name}.hf."
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    def save_part(self, name: str, folder: str | Path) -> None:
        """Writes one part in its family's own format, without an adapter that was attached to it."""
        if name in self.adapters:
            raise UserError(f"the {name} has an adapter", mend="Merge it first, or save the whole model.")
        self.part(name).save(Path(folder))  # type: ignore[operator]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: str = "float32",
        merge: bool = False,
        instead: Mapping[str, str | Path] | None = None,
        dequantize: bool = False,
    ) -> VisionLanguageModel:
        """Restores a model folder, adapters included, in evaluation mode.

        Its config alone is read; the folder's name means nothing. merge: adapters are folded into the
        weights, and a quantised part is dequantised for it. instead: parts that are taken from another model
        folder, adapter and all. dequantize: a quantised part is held in fp32, with the values it has.
        Raises UserError where a file is missing or broken.
        """
        places = dict.fromkeys(PARTS, folder) | dict(instead or {})
        parts = {name: getattr(read_options(place), name) for name, place in places.items()}
        model = assemble(ModelOptions(base=None, dtype=dtype, **parts))  # type: ignore[arg-type]
        if dequantize or merge:
            model.dequantize()
        for name, place in places.items():
            if adapter := _adapters(place).get(name):
                model.load_adapter(name, adapter)
                if merge:
                    model.merge_adapter(name)
        return model.eval()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Attaches a saved peft adapter to a part, through peft alone."""
        self.adapters[name] = load_adapter(self.core(name), folder)

    def dequantize(self) -> None:
        """Holds a quantised language model in fp32, with the values it has; it is saved with the model from
        then on.
        """
        assert self.options.language
        if self.options.language.quantize:
            self.language.dequantize()
            self.options.language.quantize = self.options.language.weights = None

    def merge_adapter(self, name: str) -> None:
        """Folds a part's adapter into its weights; the part is saved with the model from then on.

        Raises UserError for a quantised part: the sum would be rounded to 4 or 8 bits.
        """
        if quantize := getattr(getattr(self.options, name), "quantize", None):
            raise _unmergeable(quantize, f"the {name}'s adapter")
        self.adapters.pop(name).merge_and_unload()
        getattr(self.options, name).weights = None


def assemble(options: ModelOptions, exact: Collection[str] = ()) -> VisionLanguageModel:
    """A model from its options: a base folder, parts, or a base with some parts replaced.

    exact: parts that are held in fp32 whatever `dtype` says, since their own weights will train. So is a
    part whose adapter is merged: bf16 would round most of a small update away (62 % of one, measured), and
    one that is to be quantised is refused.

    Raises UserError where parts don't fit, before any weights are read, or where weights cannot be loaded.
    """
    if options.base is not None:
        base = read_options(options.base)
        adapters = _adapters(options.base)
        given = {name: getattr(options, name) for name in PARTS if getattr(options, name) is not None}
        merged = adapters.keys() - given.keys()
        described = replace(
            base, dtype=options.dtype, attention=options.attention, quantize=options.quantize, **given
        )
        quantize = quantization(described)
        if quantize and "language" in merged:
            raise _unmergeable(quantize, options.base)
        model = assemble(described, {*exact, *merged})
        for name in sorted(merged):
            model.load_adapter(name, adapters[name])
            model.merge_adapter(name)
        return model
    require_fit(options)
    assert options.vision and options.connector and options.language
    dtypes = {part: torch.float32 if part in exact else torch_dtype(options.dtype) for part in PARTS}
    vision = load_vision(options.vision, dtypes["vision"])
    held = replace(options.language, quantize=quantization(options))
    language = _language(held, dtypes["language"])
    connector = new_connector(options.connector, vision.width, language.width)
    connector.to(dtypes["connector"])
    if options.connector.weights is not None:
        connector.load(Path(options.connector.weights))
    vision_options = replace(options.vision, config=vision.given_config)
    language_options = replace(held, config=None)
    connector_options = replace(options.connector)
    made = ModelOptions(
        None, vision_options, connector_options, language_options, options.dtype, options.attention
    )
    model = VisionLanguageModel(vision, connector, language, made)
    model.attend_by(options.attention, dtypes)
    return model


def load_part(
    folder: str | Path, name: str, like: VisionLanguageModel, merge: bool = False, dtype: str = "float32"
) -> nn.Module:
    """One part of a model folder, in evaluation mode, to take the place of the same part of `like`.

    Its adapter, if it has one, is attached, or with `merge` folded into the weights. The other parts are not
    loaded. Raises UserError where a file is missing or broken.
    """
    options = getattr(read_options(folder), name)
    part: Any
    if name == "connector":
        part = new_connector(options, like.vision.width, like.language.width)
        part.to(torch_dtype(dtype))
        part.load(Path(options.weights))
    else:
        part = (load_vision if name == "vision" else _language)(options, torch_dtype(dtype))
        part.attend_by(IMPLEMENTATIONS[like.attention[name]])
    if merge and getattr(options, "quantize", None):
        part.dequantize()
    if adapter := _adapters(folder).get(name):
        attached = load_adapter(getattr(part, "hf", part), adapter)
        if merge:
            attached.merge_and_unload()
    return part.eval()


def write_quantized(base: str | Path, quantize: str, folder: Path) -> None:
    """Writes the model folder that is `base` with its language model held in nf4 or int8: a config alone,
    which says where the weights come from. Raises UserError.
    """
    origin, config = shipped(base), quantized_config(base, quantize)
    for name in PARTS:
        for key in (REFERENCES | {"adapter"}) & config[name].keys():
            if config[name][key]:
                config[name][key] = _relative(_resolved(config[name][key], origin), folder)
    write_json(folder / "config.json", config)


def read_options(folder: str | Path) -> ModelOptions:
    """The options a model folder was saved with, its relative paths resolved.

    Raises UserError.
    """
    folder = shipped(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("mmtune") != FORMAT_VERSION:
        raise not_ours(folder)
    source = Source.parsed(folder / "config.json", config)
    parts = {}
    for name in PARTS:
        fields = config.get(name)
        if isinstance(fields, dict):
            if not isinstance(fields.get("adapter", ""), str):
                source.fault((name, "adapter"), "expected the path of a folder")
            fields = {key: value for key, value in fields.items() if key != "adapter"}
        parts[name] = options_in(name, fields, source, (name,))
    source.finish()
    for options in parts.values():
        for key in REFERENCES & vars(options).keys():
            setattr(options, key, getattr(options, key) and _resolved(getattr(options, key), folder))
    return ModelOptions(base=None, **parts)


def write_options(folder: Path, options: ModelOptions, adapters: Collection[str] = ()) -> None:
    """Writes the config of a model folder whose parts lie in it; their options name them so. adapters: names
    of the parts that have one.
    """
    parts = {name: to_dict(getattr(options, name)) for name in PARTS}
    for name in adapters:
        parts[name]["adapter"] = f"adapter/{name}"
    write_json(folder / "config.json", {"mmtune": FORMAT_VERSION, **parts})


def load_vision(options: VisionOptions, dtype: torch.dtype) -> VisionTower:
    """A tower by itself: its weights, or new ones. Raises UserError."""
    tower = TOWERS.load(options.tower, "model.vision.tower")
    if options.weights is not None:
        beside = {} if options.config is None else {"config": options.config}
        return tower.load(options.weights, options.layer, dtype, options.image_size, **beside)
    return tower.create(options.config, options.layer, options.image_size).to(dtype)


def _language(options: LanguageOptions, dtype: torch.dtype) -> LanguageModel:
    if options.weights is not None:
        return LanguageModel.load(options.weights, options.tokenizer, dtype, options.quantize)
    assert options.config is not None and options.tokenizer is not None
    return LanguageModel.create(options.config, options.tokenizer).to(dtype)


def _unmergeable(quantize: str, where: str) -> UserError:
    return UserError(
        f"an adapter would have to be merged into weights held in {quantize}, which would round it away",
        where=where,
        mend="Merge it in full precision first: mmtune export DIR DST --to merged.",
    )


def _adapters(folder: str | Path) -> dict[str, Path]:
    folder = shipped(folder)
    config = read_json(folder / "config.json")
    return {name: folder / config[name]["adapter"] for name in PARTS if "adapter" in config[name]}


def _save_adapter(adapter: PeftModel, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    lora = {f"base_model.model.{name}": tensor for name, tensor in tensors.items() if ".lora_" in name}
    adapter.save_pretrained(str(folder), state_dict=lora)
    config = read_json(folder / "adapter_config.json")
    # peft keeps them in a set, whose order changes from process to process: the same model, other bytes.
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_json(folder / "adapter_config.json", config)


def _relative(weights: str, folder: Path) -> str:
    """A local path as seen from `folder`, so that a project can be moved as a whole; a hub name as it is."""
    return os.path.relpath(Path(weights).resolve(), folder.resolve()) if Path(weights).exists() else weights


def _resolved(weights: str, folder: Path) -> str:
    local = folder.resolve() / weights  # ".." is taken from where the files are, not from a link to them
    if local.exists():
        return str(Path(os.path.normpath(local)))
    if weights in PARTS:
        where, mend = folder / "config.json", "Copy the folder anew; it must be whole."
        raise UserError(f"there is no folder {weights} beside it", where=where, mend=mend)
    if weights.startswith("."):
        raise UserError(
            f"the weights it was made from are no longer at {os.path.normpath(local)}",
            where=folder / "config.json",
            mend="Put them back, or correct 'weights' there.",
        )
    return weights


class _Stop(StoppingCriteria):
    """Ends a row once its text holds one of `strings`, however these fall into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = strings

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        # Prompts go in as embeddings, so these are the ids of the answers alone.
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        held = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(held, device=input_ids.device)  # type: ignore[return-value]


def _until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])
