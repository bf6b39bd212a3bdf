"""The model's parts. `VisionLanguageModel` is imported on first use, so that this package costs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtune.parts.model import VisionLanguageModel

__all__ = ["VisionLanguageModel"]


def __getattr__(name: str) -> Any:
    if name == "VisionLanguageModel":
        from mmtune.parts.model import VisionLanguageModel

        return VisionLanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
