"""A tuned model and the base it was trained from, and what lies between them.

What both have in common is held once: an adapter is turned off or down, and only of a part whose own weights
trained is there a second copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.fingerprint import changed_parts, same_weights
from mmtune.parts.loading import own_weights
from mmtune.parts.model import VisionLanguageModel, load_part


def base_parts(
    model: VisionLanguageModel, folder: Path, base: Path, dtype: str, restored: str | None = None
) -> dict[str, nn.Module | None]:
    """Each part that changed -> the base's, on the model's device; None where it is the model's own without
    its adapter.

    folder: where the model was loaded from. restored: a part that is the base's already. Raises UserError.
    """
    device = next(model.parameters()).device
    return {
        part: None
        if same_weights(folder, base, part)
        else load_part(base, part, model, dtype=dtype).to(device)
        for part in changed_parts(folder, base)
        if part != restored
    }


@contextmanager
def as_base(model: VisionLanguageModel, beside: Mapping[str, nn.Module | None]) -> Iterator[None]:
    """Within it the model is its base, with `base_parts` in their places and the other adapters off."""
    own = {part: model.part(part) for part in beside}
    with ExitStack() as adapters_off:
        try:
            for part, module in beside.items():
                if module is not None:
                    setattr(model, part, module)
                elif part in model.adapters:
                    adapters_off.enter_context(model.adapters[part].disable_adapter())
            yield
        finally:
            for part, module in own.items():
                setattr(model, part, module)


@torch.no_grad()
def scale_changes(model: VisionLanguageModel, folder: Path, base: Path, scale: float, dtype: str) -> None:
    """Goes only a part of the way from the base to the tuned model: W0 + s (W - W0) for every weight.

    An adapter's scaling becomes s times its own. At s = 1 nothing changes, at s = 0 the model is the base.
    Source: WiSE-FT (Wortsman et al., arXiv 2109.01903), here on adapters as on weights. Raises UserError.
    """
    for part in changed_parts(folder, base):
        core = model.core(part)
        if not same_weights(folder, base, part):
            initial = own_weights(_core(load_part(base, part, model, merge=True, dtype=dtype)))
            for name, weight in core.named_parameters():
                if ".lora_" in name:
                    continue
                start = initial.get(name.replace(".base_layer.", "."))
                if start is None or start.shape != weight.shape:
                    raise UserError(
                        f"its {part} has no {name} like the model's: there is no way from one to the other",
                        where=base,
                        mend="Give the model that this one was trained from.",
                    )
                # lerp is exact at both ends, which W0 + s (W - W0) is not.
                weight.copy_(torch.lerp(start.to(weight.device), weight, scale))
        if part in model.adapters:
            layers = [module for module in core.modules() if isinstance(module, LoraLayer)]
            if not layers:
                raise UserError(f"its {part} has an adapter that is no LoRA", where=folder, mend="Merge it.")
            for layer in layers:
                layer.scale_layer(scale)


def _core(part: nn.Module) -> nn.Module:
    return getattr(part, "hf", part)
