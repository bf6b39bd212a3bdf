"""A tuned model turned into its base and back, and the way between them, against models loaded whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmtune.core.errors import UserError
from mmtune.parts.between import as_base, base_parts, scale_changes
from mmtune.parts.model import VisionLanguageModel, assemble
from mmtune.parts.spec import ModelOptions
from mmtune.tuning.full import FullOptions
from mmtune.tuning.lora import LoraOptions
from tests import tiny_models as tiny

BATCH = tiny.batch([1, 0, 2])


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for the order of sums, which an adapter that was off and is on again may change."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


LORA = LoraOptions(lr=0, rank=4, alpha=8)
FULL = FullOptions(lr=0)
# What trains in each part; the language model of the last starts from one that has an adapter itself.
WAYS: dict[str, dict[str, LoraOptions | FullOptions]] = {
    "adapter and connector": {"connector": FULL, "language": LORA},
    "adapters": {"connector": LORA, "language": LORA},
    "all in full": {"vision": FULL, "connector": FULL, "language": FULL},
    "a second adapter": {"connector": FULL, "language": LORA},
}


def tuned(start: Path, folder: Path, tune: dict[str, LoraOptions | FullOptions], seed: int = 0) -> Path:
    """A model that was moved in all that trains."""
    model = assemble(ModelOptions(base=str(start)))
    torch.manual_seed(seed)
    for part, options in tune.items():
        options.make().attach(model, part)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a model that was tuned from it."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.model(folder / "parts").save_pretrained(folder / "base")
    base = folder / "base"
    if request.param == "a second adapter":
        base = tuned(base, folder / "first", WAYS["adapter and connector"], seed=1)
    return base, tuned(base, folder / "tuned", WAYS[request.param])


def said(model: VisionLanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model(BATCH, True)[1]


def test_the_model_is_its_base_and_itself_again(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    model = VisionLanguageModel.from_pretrained(folder)
    whole = said(model)
    beside = base_parts(model, folder, base, "float32")
    with as_base(model, beside):
        close(said(model), said(VisionLanguageModel.from_pretrained(base)))
    close(said(model), whole)
    assert (said(VisionLanguageModel.from_pretrained(base)) - whole).abs().max() > 0.1
    with pytest.raises(KeyError), as_base(model, beside):
        raise KeyError
    close(said(model), whole)


def test_a_part_without_own_weights_that_trained_is_held_once(tmp_path: Path) -> None:
    tiny.model(tmp_path / "parts").save_pretrained(tmp_path / "base")
    folder = tuned(tmp_path / "base", tmp_path / "tuned", WAYS["adapter and connector"])
    model = VisionLanguageModel.from_pretrained(folder)
    beside = base_parts(model, folder, tmp_path / "base", "float32")
    assert beside.keys() == {"connector", "language"}
    assert beside["language"] is None and beside["connector"] is not None
    put_back = VisionLanguageModel.from_pretrained(folder, instead={"connector": tmp_path / "base"})
    beside = base_parts(put_back, folder, tmp_path / "base", "float32", restored="connector")
    assert beside == {"language": None}
    with as_base(put_back, beside):
        start = VisionLanguageModel.from_pretrained(tmp_path / "base")
        close(said(put_back), said(start))


def test_the_ends_of_the_way_are_base_and_model(pair: tuple[Path, Path]) -> None:
    base, folder = pair
    whole, start = (VisionLanguageModel.from_pretrained(each) for each in (folder, base))
    model = VisionLanguageModel.from_pretrained(folder)
    scale_changes(model, folder, base, 1.0, "float32")
    assert torch.equal(said(model), said(whole))
    scale_changes(model, folder, base, 0.0, "float32")
    torch.testing.assert_close(said(model), said(start), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_between_them_every_weight_is_on_the_straight_line(pair: tuple[Path, Path], scale: float) -> None:
    base, folder = pair
    model = VisionLanguageModel.from_pretrained(folder)
    scale_changes(model, folder, base, scale, "float32")
    start, end = (VisionLanguageModel.from_pretrained(each, merge=True) for each in (base, folder))
    with torch.no_grad():
        others = dict(end.named_parameters())
        for name, weight in start.named_parameters():
            weight.add_(others[name] - weight, alpha=scale)
    torch.testing.assert_close(said(model), said(start), rtol=1e-3, atol=1e-3)
    assert (said(model) - said(end)).abs().max() > 0.05


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    tiny.model(tmp_path / "parts").save_pretrained(tmp_path / "base")
    tiny.model(tmp_path / "others", connector="linear").save_pretrained(tmp_path / "other")
    folder = tuned(tmp_path / "base", tmp_path / "tuned", {"connector": FULL})
    with pytest.raises(UserError, match="there is no way from one to the other"):
        model = VisionLanguageModel.from_pretrained(folder)
        scale_changes(model, folder, tmp_path / "other", 0.5, "float32")
