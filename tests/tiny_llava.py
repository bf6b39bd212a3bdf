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

from mmtune.data.chat import IMAGE_ID
from mmtune.parts.model import VisionLanguageModel
from tests import tiny_models as tiny

# Renders what the template of llava-hf/llava-1.5-7b-hf does: pictures first, a space after each text, no
# system line.
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
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


def compared(model: VisionLanguageModel, theirs: Any, pictures: list[int], left: bool) -> float:
    """The largest difference of logits as a part of the largest logit."""
    batch = tiny.batch(pictures, left=left)
    pixels = model.vision.normalise(batch.images, torch.float32) if len(batch.images) else None
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, theirs.config.image_token_index)
    mask = batch.attention_mask.bool()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=batch.attention_mask, pixel_values=pixels).logits[
            mask
        ]
        hidden = model.language.hidden(model.splice(batch), batch.attention_mask)
        found = model.language.logits(hidden[mask])
    return float((found - expected).abs().max() / expected.abs().max())


def answers(model: VisionLanguageModel, theirs: Any, pictures: list[int]) -> tuple[list[Any], list[Any]]:
    """Greedy ids of 20 tokens, mmtune's and transformers'; each ends with its end token."""
    batch = tiny.batch(pictures, left=True)
    pixels = {"pixel_values": model.vision.normalise(batch.images, torch.float32)} if any(pictures) else {}
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_ID, theirs.config.image_token_index)
    made = theirs.generate(
        input_ids=ids,
        attention_mask=batch.attention_mask,
        **pixels,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=model.end_ids,
        pad_token_id=0,
    )
    expected = []
    for row in made[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in model.end_ids), len(row))
        expected.append(row[:end])
    return model.generate(batch, 20), expected
