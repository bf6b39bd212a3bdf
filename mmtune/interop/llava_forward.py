"""What the original LLaVA-1.5 works out from the tensors of its files, with classes of transformers alone.

The order of things follows llava/model/llava_arch.py (1.2.2): tower, selected layer, projector, features in
the places of the pictures, LlamaForCausalLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, linear
from transformers import CLIPVisionModel, LlamaForCausalLM

from mmtune.data.batches import Batch
from mmtune.data.chat import IMAGE_ID
from mmtune.interop.comparison import placed
from mmtune.interop.source import Source
from mmtune.interop.weights import Stored


@torch.no_grad()
def own_logits(found: Source, batch: Batch, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of a model in LLaVA's layout, fp32: [n, vocabulary] on the CPU, at each position of the batch
    that is no padding. pixels: [N, 3, S, S], normalised. Row by row, so that there is no padding; LoRA is
    added to the weights as W + (alpha / r) B A.
    """
    tower = _in_fp32(CLIPVisionModel, found.vision, _read(found.tensors["vision"]))
    seen = tower(pixel_values=pixels.to(tower.device), output_hidden_states=True).hidden_states[found.layer]
    projector = {name: tensor.float() for name, tensor in _read(found.tensors["connector"]).items()}
    shown = iter(_projected(seen[:, 1:].cpu(), projector))
    weights = _read(found.tensors["language"])
    for layer, update in _updates(found).items():
        weights[layer] = weights[layer].float() + update
    del tower
    language = _in_fp32(LlamaForCausalLM, found.language, weights)
    device = language.device
    made = []
    for padded, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True):
        ids = padded[mask].to(device)
        places = (ids == IMAGE_ID).nonzero().flatten()
        embeddings = language.get_input_embeddings()(ids.clamp(min=0))
        while len(places):
            features = next(shown).to(device)
            embeddings[places[: len(features)]] = features
            places = places[len(features) :]
        made.append(language(inputs_embeds=embeddings[None]).logits[0].cpu())
    return torch.cat(made)


def _projected(features: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    if "linear.weight" in weights:
        return linear(features, weights["linear.weight"], weights["linear.bias"])
    hidden = gelu(linear(features, weights["linear_1.weight"], weights["linear_1.bias"]))
    return linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])


def _updates(found: Source) -> dict[str, torch.Tensor]:
    """(alpha / r) B A of each adapted weight, fp32."""
    made = {}
    for name, stored in found.adapter.items():
        if ".lora_A." in name:
            a, b = stored.read().float(), found.adapter[name.replace(".lora_A.", ".lora_B.")].read().float()
            assert found.adapter_config is not None
            layer = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            made[layer] = found.adapter_config["lora_alpha"] / found.adapter_config["r"] * (b @ a)
    return made


def _in_fp32(cls: Any, config: Any, tensors: dict[str, torch.Tensor]) -> Any:
    made = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    return placed(made.eval())


def _read(tensors: dict[str, Stored]) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in tensors.items()}
