"""Tiny random models in the formats of the real ones, made in code: no file to download, no network.

Weights are drawn wide (std 0.3), so that features, logits and greedy answers differ from token to token
and a mistake in them shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from mmtune.data.batches import Batch, pad
from mmtune.data.chat import IGNORE, IMAGE_ID
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions

SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The tokenizer's 5 + 256 tokens, and a few embeddings without one, as many real models have.
VOCABULARY = 264
WIDTH = 32
SIZE, PATCH = 16, 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
    "initializer_factor": 1.0,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MHA: dict[str, Any] = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
_TIED: dict[str, Any] = {**_DECODER, "tie_word_embeddings": True}
# Two layers of different kinds, and a window that rows of a few tokens fall out of.
_WINDOW: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 8,
}
# By model_type, each with what is particular about it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": 6},
    "qwen2": _TIED,
    "qwen3": {**_DECODER, "head_dim": 8},
    "phi": {**_MHA, "partial_rotary_factor": 0.5},
    "phi3": _DECODER,
    "gemma": {**_TIED, "head_dim": 8},
    "gemma2": {
        **_TIED,
        **_WINDOW,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {**_TIED, **_WINDOW, "query_pre_attn_scalar": 8},
    "smollm3": {**_TIED, "no_rope_layers": [1, 0]},
    "gpt_neox": {**_MHA, "rotary_pct": 0.25},
    "granite": {**_DECODER, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {**_TIED, "logit_scale": 0.25},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, a token per byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:],
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def save_tower(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A CLIP tower in Hugging Face's format."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**{**VISION, **changes}))
    _spread(tower, 0.3)
    tower.save_pretrained(folder)
    return str(folder)


def save_language(folder: Path, family: str = "llama", seed: int = 1, **changes: Any) -> str:
    """A causal language model of a family, with the tokenizer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, _DECODER), **changes})
    language = AutoModelForCausalLM.from_config(config)
    _spread(language, 0.05)
    language.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def parts(
    folder: Path, family: str = "llama", connector: str = "mlp2x_gelu", layer: int = -2
) -> ModelOptions:
    """Options of a model from a saved tower and language model under `folder`, the connector new."""
    return ModelOptions(
        vision=VisionOptions("clip", save_tower(folder / "tower"), layer=layer),
        connector=ConnectorOptions(connector),
        language=LanguageOptions(save_language(folder / "lm", family)),
    )


def model(folder: Path, family: str = "llama", **changes: Any) -> VisionLanguageModel:
    """`parts`, assembled, in evaluation mode; the new connector's features are as large as embeddings."""
    options = parts(folder, family, **changes)
    torch.manual_seed(2)
    made = assemble(options)
    with torch.no_grad():
        for parameter in made.connector.parameters():
            parameter.mul_(2)
    return made.eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 noise [count, 3, SIZE, SIZE]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def rows(pictures_per_row: list[int], seed: int = 0) -> list[list[int]]:
    """Token ids of rows of different lengths, each picture's places somewhere inside."""
    generator = torch.Generator().manual_seed(seed)

    def text(least: int) -> list[int]:
        length = least + int(torch.randint(0, 7, (1,), generator=generator))
        return torch.randint(len(SPECIAL), len(SPECIAL) + 256, (length,), generator=generator).tolist()

    made = []
    for count in pictures_per_row:
        row = [1, *text(1)]
        for _ in range(count):
            row += [IMAGE_ID] * IMAGE_TOKENS + text(0)
        made.append(row + text(2))
    return made


def batch(pictures_per_row: list[int], seed: int = 0, left: bool = False) -> Batch:
    """A padded batch with noise for pictures; the last two tokens of each row are supervised."""
    made = rows(pictures_per_row, seed)
    padded = pad(made, pad_id=0, left=left)
    padded.images = pictures(sum(pictures_per_row), seed)
    labels = torch.full_like(padded.input_ids, IGNORE)
    for row, mask in enumerate(padded.attention_mask):
        last = mask.nonzero().flatten()[-2:]
        labels[row, last] = padded.input_ids[row, last]
    padded.labels = labels
    return padded


def _spread(module: torch.nn.Module, std: float) -> None:
    """Biases and norms too: what is zero or one in a new model hides mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
