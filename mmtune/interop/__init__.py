"""mmtune among its neighbours. Nothing of mmtune imports from here."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """The entry point (group `lmms_eval.models`) by which lmms-eval knows the model `mmtune`: its
    ModelManifest.

    Every lmms-eval command calls it, so torch and the model are left to the class that it names.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmtune", simple_class_path="mmtune.interop.lmms_eval.MmtuneModel")
