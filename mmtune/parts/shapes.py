"""The parts without their weights, from their configs alone, and whether they fit each other.

Within `without_values` every tensor has its shape and dtype and no values (torch's meta device).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mmtune.core.errors import Fault, UserError
from mmtune.core.files import shipped
from mmtune.parts.connector.base import WHERE, Connector, miscounted, new_connector
from mmtune.parts.known import config_of, is_known
from mmtune.parts.language import LanguageModel, load_tokenizer, require_causal
from mmtune.parts.loading import BRINGS_CODE, from_pretrained, refusals
from mmtune.parts.spec import TOWERS, ConnectorOptions, LanguageOptions, ModelOptions, VisionOptions
from mmtune.parts.vision.base import VisionTower, require_contract

T = TypeVar("T")


@contextmanager
def without_values() -> Iterator[None]:
    """A context in which what is made takes no memory."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.filterwarnings("ignore", message=".*which is a no-op")  # values that go nowhere, as meant
        yield


def require_fit(options: ModelOptions) -> None:
    """Raises UserError with all that keeps three parts from being a model, before any weights are read.

    A part of the hub is told by its config, which is fetched where it is not known here.
    """
    assert options.vision and options.connector and options.language
    faults: list[Fault] = []
    with without_values():
        tower = _gather(faults, _tower, options.vision)
        language = _gather(faults, _language, options.language)
        if tower:
            _gather(faults, require_contract, tower)
        if tower and language and not faults:
            _gather(faults, fitting_connector, options.connector, tower, language)
    if faults:
        raise UserError.of(faults)


def fitting_connector(options: ConnectorOptions, tower: VisionTower, language: LanguageModel) -> Connector:
    """A new connector between two parts, which may be without values. Raises UserError where the one in
    `weights` is another, and where it cannot take so many features or gives too many tokens.
    """
    connector = new_connector(options, tower.width, language.width)
    faults: list[Fault] = []
    if options.weights is not None and (Path(options.weights) / "config.json").is_file():
        _gather(faults, connector.require_own, Path(options.weights))
    tokens = _gather(faults, connector.tokens, tower.tokens)
    if tokens is not None:
        _gather(faults, _require_tokens, connector, tower, tokens)
    if tokens is not None and tokens >= language.context:
        mend = "Choose a connector that gives fewer, such as resampler, or give vision a smaller image_size."
        what = f"a picture is {tokens} tokens, and the language model was made for {language.context:.0f}"
        faults.append(Fault(what, WHERE, mend))
    if faults:
        raise UserError.of(faults)
    return connector


def _require_tokens(connector: Connector, tower: VisionTower, tokens: int) -> None:
    """Raises UserError where a connector gives another number of tokens than it says."""
    try:
        given = connector(torch.empty(1, tower.tokens, tower.width)).shape[1]
    except Exception:  # what takes values cannot be asked without them; the splice looks again
        return
    if given != tokens:
        raise miscounted(f"{connector.kind}, the connector", given, tokens)


def tower_of_config(options: VisionOptions) -> VisionTower:
    """A tower from the config of its folder or of a known model. Raises UserError."""
    kind, fields = TOWERS.load(options.tower, "model.vision.tower"), options.config
    if fields is None:
        weights = str(options.weights)
        fields = kind.known_fields(weights)
        fields = kind.fields(config_of(weights, kind.config_file), weights) if fields is None else fields
    made: VisionTower = kind.create(fields, options.layer, options.image_size)
    if options.config is None and shipped(str(options.weights)).is_dir():
        made.take_transform(str(shipped(str(options.weights))))
    return made


def language_of_config(options: LanguageOptions) -> LanguageModel:
    """A language model, without a tokenizer, from the config of its folder or of a known model.

    Raises UserError.
    """
    fields = config_of(str(options.weights)) if options.config is None else options.config
    where = str(options.weights or options.tokenizer)
    if fields.get("model_type") not in CONFIG_MAPPING:
        what = f"transformers knows no model_type {fields.get('model_type')!r}"
        what += f", and {BRINGS_CODE}" if "auto_map" in fields else ""
        raise UserError(what, where=where, mend="Name a model of a family that transformers has.")
    if options.config is not None and "vocab_size" not in fields:
        fields = {**fields, "vocab_size": len(load_tokenizer(str(options.tokenizer)))}
    with refusals(where):
        config = CONFIG_MAPPING[fields["model_type"]](**of_family(fields))
    require_causal(config, where)
    with refusals(where):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return LanguageModel(made, None)  # type: ignore[arg-type]


def of_family(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that the family's config has: files bring along notes of older versions and of other models."""
    default = CONFIG_MAPPING[fields["model_type"]]()
    return {name: value for name, value in fields.items() if hasattr(default, name) and name != "model_type"}


def _tower(options: VisionOptions) -> VisionTower:
    kind = TOWERS.load(options.tower, "model.vision.tower")
    if options.config is not None or kind.known_fields(str(options.weights)) is not None:
        return tower_of_config(options)
    made: VisionTower = kind.load(options.weights, options.layer, torch.float32, options.image_size)
    return made


def _language(options: LanguageOptions) -> LanguageModel:
    if options.config is not None:
        assert options.tokenizer is not None
        return LanguageModel.create(options.config, options.tokenizer)
    assert options.weights is not None
    if is_known(options.weights):
        return language_of_config(options)
    return LanguageModel(from_pretrained(AutoModelForCausalLM, options.weights), None)  # type: ignore[arg-type]


def _gather(faults: list[Fault], work: Callable[..., T], *arguments: Any) -> T | None:
    try:
        return work(*arguments)
    except UserError as error:
        faults += error.faults
        return None
