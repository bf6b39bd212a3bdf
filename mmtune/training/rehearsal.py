"""The passes of a training step without values: how many bytes of tensors they keep, and have at once.

The model's own code runs forward and backward on fake tensors (torch's FakeTensorMode), which have shapes,
dtypes and storages of their sizes, and nothing in them. So whatever a model family, an adapter, autocast or
checkpointing keeps for the backward pass is counted as torch would keep it, by no formula of ours.

Of a language model whose layers are all alike two and three are run: each more takes as much as the third.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtune.data.batches import Batch
from mmtune.data.chat import IGNORE, IMAGE_ID
from mmtune.parts.attention import IMPLEMENTATIONS, attention_for
from mmtune.parts.model import VisionLanguageModel
from mmtune.tuning.kl import kl_divergence

SOME = 2  # layers


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: samples, tokens of each (its pictures' among them), its pictures, and on how many of
    the tokens the loss is taken.
    """

    samples: int
    tokens: int
    pictures: int
    supervised: int


@dataclass(frozen=True)
class Passes:
    """Bytes beside weights and gradients: kept between the two passes, and at once at the most."""

    kept: int
    peak: int


def rehearse(
    model: VisionLanguageModel,
    shape: Shape,
    bf16: bool,
    checkpointing: bool,
    kl: bool = False,
    gpu: bool = True,
) -> Passes:
    """What the passes of one micro-batch take, with gradients there already from the one before.

    model: with its tuners attached; of its tensors only shapes and dtypes count, and they stay as they are.
    bf16: under autocast. kl: with the base's logits and the KL to them. gpu: as the kernels of a GPU do it,
    which keep a dropout's mask in bytes; otherwise as those of a CPU.
    """
    count = _alike_layers(model)
    if count <= SOME + 1:
        return _rehearse(model, shape, bf16, checkpointing, kl, gpu)
    few, more = (_rehearse(model, shape, bf16, checkpointing, kl, gpu, layers) for layers in (SOME, SOME + 1))
    rest = count - SOME
    return Passes(
        few.kept + rest * (more.kept - few.kept),
        few.peak + rest * (more.peak - few.peak),
    )


def _rehearse(
    model: VisionLanguageModel,
    shape: Shape,
    bf16: bool,
    checkpointing: bool,
    kl: bool,
    gpu: bool,
    layers: int | None = None,
) -> Passes:
    """The same by running it. layers: only so many of the language model's."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    if layers is not None:
        with _first_layers(model, layers):
            return _rehearse(model, shape, bf16, checkpointing, kl, gpu)
    step = _Step(model, _batch(shape, model), kl)
    own = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    with fake:
        tensors = {name: _like(tensor) for name, tensor in own.items()}
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.grad = torch.empty_like(tensor)
    step.live = live = _Live([*tensors.values(), *(t.grad for t in tensors.values() if t.grad is not None)])
    with ExitStack() as stack:
        stack.enter_context(_training(model, checkpointing))
        stack.enter_context(_without_flash(model))
        stack.enter_context(live)
        if gpu:
            stack.enter_context(patch.object(nn.functional, "dropout", _dropout))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16))
        torch.func.functional_call(step, tensors, ())
    return Passes(step.kept, live.peak)


class _Step(nn.Module):
    """Both passes as a forward pass, so that the tensors that stand for the model's own stay through both."""

    live: _Live

    def __init__(self, model: VisionLanguageModel, batch: Batch, kl: bool) -> None:
        super().__init__()
        self.model = model
        self.batch = batch
        self.kl = kl
        self.kept = 0

    def forward(self) -> None:
        loss = self._loss()
        self.kept = self.live.now
        loss.backward()

    def _loss(self) -> torch.Tensor:
        if not self.kl:
            return self.model(self.batch)
        with torch.no_grad(), ExitStack() as as_it_was:
            for adapter in self.model.adapters.values():
                as_it_was.enter_context(adapter.disable_adapter())
            _, base = self.model(self.batch, True)
        loss, logits = self.model(self.batch, True)
        return loss + kl_divergence(base, logits)


class _Live(TorchDispatchMode):
    """Bytes of the storages that there are, without those of `known` tensors: `now`, and at most (`peak`)."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout as CUDA's kernel does it, whose mask has a byte for an entry."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _places(index: Any) -> tuple[Any, ...]:
    """A mask's places, which a fake tensor cannot count."""
    mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero().unbind(1) if mask else (index,)


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)


def _batch(shape: Shape, model: VisionLanguageModel) -> Batch:
    """Real ids, so that what looks at them can; pictures first, what is supervised last."""
    ids = torch.ones(shape.samples, shape.tokens, dtype=torch.long)
    places = ids.view(-1)
    for picture in range(shape.pictures):
        start = picture % shape.samples * shape.tokens + picture // shape.samples * model.image_tokens
        places[start : start + model.image_tokens] = IMAGE_ID
    labels = torch.full_like(ids, IGNORE)
    labels[:, shape.tokens - shape.supervised :] = 1
    side = model.transform.size
    images = torch.zeros(shape.pictures, 3, side, side, dtype=torch.uint8)
    return Batch(ids, torch.ones_like(ids), images, labels)


def _alike_layers(model: VisionLanguageModel) -> int:
    """How many layers the language model has, where all are alike; otherwise 0."""
    hf = model.language.hf
    layers = getattr(hf.base_model, "layers", [])
    kinds = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        for layer in layers
    }
    types = set(getattr(hf.config, "layer_types", None) or ())
    return len(layers) if len(kinds) == 1 and len(types) <= 1 else 0


@contextmanager
def _first_layers(model: VisionLanguageModel, count: int) -> Iterator[None]:
    base = model.language.hf.base_model
    layers = base.layers
    base.layers = layers[:count]
    try:
        yield
    finally:
        base.layers = layers


@contextmanager
def _without_flash(model: VisionLanguageModel) -> Iterator[None]:
    """Its kernels take no fake tensors; sdpa keeps as much."""
    flash: list[Any] = [model.part(name) for name, its in model.attention.items() if its == "flash"]
    try:
        for part in flash:
            part.attend_by(IMPLEMENTATIONS[attention_for(part, "auto", torch.float32)])
        yield
    finally:
        for part in flash:
            part.attend_by(IMPLEMENTATIONS["flash"])


@contextmanager
def _training(model: VisionLanguageModel, checkpointing: bool) -> Iterator[None]:
    """As the training loop has it, and back."""
    training = model.training
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers is renaming this
        for part in (model.vision, model.language):
            part.checkpoint_activations(checkpointing)
        try:
            yield
        finally:
            for part in (model.vision, model.language):
                part.checkpoint_activations(False)
            model.train(training)
