"""Any Hugging Face causal language model: embeddings in, hidden states out, the head apart."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mmtune.core.errors import UserError
from mmtune.core.files import read_json, write_json
from mmtune.parts.loading import (
    from_pretrained,
    load_config,
    new_config,
    own_weights,
    recompute_activations,
    refusals,
    refuse_absent,
    split_layers,
    unloadable,
)
from mmtune.parts.quantized import dequantize, forget_quantization, load_quantized

# Tokenizers of no family, by their class in transformers 5 and before.
PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")


class LanguageModel(nn.Module):
    """A causal LM and its tokenizer. `hf` is the transformers model, in which tuners find their targets.

    An outline made from configs alone (parts/outline.py) is given None for a tokenizer.
    """

    def __init__(self, hf: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        _check_class(hf)
        self.hf = hf
        self.tokenizer = tokenizer
        self.width = hf.get_input_embeddings().embedding_dim
        self.takes_positions = "position_ids" in inspect.signature(hf.base_model.forward).parameters
        if tokenizer is not None:
            _check_vocabulary(tokenizer, hf.get_input_embeddings().num_embeddings)

    @classmethod
    def load(
        cls, weights: str, tokenizer: str | None, dtype: torch.dtype, quantize: str | None = None
    ) -> LanguageModel:
        """From a folder or hub name; the tokenizer from `tokenizer` or, by default, from there too.

        quantize: nf4 or int8, for the linear layers but the head. Raises UserError.
        """
        tokens = load_tokenizer(tokenizer or weights)
        config = load_config(weights)
        if config.get_text_config() is not config:
            raise UserError(
                f"a {config.model_type} is a language model with a tower of its own around it",
                where=weights,
                mend="Name one for text alone, whose config.json has no text_config.",
            )
        require_causal(config, weights)
        if getattr(config, "quantization_config", None):
            raise UserError(
                "its weights are stored quantised",
                where=weights,
                mend="Name the model in full precision; 'quantize: nf4' quantises it as it is loaded.",
            )
        if quantize:
            return cls(load_quantized(AutoModelForCausalLM, weights, quantize, dtype), tokens)
        return cls(from_pretrained(AutoModelForCausalLM, weights, dtype=dtype), tokens)

    @classmethod
    def create(cls, config: dict[str, Any], tokenizer: str) -> LanguageModel:
        """With random weights, from the fields of a transformers config; `model_type` names the family.

        Raises UserError for a family, a field or a value that transformers does not know.
        """
        tokens = load_tokenizer(tokenizer)
        fields = dict(config)
        model_type = fields.pop("model_type", None)
        where = "model.language.config"
        if model_type is None:
            raise UserError("'model_type' is missing", where=where, mend="For example llama.")
        if str(model_type) not in CONFIG_MAPPING:
            raise UserError(
                f"transformers knows no model_type '{model_type}'",
                where=where,
                mend="Name a family as its config.json does, for example llama or qwen2.",
            )
        special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vocabulary = max(tokens.get_vocab().values()) + 1  # more than len(tokens) where ids are left out
        made = new_config(CONFIG_MAPPING[model_type], fields, where, vocab_size=vocabulary, **special)
        require_causal(made, where)
        with refusals(where):
            hf = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
        return cls(hf, tokens)

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes model and tokenizer as transformers does. tensors: in place of the model's own."""
        self.hf.save_pretrained(folder, state_dict=own_weights(self.hf, tensors))
        self.tokenizer.save_pretrained(folder)
        pieces = Path(getattr(self.tokenizer, "vocab_file", None) or "")
        if pieces.name == "tokenizer.model" and pieces.is_file():
            # transformers 5 leaves it out; loaders built on 4.x, such as LLaVA's, read nothing else.
            shutil.copyfile(pieces, folder / pieces.name)
        if getattr(self.tokenizer, "legacy", False):
            # Left out too; without it text after a special token would lose its dummy space.
            file = folder / "tokenizer_config.json"
            write_json(file, {**read_json(file), "legacy": True})

    def dequantize(self) -> None:
        """Holds quantised layers as plain fp32 ones of the same values from now on."""
        dequantize(self.hf)
        forget_quantization(self.hf)

    def layers(self) -> list[nn.Module]:
        """The blocks: what an engine that splits weights gathers at a time."""
        return split_layers(self.hf)

    def checkpoint_activations(self, on: bool = True) -> None:
        """From now on a block keeps its input alone and runs again in the backward pass; or no longer."""
        recompute_activations(self.hf, on)

    def attend_by(self, implementation: str) -> None:
        """Chooses how attention is computed, by transformers' name for it. Raises UserError where the family
        does not let itself be told.
        """
        self.hf.set_attn_implementation(implementation)
        if (found := self.hf.config._attn_implementation) != implementation:
            raise UserError(
                f"a {self.hf.config.model_type} computes attention by {found} and cannot be told otherwise",
                where="model.attention",
                mend="Say auto.",
            )

    @property
    def pad_id(self) -> int:
        """The id padding is written with; it is masked everywhere, so any will do."""
        tokens = self.tokenizer
        return tokens.pad_token_id if tokens.pad_token_id is not None else tokens.eos_token_id

    @property
    def context(self) -> float:
        """The most tokens the model was made for; infinite where its config names no number."""
        return getattr(self.hf.config, "max_position_embeddings", None) or math.inf

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, width]."""
        return self.hf.get_input_embeddings()(ids)

    def hidden(self, embeddings: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last hidden states [B, T, width], normalised, before the head. Padding, on either side, changes
        those of no other position.
        """
        positions = {}
        if self.takes_positions:  # counted from a row's first token, or a GPT-2 would count padding along
            positions["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        # use_cache=False: a cache would be kept for the backward pass and defeats checkpointing.
        return self.hf.base_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on chosen positions [..., width] -> [..., vocabulary], with the family's scale and cap."""
        config = self.hf.config
        logits = self.hf.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None)  # Cohere multiplies
        if scale is not None:
            logits = logits * scale
        scaling = getattr(config, "logits_scaling", None)  # Granite divides
        if scaling is not None:
            logits = logits / scaling
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def load_tokenizer(where: str, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. config: of its language model, where the folder's own is none of
    transformers'. Raises UserError where there is no tokenizer, or nothing installed that reads it.
    """
    refuse_absent(where)
    files = {file.name for file in Path(where).glob("tokenizer.*")}
    lacking = [package for package in ("sentencepiece", "protobuf") if not _installed(package)]
    if lacking and "tokenizer.model" in files and "tokenizer.json" not in files:
        what = f"its tokenizer is a SentencePiece model, and {' and '.join(lacking)} is not installed"
        raise UserError(what, where=where, mend="pip install 'mmtune[llava]'")
    try:
        if get_tokenizer_config(where).get("tokenizer_class") in PLAIN:
            # As its tokenizer.json has it. By the model_type, such as qwen2, AutoTokenizer would take a class
            # of the family's, which may add a token.
            return PreTrainedTokenizerFast.from_pretrained(where)
        return AutoTokenizer.from_pretrained(where, config=config, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json makes tokenizers raise nothing narrower
        if "trust_remote_code" in str(error):
            raise unloadable(where, error) from None
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"no tokenizer can be loaded: {said}", where=where, mend="Name a folder or model that has one."
        ) from None


def require_causal(config: PretrainedConfig, where: str) -> None:
    """Raises UserError for the config of a model that is no causal language model of transformers."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"a {config.model_type} is no causal language model",
            where=where,
            mend="docs/add-a-language-model.md lists families that work.",
        )


def _check_class(hf: Any) -> None:
    """Raises UserError for a family whose class in transformers lacks what mmtune needs of one."""
    what = ""
    if hf.base_model is hf:
        what = "its class has no body apart from its head"
    elif "inputs_embeds" not in inspect.signature(hf.prepare_inputs_for_generation).parameters:
        what = "it answers to token ids alone, and a picture is none"
    if what:
        kind = hf.config.model_type
        mend = "docs/add-a-language-model.md lists families that work."
        raise UserError(f"a {kind} cannot be used: {what}", where="model.language", mend=mend)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= embeddings}
    if not beyond:
        return
    tokens = sorted(beyond, key=lambda token: beyond[token])
    named = ", ".join(tokens[:4]) + (" ..." if len(tokens) > 4 else "")
    mend = "Tokenizer and language model don't belong together: name the model's own."
    if beyond.keys() <= {token.content for token in tokenizer.added_tokens_decoder.values()}:
        mend = (
            "They were added to it afterwards. mmtune needs no token for a picture: name a tokenizer without "
            "them, or a model whose embeddings were resized to it."
        )
    raise UserError(
        f"the tokenizer has {len(tokenizer)} tokens, the model only {embeddings} embeddings; without one are "
        f"{named}",
        where=tokenizer.name_or_path,
        mend=mend,
    )


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
