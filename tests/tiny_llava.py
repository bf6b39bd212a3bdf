"""Tiny random LLaVA models, made and saved by transformers itself, as llava-hf publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests import tiny_models as tiny

# As it stands in llava-hf/llava-1.5-7b-hf.
LLAVA_HF = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_llava_hf(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    fit: str = "crop",
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard: str = "5GB",
    **changes: Any,
) -> Path:
    """A whole folder: weights, config, processor. changes: of LlavaConfig."""
    torch.manual_seed(3)
    tokens = tokenizer if tokenizer is not None else tiny.tokenizer()
    tokens.add_tokens(["<image>"], special_tokens=True)
    text = {
        **tiny.FAMILIES.get(family, tiny.FAMILIES["llama"]),
        "vocab_size": len(tokens) + 3,
        "tie_word_embeddings": tied,
    }
    config = LlavaConfig(
        **{
            "vision_config": CLIPVisionConfig(**tiny.VISION),
            "text_config": AutoConfig.for_model(family, **text),
            "image_token_index": tokens.convert_tokens_to_ids("<image>"),
            "image_seq_length": tiny.IMAGE_TOKENS,
            **changes,
        }
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    processor(tokens, fit).save_pretrained(folder)
    return folder


def processor(tokenizer: PreTrainedTokenizerBase, fit: str) -> LlavaProcessor:
    size: Any = {"size": {"shortest_edge": tiny.SIZE}, "crop_size": {"height": tiny.SIZE, "width": tiny.SIZE}}
    pictures: Any = (
        CLIPImageProcessorPil(**size) if fit == "crop" else LlavaImageProcessorPil(**size, do_pad=True)
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_HF,
    )
