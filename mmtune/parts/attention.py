"""How a part computes attention: by flash attention, by torch's own kernel (sdpa) or written out (eager).

All three mean the same. Flash attention (Dao, arXiv 2307.08691) takes a GPU, half precision and the package
flash-attn. What none may do is to leave out a part of a model's attention: under transformers 5.17 sdpa and
an old flash-attn drop the soft-cap of Gemma 2 without a word, later ones refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_greater_or_equal

from mmtune.core.errors import UserError

# The words of a YAML, the fastest first, and transformers' names for them.
IMPLEMENTATIONS = {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}


def attention_for(part: nn.Module, wanted: str, dtype: torch.dtype, here: bool = True) -> str:
    """How a part is to compute attention: `flash`, `sdpa` or `eager`.

    wanted: one of these, or `auto`: the first of them that is there for this part. dtype: what the part is
    held in. here: on this machine, or else on one that has the GPU and the package. Raises UserError with
    the reason where the one that is wanted cannot be had.
    """
    held = getattr(part, "hf", None)
    hf = held if isinstance(held, PreTrainedModel) else None  # or a tower of another library
    against = {"flash": _against_flash(hf, dtype, here), "sdpa": _against_sdpa(hf), "eager": ""}
    if wanted == "auto":
        return next(name for name, reason in against.items() if not reason)
    if reason := against[wanted]:
        raise UserError(
            f"{wanted} is not to be had for the {type(hf or part).__name__}: {reason}",
            where="model.attention",
            mend="Say auto, which takes for each part the fastest that is there.",
        )
    return wanted


def say_attention(attention: Mapping[str, str]) -> str:
    """A line that tells it of each part."""
    return "attention: " + ", ".join(f"{part} {its}" for part, its in attention.items())


def _against_flash(hf: PreTrainedModel | None, dtype: torch.dtype, here: bool) -> str:
    """Why it cannot be had; nothing where it can."""
    if hf is None or not hf._supports_flash_attn:
        return "it has no form of it"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it is held in {str(dtype).removeprefix('torch.')}, and flash attention takes half precision"
    if not here:
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not (is_flash_attn_2_available() and is_flash_attn_greater_or_equal("2.6.0")):  # 2.6 has the soft-cap
        return "the package flash-attn, 2.6 or newer, is not installed"
    return ""


def _against_sdpa(hf: PreTrainedModel | None) -> str:
    if hf is None:  # other libraries' towers know sdpa and eager
        return ""
    if getattr(hf.config, "attn_logit_softcapping", None) is not None:
        return "sdpa leaves out the soft-cap of its attention (attn_logit_softcapping)"
    return "" if hf._supports_sdpa else "it has no form of it"
