"""Language models whose linear layers are held in 4 or 8 bits, through bitsandbytes.

nf4: NormalFloat4 in blocks of 64, the blocks' scales in 8 bits again (Dettmers et al., QLoRA, arXiv
2305.14314). int8: a scale per row, activations in 8 bits too (Dettmers et al., LLM.int8(), arXiv 2208.07339).
The head and the embeddings stay as they are.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import nn

from mmtune.parts.loading import from_pretrained

for _talkative in ("autograd._functions", "backends.cpu.ops"):
    # At each call: fp32 becomes fp16 before it becomes int8. At import: a faster kernel is not there.
    getLogger(f"bitsandbytes.{_talkative}").setLevel(ERROR)


def load_quantized(cls: Any, weights: str, kind: str, dtype: torch.dtype) -> Any:
    """`cls.from_pretrained` from weights of full precision, quantised as they come: never whole in memory.

    kind: nf4 or int8. dtype: of all other weights, and of what the layers compute in. What is quantised are
    the stored values whatever `dtype`, so a model is the same in training and evaluation. Raises UserError.
    """
    if torch.get_default_device().type == "meta":
        return from_pretrained(cls, weights)
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = from_pretrained(
        cls, weights, dtype=torch.float32, quantization_config=config, device_map={"": place}
    )
    for module in model.modules():
        if is_quantized(module):
            _settle(module, dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes, told without importing that."""
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def full_weight(layer: nn.Module) -> torch.Tensor:
    """The values a quantised layer stands for, fp32 [p, q]."""
    from bitsandbytes import functional

    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        # As one row: the kernel for the CPU begins a new block with each row, where none begins if the width
        # is no multiple of a block, and gives wrong values.
        flat = copy.copy(state)
        flat.dtype, flat.shape = torch.float32, torch.Size((1, state.shape.numel()))
        return functional.dequantize_4bit(weight.data, flat).view(state.shape)
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def dequantize(core: nn.Module) -> None:
    """Puts plain fp32 layers of the same values in the places of quantised ones."""
    for name, layer in list(core.named_modules()):
        if not is_quantized(layer):
            continue
        assert isinstance(layer, nn.Linear)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(full_weight(layer), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.data.float(), requires_grad=False)
        core.set_submodule(name, plain.train(layer.training))


def forget_quantization(hf: Any) -> None:
    """Lets a dequantised transformers model be saved and adapted as a plain one."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(hf, name):
            setattr(hf, name, False)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(hf, name):
            delattr(hf, name)
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config


def _settle(layer: Any, dtype: torch.dtype) -> None:
    """Undoes what would change a layer's weight, or where it keeps its scales, in its first forward pass."""
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        state.dtype = dtype
        # On a CPU with AVX512-BF16 the first evaluation would repack the weight with bf16 scales and compute
        # in bf16, and it fails where a layer's width is no multiple of 64.
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.device.type == "cpu" and layer.in_features % state.blocksize:
            layer.forward = partial(_linear, layer)
    else:
        layer.init_8bit_state()  # would take the scales from the weight, where penalty and merging look
        layer.weight.SCB = layer.state.SCB


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, without the kernel that `full_weight` tells of."""
    dtype = layer.compute_dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return nn.functional.linear(x.to(dtype), full_weight(layer).to(dtype), bias).to(x.dtype)
