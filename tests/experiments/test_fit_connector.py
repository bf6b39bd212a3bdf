from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtune.core.errors import UserError
from mmtune.data.batches import load_images
from mmtune.experiments.fit_connector import (
    Moments,
    choose_pictures,
    fit,
    fit_connector,
    measure,
    why_not,
)
from mmtune.experiments.swap_options import FitOptions
from mmtune.parts.connector.base import Connector
from mmtune.parts.connector.linear import LinearConnector
from mmtune.parts.connector.mlp import mlp
from mmtune.parts.model import assemble
from mmtune.parts.outline import outline_of
from mmtune.parts.spec import ConnectorOptions, ModelOptions, VisionOptions
from mmtune.run import DataOptions

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def pairs(count: int, tokens: int, width: int, change: torch.Tensor, seed: int = 0) -> Pairs:
    """Pictures whose new features are their old ones, changed by an affine map."""
    drawn = torch.Generator().manual_seed(seed)
    old = torch.randn(count, tokens, width, generator=drawn, dtype=torch.float64)
    return list(zip(old, old @ change + 0.5, strict=True))


@pytest.mark.parametrize("kind", [LinearConnector, mlp(2), mlp(3)])
def test_a_known_map_of_the_features_gives_the_same_image_tokens(
    kind: type[Connector], tmp_path: Path
) -> None:
    """To features that are wider, so that their rank is deficient."""
    torch.manual_seed(0)
    old = kind(12, 20)
    change = torch.randn(12, 15, dtype=torch.float64)
    fitted, ridge = fit(old, iter(pairs(30, 8, 12, change)), 15)
    assert ridge == 1e-10
    fresh = pairs(5, 8, 12, change)  # the same map
    for before, after in fresh:
        assert torch.allclose(fitted(after), old(before), atol=1e-5)
    assert measure(old, fitted, iter(fresh)) == pytest.approx({"preactivations": 1, "image_tokens": 1})
    fitted.float().save(tmp_path / "saved")
    kind(15, 20).load(tmp_path / "saved")  # refused for other widths
    if kind is not LinearConnector:  # the layers after the first are the old ones
        assert torch.equal(fitted.get_parameter("linear_2.weight"), old.get_parameter("linear_2.weight"))


def test_it_is_the_ridge_regression_of_numpy_also_in_a_stream() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 7)) + 3, rng.normal(size=(200, 4))
    x[:, 6] = x[:, 5]  # one column twice: the rank is deficient
    whole, streamed = Moments(7, 4), Moments(7, 4)
    whole.add(torch.from_numpy(x), torch.from_numpy(y))
    for start in range(0, 200, 13):
        streamed.add(torch.from_numpy(x[start : start + 13]), torch.from_numpy(y[start : start + 13]))
    centred = x - x.mean(0), y - y.mean(0)
    mean = centred[0].var(0).mean()
    for moments in (whole, streamed):
        for ridge, weight, bias in moments.solutions([1e-10, 0.1]):
            rows = np.vstack([centred[0], np.sqrt(200 * ridge * mean) * np.eye(7)])
            wanted = np.linalg.lstsq(rows, np.vstack([centred[1], np.zeros((7, 4))]), rcond=None)[0]
            np.testing.assert_allclose(weight.numpy(), wanted, atol=1e-6)
            guess = x @ weight.numpy() + bias.numpy()
            np.testing.assert_allclose(moments.error(weight, bias), ((guess - y) ** 2).sum(), rtol=1e-9)
            np.testing.assert_allclose(guess.mean(0), y.mean(0), atol=1e-9)


def test_the_ridge_is_chosen_where_it_helps_and_r2_is_about_the_mean() -> None:
    """Fewer rows than features, and noise: without a ridge the fit would be of the noise."""
    torch.manual_seed(0)
    old = LinearConnector(6, 3)
    noisy = [(before, torch.cat([after, torch.randn(2, 40).double()], 1)) for before, after in pairs(
        20, 2, 6, torch.eye(6, dtype=torch.float64))]  # fmt: skip
    fitted, ridge = fit(old, iter(noisy), 46)
    assert ridge > 1e-6
    wanted = torch.cat([old(before) for before, _ in noisy]).detach().numpy()
    guess = torch.cat([fitted(after) for _, after in noisy]).detach().numpy()
    r2 = 1 - ((guess - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert measure(old, fitted, iter(noisy))["image_tokens"] == pytest.approx(r2)


def data_of(world: Path) -> list[DataOptions]:
    tiny = world / "datasets" / "tiny"
    return [DataOptions(path=tiny / "train_captions.json", image_root=tiny)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_of_the_tower_gets_the_old_image_tokens(world: Path, tmp_path: Path, dtype: str) -> None:
    base = str(world / "base")
    copied = shutil.copytree(world / "base" / "vision", tmp_path / "tower")
    vision = VisionOptions("clip", weights=str(copied), layer=-1)
    options = ModelOptions(base=base, vision=vision, connector=ConnectorOptions("mlp2x_gelu"), dtype=dtype)  # type: ignore[arg-type]
    old, new = outline_of(ModelOptions(base=base, dtype=dtype)), outline_of(options)  # type: ignore[arg-type]
    data = FitOptions(data_of(world), pictures=20, batch_size=3)
    made = fit_connector(base, old, new, data, tmp_path / "fit")
    assert made["r2"]["image_tokens"] > (0.999999 if dtype == "float32" else 0.99)
    assert made["pictures"] == 20

    options.connector = ConnectorOptions("mlp2x_gelu", weights=str(tmp_path / "fit"))
    swapped, base_model = assemble(options), assemble(ModelOptions(base=base, dtype=dtype))  # type: ignore[arg-type]
    images = load_images(choose_pictures(data.data, 12), base_model.transform)
    with torch.no_grad():
        wanted, guess = (each.connector(each.vision(images)).float() for each in (base_model, swapped))
    assert torch.allclose(guess, wanted, atol=1e-4 if dtype == "float32" else 0.2)

    # It is kept, and not passed off as a fit to something else.
    assert fit_connector(base, old, new, data, tmp_path / "fit") == json.loads(
        (tmp_path / "fit" / "fit.json").read_text()
    )
    (copied / "note.txt").write_text("another tower")
    other = replace(data, data=[replace(data.data[0], limit=30)])
    with pytest.raises(
        UserError, match="another tower, pictures, and runs have started from it: a_fitted_s0"
    ):
        fit_connector(base, old, new, other, tmp_path / "fit", ["a_fitted_s0"])
    anew = fit_connector(base, old, new, other, tmp_path / "fit")
    assert anew["from"]["pictures"] != made["from"]["pictures"]


def test_pictures_are_different_ones_evenly_over_the_data(world: Path) -> None:
    data = data_of(world)
    every = choose_pictures([*data, *data], 10**6)
    assert len(set(every)) == len(every) == 40
    assert choose_pictures(data, 10) == every[::4]
    with pytest.raises(UserError, match="there are 3 pictures in its data"):
        choose_pictures([replace(data[0], limit=3)], 10)


def test_what_cannot_be_fitted_is_said(world: Path) -> None:
    def outline(kind: str = "mlp2x_gelu", **vision: object) -> object:
        given = {"tower": "clip", "weights": str(world / "base" / "vision"), "layer": -1, **vision}
        options = ModelOptions(
            base=str(world / "base"),
            vision=VisionOptions(**given),  # type: ignore[arg-type]
            connector=ConnectorOptions(kind),
        )
        return outline_of(options)

    old = outline_of(ModelOptions(base=str(world / "base")))
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    sizes = {"image_size": 64, "patch_size": 32}
    reasons = [
        why_not(old, outline()),  # type: ignore[arg-type]
        why_not(old, outline("linear")),  # type: ignore[arg-type]
        why_not(old, outline(weights=None, config={**small, **sizes})),  # type: ignore[arg-type]
        why_not(old, outline(weights=None, config={**small, **sizes, "patch_size": 16})),  # type: ignore[arg-type]
        why_not(old, outline(fit="crop")),  # type: ignore[arg-type]
    ]
    assert reasons[0] is None
    for reason, said in zip(
        reasons[1:],
        ["is mlp2x_gelu, this one linear", "16 features of a picture, this one 4", "drawn anew", "lays"],
        strict=True,
    ):
        assert reason and said in reason
    assert reasons[4] and reasons[4].endswith("(write fit: pad beside its weights)")
