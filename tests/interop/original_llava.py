"""Tiny random models in the layouts that haotian-liu/LLaVA writes, and what its forward pass computes.

The layouts follow llava/train/train.py (what is saved, under which names) and the files of the released
LLaVA-1.5 models; the forward pass llava/model/llava_arch.py (1.2.2): tower, selected layer, two linear
layers, embeddings in the places of the pictures, LlamaForCausalLM. Nothing of mmtune is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 400
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 16,
}
# The fields of liuhaotian/llava-v1.5-7b's config.json; sizes and tower are the stand-in's.
LLAMA: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_length": 4096,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
MULTIMODAL: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava_llama",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}


def save_tokenizer(folder: Path) -> None:
    """A SentencePiece model trained as Llama's was, with the files that lie beside Vicuna's."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "corpus.txt"
    said = "USER: What is shown here? ASSISTANT: A red square, and two blue ones beside it.\n"
    text.write_text(f"{SYSTEM} {said}" * 40 + "".join(f"{n}, {n * n} and {n * 7}.\n" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {
        name: {"content": token, **plain}
        for name, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items()
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
    }
    write(folder / "tokenizer_config.json", config)
    write(folder / "special_tokens_map.json", {**special, "pad_token": "<unk>"})


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A whole CLIP with its text tower in one .bin, as openai/clip-vit-large-patch14-336 has it."""
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(vision_config=TOWER, text_config={**text, **words}))
    clip.config.save_pretrained(folder)
    held = wide(clip.state_dict(), 0.3)
    # Files of transformers before 4.31 hold this buffer too.
    save_bin(folder, {**held, "vision_model.embeddings.position_ids": torch.arange(5)[None]})
    processor = {
        "crop_size": TOWER["image_size"],
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": TOWER["image_size"],
    }
    write(folder / "preprocessor_config.json", processor)
    return folder


def language_tensors(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of a LlamaForCausalLM, by the names of its files."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(**LLAMA)).state_dict()
    return {name: tensor.to(dtype) for name, tensor in wide(made, 0.3).items()}


def projector_tensors(
    kind: str = "mlp2x_gelu", seed: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Of an mm_projector, without a prefix."""
    torch.manual_seed(seed)
    seen, said = TOWER["hidden_size"], LLAMA["hidden_size"]
    shapes = {"0.weight": (said, seen), "0.bias": (said,), "2.weight": (said, said), "2.bias": (said,)}
    if kind == "linear":
        shapes = {"weight": (said, seen), "bias": (said,)}
    return {name: (torch.randn(shape) * 0.3).to(dtype) for name, shape in shapes.items()}


def tower_tensors(clip: Path) -> dict[str, torch.Tensor]:
    """The vision tower's of a folder of `save_clip`, `vision_model...`."""
    held = torch.load(clip / "pytorch_model.bin", weights_only=True)
    return {n: t for n, t in held.items() if n.startswith("vision_model.") and "position_ids" not in n}


def save_vicuna(folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """A language model alone in two .bin files, with its tokenizer, as lmsys/vicuna-7b-v1.5 has it."""
    save_tokenizer(folder)
    config = {**LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    write(folder / "config.json", config)
    save_bin(folder, language_tensors(seed, dtype), shards=2)
    return folder


def save_llava(
    folder: Path,
    tower: Path | str,
    dtype: torch.dtype = torch.float32,
    form: str = "bin",
    stored_tower: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """A whole LLaVA-1.5 folder. form: bin or safetensors. stored_tower: one that was tuned, kept inside."""
    save_tokenizer(folder)
    fields = {**LLAMA, **MULTIMODAL, "mm_vision_tower": str(tower), **config}
    write(folder / "config.json", dict(sorted(fields.items())))
    write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9})
    projector = projector_tensors(fields["mm_projector_type"], dtype=dtype)
    tensors = {
        **language_tensors(dtype=dtype),
        **{f"model.mm_projector.{name}": tensor for name, tensor in projector.items()},
        **{f"model.vision_tower.vision_tower.{name}": t for name, t in (stored_tower or {}).items()},
    }
    if form == "bin":
        # Older files of Llama hold this buffer too.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_bin(folder, tensors, shards=2)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def save_stage_one(folder: Path, tower: Path | str, prefix: str = "model.mm_projector.") -> Path:
    """What the alignment stage leaves: the projector and a config."""
    folder.mkdir(parents=True)
    fields = {**LLAMA, **MULTIMODAL, "mm_vision_tower": str(tower), "tune_mm_mlp_adapter": True}
    write(folder / "config.json", fields)
    held = {f"{prefix}{name}": tensor for name, tensor in projector_tensors(seed=5).items()}
    torch.save(held, folder / "mm_projector.bin")
    return folder


def save_lora(
    folder: Path, tower: Path | str, base: Path | str, prefix: str = "base_model.model.", form: str = "bin"
) -> Path:
    """What finetune_lora.sh leaves: peft's adapter, and the projector in non_lora_trainables.bin."""
    folder.mkdir(parents=True)
    fields = {**LLAMA, **MULTIMODAL, "model_type": "llava", "mm_vision_tower": str(tower)}
    write(folder / "config.json", fields)
    torch.manual_seed(6)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
    }
    write(folder / "adapter_config.json", adapter)
    factors: dict[str, torch.Tensor] = {}
    for name, weight in language_tensors().items():
        if name.split(".")[-2] in names:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{layer}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.1
            factors[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    if form == "bin":
        torch.save(factors, folder / "adapter_model.bin")
    else:
        save_file(factors, folder / "adapter_model.safetensors")
    projector = projector_tensors(seed=7)
    held = {f"{prefix}model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    torch.save(held, folder / "non_lora_trainables.bin")
    return folder


class Reference:
    """LLaVA's forward pass on given tensors, fp32."""

    def __init__(
        self, clip: Path, language: Mapping[str, Any], projector: Mapping[str, Any], layer: int = -2
    ) -> None:
        self.tower = CLIPVisionModel.from_pretrained(clip).float().eval()
        self.language = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
        self.language.load_state_dict({name: tensor.float() for name, tensor in language.items()})
        self.projector = {name: tensor.float() for name, tensor in projector.items()}
        self.layer = layer

    @torch.no_grad()
    def embeddings(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Of one row [T, width]; -200 in `ids` is a whole picture."""
        parts, shown = [], iter(pictures)
        for token in ids:
            if token == -200:
                parts.append(self.features(next(shown)))
            else:
                parts.append(self.language.model.embed_tokens(torch.tensor([token])))
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, picture: Image.Image) -> torch.Tensor:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": TOWER["image_size"]},
            crop_size={"height": TOWER["image_size"], "width": TOWER["image_size"]},
        )
        pixels = processor(square, return_tensors="pt")["pixel_values"]
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer][0, 1:]
        if "weight" in self.projector:
            return torch.nn.functional.linear(hidden, self.projector["weight"], self.projector["bias"])
        hidden = torch.nn.functional.linear(hidden, self.projector["0.weight"], self.projector["0.bias"])
        hidden = torch.nn.functional.gelu(hidden)
        return torch.nn.functional.linear(hidden, self.projector["2.weight"], self.projector["2.bias"])

    @torch.no_grad()
    def logits(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Of one row, unpadded [T, vocabulary]."""
        return self.language(inputs_embeds=self.embeddings(ids, pictures)[None]).logits[0]

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], pictures: Sequence[Image.Image], most: int) -> list[int]:
        """The answer's ids, its end token left out."""
        embeddings = self.embeddings(ids, pictures)[None]
        told = torch.ones(embeddings.shape[:2], dtype=torch.long)
        answer = self.language.generate(
            inputs_embeds=embeddings, attention_mask=told, max_new_tokens=most, do_sample=False
        )[0].tolist()
        return answer[: answer.index(2)] if 2 in answer else answer


def prompt_ids(model_file: Path, question: str) -> list[int]:
    """As llava.mm_utils.tokenizer_image_token: each stretch between pictures tokenised by itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = [1]
    for number, chunk in enumerate(f"{SYSTEM} USER: {question} ASSISTANT:".split("<image>")):
        ids += [-200] * (number > 0) + pieces.encode(chunk)
    return ids


def wide(tensors: Mapping[str, torch.Tensor], std: float) -> dict[str, torch.Tensor]:
    """Drawn apart, biases and norms too, so that a mistake in any shows."""
    return {
        name: t + torch.randn_like(t) * std if t.is_floating_point() else t for name, t in tensors.items()
    }


def save_bin(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """pytorch_model.bin, or several with their index."""
    if shards == 1:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        held = {name: tensors[name] for name in names[number::shards]}
        torch.save(held, folder / file)
        index |= dict.fromkeys(held, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's weight files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(file, weights_only=True)
    return found


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")
