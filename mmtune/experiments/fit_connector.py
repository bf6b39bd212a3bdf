"""A connector for another tower, fitted to give the image tokens that the old tower and connector gave.

The pre-activations of the old connector's first linear layer are regressed on the new tower's features of the
same pictures, by ridge; the layers after it are kept. No label is looked at and nothing is trained.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtune.core.config import to_dict
from mmtune.core.errors import UserError
from mmtune.core.files import read_json, remove_folder, replacing_folder, write_json
from mmtune.data.batches import load_images
from mmtune.data.image import ImageTransform, Picture
from mmtune.data.shards import Stored
from mmtune.evaluation.generate import best_device
from mmtune.evaluation.metrics.base import some
from mmtune.experiments.swap_options import LEAST_PICTURES, FitOptions
from mmtune.parts.connector.base import Connector
from mmtune.parts.fingerprint import model_hash, weights_hash
from mmtune.parts.loading import torch_dtype
from mmtune.parts.model import VisionLanguageModel, load_part, load_vision
from mmtune.run import DataOptions
from mmtune.training.plan import read_samples

FITTED = re.compile(r"linear|mlp\d+x_gelu")  # kinds whose first layer is linear and works on each token
RECORD = "fit.json"
RIDGES = [10.0**power for power in range(-10, 3)]  # of the features' mean variance
TENTH = 10  # of the pictures one in ten chooses the ridge, another one measures the fit
Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]  # of each picture the old and the new features, fp64


def why_not(old: VisionLanguageModel, new: VisionLanguageModel) -> str | None:
    """Why the connector of `new` cannot be fitted to that of `old`, both outlines; None where it can."""
    kinds = old.connector.kind, new.connector.kind
    if kinds[0] != kinds[1]:
        return f"the base's connector is {kinds[0]}, this one {kinds[1]}"
    if not FITTED.fullmatch(kinds[0]):
        return f"a connector of kind {kinds[0]} does not begin with a linear layer on each token"
    if old.vision.tokens != new.vision.tokens:
        return (
            f"the base's tower makes {old.vision.tokens} features of a picture, this one {new.vision.tokens}"
        )
    if _laid(old.transform) != _laid(new.transform):
        why = "it lays a picture on its square otherwise than the base, so its features are of other places"
        fits = old.transform.fit, new.transform.fit
        return why if fits[0] == fits[1] else f"{why} (write fit: {fits[0]} beside its weights)"
    assert new.options.vision
    if new.options.vision.weights is None:
        return "its weights are drawn anew in each run"
    return None


def _laid(transform: ImageTransform) -> tuple[Any, ...]:
    return transform.fit, transform.crop_pct


def fit_connector(
    base: str,
    old: VisionLanguageModel,
    new: VisionLanguageModel,
    data: FitOptions,
    folder: Path,
    started: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes to `folder` a connector for the tower of `new` that stands for the base's tower and connector.

    base: a model folder. old, new: outlines of it and of the model to be, whose dtype the towers run in; the
    regression is in fp64. A connector that was made from the same and lies there is kept; one from something
    else is made anew, but if runs have `started` from it. Returns what is in
    fit.json beside it: from what it was made, `ridge`, and R² over pictures that chose nothing, of the
    `preactivations` that were regressed and of the `image_tokens`. Raises UserError.
    """
    vision = new.options.vision
    assert vision and vision.weights
    pictures = choose_pictures(data.data, data.pictures)
    origin = {
        "base": model_hash(base),
        "vision": to_dict(vision),
        "tower": weights_hash(vision.weights),
        "dtype": new.options.dtype,
        "pictures": _contents(pictures),
    }
    if (folder / RECORD).is_file():
        found: dict[str, Any] = read_json(folder / RECORD)
        changed = [key for key in origin if found["from"].get(key) != origin[key]]
        if not changed:
            return found
        if started:
            raise UserError(
                f"this connector was fitted with another {', '.join(changed)}, and runs have started from "
                f"it: {some(started)}",
                where=folder,
                mend="Give the swap another name, or remove those runs.",
            )
    device = best_device()
    towers = [load_part(base, "vision", old, merge=True, dtype=new.options.dtype)]
    towers.append(load_vision(vision, torch_dtype(new.options.dtype)))
    connector: Any = load_part(base, "connector", old, merge=True)
    for part in (*towers, connector):
        part.to(device).eval()
    transforms = old.transform, new.transform

    def features(which: Sequence[Picture]) -> Pairs:
        for start in range(0, len(which), data.batch_size):
            with torch.no_grad():
                both = [
                    tower(load_images(which[start : start + data.batch_size], transform).to(device)).double()
                    for tower, transform in zip(towers, transforms, strict=True)
                ]
            yield from zip(*both, strict=True)

    fitted, ridge = fit(connector, features(pictures), new.vision.width)
    measured = measure(connector, fitted, features(pictures[TENTH - 1 :: TENTH]))
    made = {"from": origin, "ridge": ridge, "pictures": len(pictures), "r2": measured}
    if folder.is_dir():  # of other pictures, and nothing started from it
        remove_folder(folder)
    with replacing_folder(folder) as unfinished:
        fitted.float().save(unfinished)
        write_json(unfinished / RECORD, made)
    return made


def _contents(pictures: Sequence[Picture]) -> str:
    """The first 16 hex digits of the SHA-256 of the pictures' files, in their order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.read() if isinstance(picture, Stored) else picture.read_bytes())
    return digest.hexdigest()[:16]


def choose_pictures(data: Sequence[DataOptions], count: int) -> list[Picture]:
    """`count` different pictures of training data, or all where there are fewer, evenly over their order.

    Raises UserError where the data is faulty, or has too few.
    """
    found: dict[Picture, None] = {}
    for part in data:
        samples, faults = read_samples(part)
        if faults:
            raise UserError.of(faults)
        found |= dict.fromkeys(picture for sample in samples for picture in sample.images)
    pictures = list(found)
    if len(pictures) < LEAST_PICTURES:
        raise UserError(
            f"there are {len(pictures)} pictures in its data, and a fit takes {LEAST_PICTURES} at least",
            where="fit.data",
            mend="Name data with pictures.",
        )
    count = min(count, len(pictures))
    return [pictures[i * len(pictures) // count] for i in range(count)]


def fit(old: Connector, features: Pairs, width: int) -> tuple[Connector, float]:
    """A connector for features `width` wide, and its ridge, as a share of the features' mean variance.

    Of ten pictures eight are learned from, the ninth chooses the ridge, the tenth is left for `measure`. Both
    connectors are in fp64 afterwards.
    """
    name, first = first_layer(old.double())
    learn = Moments(width, first.out_features, first.weight.device)
    choose = Moments(width, first.out_features, first.weight.device)
    for number, (before, after) in enumerate(features):
        place = number % TENTH
        if place < TENTH - 1:
            with torch.no_grad():
                (learn if place < TENTH - 2 else choose).add(after, first(before))
    ridge, weight, bias = min(learn.solutions(RIDGES), key=lambda made: choose.error(*made[1:]))
    layer = nn.Linear(width, first.out_features, device=weight.device, dtype=weight.dtype)
    layer.weight, layer.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias)
    fitted = copy.deepcopy(old)
    fitted.set_submodule(name, layer)
    fitted.vision_width = width
    return fitted, ridge


def measure(old: Connector, fitted: Connector, features: Pairs) -> dict[str, float]:
    """R² of the fitted connector's `preactivations` and `image_tokens`, those of the old one being the truth.

    Over all entries together, each about its mean over the pictures.
    """
    layers = {"preactivations": (first_layer(old)[1], first_layer(fitted)[1]), "image_tokens": (old, fitted)}
    errors = dict.fromkeys(layers, 0.0)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    with torch.no_grad():
        for before, after in features:
            for name, (truth, guess) in layers.items():
                wanted = truth(before[None])[0]
                errors[name] += float((guess(after[None])[0] - wanted).square().sum())
                row = [wanted.sum(0), wanted.square().sum(0), torch.full_like(wanted[0], len(wanted))]
                seen[name].append(torch.stack(row))
    found = {}
    for name, rows in seen.items():
        total, squares, count = torch.stack(rows).sum(0)
        found[name] = 1 - errors[name] / float((squares - total.square() / count).sum())
    return found


def first_layer(connector: Connector) -> tuple[str, nn.Linear]:
    """The linear layer that takes the tower's features, and its name."""
    return next((name, each) for name, each in connector.named_modules() if isinstance(each, nn.Linear))


class Moments:
    """What a linear regression of y on x has to know, summed up as the rows come; none is kept. fp64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.n = 0
        self.xx, self.xy, self.yy = zeros(inputs + 1, inputs + 1), zeros(inputs + 1, outputs), zeros(())

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Rows x [n, inputs] and y [n, outputs]."""
        x = nn.functional.pad(x.double(), (0, 1), value=1.0)  # the bias
        self.n += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y.double()
        self.yy += y.double().square().sum()

    def solutions(self, ridges: Sequence[float]) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """Of each ridge, a share of the mean variance of x: itself, the weights [inputs, outputs], the bias.

        They minimise |xW + b - y|² / n + ridge |W|²; the bias is not penalised.
        """
        x, y = self.xx[:-1, -1] / self.n, self.xy[-1] / self.n
        covariance = self.xx[:-1, :-1] / self.n - x.outer(x)
        values, vectors = torch.linalg.eigh(covariance)
        turned = vectors.T @ (self.xy[:-1] / self.n - x.outer(y))
        mean = float(values.mean()) or 1.0  # of features that are all alike
        for ridge in ridges:
            weight = vectors @ (turned / (values.clamp(min=0) + ridge * mean)[:, None])
            yield ridge, weight, y - x @ weight

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """The squared error of xW + b, summed over all rows."""
        both = torch.cat([weight, bias[None]])
        return float(self.yy - 2 * (both * self.xy).sum() + (both * (self.xx @ both)).sum())
